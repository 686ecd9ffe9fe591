"""The writes of a two-layer memory: the walk that waits for the chunk before, forward and backward.

A walk is one sequence and head; SPLIT programs share it, each with HS columns of W1 and the same rows of W2,
which it keeps in registers from chunk to chunk with their momentum. Only z2 and its gradient are sums over
the hidden width, so the programs of a walk meet once a chunk (`sum_over_slices`).

Where the weights decay to targets M ``[heads, 2, P HIDDEN]``, a state holds D = W - M instead of W: the decay
is D' = A D, and the gradient of A, a sum of dW * D, keeps its digits in states of 16 bits.

Layouts (M walks, m = b heads + h; Q = 4 parts W1, W2, S1, S2 with momentum, else 2; P x HIDDEN numbers each):
    checkpoints float32 ``[K, M, Q, P HIDDEN]``: the state every `interval` chunks and at the end
In the operands' dtype:
    states      ``[M, span, Q, P HIDDEN]``: the state at the start of each chunk
    steps       ``[M, span, C, P]``: u_2
    hidden      ``[4, M, span, C, HIDDEN]``: x_2, phi'(z_1), u_1, and u_2 W2^T phi''(z_1)
    zh, norm    ``[M, span, C, P]``, float32 ``[M, span, 2, C]``: what `pull_back` gives besides u_2
"""

import triton
import triton.language as tl

from nestor.ops.neural_memory.kernels.primitives import (
    activate,
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
def _slice_cells(s, HIDDEN: tl.constexpr, HS: tl.constexpr, P: tl.constexpr):
    """Places of a slice in W1 ``[P, HIDDEN]`` and W2 ``[HIDDEN, P]``."""
    p, j = tl.arange(0, P), s * HS + tl.arange(0, HS)
    return p[:, None] * HIDDEN + j[None, :], j[:, None] * P + p[None, :]


@triton.jit
def _load_state(base, first, second, SIZE: tl.constexpr, MOMENTUM: tl.constexpr):
    """W1, W2, S1, S2; without momentum the last two are W1, W2 again, and nothing uses them."""
    W1 = tl.load(base + first).to(tl.float32)
    W2 = tl.load(base + SIZE + second).to(tl.float32)
    S1, S2 = W1, W2
    if MOMENTUM:
        S1 = tl.load(base + 2 * SIZE + first).to(tl.float32)
        S2 = tl.load(base + 3 * SIZE + second).to(tl.float32)
    return W1, W2, S1, S2


@triton.jit
def _store_state(base, first, second, W1, W2, S1, S2, SIZE: tl.constexpr, MOMENTUM: tl.constexpr):
    dtype = base.dtype.element_ty
    tl.store(base + first, W1.to(dtype))
    tl.store(base + SIZE + second, W2.to(dtype))
    if MOMENTUM:
        tl.store(base + 2 * SIZE + first, S1.to(dtype))
        tl.store(base + 3 * SIZE + second, S2.to(dtype))


@triton.jit(do_not_specialize=["walks"])
def write_kernel(
    K, V, ENDS, LAST, CHECKPOINTS, STATES, STEPS, HIDDENS, ZH, NORMS, TARGETS, GAMMA, BETA,
    START, RESETS, OPEN, ANCHOR, EXCHANGE, ARRIVALS, TICKET,
    kb, kt, kh, vb, vt, vh, walks, heads, chunks, tokens, first_chunk, span, interval, rows,
    eps, scale, threshold,
    C: tl.constexpr, P: tl.constexpr, HIDDEN: tl.constexpr, HS: tl.constexpr,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, LOSS: tl.constexpr, MOMENTUM: tl.constexpr,
    TARGET: tl.constexpr, HAS_RESETS: tl.constexpr, HAS_OPEN: tl.constexpr,
    SAVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk `rows` chunks from each checkpoint of the span; with SAVE also write the checkpoints passed.

    RESETS uint8 ``[B, N]``; START ``[heads, Q, P HIDDEN]`` is what a document begins with. OPEN int32
    ``[B]``: the chunk that the call leaves open (or -1), the state at whose start goes to ANCHOR
    ``[M, 2, P HIDDEN]``.
    """
    SPLIT: tl.constexpr = HIDDEN // HS
    SIZE: tl.constexpr = P * HIDDEN
    PARTS: tl.constexpr = 4 if MOMENTUM else 2
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

    i, p, j = tl.arange(0, C), tl.arange(0, P), s * HS + tl.arange(0, HS)
    first, second = _slice_cells(s, HIDDEN, HS, P)
    state = CHECKPOINTS + ((begin // interval) * walks + m).to(tl.int64) * PARTS * SIZE
    W1, W2, S1, S2 = _load_state(state, first, second, SIZE, MOMENTUM)
    targets = CHECKPOINTS
    if TARGET:
        targets = TARGETS + h * 2 * SIZE
    gamma, beta = load_norm(GAMMA, BETA, h, NORM, P)
    exchange = EXCHANGE + group.to(tl.int64) * 2 * SPLIT * C * P
    k_at = K + b * kb.to(tl.int64) + h * kh
    v_at = V + b * vb.to(tl.int64) + h * vh

    for n in range(begin, end):
        t = n * C + i
        inside = (t < tokens)[:, None]
        k = tl.load(k_at + t[:, None] * kt + p[None, :], mask=inside, other=0.0).to(dtype)
        cell = m.to(tl.int64) * chunks + n
        if HAS_RESETS:
            if tl.load(RESETS + b * chunks + n) != 0:
                W1, W2, S1, S2 = _load_state(START + h * PARTS * SIZE, first, second, SIZE, MOMENTUM)
        if SAVE:
            if n % interval == 0:
                at = CHECKPOINTS + ((n // interval) * walks + m).to(tl.int64) * PARTS * SIZE
                _store_state(at, first, second, W1, W2, S1, S2, SIZE, MOMENTUM)
        if HAS_OPEN:
            if n == tl.load(OPEN + b):
                anchor = ANCHOR + m.to(tl.int64) * 2 * SIZE
                tl.store(anchor + first, W1)
                tl.store(anchor + SIZE + second, W2)
        here = m.to(tl.int64) * span + n - first_chunk
        _store_state(STATES + here * PARTS * SIZE, first, second, W1, W2, S1, S2, SIZE, MOMENTUM)

        w1 = weight(W1, targets, first, TARGET).to(dtype)
        w2 = weight(W2, targets + SIZE, second, TARGET).to(dtype)
        x2, slope, curvature = activate(dot(k, w1, PRECISION), ACTIVATION)
        x2, slope, curvature = x2.to(dtype), slope.to(dtype), curvature.to(dtype)
        part = dot(x2, w2, PRECISION)
        turn = n - begin
        z2 = sum_over_slices(part, exchange, ARRIVALS + group, turn % 2, s, turn + 1, SPLIT, C, P)
        v = tl.load(v_at + t[:, None] * vt + p[None, :], mask=inside, other=0.0).to(tl.float32)
        u2, zh, r, along = pull_back(
            k.to(tl.float32), v, z2, gamma, beta, eps, scale, threshold, NORM, LOSS, P
        )
        u2 = u2.to(dtype)
        narrow = here * C * P + i[:, None] * P + p[None, :]
        if s == 0:
            tl.store(STEPS + narrow, u2)
        pulled = dot(u2, tl.trans(w2), PRECISION)
        u1 = (pulled * slope).to(dtype)
        if not SAVE:
            if s == 0:
                tl.store(ZH + narrow, zh.to(dtype))
                tl.store(NORMS + here * 2 * C + i, r)
                tl.store(NORMS + here * 2 * C + C + i, along)
            wide = HIDDENS + here * C * HIDDEN + i[:, None] * HIDDEN + j[None, :]
            kind = walks.to(tl.int64) * span * C * HIDDEN
            tl.store(wide, x2)
            tl.store(wide + kind, slope)
            tl.store(wide + 2 * kind, u1)
            tl.store(wide + 3 * kind, (pulled * curvature).to(dtype))

        g_end = tl.load(ENDS + cell * 2 * C + i)
        A, F, mom = tl.load(LAST + cell * 4), tl.load(LAST + cell * 4 + 1), tl.load(LAST + cell * 4 + 2)
        W1, W2 = A * W1, A * W2
        if MOMENTUM:
            e_end = tl.load(ENDS + cell * 2 * C + C + i)
            W1 += F * S1
            W2 += F * S2
            S1 = mom * S1 + dot(tl.trans((k * e_end[:, None]).to(dtype)), u1, PRECISION)
            S2 = mom * S2 + dot(tl.trans((x2 * e_end[:, None]).to(dtype)), u2, PRECISION)
        W1 += dot(tl.trans((k * g_end[:, None]).to(dtype)), u1, PRECISION)
        W2 += dot(tl.trans((x2 * g_end[:, None]).to(dtype)), u2, PRECISION)

    if SAVE:
        at = CHECKPOINTS + (tl.cdiv(end, interval) * walks + m).to(tl.int64) * PARTS * SIZE
        _store_state(at, first, second, W1, W2, S1, S2, SIZE, MOMENTUM)


@triton.jit(do_not_specialize=["walks"])
def write_backward_kernel(
    K, V, ENDS, LAST, STATES, STEPS, HIDDENS, ZH, NORMS, TARGETS, GAMMA, BETA, RESETS, OPEN,
    G_STATES, G_U1, G_X2, G_U2, CARRIED, AFTER, G_Z1, G_STEPS, G_ANCHOR, G_START,
    EXCHANGE, ARRIVALS, TICKET,
    kb, kt, kh, vb, vt, vh, walks, heads, chunks, tokens, first_chunk, span,
    scale, threshold,
    C: tl.constexpr, P: tl.constexpr, HIDDEN: tl.constexpr, HS: tl.constexpr,
    NORM: tl.constexpr, LOSS: tl.constexpr, MOMENTUM: tl.constexpr, TARGET: tl.constexpr,
    HAS_RESETS: tl.constexpr, HAS_OPEN: tl.constexpr, READS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Reverse of `write_kernel` on the chunks first_chunk .. first_chunk + span - 1, last one first: what the
    gradient of each chunk needs of the chunks after it. The rest is `write_gradients_kernel`.

    CARRIED float32 ``[M, Q, P HIDDEN]``: gradients of the state after the span, overwritten by those of the
    state before it. G_STATES ``[M, span, Q, P HIDDEN]``, G_U1, G_X2 ``[M, span, C, HIDDEN]``, G_U2
    ``[M, span, C, P]``: what the reads of each chunk add. Writes the gradients of the state after each chunk
    to AFTER, like G_STATES, those of z_1 to G_Z1, like G_U1, and of u_2 to G_STEPS, float32, like G_U2.
    """
    SPLIT: tl.constexpr = HIDDEN // HS
    SIZE: tl.constexpr = P * HIDDEN
    PARTS: tl.constexpr = 4 if MOMENTUM else 2
    ticket = tl.atomic_add(TICKET, 1)
    s = ticket % SPLIT
    m = ticket // SPLIT
    b, h = m // heads, m % heads
    dtype = STEPS.dtype.element_ty

    i, p, j = tl.arange(0, C), tl.arange(0, P), s * HS + tl.arange(0, HS)
    first, second = _slice_cells(s, HIDDEN, HS, P)
    narrow = i[:, None] * P + p[None, :]
    wide = i[:, None] * HIDDEN + j[None, :]
    kind = walks.to(tl.int64) * span * C * HIDDEN
    carried = CARRIED + m.to(tl.int64) * PARTS * SIZE
    dW1, dW2, dS1, dS2 = _load_state(carried, first, second, SIZE, MOMENTUM)
    targets = CARRIED
    if TARGET:
        targets = TARGETS + h * 2 * SIZE
    gamma, beta = load_norm(GAMMA, BETA, h, NORM, P)
    exchange = EXCHANGE + m.to(tl.int64) * 2 * SPLIT * C * P
    k_at = K + b * kb.to(tl.int64) + h * kh
    v_at = V + b * vb.to(tl.int64) + h * vh
    last_chunk = tl.minimum(first_chunk + span, chunks) - 1

    for turn in range(0, last_chunk - first_chunk + 1):
        n = last_chunk - turn
        t = n * C + i
        inside = (t < tokens)[:, None]
        k = tl.load(k_at + t[:, None] * kt + p[None, :], mask=inside, other=0.0).to(dtype)
        cell = m.to(tl.int64) * chunks + n
        here = m.to(tl.int64) * span + n - first_chunk
        g_end = tl.load(ENDS + cell * 2 * C + i)
        e_end = g_end
        A, F, mom = tl.load(LAST + cell * 4), tl.load(LAST + cell * 4 + 1), tl.load(LAST + cell * 4 + 2)
        hidden = HIDDENS + here * C * HIDDEN + wide
        x2, slope = tl.load(hidden), tl.load(hidden + kind)
        u2 = tl.load(STEPS + here * C * P + narrow)
        w2 = tl.load(STATES + here * PARTS * SIZE + SIZE + second)
        w2 = weight(w2, targets + SIZE, second, TARGET).to(dtype)
        _store_state(AFTER + here * PARTS * SIZE, first, second, dW1, dW2, dS1, dS2, SIZE, MOMENTUM)

        # The steps, as the state takes them and as the reads see them.
        dw2 = dW2.to(dtype)
        g_u1 = dot((k * g_end[:, None]).to(dtype), dW1.to(dtype), PRECISION)
        g_u2 = dot((x2 * g_end[:, None]).to(dtype), dw2, PRECISION)
        g_x2 = dot((u2 * g_end[:, None]).to(dtype), tl.trans(dw2), PRECISION)
        if MOMENTUM:
            e_end = tl.load(ENDS + cell * 2 * C + C + i)
            ds2 = dS2.to(dtype)
            g_u1 += dot((k * e_end[:, None]).to(dtype), dS1.to(dtype), PRECISION)
            g_u2 += dot((x2 * e_end[:, None]).to(dtype), ds2, PRECISION)
            g_x2 += dot((u2 * e_end[:, None]).to(dtype), tl.trans(ds2), PRECISION)
            dS1 = mom * dS1 + F * dW1
            dS2 = mom * dS2 + F * dW2
        if READS:
            g_u1 += tl.load(G_U1 + here * C * HIDDEN + wide).to(tl.float32)
        # u_1 = (u_2 W2^T) phi'(z_1).
        g_pulled = (g_u1 * slope).to(dtype)
        g_z1 = (g_u1 * tl.load(hidden + 3 * kind)).to(dtype)
        g_u2 += dot(g_pulled, w2, PRECISION)
        g_u2 = sum_over_slices(g_u2, exchange, ARRIVALS + m, turn % 2, s, turn + 1, SPLIT, C, P)

        dW1, dW2 = A * dW1, A * dW2
        reads = G_STATES + here * PARTS * SIZE
        dW1 += tl.load(reads + first).to(tl.float32)
        dW2 += tl.load(reads + SIZE + second).to(tl.float32)
        dW2 += dot(tl.trans(g_pulled), u2, PRECISION)
        if MOMENTUM and READS:
            dS1 += tl.load(reads + 2 * SIZE + first).to(tl.float32)
            dS2 += tl.load(reads + 3 * SIZE + second).to(tl.float32)
        if HAS_OPEN:
            if n == tl.load(OPEN + b):
                anchor = G_ANCHOR + m.to(tl.int64) * 2 * SIZE
                dW1 += tl.load(anchor + first)
                dW2 += tl.load(anchor + SIZE + second)

        # u_2 from z_2 = x_2 W2, x_2 = phi(z_1), z_1 = k W1.
        if READS:
            g_u2 += tl.load(G_U2 + here * C * P + narrow).to(tl.float32)
        if s == 0:
            tl.store(G_STEPS + here * C * P + narrow, g_u2)
        zh = tl.load(ZH + here * C * P + narrow).to(tl.float32)
        r, along = tl.load(NORMS + here * 2 * C + i), tl.load(NORMS + here * 2 * C + C + i)
        v = zh
        if LOSS == 2:
            v = tl.load(v_at + t[:, None] * vt + p[None, :], mask=inside, other=0.0).to(tl.float32)
        g_z2 = pull_back_vjp(g_u2, k, v, u2, zh, r, along, gamma, beta, scale, threshold, NORM, LOSS, P).to(
            dtype
        )
        g_x2 += dot(g_z2, tl.trans(w2), PRECISION)
        dW2 += dot(tl.trans(x2), g_z2, PRECISION)
        if READS:
            g_x2 += tl.load(G_X2 + here * C * HIDDEN + wide).to(tl.float32)
        g_z1 = (g_z1 + g_x2 * slope).to(dtype)
        tl.store(G_Z1 + here * C * HIDDEN + wide, g_z1)
        dW1 += dot(tl.trans(k), g_z1, PRECISION)

        if HAS_RESETS:
            if tl.load(RESETS + b * chunks + n) != 0:
                start = G_START + m.to(tl.int64) * PARTS * SIZE
                tl.store(start + first, tl.load(start + first) + dW1)
                tl.store(start + SIZE + second, tl.load(start + SIZE + second) + dW2)
                dW1, dW2 = dW1 * 0.0, dW2 * 0.0
                if MOMENTUM:
                    tl.store(start + 2 * SIZE + first, tl.load(start + 2 * SIZE + first) + dS1)
                    tl.store(start + 3 * SIZE + second, tl.load(start + 3 * SIZE + second) + dS2)
                    dS1, dS2 = dS1 * 0.0, dS2 * 0.0

    _store_state(carried, first, second, dW1, dW2, dS1, dS2, SIZE, MOMENTUM)


@triton.jit(do_not_specialize=["walks"])
def write_gradients_kernel(
    K, V, ENDS, STATES, STEPS, HIDDENS, ZH, NORMS, TARGETS, GAMMA, BETA,
    AFTER, G_Z1, G_STEPS, READ_K, G_K, G_V, G_ENDS, G_LAST, G_NORM,
    kb, kt, kh, vb, vt, vh, gb, gt, gh, walks, heads, chunks, tokens, first_chunk, span,
    scale, threshold,
    C: tl.constexpr, P: tl.constexpr, HIDDEN: tl.constexpr, HS: tl.constexpr,
    NORM: tl.constexpr, LOSS: tl.constexpr, MOMENTUM: tl.constexpr, TARGET: tl.constexpr,
    READS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys, values and coefficients of each chunk, after `write_backward_kernel`.

    READ_K: the keys' gradient from the reads, ``[M, span, C, P]``. Adds to G_NORM, float32
    ``[M, N, 2, P]``; G_ENDS and G_LAST as in coefficients.py.
    """
    SIZE: tl.constexpr = P * HIDDEN
    PARTS: tl.constexpr = 4 if MOMENTUM else 2
    m, at = tl.program_id(1), tl.program_id(0)
    n = first_chunk + at
    b, h = m // heads, m % heads
    i, p, hs = tl.arange(0, C), tl.arange(0, P), tl.arange(0, HS)
    t = n * C + i
    inside = (t < tokens)[:, None]
    narrow = i[:, None] * P + p[None, :]
    here = m.to(tl.int64) * span + at
    cell = m.to(tl.int64) * chunks + n
    kind = walks.to(tl.int64) * span * C * HIDDEN
    k_at = K + b * kb.to(tl.int64) + h * kh + t[:, None] * kt + p[None, :]
    v_at = V + b * vb.to(tl.int64) + h * vh + t[:, None] * vt + p[None, :]
    k = tl.load(k_at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(v_at, mask=inside, other=0.0).to(tl.float32)
    zh = tl.load(ZH + here * C * P + narrow).to(tl.float32)
    r = tl.load(NORMS + here * 2 * C + i)
    gamma, beta = load_norm(GAMMA, BETA, h, NORM, P)
    g_e, g_weighted = error_gradient(tl.load(G_STEPS + here * C * P + narrow), zh, r, gamma, NORM, P)
    g_f = output_gradient(g_e, k, v, zh, gamma, beta, scale, threshold, NORM, LOSS)
    g_v = -g_f
    if LOSS == 1:
        g_v = g_e * -scale
    out = b * gb.to(tl.int64) + h * gh + t[:, None] * gt + p[None, :]
    tl.store(G_V + out, g_v.to(G_V.dtype.element_ty), mask=inside)
    g_k = g_f
    if NORM == 0:
        g_k = g_f * 0.0
    if NORM == 2:
        e = loss_error(head(k, zh, gamma, beta, NORM), v, scale, threshold, LOSS)
        norm = G_NORM + cell * 2 * P + p
        tl.store(norm, tl.load(norm) + tl.sum(e * g_weighted + g_f * zh, 0))
        tl.store(norm + P, tl.load(norm + P) + tl.sum(g_f, 0))
    if READS:
        g_k += tl.load(READ_K + here * C * P + narrow).to(tl.float32)

    g_end = tl.load(ENDS + cell * 2 * C + i)
    e_end = g_end
    if MOMENTUM:
        e_end = tl.load(ENDS + cell * 2 * C + C + i)
    u2 = tl.load(STEPS + here * C * P + narrow)
    targets = NORMS
    if TARGET:
        targets = TARGETS + h * 2 * SIZE
    g_g, g_s = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    g_A, g_F, g_m = 0.0, 0.0, 0.0
    for low in range(0, HIDDEN, HS):
        first = p[:, None] * HIDDEN + (low + hs)[None, :]
        second = (low + hs)[:, None] * P + p[None, :]
        wide = here * C * HIDDEN + i[:, None] * HIDDEN + (low + hs)[None, :]
        states, after = STATES + here * PARTS * SIZE, AFTER + here * PARTS * SIZE
        w1, w2 = tl.load(states + first), tl.load(states + SIZE + second)
        x2, u1 = tl.load(HIDDENS + wide).to(tl.float32), tl.load(HIDDENS + wide + 2 * kind)
        full = weight(w1, targets, first, TARGET).to(u1.dtype)
        g_k += dot(tl.load(G_Z1 + wide), tl.trans(full), PRECISION)
        dw1, dw2 = tl.load(after + first), tl.load(after + SIZE + second)
        along = dot(u1, tl.trans(dw1), PRECISION)
        g_g += tl.sum(k * along, 1) + tl.sum(x2 * dot(u2, tl.trans(dw2), PRECISION), 1)
        g_k += along * g_end[:, None]
        g_A += tl.sum(dw1.to(tl.float32) * w1.to(tl.float32)) + tl.sum(dw2.to(tl.float32) * w2.to(tl.float32))
        if MOMENTUM:
            s1, s2 = tl.load(states + 2 * SIZE + first), tl.load(states + 3 * SIZE + second)
            s1, s2 = s1.to(tl.float32), s2.to(tl.float32)
            g_F += tl.sum(dw1.to(tl.float32) * s1) + tl.sum(dw2.to(tl.float32) * s2)
            ds1, ds2 = tl.load(after + 2 * SIZE + first), tl.load(after + 3 * SIZE + second)
            g_m += tl.sum(ds1.to(tl.float32) * s1) + tl.sum(ds2.to(tl.float32) * s2)
            along = dot(u1, tl.trans(ds1), PRECISION)
            g_s += tl.sum(k * along, 1) + tl.sum(x2 * dot(u2, tl.trans(ds2), PRECISION), 1)
            g_k += along * e_end[:, None]
    tl.store(G_K + out, g_k.to(G_K.dtype.element_ty), mask=inside)
    tl.store(G_ENDS + cell * 2 * C + i, g_g)
    tl.store(G_ENDS + cell * 2 * C + C + i, g_s)
    tl.store(G_LAST + cell * 4, g_A)
    tl.store(G_LAST + cell * 4 + 1, g_F)
    tl.store(G_LAST + cell * 4 + 2, g_m)


@triton.jit
def target_gradients_kernel(
    LAST, AFTER, READS_AT, G_TARGETS, walks, chunks, first_chunk, here, span, size, state_size,
    BLOCK: tl.constexpr, READS: tl.constexpr,
):  # fmt: skip
    """Add the gradient of the targets, from `here` chunks, to G_TARGETS, float32 ``[2, M, size]``.

    W' = A W + (1 - A) M + ..: (1 - A) of the gradient of the state after each chunk, the first `size` of its
    `state_size` numbers; with READS also the reads' own, ``[M, span, size]``, apart: their order may differ.
    """
    m = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    out = G_TARGETS + m * size + place
    total = tl.load(out, mask=inside)
    by_reads = tl.load(out + walks * size, mask=inside)
    for at in range(here):
        lost = 1.0 - tl.load(LAST + (m * chunks + first_chunk + at) * 4)
        after = tl.load(AFTER + (m * span + at) * state_size + place, mask=inside)
        total += lost * after.to(tl.float32)
        if READS:
            by_reads += tl.load(READS_AT + (m * span + at) * size + place, mask=inside).to(tl.float32)
    tl.store(out, total, mask=inside)
    tl.store(out + walks * size, by_reads, mask=inside)
