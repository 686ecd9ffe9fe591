"""The gates of a memory, forward and backward."""

import triton
import triton.language as tl


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
