"""One token for every sequence: a one-layer memory written and read once, at the speed of its State's bytes.

One program a sequence and head. It reads the anchor twice (for z, and beside the steps that z decides), the
second time from the cache, everything else once, and writes the new State beside the old one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nestor.ops.neural_memory.kernels.primitives import head, load_norm, pull_back, standardise
from nestor.ops.operators import operator


@triton.jit
def linear_decode_kernel(
    Q, K, V, THETA, ETA, ALPHA, PHASE, W, S, ANCHOR, M, GAMMA, BETA, Y, NEW_W, NEW_S, NEW_ANCHOR,
    heads, chunk, eps, scale, threshold,
    P: tl.constexpr, PS: tl.constexpr, NORM: tl.constexpr, LOSS: tl.constexpr, READ: tl.constexpr,
    MOMENTUM: tl.constexpr, FORGET: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0)
    b, h = m // heads, m % heads
    p, ps = tl.arange(0, P), tl.arange(0, PS)
    at = m.to(tl.int64) * P * P
    k = tl.load(K + m * P + p).to(tl.float32)
    q = tl.load(Q + m * P + p).to(tl.float32)
    v = tl.load(V + m * P + p).to(tl.float32)
    theta = tl.load(THETA + m)
    gamma, beta = load_norm(GAMMA, BETA, h, NORM, P)
    closes = tl.load(PHASE + b) + 1 == chunk

    z_k = tl.zeros((P,), tl.float32)
    for low in range(0, P, PS):
        cells = (low + ps)[:, None] * P + p[None, :]
        k_part = tl.load(K + m * P + low + ps).to(tl.float32)
        z_k += tl.sum(k_part[:, None] * tl.load(ANCHOR + at + cells), 0)
    step, _zh, _r, _along = pull_back(
        k[None, :], v[None, :], z_k[None, :], gamma, beta, eps, scale, threshold, NORM, LOSS, P
    )
    u = tl.sum(step, 0)

    z = tl.zeros((P,), tl.float32)
    for low in range(0, P, PS):
        cells = (low + ps)[:, None] * P + p[None, :]
        k_part = tl.load(K + m * P + low + ps).to(tl.float32)
        q_part = tl.load(Q + m * P + low + ps).to(tl.float32)
        anchor, before = tl.load(ANCHOR + at + cells), tl.load(W + at + cells)
        w = before
        if FORGET:
            alpha = tl.load(ALPHA + m)
            w = w * (1.0 - alpha)
            if TARGET:
                w += alpha * tl.load(M + h * P * P + cells)
        move = theta * k_part[:, None] * u[None, :]
        if MOMENTUM:
            move += tl.load(ETA + m) * tl.load(S + at + cells)
            tl.store(NEW_S + at + cells, move)
        w += move
        tl.store(NEW_W + at + cells, w)
        tl.store(NEW_ANCHOR + at + cells, tl.where(closes, w, anchor))
        if READ == 1:
            w = before
        if READ == 2:
            w = anchor
        z += tl.sum(q_part[:, None] * w, 0)
    zh, _ = standardise(z[None, :], eps, NORM, P)
    y = tl.sum(head(q[None, :], zh, gamma, beta, NORM), 0)
    tl.store(Y + m * P + p, y.to(Y.dtype.element_ty))


@operator("linear_memory_decode")
def linear_memory_decode(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, eta: Tensor | None, alpha: Tensor | None, phase: Tensor,
    w: Tensor, s: Tensor | None, anchor: Tensor, targets: Tensor | None,
    gamma: Tensor | None, beta: Tensor | None,
    chunk: int, norm: int, loss: int, read: int, eps: float, scale: float, threshold: float,
) -> list[Tensor]:  # fmt: skip
    """One step of every sequence: q, k, v ``[B, 1, H, P]``, gates ``[B, 1, H]``, w, s, anchor
    ``[B, H, P, P]`` float32, targets ``[H, P, P]``. Returns y and the new w, anchor, and s where there is
    one."""
    batch, _, heads, width = q.shape
    y = q.new_empty(q.shape)
    new_w, new_anchor = torch.empty_like(w), torch.empty_like(anchor)
    new_s = None if s is None else torch.empty_like(s)
    linear_decode_kernel[(batch * heads,)](
        q, k, v, theta, eta, alpha, phase, w, s, anchor, targets, gamma, beta, y, new_w, new_s, new_anchor,
        heads, chunk, eps, scale, threshold, P=width, PS=min(width, 64 if width <= 64 else 32),
        NORM=norm, LOSS=loss, READ=read, MOMENTUM=eta is not None, FORGET=alpha is not None,
        TARGET=targets is not None, num_warps=4,
    )  # fmt: skip
    return [y, new_w, new_anchor] if new_s is None else [y, new_w, new_anchor, new_s]


@linear_memory_decode.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, eta: Tensor | None, alpha: Tensor | None, phase: Tensor,
    w: Tensor, s: Tensor | None, anchor: Tensor, targets: Tensor | None,
    gamma: Tensor | None, beta: Tensor | None,
    chunk: int, norm: int, loss: int, read: int, eps: float, scale: float, threshold: float,
) -> list[Tensor]:  # fmt: skip
    return [q.new_empty(q.shape), *(torch.empty_like(x) for x in (w, anchor, s) if x is not None)]
