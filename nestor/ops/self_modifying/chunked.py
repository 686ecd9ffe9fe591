"""The chunked form of the self-modifying memory: dense products, explicit inner gradients, outer autograd.

Two walks. The first goes through the chunks of C_o tokens of all memories but "mem": what they make of the
tokens of a chunk, their targets and gradients at its start are a few products, and so are the decays and
writes that follow (`transitions.py`). Nothing in it reads "mem", so that the second walk has the keys, values
and gates of all tokens at hand when it goes through the chunks of C_m tokens of "mem". If that is linear, its
chunks, too, are linear maps of its weights, made for all of them at once (`scan.py`).

Sequences and heads are one axis m; N chunks of C tokens.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nestor.ops.heads import to_unit
from nestor.ops.neural_memory.layout import ChunkGrid, chunk_grid
from nestor.ops.neural_memory.networks import Mlp
from nestor.ops.self_modifying.fused import Part, fused_walks, is_fused
from nestor.ops.self_modifying.gates import capped, kept_fraction, logit, write_step
from nestor.ops.self_modifying.groups import Group, Inner, Stack
from nestor.ops.self_modifying.layout import (
    Carried,
    Edges,
    Inputs,
    Projected,
    at_chunk,
    edges_of,
    gate_rows,
    gather,
    regrid,
    valid_rows,
)
from nestor.ops.self_modifying.scan import is_linear, linear_walk
from nestor.ops.self_modifying.spec import Gate, SelfModifyingSpec, SelfModifyingState
from nestor.ops.self_modifying.transitions import Transition, advance, make_transition, read_running


def self_modifying_chunks(
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
    fresh: bool = False,
    half: bool = False,
) -> tuple[Tensor, SelfModifyingState, Tensor]:
    """Shapes as in `nestor.ops.self_modifying.self_modifying_memory`, with state and start filled in; q, k, v
    and g may be of half precision. fresh: the state is that of sequences that have read nothing. half: a GPU
    may round what it multiplies nearly to half precision. Returns outputs, the state, and how hard "mem" was
    written ``[B, T, H]``, without a gradient."""
    batch, length, heads, _ = q.shape
    # A fresh sequence needs no look at its phase, which would wait for a GPU.
    phase = None if fresh else state.phase
    by_period = {
        period: chunk_grid(
            batch, length, period, q.device, None if phase is None else phase % period, mask, resets
        )
        for period in {spec.projection_chunk_size, spec.chunk_size}
    }
    grids = by_period[spec.projection_chunk_size], by_period[spec.chunk_size]
    others, own = (Group.of(spec, state.weights, mem) for mem in (False, True))
    carried = []
    for group, grid in zip((others, own), grids, strict=True):
        begin = gather(group, start, batch)
        first = begin if fresh else gather(group, state, batch)
        carried.append((first, edges_of(grid, heads, begin)))

    inputs = Inputs(q, k, v, g, eta, alpha)
    if is_fused((others, own), mu is not None, q):
        biases = {name: gate.bias.repeat(batch) for name, gate in gates.items()}
        some, mem = (
            Part(group, *one, grid, biases)
            for group, grid, one in zip((others, own), grids, carried, strict=True)
        )
        y, strength, after_others, after_own = fused_walks(some, mem, inputs, fresh, half)
    else:
        y, strength, after_others, after_own = _plain_walks(others, own, grids, carried, inputs, mu, gates)
    parts = []
    for name in Carried._fields:
        part = {**others.split(getattr(after_others, name)), **own.split(getattr(after_own, name))}
        parts.append({n: tuple(w.unflatten(0, (batch, heads)) for w in ws) for n, ws in part.items()})
    after = SelfModifyingState(parts[0], parts[1], parts[2], by_period[spec.longest].phase.clone())
    return y, after, strength


# --- the walks ----------------------------------------------------------------------------------------------


def _plain_walks(
    others: Group,
    own: Group,
    grids: tuple[ChunkGrid, ChunkGrid],
    carried: list[tuple[Carried, Edges]],
    inputs: Inputs,
    mu: Tensor | None,
    gates: Mapping[str, Gate],
) -> tuple[Tensor, Tensor, Carried, Carried]:
    """y ``[B, T, H, p]``, strengths ``[B, T, H]`` and the states of both groups, in PyTorch."""
    batch, length, heads, _ = inputs.q.shape
    wide = torch.float64 if inputs.q.dtype == torch.float64 else torch.float32
    rows = Inputs(*(None if x is None else grids[0].to_rows(x.to(wide)) for x in inputs))  # type: ignore[arg-type]
    own_gates = {name: gate_rows(gate, batch) for name, gate in gates.items()}
    if others.names:
        momenta = None if mu is None else grids[0].to_rows(mu)
        valid = valid_rows(grids[0], heads)
        projected, after_others = _walk_projections(others, own_gates, *carried[0], rows, momenta, valid)
    else:
        flat = Inputs(*(None if x is None else x.flatten(1, 2) for x in rows))  # type: ignore[arg-type]
        made = project(others, own_gates, [], flat)
        projected = Projected(*(x.unflatten(1, rows.q.shape[1:3]) for x in made))
        after_others = carried[0][0]
    tokens = regrid(projected, *grids, batch, length)
    momenta = None if mu is None else grids[1].to_rows(mu)
    walk = linear_walk if is_linear(own) else _walk_memory
    y, strength, after_own = walk(own, *carried[1], tokens, momenta, valid_rows(grids[1], heads))
    y, strength = (grids[1].from_rows(x, batch, length) for x in (y, strength))
    return y, strength, after_others, after_own


def project(group: Group, gates: Mapping[str, Gate], anchor: Stack, x: Inputs) -> Projected:
    """What the memories of the group make of the tokens of a chunk; others are given."""

    def made(name: str, rows: Tensor) -> Tensor:
        return group.value(anchor, name, rows) if name in group.names else rows

    eta, alpha = x.eta, x.alpha
    if "eta" in group.names and x.g is not None:
        eta = write_step(group.spec, logit(gates["eta"], made("eta", x.g)))
    if "alpha" in group.names and x.g is not None:
        alpha = kept_fraction(group.spec, logit(gates["alpha"], made("alpha", x.g)))
    assert eta is not None and alpha is not None
    eps = group.spec.norm_eps
    return Projected(to_unit(made("q", x.q), eps), to_unit(made("k", x.k), eps), made("v", x.v), eta, alpha)


class Written(NamedTuple):
    """A chunk's writes: the state after it; per matrix its transition, corrections and errors; and
    eta times the norm of the gradient ``[m, C]``."""

    after: Carried
    transitions: list[Transition]
    corrections: list[Tensor | None]
    inner: Inner
    strength: Tensor


def write(
    group: Group,
    state: Carried,
    tokens: Projected,
    targets: Sequence[Tensor | None],
    mu: Tensor | None,
    valid: Tensor | None,
) -> Written:
    """Write a chunk into all memories of a group, with gradients at the anchor. targets: of their decay."""
    spec = group.spec
    inner = group.inner(state.anchor, tokens.k, tokens.v)
    eta = capped(spec, tokens.eta, tokens.alpha, tokens.k, inner.size)
    transitions, corrections = [], []
    weights, momentum = [], []
    for layer, (keys, errors) in enumerate(zip(inner.inputs, inner.errors, strict=True)):
        rows = _over_memories if layer else _as_it_is
        t = make_transition(
            keys, rows(eta), rows(tokens.alpha), None if mu is None else rows(mu),
            None if valid is None else rows(valid), dgd=spec.dgd and (spec.dgd_hidden or not layer),
        )  # fmt: skip
        s = state.momentum[layer] if state.momentum else None
        w, s, a = advance(t, state.weights[layer], s, errors, targets[layer])
        weights.append(w)
        momentum += [] if s is None else [s]
        transitions.append(t)
        corrections.append(a)
    after = Carried(weights, momentum, state.anchor)
    strength = torch.zeros_like(eta) if inner.size is None else (eta * inner.size).detach()
    return Written(after, transitions, corrections, inner, strength)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _over_memories(x: Tensor) -> Tensor:
    """``[m, C]``, with the axis that second matrices have for the memories."""
    return x.unsqueeze(1)


def _walk_projections(
    group: Group,
    gates: Mapping[str, Gate],
    state: Carried,
    edges: Edges,
    inputs: Inputs,
    mu: Tensor | None,
    valid: Tensor | None,
) -> tuple[Projected, Carried]:
    """All that the memories but "mem" make ``[m, N, C, ...]``, and their state after the last chunk."""

    targets = decay_targets(group, edges)

    def chunk(n: int, state: Carried) -> tuple[Projected, Carried]:
        state = edges.enter(n, state)
        tokens = project(group, gates, state.anchor, Inputs(*at_chunk(inputs, n)))
        written = write(group, state, tokens, targets, *at_chunk((mu, valid), n))
        return tokens, edges.leave(n, written.after, state.anchor)

    found, state = _in_turn(chunk, len(edges.resets), state, group.spec.recompute)
    return Projected(*(torch.stack(x, 1) for x in zip(*found, strict=True))), state


def _walk_memory(
    group: Group,
    state: Carried,
    edges: Edges,
    tokens: Projected,
    mu: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Carried]:
    """Outputs ``[m, N, C, p]``, the strengths of writes ``[m, N, C]`` and the state after the last chunk."""

    targets = decay_targets(group, edges)

    def chunk(n: int, state: Carried) -> tuple[tuple[Tensor, ...], Carried]:
        state = edges.enter(n, state)
        own = Projected(*at_chunk(tokens, n))
        written = write(group, state, own, targets, *at_chunk((mu, valid), n))
        if group.spec.read_mode == "anchor":
            y = group.value(state.anchor, "mem", own.q)
        else:
            y = _read(group, state, written, own.q, targets)
        return (y, written.strength), edges.leave(n, written.after, state.anchor)

    found, state = _in_turn(chunk, len(edges.resets), state, group.spec.recompute)
    y, strength = (torch.stack(x, 1) for x in zip(*found, strict=True))
    if valid is not None:
        y, strength = torch.where(valid.unsqueeze(-1), y, 0.0), torch.where(valid, strength, 0.0)
    return y, strength, state


def decay_targets(group: Group, edges: Edges) -> Sequence[Tensor | None]:
    """For each matrix of a group what it decays to: what documents start with, or None for zero."""
    if group.spec.decay == "initial":
        return edges.start.weights
    return [None] * group.depth


def _read(
    group: Group, state: Carried, written: Written, q: Tensor, targets: Sequence[Tensor | None]
) -> Tensor:
    """M_{t-1}(q_t) of the one memory of a group, for the tokens of a chunk."""

    def product(layer: int, x: Tensor) -> Tensor:
        # The second matrix has an axis for the one memory.
        of_one = (lambda z: z) if layer == 0 else (lambda z: z.squeeze(1))
        t = written.transitions[layer]
        a = written.corrections[layer]
        s = state.momentum[layer] if state.momentum else None
        if layer:
            x = x.unsqueeze(1)
        errors = written.inner.errors[layer]
        return of_one(read_running(t, x, state.weights[layer], s, a, errors, targets[layer]))

    z = Mlp(group.spec.activation, group.depth).value(q, product)
    return z if group.depth == 1 else q + z


def _in_turn(chunk: Callable, chunks: int, state: Carried, recompute: bool) -> tuple[list, Carried]:
    """`chunk(n, state) -> (found, state)` for each chunk in turn. Recomputed in groups of sqrt(N), which keep
    as many start states as there are chunks in the group at work."""

    def run(state: Carried, some: range) -> tuple[list, Carried]:
        found = []
        for n in some:
            one, state = chunk(n, state)
            found.append(one)
        return found, state

    if not (recompute and torch.is_grad_enabled()):
        return run(state, range(chunks))
    found, group = [], max(1, math.isqrt(chunks))
    for first in range(0, chunks, group):
        some = range(first, min(first + group, chunks))
        more, state = checkpoint(run, state, some, use_reentrant=False, preserve_rng_state=False)
        found += more
    return found, state
