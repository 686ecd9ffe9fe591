"""Queries projected onto the keys so far, of unit length or as they are (see ../query_projection.py).

    y_t = q_t Pi_t     Pi_t = Pi_0 + sum_{s <= t} k_s^T k_s

A program walks one sequence and head in blocks of tokens, with Pi in registers. The backward walks twice:
forward for g_q = g Pi_t, with g the gradient of q_t Pi_t; then backward with R = sum_{t > block} q_t^T g_t,
for the gradient of a key is k_s (R_s + R_s^T), R_s the sum from its own token on.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nestor.ops.kernels import most_warps
from nestor.ops.operators import operator

BLOCK = 64


@triton.jit
def _rows(X, t, tokens, stride, P: tl.constexpr):
    """Rows of tokens ``[C, P]``, zero where there are none."""
    return tl.load(X + t[:, None] * stride + tl.arange(0, P)[None, :], mask=(t < tokens)[:, None], other=0.0)


@triton.jit
def _put(X, t, tokens, stride, x, P: tl.constexpr):
    at = X + t[:, None] * stride + tl.arange(0, P)[None, :]
    tl.store(at, x.to(X.dtype.element_ty), mask=(t < tokens)[:, None])


@triton.jit
def _through(x, k, Pi, C: tl.constexpr, PRECISION: tl.constexpr):
    """x_t Pi_t of a block, Pi that before it."""
    i = tl.arange(0, C)
    scores = tl.dot(x, tl.trans(k), input_precision=PRECISION)
    scores = tl.where(i[:, None] >= i[None, :], scores, 0.0).to(x.dtype)
    return tl.dot(x, Pi.to(x.dtype), input_precision=PRECISION) + tl.dot(scores, k, input_precision=PRECISION)


@triton.jit
def projection_kernel(
    Q, K, STATE, Y, FINAL, qb, qt, qh, kb, kt, kh, heads, tokens, eps,
    P: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, HAS_STATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64)
    b, h = m // heads, m % heads
    p = tl.arange(0, P)
    square = m * P * P + p[:, None] * P + p[None, :]
    Pi = tl.zeros((P, P), tl.float32)
    if HAS_STATE:
        Pi = tl.load(STATE + square)
    q_at, k_at = Q + b * qb + h * qh, K + b * kb + h * kh
    y_at = Y + (b * tokens * heads + h) * P
    for first in range(0, tokens, C):
        t = first + tl.arange(0, C)
        q, k = _rows(q_at, t, tokens, qt, P), _rows(k_at, t, tokens, kt, P)
        y = _through(q, k, Pi, C, PRECISION)
        if UNIT:
            y = y / tl.sqrt(tl.sum(y * y, 1) + eps)[:, None]
        _put(y_at, t, tokens, heads * P, y, P)
        Pi += tl.dot(tl.trans(k), k, input_precision=PRECISION)
    tl.store(FINAL + square, Pi)


@triton.jit
def projection_backward_kernel(
    Q, K, STATE, G_Y, G_FINAL, RAW, G_Q, G_K, G_STATE, qb, qt, qh, kb, kt, kh, yb, yt, yh, heads, tokens, eps,
    P: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, HAS_STATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """RAW: room for the gradients of q_t Pi_t, like q."""
    m = tl.program_id(0).to(tl.int64)
    b, h = m // heads, m % heads
    p, i = tl.arange(0, P), tl.arange(0, C)
    square = m * P * P + p[:, None] * P + p[None, :]
    Pi = tl.zeros((P, P), tl.float32)
    if HAS_STATE:
        Pi = tl.load(STATE + square)
    q_at, k_at, y_at = Q + b * qb + h * qh, K + b * kb + h * kh, G_Y + b * yb + h * yh
    dense, out = heads * P, (b * tokens * heads + h) * P
    for first in range(0, tokens, C):
        t = first + i
        q, k = _rows(q_at, t, tokens, qt, P), _rows(k_at, t, tokens, kt, P)
        g = _rows(y_at, t, tokens, yt, P).to(tl.float32)
        if UNIT:
            y = _through(q, k, Pi, C, PRECISION)
            inverse = (1.0 / tl.sqrt(tl.sum(y * y, 1) + eps))[:, None]
            y = y * inverse
            g = (g - y * tl.sum(g * y, 1)[:, None]) * inverse
        g = g.to(q.dtype)
        _put(RAW + out, t, tokens, dense, g, P)
        _put(G_Q + out, t, tokens, dense, _through(g, k, Pi, C, PRECISION), P)
        Pi += tl.dot(tl.trans(k), k, input_precision=PRECISION)
    # What one thread has left in RAW another reads.
    tl.debug_barrier()
    R = tl.load(G_FINAL + square)
    blocks = tl.cdiv(tokens, C)
    for back in range(blocks):
        t = (blocks - 1 - back) * C + i
        q, k = _rows(q_at, t, tokens, qt, P), _rows(k_at, t, tokens, kt, P)
        g = _rows(RAW + out, t, tokens, dense, P)
        below = i[:, None] >= i[None, :]
        by_q = tl.where(below, tl.dot(g, tl.trans(k), input_precision=PRECISION), 0.0).to(q.dtype)
        by_g = tl.where(below, tl.dot(q, tl.trans(k), input_precision=PRECISION), 0.0).to(q.dtype)
        g_k = tl.dot(k, (R + tl.trans(R)).to(k.dtype), input_precision=PRECISION)
        g_k += tl.dot(tl.trans(by_q), q, input_precision=PRECISION)
        g_k += tl.dot(tl.trans(by_g), g, input_precision=PRECISION)
        _put(G_K + out, t, tokens, dense, g_k, P)
        R += tl.dot(tl.trans(q), g, input_precision=PRECISION)
    tl.store(G_STATE + square, R)


def _choices(q: Tensor, state: Tensor | None, unit: bool) -> dict[str, Any]:
    precision = "tf32x3" if q.dtype == torch.float32 else "tf32"
    return {
        "P": q.shape[-1],
        "C": BLOCK,
        "UNIT": unit,
        "HAS_STATE": state is not None,
        "PRECISION": precision,
        "num_warps": min(4, most_warps(q)),
    }


@operator("query_projection")
def query_projection(
    q: Tensor, k: Tensor, state: Tensor | None, unit: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """y ``[B, T, H, p]`` and the next Pi, float32 ``[B, H, p, p]``; q, k of one dtype, rows in one piece."""
    batch, tokens, heads, width = q.shape
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    final = torch.empty(batch, heads, width, width, dtype=torch.float32, device=q.device)
    projection_kernel[(batch * heads,)](
        q, k, state, y, final, *q.stride()[:3], *k.stride()[:3], heads, tokens, eps,
        **_choices(q, state, unit),
    )  # fmt: skip
    return y, final


@operator("query_projection_backward")
def query_projection_backward(
    q: Tensor, k: Tensor, state: Tensor | None, g_y: Tensor, g_final: Tensor, unit: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and the first Pi."""
    batch, tokens, heads, _ = q.shape
    raw, g_q, g_k = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    g_state = torch.empty_like(g_final)
    projection_backward_kernel[(batch * heads,)](
        q, k, state, g_y, g_final, raw, g_q, g_k, g_state, *q.stride()[:3], *k.stride()[:3],
        *g_y.stride()[:3], heads, tokens, eps, **_choices(q, state, unit),
    )  # fmt: skip
    return g_q, g_k, g_state


@query_projection.register_fake
def _(q: Tensor, k: Tensor, state: Tensor | None, unit: bool, eps: float) -> tuple[Tensor, Tensor]:
    batch, _, heads, width = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, width, width), dtype=torch.float32)


@query_projection_backward.register_fake
def _(
    q: Tensor, k: Tensor, state: Tensor | None, g_y: Tensor, g_final: Tensor, unit: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), g_final.new_empty(g_final.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, state, ctx.unit, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, state)


def _backward(ctx: Any, g_y: Tensor | None, g_final: Tensor | None) -> tuple[Any, ...]:
    q, k, state = ctx.saved_tensors
    batch, _, heads, width = q.shape
    g_y = q.new_zeros(q.shape) if g_y is None else g_y
    g_y = g_y if g_y.stride(-1) == 1 else g_y.contiguous()
    if g_final is None:
        g_final = q.new_zeros((batch, heads, width, width), dtype=torch.float32)
    g_q, g_k, g_state = query_projection_backward(
        q, k, state, g_y.to(q.dtype), g_final.contiguous(), ctx.unit, ctx.eps
    )
    return g_q, g_k, None if state is None else g_state, None, None


query_projection.register_autograd(_backward, setup_context=_setup)
