"""The reads of a memory of one layer: each chunk by itself, once the writes have left its start state.

    z~ = q M + A q D + F q S + (G * q k^T) u

One program a chunk of one sequence and head; it takes PS rows of the weights at a turn. Layouts as in
linear_write.py; z ``[M, N, C, P]`` keeps the standardised z~ and r ``[M, N, C]`` its 1/s.
"""

import triton
import triton.language as tl

from nestor.ops.neural_memory.kernels.primitives import (
    dot,
    head,
    load_norm,
    standardise,
    through_norm,
    weight,
)


@triton.jit(do_not_specialize=["walks"])
def linear_read_kernel(
    Q, K, ROWS, G, STATES, STEPS, TARGETS, GAMMA, BETA, Y, Z, R,
    qb, qt, qh, kb, kt, kh, yb, yt, yh, walks, heads, chunks, tokens, first_chunk, span, eps,
    C: tl.constexpr, P: tl.constexpr, PS: tl.constexpr, NORM: tl.constexpr, MOMENTUM: tl.constexpr,
    TARGET: tl.constexpr, DUAL: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The outputs of each chunk. DUAL: query t sees W_t, else the chunk's start."""
    SIZE: tl.constexpr = P * P
    PARTS: tl.constexpr = 2 if MOMENTUM else 1
    m, at = tl.program_id(1), tl.program_id(0)
    n = first_chunk + at
    b, h = m // heads, m % heads
    dtype: tl.constexpr = STEPS.dtype.element_ty
    i, p, ps = tl.arange(0, C), tl.arange(0, P), tl.arange(0, PS)
    t = n * C + i
    inside = (t < tokens)[:, None]
    here = m.to(tl.int64) * span + at
    cell = m.to(tl.int64) * chunks + n
    q_at = Q + b * qb.to(tl.int64) + h * qh + t[:, None] * qt
    k_at = K + b * kb.to(tl.int64) + h * kh + t[:, None] * kt
    states = STATES + here * PARTS * SIZE
    targets = states
    if TARGET:
        targets = TARGETS + h * SIZE
    z = tl.zeros((C, P), tl.float32)
    if DUAL:
        A = tl.load(ROWS + cell * 3 * C + i)[:, None]
        F = tl.load(ROWS + cell * 3 * C + C + i)[:, None]
        scores = tl.zeros((C, C), tl.float32)
    for low in range(0, P, PS):
        j = low + ps
        cells = j[:, None] * P + p[None, :]
        q = tl.load(q_at + j[None, :], mask=inside, other=0.0).to(dtype)
        d = tl.load(states + cells)
        if DUAL:
            k = tl.load(k_at + j[None, :], mask=inside, other=0.0).to(dtype)
            scores += dot(q, tl.trans(k), PRECISION)
            z += dot((q * A).to(dtype), d, PRECISION)
            if MOMENTUM:
                z += dot((q * F).to(dtype), tl.load(states + SIZE + cells), PRECISION)
            if TARGET:
                z += dot(q, tl.load(targets + cells).to(dtype), PRECISION)
        else:
            z += dot(q, weight(d, targets, cells, TARGET).to(dtype), PRECISION)
    if DUAL:
        coefficients = tl.load(G + cell * C * C + i[:, None] * C + i[None, :])
        u = tl.load(STEPS + here * C * P + i[:, None] * P + p[None, :])
        z += dot((scores * coefficients).to(dtype), u, PRECISION)
    zh, r = standardise(z, eps, NORM, P)
    gamma, beta = load_norm(GAMMA, BETA, h, NORM, P)
    if NORM == 2 and KEEP:
        tl.store(Z + cell * C * P + i[:, None] * P + p[None, :], zh.to(dtype))
        tl.store(R + cell * C + i, r)
    x = tl.load(q_at + p[None, :], mask=inside, other=0.0).to(tl.float32)
    y = head(x, zh, gamma, beta, NORM)
    y_at = Y + b * yb.to(tl.int64) + h * yh + t[:, None] * yt + p[None, :]
    tl.store(y_at, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["walks"])
def linear_read_backward_kernel(
    Q, ROWS, STATES, TARGETS, GAMMA, Z, R, G_Y, G_Q, READ_Q, READ_Z, G_ROWS, G_STATES, G_TARGETS, G_NORM,
    qb, qt, qh, yb, yt, yh, gb, gt, gh, walks, heads, chunks, tokens, first_chunk, span,
    C: tl.constexpr, P: tl.constexpr, PS: tl.constexpr, NORM: tl.constexpr, MOMENTUM: tl.constexpr,
    TARGET: tl.constexpr, DUAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Reverse of `linear_read_kernel`, but for what goes through the chunk's own steps.

    G_STATES ``[M, span, Q, P P]``; float32 G_ROWS ``[M, N, 2, C]``, G_NORM ``[M, N, 2, P]``. G_TARGETS
    ``[M, span, P P]``: what the gradient of M has beyond that of W, which M is part of. Without DUAL it
    writes the gradient of q to G_Q; with it, it leaves to `linear_scores_backward_kernel` the gradient of z~
    in READ_Z ``[M, span, C, P]`` and what it found of that of q in READ_Q, float32, likewise.
    """
    SIZE: tl.constexpr = P * P
    PARTS: tl.constexpr = 2 if MOMENTUM else 1
    m, at = tl.program_id(1), tl.program_id(0)
    n = first_chunk + at
    b, h = m // heads, m % heads
    dtype: tl.constexpr = STATES.dtype.element_ty
    i, p, ps = tl.arange(0, C), tl.arange(0, P), tl.arange(0, PS)
    t = n * C + i
    inside = (t < tokens)[:, None]
    here = m.to(tl.int64) * span + at
    cell = m.to(tl.int64) * chunks + n
    place = here * C * P + i[:, None] * P
    states, g_states = STATES + here * PARTS * SIZE, G_STATES + here * PARTS * SIZE
    targets = states
    if TARGET:
        targets = TARGETS + h * SIZE
    q_at = Q + b * qb.to(tl.int64) + h * qh + t[:, None] * qt
    y_at = G_Y + b * yb.to(tl.int64) + h * yh + t[:, None] * yt
    out = G_Q + b * gb.to(tl.int64) + h * gh + t[:, None] * gt

    g_z = tl.load(y_at + p[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORM == 2:
        zh = tl.load(Z + cell * C * P + i[:, None] * P + p[None, :]).to(tl.float32)
        gamma = tl.load(GAMMA + h * P + p)
        tl.store(G_NORM + cell * 2 * P + p, tl.sum(g_z * zh, 0))
        tl.store(G_NORM + cell * 2 * P + P + p, tl.sum(g_z, 0))
        g_z = through_norm(g_z * gamma[None, :], zh, tl.load(R + cell * C + i), NORM, P)
    g_z = g_z.to(dtype)
    if DUAL:
        tl.store(READ_Z + place + p[None, :], g_z)
        A = tl.load(ROWS + cell * 3 * C + i)[:, None]
        F = tl.load(ROWS + cell * 3 * C + C + i)[:, None]
        g_A, g_F = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    for low in range(0, P, PS):
        j = low + ps
        cells = j[:, None] * P + p[None, :]
        q = tl.load(q_at + j[None, :], mask=inside, other=0.0).to(dtype)
        d = tl.load(states + cells)
        if DUAL:
            along = dot(g_z, tl.trans(d), PRECISION)
            g_A += tl.sum(q * along, 1)
            g_q = along * A
            aq = (q * A).to(dtype)
            tl.store(g_states + cells, dot(tl.trans(aq), g_z, PRECISION).to(dtype))
            if MOMENTUM:
                along = dot(g_z, tl.trans(tl.load(states + SIZE + cells)), PRECISION)
                g_F += tl.sum(q * along, 1)
                g_q += along * F
                fq = (q * F).to(dtype)
                tl.store(g_states + SIZE + cells, dot(tl.trans(fq), g_z, PRECISION).to(dtype))
            if TARGET:
                g_q += dot(g_z, tl.trans(tl.load(targets + cells).to(dtype)), PRECISION)
                rest = (q * (1.0 - A)).to(dtype)
                g_targets = G_TARGETS + here * SIZE + cells
                tl.store(g_targets, dot(tl.trans(rest), g_z, PRECISION).to(dtype))
        else:
            w = weight(d, targets, cells, TARGET).to(dtype)
            g_q = dot(g_z, tl.trans(w), PRECISION)
            tl.store(g_states + cells, dot(tl.trans(q), g_z, PRECISION).to(dtype))
        if NORM != 0:
            g_q += tl.load(y_at + j[None, :], mask=inside, other=0.0).to(tl.float32)
        if DUAL:
            tl.store(READ_Q + place + j[None, :], g_q)
        else:
            tl.store(out + j[None, :], g_q.to(G_Q.dtype.element_ty), mask=inside)
    if DUAL:
        tl.store(G_ROWS + cell * 2 * C + i, g_A)
        tl.store(G_ROWS + cell * 2 * C + C + i, g_F)


@triton.jit(do_not_specialize=["walks"])
def linear_scores_backward_kernel(
    Q, K, G, STEPS, READ_Q, READ_Z, G_Q, G_K, G_G, G_U,
    qb, qt, qh, kb, kt, kh, gb, gt, gh, walks, heads, chunks, tokens, first_chunk, span,
    C: tl.constexpr, CS: tl.constexpr, P: tl.constexpr, PS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Reverse of (G * q k^T) u, CS keys at a turn, after `linear_read_backward_kernel`.

    Writes the gradient of q to G_Q, that of k and u to G_K, G_U ``[M, span, C, P]``, and that of G to G_G,
    float32 ``[M, span, C, C]``.
    """
    m, at = tl.program_id(1), tl.program_id(0)
    n = first_chunk + at
    b, h = m // heads, m % heads
    dtype: tl.constexpr = STEPS.dtype.element_ty
    i, p, ps = tl.arange(0, C), tl.arange(0, P), tl.arange(0, PS)
    t = n * C + i
    inside = (t < tokens)[:, None]
    here = m.to(tl.int64) * span + at
    cell = m.to(tl.int64) * chunks + n
    place = here * C * P + i[:, None] * P
    q_at = Q + b * qb.to(tl.int64) + h * qh + t[:, None] * qt

    g_q = tl.zeros((C, P), tl.float32)
    for key in range(0, C, CS):
        j = key + tl.arange(0, CS)
        k_at = K + b * kb.to(tl.int64) + h * kh + (n * C + j)[:, None] * kt
        present = (n * C + j < tokens)[:, None]
        key_place = here * C * P + j[:, None] * P
        scores, g_weighted = tl.zeros((C, CS), tl.float32), tl.zeros((C, CS), tl.float32)
        for low in range(0, P, PS):
            q = tl.load(q_at + (low + ps)[None, :], mask=inside, other=0.0).to(dtype)
            k = tl.load(k_at + (low + ps)[None, :], mask=present, other=0.0).to(dtype)
            scores += dot(q, tl.trans(k), PRECISION)
            g_z = tl.load(READ_Z + place + (low + ps)[None, :])
            u = tl.load(STEPS + key_place + (low + ps)[None, :])
            g_weighted += dot(g_z, tl.trans(u), PRECISION)
        square = i[:, None] * C + j[None, :]
        coefficients = tl.load(G + cell * C * C + square)
        tl.store(G_G + cell * C * C + square, (scores * g_weighted).to(dtype))
        weighted, g_scores = (scores * coefficients).to(dtype), (g_weighted * coefficients).to(dtype)
        for low in range(0, P, PS):
            q = tl.load(q_at + (low + ps)[None, :], mask=inside, other=0.0).to(dtype)
            g_k = dot(tl.trans(g_scores), q, PRECISION)
            tl.store(G_K + key_place + (low + ps)[None, :], g_k.to(dtype))
            g_z = tl.load(READ_Z + place + (low + ps)[None, :])
            g_u = dot(tl.trans(weighted), g_z, PRECISION)
            tl.store(G_U + key_place + (low + ps)[None, :], g_u.to(dtype))
        keys = tl.load(k_at + p[None, :], mask=present, other=0.0).to(dtype)
        g_q += dot(g_scores, keys, PRECISION)
    g_q += tl.load(READ_Q + place + p[None, :])
    out = G_Q + b * gb.to(tl.int64) + h * gh + t[:, None] * gt + p[None, :]
    tl.store(out, g_q.to(G_Q.dtype.element_ty), mask=inside)
