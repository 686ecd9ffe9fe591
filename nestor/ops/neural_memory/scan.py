"""The walk over the chunks of a call, forward and backward, as one autograd function."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from nestor.ops.neural_memory.chunked import (
    BlockGradients,
    ChunkGradients,
    ChunkState,
    Layers,
    Norm,
    Queries,
    Reading,
    Rows,
    Sums,
    Tokens,
    Writing,
    gradient_norm,
    make_rows,
    read_block,
    read_block_backward,
    write_chunk,
    write_chunk_backward,
)
from nestor.ops.neural_memory.spec import MemorySpec

# Query elements of the chunks that are read at once. A CPU keeps what it reads in its cache; elsewhere fewer
# and larger kernels are faster.
CPU_READ_ELEMENTS = 1 << 16
READ_ELEMENTS = 1 << 22

PerToken = TypeVar("PerToken", Rows, Tokens)


@dataclass(frozen=True)
class Plan:
    """How to walk: for each chunk whether it starts with a reset and whether it closes (see `ChunkGrid`).

    Masks are None, a bool, or bool ``[m, 1, 1]``.
    """

    spec: MemorySpec
    depth: int
    resets: list[Tensor | None]
    closes: list[bool | Tensor]
    has_norm: bool
    has_targets: bool
    surprise: bool


def walk(
    plan: Plan, tokens: Tokens, norm: Norm, start: Layers, state: ChunkState
) -> tuple[Tensor, Tensor, Layers, Layers]:
    """Walk the chunks.

    start: per layer the components ``[m, c, in, out]`` that a reset restores. Returns outputs
    ``[m, N, C, p]``, the inner gradients' norms ``[m, N, C]`` (empty unless asked for) and the final
    components and anchors per layer.
    """
    return apply_walk(_Scan, plan, make_rows(tokens, plan.spec), norm, start, state)


def apply_walk(
    function: type[torch.autograd.Function],
    plan: Plan,
    per_token: NamedTuple,
    norm: Norm,
    start: Layers,
    state: ChunkState,
) -> tuple[Tensor, Tensor, Layers, Layers]:
    """Call an autograd function with the plan, whether a backward will follow, and all tensors as one list,
    which `unpack` takes apart. Returns what `walk` does.
    """
    slow = [norm.gamma, norm.beta] if plan.has_norm else []
    tensors = [*per_token, *slow, *start, *state.stacks, *state.anchor, *(state.targets or [])]
    keep_tape = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    outputs, surprise, *final = function.apply(plan, keep_tape, *tensors)
    return outputs, surprise, final[: plan.depth], final[plan.depth :]


def unpack(
    plan: Plan, per_token: type[PerToken], tensors: Sequence[Tensor | None]
) -> tuple[PerToken, Norm, Layers, ChunkState]:
    """Reverse of the list of `apply_walk`, whose first entries are a tuple of the type `per_token`."""
    rest: list[Any] = list(tensors)

    def take(n: int) -> list[Any]:
        head, rest[:] = rest[:n], rest[n:]
        return head

    first = per_token(*take(len(per_token._fields)))
    gamma, beta = take(2) if plan.has_norm else (None, None)
    start, stacks, anchor = take(plan.depth), take(plan.depth), take(plan.depth)
    return first, Norm(gamma, beta), start, ChunkState(stacks, anchor, rest if plan.has_targets else None)


@dataclass
class _Block:
    """What the backward needs of a block of chunks: their start states and tapes."""

    chunks: range
    states: list[ChunkState]
    writings: list[Writing] | None
    reading: Reading | None


class _Scan(torch.autograd.Function):
    """Inputs after the plan: fields of `Rows`, gamma, beta (with a norm), start, stacks, anchor, targets."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, keep_tape: bool, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        rows, norm, start, state = unpack(plan, Rows, tensors)
        outputs = torch.empty_like(rows.q)
        surprise = rows.q.new_empty(rows.q.shape[:-1] if plan.surprise else (0,))
        blocks: list[_Block] = []
        for chunks in _block_ranges(rows.q):
            states, writings = [], []
            for n in chunks:
                state = _enter(plan, n, state, start)
                stacks, writing = write_chunk(plan.spec, norm, rows.chunk(n), state)
                states.append(state)
                writings.append(writing)
                state = _leave(plan, n, stacks, state)
            place = slice(chunks.start, chunks.stop)
            queries, reading = rows.queries(place), _reading(plan, states, writings)
            if plan.spec.read_mode != "chunk_start":
                _share(states, reading)
            y = read_block(plan.spec, norm, queries, state.targets, reading)
            outputs[:, place] = y.unflatten(0, (-1, len(chunks)))
            if plan.surprise:
                surprise[:, place] = gradient_norm(reading).unflatten(0, (-1, len(chunks)))
            if keep_tape and plan.spec.recompute:
                blocks.append(_Block(chunks, states, None, None))
            elif keep_tape:
                blocks.append(_Block(chunks, states, writings, reading))
        ctx.plan, ctx.blocks = plan, blocks
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(surprise)
        # Autograd needs outputs that are neither inputs nor views of each other; an open anchor is an input.
        return outputs, surprise, *state.stacks, *(a.clone() for a in state.anchor)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, g_outputs: Tensor, g_surprise: Tensor, *g_final: Tensor
    ) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        rows, norm, _, _ = unpack(plan, Rows, ctx.saved_tensors)
        g_stacks = [g.clone() for g in g_final[: plan.depth]]
        g_anchor: list[Any] = [g.clone() for g in g_final[plan.depth :]]
        total = _Totals(plan, rows)
        for block in reversed(ctx.blocks):
            writings, reading = block.writings, block.reading
            block.writings = block.reading = None
            if writings is None or reading is None:
                writings, reading = _recompute(plan, norm, rows, block)
            place = slice(block.chunks.start, block.chunks.stop)
            seen = read_block_backward(
                plan.spec,
                rows.queries(place),
                block.states[0].targets,
                reading,
                g_outputs[:, place].flatten(0, 1),
                total.sums,
            )
            total.add_queries(place, seen.queries)
            del reading
            for index, n in reversed(list(enumerate(block.chunks))):
                state, writing = block.states[index], writings.pop()
                passed = _leave_backward(plan, n, g_stacks, g_anchor, total.sums)
                reads = _of_chunk(seen, index, len(block.chunks))
                dual = reads if seen.keys else None
                grads = write_chunk_backward(
                    plan.spec, rows.chunk(n), state, writing, g_stacks, dual, total.sums
                )
                total.add(n, grads)
                g_stacks = grads.stacks
                at_anchor = [None] * plan.depth if dual is not None else reads.stacks
                g_anchor = [
                    _sum([g, p, r], a)
                    for g, p, r, a in zip(grads.anchor, passed, at_anchor, state.anchor, strict=True)
                ]
                if plan.resets[n] is not None:
                    g_stacks, g_anchor = total.reset(plan.resets[n], g_stacks, g_anchor)
        shared, targets = total.shared(), total.targets()
        return (None, None, *total.rows(), *shared, *total.start, *g_stacks, *g_anchor, *targets)


def _block_ranges(q: Tensor) -> list[range]:
    """The chunks of q ``[m, N, C, p]`` in blocks that are read together."""
    chunks = q.shape[1]
    budget = CPU_READ_ELEMENTS if q.device.type == "cpu" else READ_ELEMENTS
    size = max(1, budget * chunks // q.numel())
    return [range(first, min(first + size, chunks)) for first in range(0, chunks, size)]


def _reading(plan: Plan, states: list[ChunkState], writings: list[Writing]) -> Reading:
    """What the reads of a block of chunks see: their states, keys and steps as ``[b, ...]``."""

    def join(tensors: list[Tensor]) -> Tensor:
        return tensors[0] if len(tensors) == 1 else torch.stack(tensors, 1).flatten(0, 1)

    layers = range(plan.depth)
    at_start = plan.spec.read_mode == "chunk_start"
    return Reading(
        keys=[join([w.inputs[layer] for w in writings]) for layer in layers],
        steps=[join([w.steps[layer] for w in writings]) for layer in layers],
        stacks=[join([(s.anchor if at_start else s.stacks)[layer] for s in states]) for layer in layers],
    )


def _share(states: list[ChunkState], reading: Reading) -> None:
    """Let the states be views of the joined stacks, so that each is held once."""
    for index, state in enumerate(states):
        state.stacks = [s.unflatten(0, (-1, len(states)))[:, index] for s in reading.stacks]


def _recompute(plan: Plan, norm: Norm, rows: Rows, block: _Block) -> tuple[list[Writing], Reading]:
    writings = [
        write_chunk(plan.spec, norm, rows.chunk(n), state)[1]
        for n, state in zip(block.chunks, block.states, strict=True)
    ]
    reading = _reading(plan, block.states, writings)
    place = slice(block.chunks.start, block.chunks.stop)
    read_block(plan.spec, norm, rows.queries(place), block.states[0].targets, reading)
    return writings, reading


def _of_chunk(seen: BlockGradients, index: int, chunks: int) -> BlockGradients:
    def pick(tensors: Layers) -> Layers:
        return [t.unflatten(0, (-1, chunks))[:, index] for t in tensors]

    return BlockGradients(seen.queries, pick(seen.keys), pick(seen.steps), pick(seen.stacks))


def _sum(parts: list[Tensor | None], like: Tensor) -> Tensor:
    present = [p for p in parts if p is not None]
    if not present:
        return torch.zeros_like(like)
    for part in present[1:]:
        present[0].add_(part)
    return present[0]


def _weights(stacks: Layers, targets: Layers | None) -> Layers:
    """W of every layer: D, and M where there is one."""
    deviations = [s[:, 0] for s in stacks]
    return deviations if targets is None else [d + m for d, m in zip(deviations, targets, strict=True)]


def _enter(plan: Plan, n: int, state: ChunkState, start: Layers) -> ChunkState:
    fresh = plan.resets[n]
    if fresh is None:
        return state
    stacks = [torch.where(fresh.unsqueeze(-1), s, c) for s, c in zip(start, state.stacks, strict=True)]
    weights = _weights(start, state.targets)
    anchor = [torch.where(fresh, w, a) for w, a in zip(weights, state.anchor, strict=True)]
    return ChunkState(stacks, anchor, state.targets)


def _leave(plan: Plan, n: int, stacks: Layers, before: ChunkState) -> ChunkState:
    """The state of the next chunk, whose anchor is W where this one closes."""
    closed = plan.closes[n]
    if closed is False:
        return ChunkState(stacks, before.anchor, before.targets)
    anchor = _weights(stacks, before.targets)
    if closed is not True:
        anchor = [torch.where(closed, w, a) for w, a in zip(anchor, before.anchor, strict=True)]
    return ChunkState(stacks, anchor, before.targets)


def _leave_backward(
    plan: Plan, n: int, g_stacks: Layers, g_anchor: Layers, sums: Sums
) -> list[Tensor | None]:
    """Reverse of `_leave`: adds to the gradient of D in place; returns what passes to the anchor before."""
    closed = plan.closes[n]
    if closed is False:
        return list(g_anchor)
    moved = g_anchor if closed is True else [torch.where(closed, g, 0.0) for g in g_anchor]
    _weights_backward(plan, moved, g_stacks, sums)
    return [None] * plan.depth if closed is True else [torch.where(closed, 0.0, g) for g in g_anchor]


def _weights_backward(plan: Plan, g_weights: Layers, g_stacks: Layers, sums: Sums) -> None:
    """Reverse of `_weights`: adds to the gradients of the components in place."""
    for layer, g in enumerate(g_weights):
        g_stacks[layer][:, 0].add_(g)
        if plan.has_targets:
            sums.add_target(layer, g)


class _Totals:
    """Gradients summed over the chunks, laid out as the inputs of `_Scan`."""

    def __init__(self, plan: Plan, rows: Rows):
        self.plan = plan
        self.sums = Sums()
        self.start: list[Any] = [None] * plan.depth
        self._like = rows
        self._rows: dict[str, Tensor] = {}

    def add_queries(self, block: slice, grads: Queries) -> None:
        for name, value in grads._asdict().items():
            if value is not None:
                self._place(name)[:, block] = value.unflatten(0, (-1, block.stop - block.start))

    def add(self, n: int, grads: ChunkGradients) -> None:
        for name, value in grads.rows.items():
            self._place(name)[:, n] = value

    def _place(self, name: str) -> Tensor:
        if name not in self._rows:
            self._rows[name] = torch.empty_like(getattr(self._like, name))
        return self._rows[name]

    def reset(self, fresh: Any, g_stacks: Layers, g_anchor: Layers) -> tuple[Layers, Layers]:
        """Reverse of `_enter`: what flows to the start is summed, the rest goes on to the chunk before."""
        whole = fresh.unsqueeze(-1)
        parts = [torch.where(whole, g, 0.0) for g in g_stacks]
        _weights_backward(self.plan, [torch.where(fresh, g, 0.0) for g in g_anchor], parts, self.sums)
        for layer, part in enumerate(parts):
            present = self.start[layer]
            self.start[layer] = part if present is None else present.add_(part)
        return [torch.where(whole, 0.0, g) for g in g_stacks], [torch.where(fresh, 0.0, g) for g in g_anchor]

    def rows(self) -> list[Tensor | None]:
        return [self._rows.get(name) for name in Rows._fields]

    def shared(self) -> list[Tensor | None]:
        return [self.sums.gamma, self.sums.beta] if self.plan.has_norm else []

    def targets(self) -> list[Tensor | None]:
        layers = range(self.plan.depth if self.plan.has_targets else 0)
        return [self.sums.targets.get(layer) for layer in layers]
