"""The definition of the self-modifying memory: one token at a time, as the paper writes it.

    k_t = unit(M_k(x_t))    v_t = M_v(x_t)    eta_t, alpha_t from M_eta(x_t), M_alpha(x_t)
    v^_t = M(v_t)                                                  for every memory M, its own target
    S_t  = mu_t S_{t-1} - eta_t grad 1/2 ||M(k_t) - v^_t||^2
    M_t  = M_{t-1} (alpha_t I - eta_t k_t k_t^T) + S_t
    y_t  = M_mem,t-1(q_t)

("Nested Learning", arXiv 2512.24695, equations 83-97, resolved in spec/nested-learning.md section c.) What
makes k, v, eta, alpha and v^, and where the gradient is taken, is the state at the start of the memory's
chunk; with chunks of one token that is the state before the token. The gradient of the inner loss takes k, v^
and the gates for constants; gradients of what is read later pass through everything. Vectors are rows here:
M(x) is x W, or x + phi(x W_a) W_b, and the decay stands on the left. Gradients come from autograd. This file
is slow and meant to be read.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from nestor.ops.heads import to_unit
from nestor.ops.neural_memory.functions import ACTIVATIONS
from nestor.ops.self_modifying.gates import (
    bounded,
    capped,
    gradient_size,
    kept_fraction,
    logit,
    write_step,
)
from nestor.ops.self_modifying.spec import Gate, SelfModifyingSpec, SelfModifyingState

Matrices = tuple[Tensor, ...]


def apply_memory(spec: SelfModifyingSpec, x: Tensor, weights: Matrices) -> Tensor:
    """M(x) for one token of every sequence and head: x ``[B, H, p]``, weights ``[B, H, in, out]``."""
    z = torch.einsum("bhi,bhio->bho", x, weights[0])
    if len(weights) == 1:
        return z
    hidden = ACTIVATIONS[spec.activation].value(z)
    return x + torch.einsum("bhi,bhio->bho", hidden, weights[1])


def self_modifying_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: SelfModifyingState,
    start: SelfModifyingState,
    spec: SelfModifyingSpec,
    eta: Tensor | None,
    alpha: Tensor | None,
    mu: Tensor | None,
    gates: Mapping[str, Gate],
    mask: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, SelfModifyingState, Tensor]:
    """Token loop. Shapes as in `nestor.ops.self_modifying.self_modifying_memory`, with state and start filled
    in."""
    names = list(state.weights)
    everywhere = torch.ones(q.shape[:1], dtype=torch.bool, device=q.device)
    outputs, strengths = [], []
    for t in range(q.shape[1]):
        token = everywhere if mask is None else mask[:, t]
        if resets is not None:
            state = _choose(resets[:, t] & token, start, state)
        anchor = state.anchor

        def made(name: str, x: Tensor, anchor: dict[str, Matrices] = anchor) -> Tensor:
            """What a projection makes of its input: the input itself if it is no memory."""
            return apply_memory(spec, x, anchor[name]) if name in anchor else x

        key = to_unit(made("k", k[:, t]), spec.norm_eps)
        value = made("v", v[:, t])
        query = to_unit(made("q", q[:, t]), spec.norm_eps)
        own = {name: logit(gates[name], made(name, g[:, t])) for name in gates if g is not None}
        step = write_step(spec, own["eta"]) if eta is None else eta[:, t]
        keep = kept_fraction(spec, own["alpha"]) if alpha is None else alpha[:, t]

        gradients = _inner_gradients(spec, key, value, anchor)
        squares = {name: _sum([x.square().sum((-2, -1)) for x in gradients[name]]) for name in names}
        weights, momentum = {}, {}
        for name in names:
            shared = [n for n in names if (n == "mem") == (name == "mem")]
            size = gradient_size(_sum([squares[n] for n in shared]))
            used = capped(spec, step, keep, key, size)
            if name == "mem":
                strengths.append(torch.where(token[:, None], used * size, 0.0))
            moves = [-used[..., None, None] * x for x in gradients[name]]
            if mu is not None:
                before = state.momentum[name]
                moves = [mu[:, t, :, None, None] * s + m for s, m in zip(before, moves, strict=True)]
                momentum[name] = tuple(moves)
            decays = _decays(spec, key, used, keep, anchor[name])
            weights[name] = tuple(
                d @ w + m for d, w, m in zip(decays, state.weights[name], moves, strict=True)
            )
            if spec.decay == "initial":
                lost = (1.0 - keep)[..., None, None]
                pairs = zip(weights[name], start.weights[name], strict=True)
                weights[name] = tuple(w + lost * w0 for w, w0 in pairs)

        read = state.weights if spec.read_mode == "running" else anchor
        y = apply_memory(spec, query, read["mem"])
        outputs.append(torch.where(token[:, None, None], y, 0.0))
        after = SelfModifyingState(weights, momentum, anchor, state.phase + 1)
        for period, those in (
            (spec.chunk_size, ["mem"]),
            (spec.projection_chunk_size, [n for n in names if n != "mem"]),
        ):
            moved = {**after.anchor, **{n: after.weights[n] for n in those}}
            after = _choose(after.phase % period == 0, after._replace(anchor=moved), after)
        after = after._replace(phase=after.phase % spec.longest)
        state = _choose(token, after, state)
    return torch.stack(outputs, 1), state, torch.stack(strengths, 1)


def _sum(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0)


def _inner_gradients(
    spec: SelfModifyingSpec, key: Tensor, value: Tensor, anchor: dict[str, Matrices]
) -> dict[str, Matrices]:
    """Of each memory's loss at its anchor, with the target a constant, for each of its matrices."""
    differentiable = torch.is_grad_enabled()
    targets = {}
    for name, weights in anchor.items():
        target = value if spec.targets == "value" else apply_memory(spec, value, weights)
        targets[name] = bounded(target) if spec.targets == "bounded" else target

    def copy(w: Tensor) -> Tensor:
        return w.clone() if differentiable and w.requires_grad else w.detach().requires_grad_()

    with torch.enable_grad():
        # Copies: what target and key owe to the anchor is no part of the gradient with respect to them.
        own = {name: tuple(map(copy, weights)) for name, weights in anchor.items()}
        losses = []
        for name, target in targets.items():
            prediction = apply_memory(spec, key, own[name])
            if spec.inner_loss == "l2":
                losses.append(0.5 * (prediction - target).square().sum())
            else:
                losses.append(-(prediction * target).sum())
        # Sequences, heads and memories have their own weights, so the sum separates.
        leaves = [w for weights in own.values() for w in weights]
        found = iter(torch.autograd.grad(_sum(losses), leaves, create_graph=differentiable))
    return {
        name: tuple(g if differentiable else g.detach() for _, g in zip(weights, found, strict=False))
        for name, weights in own.items()
    }


def _decays(
    spec: SelfModifyingSpec, key: Tensor, step: Tensor, keep: Tensor, anchor: Matrices
) -> list[Tensor]:
    """alpha I - eta x x^T for each matrix ``[B, H, in, in]``, where x is its input of unit length."""
    inputs: list[Tensor | None] = [key if spec.dgd else None]
    if len(anchor) == 2:
        z = torch.einsum("bhi,bhio->bho", key, anchor[0])
        hidden = to_unit(ACTIVATIONS[spec.activation].value(z), spec.norm_eps)
        inputs.append(hidden if spec.dgd and spec.dgd_hidden else None)
    decays = []
    for x, w in zip(inputs, anchor, strict=True):
        decay = keep[..., None, None] * torch.eye(w.shape[-2], dtype=w.dtype, device=w.device)
        if x is not None:
            decay = decay - step[..., None, None] * x.unsqueeze(-1) * x.unsqueeze(-2)
        decays.append(decay)
    return decays


def _choose(condition: Tensor, new: SelfModifyingState, old: SelfModifyingState) -> SelfModifyingState:
    """Sequence by sequence ``[B]`` one or the other."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(condition.reshape(-1, *[1] * (b.dim() - 1)), a, b)

    def each(a: dict[str, Matrices], b: dict[str, Matrices]) -> dict[str, Matrices]:
        return {name: tuple(pick(x, y) for x, y in zip(a[name], b[name], strict=True)) for name in b}

    return SelfModifyingState(
        each(new.weights, old.weights),
        each(new.momentum, old.momentum),
        each(new.anchor, old.anchor),
        pick(new.phase, old.phase),
    )
