"""Batches of contiguous token lanes.

A *lane* is one row of the batch over time: batch k + 1 continues row b where batch k ended, so that a
model's State can be carried from batch to batch. `resets` marks the tokens before which everything is to be
forgotten.

Lanes are numbered over the whole job: `batch_size` counts the lanes of all ranks together, and a rank makes
the lanes that `rank_lanes` gives it. What a lane yields depends on its number and on `batch_size` only, so
W ranks see together exactly what one rank would see.

Position in a stream is one integer, the number of tokens that each lane has yielded. It is the whole state:
it is the same on every rank, and any batch can be made from it directly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from nestor.data.tokenized import TokenizedCorpus
from nestor.errors import ConfigError, DataError, StateMismatchError

#: Label of a position that is not trained on (the default of `torch.nn.functional.cross_entropy`).
IGNORED = -100


class Batch(TypedDict):
    """`input_ids` [B, T] int64; `labels` [B, T] int64, the next tokens (not to be shifted again), -100
    where none is asked for; `resets` [B, T] bool, True at the first token of a document; `weights` [B, T]
    float32, how much the loss on a label counts: 1 in text, what a task says in its documents."""

    input_ids: Tensor
    labels: Tensor
    resets: Tensor
    weights: Tensor


#: ids and labels int64, resets bool, weights float32 of consecutive tokens of a lane, each [length].
Piece = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def empty_piece(*shape: int) -> Piece:
    """Room for tokens, with no reset and every weight 1."""
    ids, labels = np.empty(shape, np.int64), np.empty(shape, np.int64)
    return ids, labels, np.zeros(shape, bool), np.ones(shape, np.float32)


def as_batch(piece: Piece) -> Batch:
    """The arrays [B, T] of a batch as tensors."""
    ids, labels, resets, weights = map(torch.from_numpy, piece)
    return Batch(input_ids=ids, labels=labels, resets=resets, weights=weights)


def as_piece(batch: Batch) -> Piece:
    """Reverse of `as_batch`."""
    ids, labels, resets, weights = batch["input_ids"], batch["labels"], batch["resets"], batch["weights"]
    return ids.numpy(), labels.numpy(), resets.numpy(), weights.numpy()


def put_rows(batch: Batch, rows: Sequence[int], part: Batch) -> None:
    """Write a batch of some lanes to their rows of the whole."""
    for name in batch:
        batch[name][rows] = part[name]  # type: ignore[literal-required]


class LaneStream:
    """An endless iterator of batches. A subclass says what lane `lane` holds at `start .. start + length`.

    Args:
        batch_size: number of lanes of all ranks together.
        length: tokens per lane in one batch (T). It may change between a save and a resume.
        lanes: which lanes this process makes, in batch order; by default all.
    """

    def __init__(self, batch_size: int, length: int, lanes: Sequence[int] | None = None) -> None:
        if batch_size < 1 or length < 1:
            raise ConfigError(f"batch_size is {batch_size} and length is {length}; both must be at least 1")
        self.batch_size = batch_size
        self.length = length
        self.lanes = tuple(range(batch_size) if lanes is None else lanes)
        if any(not 0 <= lane < batch_size for lane in self.lanes):
            raise ConfigError(f"lanes are {list(self.lanes)}; they must lie in 0..{batch_size - 1}")
        self.position = 0

    def __iter__(self) -> LaneStream:
        return self

    def __next__(self) -> Batch:
        batch = empty_piece(len(self.lanes), self.length)
        for row, lane in enumerate(self.lanes):
            for whole, part in zip(batch, self._read(lane, self.position, self.length), strict=True):
                whole[row] = part
        self.position += self.length
        return as_batch(batch)

    def identity(self) -> dict[str, Any]:
        """What the stream's content depends on, JSON-able."""
        raise TypeError(f"{type(self).__name__} does not say what it depends on: define identity()")

    def _read(self, lane: int, start: int, length: int) -> Piece:
        """Tokens `start .. start + length` of one lane."""
        raise TypeError(f"{type(self).__name__} has no lanes: define _read()")

    def state_dict(self) -> dict[str, Any]:
        """Position and identity, JSON-able. The same on every rank."""
        return {"position": self.position, "identity": self.identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            StateMismatchError: it was taken from a stream with other content; names what differs.
        """
        mine, theirs = self.identity(), state["identity"]
        differing = [key for key in sorted(mine.keys() | theirs.keys()) if mine.get(key) != theirs.get(key)]
        if differing:
            parts = [f"{key} was {theirs.get(key)!r} and is {mine.get(key)!r}" for key in differing]
            raise StateMismatchError(
                f"the position of a different data stream cannot be resumed: {'; '.join(parts)}. "
                "Restore the data settings of the run, or start a new run"
            )
        self.position = int(state["position"])

    def close(self) -> None:
        """Release what the stream holds (nothing here; a prefetcher has a thread)."""


class TokenStream(LaneStream):
    """A tokenised corpus, packed without gaps.

    In each epoch the documents, in an order drawn from `seed`, form a ring that is turned by a drawn offset
    and cut into `batch_size` equal spans (to one token), one a lane. A lane reads its span to the end and
    goes on with its span of the next epoch. So every token of every document is fed exactly once an epoch,
    and lanes begin at different places. With `shuffle=False` the documents keep their order and lane 0
    starts at the first.

    A document of n tokens takes n positions. Its last token has the label `eos`; eos itself is not fed, and
    the first token of a document is not predicted. `resets` is True at the first token of a document and of
    a span. The end of a span inside a document predicts the document's next token (which another lane
    feeds).

    Args:
        corpus: token ids with document offsets.
        eos: label of a document's last token; None leaves it out (-100).

    Raises:
        DataError: the corpus has fewer tokens than one segment (`length`) or than lanes.
    """

    def __init__(
        self,
        corpus: TokenizedCorpus,
        batch_size: int,
        length: int,
        *,
        eos: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        lanes: Sequence[int] | None = None,
    ) -> None:
        super().__init__(batch_size, length, lanes)
        if corpus.n_tokens < max(length, batch_size):
            raise DataError(
                f"corpus {corpus.label} has {corpus.n_tokens} tokens, fewer than one segment of {length} "
                f"or than its {batch_size} lanes: give more text, or lower the segment length or batch size"
            )
        self.corpus = corpus
        self.eos = eos
        self.seed = seed
        self.shuffle = shuffle
        self._rings: dict[int, _Ring] = {}

    def identity(self) -> dict[str, Any]:
        return {
            "kind": "text",
            "corpus": self.corpus.identity,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "eos": self.eos,
        }

    def epoch(self, lane: int = 0) -> float:
        """How many times lane `lane` has read its span."""
        return self.position / self._span(lane)[1]

    def _span(self, lane: int) -> tuple[int, int]:
        """Start and length of a lane's span of the ring."""
        total = self.corpus.n_tokens
        start = lane * total // self.batch_size
        return start, (lane + 1) * total // self.batch_size - start

    def _read(self, lane: int, start: int, length: int) -> Piece:
        span_start, span_length = self._span(lane)
        parts = []
        while length:
            epoch, inside = divmod(start, span_length)
            count = min(length, span_length - inside)
            part = self._ring(epoch).read(span_start + inside, count)
            if inside == 0:
                part[2][0] = True
            parts.append(part)
            start, length = start + count, length - count
        ids, labels, resets, weights = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return ids, labels, resets, weights

    def _ring(self, epoch: int) -> _Ring:
        if epoch not in self._rings:
            # Spans differ by a token, so lanes pass from one epoch to the next at different times.
            self._rings = {key: ring for key, ring in self._rings.items() if key >= epoch - 1}
            self._rings[epoch] = _Ring(self.corpus, self.eos, (self.seed, epoch) if self.shuffle else None)
        return self._rings[epoch]


class _Ring:
    """The documents of one epoch, in their order, as a ring of tokens."""

    def __init__(self, corpus: TokenizedCorpus, eos: int | None, seed: tuple[int, int] | None) -> None:
        self.corpus = corpus
        self.last_label = IGNORED if eos is None else eos
        self.order = np.arange(corpus.n_documents)
        self.turn = 0
        if seed is not None:
            rng = np.random.default_rng(seed)
            self.order = rng.permutation(corpus.n_documents)
            self.turn = int(rng.integers(corpus.n_tokens))
        lengths = np.diff(corpus.offsets)[self.order]
        self.starts = np.concatenate([[0], np.cumsum(lengths)])

    def read(self, start: int, length: int) -> Piece:
        """`length` tokens from `start` on (before the turn); never more than a whole ring."""
        ids, labels, resets, weights = empty_piece(length)
        place = (start + self.turn) % self.corpus.n_tokens
        slot = int(np.searchsorted(self.starts, place, side="right")) - 1
        done = 0
        while done < length:
            document = self.order[slot]
            first, end = int(self.corpus.offsets[document]), int(self.corpus.offsets[document + 1])
            inside = place - int(self.starts[slot])
            count = min(length - done, end - first - inside)
            here = slice(done, done + count)
            source = first + inside
            ids[here] = self.corpus.tokens[source : source + count]
            following = self.corpus.tokens[source + 1 : min(source + count + 1, end)]
            labels[done : done + len(following)] = following
            labels[done + len(following) : done + count] = self.last_label
            resets[done] |= inside == 0
            done += count
            slot = (slot + 1) % self.corpus.n_documents
            place = int(self.starts[slot])
        return ids, labels, resets, weights


def rank_lanes(batch_size: int, rank: int, world_size: int) -> range:
    """Lanes of one data-parallel rank: rank r of W makes lanes `r * B / W` up to `(r + 1) * B / W`.

    Raises:
        ConfigError: the lanes cannot be divided evenly.
    """
    if batch_size % world_size:
        raise ConfigError(f"batch_size is {batch_size}; it must be a multiple of the {world_size} processes")
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank is {rank}; it must lie in 0..{world_size - 1}")
    share = batch_size // world_size
    return range(rank * share, (rank + 1) * share)
