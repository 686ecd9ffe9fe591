"""What the tokens of a tile, at most BLOCK of them, do to a linear memory; its gradients.

Names are those of `../transitions.py`: keys k, errors e, the rows

    u = -(I + eta (D- . K K^T))^-1 eta X,   X = A- K W + e

and W' = A_end W + K^T (D_end . u). `la` is the logarithm of alpha; tokens that are not there have eta = 0 and
la = 0, an identity step. With INITIAL, weights are forgotten towards `base`, what documents start with, which
X has (1 - A-) K base more of then, and W' (1 - A_end) base.
"""

import triton
import triton.language as tl

#: Tokens of a tile: the triangle of one is inverted by three squarings.
BLOCK = tl.constexpr(16)
#: Columns of the one matrix that the gates are.
GATES = tl.constexpr(32)
TINY = tl.constexpr(1e-24)


@triton.jit
def rounded(x):
    """To the nearest TF32. The matrix units cut the rest off, and what shrinks at every token adds up.

    What is not finite becomes no number: its bits alone, all ones on a GPU, would be rounded over to 0.
    """
    nearest = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return nearest + 0.0 * x


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    if PRECISION == "tf32":
        a, b = rounded(a), rounded(b)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def load_rows(X, at, inside, P: tl.constexpr):
    """Rows at the places of ``[R, P]``, zero where there are none."""
    places = X + at[:, None] * P + tl.arange(0, P)[None, :]
    return tl.load(places, mask=inside[:, None], other=0.0).to(tl.float32)


@triton.jit
def store_rows(X, at, inside, x, P: tl.constexpr):
    places = X + at[:, None] * P + tl.arange(0, P)[None, :]
    tl.store(places, x.to(X.dtype.element_ty), mask=inside[:, None])


@triton.jit
def part_of_rows(X, at, column, O: tl.constexpr, P: tl.constexpr):
    """Places of the columns ``column .. column + P`` of rows of ``[R, O]``."""
    return X + at[:, None] * O + column + tl.arange(0, P)[None, :]


@triton.jit
def part_of_stack(X, column, P: tl.constexpr, O: tl.constexpr, N: tl.constexpr):
    """Places of the columns ``column .. column + N`` of a stack ``[P, O]``."""
    return X + tl.arange(0, P)[:, None] * O + column + tl.arange(0, N)[None, :]


# --- gates --------------------------------------------------------------------------------------------------


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def one_column(x, column):
    """A column of ``[C, GATES]``."""
    return tl.sum(tl.where(tl.arange(0, GATES)[None, :] == column, x, 0.0), 1)


@triton.jit
def as_column(x, column):
    """``[C, GATES]`` with x ``[C]`` as that column."""
    return tl.where(tl.arange(0, GATES)[None, :] == column, x[:, None], 0.0)


@triton.jit
def capped(eta, la, square, CAP: tl.constexpr):
    """The write step that is used, for keys of that squared length."""
    if CAP:
        eta = tl.minimum(eta, tl.exp(la) / tl.maximum(square, TINY))
    return eta


@triton.jit
def capped_backward(g, eta, la, square):
    """Gradients of eta, la and the squared length of the key, of the capped step."""
    safe = tl.maximum(square, TINY)
    limit = tl.exp(la) / safe
    free = eta <= limit
    g_limit = tl.where(free, 0.0, g)
    return tl.where(free, g, 0.0), g_limit * limit, tl.where(square > TINY, -g_limit * limit / safe, 0.0)


@triton.jit
def decays(la):
    """D- ``[C, C]`` below the diagonal, A- and D_end ``[C]``, and A_end."""
    i = tl.arange(0, BLOCK)
    through = tl.cumsum(la, 0)
    before = through - la
    total = tl.sum(la, 0)
    below = i[:, None] > i[None, :]
    D = tl.where(below, tl.exp(tl.where(below, before[:, None] - through[None, :], 0.0)), 0.0)
    return D, tl.exp(before), tl.exp(total - through), tl.exp(total)


@triton.jit
def decays_backward(g_D, g_before, g_end, g_whole, D, before, end, whole):
    """The gradient of la from those of what `decays` returns."""
    i = tl.arange(0, BLOCK)
    by_D = g_D * D
    g_last = g_end * end
    on_before = tl.sum(by_D, 1) + g_before * before
    on_through = -tl.sum(by_D, 0) - g_last
    total = tl.sum(g_last, 0) + g_whole * whole
    earlier = tl.sum(tl.where(i[None, :] > i[:, None], on_before[None, :], 0.0), 1)
    return earlier + tl.sum(tl.where(i[None, :] >= i[:, None], on_through[None, :], 0.0), 1) + total


@triton.jit
def triangle_inverse(T):
    """(I + T)^-1 for T strictly below the diagonal: (I - T)(I + T^2)(I + T^4)(I + T^8).

    In full precision: with a large step and keys that repeat, it adds up many products.
    """
    i = tl.arange(0, BLOCK)
    P = tl.where(i[:, None] == i[None, :], 1.0, 0.0) - T
    power = dot(T, T, "ieee")
    P += dot(P, power, "ieee")
    power = dot(power, power, "ieee")
    P += dot(P, power, "ieee")
    power = dot(power, power, "ieee")
    return P + dot(P, power, "ieee")


# --- units and targets --------------------------------------------------------------------------------------


@triton.jit
def unit_rows(x, eps):
    """Rows of unit length, and the inverse of the length that they had."""
    inverse = tl.rsqrt(tl.sum(x * x, 1) + eps)
    return x * inverse[:, None], inverse


@triton.jit
def unit_backward(g, y, inverse):
    return inverse[:, None] * (g - y * tl.sum(g * y, 1)[:, None])


@triton.jit
def square_of(r, SINGLE: tl.constexpr):
    """The squared length of rows, or the square of each number if each is a memory's whole output."""
    if SINGLE:
        square = r * r
    else:
        square = tl.sum(r * r, 1)[:, None]
    return square


@triton.jit
def answers(
    W, anchor, k, v,
    SAME: tl.constexpr, SINGLE: tl.constexpr, L2: tl.constexpr, TARGETS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """k W, M(v) at the anchor before it is bounded (v itself with the targets "value"), and the errors."""
    on_W = dot(k, W, PRECISION)
    on_key = on_W
    if not SAME:
        on_key = dot(k, anchor, PRECISION)
    r = v
    if TARGETS != "value":
        r = dot(v, anchor, PRECISION)
    e = -r
    if TARGETS == "bounded":
        e = -r * tl.rsqrt(tl.maximum(square_of(r, SINGLE), 1.0))
    if L2:
        e += on_key
    return on_W, r, e


@triton.jit
def bounded_backward(g, r, SINGLE: tl.constexpr):
    square = square_of(r, SINGLE)
    scale = tl.rsqrt(tl.maximum(square, 1.0))
    if SINGLE:
        along = g * r
    else:
        along = tl.sum(g * r, 1)[:, None]
    return scale * (g - tl.where(square > 1.0, along * scale * scale, 0.0) * r)


# --- writes -------------------------------------------------------------------------------------------------


@triton.jit
def write(
    W, anchor, base, k, v, eta, solve, before, end, whole,
    SAME: tl.constexpr, SINGLE: tl.constexpr, L2: tl.constexpr, TARGETS: tl.constexpr, DGD: tl.constexpr,
    INITIAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W', the rows u and the errors ``[C, N]``. SAME: the anchor is W."""
    on_W, _r, e = answers(W, anchor, k, v, SAME, SINGLE, L2, TARGETS, PRECISION)
    if DGD:
        held = before[:, None] * on_W
        if INITIAL:
            held += (1.0 - before)[:, None] * dot(k, base, PRECISION)
        u = -dot(solve, eta[:, None] * (held + e), PRECISION)
    else:
        u = -eta[:, None] * e
    return written(W, base, k, u, end, whole, INITIAL, PRECISION), u, e


@triton.jit
def written(W, base, k, u, end, whole, INITIAL: tl.constexpr, PRECISION: tl.constexpr):
    """W' from the rows."""
    W = whole * W + dot(tl.trans(k), end[:, None] * u, PRECISION)
    if INITIAL:
        W += (1.0 - whole) * base
    return W


@triton.jit
def add_product(g_W, h, x, g, SAME: tl.constexpr, PRECISION: tl.constexpr):
    """Gradients of W and of the anchor, with x^T g added to that of the anchor."""
    if SAME:
        g_W += dot(tl.trans(x), g, PRECISION)
    else:
        h += dot(tl.trans(x), g, PRECISION)
    return g_W, h


@triton.jit
def write_backward(
    g_W, h, g_base, g_u, W, anchor, base, u, k, v, eta, solve, before, end, whole,
    g_k, g_v, g_eta, g_T, g_before, g_end, g_whole,
    SAME: tl.constexpr, SINGLE: tl.constexpr, L2: tl.constexpr, TARGETS: tl.constexpr, DGD: tl.constexpr,
    INITIAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of W, from those of W' and of the rows u where they are read; and those of the anchor h,
    of base, k, v, eta, the triangle, A-, D_end and A_end, added to what they were."""
    on_W, r, x = answers(W, anchor, k, v, SAME, SINGLE, L2, TARGETS, PRECISION)
    fading = W
    if INITIAL:
        fading = W - base
        g_base += (1.0 - whole) * g_W
    if DGD:
        x += before[:, None] * on_W
        if INITIAL:
            on_base = dot(k, base, PRECISION)
            x += (1.0 - before)[:, None] * on_base
    z = dot(k, g_W, PRECISION)
    g_end += tl.sum(u * z, 1)
    g_whole += tl.sum(tl.sum(fading * g_W, 1), 0)
    g_k += dot(end[:, None] * u, tl.trans(g_W), PRECISION)
    g_u += end[:, None] * z
    if DGD:
        g_u = dot(tl.trans(solve), g_u, PRECISION)
        g_T -= dot(g_u, tl.trans(u), PRECISION)
    g_eta -= tl.sum(g_u * x, 1)
    g_e = -eta[:, None] * g_u
    g_W = whole * g_W
    along = g_e * 0.0
    if DGD:
        g_before += tl.sum(g_e * on_W, 1)
        along = before[:, None] * g_e
        if INITIAL:
            g_before -= tl.sum(g_e * on_base, 1)
            g_on_base = (1.0 - before)[:, None] * g_e
            g_k += dot(g_on_base, tl.trans(base), PRECISION)
            g_base += dot(tl.trans(k), g_on_base, PRECISION)
    if SAME:
        if L2:
            along += g_e
        g_k += dot(along, tl.trans(W), PRECISION)
        g_W += dot(tl.trans(k), along, PRECISION)
    else:
        if DGD:
            g_k += dot(along, tl.trans(W), PRECISION)
            g_W += dot(tl.trans(k), along, PRECISION)
        if L2:
            g_k += dot(g_e, tl.trans(anchor), PRECISION)
            h += dot(tl.trans(k), g_e, PRECISION)
    g_r = -g_e
    if TARGETS == "bounded":
        g_r = bounded_backward(g_r, r, SINGLE)
    if TARGETS == "value":
        g_v += g_r
    else:
        g_W, h = add_product(g_W, h, v, g_r, SAME, PRECISION)
        g_v += dot(g_r, tl.trans(anchor), PRECISION)
    return g_W, h, g_base, g_k, g_v, g_eta, g_T, g_before, g_end, g_whole
