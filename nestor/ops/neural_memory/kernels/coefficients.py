"""The gates of a chunk as the matrices A, F, G and their ends, forward and backward (see ../coefficients.py).

One program a chunk. Layouts, float32, M = sequences x heads, N chunks of C tokens:
    rows ``[M, N, 2, C]``: A_t, F_t     ends ``[M, N, 2, C]``: G_Cj, E_Cj
    last ``[M, N, 4]``: A_C, F_C, m_C, 0     G ``[M, N, C, C]``
"""

import triton
import triton.language as tl

from nestor.ops.neural_memory.kernels.primitives import multiply


@triton.jit
def _products(gate, C: tl.constexpr):
    """P_tj = prod_{s=j+1..t} gate_s for t >= j, else 0."""
    t = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    steps = tl.where(t > j, gate[:, None], 1.0)
    return tl.where(t >= j, tl.associative_scan(steps, 0, multiply), 0.0)


@triton.jit
def _matmul(a, b):
    return tl.dot(a, b, out_dtype=tl.float32, input_precision="ieee")


@triton.jit
def _apply(matrix, vector):
    return tl.sum(matrix * vector[None, :], 1)


@triton.jit
def _apply_transposed(matrix, vector):
    return tl.sum(matrix * vector[:, None], 0)


@triton.jit
def _gates(THETA, ETA, ALPHA, VALID, base, valid_base, stride, t, tokens,
           MOMENTUM: tl.constexpr, FORGET: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """theta, eta, keep, and whether there is a token, of the rows t of a chunk."""
    valid = t < tokens
    if MASKED:
        valid = valid & (tl.load(VALID + valid_base + t, mask=valid, other=0) != 0)
    theta = tl.load(THETA + base + t * stride, mask=valid, other=0.0).to(tl.float32)
    keep = theta * 0.0 + 1.0
    if FORGET:
        keep = 1.0 - tl.load(ALPHA + base + t * stride, mask=valid, other=0.0).to(tl.float32)
    eta = theta * 0.0 + 1.0
    if MOMENTUM:
        eta = tl.load(ETA + base + t * stride, mask=valid, other=1.0).to(tl.float32)
    return theta, eta, keep, valid.to(tl.float32)


@triton.jit
def coefficients_kernel(
    THETA, ETA, ALPHA, VALID, ROWS, ENDS, LAST, G_OUT, stride_b, stride_t, stride_h, heads, chunks, tokens,
    C: tl.constexpr, MOMENTUM: tl.constexpr, FORGET: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    m, n = tl.program_id(1), tl.program_id(0)
    b, h = m // heads, m % heads
    i = tl.arange(0, C)
    base = b * stride_b.to(tl.int64) + h * stride_h
    theta, eta, keep, valid = _gates(
        THETA, ETA, ALPHA, VALID, base, b * tokens, stride_t, n * C + i, tokens, MOMENTUM, FORGET, MASKED
    )
    decay = _products(keep, C)
    A = tl.sum(tl.where(i[None, :] == 0, decay, 0.0), 1) * tl.sum(tl.where(i == 0, keep, 0.0))
    F = A * 0.0
    mom = A * 0.0
    if MOMENTUM:
        surprise = _products(eta, C)
        E = surprise * theta[None, :]
        mom = tl.sum(tl.where(i[None, :] == 0, surprise, 0.0), 1) * tl.sum(tl.where(i == 0, eta, 0.0))
        G = _matmul(decay, E * valid[:, None])
        F = _apply(decay, mom * valid)
        end_E = tl.sum(tl.where(i[:, None] == C - 1, E, 0.0), 0)
    else:
        G = decay * theta[None, :]
        end_E = theta * 0.0
    row = (m.to(tl.int64) * chunks + n) * C
    tl.store(ROWS + row * 2 + i, A)
    tl.store(ROWS + row * 2 + C + i, F)
    tl.store(ENDS + row * 2 + i, tl.sum(tl.where(i[:, None] == C - 1, G, 0.0), 0))
    tl.store(ENDS + row * 2 + C + i, end_E)
    last = LAST + (m.to(tl.int64) * chunks + n) * 4
    tl.store(last, tl.sum(tl.where(i == C - 1, A, 0.0)))
    tl.store(last + 1, tl.sum(tl.where(i == C - 1, F, 0.0)))
    tl.store(last + 2, tl.sum(tl.where(i == C - 1, mom, 0.0)))
    tl.store(G_OUT + row * C + i[:, None] * C + i[None, :], G)


@triton.jit
def coefficients_backward_kernel(
    THETA, ETA, ALPHA, VALID, G_ROWS, G_ENDS, G_LAST, G_G, G_THETA, G_ETA, G_ALPHA,
    stride_b, stride_t, stride_h, out_b, out_t, out_h, heads, first, span, tokens, slice_stride,
    C: tl.constexpr, SPLIT: tl.constexpr, READ: tl.constexpr,
    MOMENTUM: tl.constexpr, FORGET: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Gradients of the gates of the chunks first .. first + span - 1.

    G_ROWS ``[M, span, 2, C]``, G_G ``[M, span, C, C]`` from the reads (READ); G_ENDS ``[SPLIT, M, span, 2, C]``
    and G_LAST ``[SPLIT, M, span, 4]`` from the writes, one part a slice.
    """
    m, at = tl.program_id(1), tl.program_id(0)
    b, h = m // heads, m % heads
    i = tl.arange(0, C)
    t = (first + at) * C + i
    base = b * stride_b.to(tl.int64) + h * stride_h
    theta, eta, keep, valid = _gates(
        THETA, ETA, ALPHA, VALID, base, b * tokens, stride_t, t, tokens, MOMENTUM, FORGET, MASKED
    )
    cell = m.to(tl.int64) * span + at
    square = i[:, None] * C + i[None, :]
    is_last = i == C - 1
    g_A = theta * 0.0
    g_F = theta * 0.0
    g_m = theta * 0.0
    g_G = tl.zeros((C, C), tl.float32)
    g_E = tl.zeros((C, C), tl.float32)
    if READ:
        g_A = tl.load(G_ROWS + cell * 2 * C + i)
        g_F = tl.load(G_ROWS + cell * 2 * C + C + i)
        g_G = tl.load(G_G + cell * C * C + square)
    for s in tl.static_range(SPLIT):
        ends = G_ENDS + (s * slice_stride + cell) * 2 * C
        last = G_LAST + (s * slice_stride + cell) * 4
        g_G += tl.where(is_last[:, None], tl.load(ends + i)[None, :], 0.0)
        g_A += tl.where(is_last, tl.load(last), 0.0)
        if MOMENTUM:
            g_E += tl.where(is_last[:, None], tl.load(ends + C + i)[None, :], 0.0)
            g_F += tl.where(is_last, tl.load(last + 1), 0.0)
            g_m += tl.where(is_last, tl.load(last + 2), 0.0)

    # Each coefficient solves y_t = gate_t y_{t-1} + x_t, so that g_x = P^T g_y and g_gate_t = g_x_t . y_{t-1}.
    shift = tl.where(i[:, None] == i[None, :] + 1, 1.0, 0.0)
    decay = _products(keep, C)
    A = tl.sum(tl.where(i[None, :] == 0, decay, 0.0), 1) * tl.sum(tl.where(i == 0, keep, 0.0))
    first_row = tl.where(i == 0, 1.0, 0.0)
    g_keep = _apply_transposed(decay, g_A) * (_apply(shift, A) + first_row)
    decay_t = tl.trans(decay)
    g_x = _matmul(decay_t, g_G)
    g_eta = theta * 0.0
    if MOMENTUM:
        surprise = _products(eta, C)
        E = surprise * theta[None, :]
        mom = tl.sum(tl.where(i[None, :] == 0, surprise, 0.0), 1) * tl.sum(tl.where(i == 0, eta, 0.0))
        G = _matmul(decay, E * valid[:, None])
        F = _apply(decay, mom * valid)
        g_mom = _apply_transposed(decay, g_F)
        g_keep += tl.sum(g_x * _matmul(shift, G), 1) + g_mom * _apply(shift, F)
        g_E += g_x * valid[:, None]
        g_m += g_mom * valid
        surprise_t = tl.trans(surprise)
        g_e = _matmul(surprise_t, g_E)
        g_theta = tl.sum(tl.where(i[:, None] == i[None, :], g_e, 0.0), 1)
        g_eta = tl.sum(g_e * _matmul(shift, E), 1)
        g_eta += _apply_transposed(surprise, g_m) * (_apply(shift, mom) + first_row)
    else:
        g_theta = tl.sum(tl.where(i[:, None] == i[None, :], g_x, 0.0), 1)
        g_keep += tl.sum(g_x * _matmul(shift, decay * theta[None, :]), 1)
    out = b * out_b.to(tl.int64) + h * out_h + t * out_t
    inside = t < tokens
    tl.store(G_THETA + out, g_theta * valid, mask=inside)
    if MOMENTUM:
        tl.store(G_ETA + out, g_eta * valid, mask=inside)
    if FORGET:
        tl.store(G_ALPHA + out, -g_keep * valid, mask=inside)
