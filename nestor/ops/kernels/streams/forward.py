"""Heads of the convolved streams, and their next tails.

A tile is loaded once a lag, all but the first time from cache.
"""

import triton
import triton.language as tl

from nestor.ops.kernels.streams.primitives import inputs_at, position_at, program_heads, stream_of, tap_at


@triton.jit
def streams_kernel(
    X, WEIGHT, TAIL_Q, TAIL_K, TAIL_V, POSITION, Q, K_, V, AFTER_Q, AFTER_K, AFTER_V,
    xb, xt, tokens, heads, eps,
    K: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, HB: tl.constexpr, BT: tl.constexpr,
    HAS_TAIL: tl.constexpr, STARTS: tl.constexpr, UNITS: tl.constexpr, SILU: tl.constexpr,
    STREAMS: tl.constexpr,
):  # fmt: skip
    """The first UNITS streams are scaled to unit length."""
    block = tl.program_id(0)
    b, stream, h, c, inside = program_heads(heads, WIDTH, P, HB)
    channel, channels = h * WIDTH + c, heads * WIDTH
    x_at, weight_at = X + b * xb + stream * channels, WEIGHT + stream * channels * K
    y_to = stream_of(stream, Q, K_, V, STREAMS)
    after_to, tail_at = stream_of(stream, AFTER_Q, AFTER_K, AFTER_V, STREAMS), TAIL_Q
    if HAS_TAIL:
        tail_at = stream_of(stream, TAIL_Q, TAIL_K, TAIL_V, STREAMS) + b * (K - 1) * channels
    t = (block * BT + tl.arange(0, BT)[:, None, None]).to(tl.int64)
    z = tl.zeros((BT, HB, P), tl.float32)
    position = position_at(POSITION + b * tokens, t, tokens, STARTS)
    for lag in tl.static_range(K):
        seen = inside & (position >= lag)
        x = inputs_at(x_at, tail_at, t - lag, channel, seen, xt, tokens, channels, K, HAS_TAIL)
        z += tap_at(weight_at, channel, inside, lag, K) * x
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
            within = inside & (position_at(POSITION + b * tokens, end - 1, tokens, STARTS) >= K - 2 - row)
            last = end + (row + 1 - K)
            kept = inputs_at(x_at, tail_at, last, channel, within, xt, tokens, channels, K, HAS_TAIL)
            after_at = after_to + (b * (K - 1) + row) * channels + channel
            tl.store(after_at, kept.to(AFTER_Q.dtype.element_ty), mask=inside)
