"""The walk of a linear memory whose keys, values and gates are all known: one linear map a chunk.

With the gradients at the anchor, errors are ``e = R W_a (- v)`` for rows R that are known, too. Weights,
momentum and corrections at a chunk's end are then linear in ``(W0, S0, W_a)``; what they are for the unit
matrices in place of those is computed for all chunks at once. One product of ``[p, 2 p]`` (``[p, 3 p]`` with
momentum) a chunk is left to do in turn, and reads wait for nothing but that.
"""

import torch
from torch import Tensor

from nestor.ops.self_modifying.gates import capped, gradient_size
from nestor.ops.self_modifying.groups import Group
from nestor.ops.self_modifying.layout import Carried, Edges, Projected
from nestor.ops.self_modifying.transitions import (
    Transition,
    added,
    corrections,
    make_transition,
    read_running,
)


def is_linear(group: Group) -> bool:
    """Whether what a chunk does to the one memory of a group is linear in its weights."""
    spec = group.spec
    plain = spec.step_cap != "soft" and spec.targets != "bounded" and spec.decay == "zero"
    return group.depth == 1 and plain


def linear_walk(
    group: Group,
    state: Carried,
    edges: Edges,
    tokens: Projected,
    mu: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Carried]:
    """Outputs ``[m, N, C, p]``, the strengths of writes ``[m, N, C]`` and the state after the last chunk."""
    spec, p = group.spec, tokens.k.shape[-1]
    eta = capped(spec, tokens.eta, tokens.alpha, tokens.k, None)
    t = make_transition(tokens.k, eta, tokens.alpha, mu, valid, spec.dgd)
    rows = group.difference(tokens.k, tokens.v)
    fixed = -tokens.v if spec.targets == "value" else None
    a, onto_weights, onto_momentum = _maps(t, rows, fixed, mu is not None)
    known = 3 * p if mu is not None else 2 * p  # columns that a state is multiplied with

    sources, anchors = [], []
    for n in range(len(edges.resets)):
        state = edges.enter(n, state)
        source = torch.cat([*state.weights, *state.momentum, *state.anchor], -2)
        weights = torch.matmul(onto_weights[:, n, :, :known], source)
        momentum = []
        if onto_momentum is not None:
            from_anchor = torch.matmul(onto_momentum[:, n, :, :p], state.anchor[0])
            momentum.append(t.m_end[:, n] * state.momentum[0] + from_anchor)  # type: ignore[index]
        if fixed is not None:
            weights = weights + onto_weights[:, n, :, known:]
            if onto_momentum is not None:
                momentum[0] = momentum[0] + onto_momentum[:, n, :, p:]
        sources.append(source)
        anchors.append(state.anchor[0])
        after = state._replace(weights=[weights], momentum=momentum)
        state = edges.leave(n, after, state.anchor)

    source, anchor = torch.stack(sources, 1), torch.stack(anchors, 1)
    errors = torch.matmul(rows, anchor)
    errors = errors if fixed is None else errors + fixed
    if spec.read_mode == "anchor":
        y = torch.matmul(tokens.q, anchor)
    else:
        if a is not None:
            moved = torch.matmul(a[..., :known], source)
            a = moved if fixed is None else moved + a[..., known:]
        momenta = source[..., p : 2 * p, :] if mu is not None else None
        y = read_running(t, tokens.q, source[..., :p, :], momenta, a, errors)
    strength = (eta * gradient_size(tokens.k.square().sum(-1) * errors.square().sum(-1))).detach()
    if valid is not None:
        y, strength = torch.where(valid.unsqueeze(-1), y, 0.0), torch.where(valid, strength, 0.0)
    return y, strength, state


def _maps(
    t: Transition, rows: Tensor, fixed: Tensor | None, momentum: bool
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """What corrections ``[..., C, c]``, weights ``[..., p, c]`` and momentum at the end are, with the unit
    matrix for W0, S0 (if there is momentum) and W_a, and for the fixed errors: the columns c in this order.
    Those of the momentum begin with W_a.
    """
    k, zeros = t.keys, torch.zeros_like(t.keys)
    tail = [] if fixed is None else [fixed]
    blank = [zeros] * (1 + len(tail))
    middle = [zeros] if momentum else []
    errors = torch.cat([zeros, *middle, rows, *tail], -1)
    on_weights = torch.cat([k, *middle, *blank], -1)
    on_momentum = torch.cat([zeros, k, *blank], -1) if momentum else None
    a = corrections(t, on_weights, on_momentum, errors)
    width = k.shape[-1]
    diagonal = torch.eye(width, dtype=k.dtype, device=k.device)
    kept = [t.A_end * diagonal, *([t.F_end * diagonal] if momentum and t.F_end is not None else [])]
    own = added(t, a, errors)
    pad = own.shape[-1] - width * len(kept)
    onto_weights = own + torch.nn.functional.pad(torch.cat(kept, -1), (0, pad))
    onto_momentum = None
    if t.E_end is not None:
        onto_momentum = -torch.matmul(k.mT, t.E_end * torch.cat([rows, *tail], -1))
    return a, onto_weights, onto_momentum
