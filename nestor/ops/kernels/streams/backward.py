"""Gradients of the streams, of their convolutions' weights and of their tails.

Each gradient of x needs K gradients of z, and each of those a head's whole row: a program walks S segments of
L tokens side by side, keeps in registers what the last tokens left, and writes ``dx_{t-3}`` where it reads
x_t. A shorter convolution has taps of zero.
"""

import triton
import triton.language as tl

from nestor.ops.kernels.streams.primitives import inputs_at, position_at, program_heads, stream_of, tap_at


@triton.jit
def streams_backward_kernel(
    X, WEIGHT, TAIL_Q, TAIL_K, TAIL_V, POSITION, G_Q, G_K, G_V, G_X, G_TAIL_Q, G_TAIL_K, G_TAIL_V, PARTS,
    xb, xt, ob, ot, gb, gt, gh, tokens, heads, eps,
    K: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, HB: tl.constexpr, S: tl.constexpr,
    L: tl.constexpr, HAS_TAIL: tl.constexpr, STARTS: tl.constexpr, UNITS: tl.constexpr, SILU: tl.constexpr,
    STREAMS: tl.constexpr,
):  # fmt: skip
    """PARTS ``[programs of a head, K, streams x d]``: each program's part of the gradient of the weight."""
    block = tl.program_id(0)
    b, stream, h, c, inside = program_heads(heads, WIDTH, P, HB)
    channel, channels = h * WIDTH + c, heads * WIDTH
    x_at, weight_at = X + b * xb + stream * channels, WEIGHT + stream * channels * K
    g_x_at = G_X + b * ob + stream * channels
    tail_at, g_tail_at = TAIL_Q, G_TAIL_Q
    if HAS_TAIL:
        tail_at = stream_of(stream, TAIL_Q, TAIL_K, TAIL_V, STREAMS) + b * (K - 1) * channels
        g_tail_at = stream_of(stream, G_TAIL_Q, G_TAIL_K, G_TAIL_V, STREAMS) + b * (K - 1) * channels
    g_at = stream_of(stream, G_Q, G_K, G_V, STREAMS) + b * gb + h.to(tl.int64) * gh + c
    begin = (block * S * L + tl.arange(0, S)[:, None, None] * L).to(tl.int64)
    w0, w1 = tap_at(weight_at, channel, inside, 0, K), tap_at(weight_at, channel, inside, 1, K)
    w2, w3 = tap_at(weight_at, channel, inside, 2, K), tap_at(weight_at, channel, inside, 3, K)
    x1 = inputs_at(x_at, tail_at, begin - 1, channel, inside, xt, tokens, channels, K, HAS_TAIL)
    x2 = inputs_at(x_at, tail_at, begin - 2, channel, inside, xt, tokens, channels, K, HAS_TAIL)
    x3 = inputs_at(x_at, tail_at, begin - 3, channel, inside, xt, tokens, channels, K, HAS_TAIL)
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
        r0 = position_at(POSITION + b * tokens, t, tokens, STARTS)
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
