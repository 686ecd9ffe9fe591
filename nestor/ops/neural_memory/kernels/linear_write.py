"""The writes of a memory of one layer, ``f(x) = head(x, x W)``, forward and backward.

Per chunk, with D = W - M where the weights decay to targets M, else W, and the coefficients of
../coefficients.py:

    keys   z = k W, u = -delta (see `pull_back`)
    state  D' = A_C D + F_C S + (G_C k)^T u        S' = m_C S + (E_C k)^T u

A walk is one sequence and head; SPLIT programs share it, each with PS rows of D and S, which it keeps in
registers from chunk to chunk. Only z and the gradient of u are sums over the rows, so the programs of a walk
meet once a chunk (`sum_over_slices`).

Layouts (M walks, m = b heads + h; Q = 2 parts D, S with momentum, else 1):
    targets     float32 ``[heads, P P]``
    checkpoints float32 ``[K, M, Q, P P]``: the state every `interval` chunks and at the end
In the operands' dtype:
    states      ``[M, span, Q, P P]``: the state at the start of each chunk
    steps, zh   ``[M, span, C, P]``: u, and with norms, float32 ``[M, span, 2, C]``, what its backward needs
"""

import triton
import triton.language as tl

from nestor.ops.neural_memory.kernels.primitives import (
    dot,
    error_gradient,
    head,
    load_norm,
    loss_error,
    output_gradient,
    pull_back,
    pull_back_vjp,
    sum_over_slices,
    weight,
)


@triton.jit
def _load_state(base, cells, SIZE: tl.constexpr, MOMENTUM: tl.constexpr):
    """D and S; without momentum nothing uses S."""
    D = tl.load(base + cells).to(tl.float32)
    S = tl.zeros_like(D)
    if MOMENTUM:
        S = tl.load(base + SIZE + cells).to(tl.float32)
    return D, S


@triton.jit
def _store_state(base, cells, D, S, SIZE: tl.constexpr, MOMENTUM: tl.constexpr):
    tl.store(base + cells, D.to(base.dtype.element_ty))
    if MOMENTUM:
        tl.store(base + SIZE + cells, S.to(base.dtype.element_ty))


@triton.jit(do_not_specialize=["walks"])
def linear_write_kernel(
    K, V, ENDS, LAST, CHECKPOINTS, STATES, STEPS, ZH, NORMS, TARGETS, GAMMA, BETA,
    START, RESETS, OPEN, ANCHOR, EXCHANGE, ARRIVALS, TICKET,
    kb, kt, kh, vb, vt, vh, walks, heads, chunks, tokens, first_chunk, span, interval, rows,
    eps, scale, threshold,
    C: tl.constexpr, P: tl.constexpr, PS: tl.constexpr, NORM: tl.constexpr, LOSS: tl.constexpr,
    MOMENTUM: tl.constexpr, TARGET: tl.constexpr, HAS_RESETS: tl.constexpr, HAS_OPEN: tl.constexpr,
    SAVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk `rows` chunks from each checkpoint of the span; with SAVE also write the checkpoints passed.

    RESETS uint8 ``[B, N]``; START ``[heads, Q, P P]`` is what a document begins with. OPEN int32 ``[B]``: the
    chunk that the call leaves open (or -1), D at whose start goes to ANCHOR ``[M, 1, P P]``.
    """
    SPLIT: tl.constexpr = P // PS
    SIZE: tl.constexpr = P * P
    PARTS: tl.constexpr = 2 if MOMENTUM else 1
    # Programs of one walk start together: tickets are drawn in the order in which programs start.
    ticket = tl.atomic_add(TICKET, 1)
    s = ticket % SPLIT
    group = ticket // SPLIT
    m = group % walks
    piece = group // walks
    b, h = m // heads, m % heads
    dtype = STEPS.dtype.element_ty
    begin = first_chunk + piece * rows
    end = tl.minimum(tl.minimum(begin + rows, first_chunk + span), chunks)

    i, p, j = tl.arange(0, C), tl.arange(0, P), s * PS + tl.arange(0, PS)
    cells = j[:, None] * P + p[None, :]
    state = CHECKPOINTS + ((begin // interval) * walks + m).to(tl.int64) * PARTS * SIZE
    D, S = _load_state(state, cells, SIZE, MOMENTUM)
    targets = CHECKPOINTS
    if TARGET:
        targets = TARGETS + h * SIZE
    gamma, beta = load_norm(GAMMA, BETA, h, NORM, P)
    exchange = EXCHANGE + group.to(tl.int64) * 2 * SPLIT * C * P
    k_at = K + b * kb.to(tl.int64) + h * kh
    v_at = V + b * vb.to(tl.int64) + h * vh

    for n in range(begin, end):
        t = n * C + i
        inside = (t < tokens)[:, None]
        k = tl.load(k_at + t[:, None] * kt + j[None, :], mask=inside, other=0.0).to(dtype)
        cell = m.to(tl.int64) * chunks + n
        here = m.to(tl.int64) * span + n - first_chunk
        if HAS_RESETS:
            if tl.load(RESETS + b * chunks + n) != 0:
                D, S = _load_state(START + h * PARTS * SIZE, cells, SIZE, MOMENTUM)
        if SAVE:
            if n % interval == 0:
                at = CHECKPOINTS + ((n // interval) * walks + m).to(tl.int64) * PARTS * SIZE
                _store_state(at, cells, D, S, SIZE, MOMENTUM)
        if HAS_OPEN:
            if n == tl.load(OPEN + b):
                tl.store(ANCHOR + m.to(tl.int64) * SIZE + cells, D)
        _store_state(STATES + here * PARTS * SIZE, cells, D, S, SIZE, MOMENTUM)

        part = dot(k, weight(D, targets, cells, TARGET).to(dtype), PRECISION)
        turn = n - begin
        z = sum_over_slices(part, exchange, ARRIVALS + group, turn % 2, s, turn + 1, SPLIT, C, P)
        x = tl.load(k_at + t[:, None] * kt + p[None, :], mask=inside, other=0.0).to(tl.float32)
        v = tl.load(v_at + t[:, None] * vt + p[None, :], mask=inside, other=0.0).to(tl.float32)
        u, zh, r, along = pull_back(x, v, z, gamma, beta, eps, scale, threshold, NORM, LOSS, P)
        u = u.to(dtype)
        if s == 0:
            place = here * C * P + i[:, None] * P + p[None, :]
            tl.store(STEPS + place, u)
            if not SAVE:
                tl.store(ZH + place, zh.to(dtype))
                tl.store(NORMS + here * 2 * C + i, r)
                tl.store(NORMS + here * 2 * C + C + i, along)

        g_end = tl.load(ENDS + cell * 2 * C + i)
        D = tl.load(LAST + cell * 4) * D
        if MOMENTUM:
            e_end = tl.load(ENDS + cell * 2 * C + C + i)
            D += tl.load(LAST + cell * 4 + 1) * S
            S = tl.load(LAST + cell * 4 + 2) * S
            S += dot(tl.trans((k * e_end[:, None]).to(dtype)), u, PRECISION)
        D += dot(tl.trans((k * g_end[:, None]).to(dtype)), u, PRECISION)

    if SAVE:
        at = CHECKPOINTS + (tl.cdiv(end, interval) * walks + m).to(tl.int64) * PARTS * SIZE
        _store_state(at, cells, D, S, SIZE, MOMENTUM)


@triton.jit(do_not_specialize=["walks"])
def linear_write_backward_kernel(
    K, V, ENDS, LAST, STEPS, ZH, NORMS, GAMMA, BETA, RESETS, OPEN,
    G_STATES, G_U, CARRIED, AFTER, G_Z, G_STEPS, G_ANCHOR, G_START, EXCHANGE, ARRIVALS, TICKET,
    kb, kt, kh, vb, vt, vh, walks, heads, chunks, tokens, first_chunk, span, scale, threshold,
    C: tl.constexpr, P: tl.constexpr, PS: tl.constexpr, NORM: tl.constexpr, LOSS: tl.constexpr,
    MOMENTUM: tl.constexpr, HAS_RESETS: tl.constexpr, HAS_OPEN: tl.constexpr,
    READS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Reverse of `linear_write_kernel` on the chunks first_chunk .. first_chunk + span - 1, last one first:
    what the gradient of each chunk needs of the chunks after it. The rest is `linear_gradients_kernel`.

    CARRIED float32 ``[M, Q, P P]``: gradients of the state after the span, overwritten by those of the state
    before it. G_STATES ``[M, span, Q, P P]``, and with READS G_U ``[M, span, C, P]``: what the reads of each
    chunk add. Writes the gradients of the state after each chunk to AFTER, like G_STATES, those of z to G_Z,
    like G_U, and of u to G_STEPS, float32.
    """
    SPLIT: tl.constexpr = P // PS
    SIZE: tl.constexpr = P * P
    PARTS: tl.constexpr = 2 if MOMENTUM else 1
    ticket = tl.atomic_add(TICKET, 1)
    s = ticket % SPLIT
    m = ticket // SPLIT
    b, h = m // heads, m % heads
    dtype = STEPS.dtype.element_ty

    i, p, j = tl.arange(0, C), tl.arange(0, P), s * PS + tl.arange(0, PS)
    cells = j[:, None] * P + p[None, :]
    carried = CARRIED + m.to(tl.int64) * PARTS * SIZE
    dD, dS = _load_state(carried, cells, SIZE, MOMENTUM)
    gamma, beta = load_norm(GAMMA, BETA, h, NORM, P)
    exchange = EXCHANGE + m.to(tl.int64) * 2 * SPLIT * C * P
    k_at = K + b * kb.to(tl.int64) + h * kh
    v_at = V + b * vb.to(tl.int64) + h * vh
    last_chunk = tl.minimum(first_chunk + span, chunks) - 1

    for turn in range(0, last_chunk - first_chunk + 1):
        n = last_chunk - turn
        t = n * C + i
        inside = (t < tokens)[:, None]
        k = tl.load(k_at + t[:, None] * kt + j[None, :], mask=inside, other=0.0).to(dtype)
        cell = m.to(tl.int64) * chunks + n
        here = m.to(tl.int64) * span + n - first_chunk
        place = here * C * P + i[:, None] * P + p[None, :]
        _store_state(AFTER + here * PARTS * SIZE, cells, dD, dS, SIZE, MOMENTUM)

        # The steps, as the state takes them and as the reads see them.
        g_end = tl.load(ENDS + cell * 2 * C + i)
        part = dot((k * g_end[:, None]).to(dtype), dD.to(dtype), PRECISION)
        reads = G_STATES + here * PARTS * SIZE + cells
        if MOMENTUM:
            e_end = tl.load(ENDS + cell * 2 * C + C + i)
            part += dot((k * e_end[:, None]).to(dtype), dS.to(dtype), PRECISION)
            dS = tl.load(LAST + cell * 4 + 2) * dS + tl.load(LAST + cell * 4 + 1) * dD
            if READS:
                dS += tl.load(reads + SIZE).to(tl.float32)
        dD = tl.load(LAST + cell * 4) * dD + tl.load(reads).to(tl.float32)
        if HAS_OPEN:
            if n == tl.load(OPEN + b):
                dD += tl.load(G_ANCHOR + m.to(tl.int64) * SIZE + cells)
        g_u = sum_over_slices(part, exchange, ARRIVALS + m, turn % 2, s, turn + 1, SPLIT, C, P)
        if READS:
            g_u += tl.load(G_U + place).to(tl.float32)

        # u from z = k W.
        u = tl.load(STEPS + place)
        zh = tl.load(ZH + place).to(tl.float32)
        r, along = tl.load(NORMS + here * 2 * C + i), tl.load(NORMS + here * 2 * C + C + i)
        x, v = zh, zh
        if LOSS == 2:
            x = tl.load(k_at + t[:, None] * kt + p[None, :], mask=inside, other=0.0).to(tl.float32)
            v = tl.load(v_at + t[:, None] * vt + p[None, :], mask=inside, other=0.0).to(tl.float32)
        g_z = pull_back_vjp(g_u, x, v, u, zh, r, along, gamma, beta, scale, threshold, NORM, LOSS, P)
        g_z = g_z.to(dtype)
        if s == 0:
            tl.store(G_STEPS + place, g_u)
            tl.store(G_Z + place, g_z)
        dD += dot(tl.trans(k), g_z, PRECISION)

        if HAS_RESETS:
            if tl.load(RESETS + b * chunks + n) != 0:
                start = G_START + m.to(tl.int64) * PARTS * SIZE + cells
                tl.store(start, tl.load(start) + dD)
                dD = dD * 0.0
                if MOMENTUM:
                    tl.store(start + SIZE, tl.load(start + SIZE) + dS)
                    dS = dS * 0.0

    _store_state(carried, cells, dD, dS, SIZE, MOMENTUM)


@triton.jit
def _times_transposed(x_at, base, targets, C: tl.constexpr, P: tl.constexpr, PS: tl.constexpr,
                      TARGET: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """x W^T for the rows ``[C, P]`` at x_at and W ``[P, P]`` at base, or W = D + M; PS columns at a turn."""
    total = tl.zeros((C, P), tl.float32)
    for low in range(0, P, PS):
        j = low + tl.arange(0, PS)
        cells = tl.arange(0, P)[:, None] * P + j[None, :]
        x = tl.load(x_at + j[None, :])
        w = weight(tl.load(base + cells), targets, cells, TARGET).to(x.dtype)
        total += dot(x, tl.trans(w), PRECISION)
    return total


@triton.jit
def _inner(one, other, P: tl.constexpr, PS: tl.constexpr):
    """Sum of the products of two matrices ``[P, P]``, number by number."""
    total = 0.0
    for low in range(0, P, PS):
        cells = (low + tl.arange(0, PS))[:, None] * P + tl.arange(0, P)[None, :]
        total += tl.sum(tl.load(one + cells).to(tl.float32) * tl.load(other + cells).to(tl.float32))
    return total


@triton.jit(do_not_specialize=["walks"])
def linear_gradients_kernel(
    K, V, ENDS, STATES, STEPS, ZH, NORMS, TARGETS, GAMMA, BETA,
    AFTER, G_Z, G_STEPS, READ_K, G_K, G_V, G_ENDS, G_LAST, G_NORM,
    kb, kt, kh, vb, vt, vh, gb, gt, gh, walks, heads, chunks, tokens, first_chunk, span, scale, threshold,
    C: tl.constexpr, P: tl.constexpr, PS: tl.constexpr, NORM: tl.constexpr, LOSS: tl.constexpr,
    MOMENTUM: tl.constexpr, TARGET: tl.constexpr, READS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys, values and coefficients of each chunk, after `linear_write_backward_kernel`.

    READ_K: the keys' gradient from the reads, ``[M, span, C, P]``. Adds to G_NORM, float32
    ``[M, N, 2, P]``; G_ENDS and G_LAST as in coefficients.py.
    """
    SIZE: tl.constexpr = P * P
    PARTS: tl.constexpr = 2 if MOMENTUM else 1
    m, at = tl.program_id(1), tl.program_id(0)
    n = first_chunk + at
    b, h = m // heads, m % heads
    i, p = tl.arange(0, C), tl.arange(0, P)
    t = n * C + i
    inside = (t < tokens)[:, None]
    here = m.to(tl.int64) * span + at
    cell = m.to(tl.int64) * chunks + n
    place = here * C * P + i[:, None] * P
    k_at = K + b * kb.to(tl.int64) + h * kh + t[:, None] * kt + p[None, :]
    v_at = V + b * vb.to(tl.int64) + h * vh + t[:, None] * vt + p[None, :]
    out = b * gb.to(tl.int64) + h * gh + t[:, None] * gt + p[None, :]
    states, after = STATES + here * PARTS * SIZE, AFTER + here * PARTS * SIZE
    targets = NORMS
    if TARGET:
        targets = TARGETS + h * SIZE

    # Through what the chunk leaves behind, and through z = k W.
    k = tl.load(k_at, mask=inside, other=0.0).to(tl.float32)
    ends, g_ends = ENDS + cell * 2 * C + i, G_ENDS + cell * 2 * C + i
    along = _times_transposed(STEPS + place, after, after, C, P, PS, False, PRECISION)
    tl.store(g_ends, tl.sum(k * along, 1))
    tl.store(G_LAST + cell * 4, _inner(after, states, P, PS))
    g_k = along * tl.load(ends)[:, None]
    if MOMENTUM:
        along = _times_transposed(STEPS + place, after + SIZE, after, C, P, PS, False, PRECISION)
        tl.store(g_ends + C, tl.sum(k * along, 1))
        tl.store(G_LAST + cell * 4 + 1, _inner(after, states + SIZE, P, PS))
        tl.store(G_LAST + cell * 4 + 2, _inner(after + SIZE, states + SIZE, P, PS))
        g_k += along * tl.load(ends + C)[:, None]
    g_k += _times_transposed(G_Z + place, states, targets, C, P, PS, TARGET, PRECISION)
    if READS:
        g_k += tl.load(READ_K + place + p[None, :]).to(tl.float32)

    # Through the error and the residual.
    v = tl.load(v_at, mask=inside, other=0.0).to(tl.float32)
    zh = tl.load(ZH + place + p[None, :]).to(tl.float32)
    r = tl.load(NORMS + here * 2 * C + i)
    gamma, beta = load_norm(GAMMA, BETA, h, NORM, P)
    g_e, g_weighted = error_gradient(tl.load(G_STEPS + place + p[None, :]), zh, r, gamma, NORM, P)
    g_f = output_gradient(g_e, k, v, zh, gamma, beta, scale, threshold, NORM, LOSS)
    g_v = -g_f
    if LOSS == 1:
        g_v = g_e * -scale
    tl.store(G_V + out, g_v.to(G_V.dtype.element_ty), mask=inside)
    if NORM != 0:
        g_k += g_f
    if NORM == 2:
        e = loss_error(head(k, zh, gamma, beta, NORM), v, scale, threshold, LOSS)
        norm = G_NORM + cell * 2 * P + p
        tl.store(norm, tl.load(norm) + tl.sum(e * g_weighted + g_f * zh, 0))
        tl.store(norm + P, tl.load(norm + P) + tl.sum(g_f, 0))
    tl.store(G_K + out, g_k.to(G_K.dtype.element_ty), mask=inside)
