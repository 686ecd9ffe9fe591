"""The walk over the chunks of a call, forward and backward, as one autograd function."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nestor.ops.neural_memory.chunked import (
    ChunkState,
    Gradients,
    Layers,
    Norm,
    Rows,
    Tape,
    backward_chunk,
    forward_chunk,
    gradient_norm,
)
from nestor.ops.neural_memory.spec import MemorySpec


@dataclass(frozen=True)
class Plan:
    """How to walk: for each chunk whether it starts with a reset and whether it closes (see `ChunkGrid`).

    Masks are None, a bool, or bool ``[m, 1, 1]``. written: the number of leading components (W, or W and S)
    that a reset restores and a call returns; the rest (M) are constant.
    """

    spec: MemorySpec
    depth: int
    written: int
    resets: list[Tensor | None]
    closes: list[bool | Tensor]
    has_norm: bool
    surprise: bool


def scan(
    plan: Plan, rows: Rows, norm: Norm, start: Layers, state: ChunkState
) -> tuple[Tensor, Tensor, ChunkState]:
    """Walk the chunks.

    rows has a leading n; start: per layer the components ``[m, c, in, out]`` that a reset restores. Returns
    outputs ``[n, m, C, p]``, the inner gradients' norms ``[n, m, C]`` (empty unless asked for) and the final
    state.
    """
    slow = [norm.gamma, norm.beta] if plan.has_norm else []
    tensors = [*rows, *slow, *start, *state.stacks, *state.anchor]
    keep_tape = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    outputs, surprise, *final = _Scan.apply(plan, keep_tape, *tensors)
    return outputs, surprise, ChunkState(final[: plan.depth], final[plan.depth :])


class _Scan(torch.autograd.Function):
    """Inputs after the plan: the fields of `Rows`, gamma, beta (with a norm), start, stacks, anchor."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, keep_tape: bool, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        rows, norm, start, state = _unpack(plan, tensors)
        outputs = torch.empty_like(rows.q)
        surprise = rows.q.new_empty(rows.q.shape[:-1] if plan.surprise else (0,))
        states: list[ChunkState] = []
        tapes: list[Tape | None] = []
        for n in range(rows.q.shape[0]):
            state = _enter(plan, n, state, start)
            outputs[n], after, tape = forward_chunk(plan.spec, norm, rows.chunk(n), state)
            if plan.surprise:
                surprise[n] = gradient_norm(tape)
            if keep_tape:
                states.append(state)
                tapes.append(None if plan.spec.recompute else tape)
            state = _leave(plan, n, after)
        ctx.plan, ctx.states, ctx.tapes = plan, states, tapes
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
        rows, norm, _, _ = _unpack(plan, ctx.saved_tensors)
        g_stacks = [g.clone() for g in g_final[: plan.depth]]
        g_anchor = [g.clone() for g in g_final[plan.depth :]]
        total = _Totals(plan, rows, norm)
        for n in range(rows.q.shape[0] - 1, -1, -1):
            state, tape, chunk = ctx.states[n], ctx.tapes[n], rows.chunk(n)
            if tape is None:
                _, _, tape = forward_chunk(plan.spec, norm, chunk, state)
            ctx.tapes[n] = None
            passed = _leave_backward(plan, n, g_stacks, g_anchor)
            grads = backward_chunk(plan.spec, chunk, state, tape, g_outputs[n], g_stacks)
            total.add(n, grads)
            g_stacks = grads.stacks
            g_anchor = [_sum(g, p, a) for g, p, a in zip(grads.anchor, passed, state.anchor, strict=True)]
            if plan.resets[n] is not None:
                g_stacks, g_anchor = total.reset(plan.resets[n], g_stacks, g_anchor)
        return (None, None, *total.rows(), *total.norm(), *total.start, *g_stacks, *g_anchor)


def _sum(a: Tensor | None, b: Tensor | None, like: Tensor) -> Tensor:
    if a is None or b is None:
        present = a if b is None else b
        return torch.zeros_like(like) if present is None else present
    return a.add_(b)


def _unpack(plan: Plan, tensors: tuple[Tensor | None, ...]) -> tuple[Rows, Norm, Layers, ChunkState]:
    rest: list[Any] = list(tensors)

    def take(n: int) -> list[Any]:
        head, rest[:] = rest[:n], rest[n:]
        return head

    rows = Rows(*take(len(Rows._fields)))
    gamma, beta = take(2) if plan.has_norm else (None, None)
    start = take(plan.depth)
    return rows, Norm(gamma, beta), start, ChunkState(take(plan.depth), take(plan.depth))


def _enter(plan: Plan, n: int, state: ChunkState, start: Layers) -> ChunkState:
    fresh = plan.resets[n]
    if fresh is None:
        return state
    stacks = [torch.where(fresh.unsqueeze(-1), s, c) for s, c in zip(start, state.stacks, strict=True)]
    anchor = [torch.where(fresh, s[:, 0], a) for s, a in zip(start, state.anchor, strict=True)]
    return ChunkState(stacks, anchor)


def _leave(plan: Plan, n: int, state: ChunkState) -> ChunkState:
    closed = plan.closes[n]
    if closed is False:
        return state
    weights = [s[:, 0] for s in state.stacks]
    if closed is True:
        return ChunkState(state.stacks, weights)
    anchor = [torch.where(closed, w, a) for w, a in zip(weights, state.anchor, strict=True)]
    return ChunkState(state.stacks, anchor)


def _leave_backward(plan: Plan, n: int, g_stacks: Layers, g_anchor: Layers) -> list[Tensor | None]:
    """Reverse of `_leave`: adds to the gradient of W in place; returns what passes to the anchor before."""
    closed = plan.closes[n]
    if closed is False:
        return list(g_anchor)
    if closed is True:
        for g_s, g_a in zip(g_stacks, g_anchor, strict=True):
            g_s[:, 0].add_(g_a)
        return [None] * len(g_anchor)
    for g_s, g_a in zip(g_stacks, g_anchor, strict=True):
        g_s[:, 0].add_(torch.where(closed, g_a, 0.0))
    return [torch.where(closed, 0.0, g_a) for g_a in g_anchor]


class _Totals:
    """Gradients summed over the chunks, laid out as the inputs of `_Scan`."""

    def __init__(self, plan: Plan, rows: Rows, norm: Norm):
        self.plan = plan
        self._like = rows
        self._rows: dict[str, Tensor] = {}
        self._gamma, self._beta = norm.gamma, norm.beta
        self._g_gamma: Tensor | None = None
        self._g_beta: Tensor | None = None
        self.start: list[Tensor | None] = [None] * plan.depth

    def add(self, n: int, grads: Gradients) -> None:
        for name, value in grads.rows.items():
            if name not in self._rows:
                self._rows[name] = torch.empty_like(getattr(self._like, name))
            self._rows[name][n] = value
        if grads.gamma is not None:
            self._g_gamma = grads.gamma if self._g_gamma is None else self._g_gamma.add_(grads.gamma)
        if grads.beta is not None:
            self._g_beta = grads.beta if self._g_beta is None else self._g_beta.add_(grads.beta)

    def reset(self, fresh: Any, g_stacks: Layers, g_anchor: list[Tensor]) -> tuple[Layers, Layers]:
        """Reverse of `_enter`: what flows to the start is summed, the rest goes on to the chunk before."""
        whole = fresh.unsqueeze(-1)
        for layer in range(self.plan.depth):
            part = torch.where(whole, g_stacks[layer], 0.0)
            part[:, 0].add_(torch.where(fresh, g_anchor[layer], 0.0))
            present = self.start[layer]
            self.start[layer] = part if present is None else present.add_(part)
        return [torch.where(whole, 0.0, g) for g in g_stacks], [torch.where(fresh, 0.0, g) for g in g_anchor]

    def rows(self) -> list[Tensor | None]:
        return [self._rows.get(name) for name in Rows._fields]

    def norm(self) -> list[Tensor | None]:
        return [self._g_gamma, self._g_beta] if self.plan.has_norm else []
