"""From a projected stream to the heads of a memory: SiLU, split, unit length, as one function."""

from typing import Any

import torch
from torch import Tensor

# Near zero a vector of unit length would have no gradient; below sqrt(EPSILON) it fades instead.
EPSILON = 1e-6


class _SiluHeads(torch.autograd.Function):
    """Few passes over memory and few temporaries, which is what this costs on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, heads: int, unit: bool) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        by_head = x.to(dtype).unflatten(-1, (heads, -1)).transpose(1, 2)
        # Heads lie outside of tokens in memory, as the walk over a head's chunks reads them.
        y = torch.nn.functional.silu(by_head.clone(memory_format=torch.contiguous_format), inplace=True)
        y = y.transpose(1, 2)
        inverse = None
        if unit:
            length = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
            inverse = torch.rsqrt(length.square_().add_(EPSILON))
            y.mul_(inverse)
        ctx.save_for_backward(x, y if unit else None, inverse)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        x, y, inverse = ctx.saved_tensors
        if inverse is not None:
            # Of s / |s|: the part of the gradient along y changes the length alone.
            along = (grad * y).sum(-1, keepdim=True)
            grad = torch.addcmul(grad, y, along, value=-1.0).mul_(inverse)
        grad_x = torch.ops.aten.silu_backward(grad.flatten(-2), x.to(grad.dtype))
        return grad_x.to(x.dtype), None, None


def silu_heads(x: Tensor, heads: int, *, unit: bool) -> Tensor:
    """``silu(x)`` split into heads, each scaled to unit length if `unit`: ``s / sqrt(|s|^2 + 1e-6)``.

    ``[B, T, d]`` to ``[B, T, H, d / H]``, float32 for half precision, else in the dtype of x. In memory heads
    lie outside of tokens.
    """
    return _SiluHeads.apply(x, heads, unit)


def to_unit(x: Tensor, eps: float = EPSILON) -> Tensor:
    """x / sqrt(||x||^2 + eps) over the last axis."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)
