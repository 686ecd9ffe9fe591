"""Which chunk, and which row of it, each token of a call belongs to.

Chunks are counted per sequence from its last reset: sequences of one batch may stand at different places in
their chunks, have different lengths and contain document boundaries. The engine sees none of that; it walks a
grid ``[B, N, C]`` of chunk rows in which the valid tokens of a row come first.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChunkGrid:
    """N rows of at most C tokens for each of B sequences.

    index:  int64 ``[B, N, C]``, the token that stands in each cell (any token where not valid), or None if
            the tokens fill the grid in order (then only the last row may be short).
    valid:  bool ``[B, N, C]`` or None if every cell holds a token.
    resets: for each row None, or bool ``[B]``: the sequence starts a new document with this row.
    closes: for each row a bool, or bool ``[B]``: the row ends its chunk, so the anchor moves.
    phase:  int64 ``[B]``: position inside the open chunk after the call.
    """

    rows: int
    width: int
    index: Tensor | None
    valid: Tensor | None
    resets: list[Tensor | None]
    closes: list[bool | Tensor]
    phase: Tensor

    def gather(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [B, N, C, ...]; cells without a token hold zero."""
        batch, length = x.shape[:2]
        if self.index is None:
            missing = self.rows * self.width - length
            if missing:
                x = torch.nn.functional.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
            return x.reshape(batch, self.rows, self.width, *x.shape[2:])
        flat = self.index.reshape(batch, -1)
        flat = flat.reshape(*flat.shape, *([1] * (x.dim() - 2))).expand(-1, -1, *x.shape[2:])
        cells = torch.gather(x, 1, flat).reshape(batch, self.rows, self.width, *x.shape[2:])
        assert self.valid is not None
        # Not a product: what stands at a token that is not there may be infinite or no number.
        return torch.where(self.valid.reshape(*self.valid.shape, *[1] * (x.dim() - 2)), cells, 0.0)

    def scatter(self, y: Tensor, length: int) -> Tensor:
        """[B, N, C, ...] -> [B, T, ...]; tokens that stand in no cell (masked ones) become zero."""
        batch = y.shape[0]
        flat = y.reshape(batch, self.rows * self.width, *y.shape[3:])
        if self.index is None:
            return flat[:, :length]
        assert self.valid is not None
        keep = self.valid.reshape(batch, -1)
        # Cells without a token go to an extra last place that is cut off.
        place = torch.where(keep, self.index.reshape(batch, -1), length)
        place = place.reshape(*place.shape, *([1] * (flat.dim() - 2))).expand_as(flat)
        out = flat.new_zeros(batch, length + 1, *flat.shape[2:])
        return out.scatter(1, place, flat)[:, :length]

    def to_rows(self, x: Tensor) -> Tensor:
        """[B, T, H, ...] -> [B H, N, C, ...]"""
        x = self.gather(x)
        axes = (0, 3, 1, 2, *range(4, x.dim()))
        return x.permute(axes).reshape(-1, self.rows, self.width, *x.shape[4:])

    def from_rows(self, x: Tensor, batch: int, length: int) -> Tensor:
        """[B H, N, C, ...] -> [B, T, H, ...]"""
        x = x.unflatten(0, (batch, -1))
        return self.scatter(x.permute(0, 2, 3, 1, *range(4, x.dim())), length)


def chunk_grid(
    batch: int,
    length: int,
    chunk_size: int,
    device: torch.device,
    phase: Tensor | None = None,
    mask: Tensor | None = None,
    resets: Tensor | None = None,
) -> ChunkGrid:
    """Lay ``length`` tokens of ``batch`` sequences out in chunk rows.

    phase:  int64 ``[B]`` position inside the open chunk before the call; None means 0 everywhere.
    mask:   bool ``[B, T]``, False for tokens that are skipped; they take no place in a chunk.
    resets: bool ``[B, T]``, True for the first token of a document; counted only where the mask is True.
    """
    if mask is None and resets is None:
        if length == 1 and phase is not None:
            advanced = phase + 1
            closed = advanced == chunk_size
            return ChunkGrid(1, 1, None, None, [None], [closed], torch.where(closed, 0, advanced))
        if phase is None or not bool(phase.any()):
            return _aligned_grid(batch, length, chunk_size, device)
    return _ragged_grid(batch, length, chunk_size, device, phase, mask, resets)


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
    return ChunkGrid(rows, width, None, valid, [None] * rows, closes, phase)


def _ragged_grid(
    batch: int,
    length: int,
    chunk_size: int,
    device: torch.device,
    phase: Tensor | None,
    mask: Tensor | None,
    resets: Tensor | None,
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
    width = max(int(torch.where(valid, cell, 0).max()) + 1, 1)
    # Masked tokens are sent to an extra last place that is cut off.
    target = torch.where(valid, row * width + cell, rows * width)
    tokens = torch.arange(length, device=device).expand(batch, -1)
    index = torch.full((batch, rows * width + 1), -1, dtype=torch.int64, device=device).scatter(
        1, target, tokens
    )
    index = index[:, :-1].reshape(batch, rows, width)
    occupied = index >= 0
    index = index.clamp(min=0)

    row_flags = torch.zeros(2, batch, rows + 1, dtype=torch.bool, device=device)
    row_target = torch.where(valid, row, rows)
    row_flags[0].scatter_(1, torch.where(starts_document, row_target, rows), True)
    row_flags[1].scatter_(1, torch.where(valid & (place == chunk_size - 1), row_target, rows), True)
    row_resets, row_closes = row_flags[:, :, :rows]
    any_reset = row_resets.any(0).tolist()

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
        valid=occupied,
        resets=[row_resets[:, n] if any_reset[n] else None for n in range(rows)],
        closes=[row_closes[:, n] for n in range(rows)],
        phase=after,
    )
