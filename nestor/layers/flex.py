"""Masked attention through FlexAttention: on a GPU it skips blocks of keys that no query of a block sees."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


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
    stored = keys[0].shape[1]
    cached = stored - length
    count = 0
    if prefix is not None:
        count = len(prefix[0])
        keys = [prefix[0].to(query.dtype).expand(batch, -1, -1, -1), *keys]
        values = [prefix[1].to(query.dtype).expand(batch, -1, -1, -1), *values]
    key, value = torch.cat(keys, dim=1), torch.cat(values, dim=1)

    def visible(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        index = (column - count) % stored - cached
        seen = index <= row
        if window is not None:
            seen = seen & (row - index < window)
        if first_visible is not None:
            seen = seen & (index >= first_visible[b, row])
        return seen | (column < count)

    rows = None if first_visible is None else batch
    mask = create_block_mask(visible, rows, None, length, key.shape[1], device=query.device)
    out = _compiled()(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        block_mask=mask,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return out.transpose(1, 2)
