"""From a projected stream to the heads of a memory: short convolution, SiLU, heads, unit length."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nestor.errors import ShapeError
from nestor.ops.heads import EPSILON, silu_heads, to_unit
from nestor.ops.kernels import covered
from nestor.ops.short_convolution import next_tail, short_convolution

KERNELS = (2, 3, 4)
WIDEST = 256


def convolved_heads(
    x: Tensor,
    weight: Tensor,
    tail: Tensor | None = None,
    *,
    heads: int,
    unit: bool,
    silu: bool = True,
    start_tail: Tensor | None = None,
    position: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``silu_heads(short_convolution(x))`` ``[B, T, H, d / H]`` and the next tail ``[B, K-1, d]``.

    For calls without padding. x: ``[B, T, d]``; weight: ``[d, K]``; tail: ``[B, K-1, d]``, the inputs before
    the call (None: start_tail ``[K-1, d]``, or zeros). silu, unit: whether there is a SiLU, and heads are
    scaled to unit length. position: int64 ``[B, T]`` of each token in its document, where one starts inside
    the call. dtype: of the heads; None: float32 for half precision, else that of x.

    On a GPU with Triton one kernel does it, with float32 sums, from bfloat16 or float32; heads then lie
    inside of tokens in memory. Its backward keeps nothing but x.
    """
    if dtype is None:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    kernel = weight.shape[1]
    if x.shape[1] == 0:
        position = None
    before = tail
    if tail is None and start_tail is not None:
        before = start_tail.expand(x.shape[0], -1, -1)
    known = position is None or start_tail is None  # kernels have zeros before a document
    fits = known and _fits(x, weight, before, heads) and dtype in (x.dtype, torch.float32)
    if fits and covered(x, weight, before):
        from nestor.ops.kernels import streams

        if before is not None:
            before = before.to(x.dtype).contiguous()
        x = x if x.stride(-1) == 1 else x.contiguous()
        position = None if position is None else position.contiguous()
        return streams.convolved_heads(
            x, weight.contiguous(), before, position, heads, unit, EPSILON, dtype, silu
        )
    y = short_convolution(x, weight, tail, start_tail=start_tail, position=position)
    clock = None if position is None else position[:, -1] + 1
    after = next_tail(x, kernel, tail, start_tail=start_tail, clock=clock)
    if silu:
        return silu_heads(y, heads, unit=unit).to(dtype), after
    y = y.to(torch.promote_types(y.dtype, torch.float32)).unflatten(-1, (heads, -1))
    return (to_unit(y) if unit else y).to(dtype), after


def fuses(x: Tensor, width: int, kernel: int) -> bool:
    """Whether `memory_inputs` takes what is projected from x, for heads of this width."""
    return kernel in KERNELS and width <= WIDEST and covered(x)


def memory_inputs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    tails: Sequence[Tensor] | None,
    heads: int,
    scales: Sequence[float],
    *,
    coupled: bool,
    position: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """q, k, v as of `convolved_heads` (q and k of unit length), gates, and the next tails, by kernels.

    x: ``[B, T, 3d + G H]`` or wider, three streams and G gates a head; weight: ``[3d, K]``; bias: ``[G H]``;
    tails: three of ``[B, K-1, d]``. A gate, float32 ``[B, T, H]``, is its one of the scales times the sigmoid
    of its part of ``x + bias``; the first is multiplied by 1 minus the second if they are `coupled`.
    position: int64 ``[B, T]`` of each token in its document, where one starts inside the call. Where `fuses`
    says so.

    Raises: ShapeError for sizes that do not fit.
    """
    from nestor.ops.kernels import streams

    batch, _, width = x.shape
    channels, kernel = len(weight) // 3, weight.shape[1]
    if width < 3 * channels + len(bias):
        raise ShapeError(
            f"x has {width} columns; three streams of {channels} and {len(bias)} gates need more"
        )
    for tail in tails or ():
        if tail.shape != (batch, kernel - 1, channels):
            raise ShapeError(
                f"a convolution tail has shape {list(tail.shape)}; this call needs "
                f"{[batch, kernel - 1, channels]}: the state of as many sequences, from the same layer"
            )
    before = [None] * 3 if tails is None else [tail.to(x.dtype).contiguous() for tail in tails]
    position = None if position is None else position.contiguous()
    q, k, v, gates, *after = streams.memory_inputs(
        x, weight.contiguous(), bias, *before, position, heads, EPSILON, list(scales), coupled
    )
    return [q, k, v], list(gates.unbind(0)), after


def _fits(x: Tensor, weight: Tensor, tail: Tensor | None, heads: int) -> bool:
    """Sizes of which there are kernels; wrong ones are left to the PyTorch form, which says what is wrong."""
    channels, kernel = weight.shape
    known = kernel in KERNELS and channels % heads == 0 and channels // heads <= WIDEST
    right = x.shape[2] == channels
    return known and right and (tail is None or tail.shape == (x.shape[0], kernel - 1, channels))
