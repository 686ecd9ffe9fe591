"""The gates of a chunk as the matrices A, F, G and their ends, forward and backward (see ../coefficients.py).

One warp walks the tokens of a chunk, a column of the matrices to a lane. Layouts, M = sequences x heads, N
chunks of C tokens, float32 but G and E, which have the dtype of q:
    rows ``[M, N, 3, C]``: A_t, F_t, m_t     ends ``[M, N, 2, C]``: G_Cj, E_Cj
    last ``[M, N, 4]``: A_C, F_C, m_C, 0     G, E ``[M, N, C, C]``, E for the backward alone
"""

import triton
import triton.language as tl


@triton.jit
def _gates(THETA, ETA, ALPHA, VALID, base, valid_base, stride, t, tokens,
           MOMENTUM: tl.constexpr, FORGET: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """theta, eta, keep of token t, and 1 if there is one; else gates that change nothing, and 0."""
    here = t < tokens
    if MASKED:
        here = here & (tl.load(VALID + valid_base + t, mask=here, other=0) != 0)
    theta = tl.load(THETA + base + t * stride, mask=here, other=0.0).to(tl.float32)
    keep = theta * 0.0 + 1.0
    if FORGET:
        keep = 1.0 - tl.load(ALPHA + base + t * stride, mask=here, other=0.0).to(tl.float32)
    eta = theta * 0.0
    if MOMENTUM:
        eta = tl.load(ETA + base + t * stride, mask=here, other=1.0).to(tl.float32)
    return theta, eta, keep, here.to(tl.float32)


@triton.jit
def coefficients_kernel(
    THETA, ETA, ALPHA, VALID, ROWS, ENDS, LAST, G_OUT, E_OUT, stride_b, stride_t, stride_h,
    heads, chunks, tokens,
    C: tl.constexpr, MOMENTUM: tl.constexpr, FORGET: tl.constexpr, MASKED: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    m, n = tl.program_id(1), tl.program_id(0)
    b, h = m // heads, m % heads
    j = tl.arange(0, C)
    base = b.to(tl.int64) * stride_b + h * stride_h
    cell = m.to(tl.int64) * chunks + n
    e = tl.zeros((C,), tl.float32)
    g = tl.zeros((C,), tl.float32)
    A, F, mom = 1.0, 0.0, 1.0
    for i in range(C):
        theta, eta, keep, here = _gates(
            THETA, ETA, ALPHA, VALID, base, b * tokens, stride_t, n * C + i, tokens, MOMENTUM, FORGET, MASKED
        )
        e = eta * e + tl.where(j == i, theta, 0.0)
        g = keep * g + e * here
        A = A * keep
        if MOMENTUM:
            mom = mom * eta
            F = keep * F + mom * here
        tl.store(ROWS + cell * 3 * C + i, A)
        tl.store(ROWS + cell * 3 * C + C + i, F)
        tl.store(ROWS + cell * 3 * C + 2 * C + i, mom)
        tl.store(G_OUT + (cell * C + i) * C + j, g)
        if KEEP:
            tl.store(E_OUT + (cell * C + i) * C + j, e)
    tl.store(ENDS + cell * 2 * C + j, g)
    tl.store(ENDS + cell * 2 * C + C + j, e)
    tl.store(LAST + cell * 4, A)
    tl.store(LAST + cell * 4 + 1, F)
    tl.store(LAST + cell * 4 + 2, mom)


@triton.jit
def coefficients_backward_kernel(
    THETA, ETA, ALPHA, VALID, ROWS, G, E, G_ROWS, G_ENDS, G_LAST, G_G, G_THETA, G_ETA, G_ALPHA,
    stride_b, stride_t, stride_h, out_b, out_t, out_h, heads, chunks, tokens,
    C: tl.constexpr, READ: tl.constexpr,
    MOMENTUM: tl.constexpr, FORGET: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Gradients of the gates: the recurrences, backwards.

    From the reads (READ) G_ROWS ``[M, N, 2, C]`` and G_G ``[M, N, C, C]``; from the writes G_ENDS
    ``[M, N, 2, C]`` and G_LAST ``[M, N, 4]``.
    """
    m, n = tl.program_id(1), tl.program_id(0)
    b, h = m // heads, m % heads
    j = tl.arange(0, C)
    base = b.to(tl.int64) * stride_b + h * stride_h
    out = b.to(tl.int64) * out_b + h * out_h
    cell = m.to(tl.int64) * chunks + n
    g_g = tl.load(G_ENDS + cell * 2 * C + j)
    g_e = tl.zeros((C,), tl.float32)
    g_A = tl.load(G_LAST + cell * 4)
    g_F, g_m = 0.0, 0.0
    if MOMENTUM:
        g_e = tl.load(G_ENDS + cell * 2 * C + C + j)
        g_F, g_m = tl.load(G_LAST + cell * 4 + 1), tl.load(G_LAST + cell * 4 + 2)
    for back in range(C):
        i = C - 1 - back
        t = n * C + i
        _, eta, keep, valid = _gates(
            THETA, ETA, ALPHA, VALID, base, b * tokens, stride_t, t, tokens, MOMENTUM, FORGET, MASKED
        )
        if READ:
            g_g += tl.load(G_G + (cell * C + i) * C + j)
            g_A += tl.load(G_ROWS + cell * 2 * C + i)
            g_F += tl.load(G_ROWS + cell * 2 * C + C + i)
        # The rows before this one; before the first: A = m = 1, all else 0.
        inside = i > 0
        row = cell * 3 * C + i - 1
        g_keep = g_A * tl.load(ROWS + row, mask=inside, other=1.0)
        g_keep += tl.sum(g_g * tl.load(G + (cell * C + i - 1) * C + j, mask=inside & (j >= 0), other=0.0))
        if MOMENTUM:
            g_keep += g_F * tl.load(ROWS + row + C, mask=inside, other=0.0)
            g_e += g_g * valid
            g_m += g_F * valid
            g_eta = g_m * tl.load(ROWS + row + 2 * C, mask=inside, other=1.0)
            g_eta += tl.sum(g_e * tl.load(E + (cell * C + i - 1) * C + j, mask=inside & (j >= 0), other=0.0))
            g_theta = tl.sum(tl.where(j == i, g_e, 0.0))
            g_e = g_e * eta
            g_m = g_m * eta
            g_F = g_F * keep
            tl.store(G_ETA + out + t * out_t, g_eta * valid, mask=t < tokens)
        else:
            g_theta = tl.sum(tl.where(j == i, g_g, 0.0))
        g_g = g_g * keep
        g_A = g_A * keep
        tl.store(G_THETA + out + t * out_t, g_theta * valid, mask=t < tokens)
        if FORGET:
            tl.store(G_ALPHA + out + t * out_t, -g_keep * valid, mask=t < tokens)
