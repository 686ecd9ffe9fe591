"""The neural memory for every choice of `MemorySpec`, chunk by chunk in plain PyTorch.

One walk for the whole family (spec/neural-memory.md sections 4, 5 and 7). In a chunk all inner gradients are
rank-one rows at the anchor (`networks.py`), the gates are the matrices of `mixing.py`, and accumulator and
momentum are linear in both. What is not linear happens at the chunk's end: orthogonalised steps and norms
(`muon.py`), and the maps from accumulator to weights (`retention.py`). The inner gradients are formulas, so
nothing here needs autograd; the outer backward is autograd through them.

Sequences and heads are one batch axis m; N chunks of C tokens; J tokens that a chunk's steps come from.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nestor.ops.neural_memory.chunked import Norm
from nestor.ops.neural_memory.functions import Head
from nestor.ops.neural_memory.losses import InnerLoss
from nestor.ops.neural_memory.mixing import Mix, mix, per_matrix, suffix_products, sum_of_steps, window_band
from nestor.ops.neural_memory.muon import newton_schulz, restore_norms
from nestor.ops.neural_memory.networks import Gradient, LossError, Network
from nestor.ops.neural_memory.retention import Retention
from nestor.ops.neural_memory.spec import MemorySpec, nothing_pooled

Layers = list[Tensor]  # one tensor per matrix of the memory network


class Tokens(NamedTuple):
    """The tokens of all chunks ``[m, N, C, ...]``, of one chunk without the N; None where there is none.

    q, k, v ``[p]``; theta, alpha scalars or ``[L]`` or ``[p]``, as the spec says; eta, step, valid (bool)
    scalars; omega, the window's gates, a scalar or ``[c]``; threshold, of the loss, ``[1]`` or ``[p]``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    theta: Tensor
    eta: Tensor | None
    alpha: Tensor | None
    valid: Tensor | None
    omega: Tensor | None
    threshold: Tensor | None
    step: Tensor | None

    def chunk(self, n: int) -> "Tokens":
        """Chunk n, ``[m, C, ...]``."""
        return Tokens(*(None if t is None else t[:, n] for t in self))  # type: ignore[arg-type]


class Carried(NamedTuple):
    """What goes from chunk to chunk: `MemoryState` with sequences and heads merged, without the phase."""

    weights: Layers
    momentum: Layers
    anchor: Layers
    pending: Layers
    pooled: Tensor | None
    halo: tuple[Tensor, ...]


@dataclass(frozen=True)
class Walk:
    """What all chunks share.

    targets: per matrix what the accumulator decays to ``[m, in, out]``, or None for zero. initial: the
    learned weights, whose norms `renormalize` restores. resets, closes: for each chunk None or a bool, or
    bool ``[m]``.
    """

    spec: MemorySpec
    network: Network
    head: Head
    loss: InnerLoss
    retention: Retention
    norm: Norm
    targets: Layers | None
    initial: Layers
    resets: list[Tensor | None]
    closes: list[bool | Tensor]

    def away(self, layer: int, accumulator: Tensor) -> Tensor:
        """The part that the forget gate acts on."""
        return accumulator if self.targets is None else accumulator - self.targets[layer]

    def back(self, layer: int, deviation: Tensor) -> Tensor:
        """Reverse of `away`."""
        return deviation if self.targets is None else deviation + self.targets[layer]


def walk(plan: Walk, tokens: Tokens, start: Carried, state: Carried) -> tuple[Tensor, Tensor, Carried]:
    """Walk the chunks. start: what a reset restores. Returns outputs ``[m, N, C, p]``, the norms of the inner
    gradients ``[m, N, C]``, without a gradient, and what is carried on."""
    chunks = len(plan.resets)
    outputs: list[Tensor] = []
    norms: list[Tensor] = []

    def run(state: Carried, some: range) -> tuple[list[Tensor], list[Tensor], Carried]:
        ys, surprises = [], []
        for n in some:
            y, surprise, state = _chunk(plan, n, tokens.chunk(n), start, state)
            ys.append(y)
            surprises.append(surprise)
        return ys, surprises, state

    recompute = plan.spec.recompute and torch.is_grad_enabled()
    # Groups of sqrt(N) keep as many start states as chunks in the group that is recomputed.
    group = max(1, math.isqrt(chunks)) if recompute else chunks
    for first in range(0, chunks, group):
        some = range(first, min(first + group, chunks))
        if recompute:
            ys, surprises, state = checkpoint(run, state, some, use_reentrant=False, preserve_rng_state=False)
        else:
            ys, surprises, state = run(state, some)
        outputs += ys
        norms += surprises
    return torch.stack(outputs, 1), torch.stack(norms, 1), state


def _chunk(
    plan: Walk, n: int, tokens: Tokens, start: Carried, state: Carried
) -> tuple[Tensor, Tensor, Carried]:
    spec = plan.spec
    fresh = plan.resets[n]
    if fresh is not None:
        state = _choose(fresh, start, state)
    anchor = [plan.retention.weights(a) for a in state.anchor]
    k, v, threshold, band, halo = _with_halo(plan, tokens, state)
    gradient = _inner_gradient(plan, tokens, k, v, threshold, anchor)
    steps = [-delta for delta in gradient.deltas]
    theta = per_matrix(tokens.theta, spec.step_sizes, plan.network.matrices, plan.network.output)
    alpha = per_matrix(tokens.alpha, spec.forget_gates, plan.network.matrices, plan.network.output)

    if band is None and spec.step_sizes == "channel":
        # Each step is its own token's, so that the channels can be folded into it and share coefficients.
        output = plan.network.output
        steps[output] = steps[output] * tokens.theta
        theta[output] = torch.ones_like(tokens.theta[..., 0]).unsqueeze(1)

    mixes: list[Mix] = []
    trace: list[Tensor] = []
    if spec.granularity == "chunk":
        sums = [sum_of_steps(t, tokens.valid, band) for t in theta if t is not None]
        pending = [
            p + _sum(w, x, u) for p, w, x, u in zip(state.pending, sums, gradient.inputs, steps, strict=True)
        ]
        after = state._replace(pending=pending)
    else:
        shared = spec.step_sizes == "head" and spec.forget_gates == "head"
        end_only = not spec.muon_per_token and (spec.read_mode == "chunk_start" or spec.chunk_size == 1)
        for t, a in zip(theta, alpha, strict=True):
            assert t is not None
            own = mixes[0] if mixes and shared else None
            mixes.append(own or mix(t, tokens.eta, a, tokens.valid, band, spec.muon_per_token, end_only))
        if spec.muon_per_token:
            trace, after = _orthogonal_steps(plan, tokens, mixes, gradient.inputs, steps, state)
        else:
            after = _linear_steps(plan, mixes, gradient.inputs, steps, state)
    after = after._replace(pooled=_pool(tokens, state.pooled), halo=halo)
    if tokens.valid is not None:
        # The valid tokens of a chunk come first. A sequence without any keeps every bit.
        after = _choose(tokens.valid[:, 0], after, state)
    after = _close(plan, plan.closes[n], after)

    if spec.chunk_size == 1 and spec.read_mode == "inclusive":
        read = _plain([plan.retention.weights(a) for a in after.anchor])
    elif spec.chunk_size == 1 and spec.read_mode == "exclusive":
        read = _plain([plan.retention.weights(w) for w in state.weights])
    elif spec.read_mode == "chunk_start":
        read = _plain(anchor)
    elif spec.muon_per_token:
        read = _along(trace if spec.read_mode == "inclusive" else _delayed(trace, state.weights))
    else:
        if spec.read_mode == "exclusive":
            mixes = [m.exclusive() for m in mixes]
        read = _dual(plan, mixes, gradient.inputs, steps, state)
    y, _ = plan.head.value(tokens.q, plan.network.value(tokens.q, read), plan.norm.gamma, plan.norm.beta)
    if tokens.valid is not None:
        y = torch.where(tokens.valid.unsqueeze(-1), y, 0.0)
    return y, _gradient_norm(gradient, tokens.q.shape[1]), after


# --- gradients --------------------------------------------------------------------------------------------


def _with_halo(
    plan: Walk, tokens: Tokens, state: Carried
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, tuple[Tensor, ...]]:
    """k, v and thresholds of the J tokens, Gamma, and the halo that the chunk leaves."""
    if plan.spec.window == 1:
        return tokens.k, tokens.v, tokens.threshold, None, ()
    band, slots = window_band(tokens.omega, state.halo[2], tokens.k.shape[1])
    own = [tokens.k, tokens.v, None, *([] if tokens.threshold is None else [tokens.threshold])]
    parts = [slots if x is None else torch.cat([h, x], 1) for h, x in zip(state.halo, own, strict=True)]
    before = plan.spec.window - 1
    if tokens.valid is None:
        halo = [x[:, x.shape[1] - before :] for x in parts]
    else:
        index = tokens.valid.sum(1, keepdim=True) + torch.arange(before, device=slots.device)
        halo = [
            x.gather(1, index.reshape(*index.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))
            for x in parts
        ]
    return parts[0], parts[1], parts[3] if len(parts) == 4 else None, band, tuple(halo)


def _inner_gradient(
    plan: Walk, tokens: Tokens, k: Tensor, v: Tensor, threshold: Tensor | None, anchor: Layers
) -> Gradient:
    """The gradients of the J tokens at the anchor, or at the anchor after each token's own decay."""
    keep = None
    if plan.spec.grad_at == "post_decay" and tokens.alpha is not None:
        keep = (1.0 - tokens.alpha).unsqueeze(-1)

    def product(layer: int, x: Tensor, back: bool = False) -> Tensor:
        def along(w: Tensor) -> Tensor:
            return torch.matmul(x, w.mT if back else w)

        z = along(anchor[layer])
        if keep is None:
            return z
        z = z * keep
        return z if plan.targets is None else z + along(plan.targets[layer]) * (1.0 - keep)

    def of_output(z: Tensor) -> Tensor:
        prediction, cache = plan.head.value(k, z, plan.norm.gamma, plan.norm.beta)
        error = LossError.apply(plan.loss, prediction, v, threshold)
        return plan.head.pull_back(error, cache)[0]

    return plan.network.gradient(k, product, lambda layer, x: product(layer, x, True), of_output)


def _gradient_norm(gradient: Gradient, tokens: int) -> Tensor:
    with torch.no_grad():
        squares = [
            torch.linalg.vecdot(x, x) * torch.linalg.vecdot(d, d)
            for x, d in zip(gradient.inputs, gradient.deltas, strict=True)
        ]
        return torch.stack(squares).sum(0).sqrt()[:, -tokens:]


# --- writes -----------------------------------------------------------------------------------------------


def _sum(weight: Tensor, x: Tensor, step: Tensor) -> Tensor:
    """Sum over the J tokens of x^T u, weighted by ``[m, n, J]``: ``[m, in, out]``."""
    return torch.matmul(x.mT, weight.mT * step)


def _linear_steps(plan: Walk, mixes: list[Mix], inputs: Layers, steps: Layers, state: Carried) -> Carried:
    """W' = A_C W + F_C S + G_C x^T u and S' = m_C S + E_C x^T u."""
    weights, momentum = [], []
    for layer, (c, x, u) in enumerate(zip(mixes, inputs, steps, strict=True)):
        w = c.A[:, :, -1].unsqueeze(1) * plan.away(layer, state.weights[layer]) + _sum(c.G[:, :, -1], x, u)
        if c.F is not None and c.m is not None and c.E is not None:
            s = state.momentum[layer]
            w = w + c.F[:, :, -1].unsqueeze(1) * s
            momentum.append(c.m[:, :, -1:] * s + _sum(c.E[:, :, -1], x, u))
        weights.append(plan.back(layer, w))
    return state._replace(weights=weights, momentum=momentum)


def _orthogonal_steps(
    plan: Walk, tokens: Tokens, mixes: list[Mix], inputs: Layers, steps: Layers, state: Carried
) -> tuple[Layers, Carried]:
    """W_t = a_t W_{t-1} + step_t NS(S_t) for every token ``[m, C, in, out]``, and the state after them."""
    size = torch.ones_like(tokens.q[..., 0]) if tokens.step is None else tokens.step
    if tokens.valid is not None:
        size = torch.where(tokens.valid, size, 0.0)
    trace, momentum = [], []
    for layer, (c, x, u) in enumerate(zip(mixes, inputs, steps, strict=True)):
        assert c.E is not None
        if c.E.shape[1] == 1:
            s = torch.einsum("mtj,mji,mjo->mtio", c.E[:, 0], x, u)
        else:
            s = torch.einsum("motj,mji,mjo->mtio", c.E, x, u)
        if c.m is not None:
            s = s + c.m[:, 0, :, None, None] * state.momentum[layer].unsqueeze(1)
            momentum.append(s[:, -1])
        moves = newton_schulz(s, plan.spec.newton_schulz) * size[..., None, None]
        w = torch.einsum("mti,miab->mtab", c.D[:, 0], moves)
        w = w + c.A[:, 0, :, None, None] * plan.away(layer, state.weights[layer]).unsqueeze(1)
        trace.append(w if plan.targets is None else w + plan.targets[layer].unsqueeze(1))
    return trace, state._replace(weights=[w[:, -1] for w in trace], momentum=momentum)


def _pool(tokens: Tokens, pooled: Tensor | None) -> Tensor | None:
    """`MemoryState.pooled` after the chunk's tokens."""
    if pooled is None:
        return None
    step = torch.ones_like(tokens.q[..., 0]) if tokens.step is None else tokens.step
    gates = torch.stack(
        [torch.zeros_like(step) if g is None else g for g in (tokens.eta, tokens.alpha, step)]
    )
    if tokens.valid is not None:
        gates = torch.where(tokens.valid, gates, 0.0)
    keep = pooled[:, :1] * suffix_products(1.0 - gates[1])[:, :1]
    return torch.cat([keep, pooled[:, 1:] + gates.sum(-1).T], -1)


def _close(plan: Walk, closed: bool | Tensor, state: Carried) -> Carried:
    """What happens at the end of a chunk, where it is reached."""
    if closed is False or (isinstance(closed, Tensor) and plan.spec.pools and not bool(closed.any())):
        return state
    spec, pooled = plan.spec, state.pooled
    weights, momentum = state.weights, state.momentum
    if pooled is not None:
        keep = pooled[:, :1, None]
        eta, alpha, step = ((pooled[:, i : i + 1] / spec.chunk_size).unsqueeze(-1) for i in (1, 2, 3))
        moves = momentum
        if spec.granularity == "chunk":
            keep, moves = 1.0 - alpha, state.pending
            if momentum:
                moves = momentum = [eta * s + p for s, p in zip(momentum, state.pending, strict=True)]
        if spec.optimizer == "muon":
            moves = [step * newton_schulz(s, spec.newton_schulz) for s in moves]
        weights = [
            plan.back(layer, keep * plan.away(layer, a) + move)
            for layer, (a, move) in enumerate(zip(state.anchor, moves, strict=True))
        ]
        pooled = nothing_pooled(pooled)
    if spec.renormalize == "rows":
        weights = [restore_norms(w, m) for w, m in zip(weights, plan.initial, strict=True)]
    weights = [plan.retention.settle(w) for w in weights]
    pending = [torch.zeros_like(p) for p in state.pending]
    after = Carried(weights, momentum, weights, pending, pooled, state.halo)
    return after if closed is True else _choose(closed, after, state)


def _choose(condition: Tensor, new: Carried, old: Carried) -> Carried:
    """Row by row ``[m]`` one or the other."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return a if a is b else torch.where(condition.reshape(-1, *[1] * (a.dim() - 1)), a, b)

    def each(a: Layers, b: Layers) -> Layers:
        return [pick(x, y) for x, y in zip(a, b, strict=True)]

    return Carried(
        each(new.weights, old.weights),
        each(new.momentum, old.momentum),
        each(new.anchor, old.anchor),
        each(new.pending, old.pending),
        None if new.pooled is None or old.pooled is None else pick(new.pooled, old.pooled),
        tuple(pick(a, b) for a, b in zip(new.halo, old.halo, strict=True)),
    )


# --- reads: products with the weights that each query sees --------------------------------------------------

Read = Callable[[int, Tensor], Tensor]


def _plain(weights: Layers) -> Read:
    """One set of weights for all tokens."""
    return lambda layer, x: torch.matmul(x, weights[layer])


def _along(trace: Layers) -> Read:
    """Weights ``[m, C, in, out]`` for every token."""
    return lambda layer, x: torch.matmul(x.unsqueeze(-2), trace[layer]).squeeze(-2)


def _delayed(trace: Layers, before: Layers) -> Layers:
    return [torch.cat([b.unsqueeze(1), w[:, :-1]], 1) for w, b in zip(trace, before, strict=True)]


def _dual(plan: Walk, mixes: list[Mix], inputs: Layers, steps: Layers, state: Carried) -> Read:
    """x W_t = A_t x W0 + F_t x S0 + sum_j G_tj (x . x_j) u_j, with the scale of the retention's anchor."""

    def product(layer: int, x: Tensor) -> Tensor:
        c, u = mixes[layer], steps[layer]
        z = c.A.mT * torch.matmul(x, plan.away(layer, state.weights[layer]))
        if plan.targets is not None:
            z = z + torch.matmul(x, plan.targets[layer])
        if c.F is not None:
            z = z + c.F.mT * torch.matmul(x, state.momentum[layer])
        scores = c.G * torch.matmul(x, inputs[layer].mT).unsqueeze(1)
        if scores.shape[1] == 1:
            z = z + torch.matmul(scores.squeeze(1), u)
        else:
            z = z + torch.einsum("motj,mjo->mto", scores, u)
        scale = plan.retention.scale(state.anchor[layer])
        return z if scale is None else z * scale

    return product
