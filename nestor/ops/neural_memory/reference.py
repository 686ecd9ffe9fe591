"""The definition of the neural memory: one token at a time, as the papers write it.

    loss_t = l( f(k_t; W_anchor), v_t )
    S_t    = eta_t S_{t-1} - theta_t grad loss_t
    W_t    = decay(W_{t-1}, alpha_t) + S_t
    y_t    = f(q_t; W_read)

(Titans, arXiv 2501.00663, equations 8-15; chunked anchors as in its section 3.2.) ``W_anchor`` is the memory
at the start of the token's chunk; with ``chunk_size = 1`` that is W_{t-1}. What the other choices of
`MemorySpec` change: with a retention an accumulator follows these lines, and W is a function of it; a window
sums the losses of the last tokens; orthogonalised steps, steps of whole chunks and constant norms act at the
chunk's end. Gradients come from autograd, so this file shares no derivation with the chunked forms that it
judges. It is slow and meant to be read.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nestor.ops.neural_memory.functions import ACTIVATIONS, make_head
from nestor.ops.neural_memory.muon import newton_schulz, restore_norms
from nestor.ops.neural_memory.retention import make_retention
from nestor.ops.neural_memory.spec import MemorySpec, MemoryState

Layers = list[Tensor]  # one tensor per matrix of the memory network


def apply_memory(
    spec: MemorySpec, x: Tensor, weights: Sequence[Tensor], gamma: Tensor | None, beta: Tensor | None
) -> Tensor:
    """f(x; W) for one token of every sequence and head: x ``[B, H, p]``, weights ``[B, H, in, out]``."""
    phi = ACTIVATIONS[spec.activation].value

    def times(z: Tensor, weight: Tensor) -> Tensor:
        return torch.einsum("bhi,bhio->bho", z, weight)

    if spec.network == "gated":
        gate, out, up = weights
        z = times(phi(times(x, gate)) * times(x, up), out)
    else:
        z = x
        for layer, weight in enumerate(weights):
            z = times(z, weight)
            if layer < len(weights) - 1:
                z = phi(z)
    if spec.norm == "residual_layernorm":
        assert gamma is not None and beta is not None
        z = torch.nn.functional.layer_norm(z, z.shape[-1:], eps=spec.norm_eps)
        return x + gamma * z + beta
    return x + z if make_head(spec.norm, spec.norm_eps).residual else z


def neural_memory_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    eta: Tensor | None,
    alpha: Tensor | None,
    initial: Sequence[Tensor],
    gamma: Tensor | None,
    beta: Tensor | None,
    state: MemoryState,
    start: MemoryState,
    spec: MemorySpec,
    mask: Tensor | None = None,
    resets: Tensor | None = None,
    omega: Tensor | None = None,
    threshold: Tensor | None = None,
    step: Tensor | None = None,
) -> tuple[Tensor, MemoryState]:
    """Token loop. Shapes as in `nestor.ops.neural_memory.neural_memory`, with state and start filled in."""
    retention = make_retention(spec)
    targets = [retention.accumulator(w) for w in initial]
    outputs = []
    everywhere = torch.ones(q.shape[:1], dtype=torch.bool, device=q.device)
    if threshold is not None and threshold.dim() == 3:
        threshold = threshold.unsqueeze(-1)

    def decay(w: Tensor, target: Tensor, keep: Tensor) -> Tensor:
        return keep * w + (1 - keep) * target if spec.decay == "initial" else keep * w

    def at_chunk_end(state: MemoryState) -> MemoryState:
        return _at_chunk_end(spec, state, targets, initial, decay)

    for t in range(q.shape[1]):
        token = everywhere if mask is None else mask[:, t]
        if resets is not None:
            state = _choose(
                resets[:, t] & token, start._replace(anchor=start.weights).expand(q.shape[0]), state
            )
        keep = [1 - a for a in _per_matrix(spec, spec.forget_gates, alpha, t, state)]
        steps = _per_matrix(spec, spec.step_sizes, theta, t, state)
        weights, momentum, anchor = state.weights, state.momentum, list(state.anchor)

        at = [retention.weights(a) for a in anchor]
        if spec.grad_at == "post_decay":
            at = [decay(a, m, c) for a, m, c in zip(anchor, targets, keep, strict=True)]
        window, halo = _window(spec, t, k, v, omega, threshold, state)
        gradients = _inner_gradients(spec, window, at, gamma, beta)

        moved = [-s * g for s, g in zip(steps, gradients, strict=True)]
        pending, pooled = state.pending, state.pooled
        if pooled is not None:
            gates = [torch.zeros_like(q[:, t, :, 0]) if g is None else g[:, t] for g in (eta, alpha)]
            size = torch.ones_like(gates[0]) if step is None else step[:, t]
            kept = pooled[..., 0] * (1 - gates[1])
            pooled = torch.stack([kept, *(pooled[..., 1:] + torch.stack([*gates, size], -1)).unbind(-1)], -1)
        if spec.granularity == "chunk":
            pending = tuple(p + m for p, m in zip(pending, moved, strict=True))
            written = weights
        else:
            if eta is not None:
                moved = [eta[:, t, :, None, None] * s + m for s, m in zip(momentum, moved, strict=True)]
                momentum = tuple(moved)
            if spec.muon_per_token:
                size = torch.ones_like(q[:, t, :, 0]) if step is None else step[:, t]
                moved = [size[..., None, None] * newton_schulz(s, spec.newton_schulz) for s in moved]
            written = tuple(
                decay(w, m, c) + s for w, m, c, s in zip(weights, targets, keep, moved, strict=True)
            )
        after = MemoryState(written, momentum, state.anchor, state.phase + 1, pending, pooled, halo)
        after = _choose(after.phase == spec.chunk_size, at_chunk_end(after), after)

        if spec.chunk_size == 1 and spec.read_mode != "chunk_start":
            # The whole step of the token, with what happens at the chunk's end.
            read = after.weights if spec.read_mode == "inclusive" else state.weights
            seen = [retention.weights(w) for w in read]
        elif spec.read_mode == "chunk_start":
            seen = [retention.weights(a) for a in anchor]
        else:
            read = written if spec.read_mode == "inclusive" else weights
            scales = [retention.scale(a) for a in anchor]
            seen = [w if s is None else w * s for w, s in zip(read, scales, strict=True)]
        y = apply_memory(spec, q[:, t], seen, gamma, beta)
        outputs.append(torch.where(token[:, None, None], y, 0.0))
        state = _choose(token, after, state)

    return torch.stack(outputs, 1), state


def _at_chunk_end(
    spec: MemorySpec,
    state: MemoryState,
    targets: Layers,
    initial: Sequence[Tensor],
    decay: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> MemoryState:
    weights, momentum, pooled = state.weights, state.momentum, state.pooled
    if pooled is not None:
        kept, mean = pooled[..., 0, None, None], pooled[..., None, None] / spec.chunk_size
        moves = momentum
        if spec.granularity == "chunk":
            kept, moves = 1 - mean[..., 2, :, :], state.pending
            if momentum:
                eta = mean[..., 1, :, :]
                moves = momentum = tuple(eta * s + p for s, p in zip(momentum, moves, strict=True))
        if spec.optimizer == "muon":
            moves = tuple(mean[..., 3, :, :] * newton_schulz(s, spec.newton_schulz) for s in moves)
        weights = tuple(decay(a, m, kept) + s for a, m, s in zip(state.anchor, targets, moves, strict=True))
        pooled = torch.zeros_like(pooled)
        pooled[..., 0] = 1
    if spec.renormalize == "rows":
        weights = tuple(restore_norms(w, m) for w, m in zip(weights, initial, strict=True))
    weights = tuple(make_retention(spec).settle(w) for w in weights)
    pending = tuple(torch.zeros_like(p) for p in state.pending)
    return MemoryState(weights, momentum, weights, torch.zeros_like(state.phase), pending, pooled, state.halo)


def _per_matrix(spec: MemorySpec, kind: str, gate: Tensor | None, t: int, state: MemoryState) -> list[Tensor]:
    """The gate of token t for each matrix, ``[B, H, 1, 1]`` or, for each of its columns, ``[B, H, 1, p]``."""
    matrices = len(state.weights)
    if gate is None:
        return [torch.zeros_like(state.weights[0][..., :1, :1])] * matrices
    if kind == "head":
        return [gate[:, t, :, None, None]] * matrices
    if kind == "matrix":
        return [gate[:, t, :, layer, None, None] for layer in range(matrices)]
    output = 1 if spec.network == "gated" else matrices - 1
    own, mean = gate[:, t, :, None], gate[:, t].mean(-1)[..., None, None]
    return [own if layer == output else mean for layer in range(matrices)]


Learned = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # k, v, gate, threshold of a token


def _window(
    spec: MemorySpec,
    t: int,
    k: Tensor,
    v: Tensor,
    omega: Tensor | None,
    threshold: Tensor | None,
    state: MemoryState,
) -> tuple[list[Learned], tuple[Tensor, ...]]:
    """The tokens whose losses the step of token t descends, oldest first, and the halo after it."""
    limit = None if threshold is None else threshold[:, t]
    if spec.window == 1:
        return [(k[:, t], v[:, t], None, limit)], ()
    by_distance = omega is not None and omega.dim() == 4
    gate = torch.ones_like(k[:, t, :, 0]) if omega is None or by_distance else omega[:, t]
    own = [k[:, t], v[:, t], gate, *([] if limit is None else [limit])]
    parts = [torch.cat([h, x.unsqueeze(2)], 2) for h, x in zip(state.halo, own, strict=True)]
    learned: list[Learned] = []
    for i in range(spec.window):
        gate = parts[2][:, :, i]
        if omega is not None and by_distance:
            gate = gate * omega[:, t, :, spec.window - 1 - i]
        limit = parts[3][:, :, i] if len(parts) == 4 else None
        learned.append((parts[0][:, :, i], parts[1][:, :, i], gate, limit))
    return learned, tuple(x[:, :, 1:] for x in parts)


def _choose(condition: Tensor, new: MemoryState, old: MemoryState) -> MemoryState:
    """Sequence by sequence ``[B]`` one or the other."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(condition.reshape(-1, *[1] * (a.dim() - 1)), a, b)

    def each(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(pick(x, y) for x, y in zip(a, b, strict=True))

    return MemoryState(
        each(new.weights, old.weights),
        each(new.momentum, old.momentum),
        each(new.anchor, old.anchor),
        pick(new.phase, old.phase),
        each(new.pending, old.pending),
        None if new.pooled is None or old.pooled is None else pick(new.pooled, old.pooled),
        each(new.halo, old.halo),
    )


def _inner_gradients(
    spec: MemorySpec,
    learned: list[Learned],
    weights: Sequence[Tensor],
    gamma: Tensor | None,
    beta: Tensor | None,
) -> list[Tensor]:
    loss_function = spec.loss()
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        weights = [w if differentiable and w.requires_grad else w.detach().requires_grad_() for w in weights]
        # Sequences and heads have their own weights, so the sum separates.
        losses = []
        for k, v, gate, limit in learned:
            loss = loss_function.value(apply_memory(spec, k, weights, gamma, beta), v, limit)
            losses.append((loss if gate is None else loss * gate).sum())
        gradients = torch.autograd.grad(torch.stack(losses).sum(), weights, create_graph=differentiable)
    return list(gradients) if differentiable else [g.detach() for g in gradients]
