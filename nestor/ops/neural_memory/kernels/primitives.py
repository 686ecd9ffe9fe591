"""Device functions that the kernels share: activations, head, inner loss, and sums over programs.

Integer codes stand for the names of `MemorySpec`: the place in `ACTIVATIONS`, `NORMS` and `LOSSES`.
"""

import triton
import triton.language as tl

ACTIVATIONS = ("gelu", "silu")
NORMS = ("none", "residual", "residual_layernorm")
LOSSES = ("l2", "dot_product", "huber")


@triton.jit
def multiply(a, b):
    return a * b


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a b with float32 sums."""
    return tl.dot(a, b, out_dtype=tl.float32, input_precision=PRECISION)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """phi(z), phi'(z), phi''(z)."""
    if ACTIVATION == 0:
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        return z * cdf, cdf + z * density, density * (2.0 - z * z)
    else:
        s = 1.0 / (1.0 + tl.exp(-z))
        value = z * s
        rest = 1.0 - s
        slope = s + value * rest
        return value, slope, rest * (2.0 * slope - value)


@triton.jit
def standardise(z, eps, NORM: tl.constexpr, P: tl.constexpr):
    """zh ``[C, P]`` and 1/s ``[C]`` of a layer norm's rows; without one z and 1."""
    if NORM == 2:
        z = z - (tl.sum(z, 1) / P)[:, None]
        r = 1.0 / tl.sqrt(tl.sum(z * z, 1) / P + eps)
        return z * r[:, None], r
    else:
        return z, tl.sum(z, 1) * 0.0 + 1.0


@triton.jit
def head(x, zh, gamma, beta, NORM: tl.constexpr):
    """f(x) from the standardised output of the MLP."""
    if NORM == 2:
        return x + gamma[None, :] * zh + beta[None, :]
    elif NORM == 1:
        return x + zh
    else:
        return zh


@triton.jit
def through_norm(w, zh, r, NORM: tl.constexpr, P: tl.constexpr):
    """The derivative of `standardise`, which is symmetric: P w / s."""
    if NORM == 2:
        mean = tl.sum(w, 1) / P
        along = tl.sum(w * zh, 1) / P
        return (w - mean[:, None] - zh * along[:, None]) * r[:, None]
    else:
        return w


@triton.jit
def loss_error(f, v, scale, threshold, LOSS: tl.constexpr):
    """e = d loss / d f."""
    if LOSS == 1:
        return v * -scale
    elif LOSS == 2:
        return tl.minimum(tl.maximum(f - v, -threshold), threshold) * scale
    else:
        return (f - v) * scale


@triton.jit
def weight(D, targets, place, TARGET: tl.constexpr):
    """W from what a state holds of it."""
    if TARGET:
        return D.to(tl.float32) + tl.load(targets + place)
    else:
        return D


@triton.jit
def load_norm(GAMMA, BETA, h, NORM: tl.constexpr, P: tl.constexpr):
    """gamma and beta of a head; zeros where the norm has none."""
    p = tl.arange(0, P)
    gamma, beta = tl.zeros((P,), tl.float32), tl.zeros((P,), tl.float32)
    if NORM == 2:
        gamma, beta = tl.load(GAMMA + h * P + p), tl.load(BETA + h * P + p)
    return gamma, beta


@triton.jit
def pull_back(x, v, z, gamma, beta, eps, scale, threshold,
              NORM: tl.constexpr, LOSS: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """The step ``u = -delta`` of the last layer, minus the inner loss's gradient in z, and what its
    derivative needs: zh, 1/s and ``gamma e . zh`` ``[C]``."""
    zh, r = standardise(z, eps, NORM, P)
    e = loss_error(head(x, zh, gamma, beta, NORM), v, scale, threshold, LOSS)
    if NORM == 2:
        e = e * gamma[None, :]
    return -through_norm(e, zh, r, NORM, P), zh, r, tl.sum(e * zh, 1)


@triton.jit
def error_gradient(g_u, zh, r, gamma, NORM: tl.constexpr, P: tl.constexpr):
    """From the gradient of `pull_back`'s step that of the error e, and of gamma e."""
    g_weighted = through_norm(-g_u, zh, r, NORM, P)
    if NORM == 2:
        return g_weighted * gamma[None, :], g_weighted
    else:
        return g_weighted, g_weighted


@triton.jit
def output_gradient(g_e, x, v, zh, gamma, beta, scale, threshold, NORM: tl.constexpr, LOSS: tl.constexpr):
    """The gradient of f from that of the error."""
    if LOSS == 1:
        return g_e * 0.0
    elif LOSS == 2:
        miss = head(x, zh, gamma, beta, NORM) - v
        return tl.where((miss > -threshold) & (miss < threshold), g_e * scale, 0.0)
    else:
        return g_e * scale


@triton.jit
def pull_back_vjp(g_u, x, v, u, zh, r, along, gamma, beta, scale, threshold,
                  NORM: tl.constexpr, LOSS: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """The gradient of z ``[C, P]`` from that of `pull_back`'s step u and what it gave besides."""
    g_e, g_weighted = error_gradient(g_u, zh, r, gamma, NORM, P)
    g_f = output_gradient(g_e, x, v, zh, gamma, beta, scale, threshold, NORM, LOSS)
    if NORM == 2:
        g_z = through_norm(g_f * gamma[None, :], zh, r, NORM, P)
        total = zh * tl.sum(g_u * u, 1)[:, None] + g_weighted * along[:, None]
        total += u * tl.sum(g_u * zh, 1)[:, None]
        return g_z - total * (r / P)[:, None]
    else:
        return g_f


@triton.jit
def sum_over_slices(part, exchange, arrivals, parity, slice_index, turn, SPLIT: tl.constexpr,
                    C: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """The sum of `part` ``[C, P]`` over the SPLIT programs of a walk, in one order for all.

    exchange: float32 ``[2, SPLIT, C, P]``, arrivals: an int32 counter from 0, both the walk's own. A program
    writes over what it left two turns ago only after all have read it, since all arrive in between.
    """
    if SPLIT == 1:
        return part
    else:
        cell = tl.arange(0, C)[:, None] * P + tl.arange(0, P)[None, :]
        base = exchange + parity * SPLIT * C * P
        tl.store(base + slice_index * C * P + cell, part, cache_modifier=".cg")
        tl.debug_barrier()
        tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu")
        while tl.atomic_add(arrivals, 0, sem="acquire", scope="gpu") < turn * SPLIT:
            pass
        tl.debug_barrier()
        total = tl.load(base + cell, cache_modifier=".cg")
        for other in tl.static_range(1, SPLIT):
            total += tl.load(base + other * C * P + cell, cache_modifier=".cg")
        return total
