"""The definition of the neural memory: one token at a time, as the papers write it.

    loss_t = l( f(k_t; W_anchor), v_t )
    S_t    = eta_t S_{t-1} - theta_t grad loss_t
    W_t    = decay(W_{t-1}, alpha_t) + S_t
    y_t    = f(q_t; W_read)

(Titans, arXiv 2501.00663, equations 8-15; chunked anchors as in its section 3.2.) ``W_anchor`` is the memory
at the start of the token's chunk; with ``chunk_size = 1`` that is W_{t-1}. Gradients come from autograd, so
this file shares no derivation with the chunked form that it judges. It is slow and meant to be read.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nestor.ops.neural_memory.functions import ACTIVATIONS, make_head
from nestor.ops.neural_memory.spec import MemorySpec, MemoryState


def apply_memory(
    spec: MemorySpec, x: Tensor, weights: Sequence[Tensor], gamma: Tensor | None, beta: Tensor | None
) -> Tensor:
    """f(x; W) for one token of every sequence and head: x ``[B, H, p]``, weights ``[B, H, in, out]``."""
    z = x
    for layer, weight in enumerate(weights):
        z = torch.einsum("bhi,bhio->bho", z, weight)
        if layer < len(weights) - 1:
            z = ACTIVATIONS[spec.activation].value(z)
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
) -> tuple[Tensor, MemoryState]:
    """Token loop. Shapes as in `nestor.ops.neural_memory.neural_memory`, with state and start filled in."""
    loss_function = spec.loss()
    weights, momentum, anchor, phase = (
        list(state.weights),
        list(state.momentum),
        list(state.anchor),
        state.phase,
    )
    outputs = []
    everywhere = torch.ones(q.shape[:1], dtype=torch.bool, device=q.device)

    def decay(w: Tensor, init: Tensor, keep: Tensor) -> Tensor:
        keep = keep[:, :, None, None]
        return keep * w + (1 - keep) * init if spec.decay == "initial" else keep * w

    for t in range(q.shape[1]):
        token = everywhere if mask is None else mask[:, t]
        keep = torch.ones_like(theta[:, t]) if alpha is None else 1 - alpha[:, t]
        if resets is not None:
            fresh = resets[:, t] & token
            weights = [_choose(fresh, s, w) for s, w in zip(start.weights, weights, strict=True)]
            anchor = [_choose(fresh, s, w) for s, w in zip(start.weights, anchor, strict=True)]
            momentum = [_choose(fresh, s, w) for s, w in zip(start.momentum, momentum, strict=True)]
            phase = torch.where(fresh, 0, phase)

        at = (
            anchor
            if spec.grad_at == "pre_decay"
            else [decay(a, i, keep) for a, i in zip(anchor, initial, strict=True)]
        )
        gradients = _inner_gradients(spec, loss_function, k[:, t], v[:, t], at, gamma, beta)

        step = theta[:, t, :, None, None]
        moved = [-step * g for g in gradients]
        if eta is not None:
            moved = [eta[:, t, :, None, None] * s + m for s, m in zip(momentum, moved, strict=True)]
        written = [decay(w, i, keep) + m for w, i, m in zip(weights, initial, moved, strict=True)]

        read = {"inclusive": written, "exclusive": weights, "chunk_start": anchor}[spec.read_mode]
        y = apply_memory(spec, q[:, t], read, gamma, beta)
        outputs.append(torch.where(token[:, None, None], y, 0.0))

        weights = [_choose(token, new, old) for new, old in zip(written, weights, strict=True)]
        if eta is not None:
            momentum = [_choose(token, new, old) for new, old in zip(moved, momentum, strict=True)]
        phase = phase + token
        closed = phase == spec.chunk_size
        anchor = [_choose(closed, w, a) for w, a in zip(weights, anchor, strict=True)]
        phase = torch.where(closed, 0, phase)

    return torch.stack(outputs, 1), MemoryState(tuple(weights), tuple(momentum), tuple(anchor), phase)


def _choose(condition: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(condition[:, None, None, None], new, old)


def _inner_gradients(
    spec: MemorySpec,
    loss_function,  # noqa: ANN001 - an InnerLoss
    k: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    gamma: Tensor | None,
    beta: Tensor | None,
) -> list[Tensor]:
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        weights = [w if differentiable and w.requires_grad else w.detach().requires_grad_() for w in weights]
        # Sequences and heads have their own weights, so the sum separates.
        loss = loss_function.value(apply_memory(spec, k, weights, gamma, beta), v).sum()
        gradients = torch.autograd.grad(loss, weights, create_graph=differentiable)
    return list(gradients) if differentiable else [g.detach() for g in gradients]
