"""The walk of `walk.py` backward.

Segment after segment, the last first: forward again from the stack kept at its start, with the rows that were
kept, leaving the memories before each tile and the anchors of each chunk in scratch memory; then its tiles
from the last to the first.
"""

import triton
import triton.language as tl

from nestor.ops.self_modifying.kernels.primitives import (
    BLOCK,
    GATES,
    add_product,
    as_column,
    capped_backward,
    decays,
    decays_backward,
    dot,
    load_rows,
    one_column,
    part_of_rows,
    part_of_stack,
    softplus,
    store_rows,
    unit_backward,
    unit_rows,
    write_backward,
    written,
)
from nestor.ops.self_modifying.kernels.walk import load_base, load_stack, store_stack


@triton.jit
def load_part(X, at, inside, column, O: tl.constexpr, P: tl.constexpr):
    return tl.load(part_of_rows(X, at, column, O, P), mask=inside[:, None], other=0.0)


@triton.jit
def add_to_start(
    X, g, column, P: tl.constexpr, O: tl.constexpr, N: tl.constexpr, INITIAL: tl.constexpr
):  # fmt: skip
    """Adds what a tile has of the gradient of what weights are forgotten towards."""
    if INITIAL:
        places = part_of_stack(X, column, P, O, N)
        tl.store(places, tl.load(places) + g)


@triton.jit
def backward_kernel(
    XQ, XK, XV, XG, ETA, ALPHA, VALID, RESETS, CLOSES, START, BIAS_E, BIAS_A, K_OUT, V_OUT, ETA_OUT,
    KEPT, KEPT_ANCHOR, ROWS, SOLVES, STEPS, DECAYS, LENGTHS,
    G_Q_OUT, G_K_OUT, G_V_OUT, G_ETA_OUT, G_ALPHA_OUT, G_Y, G_AFTER, G_ANCHOR_AFTER, BEFORE, BEFORE_ANCHOR,
    G_XQ, G_XK, G_XV, G_XG, G_ETA, G_ALPHA, G_START, G_WEIGHTS, G_ANCHOR, G_BIAS_E, G_BIAS_A,
    tokens, heads, chunks, max_step, horizon, eps,
    P: tl.constexpr, O: tl.constexpr, C: tl.constexpr, TILES: tl.constexpr, SEGMENT: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, Q: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    E: tl.constexpr, A: tl.constexpr,
    L2: tl.constexpr, TARGETS: tl.constexpr, DGD: tl.constexpr, CAP: tl.constexpr, RUNNING: tl.constexpr,
    UNIT: tl.constexpr, INITIAL: tl.constexpr,
    OPEN: tl.constexpr, HAS_VALID: tl.constexpr, HAS_RESETS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Names as in the walk, G_ for gradients of or with respect to. BEFORE and BEFORE_ANCHOR: the scratch
    memory, room for SEGMENT TILES and SEGMENT stacks. G_START is 0 at first."""
    SAME: tl.constexpr = TILES == 1 and not OPEN
    m = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    stack = m * P * O
    sequence = (m // heads) * tokens * heads + m % heads
    segments = tl.cdiv(chunks, SEGMENT)
    scratch, anchors = BEFORE + stack * SEGMENT * TILES, BEFORE_ANCHOR + stack * SEGMENT
    gk, gv, gq, gg, gm = load_stack(G_AFTER + stack, P, O, K, V, Q, G, M)
    # Of the anchor: from the tiles of a chunk and, where it has not ended, from what comes after it.
    hk, hv, hq, hg, hm = 0.0, 0.0, 0.0, 0.0, 0.0
    if not SAME:
        hk, hv, hq, hg, hm = gk * 0.0, gv * 0.0, gq * 0.0, gg * 0.0, gm * 0.0
        if OPEN:
            hk, hv, hq, hg, hm = load_stack(G_ANCHOR_AFTER + stack, P, O, K, V, Q, G, M)
    bias_a, g_bias_e, g_bias_a = 0.0, 0.0, 0.0
    if A >= 0:
        bias_a = tl.load(BIAS_A + m)
    for back in range(segments):
        segment = segments - 1 - back
        first = segment * SEGMENT
        last = tl.minimum(first + SEGMENT, chunks)
        kept = (m * segments + segment) * P * O
        Wk, Wv, Wq, Wg, Wm = load_stack(KEPT + kept, P, O, K, V, Q, G, M)
        Ak, Av, Aq, Ag, Am = Wk, Wv, Wq, Wg, Wm
        if OPEN:
            Ak, Av, Aq, Ag, Am = load_stack(KEPT_ANCHOR + kept, P, O, K, V, Q, G, M)
        for n in range(first, last):
            if HAS_RESETS:
                if tl.load(RESETS + m * chunks + n) != 0:
                    Wk, Wv, Wq, Wg, Wm = load_stack(START + stack, P, O, K, V, Q, G, M)
                    Ak, Av, Aq, Ag, Am = Wk, Wv, Wq, Wg, Wm
            if not SAME:
                if not OPEN:
                    Ak, Av, Aq, Ag, Am = Wk, Wv, Wq, Wg, Wm
                store_stack(anchors + (n - first) * P * O, Ak, Av, Aq, Ag, Am, P, O, K, V, Q, G, M)
            for tile in range(TILES):
                place = scratch + ((n - first) * TILES + tile) * P * O
                store_stack(place, Wk, Wv, Wq, Wg, Wm, P, O, K, V, Q, G, M)
                column = tile * BLOCK + i
                t = n * C + column
                inside = (column < C) & (t < tokens)
                at = sequence + t.to(tl.int64) * heads
                D, before, end, whole = decays(tl.load(DECAYS + at, mask=inside, other=0.0))
                k = load_rows(K_OUT, at, inside, P)
                if K >= 0:
                    base = load_base(START + stack, Wk, K, P, O, P, INITIAL)
                    u = load_part(ROWS, at, inside, K, O, P)
                    Wk = written(Wk, base, k, u, end, whole, INITIAL, PRECISION)
                if V >= 0:
                    base = load_base(START + stack, Wv, V, P, O, P, INITIAL)
                    u = load_part(ROWS, at, inside, V, O, P)
                    Wv = written(Wv, base, k, u, end, whole, INITIAL, PRECISION)
                if Q >= 0:
                    base = load_base(START + stack, Wq, Q, P, O, P, INITIAL)
                    u = load_part(ROWS, at, inside, Q, O, P)
                    Wq = written(Wq, base, k, u, end, whole, INITIAL, PRECISION)
                if G >= 0:
                    base = load_base(START + stack, Wg, G, P, O, GATES, INITIAL)
                    u = load_part(ROWS, at, inside, G, O, GATES)
                    Wg = written(Wg, base, k, u, end, whole, INITIAL, PRECISION)
                if M >= 0:
                    base = load_base(START + stack, Wm, M, P, O, P, INITIAL)
                    u = load_part(ROWS, at, inside, M, O, P)
                    Wm = written(Wm, base, k, u, end, whole, INITIAL, PRECISION)
            if OPEN:
                if tl.load(CLOSES + m * chunks + n) != 0:
                    Ak, Av, Aq, Ag, Am = Wk, Wv, Wq, Wg, Wm
        # What one thread has left in scratch memory another reads.
        tl.debug_barrier()
        for step in range(last - first):
            n = last - 1 - step
            if not SAME:
                ends = 1
                if OPEN:
                    ends = tl.load(CLOSES + m * chunks + n)
                if ends != 0:
                    gk, gv, gq, gg, gm = gk + hk, gv + hv, gq + hq, gg + hg, gm + hm
                    hk, hv, hq, hg, hm = hk * 0.0, hv * 0.0, hq * 0.0, hg * 0.0, hm * 0.0
            for tile_back in range(TILES):
                tile = TILES - 1 - tile_back
                place = scratch + ((n - first) * TILES + tile) * P * O
                Wk, Wv, Wq, Wg, Wm = load_stack(place, P, O, K, V, Q, G, M)
                Ak, Av, Aq, Ag, Am = Wk, Wv, Wq, Wg, Wm
                if not SAME:
                    place = anchors + (n - first) * P * O
                    Ak, Av, Aq, Ag, Am = load_stack(place, P, O, K, V, Q, G, M)
                column = tile * BLOCK + i
                t = n * C + column
                inside = (column < C) & (t < tokens)
                at = sequence + t.to(tl.int64) * heads
                there = inside
                if HAS_VALID:
                    there = tl.load(VALID + at, mask=inside, other=0) != 0
                k, v = load_rows(K_OUT, at, inside, P), load_rows(V_OUT, at, inside, P)
                used = tl.load(STEPS + at, mask=inside, other=0.0)
                D, before, end, whole = decays(tl.load(DECAYS + at, mask=inside, other=0.0))
                overlap = dot(k, tl.trans(k), PRECISION)
                solve = D
                if DGD:
                    square = ((m * chunks + n) * TILES + tile) * BLOCK * BLOCK
                    solve = tl.load(SOLVES + square + i[:, None] * BLOCK + i[None, :])

                g_k, g_v, g_D, g_T = k * 0.0, k * 0.0, D * 0.0, D * 0.0
                g_eta, g_before, g_end, g_whole = used * 0.0, used * 0.0, used * 0.0, 0.0
                if M >= 0:
                    q = load_rows(XQ, at, inside, P)
                    if UNIT:
                        q, length = unit_rows(q, eps)
                    u = load_part(ROWS, at, inside, M, O, P)
                    g_y = tl.where(there[:, None], load_rows(G_Y, at, inside, P), 0.0)
                    g_u = k * 0.0
                    base = load_base(START + stack, Wm, M, P, O, P, INITIAL)
                    g_base = gm * 0.0
                    if RUNNING:
                        scores = dot(q, tl.trans(k), PRECISION)
                        g_u = dot(tl.trans(D * scores), g_y, PRECISION)
                        by_rows = dot(g_y, tl.trans(u), PRECISION)
                        g_D += by_rows * scores
                        g_scores = by_rows * D
                        g_before += tl.sum(g_y * dot(q, Wm, PRECISION), 1)
                        g_q = dot(g_scores, k, PRECISION)
                        if INITIAL:
                            g_before -= tl.sum(g_y * dot(q, base, PRECISION), 1)
                            g_on_base = (1.0 - before)[:, None] * g_y
                            g_q += dot(g_on_base, tl.trans(base), PRECISION)
                            g_base += dot(tl.trans(q), g_on_base, PRECISION)
                        g_y = before[:, None] * g_y
                        g_q += dot(g_y, tl.trans(Wm), PRECISION)
                        g_k += dot(tl.trans(g_scores), q, PRECISION)
                    else:
                        g_q = dot(g_y, tl.trans(Am), PRECISION)
                    if UNIT:
                        g_q = unit_backward(g_q, q, length)
                    store_rows(G_XQ, at, inside, g_q, P)
                    gm, hm, g_base, g_k, g_v, g_eta, g_T, g_before, g_end, g_whole = write_backward(
                        gm, hm, g_base, g_u, Wm, Am, base, u, k, v, used, solve, before, end, whole,
                        g_k, g_v, g_eta, g_T, g_before, g_end, g_whole,
                        SAME, False, L2, TARGETS, DGD, INITIAL, PRECISION,
                    )  # fmt: skip
                    add_to_start(G_START + stack, g_base, M, P, O, P, INITIAL)
                    gm, hm = add_product(gm, hm, q, g_y, RUNNING or SAME, PRECISION)
                if K >= 0:
                    u = load_part(ROWS, at, inside, K, O, P)
                    base = load_base(START + stack, Wk, K, P, O, P, INITIAL)
                    g_base = gk * 0.0
                    gk, hk, g_base, g_k, g_v, g_eta, g_T, g_before, g_end, g_whole = write_backward(
                        gk, hk, g_base, k * 0.0, Wk, Ak, base, u, k, v, used, solve, before, end, whole,
                        g_k, g_v, g_eta, g_T, g_before, g_end, g_whole,
                        SAME, False, L2, TARGETS, DGD, INITIAL, PRECISION,
                    )  # fmt: skip
                    add_to_start(G_START + stack, g_base, K, P, O, P, INITIAL)
                if V >= 0:
                    u = load_part(ROWS, at, inside, V, O, P)
                    base = load_base(START + stack, Wv, V, P, O, P, INITIAL)
                    g_base = gv * 0.0
                    gv, hv, g_base, g_k, g_v, g_eta, g_T, g_before, g_end, g_whole = write_backward(
                        gv, hv, g_base, k * 0.0, Wv, Av, base, u, k, v, used, solve, before, end, whole,
                        g_k, g_v, g_eta, g_T, g_before, g_end, g_whole,
                        SAME, False, L2, TARGETS, DGD, INITIAL, PRECISION,
                    )  # fmt: skip
                    add_to_start(G_START + stack, g_base, V, P, O, P, INITIAL)
                if Q >= 0:
                    u = load_part(ROWS, at, inside, Q, O, P)
                    base = load_base(START + stack, Wq, Q, P, O, P, INITIAL)
                    g_base = gq * 0.0
                    gq, hq, g_base, g_k, g_v, g_eta, g_T, g_before, g_end, g_whole = write_backward(
                        gq, hq, g_base, k * 0.0, Wq, Aq, base, u, k, v, used, solve, before, end, whole,
                        g_k, g_v, g_eta, g_T, g_before, g_end, g_whole,
                        SAME, False, L2, TARGETS, DGD, INITIAL, PRECISION,
                    )  # fmt: skip
                    add_to_start(G_START + stack, g_base, Q, P, O, P, INITIAL)
                    xq = load_rows(XQ, at, inside, P)
                    raw = dot(xq, Aq, PRECISION)
                    q, length = unit_rows(raw, eps)
                    g_q = unit_backward(load_rows(G_Q_OUT, at, inside, P), q, length)
                    gq, hq = add_product(gq, hq, xq, g_q, SAME, PRECISION)
                    store_rows(G_XQ, at, inside, dot(g_q, tl.trans(Aq), PRECISION), P)
                if G >= 0:
                    u = load_part(ROWS, at, inside, G, O, GATES)
                    base = load_base(START + stack, Wg, G, P, O, GATES, INITIAL)
                    g_base = gg * 0.0
                    gg, hg, g_base, g_k, g_v, g_eta, g_T, g_before, g_end, g_whole = write_backward(
                        gg, hg, g_base, u * 0.0, Wg, Ag, base, u, k, v, used, solve, before, end, whole,
                        g_k, g_v, g_eta, g_T, g_before, g_end, g_whole,
                        SAME, True, L2, TARGETS, DGD, INITIAL, PRECISION,
                    )  # fmt: skip
                    add_to_start(G_START + stack, g_base, G, P, O, GATES, INITIAL)

                if DGD:
                    g_T = tl.where(i[:, None] > i[None, :], g_T, 0.0)
                    g_eta += tl.sum(g_T * D * overlap, 1)
                    g_T = used[:, None] * g_T
                    g_D += g_T * overlap
                    g_overlap = g_T * D
                    g_k += dot(g_overlap + tl.trans(g_overlap), k, PRECISION)
                g_la = decays_backward(g_D, g_before, g_end, g_whole, D, before, end, whole)
                g_la, g_eta = tl.where(there, g_la, 0.0), tl.where(there, g_eta, 0.0)

                if G >= 0:
                    xg = load_rows(XG, at, inside, P)
                if E >= 0:
                    eta = tl.load(ETA_OUT + at, mask=inside, other=0.0)
                else:
                    eta = tl.load(ETA + at, mask=inside, other=0.0)
                if A >= 0:
                    z = one_column(dot(xg, Ag, PRECISION), A) + bias_a
                    la = tl.where(inside, softplus(z), 0.0) / -horizon
                else:
                    alpha = tl.maximum(tl.load(ALPHA + at, mask=inside, other=1.0), 2e-38)
                    la = tl.log(alpha)
                if CAP:
                    g_eta, on_la, g_square = capped_backward(g_eta, eta, la, tl.sum(k * k, 1))
                    g_la += on_la
                    g_k += 2.0 * g_square[:, None] * k
                if E >= 0:
                    g_eta += tl.load(G_ETA_OUT + at, mask=inside, other=0.0)
                    g_eta = tl.where(inside, g_eta * eta * (1.0 - eta / max_step), 0.0)
                    g_bias_e += tl.sum(g_eta, 0)
                else:
                    tl.store(G_ETA + at, g_eta, mask=inside)
                if A >= 0:
                    g_la += tl.load(G_ALPHA_OUT + at, mask=inside, other=0.0) * tl.exp(la)
                    g_la = tl.where(inside, g_la * tl.sigmoid(z) / -horizon, 0.0)
                    g_bias_a += tl.sum(g_la, 0)
                else:
                    tl.store(G_ALPHA + at, g_la / alpha, mask=inside)
                if G >= 0:
                    g_logits = as_column(g_eta, E) + as_column(g_la, A)
                    gg, hg = add_product(gg, hg, xg, g_logits, SAME, PRECISION)
                    store_rows(G_XG, at, inside, dot(g_logits, tl.trans(Ag), PRECISION), P)

                if V >= 0:
                    g_v += load_rows(G_V_OUT, at, inside, P)
                    xv = load_rows(XV, at, inside, P)
                    gv, hv = add_product(gv, hv, xv, g_v, SAME, PRECISION)
                    g_v = dot(g_v, tl.trans(Av), PRECISION)
                store_rows(G_XV, at, inside, g_v, P)
                if K >= 0:
                    length = tl.load(LENGTHS + at, mask=inside, other=0.0)
                    g_k = unit_backward(g_k + load_rows(G_K_OUT, at, inside, P), k, length)
                    xk = load_rows(XK, at, inside, P)
                    gk, hk = add_product(gk, hk, xk, g_k, SAME, PRECISION)
                    g_k = dot(g_k, tl.trans(Ak), PRECISION)
                store_rows(G_XK, at, inside, g_k, P)
            if HAS_RESETS:
                if tl.load(RESETS + m * chunks + n) != 0:
                    # Tiles may have added to it, an element by another thread than here.
                    tl.debug_barrier()
                    bk, bv, bq, bg, bm = load_stack(G_START + stack, P, O, K, V, Q, G, M)
                    store_stack(
                        G_START + stack, bk + gk + hk, bv + gv + hv, bq + gq + hq, bg + gg + hg, bm + gm + hm,
                        P, O, K, V, Q, G, M,
                    )  # fmt: skip
                    gk, gv, gq, gg, gm = gk * 0.0, gv * 0.0, gq * 0.0, gg * 0.0, gm * 0.0
                    hk, hv, hq, hg, hm = hk * 0.0, hv * 0.0, hq * 0.0, hg * 0.0, hm * 0.0
                    tl.debug_barrier()
        # Scratch memory is written again.
        tl.debug_barrier()
    if OPEN:
        store_stack(G_ANCHOR + stack, hk, hv, hq, hg, hm, P, O, K, V, Q, G, M)
    else:
        gk, gv, gq, gg, gm = gk + hk, gv + hv, gq + hq, gg + hg, gm + hm
    store_stack(G_WEIGHTS + stack, gk, gv, gq, gg, gm, P, O, K, V, Q, G, M)
    if E >= 0:
        tl.store(G_BIAS_E + m, g_bias_e)
    if A >= 0:
        tl.store(G_BIAS_A + m, g_bias_a)
