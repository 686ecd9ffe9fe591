"""One walk over the chunks of linear memories that share a period, forward.

A program has one sequence and head. Its memories are columns of one stack ``[P, O]`` and stay in registers
from the first chunk to the last: those at the columns K, V, Q and G make keys, values, queries and the gates
(eta and alpha, columns E and A of one matrix) of the tokens of a chunk, from its anchor; the one at M is
read. A column is -1, and the memory the number 0, where there is none. A chunk of C tokens is walked in TILES
of at most BLOCK tokens, between which the anchor stays.

For the backward pass a walk keeps the stack at the first of every SEGMENT chunks, and of each token what
takes long to find again: its rows u, the inverse of its triangle, the step, the decay, the length of its key.
"""

import triton
import triton.language as tl

from nestor.ops.self_modifying.kernels.primitives import (
    BLOCK,
    GATES,
    TINY,
    capped,
    decays,
    dot,
    load_rows,
    one_column,
    part_of_rows,
    part_of_stack,
    softplus,
    store_rows,
    triangle_inverse,
    unit_rows,
    write,
)


@triton.jit
def load_stack(
    X, P: tl.constexpr, O: tl.constexpr, K: tl.constexpr, V: tl.constexpr, Q: tl.constexpr, G: tl.constexpr,
    M: tl.constexpr,
):  # fmt: skip
    """The memories of a stack, in the order of their columns here."""
    k, v, q, g, m = 0.0, 0.0, 0.0, 0.0, 0.0
    if K >= 0:
        k = tl.load(part_of_stack(X, K, P, O, P))
    if V >= 0:
        v = tl.load(part_of_stack(X, V, P, O, P))
    if Q >= 0:
        q = tl.load(part_of_stack(X, Q, P, O, P))
    if G >= 0:
        g = tl.load(part_of_stack(X, G, P, O, GATES))
    if M >= 0:
        m = tl.load(part_of_stack(X, M, P, O, P))
    return k, v, q, g, m


@triton.jit
def store_stack(
    X, k, v, q, g, m, P: tl.constexpr, O: tl.constexpr, K: tl.constexpr, V: tl.constexpr, Q: tl.constexpr,
    G: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    if K >= 0:
        tl.store(part_of_stack(X, K, P, O, P), k)
    if V >= 0:
        tl.store(part_of_stack(X, V, P, O, P), v)
    if Q >= 0:
        tl.store(part_of_stack(X, Q, P, O, P), q)
    if G >= 0:
        tl.store(part_of_stack(X, G, P, O, GATES), g)
    if M >= 0:
        tl.store(part_of_stack(X, M, P, O, P), m)


@triton.jit
def load_base(X, W, column, P: tl.constexpr, O: tl.constexpr, N: tl.constexpr, INITIAL: tl.constexpr):
    """What a memory is forgotten towards: its columns of the stack of a start; W, which nobody reads, if that
    is zero."""
    base = W
    if INITIAL:
        base = tl.load(part_of_stack(X, column, P, O, N))
    return base


@triton.jit
def write_and_keep(
    W, anchor, base, k, v, eta, solve, before, end, whole, rows, inside,
    SAME: tl.constexpr, SINGLE: tl.constexpr, L2: tl.constexpr, TARGETS: tl.constexpr, DGD: tl.constexpr,
    INITIAL: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`write`; the rows u are kept at the places `rows`."""
    W, u, e = write(
        W, anchor, base, k, v, eta, solve, before, end, whole,
        SAME, SINGLE, L2, TARGETS, DGD, INITIAL, PRECISION,
    )  # fmt: skip
    if KEEP:
        tl.store(rows, u, mask=inside[:, None])
    return W, u, e


@triton.jit
def walk_kernel(
    XQ, XK, XV, XG, ETA, ALPHA, VALID, RESETS, CLOSES, START, WEIGHTS, ANCHOR, BIAS_E, BIAS_A,
    Q_OUT, K_OUT, V_OUT, ETA_OUT, ALPHA_OUT, Y, STRENGTH, AFTER, ANCHOR_AFTER,
    KEPT, KEPT_ANCHOR, ROWS, SOLVES, STEPS, DECAYS, LENGTHS,
    tokens, heads, chunks, max_step, horizon, eps,
    P: tl.constexpr, O: tl.constexpr, C: tl.constexpr, TILES: tl.constexpr, SEGMENT: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, Q: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    E: tl.constexpr, A: tl.constexpr,
    L2: tl.constexpr, TARGETS: tl.constexpr, DGD: tl.constexpr, CAP: tl.constexpr, RUNNING: tl.constexpr,
    UNIT: tl.constexpr, INITIAL: tl.constexpr,
    OPEN: tl.constexpr, KEEP: tl.constexpr, HAS_VALID: tl.constexpr, HAS_RESETS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """OPEN: chunks may go on from an earlier call or into a later one, as ANCHOR and CLOSES say; else all
    begin and end here. UNIT: queries of M are brought to unit length."""
    SAME: tl.constexpr = TILES == 1 and not OPEN
    m = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    stack = m * P * O
    sequence = (m // heads) * tokens * heads + m % heads
    segments = tl.cdiv(chunks, SEGMENT)
    Wk, Wv, Wq, Wg, Wm = load_stack(WEIGHTS + stack, P, O, K, V, Q, G, M)
    Ak, Av, Aq, Ag, Am = Wk, Wv, Wq, Wg, Wm
    if OPEN:
        Ak, Av, Aq, Ag, Am = load_stack(ANCHOR + stack, P, O, K, V, Q, G, M)
    bias_e, bias_a = 0.0, 0.0
    if E >= 0:
        bias_e = tl.load(BIAS_E + m)
    if A >= 0:
        bias_a = tl.load(BIAS_A + m)
    for n in range(chunks):
        if HAS_RESETS:
            if tl.load(RESETS + m * chunks + n) != 0:
                Wk, Wv, Wq, Wg, Wm = load_stack(START + stack, P, O, K, V, Q, G, M)
                Ak, Av, Aq, Ag, Am = Wk, Wv, Wq, Wg, Wm
        if not OPEN:
            Ak, Av, Aq, Ag, Am = Wk, Wv, Wq, Wg, Wm
        if KEEP:
            if n % SEGMENT == 0:
                kept = (m * segments + n // SEGMENT) * P * O
                store_stack(KEPT + kept, Wk, Wv, Wq, Wg, Wm, P, O, K, V, Q, G, M)
                if OPEN:
                    store_stack(KEPT_ANCHOR + kept, Ak, Av, Aq, Ag, Am, P, O, K, V, Q, G, M)
        for tile in range(TILES):
            column = tile * BLOCK + i
            t = n * C + column
            inside = (column < C) & (t < tokens)
            at = sequence + t.to(tl.int64) * heads
            there = inside
            if HAS_VALID:
                there = tl.load(VALID + at, mask=inside, other=0) != 0

            k = load_rows(XK, at, inside, P)
            if K >= 0:
                k, length = unit_rows(dot(k, Ak, PRECISION), eps)
                store_rows(K_OUT, at, inside, k, P)
                if KEEP:
                    tl.store(LENGTHS + at, length, mask=inside)
            v = load_rows(XV, at, inside, P)
            if V >= 0:
                v = dot(v, Av, PRECISION)
                store_rows(V_OUT, at, inside, v, P)
            if G >= 0:
                logits = dot(load_rows(XG, at, inside, P), Ag, PRECISION)
            if E >= 0:
                eta = max_step * tl.sigmoid(one_column(logits, E) + bias_e)
                tl.store(ETA_OUT + at, eta, mask=inside)
            else:
                eta = tl.load(ETA + at, mask=inside, other=0.0)
            if A >= 0:
                la = softplus(one_column(logits, A) + bias_a) / -horizon
                tl.store(ALPHA_OUT + at, tl.exp(la), mask=inside)
            else:
                la = tl.log(tl.maximum(tl.load(ALPHA + at, mask=inside, other=1.0), 2e-38))

            eta = tl.where(there, capped(eta, la, tl.sum(k * k, 1), CAP), 0.0)
            la = tl.where(there, la, 0.0)
            D, before, end, whole = decays(la)
            solve = D
            if DGD:
                solve = triangle_inverse(eta[:, None] * D * dot(k, tl.trans(k), "tf32x3"))
            if KEEP:
                tl.store(STEPS + at, eta, mask=inside)
                tl.store(DECAYS + at, la, mask=inside)
                if DGD:
                    square = ((m * chunks + n) * TILES + tile) * BLOCK * BLOCK
                    tl.store(SOLVES + square + i[:, None] * BLOCK + i[None, :], solve)

            if M >= 0:
                q = load_rows(XQ, at, inside, P)
                if UNIT:
                    q, length = unit_rows(q, eps)
                base = load_base(START + stack, Wm, M, P, O, P, INITIAL)
                if RUNNING:
                    y = before[:, None] * dot(q, Wm, PRECISION)
                    if INITIAL:
                        y += (1.0 - before)[:, None] * dot(q, base, PRECISION)
                else:
                    y = dot(q, Am, PRECISION)
                Wm, u, error = write_and_keep(
                    Wm, Am, base, k, v, eta, solve, before, end, whole, part_of_rows(ROWS, at, M, O, P),
                    inside, SAME, False, L2, TARGETS, DGD, INITIAL, KEEP, PRECISION,
                )  # fmt: skip
                if RUNNING:
                    y += dot(D * dot(q, tl.trans(k), PRECISION), u, PRECISION)
                store_rows(Y, at, inside, tl.where(there[:, None], y, 0.0), P)
                size = tl.sqrt(tl.sum(k * k, 1) * tl.sum(error * error, 1) + TINY)
                tl.store(STRENGTH + at, tl.where(there, eta * size, 0.0), mask=inside)
            if Q >= 0:
                q, length = unit_rows(dot(load_rows(XQ, at, inside, P), Aq, PRECISION), eps)
                store_rows(Q_OUT, at, inside, q, P)
                base = load_base(START + stack, Wq, Q, P, O, P, INITIAL)
                Wq, u, error = write_and_keep(
                    Wq, Aq, base, k, v, eta, solve, before, end, whole, part_of_rows(ROWS, at, Q, O, P),
                    inside, SAME, False, L2, TARGETS, DGD, INITIAL, KEEP, PRECISION,
                )  # fmt: skip
            if K >= 0:
                base = load_base(START + stack, Wk, K, P, O, P, INITIAL)
                Wk, u, error = write_and_keep(
                    Wk, Ak, base, k, v, eta, solve, before, end, whole, part_of_rows(ROWS, at, K, O, P),
                    inside, SAME, False, L2, TARGETS, DGD, INITIAL, KEEP, PRECISION,
                )  # fmt: skip
            if V >= 0:
                base = load_base(START + stack, Wv, V, P, O, P, INITIAL)
                Wv, u, error = write_and_keep(
                    Wv, Av, base, k, v, eta, solve, before, end, whole, part_of_rows(ROWS, at, V, O, P),
                    inside, SAME, False, L2, TARGETS, DGD, INITIAL, KEEP, PRECISION,
                )  # fmt: skip
            if G >= 0:
                base = load_base(START + stack, Wg, G, P, O, GATES, INITIAL)
                Wg, u, error = write_and_keep(
                    Wg, Ag, base, k, v, eta, solve, before, end, whole, part_of_rows(ROWS, at, G, O, GATES),
                    inside, SAME, True, L2, TARGETS, DGD, INITIAL, KEEP, PRECISION,
                )  # fmt: skip
        if OPEN:
            if tl.load(CLOSES + m * chunks + n) != 0:
                Ak, Av, Aq, Ag, Am = Wk, Wv, Wq, Wg, Wm
    store_stack(AFTER + stack, Wk, Wv, Wq, Wg, Wm, P, O, K, V, Q, G, M)
    if OPEN:
        store_stack(ANCHOR_AFTER + stack, Ak, Av, Aq, Ag, Am, P, O, K, V, Q, G, M)
