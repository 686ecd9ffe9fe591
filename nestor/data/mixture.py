"""Several streams as one: each lane belongs to one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nestor.data.streams import Batch, LaneStream, as_batch, empty_piece, put_rows
from nestor.errors import ConfigError

#: Builds a source for so many lanes in the whole job, of which this process makes the given ones.
MakeStream = Callable[[int, Sequence[int]], LaneStream]


class Mixture(LaneStream):
    """Lanes drawn from several sources by weight.

    The lanes are dealt to the sources once, as evenly as the weights allow and interleaved, so that each
    rank gets its share of each source; the deal depends on the weights and `batch_size` only. A lane stays
    with its source, so State carried along a lane never passes from one to another.

    Args:
        sources: `(weight, make)` pairs; `make(batch_size, lanes)` builds the source with `batch_size` lanes
            in all (its share of the mixture's) of which this process makes `lanes`.
        batch_size: lanes of all ranks together.
        length: tokens per lane in one batch.
        lanes: lanes of this process, as in `LaneStream`.

    Raises:
        ConfigError: a weight is not positive, or so small that its source gets no lane.
    """

    def __init__(
        self,
        sources: Sequence[tuple[float, MakeStream]],
        batch_size: int,
        length: int,
        *,
        lanes: Sequence[int] | None = None,
    ) -> None:
        super().__init__(batch_size, length, lanes)
        self.weights = tuple(float(weight) for weight, _ in sources)
        self.owners = deal_lanes(self.weights, batch_size)
        # The k-th lane of a source, for every lane of the mixture.
        within = [self.owners[:lane].count(owner) for lane, owner in enumerate(self.owners)]
        self.streams: list[LaneStream] = []
        self._rows: list[list[int]] = []
        for owner, (_, make) in enumerate(sources):
            rows = [row for row, lane in enumerate(self.lanes) if self.owners[lane] == owner]
            stream = make(self.owners.count(owner), [within[self.lanes[row]] for row in rows])
            if stream.length != length:
                raise ConfigError(
                    f"source {owner} of the mixture has segments of {stream.length} tokens, not {length}"
                )
            self.streams.append(stream)
            self._rows.append(rows)

    def __next__(self) -> Batch:
        batch = as_batch(empty_piece(len(self.lanes), self.length))
        for stream, rows in zip(self.streams, self._rows, strict=True):
            put_rows(batch, rows, next(stream))
        self.position += self.length
        return batch

    def identity(self) -> dict[str, Any]:
        return {
            "kind": "mixture",
            "batch_size": self.batch_size,
            "weights": list(self.weights),
            "sources": [stream.identity() for stream in self.streams],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for stream in self.streams:
            stream.position = self.position

    def close(self) -> None:
        for stream in self.streams:
            stream.close()


def deal_lanes(weights: Sequence[float], batch_size: int) -> list[int]:
    """The source of each of `batch_size` lanes: every lane goes to the source that lags its weight most.

    Raises:
        ConfigError: as in `Mixture`.
    """
    if not weights or any(weight <= 0 or not np.isfinite(weight) for weight in weights):
        raise ConfigError(f"mixture weights are {list(weights)}; each must be positive")
    shares = [weight / sum(weights) for weight in weights]
    counts = [0] * len(weights)
    owners = []
    for lane in range(batch_size):
        lag = [share * (lane + 1) - count for share, count in zip(shares, counts, strict=True)]
        owner = lag.index(max(lag))
        counts[owner] += 1
        owners.append(owner)
    if 0 in counts:
        least = counts.index(0)
        needed = int(np.ceil(1 / shares[least]))
        raise ConfigError(
            f"weight {weights[least]} of {list(weights)} gives source {least} none of {batch_size} lanes: "
            f"raise the batch size to about {needed}, or the weight"
        )
    return owners
