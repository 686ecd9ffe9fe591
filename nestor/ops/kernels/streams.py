"""Short convolution, SiLU, heads and unit length in one pass over memory (see ../fused_streams.py).

    z_t = sum_{i<K} w_i x_{t-i}     s = z sigmoid(z)     y = s / sqrt(|s|^2 + eps), per head

Of one stream, or of the three of a memory, which then lie side by side in x, with its gates behind them. With
the position of each token in its document, none sees an earlier document: x_{t-i} counts where position >= i.

A program has HB heads next to each other, so that the rows of its tile ``[tokens, HB, P]`` are long enough.
The forward loads its tile once a lag, all but the first time from cache. In the backward each gradient of x
needs K gradients of z, and each of those a head's whole row: its programs walk S segments of L tokens side by
side, keep in registers what the last tokens left, and write ``dx_{t-3}`` where they read x_t. A shorter
convolution has taps of zero.
"""

from collections.abc import Sequence
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
def _position(POSITION, t, tokens, STARTS: tl.constexpr):
    """Tokens of the document before the token; many where no document starts."""
    position = t * 0 + 4
    if STARTS:
        position = tl.load(POSITION + t, mask=(t >= 0) & (t < tokens), other=0)
    return position


@triton.jit
def _of(stream, Q, K, V, STREAMS: tl.constexpr):
    """The tensor of a stream."""
    chosen = Q
    if STREAMS > 1:
        if stream == 1:
            chosen = K
        if stream == 2:
            chosen = V
    return chosen


@triton.jit
def streams_kernel(
    X, WEIGHT, TAIL_Q, TAIL_K, TAIL_V, POSITION, Q, K_, V, AFTER_Q, AFTER_K, AFTER_V,
    xb, xt, tokens, heads, eps,
    K: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, HB: tl.constexpr, BT: tl.constexpr,
    HAS_TAIL: tl.constexpr, STARTS: tl.constexpr, UNITS: tl.constexpr, SILU: tl.constexpr,
    STREAMS: tl.constexpr,
):  # fmt: skip
    """The first UNITS streams are scaled to unit length."""
    block, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    stream = tl.program_id(1) // (heads // HB)
    h = tl.program_id(1) % (heads // HB) * HB + tl.arange(0, HB)[None, :, None]
    c = tl.arange(0, P)[None, None, :]
    channel, inside = h * WIDTH + c, (h >= 0) & (c < WIDTH)
    channels = heads * WIDTH
    x_at, weight_at = X + b * xb + stream * channels, WEIGHT + stream * channels * K
    y_to = _of(stream, Q, K_, V, STREAMS)
    after_to, tail_at = _of(stream, AFTER_Q, AFTER_K, AFTER_V, STREAMS), TAIL_Q
    if HAS_TAIL:
        tail_at = _of(stream, TAIL_Q, TAIL_K, TAIL_V, STREAMS) + b * (K - 1) * channels
    t = (block * BT + tl.arange(0, BT)[:, None, None]).to(tl.int64)
    z = tl.zeros((BT, HB, P), tl.float32)
    position = _position(POSITION + b * tokens, t, tokens, STARTS)
    for lag in tl.static_range(K):
        seen = inside & (position >= lag)
        x = _inputs(x_at, tail_at, t - lag, channel, seen, xt, tokens, channels, K, HAS_TAIL)
        z += _tap(weight_at, channel, inside, lag, K) * x
    y = z
    if SILU:
        y = z / (1.0 + tl.exp(-z))
    if UNITS:
        unit = y * (1.0 / tl.sqrt(tl.sum(y * y, 2, keep_dims=True) + eps))
        y = tl.where(stream < UNITS, unit, y)
    y_at = y_to + (b * tokens + t) * channels + channel
    tl.store(y_at, y.to(Q.dtype.element_ty), mask=inside & (t < tokens))
    if block == tl.num_programs(0) - 1:
        for row in tl.static_range(K - 1):
            end = tl.zeros((1, 1, 1), tl.int64) + tokens
            within = inside & (_position(POSITION + b * tokens, end - 1, tokens, STARTS) >= K - 2 - row)
            last = end + (row + 1 - K)
            kept = _inputs(x_at, tail_at, last, channel, within, xt, tokens, channels, K, HAS_TAIL)
            after_at = after_to + (b * (K - 1) + row) * channels + channel
            tl.store(after_at, kept.to(AFTER_Q.dtype.element_ty), mask=inside)


@triton.jit
def streams_backward_kernel(
    X, WEIGHT, TAIL_Q, TAIL_K, TAIL_V, POSITION, G_Q, G_K, G_V, G_X, G_TAIL_Q, G_TAIL_K, G_TAIL_V, PARTS,
    xb, xt, ob, ot, gb, gt, gh, tokens, heads, eps,
    K: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, HB: tl.constexpr, S: tl.constexpr,
    L: tl.constexpr, HAS_TAIL: tl.constexpr, STARTS: tl.constexpr, UNITS: tl.constexpr, SILU: tl.constexpr,
    STREAMS: tl.constexpr,
):  # fmt: skip
    """PARTS ``[programs of a head, K, streams x d]``: each program's part of the gradient of the weight."""
    block, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    stream = tl.program_id(1) // (heads // HB)
    h = tl.program_id(1) % (heads // HB) * HB + tl.arange(0, HB)[None, :, None]
    c = tl.arange(0, P)[None, None, :]
    channel, inside = h * WIDTH + c, (h >= 0) & (c < WIDTH)
    channels = heads * WIDTH
    x_at, weight_at = X + b * xb + stream * channels, WEIGHT + stream * channels * K
    g_x_at = G_X + b * ob + stream * channels
    tail_at, g_tail_at = TAIL_Q, G_TAIL_Q
    if HAS_TAIL:
        tail_at = _of(stream, TAIL_Q, TAIL_K, TAIL_V, STREAMS) + b * (K - 1) * channels
        g_tail_at = _of(stream, G_TAIL_Q, G_TAIL_K, G_TAIL_V, STREAMS) + b * (K - 1) * channels
    g_at = _of(stream, G_Q, G_K, G_V, STREAMS) + b * gb + h.to(tl.int64) * gh + c
    begin = (block * S * L + tl.arange(0, S)[:, None, None] * L).to(tl.int64)
    w0, w1 = _tap(weight_at, channel, inside, 0, K), _tap(weight_at, channel, inside, 1, K)
    w2, w3 = _tap(weight_at, channel, inside, 2, K), _tap(weight_at, channel, inside, 3, K)
    x1 = _inputs(x_at, tail_at, begin - 1, channel, inside, xt, tokens, channels, K, HAS_TAIL)
    x2 = _inputs(x_at, tail_at, begin - 2, channel, inside, xt, tokens, channels, K, HAS_TAIL)
    x3 = _inputs(x_at, tail_at, begin - 3, channel, inside, xt, tokens, channels, K, HAS_TAIL)
    # Each its own zeros: names that begin as one value and trade it, Triton takes for one that never changes.
    d1, d2 = tl.zeros((S, HB, P), tl.float32), tl.zeros((S, HB, P), tl.float32)
    d3 = tl.zeros((S, HB, P), tl.float32)
    sum0, sum1 = tl.zeros((S, HB, P), tl.float32), tl.zeros((S, HB, P), tl.float32)
    sum2, sum3 = tl.zeros((S, HB, P), tl.float32), tl.zeros((S, HB, P), tl.float32)
    # What a token needs is under way while the one before is worked on.
    r1, r2 = begin * 0, begin * 0
    here = inside & (begin < tokens)
    next_x = tl.load(x_at + begin * xt + channel, mask=here, other=0.0)
    next_g = tl.load(g_at + begin * gt, mask=here, other=0.0)
    for step in range(L + 3):
        t = begin + step
        x0, g = next_x.to(tl.float32), next_g.to(tl.float32)
        here = inside & (t + 1 < tokens)
        next_x = tl.load(x_at + (t + 1) * xt + channel, mask=here, other=0.0)
        next_g = tl.load(g_at + (t + 1) * gt, mask=here, other=0.0)
        y1, y2, y3 = x1, x2, x3
        r0 = _position(POSITION + b * tokens, t, tokens, STARTS)
        if STARTS:
            y1, y2 = tl.where(r0 >= 1, x1, 0.0), tl.where(r0 >= 2, x2, 0.0)
            y3 = tl.where(r0 >= 3, x3, 0.0)
        z = w0 * x0 + w1 * y1 + w2 * y2 + w3 * y3
        s = z
        if SILU:
            sigmoid = 1.0 / (1.0 + tl.exp(-z))
            s = z * sigmoid
        if UNITS:
            inverse = 1.0 / tl.sqrt(tl.sum(s * s, 2, keep_dims=True) + eps)
            y = s * inverse
            g = tl.where(stream < UNITS, (g - y * tl.sum(g * y, 2, keep_dims=True)) * inverse, g)
        d0 = g
        if SILU:
            d0 = g * (sigmoid + s * (1.0 - sigmoid))
        e2, e1, e0 = d2, d1, d0
        if STARTS:
            e2, e1 = tl.where(r2 >= 1, d2, 0.0), tl.where(r1 >= 2, d1, 0.0)
            e0 = tl.where(r0 >= 3, d0, 0.0)
        g_x = w0 * d3 + w1 * e2 + w2 * e1 + w3 * e0
        u = t - 3
        x_out = g_x_at + u * ot + channel
        tl.store(x_out, g_x.to(G_X.dtype.element_ty), mask=inside & (step >= 3) & (u < tokens))
        if HAS_TAIL:
            row = u + (K - 1)
            tail_out = g_tail_at + row * channels + channel
            tl.store(tail_out, g_x.to(G_TAIL_Q.dtype.element_ty), mask=inside & (u < 0) & (row >= 0))
        own = tl.where(step < L, d0, 0.0)
        sum0 += own * x0
        sum1 += own * y1
        sum2 += own * y2
        sum3 += own * y3
        x3, x2, x1 = x2, x1, x0
        d3, d2, d1 = d2, d1, d0
        r2, r1 = r1, r0
    every = STREAMS * channels
    part_at = PARTS + (b * tl.num_programs(0) + block) * K * every + stream * channels + channel
    tl.store(part_at + (K - 1) * every, tl.sum(sum0, 0, keep_dims=True), mask=inside)
    tl.store(part_at + (K - 2) * every, tl.sum(sum1, 0, keep_dims=True), mask=inside)
    if K > 2:
        tl.store(part_at + (K - 3) * every, tl.sum(sum2, 0, keep_dims=True), mask=inside)
    if K > 3:
        tl.store(part_at, tl.sum(sum3, 0, keep_dims=True), mask=inside)


@triton.jit
def gates_kernel(
    X, BIAS, Y, xb, xt, tokens, heads,
    SCALES: tl.constexpr, GATES: tl.constexpr, H: tl.constexpr, BT: tl.constexpr, COUPLED: tl.constexpr,
):  # fmt: skip
    """Y ``[GATES, B, T, H]``: each gate's scale times the sigmoid of x ``[B, T, GATES H]`` and its bias; the
    first one, COUPLED, times what the second lacks to 1."""
    t, h = tl.program_id(0) * BT + tl.arange(0, BT)[:, None], tl.arange(0, H)[None, :]
    b, inside = tl.program_id(1).to(tl.int64), (t < tokens) & (h < heads)
    x_at = X + b * xb + t.to(tl.int64) * xt + h
    y_at = Y + (b * tokens + t) * heads + h
    rest = 1.0
    if COUPLED:
        rest = 1.0 - tl.sigmoid(_logit(x_at, BIAS, h, heads, inside, 1))
    for gate in tl.static_range(GATES):
        y = SCALES[gate] * tl.sigmoid(_logit(x_at, BIAS, h, heads, inside, gate))
        if gate == 0:
            y = y * rest
        tl.store(y_at + gate * tl.num_programs(1).to(tl.int64) * tokens * heads, y, mask=inside)


@triton.jit
def _logit(x_at, BIAS, h, heads, inside, gate):
    x = tl.load(x_at + gate * heads, mask=inside, other=0.0).to(tl.float32)
    return x + tl.load(BIAS + gate * heads + h, mask=h < heads, other=0.0).to(tl.float32)


@triton.jit
def gates_backward_kernel(
    X, BIAS, G_Y, G_X, PARTS, xb, xt, ob, ot, tokens, heads,
    SCALES: tl.constexpr, GATES: tl.constexpr, H: tl.constexpr, BT: tl.constexpr, COUPLED: tl.constexpr,
):  # fmt: skip
    """PARTS ``[programs, GATES H]``: each program's part of the gradient of the bias."""
    t, h = tl.program_id(0) * BT + tl.arange(0, BT)[:, None], tl.arange(0, H)[None, :]
    b, inside = tl.program_id(1).to(tl.int64), (t < tokens) & (h < heads)
    x_at = X + b * xb + t.to(tl.int64) * xt + h
    g_x_at = G_X + b * ob + t.to(tl.int64) * ot + h
    g_at = G_Y + (b * tokens + t) * heads + h
    part_at = PARTS + (b * tl.num_programs(0) + tl.program_id(0)) * GATES * heads + h
    rest, first = 1.0, 0.0
    if COUPLED:
        rest = 1.0 - tl.sigmoid(_logit(x_at, BIAS, h, heads, inside, 1))
        y = SCALES[0] * tl.sigmoid(_logit(x_at, BIAS, h, heads, inside, 0))
        first = y * tl.load(g_at, mask=inside, other=0.0)
    for gate in tl.static_range(GATES):
        s = tl.sigmoid(_logit(x_at, BIAS, h, heads, inside, gate))
        g = SCALES[gate] * tl.load(
            g_at + gate * tl.num_programs(1).to(tl.int64) * tokens * heads, mask=inside, other=0.0
        )
        if gate == 0:
            g = g * rest
        if gate == 1 and COUPLED:
            g = g - first
        g = tl.where(inside, g * s * (1.0 - s), 0.0)
        tl.store(g_x_at + gate * heads, g.to(G_X.dtype.element_ty), mask=inside)
        tl.store(part_at + gate * heads, tl.sum(g, 0, keep_dims=True), mask=h < heads)


def _shape(channels: int, heads: int) -> dict[str, int]:
    """Columns of a head, whole and as a power of two, and heads of a program."""
    width = channels // heads
    padded = triton.next_power_of_2(width)
    together = 1
    while padded * together < ROW and heads % (2 * together) == 0:
        together *= 2
    return {"WIDTH": width, "P": padded, "HB": together}


def _launch_streams(
    x: Tensor, weight: Tensor, tails: list[Tensor | None], position: Tensor | None, heads: int, units: int,
    eps: float, dtype: torch.dtype, silu: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """Heads ``[B, T, H, p]`` and next tail of each stream."""
    batch, tokens, _ = x.shape
    streams, kernel = len(tails), weight.shape[1]
    channels = weight.shape[0] // streams
    y = [x.new_empty((batch, tokens, heads, channels // heads), dtype=dtype) for _ in tails]
    after = [x.new_empty((batch, kernel - 1, channels)) for _ in tails]
    shape = _shape(channels, heads)
    rows = max(1, min(TILES[0] // (shape["HB"] * shape["P"]), triton.next_power_of_2(tokens)))
    streams_kernel[(triton.cdiv(tokens, rows), streams * heads // shape["HB"], batch)](
        x, weight, *_three(tails), x if position is None else position, *_three(y), *_three(after),
        x.stride(0), x.stride(1), tokens, heads, eps, K=kernel, **shape, BT=rows,
        HAS_TAIL=tails[0] is not None, STARTS=position is not None, UNITS=units, SILU=silu, STREAMS=streams,
        num_warps=4 if rows > 4 else 1,
    )  # fmt: skip
    return y, after


def _launch_streams_backward(
    x: Tensor, weight: Tensor, tails: list[Tensor | None], position: Tensor | None, g_y: list[Tensor],
    g_x: Tensor, heads: int, units: int, eps: float, silu: bool = True,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Gradients of the weight and of each tail (empty: there is none); that of the streams goes to g_x."""
    batch, tokens, _ = x.shape
    streams, kernel = len(tails), weight.shape[1]
    channels = weight.shape[0] // streams
    if len({g.stride() for g in g_y}) > 1 or g_y[0].stride(-1) != 1:
        g_y = [g.contiguous() for g in g_y]
    g_tails = _like(tails, x)
    shape = _shape(channels, heads)
    segments = max(1, TILES[1] // (shape["HB"] * shape["P"]))
    blocks = triton.cdiv(tokens, segments * SEGMENT)
    parts = x.new_empty((batch * blocks, kernel, streams * channels), dtype=torch.float32)
    streams_backward_kernel[(blocks, streams * heads // shape["HB"], batch)](
        x, weight, *_three(tails), x if position is None else position, *_three(g_y), g_x, *_three(g_tails),
        parts, x.stride(0), x.stride(1), g_x.stride(0), g_x.stride(1), *g_y[0].stride()[:3], tokens, heads,
        eps, K=kernel, **shape, S=segments, L=SEGMENT, HAS_TAIL=tails[0] is not None,
        STARTS=position is not None, UNITS=units, SILU=silu, STREAMS=streams, num_warps=4,
    )  # fmt: skip
    g_weight = parts.sum(0).t().to(weight.dtype, memory_format=torch.contiguous_format, copy=True)
    return g_weight, g_tails


def _like(tails: Sequence[Tensor | None], x: Tensor) -> list[Tensor]:
    """Room for the gradient of each tail; empty: there is none."""
    return [x.new_empty(0, dtype=torch.float32) if t is None else t.new_empty(t.shape) for t in tails]


def _add_after(g_x: Tensor, g_tail: Tensor | None, position: Tensor | None, g_after: Tensor | None) -> None:
    """Add to the gradients of a stream and its tail that of the next tail, which is the end of both."""
    if g_after is None:
        return
    tokens, before = g_x.shape[1], g_after.shape[1]
    if position is not None:
        # Rows of the last document alone.
        back = torch.arange(before - 1, -1, -1, device=g_x.device)
        g_after = torch.where((back <= position[:, -1:]).unsqueeze(-1), g_after, 0.0)
    new = min(tokens, before)
    g_x[:, tokens - new :] += g_after[:, before - new :]
    if g_tail is not None:
        g_tail[:, tokens:] += g_after[:, : before - new]


def _three(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """As many as the kernels take."""
    return [*tensors, *[tensors[0]] * (3 - len(tensors))]


@operator("convolved_heads")
def convolved_heads(
    x: Tensor, weight: Tensor, tail: Tensor | None, position: Tensor | None, heads: int, unit: bool,
    eps: float, dtype: torch.dtype, silu: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y ``[B, T, H, p]`` and the next tail ``[B, K-1, d]``; x ``[B, T, d]`` with each row in one piece;
    position int64 ``[B, T]``, contiguous."""
    (y,), (after,) = _launch_streams(x, weight, [tail], position, heads, int(unit), eps, dtype, silu)
    return y, after


@operator("convolved_heads_backward")
def convolved_heads_backward(
    x: Tensor, weight: Tensor, tail: Tensor | None, position: Tensor | None, g_y: Tensor, heads: int,
    unit: bool, eps: float, silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight and tail (empty: there is none)."""
    g_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    g_weight, (g_tail,) = _launch_streams_backward(
        x, weight, [tail], position, [g_y], g_x, heads, int(unit), eps, silu
    )
    return g_x, g_weight, g_tail


@convolved_heads.register_fake
def _(
    x: Tensor, weight: Tensor, tail: Tensor | None, position: Tensor | None, heads: int, unit: bool,
    eps: float, dtype: torch.dtype, silu: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, tokens, channels = x.shape
    after = x.new_empty((batch, weight.shape[1] - 1, channels))
    return x.new_empty((batch, tokens, heads, channels // heads), dtype=dtype), after


@convolved_heads_backward.register_fake
def _(
    x: Tensor, weight: Tensor, tail: Tensor | None, position: Tensor | None, g_y: Tensor, heads: int,
    unit: bool, eps: float, silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (g_tail,) = _like([tail], x)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), g_tail


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.heads, ctx.unit, ctx.eps, _, ctx.silu = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, g_y: Tensor | None, g_after: Tensor | None) -> tuple[Any, ...]:
    x, weight, tail, position = ctx.saved_tensors
    g_y = x.new_zeros(x.shape).unflatten(-1, (ctx.heads, -1)) if g_y is None else g_y
    g_x, g_weight, g_tail = convolved_heads_backward(
        x, weight, tail, position, g_y, ctx.heads, ctx.unit, ctx.eps, ctx.silu
    )
    g_before = None if tail is None else g_tail
    _add_after(g_x, g_before, position, g_after)
    return g_x, g_weight, g_before, *[None] * 6


convolved_heads.register_autograd(_backward, setup_context=_setup)


# Rows of a program.
GATE_ROWS = 128


@operator("memory_inputs")
def memory_inputs(
    x: Tensor, weight: Tensor, bias: Tensor, tail_q: Tensor | None, tail_k: Tensor | None,
    tail_v: Tensor | None, position: Tensor | None, heads: int, eps: float, scales: Sequence[float],
    coupled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k, v ``[B, T, H, p]``, gates float32 ``[G, B, T, H]``, and the next tails ``[B, K-1, d]``.

    x ``[B, T, 3d + G H]`` or wider: the projected streams and gates, each row in one piece; weight
    ``[3d, K]`` of the convolutions; bias ``[G H]``; position int64 ``[B, T]``, contiguous; scales, G, and
    `coupled` as in `gates_kernel`.
    """
    tails = [tail_q, tail_k, tail_v]
    (q, k, v), (after_q, after_k, after_v) = _launch_streams(
        x, weight, tails, position, heads, 2, eps, x.dtype
    )
    batch, tokens, _ = x.shape
    gates = x.new_empty((len(scales), batch, tokens, heads), dtype=torch.float32)
    gates_kernel[(triton.cdiv(tokens, GATE_ROWS), batch)](
        x[..., len(weight) :], bias, gates, x.stride(0), x.stride(1), tokens, heads, **_gates(scales, heads),
        COUPLED=coupled, num_warps=4,
    )  # fmt: skip
    return q, k, v, gates, after_q, after_k, after_v


def _gates(scales: Sequence[float], heads: int) -> dict[str, Any]:
    width = triton.next_power_of_2(heads)
    return {"SCALES": tuple(scales), "GATES": len(scales), "H": width, "BT": GATE_ROWS}


@operator("memory_inputs_backward")
def memory_inputs_backward(
    x: Tensor, weight: Tensor, bias: Tensor, tail_q: Tensor | None, tail_k: Tensor | None,
    tail_v: Tensor | None, position: Tensor | None, g_q: Tensor, g_k: Tensor, g_v: Tensor, g_gates: Tensor,
    heads: int, eps: float, scales: Sequence[float], coupled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias and the tails (empty: there are none)."""
    g_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    g_weight, (g_tail_q, g_tail_k, g_tail_v) = _launch_streams_backward(
        x, weight, [tail_q, tail_k, tail_v], position, [g_q, g_k, g_v], g_x, heads, 2, eps
    )
    batch, tokens, _ = x.shape
    blocks, streams = triton.cdiv(tokens, GATE_ROWS), len(weight)
    parts = x.new_empty((batch * blocks, len(scales) * heads), dtype=torch.float32)
    gates_backward_kernel[(blocks, batch)](
        x[..., streams:], bias, g_gates.contiguous(), g_x[..., streams:], parts, x.stride(0), x.stride(1),
        g_x.stride(0), g_x.stride(1), tokens, heads, **_gates(scales, heads), COUPLED=coupled, num_warps=4,
    )  # fmt: skip
    g_x[..., streams + len(bias) :].zero_()
    return g_x, g_weight, parts.sum(0).to(bias.dtype), g_tail_q, g_tail_k, g_tail_v


@memory_inputs.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, tail_q: Tensor | None, tail_k: Tensor | None,
    tail_v: Tensor | None, position: Tensor | None, heads: int, eps: float, scales: Sequence[float],
    coupled: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    batch, tokens, _ = x.shape
    channels = len(weight) // 3
    streams = [x.new_empty((batch, tokens, heads, channels // heads)) for _ in range(3)]
    gates = x.new_empty((len(scales), batch, tokens, heads), dtype=torch.float32)
    return *streams, gates, *(x.new_empty((batch, weight.shape[1] - 1, channels)) for _ in range(3))


@memory_inputs_backward.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, tail_q: Tensor | None, tail_k: Tensor | None,
    tail_v: Tensor | None, position: Tensor | None, g_q: Tensor, g_k: Tensor, g_v: Tensor, g_gates: Tensor,
    heads: int, eps: float, scales: Sequence[float], coupled: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    g_tails = _like([tail_q, tail_k, tail_v], x)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape), *g_tails


def _setup_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.heads, ctx.eps, ctx.scales, ctx.coupled = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward_inputs(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
    x, weight, bias, *tails, position = ctx.saved_tensors
    batch, tokens, _ = x.shape
    channels = len(weight) // 3
    heads, scales = ctx.heads, ctx.scales
    shapes = [(batch, tokens, heads, channels // heads)] * 3 + [(len(scales), batch, tokens, heads)]
    g = [
        torch.zeros(shape, dtype=x.dtype, device=x.device) if given is None else given
        for shape, given in zip(shapes, gradients[:4], strict=True)
    ]
    g_x, g_weight, g_bias, *g_tails = memory_inputs_backward(
        x, weight, bias, *tails, position, *g, heads, ctx.eps, scales, ctx.coupled
    )
    g_before = [None if tail is None else g for tail, g in zip(tails, g_tails, strict=True)]
    for index, g_after in enumerate(gradients[4:]):
        own = g_x[..., index * channels : (index + 1) * channels]
        _add_after(own, g_before[index], position, g_after)
    return g_x, g_weight, g_bias, *g_before, None, None, None, None, None


memory_inputs.register_autograd(_backward_inputs, setup_context=_setup_inputs)
