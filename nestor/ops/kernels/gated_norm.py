"""RMS norm of a memory's heads times the output gate in one pass over memory (see ../gated_norm.py).

    out = n w sigmoid(g)     n = y r     r = 1 / sqrt(mean(y^2) + eps)

A row is one head of one token; a program has R rows, in the backward TURNS times as many.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nestor.ops.operators import operator

# Elements of a program's tile, for four warps; tiles that one program of the backward walks through.
TILE = 2048
TURNS = 4


@triton.jit
def _rows(first, tokens, heads, total, R: tl.constexpr):
    """Sequence, token and head of R rows ``[R, 1]``, and whether there is such a row."""
    # Divided as int32, which is several times faster; int64 only where rows become addresses.
    row = first + tl.arange(0, R)[:, None]
    place = row // heads
    b, t, h = place // tokens, place % tokens, row % heads
    return row.to(tl.int64), b.to(tl.int64), t.to(tl.int64), h.to(tl.int64), row < total


@triton.jit
def gated_norm_kernel(
    Y, G, WEIGHT, OUT, yb, yt, yh, gb, gt, tokens, heads, total, eps,
    WIDTH: tl.constexpr, P: tl.constexpr, R: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, P)[None, :]
    row, b, t, h, inside = _rows(tl.program_id(0) * R, tokens, heads, total, R)
    inside = inside & (c < WIDTH)
    y = tl.load(Y + b * yb + t * yt + h * yh + c, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(WEIGHT + c, mask=c < WIDTH, other=0.0).to(tl.float32)
    out = y * (1.0 / tl.sqrt(tl.sum(y * y, 1, keep_dims=True) / WIDTH + eps)) * w
    if GATED:
        g = tl.load(G + b * gb + t * gt + h * WIDTH + c, mask=inside, other=0.0).to(tl.float32)
        out = out / (1.0 + tl.exp(-g))
    tl.store(OUT + row * WIDTH + c, out.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def gated_norm_backward_kernel(
    Y, G, WEIGHT, G_OUT, G_Y, G_G, PARTS, yb, yt, yh, gb, gt, ob, ot, tokens, heads, total, eps,
    WIDTH: tl.constexpr, P: tl.constexpr, R: tl.constexpr, TURNS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """G_OUT ``[B, T, H p]``; PARTS ``[programs, p]``: each program's part of the gradient of the weight."""
    c = tl.arange(0, P)[None, :]
    w = tl.load(WEIGHT + c, mask=c < WIDTH, other=0.0).to(tl.float32)
    g_w = tl.zeros((R, P), tl.float32)
    for turn in range(TURNS):
        first = (tl.program_id(0) * TURNS + turn) * R
        row, b, t, h, inside = _rows(first, tokens, heads, total, R)
        inside = inside & (c < WIDTH)
        y = tl.load(Y + b * yb + t * yt + h * yh + c, mask=inside, other=0.0).to(tl.float32)
        column = h * WIDTH + c
        v = tl.load(G_OUT + b * ob + t * ot + column, mask=inside, other=0.0).to(tl.float32)
        r = 1.0 / tl.sqrt(tl.sum(y * y, 1, keep_dims=True) / WIDTH + eps)
        n = y * r
        if GATED:
            g = tl.load(G + b * gb + t * gt + column, mask=inside, other=0.0).to(tl.float32)
            gate = 1.0 / (1.0 + tl.exp(-g))
            v = v * gate
            g_g = v * n * w * (1.0 - gate)
            tl.store(G_G + row * WIDTH + c, g_g.to(G_G.dtype.element_ty), mask=inside)
        g_w += v * n
        v = v * w
        g_y = r * (v - n * (tl.sum(v * n, 1, keep_dims=True) / WIDTH))
        tl.store(G_Y + row * WIDTH + c, g_y.to(G_Y.dtype.element_ty), mask=inside)
    tl.store(PARTS + tl.program_id(0) * WIDTH + c, tl.sum(g_w, 0, keep_dims=True), mask=c < WIDTH)


def _shape(y: Tensor) -> dict[str, int]:
    padded = triton.next_power_of_2(y.shape[-1])
    return {"WIDTH": y.shape[-1], "P": padded, "R": max(1, TILE // padded)}


def _strides(y: Tensor, g: Tensor | None) -> tuple[int, ...]:
    return (*y.stride()[:3], *((0, 0) if g is None else g.stride()[:2]))


@operator("gated_norm")
def gated_norm(y: Tensor, weight: Tensor, g: Tensor | None, eps: float) -> Tensor:
    """out ``[B, T, H p]`` in the dtype of g, without one in that of y; rows of y and g in one piece."""
    batch, tokens, heads, width = y.shape
    dtype = y.dtype if g is None else g.dtype
    out = torch.empty(batch, tokens, heads * width, dtype=dtype, device=y.device)
    total, shape = batch * tokens * heads, _shape(y)
    gated_norm_kernel[(triton.cdiv(total, shape["R"]),)](
        y, g, weight, out, *_strides(y, g), tokens, heads, total, eps, **shape, GATED=g is not None,
        num_warps=4,
    )  # fmt: skip
    return out


@operator("gated_norm_backward")
def gated_norm_backward(
    y: Tensor, weight: Tensor, g: Tensor | None, g_out: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y, weight and g (empty: there is none)."""
    batch, tokens, heads, width = y.shape
    g_y = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    g_g = torch.empty((0,) if g is None else g.shape, dtype=g_out.dtype, device=y.device)
    total, shape = batch * tokens * heads, _shape(y)
    programs = triton.cdiv(total, shape["R"] * TURNS)
    parts = torch.empty(programs, width, dtype=torch.float32, device=y.device)
    gated_norm_backward_kernel[(programs,)](
        y, g, weight, g_out, g_y, g_g, parts, *_strides(y, g), *g_out.stride()[:2], tokens, heads, total, eps,
        **shape, TURNS=TURNS, GATED=g is not None, num_warps=4,
    )  # fmt: skip
    return g_y, parts.sum(0).to(weight.dtype), g_g


@gated_norm.register_fake
def _(y: Tensor, weight: Tensor, g: Tensor | None, eps: float) -> Tensor:
    return y.new_empty((*y.shape[:2], y.shape[2] * y.shape[3]), dtype=y.dtype if g is None else g.dtype)


@gated_norm_backward.register_fake
def _(
    y: Tensor, weight: Tensor, g: Tensor | None, g_out: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    g_g = g_out.new_empty((0,) if g is None else g.shape)
    return y.new_empty(y.shape), weight.new_empty(weight.shape), g_g


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, weight, g, ctx.eps = inputs
    ctx.save_for_backward(y, weight, g)


def _backward(ctx: Any, g_out: Tensor) -> tuple[Any, ...]:
    y, weight, g = ctx.saved_tensors
    g_out = g_out if g_out.stride(-1) == 1 else g_out.contiguous()
    g_y, g_weight, g_g = gated_norm_backward(y, weight, g, g_out, ctx.eps)
    return g_y, g_weight, None if g is None else g_g, None


gated_norm.register_autograd(_backward, setup_context=_setup)
