"""What the layers know about the tokens of one call: positions, valid lengths and document boundaries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nestor.errors import ShapeError


@dataclass(frozen=True)
class Span:
    """The tokens of one call, shared by all layers of a model.

    Tokens of a row are left-justified: `x[b, :lengths[b]]` are real, what follows is padding that no layer
    may store. A reset marks the first token of a new document; everything before it is forgotten
    structurally. Resets on padding have no effect. Stream indices count from the first token of the call, so
    tokens read by earlier calls have negative indices.

    Attributes:
        position: `[B, T]` int64, position of each token within its document, from 0.
        document_start: `[B, T]` int64, stream index at which the document of each token starts; `-clock`
            where it started before this call.
        clock: `[B]` int64, tokens of the current document read before this call; None for a fresh sequence.
        lengths: `[B]` int64, number of valid tokens of each row; None when all `T` are valid.
        resets: `[B, T]` bool, token starts a new document; None when no token does.
        valid: `[B, T]` bool, True at real tokens; None when all are.
    """

    position: Tensor
    document_start: Tensor
    clock: Tensor | None = None
    lengths: Tensor | None = None
    resets: Tensor | None = None
    valid: Tensor | None = None

    @staticmethod
    def build(
        clock: Tensor | None,
        batch: int,
        length: int,
        device: torch.device | str,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> Span:
        """Derive positions from the clock (`[B]` int64, None = fresh), valid lengths and resets.

        Raises:
            ShapeError: `clock`, `lengths` or `resets` does not have the shape that `batch` and `length` ask
                for.
        """
        _check("clock", clock, (batch,))
        _check("lengths", lengths, (batch,))
        _check("resets", resets, (batch, length))
        index = torch.arange(length, device=device)
        if clock is None:
            # Kept as one row seen `batch` times (stride 0): per-position tables are then computed once.
            start = torch.zeros((), dtype=torch.int64, device=device).expand(batch, length)
        else:
            start = (-clock)[:, None].expand(batch, length)
        if resets is None:
            position = index.expand(batch, length) if clock is None else index - start
        else:
            last_reset = torch.where(resets, index, -1).cummax(dim=1).values
            start = torch.where(last_reset >= 0, last_reset, start)
            position = index - start
        valid = None if lengths is None else index < lengths[:, None]
        return Span(position, start, clock, lengths, resets, valid)

    @property
    def shape(self) -> tuple[int, int]:
        """`(B, T)`."""
        return self.position.shape[0], self.position.shape[1]

    @property
    def document(self) -> Tensor:
        """`[B, T]` int64, how many resets a row has seen in this call up to and including the token."""
        if self.resets is None:
            return torch.zeros_like(self.position)
        return self.resets.to(torch.int64).cumsum(dim=1)

    def clock_after(self) -> Tensor:
        """`[B]` int64, tokens of the current document read once this call is over."""
        batch, length = self.shape
        clock = self.clock if self.clock is not None else self.position.new_zeros(batch)
        if length == 0:
            return clock
        if self.lengths is None:
            return self.position[:, -1] + 1
        last = (self.lengths - 1).clamp(min=0)
        read = self.position.gather(1, last[:, None])[:, 0] + 1
        return torch.where(self.lengths > 0, read, clock)


def _check(name: str, value: Tensor | None, shape: tuple[int, ...]) -> None:
    if value is not None and tuple(value.shape) != shape:
        raise ShapeError(f"{name} has shape {list(value.shape)}; these tokens need {list(shape)}")
