"""What the kernels of streams load: inputs, taps, positions; and whose heads and tensors they are."""

import triton
import triton.language as tl


@triton.jit
def program_heads(heads, WIDTH: tl.constexpr, P: tl.constexpr, HB: tl.constexpr):
    """A program's sequence and stream, its HB heads and their P columns, and which of these there are."""
    b = tl.program_id(2).to(tl.int64)
    stream = tl.program_id(1) // (heads // HB)
    h = tl.program_id(1) % (heads // HB) * HB + tl.arange(0, HB)[None, :, None]
    c = tl.arange(0, P)[None, None, :]
    return b, stream, h, c, (h >= 0) & (c < WIDTH)


@triton.jit
def inputs_at(X, TAIL, t, channel, inside, stride, tokens, channels, K: tl.constexpr, HAS_TAIL: tl.constexpr):
    """x at the tokens t; before the first those of the tail or zero."""
    x = tl.load(X + t * stride + channel, mask=inside & (t >= 0) & (t < tokens), other=0.0).to(tl.float32)
    if HAS_TAIL:
        row = t + (K - 1)
        before = inside & (t < 0) & (row >= 0)
        x += tl.load(TAIL + row * channels + channel, mask=before, other=0.0).to(tl.float32)
    return x


@triton.jit
def tap_at(WEIGHT, channel, inside, LAG: tl.constexpr, K: tl.constexpr):
    return tl.load(WEIGHT + channel * K + (K - 1 - LAG), mask=inside & (LAG < K), other=0.0).to(tl.float32)


@triton.jit
def position_at(POSITION, t, tokens, STARTS: tl.constexpr):
    """Tokens of the document before the token; many where no document starts."""
    position = t * 0 + 4
    if STARTS:
        position = tl.load(POSITION + t, mask=(t >= 0) & (t < tokens), other=0)
    return position


@triton.jit
def stream_of(stream, Q, K, V, STREAMS: tl.constexpr):
    """The tensor of a stream."""
    chosen = Q
    if STREAMS > 1:
        if stream == 1:
            chosen = K
        if stream == 2:
            chosen = V
    return chosen
