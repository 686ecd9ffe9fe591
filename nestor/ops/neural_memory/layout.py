"""Which chunk, and which row of it, each token of a call belongs to.

Chunks are counted per sequence from its last reset: sequences of one batch may stand at different places in
their chunks, have different lengths and contain document boundaries. The engine sees none of that; it walks a
grid ``[B, N, C]`` of chunk rows in which the valid tokens of a row come first.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChunkGrid:
    """N rows of at most C tokens for each of B sequences.

    index: int64 ``[B, N, C]``, the token that stands in each cell, or -1; None if the tokens fill the grid in
        order (then only the last row may be short).
    place: int64 ``[B, T]``, the cell ``row * C + column`` in which each token stands, or -1; None with index.
    valid: bool ``[B, N, C]`` or None if every cell holds a token.
    row_resets: bool ``[B, N]``, the sequence starts a new document with this row; None: no row does.
    row_closes: bool ``[B, N]``, the row ends its chunk, so the anchor moves; or for each row a bool or
        bool ``[B]``.
    phase: int64 ``[B]``, position inside the open chunk after the call.
    """

    rows: int
    width: int
    index: Tensor | None
    place: Tensor | None
    valid: Tensor | None
    row_resets: Tensor | None
    row_closes: Tensor | list[bool | Tensor]
    phase: Tensor

    @functools.cached_property
    def resets(self) -> list[Tensor | None]:
        """For each row None, or bool ``[B]``: the sequence starts a new document with this row."""
        if self.row_resets is None:
            return [None] * self.rows
        some = self.row_resets.any(0).tolist()
        return [row if any_ else None for row, any_ in zip(self.row_resets.unbind(1), some, strict=True)]

    @functools.cached_property
    def closes(self) -> list[bool | Tensor]:
        """For each row a bool, or bool ``[B]``: the row ends its chunk."""
        return list(self.row_closes.unbind(1)) if isinstance(self.row_closes, Tensor) else self.row_closes

    def gather(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [B, N, C, ...]; cells without a token hold zero."""
        batch, length = x.shape[:2]
        if self.index is None:
            missing = self.rows * self.width - length
            if missing:
                x = torch.nn.functional.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
            return x.reshape(batch, self.rows, self.width, *x.shape[2:])
        assert self.place is not None
        return _Rows.apply(x, self.index.flatten(1), self.place).unflatten(1, (self.rows, self.width))

    def scatter(self, y: Tensor, length: int) -> Tensor:
        """[B, N, C, ...] -> [B, T, ...]; tokens that stand in no cell (masked ones) become zero."""
        batch = y.shape[0]
        flat = y.reshape(batch, self.rows * self.width, *y.shape[3:])
        if self.index is None:
            return flat[:, :length]
        assert self.place is not None
        return _Rows.apply(flat, self.place, self.index.flatten(1))

    def to_rows(self, x: Tensor) -> Tensor:
        """[B, T, H, ...] -> [B H, N, C, ...]"""
        x = self.gather(x)
        axes = (0, 3, 1, 2, *range(4, x.dim()))
        return x.permute(axes).reshape(-1, self.rows, self.width, *x.shape[4:])

    def from_rows(self, x: Tensor, batch: int, length: int) -> Tensor:
        """[B H, N, C, ...] -> [B, T, H, ...]"""
        x = x.unflatten(0, (batch, -1))
        return self.scatter(x.permute(0, 2, 3, 1, *range(4, x.dim())), length)


class _Rows(torch.autograd.Function):
    """The rows of x ``[B, S, ...]`` at `places` ``[B, N]``, zero where a place is -1; `back` ``[B, S]`` says
    where each row of x went, if anywhere. Each goes to one place, so the gradient needs no sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(places, back)
        batch, rows = x.shape[:2]
        first = torch.arange(0, batch * rows, rows, device=x.device)[:, None]
        chosen = (places.clamp(min=0) + first).flatten()
        y = x.reshape(batch * rows, -1).index_select(0, chosen).view(*places.shape, *x.shape[2:])
        # Not a product: what stands at a token that is not there may be infinite or no number.
        return y.masked_fill_((places < 0).view(*places.shape, *[1] * (x.dim() - 2)), 0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        places, back = ctx.saved_tensors
        return _Rows.apply(g, back, places), None, None


def chunk_grid(
    batch: int,
    length: int,
    chunk_size: int,
    device: torch.device,
    phase: Tensor | None = None,
    mask: Tensor | None = None,
    resets: Tensor | None = None,
    whole: bool = False,
) -> ChunkGrid:
    """Lay ``length`` tokens of ``batch`` sequences out in chunk rows.

    phase:  int64 ``[B]`` position inside the open chunk before the call; None means 0 everywhere.
    mask:   bool ``[B, T]``, False for tokens that are skipped; they take no place in a chunk.
    resets: bool ``[B, T]``, True for the first token of a document; counted only where the mask is True.
    whole:  whether rows have room for a chunk even if none holds as many tokens.

    Counting rows waits for a GPU: the layers of a model, which are given the same mask and resets, do it once
    (`shared_grids`).
    """
    if mask is None and resets is None:
        if length == 1 and phase is not None:
            advanced = phase + 1
            closed = advanced == chunk_size
            return ChunkGrid(1, 1, None, None, None, None, [closed], torch.where(closed, 0, advanced))
        if phase is None or not bool(phase.any()):
            return _aligned_grid(batch, length, chunk_size, device)
    make = functools.partial(_ragged_grid, batch, length, chunk_size, device, phase, mask, resets, whole)
    return make() if phase is not None else _shared(make, (batch, length, chunk_size, whole), mask, resets)


_here = threading.local()


@contextmanager
def shared_grids() -> Iterator[None]:
    """Inside, grids of the same mask and resets are counted once: for the layers of a model in one call. The
    tensors must not change meanwhile."""
    before = getattr(_here, "grids", None)
    _here.grids = {} if before is None else before
    try:
        yield
    finally:
        _here.grids = before


def _shared(make: Callable[[], ChunkGrid], choices: tuple[Any, ...], *given: Tensor | None) -> ChunkGrid:
    """What `make` makes, or inside `shared_grids` has made, of the same tensors in the same queue."""
    if torch.compiler.is_compiling():
        return make()
    grids = getattr(_here, "grids", None)
    if grids is None:
        return make()
    device = next(x.device for x in given if x is not None)
    queue = torch.cuda.current_stream(device) if device.type == "cuda" else None
    key = (choices, queue, *map(id, given))
    if key not in grids:
        # With the tensors, whose numbers are theirs as long as they are kept.
        grids[key] = given, make()
    return grids[key][1]


def _aligned_grid(batch: int, length: int, chunk_size: int, device: torch.device) -> ChunkGrid:
    width = min(chunk_size, length)
    rows = -(-length // width)
    left = length % chunk_size
    valid = None
    if rows * width != length:
        valid = (
            (torch.arange(rows * width, device=device) < length).reshape(1, rows, width).expand(batch, -1, -1)
        )
    closes: list[bool | Tensor] = [True] * rows
    if left:
        closes[-1] = False
    phase = torch.full((batch,), left, dtype=torch.int64, device=device)
    return ChunkGrid(rows, width, None, None, valid, None, closes, phase)


def _ragged_grid(
    batch: int,
    length: int,
    chunk_size: int,
    device: torch.device,
    phase: Tensor | None,
    mask: Tensor | None,
    resets: Tensor | None,
    whole: bool,
) -> ChunkGrid:
    valid = torch.ones(batch, length, dtype=torch.bool, device=device) if mask is None else mask
    start = torch.zeros(batch, dtype=torch.int64, device=device) if phase is None else phase
    starts_document = torch.zeros_like(valid) if resets is None else resets & valid

    # Position of every token in its document, counted over valid tokens and from the open chunk's start.
    count = valid.to(torch.int64).cumsum(1) - valid.to(torch.int64)  # valid tokens before this one
    base = torch.where(starts_document, count, torch.full_like(count, -1)).cummax(1).values
    position = torch.where(base < 0, count + start[:, None], count - base)

    place = position % chunk_size
    starts_row = valid & ((place == 0) | (count == 0))
    row = starts_row.to(torch.int64).cumsum(1) - 1
    row_first = torch.where(starts_row, count, torch.zeros_like(count)).cummax(1).values
    cell = count - row_first

    rows = max(int(row.max()) + 1, 1)
    width = chunk_size if whole else max(int(torch.where(valid, cell, 0).max()) + 1, 1)
    # Masked tokens are sent to an extra last place that is cut off.
    target = torch.where(valid, row * width + cell, rows * width)
    tokens = torch.arange(length, device=device).expand(batch, -1)
    index = torch.full((batch, rows * width + 1), -1, dtype=torch.int64, device=device).scatter(
        1, target, tokens
    )
    index = index[:, :-1].reshape(batch, rows, width)
    occupied = index >= 0

    row_flags = torch.zeros(2, batch, rows + 1, dtype=torch.bool, device=device)
    row_target = torch.where(valid, row, rows)
    row_flags[0].scatter_(1, torch.where(starts_document, row_target, rows), True)
    row_flags[1].scatter_(1, torch.where(valid & (place == chunk_size - 1), row_target, rows), True)
    row_resets, row_closes = row_flags[:, :, :rows]

    used = valid.sum(1)
    last = torch.where(valid, position, torch.full_like(position, -1))
    # The last valid token is the one with the most valid tokens before it.
    final = last.gather(
        1, torch.where(valid, count, torch.full_like(count, -1)).argmax(1, keepdim=True)
    ).squeeze(1)
    after = torch.where(used > 0, (final + 1) % chunk_size, start)
    return ChunkGrid(
        rows=rows,
        width=width,
        index=index,
        place=torch.where(valid, target, -1),
        valid=occupied,
        row_resets=None if resets is None else row_resets,
        row_closes=row_closes,
        phase=after,
    )
