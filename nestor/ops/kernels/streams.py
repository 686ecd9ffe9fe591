"""Short convolution, SiLU, heads and unit length in one pass over memory (see ../fused_streams.py).

    z_t = sum_{i<K} w_i x_{t-i}     s = z sigmoid(z)     y = s / sqrt(|s|^2 + eps), per head

A program has HB heads next to each other, so that the rows of its tile ``[tokens, HB, P]`` are long enough.
The forward loads its tile once a lag, all but the first time from cache. In the backward each gradient of x
needs K gradients of z, and each of those a head's whole row: its programs walk S segments of L tokens side by
side, keep in registers what the last tokens left, and write ``dx_{t-3}`` where they read x_t. A shorter
convolution has taps of zero.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nestor.ops.operators import operator

# Elements of a program's tile, forward and backward, of four warps each; tokens of a segment.
TILES = (2048, 512)
SEGMENT = 16
ROW = 64


@triton.jit
def _inputs(X, TAIL, t, channel, inside, stride, tokens, channels, K: tl.constexpr, HAS_TAIL: tl.constexpr):
    """x at the tokens t; before the first those of the tail or zero."""
    x = tl.load(X + t * stride + channel, mask=inside & (t >= 0) & (t < tokens), other=0.0).to(tl.float32)
    if HAS_TAIL:
        row = t + (K - 1)
        before = inside & (t < 0) & (row >= 0)
        x += tl.load(TAIL + row * channels + channel, mask=before, other=0.0).to(tl.float32)
    return x


@triton.jit
def _tap(WEIGHT, channel, inside, LAG: tl.constexpr, K: tl.constexpr):
    return tl.load(WEIGHT + channel * K + (K - 1 - LAG), mask=inside & (LAG < K), other=0.0).to(tl.float32)


@triton.jit
def streams_kernel(
    X, WEIGHT, TAIL, Y, AFTER, xb, xt, tokens, heads, eps,
    K: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, HB: tl.constexpr, BT: tl.constexpr,
    HAS_TAIL: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    block, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    h, c = tl.program_id(1) * HB + tl.arange(0, HB)[None, :, None], tl.arange(0, P)[None, None, :]
    channel, inside = h * WIDTH + c, (h >= 0) & (c < WIDTH)
    channels = heads * WIDTH
    x_at, tail_at = X + b * xb, TAIL
    if HAS_TAIL:
        tail_at = TAIL + b * (K - 1) * channels
    t = (block * BT + tl.arange(0, BT)[:, None, None]).to(tl.int64)
    z = tl.zeros((BT, HB, P), tl.float32)
    for lag in tl.static_range(K):
        x = _inputs(x_at, tail_at, t - lag, channel, inside, xt, tokens, channels, K, HAS_TAIL)
        z += _tap(WEIGHT, channel, inside, lag, K) * x
    y = z / (1.0 + tl.exp(-z))
    if UNIT:
        y = y * (1.0 / tl.sqrt(tl.sum(y * y, 2, keep_dims=True) + eps))
    y_at = Y + (b * tokens + t) * channels + channel
    tl.store(y_at, y.to(Y.dtype.element_ty), mask=inside & (t < tokens))
    if block == tl.num_programs(0) - 1:
        for row in tl.static_range(K - 1):
            last = tl.zeros((1, 1, 1), tl.int64) + tokens + (row + 1 - K)
            kept = _inputs(x_at, tail_at, last, channel, inside, xt, tokens, channels, K, HAS_TAIL)
            after_at = AFTER + (b * (K - 1) + row) * channels + channel
            tl.store(after_at, kept.to(AFTER.dtype.element_ty), mask=inside)


@triton.jit
def streams_backward_kernel(
    X, WEIGHT, TAIL, G, G_X, G_TAIL, PARTS, xb, xt, gb, gt, gh, tokens, heads, eps,
    K: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, HB: tl.constexpr, S: tl.constexpr,
    L: tl.constexpr, HAS_TAIL: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """PARTS ``[programs of a head, K, d]``: each program's part of the gradient of the weight."""
    block, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    h, c = tl.program_id(1) * HB + tl.arange(0, HB)[None, :, None], tl.arange(0, P)[None, None, :]
    channel, inside = h * WIDTH + c, (h >= 0) & (c < WIDTH)
    channels = heads * WIDTH
    x_at, tail_at = X + b * xb, TAIL
    if HAS_TAIL:
        tail_at = TAIL + b * (K - 1) * channels
    g_at = G + b * gb + h.to(tl.int64) * gh + c
    begin = (block * S * L + tl.arange(0, S)[:, None, None] * L).to(tl.int64)
    w0, w1 = _tap(WEIGHT, channel, inside, 0, K), _tap(WEIGHT, channel, inside, 1, K)
    w2, w3 = _tap(WEIGHT, channel, inside, 2, K), _tap(WEIGHT, channel, inside, 3, K)
    x1 = _inputs(x_at, tail_at, begin - 1, channel, inside, xt, tokens, channels, K, HAS_TAIL)
    x2 = _inputs(x_at, tail_at, begin - 2, channel, inside, xt, tokens, channels, K, HAS_TAIL)
    x3 = _inputs(x_at, tail_at, begin - 3, channel, inside, xt, tokens, channels, K, HAS_TAIL)
    # Each its own zeros: names that begin as one value and trade it, Triton takes for one that never changes.
    d1, d2 = tl.zeros((S, HB, P), tl.float32), tl.zeros((S, HB, P), tl.float32)
    d3 = tl.zeros((S, HB, P), tl.float32)
    sum0, sum1 = tl.zeros((S, HB, P), tl.float32), tl.zeros((S, HB, P), tl.float32)
    sum2, sum3 = tl.zeros((S, HB, P), tl.float32), tl.zeros((S, HB, P), tl.float32)
    # What a token needs is under way while the one before is worked on.
    here = inside & (begin < tokens)
    next_x = tl.load(x_at + begin * xt + channel, mask=here, other=0.0)
    next_g = tl.load(g_at + begin * gt, mask=here, other=0.0)
    for step in range(L + 3):
        t = begin + step
        x0, g = next_x.to(tl.float32), next_g.to(tl.float32)
        here = inside & (t + 1 < tokens)
        next_x = tl.load(x_at + (t + 1) * xt + channel, mask=here, other=0.0)
        next_g = tl.load(g_at + (t + 1) * gt, mask=here, other=0.0)
        z = w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        s = z * sigmoid
        if UNIT:
            inverse = 1.0 / tl.sqrt(tl.sum(s * s, 2, keep_dims=True) + eps)
            y = s * inverse
            g = (g - y * tl.sum(g * y, 2, keep_dims=True)) * inverse
        d0 = g * (sigmoid + s * (1.0 - sigmoid))
        g_x = w0 * d3 + w1 * d2 + w2 * d1 + w3 * d0
        u = t - 3
        x_out = G_X + (b * tokens + u) * channels + channel
        tl.store(x_out, g_x.to(G_X.dtype.element_ty), mask=inside & (step >= 3) & (u < tokens))
        if HAS_TAIL:
            row = u + (K - 1)
            tail_out = G_TAIL + (b * (K - 1) + row) * channels + channel
            tl.store(tail_out, g_x.to(G_TAIL.dtype.element_ty), mask=inside & (u < 0) & (row >= 0))
        own = tl.where(step < L, d0, 0.0)
        sum0 += own * x0
        sum1 += own * x1
        sum2 += own * x2
        sum3 += own * x3
        x3, x2, x1 = x2, x1, x0
        d3, d2, d1 = d2, d1, d0
    part_at = PARTS + (b * tl.num_programs(0) + block) * K * channels + channel
    tl.store(part_at + (K - 1) * channels, tl.sum(sum0, 0, keep_dims=True), mask=inside)
    tl.store(part_at + (K - 2) * channels, tl.sum(sum1, 0, keep_dims=True), mask=inside)
    if K > 2:
        tl.store(part_at + (K - 3) * channels, tl.sum(sum2, 0, keep_dims=True), mask=inside)
    if K > 3:
        tl.store(part_at, tl.sum(sum3, 0, keep_dims=True), mask=inside)


def _shape(channels: int, heads: int) -> dict[str, int]:
    """Columns of a head, whole and as a power of two, and heads of a program."""
    width = channels // heads
    padded = triton.next_power_of_2(width)
    together = 1
    while padded * together < ROW and heads % (2 * together) == 0:
        together *= 2
    return {"WIDTH": width, "P": padded, "HB": together}


@operator("convolved_heads")
def convolved_heads(
    x: Tensor, weight: Tensor, tail: Tensor | None, heads: int, unit: bool, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """y ``[B, T, H, p]`` and the next tail ``[B, K-1, d]``; x ``[B, T, d]`` with each row in one piece."""
    batch, tokens, channels = x.shape
    kernel = weight.shape[1]
    y = torch.empty(batch, tokens, heads, channels // heads, dtype=dtype, device=x.device)
    after = torch.empty(batch, kernel - 1, channels, dtype=x.dtype, device=x.device)
    shape = _shape(channels, heads)
    rows = max(1, TILES[0] // (shape["HB"] * shape["P"]))
    streams_kernel[(triton.cdiv(tokens, rows), heads // shape["HB"], batch)](
        x, weight, tail, y, after, x.stride(0), x.stride(1), tokens, heads, eps,
        K=kernel, **shape, BT=rows, HAS_TAIL=tail is not None, UNIT=unit, num_warps=4,
    )  # fmt: skip
    return y, after


@operator("convolved_heads_backward")
def convolved_heads_backward(
    x: Tensor, weight: Tensor, tail: Tensor | None, g_y: Tensor, heads: int, unit: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and tail (empty: there is none)."""
    batch, tokens, channels = x.shape
    kernel = weight.shape[1]
    g_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    g_tail = torch.empty(0, device=x.device) if tail is None else torch.empty_like(tail)
    shape = _shape(channels, heads)
    segments = max(1, TILES[1] // (shape["HB"] * shape["P"]))
    blocks = triton.cdiv(tokens, segments * SEGMENT)
    parts = torch.empty(batch * blocks, kernel, channels, dtype=torch.float32, device=x.device)
    streams_backward_kernel[(blocks, heads // shape["HB"], batch)](
        x, weight, tail, g_y, g_x, g_tail, parts, x.stride(0), x.stride(1),
        g_y.stride(0), g_y.stride(1), g_y.stride(2), tokens, heads, eps,
        K=kernel, **shape, S=segments, L=SEGMENT, HAS_TAIL=tail is not None, UNIT=unit, num_warps=4,
    )  # fmt: skip
    return g_x, parts.sum(0).t().to(weight.dtype, memory_format=torch.contiguous_format, copy=True), g_tail


@convolved_heads.register_fake
def _(
    x: Tensor, weight: Tensor, tail: Tensor | None, heads: int, unit: bool, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    batch, tokens, channels = x.shape
    after = x.new_empty((batch, weight.shape[1] - 1, channels))
    return x.new_empty((batch, tokens, heads, channels // heads), dtype=dtype), after


@convolved_heads_backward.register_fake
def _(
    x: Tensor, weight: Tensor, tail: Tensor | None, g_y: Tensor, heads: int, unit: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    g_tail = x.new_empty((0,), dtype=torch.float32) if tail is None else tail.new_empty(tail.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), g_tail


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, tail, ctx.heads, ctx.unit, ctx.eps, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, tail)


def _backward(ctx: Any, g_y: Tensor | None, g_after: Tensor | None) -> tuple[Any, ...]:
    x, weight, tail = ctx.saved_tensors
    tokens, before = x.shape[1], weight.shape[1] - 1
    g_y = x.new_zeros(x.shape).unflatten(-1, (ctx.heads, -1)) if g_y is None else g_y
    g_y = g_y if g_y.stride(-1) == 1 else g_y.contiguous()
    g_x, g_weight, g_tail = convolved_heads_backward(x, weight, tail, g_y, ctx.heads, ctx.unit, ctx.eps)
    if g_after is not None:
        new = min(tokens, before)
        g_x[:, tokens - new :] += g_after[:, before - new :]
        if tail is not None:
            g_tail[:, tokens:] += g_after[:, : before - new]
    return g_x, g_weight, None if tail is None else g_tail, None, None, None, None


convolved_heads.register_autograd(_backward, setup_context=_setup)
