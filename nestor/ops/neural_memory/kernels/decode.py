"""One token for every sequence: a two-layer memory written and read once, at the speed of its State's bytes.

One program a sequence and head. It reads the anchor twice (for z_2, and for the steps that z_2 decides), the
second time from the cache, everything else once, and writes the new State beside the old one. In CUDA, where
that covers the sizes (tiled/decode.cu), a cluster a sequence and head, which reads everything once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nestor.ops.neural_memory.kernels import tiled
from nestor.ops.neural_memory.kernels.primitives import activate, head, load_norm, pull_back, standardise
from nestor.ops.operators import operator

READS = ("inclusive", "exclusive", "chunk_start")


@triton.jit
def _hidden(x, w, ACTIVATION: tl.constexpr):
    """phi(z), phi'(z) ``[HS]`` for x ``[P]`` and w ``[P, HS]``."""
    value, slope, _ = activate(tl.sum(x[:, None] * w, 0), ACTIVATION)
    return value, slope


@triton.jit
def decode_kernel(
    Q, K, V, THETA, ETA, ALPHA, PHASE, W1, W2, S1, S2, A1, A2, M1, M2, GAMMA, BETA,
    Y, NEW_W1, NEW_W2, NEW_S1, NEW_S2, NEW_A1, NEW_A2, heads, chunk, eps, scale, threshold,
    P: tl.constexpr, HIDDEN: tl.constexpr, HS: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr,
    LOSS: tl.constexpr, READ: tl.constexpr, MOMENTUM: tl.constexpr, FORGET: tl.constexpr,
    TARGET: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0)
    b, h = m // heads, m % heads
    p, hs = tl.arange(0, P), tl.arange(0, HS)
    at = m.to(tl.int64) * P * HIDDEN
    k = tl.load(K + m * P + p).to(tl.float32)
    q = tl.load(Q + m * P + p).to(tl.float32)
    v = tl.load(V + m * P + p).to(tl.float32)
    theta = tl.load(THETA + m)
    gamma, beta = load_norm(GAMMA, BETA, h, NORM, P)
    closes = tl.load(PHASE + b) + 1 == chunk

    z2 = tl.zeros((P,), tl.float32)
    for low in range(0, HIDDEN, HS):
        first = at + p[:, None] * HIDDEN + (low + hs)[None, :]
        second = at + (low + hs)[:, None] * P + p[None, :]
        x2, slope = _hidden(k, tl.load(A1 + first), ACTIVATION)
        z2 += tl.sum(x2[:, None] * tl.load(A2 + second), 0)
    u, _zh, _r, _along = pull_back(
        k[None, :], v[None, :], z2[None, :], gamma, beta, eps, scale, threshold, NORM, LOSS, P
    )
    u2 = tl.sum(u, 0)

    z = tl.zeros((P,), tl.float32)
    for low in range(0, HIDDEN, HS):
        first = p[:, None] * HIDDEN + (low + hs)[None, :]
        second = (low + hs)[:, None] * P + p[None, :]
        a1, a2 = tl.load(A1 + at + first), tl.load(A2 + at + second)
        x2, slope = _hidden(k, a1, ACTIVATION)
        u1 = tl.sum(a2 * u2[None, :], 1) * slope
        before1, before2 = tl.load(W1 + at + first), tl.load(W2 + at + second)
        w1, w2 = before1, before2
        if FORGET:
            alpha = tl.load(ALPHA + m)
            w1, w2 = w1 * (1.0 - alpha), w2 * (1.0 - alpha)
            if TARGET:
                place = h * P * HIDDEN
                w1 += alpha * tl.load(M1 + place + first)
                w2 += alpha * tl.load(M2 + place + second)
        move1 = theta * k[:, None] * u1[None, :]
        move2 = theta * x2[:, None] * u2[None, :]
        if MOMENTUM:
            eta = tl.load(ETA + m)
            move1 += eta * tl.load(S1 + at + first)
            move2 += eta * tl.load(S2 + at + second)
            tl.store(NEW_S1 + at + first, move1)
            tl.store(NEW_S2 + at + second, move2)
        w1 += move1
        w2 += move2
        tl.store(NEW_W1 + at + first, w1)
        tl.store(NEW_W2 + at + second, w2)
        tl.store(NEW_A1 + at + first, tl.where(closes, w1, a1))
        tl.store(NEW_A2 + at + second, tl.where(closes, w2, a2))
        if READ == 1:
            w1, w2 = before1, before2
        if READ == 2:
            w1, w2 = a1, a2
        x, _x_slope = _hidden(q, w1, ACTIVATION)
        z += tl.sum(x[:, None] * w2, 0)
    zh, _inverse = standardise(z[None, :], eps, NORM, P)
    y = tl.sum(head(q[None, :], zh, gamma, beta, NORM), 0)
    tl.store(Y + m * P + p, y.to(Y.dtype.element_ty))


@operator("memory_decode")
def memory_decode(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, eta: Tensor | None, alpha: Tensor | None, phase: Tensor,
    w1: Tensor, w2: Tensor, s1: Tensor | None, s2: Tensor | None, a1: Tensor, a2: Tensor,
    m1: Tensor | None, m2: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    chunk: int, activation: int, norm: int, loss: int, read: int, eps: float, scale: float, threshold: float,
) -> list[Tensor]:  # fmt: skip
    """One step of every sequence: q, k, v ``[B, 1, H, P]``, gates ``[B, 1, H]``, weights ``[B, H, in, out]``
    float32, targets m ``[H, in, out]``. Returns y and the new w1, w2, a1, a2, and s1, s2 where there are."""
    batch, _, heads, width = q.shape
    hidden = w1.shape[-1]
    y = q.new_empty(q.shape)
    state = [torch.empty_like(x) for x in (w1, w2, a1, a2)]
    moved = [torch.empty_like(x) for x in (s1, s2) if x is not None]
    new_s1, new_s2 = moved or (None, None)
    tensors = (
        q, k, v, theta, eta, alpha, phase, w1, w2, s1, s2, a1, a2, m1, m2, gamma, beta,
        y, state[0], state[1], new_s1, new_s2, state[2], state[3],
    )  # fmt: skip
    sizes, numbers = (heads, chunk), (eps, scale, threshold)
    choices = {
        "ACTIVATION": activation, "NORM": norm, "LOSS": loss, "READ": read, "MOMENTUM": eta is not None,
        "FORGET": alpha is not None, "TARGET": m1 is not None,
    }  # fmt: skip
    aligned = all(x is None or tiled.begins_aligned(x) for x in tensors[7:])
    if aligned and tiled.covers_decode(q.device, width, hidden):
        split = hidden // tiled.TILE
        choices |= {"SPLIT": split, "EXACT": q.dtype == torch.float32}
        programs = batch * heads * split
        tiled.prepare("decode", programs, choices, tensors, (), sizes, numbers, q.device)((programs,))
    else:
        decode_kernel[(batch * heads,)](
            *tensors, *sizes, *numbers, P=width, HIDDEN=hidden,
            HS=min(hidden & -hidden, 64 if width <= 64 else 32), **choices, num_warps=4,
        )  # fmt: skip
    return [y, *state, *moved]


@memory_decode.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, eta: Tensor | None, alpha: Tensor | None, phase: Tensor,
    w1: Tensor, w2: Tensor, s1: Tensor | None, s2: Tensor | None, a1: Tensor, a2: Tensor,
    m1: Tensor | None, m2: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    chunk: int, activation: int, norm: int, loss: int, read: int, eps: float, scale: float, threshold: float,
) -> list[Tensor]:  # fmt: skip
    return [q.new_empty(q.shape), *(torch.empty_like(x) for x in (w1, w2, a1, a2, s1, s2) if x is not None)]
