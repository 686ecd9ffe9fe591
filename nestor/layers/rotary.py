"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the half-split layout of Llama."""

from __future__ import annotations

import torch
from torch import Tensor

from nestor.ops.operators import operator


def rotary_table(position: Tensor, width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each `[B, T, 1, width / 2]` of `dtype`, for positions `[B, T]` int64.

    Pair `i` of the width turns by `position * theta^(-2i / width)`. Angles are formed in float64 where the
    device has it: at position 10^6 a float32 angle is wrong by several hundredths of a radian. `B` is 1 where
    all rows share their positions (a stride of 0).
    """
    if position.stride(0) == 0:
        position = position[:1]
    # torch.compile would form the angles anew, in float64, for each element that it turns. torch.export
    # traces without dynamo. (`is_exporting` is true in PyTorch 2.11 in all that dynamo traces.)
    traced = torch.compiler.is_dynamo_compiling()
    return (_opaque_table if traced else _table)(position, width, theta, dtype)


def _table(position: Tensor, width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    exact = torch.float32 if position.device.type == "mps" else torch.float64
    exponent = torch.arange(0, width, 2, device=position.device, dtype=exact) / width
    angle = position[:, :, None, None].to(exact) * theta**-exponent
    return angle.cos().to(dtype), angle.sin().to(dtype)


_opaque_table = operator("rotary_table")(_table)


@_opaque_table.register_fake
def _(position: Tensor, width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (*position.shape, 1, (width + 1) // 2)
    return position.new_empty(shape, dtype=dtype), position.new_empty(shape, dtype=dtype)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn `x` `[B, T, H, p]` by the angles of `rotary_table`."""
    cos, sin = table
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
