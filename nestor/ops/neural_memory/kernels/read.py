"""The reads of a two-layer memory: each chunk by itself, once the writes have left its start state.

    z~_l = x~_{l-1} M_l + A x~_{l-1} D_l + F x~_{l-1} S_l + (G * x~_{l-1} x_{l-1}^T) u_l

One program a chunk of one sequence and head; it walks the hidden width in slices of HS. Layouts as in
write.py (D = W - M where there are targets M, else W); z ``[M, N, C, P]`` keeps the standardised output of
the MLP and r ``[M, N, C]`` its 1/s.
"""

import triton
import triton.language as tl

from nestor.ops.neural_memory.kernels.primitives import (
    activate,
    dot,
    head,
    load_norm,
    standardise,
    through_norm,
    weight,
)


@triton.jit
def _mixed(A, F, x, dtype: tl.constexpr, MOMENTUM: tl.constexpr):
    """x scaled by A and by F, in the operands' dtype."""
    ax = (x * A[:, None]).to(dtype)
    fx = ax
    if MOMENTUM:
        fx = (x * F[:, None]).to(dtype)
    return ax, fx


@triton.jit(do_not_specialize=["walks"])
def read_kernel(
    Q, K, ROWS, G, STATES, STEPS, TARGETS, GAMMA, BETA, Y, Z, R,
    qb, qt, qh, kb, kt, kh, yb, yt, yh, walks, heads, chunks, tokens, first_chunk, span, eps,
    C: tl.constexpr, P: tl.constexpr, HIDDEN: tl.constexpr, HS: tl.constexpr,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, MOMENTUM: tl.constexpr, TARGET: tl.constexpr,
    DUAL: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = P * HIDDEN
    PARTS: tl.constexpr = 4 if MOMENTUM else 2
    m, at = tl.program_id(1), tl.program_id(0)
    n = first_chunk + at
    b, h = m // heads, m % heads
    dtype: tl.constexpr = STEPS.dtype.element_ty
    i, p, hs = tl.arange(0, C), tl.arange(0, P), tl.arange(0, HS)
    t = n * C + i
    inside = (t < tokens)[:, None]
    q_at = Q + b * qb.to(tl.int64) + h * qh + t[:, None] * qt + p[None, :]
    q = tl.load(q_at, mask=inside, other=0.0).to(dtype)
    here = m.to(tl.int64) * span + at
    cell = m.to(tl.int64) * chunks + n
    states = STATES + here * PARTS * SIZE
    targets = states
    if TARGET:
        targets = TARGETS + h * 2 * SIZE
    z = tl.zeros((C, P), tl.float32)
    if DUAL:
        k_at = K + b * kb.to(tl.int64) + h * kh + t[:, None] * kt + p[None, :]
        k = tl.load(k_at, mask=inside, other=0.0).to(dtype)
        u2 = tl.load(STEPS + here * C * P + i[:, None] * P + p[None, :])
        A = tl.load(ROWS + cell * 3 * C + i)
        F = tl.load(ROWS + cell * 3 * C + C + i)
        g_at = G + cell * C * C + i[:, None] * C + i[None, :]
        weighted = (dot(q, tl.trans(k), PRECISION) * tl.load(g_at)).to(dtype)
        aq, fq = _mixed(A, F, q, dtype, MOMENTUM)
        scores = tl.zeros((C, C), tl.float32)
    for low in range(0, HIDDEN, HS):
        first = p[:, None] * HIDDEN + (low + hs)[None, :]
        second = (low + hs)[:, None] * P + p[None, :]
        w1, w2 = tl.load(states + first), tl.load(states + SIZE + second)
        full1 = weight(w1, targets, first, TARGET).to(dtype)
        full2 = weight(w2, targets + SIZE, second, TARGET).to(dtype)
        if DUAL:
            x2, slope, _ = activate(dot(k, full1, PRECISION), ACTIVATION)
            u1 = (dot(u2, tl.trans(full2), PRECISION) * slope).to(dtype)
            z1 = dot(aq, w1, PRECISION) + dot(weighted, u1, PRECISION)
            if MOMENTUM:
                z1 += dot(fq, tl.load(states + 2 * SIZE + first), PRECISION)
            if TARGET:
                z1 += dot(q, tl.load(targets + first).to(dtype), PRECISION)
            x, _, _ = activate(z1, ACTIVATION)
            ax, fx = _mixed(A, F, x, dtype, MOMENTUM)
            z += dot(ax, w2, PRECISION)
            if MOMENTUM:
                z += dot(fx, tl.load(states + 3 * SIZE + second), PRECISION)
            if TARGET:
                z += dot(x.to(dtype), tl.load(targets + SIZE + second).to(dtype), PRECISION)
            scores += dot(x.to(dtype), tl.trans(x2.to(dtype)), PRECISION)
        else:
            x, _, _ = activate(dot(q, full1, PRECISION), ACTIVATION)
            z += dot(x.to(dtype), full2, PRECISION)
    if DUAL:
        z += dot((scores * tl.load(g_at)).to(dtype), u2, PRECISION)
    zh, r = standardise(z, eps, NORM, P)
    gamma, beta = load_norm(GAMMA, BETA, h, NORM, P)
    if NORM == 2:
        if KEEP:
            tl.store(Z + cell * C * P + i[:, None] * P + p[None, :], zh.to(dtype))
            tl.store(R + cell * C + i, r)
    y = head(q.to(tl.float32), zh, gamma, beta, NORM)
    y_at = Y + b * yb.to(tl.int64) + h * yh + t[:, None] * yt + p[None, :]
    tl.store(y_at, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _add(at, value, done, C: tl.constexpr, QUERIES: tl.constexpr):
    """Store a sum over queries, on top of that over the ones that are done."""
    if QUERIES < C:
        value += tl.load(at, mask=done > 0, other=0.0).to(tl.float32)
    tl.store(at, value.to(at.dtype.element_ty))


@triton.jit(do_not_specialize=["walks"])
def read_backward_kernel(
    Q, K, ROWS, G, STATES, STEPS, HIDDENS, TARGETS, GAMMA, Z, R, G_Y,
    G_Q, G_K, G_ROWS, G_G, G_STATES, G_TARGETS, G_U1, G_X2, G_U2, G_NORM,
    qb, qt, qh, kb, kt, kh, yb, yt, yh, gb, gt, gh,
    walks, heads, chunks, tokens, first_chunk, span,
    C: tl.constexpr, P: tl.constexpr, HIDDEN: tl.constexpr, HS: tl.constexpr,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, MOMENTUM: tl.constexpr, TARGET: tl.constexpr,
    DUAL: tl.constexpr, PRECISION: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Reverse of `read_kernel`. G_NORM ``[M, N, 2, P]``, G_K ``[M, span, C, P]``: each chunk's part.

    G_TARGETS: what the gradient of the targets has beyond that of the state, which they are part of. QUERIES:
    tokens of a chunk whose reads are taken at a time, for what of them has to be in shared memory.
    """
    SIZE: tl.constexpr = P * HIDDEN
    PARTS: tl.constexpr = 4 if MOMENTUM else 2
    m, at = tl.program_id(1), tl.program_id(0)
    n = first_chunk + at
    b, h = m // heads, m % heads
    dtype: tl.constexpr = STEPS.dtype.element_ty
    i, p, hs = tl.arange(0, C), tl.arange(0, P), tl.arange(0, HS)
    narrow = i[:, None] * P + p[None, :]
    here = m.to(tl.int64) * span + at
    cell = m.to(tl.int64) * chunks + n
    states, g_states = STATES + here * PARTS * SIZE, G_STATES + here * PARTS * SIZE
    targets, g_targets = states, g_states
    if TARGET:
        targets, g_targets = TARGETS + h * 2 * SIZE, G_TARGETS + here * 2 * SIZE
    if DUAL:
        k_at = K + b * kb.to(tl.int64) + h * kh + (n * C + i)[:, None] * kt + p[None, :]
        k = tl.load(k_at, mask=(n * C + i < tokens)[:, None], other=0.0).to(dtype)
        u2 = tl.load(STEPS + here * C * P + narrow)
    for done in range(0, C, QUERIES):
        j = done + tl.arange(0, QUERIES)
        t = n * C + j
        inside = (t < tokens)[:, None]
        q_at = Q + b * qb.to(tl.int64) + h * qh + t[:, None] * qt + p[None, :]
        q = tl.load(q_at, mask=inside, other=0.0).to(dtype)
        y_at = G_Y + b * yb.to(tl.int64) + h * yh + t[:, None] * yt + p[None, :]
        g_y = tl.load(y_at, mask=inside, other=0.0).to(tl.float32)

        g_z = g_y
        if NORM == 2:
            zh = tl.load(Z + cell * C * P + j[:, None] * P + p[None, :]).to(tl.float32)
            r = tl.load(R + cell * C + j)
            gamma = tl.load(GAMMA + h * P + p)
            _add(G_NORM + cell * 2 * P + p, tl.sum(g_y * zh, 0), done, C, QUERIES)
            _add(G_NORM + cell * 2 * P + P + p, tl.sum(g_y, 0), done, C, QUERIES)
            g_z = through_norm(g_y * gamma[None, :], zh, r, NORM, P)
        gz = g_z.to(dtype)
        g_q = g_y
        if NORM == 0:
            g_q = g_y * 0.0
        if DUAL:
            A = tl.load(ROWS + cell * 3 * C + j)
            F = tl.load(ROWS + cell * 3 * C + C + j)
            g_at = G + cell * C * C + j[:, None] * C + i[None, :]
            weighted = (dot(q, tl.trans(k), PRECISION) * tl.load(g_at)).to(dtype)
            g_scores2 = (dot(gz, tl.trans(u2), PRECISION) * tl.load(g_at)).to(dtype)
            aq, fq = _mixed(A, F, q, dtype, MOMENTUM)
            agz, fgz = _mixed(A, F, g_z, dtype, MOMENTUM)
            mgz = (g_z * (1.0 - A)[:, None]).to(dtype)
            scores = tl.zeros((QUERIES, C), tl.float32)
            g_weighted1 = tl.zeros((QUERIES, C), tl.float32)
            g_A = tl.zeros((QUERIES,), tl.float32)
            g_F = tl.zeros((QUERIES,), tl.float32)
        for low in range(0, HIDDEN, HS):
            first = p[:, None] * HIDDEN + (low + hs)[None, :]
            second = (low + hs)[:, None] * P + p[None, :]
            wide = i[:, None] * HIDDEN + (low + hs)[None, :]
            w1, w2 = tl.load(states + first), tl.load(states + SIZE + second)
            if DUAL:
                hidden = HIDDENS + here * C * HIDDEN + wide
                x2, u1 = tl.load(hidden), tl.load(hidden + 2 * walks.to(tl.int64) * span * C * HIDDEN)
                z1 = dot(aq, w1, PRECISION) + dot(weighted, u1, PRECISION)
                if MOMENTUM:
                    s1, s2 = tl.load(states + 2 * SIZE + first), tl.load(states + 3 * SIZE + second)
                    z1 += dot(fq, s1, PRECISION)
                if TARGET:
                    m1 = tl.load(targets + first).to(dtype)
                    m2 = tl.load(targets + SIZE + second).to(dtype)
                    z1 += dot(q, m1, PRECISION)
                x, slope, _ = activate(z1, ACTIVATION)
                xb = x.to(dtype)
                # z~_2
                along = dot(gz, tl.trans(w2), PRECISION)
                g_A += tl.sum(x * along, 1)
                g_x = along * A[:, None] + dot(g_scores2, x2, PRECISION)
                _add(g_states + SIZE + second, dot(tl.trans(xb), agz, PRECISION), done, C, QUERIES)
                if MOMENTUM:
                    along = dot(gz, tl.trans(s2), PRECISION)
                    g_F += tl.sum(x * along, 1)
                    g_x += along * F[:, None]
                    _add(g_states + 3 * SIZE + second, dot(tl.trans(xb), fgz, PRECISION), done, C, QUERIES)
                if TARGET:
                    g_x += dot(gz, tl.trans(m2), PRECISION)
                    _add(g_targets + SIZE + second, dot(tl.trans(xb), mgz, PRECISION), done, C, QUERIES)
                scores += dot(xb, tl.trans(x2), PRECISION)
                _add(
                    G_X2 + here * C * HIDDEN + wide, dot(tl.trans(g_scores2), xb, PRECISION), done, C, QUERIES
                )
                # z~_1
                gz1 = g_x * slope
                agz1, fgz1 = _mixed(A, F, gz1, dtype, MOMENTUM)
                mgz1 = (gz1 * (1.0 - A)[:, None]).to(dtype)
                gz1 = gz1.to(dtype)
                along = dot(gz1, tl.trans(w1), PRECISION)
                g_A += tl.sum(q * along, 1)
                g_q += along * A[:, None]
                _add(g_states + first, dot(tl.trans(q), agz1, PRECISION), done, C, QUERIES)
                if MOMENTUM:
                    along = dot(gz1, tl.trans(s1), PRECISION)
                    g_F += tl.sum(q * along, 1)
                    g_q += along * F[:, None]
                    _add(g_states + 2 * SIZE + first, dot(tl.trans(q), fgz1, PRECISION), done, C, QUERIES)
                if TARGET:
                    g_q += dot(gz1, tl.trans(m1), PRECISION)
                    _add(g_targets + first, dot(tl.trans(q), mgz1, PRECISION), done, C, QUERIES)
                g_weighted1 += dot(gz1, tl.trans(u1), PRECISION)
                _add(
                    G_U1 + here * C * HIDDEN + wide, dot(tl.trans(weighted), gz1, PRECISION), done, C, QUERIES
                )
            else:
                full1 = weight(w1, targets, first, TARGET).to(dtype)
                full2 = weight(w2, targets + SIZE, second, TARGET).to(dtype)
                x, slope, _ = activate(dot(q, full1, PRECISION), ACTIVATION)
                g_x = dot(gz, tl.trans(full2), PRECISION)
                _add(g_states + SIZE + second, dot(tl.trans(x.to(dtype)), gz, PRECISION), done, C, QUERIES)
                gz1 = (g_x * slope).to(dtype)
                g_q += dot(gz1, tl.trans(full1), PRECISION)
                _add(g_states + first, dot(tl.trans(q), gz1, PRECISION), done, C, QUERIES)
        if DUAL:
            coefficients = tl.load(g_at)
            g_u2 = dot(tl.trans((scores * coefficients).to(dtype)), gz, PRECISION)
            _add(G_U2 + here * C * P + narrow, g_u2, done, C, QUERIES)
            g_G = scores * dot(gz, tl.trans(u2), PRECISION) + dot(q, tl.trans(k), PRECISION) * g_weighted1
            tl.store(G_G + cell * C * C + j[:, None] * C + i[None, :], g_G.to(dtype))
            g_scores1 = (g_weighted1 * coefficients).to(dtype)
            g_q += dot(g_scores1, k, PRECISION)
            _add(G_K + here * C * P + narrow, dot(tl.trans(g_scores1), q, PRECISION), done, C, QUERIES)
            tl.store(G_ROWS + cell * 2 * C + j, g_A)
            tl.store(G_ROWS + cell * 2 * C + C + j, g_F)
        out = G_Q + b * gb.to(tl.int64) + h * gh + t[:, None] * gt + p[None, :]
        tl.store(out, g_q.to(G_Q.dtype.element_ty), mask=inside)
        if QUERIES < C:
            tl.debug_barrier()  # other threads add to what this one has stored
