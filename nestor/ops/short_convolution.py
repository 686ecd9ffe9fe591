"""Causal depthwise convolution over the last few tokens, and the tail that the next call needs."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nestor.errors import ShapeError


class _DepthwiseConvolution(torch.autograd.Function):
    """``y_t = sum_i weight_{K-1-i} x_{t-i}``, i < K, for x ``[B, T, D]`` and weight ``[D, K]``.

    What stands before x are the rows of tail ``[B, K - 1, D]``. A few shifted multiply-adds,
    which a CPU does faster than a grouped convolution.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, tail: Tensor, weight: Tensor) -> Tensor:
        taps = weight.t().contiguous()
        y = x * taps[-1]
        for lag in range(1, len(taps)):
            split, inside, outside = _reach(lag, len(taps), x.shape[1])
            y[:, split:].addcmul_(x[:, inside], taps[-1 - lag])
            y[:, :split].addcmul_(tail[:, outside], taps[-1 - lag])
        ctx.save_for_backward(x, tail, weight)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        x, tail, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Gradients of this gradient are asked for.
            return _differentiable_backward(grad, x, tail, weight)
        taps = weight.t().contiguous()
        grad_x, grad_taps = grad * taps[-1], torch.empty_like(taps)
        grad_tail = torch.zeros_like(tail)
        grad_taps[-1] = (grad * x).sum((0, 1))
        for lag in range(1, len(taps)):
            split, inside, outside = _reach(lag, len(taps), x.shape[1])
            grad_x[:, inside].addcmul_(grad[:, split:], taps[-1 - lag])
            grad_tail[:, outside].addcmul_(grad[:, :split], taps[-1 - lag])
            within = (grad[:, split:] * x[:, inside]).sum((0, 1))
            grad_taps[-1 - lag] = within + (grad[:, :split] * tail[:, outside]).sum((0, 1))
        return grad_x, grad_tail, grad_taps.t()


def _differentiable_backward(
    grad: Tensor, x: Tensor, tail: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, tail and weight, in operations that have gradients themselves."""
    before, length = tail.shape[1], x.shape[1]
    inputs = torch.cat([tail, x], 1)
    spread, taps = [], []
    for place in range(before + 1):
        spread.append(F.pad(grad * weight[:, place], (0, 0, place, before - place)))
        taps.append((grad * inputs[:, place : place + length]).sum((0, 1)))
    grad_inputs = torch.stack(spread).sum(0)
    return grad_inputs[:, before:], grad_inputs[:, :before], torch.stack(taps, 1)


def _reach(lag: int, kernel: int, length: int) -> tuple[int, slice, slice]:
    """What the tap of a lag sees: tokens before `split` see rows of the tail, those from it on rows of x."""
    split = min(lag, length)
    first = kernel - 1 - lag
    return split, slice(0, length - split), slice(first, first + split)


def short_convolution(
    x: Tensor,
    weight: Tensor,
    tail: Tensor | None = None,
    *,
    start_tail: Tensor | None = None,
    position: Tensor | None = None,
) -> Tensor:
    """``y_t = sum_{i<K} weight[:, K-1-i] x_{t-i}``, per channel.

    x: ``[B, T, D]``; weight: ``[D, K]``, the last column for the token itself. tail: ``[B, K-1, D]``, the
    inputs before the call (None: `start_tail`). start_tail: ``[K-1, D]``, what stands before the first token
    of a document (None: zeros). position: int64 ``[B, T]`` position of each token in its document; given only
    if a document starts inside the call, so that no token sees an earlier document. Returns ``[B, T, D]``.
    """
    channels = x.shape[2]
    kernel = weight.shape[1]
    if weight.shape[0] != channels:
        raise ShapeError(f"weight has {weight.shape[0]} channels; x has {channels}.")
    weight = weight.to(x.dtype)
    before_call = _tail(x, tail, start_tail, kernel)
    if position is None:
        return _DepthwiseConvolution.apply(x, before_call, weight)
    extended = torch.cat([before_call, x], 1)
    before = x.new_zeros(kernel - 1, channels) if start_tail is None else start_tail.to(x.dtype)
    length = x.shape[1]
    y = x * weight[:, -1]
    for shift in range(1, kernel):
        seen = extended[:, kernel - 1 - shift : kernel - 1 - shift + length]
        outside = position < shift
        place = (kernel - 1 - shift + position).clamp(0, kernel - 2)
        y = y + torch.where(outside.unsqueeze(-1), before[place], seen) * weight[:, kernel - 1 - shift]
    return y


def next_tail(
    x: Tensor,
    kernel: int,
    tail: Tensor | None = None,
    *,
    start_tail: Tensor | None = None,
    lengths: Tensor | None = None,
    clock: Tensor | None = None,
) -> Tensor:
    """The last K-1 inputs ``[B, K-1, D]`` after the call.

    lengths: int64 ``[B]`` valid tokens of each row (None: all T). clock: int64 ``[B]`` tokens of the current
    document read when the call ends; given if a document may have started inside the call, whose predecessors
    are then replaced by `start_tail`.
    """
    length, channels = x.shape[1:]
    before_call = _tail(x, tail, start_tail, kernel)
    if lengths is None:
        kept = torch.cat([before_call, x[:, max(0, length - kernel + 1) :]], 1)[:, 1 - kernel :]
    else:
        extended = torch.cat([before_call, x], 1)
        place = lengths[:, None] + torch.arange(kernel - 1, device=x.device)
        kept = extended.gather(1, place.unsqueeze(-1).expand(-1, -1, channels))
    if clock is None:
        return kept.contiguous()
    before = x.new_zeros(kernel - 1, channels) if start_tail is None else start_tail.to(x.dtype)
    back = torch.arange(kernel - 1, 0, -1, device=x.device)  # how far before the next token
    outside = back > clock[:, None]
    place = (kernel - 1 - back + clock[:, None]).clamp(0, kernel - 2)
    return torch.where(outside.unsqueeze(-1), before[place], kept)


def _tail(x: Tensor, tail: Tensor | None, start_tail: Tensor | None, kernel: int) -> Tensor:
    if tail is not None:
        if tail.shape != (x.shape[0], kernel - 1, x.shape[2]):
            raise ShapeError(
                f"tail has shape {tuple(tail.shape)}; it must be {(x.shape[0], kernel - 1, x.shape[2])}."
            )
        return tail.to(x.dtype)
    if start_tail is not None:
        return start_tail.to(x.dtype).expand(x.shape[0], -1, -1)
    return x.new_zeros(x.shape[0], kernel - 1, x.shape[2])
