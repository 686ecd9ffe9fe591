"""Masked attention through FlexAttention: on a GPU it skips blocks of keys that no query of a block sees."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

# Queries, and keys, of one block of a mask.
BLOCK = 128


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention)


def attend_flex(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    first_visible: Tensor | None,
    window: int | None,
    prefix: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """The rule of `nestor.layers.attention.attend`, with its shapes, for CUDA tensors."""
    batch, length = query.shape[:2]
    stored, sets, count = keys[0].shape[1], len(keys), 0
    if prefix is not None:
        count = len(prefix[0])
        keys = [prefix[0].to(query.dtype).expand(batch, -1, -1, -1), *keys]
        values = [prefix[1].to(query.dtype).expand(batch, -1, -1, -1), *values]
    key, value = torch.cat(keys, dim=1), torch.cat(values, dim=1)
    out = _compiled()(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        block_mask=block_mask(length, stored, sets, count, first_visible, window, query.device),
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return out.transpose(1, 2)


def block_mask(
    length: int,
    stored: int,
    sets: int,
    count: int,
    first_visible: Tensor | None,
    window: int | None,
    device: torch.device | str,
) -> BlockMask:
    """The rule of `attend` on the columns `[prefix | keys ...]`, with no work or memory per query and key.

    A block of queries skips a block of columns if none of its queries sees any of them, and takes it without
    asking the rule if it is full: all of it is prefix, or of one set and seen by all of the queries.

    Args:
        length: queries T.
        stored: keys S of each set, the last T of them of the tokens of the queries.
        sets: key sets, each under the same rule.
        count: columns of the prefix.
        first_visible: `[B, T]` int64 as in `attend`. It does not change which blocks are skipped, and only
            blocks of the prefix are full then.
        window: tokens a query sees, itself included; None: no limit.
    """
    cached, total = stored - length, count + sets * stored

    def visible(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        index = (column - count) % stored - cached
        seen = index <= row
        if window is not None:
            seen = seen & (row - index < window)
        if first_visible is not None:
            seen = seen & (index >= first_visible[b, row])
        return seen | (column < count)

    row = torch.arange(0, length, BLOCK, device=device)[:, None]
    column = torch.arange(0, total, BLOCK, device=device)
    # Per set: the first and last stream index that a block of columns holds of it (none: last before first),
    # and the least and most tokens that a query of a block of rows comes after one of these.
    start = count + stored * torch.arange(sets, device=device)[:, None, None]
    first = torch.maximum(column, start) - start - cached
    last = torch.minimum(column + BLOCK, start + stored) - start - cached - 1
    least, most = row - last, row + BLOCK - 1 - first
    reach = stored if window is None else window

    seen = (column < count) | ((first <= last) & (most >= 0) & (least < reach)).any(0)
    full = column + BLOCK <= count
    if first_visible is None:
        full = full | ((last - first == BLOCK - 1) & (least >= 0) & (most < reach)).any(0)
    # As in `create_block_mask`, a last block of queries that is not complete is never full.
    full = full & (row + BLOCK <= length)
    return BlockMask.from_kv_blocks(
        *_ordered(seen & ~full), *_ordered(full), BLOCK, mask_mod=visible, seq_lengths=(length, total)
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Per row of `[rows, columns]` the number of blocks marked, and the block indices, those marked first."""
    blocks = blocks[None, None].int()
    order = blocks.argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.int().contiguous()
