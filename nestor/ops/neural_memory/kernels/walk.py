"""The kernels in order, as two PyTorch operators: the memory of a whole call, and its gradient.

Forward: coefficients of all chunks; then, a span of chunks at a time, the writes (chunk after chunk) and
the reads (all chunks at once). Kept for the backward are inputs, the reads' standardised outputs, and a
checkpoint of the state every INTERVAL chunks, from which the backward writes each span's states again: all
of a span's intervals at once. What is as large as chunks x weights exists for one span only.

Fast weights are packed: ``[M, Q, P HIDDEN]`` for M = sequences x heads and the Q parts W1, W2, S1, S2
(without momentum W1, W2). ``[H, ...]`` is shared by the sequences.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from nestor.ops.beside import Stages
from nestor.ops.kernels import most_warps
from nestor.ops.neural_memory.kernels import tiled
from nestor.ops.neural_memory.kernels.calls import (
    BACKWARD_SPAN,
    FORWARD_SPAN,
    INTERVAL,
    Call,
    Inputs,
    attach_autograd,
    gradients_like,
    outputs_like,
    span_of,
    strides,
)
from nestor.ops.neural_memory.kernels.read import read_backward_kernel, read_kernel
from nestor.ops.neural_memory.kernels.write import (
    target_gradients_kernel,
    write_backward_kernel,
    write_gradients_kernel,
    write_kernel,
)
from nestor.ops.operators import operator

# Hidden width of one program of a walk, of one turn of a read, and of one turn of the other kernels.
SLICES = {"write": 64, "read": 64, "chunk": 64}
# Each kernel, the warps of its programs, and the name of its slices.
KERNELS: dict[str, tuple[Any, int, str]] = {
    "write": (write_kernel, 8, "write"),
    "read": (read_kernel, 4, "read"),
    "read_backward": (read_backward_kernel, 8, "chunk"),
    "write_backward": (write_backward_kernel, 8, "write"),
    "write_gradients": (write_gradients_kernel, 8, "chunk"),
}
TARGET_BLOCK = 1024

# Of the sizes that kernels take.
FIRST_CHUNK = 4
# Queues a kernel, of a grid and the first chunk of a span.
_Queue = Callable[[tuple[int, ...], int], None]
# Queues work on a span, of its first chunk.
_Step = Callable[[int], None]


class _Writes(NamedTuple):
    """What the gradient of a span's writes needs; what of it comes from the reads (g_states .. read_k); and
    what it adds to or leaves (carried, the gradient of the state between spans, .. g_start)."""

    ends: Tensor
    last: Tensor
    states: Tensor
    steps: Tensor
    hidden: Tensor
    zh: Tensor
    norm: Tensor
    g_states: Tensor
    g_targets_read: Tensor
    g_u1: Tensor
    g_x2: Tensor
    g_u2: Tensor
    read_k: Tensor
    carried: Tensor
    g_targets: Tensor
    g_k: Tensor
    g_v: Tensor
    g_steps: Tensor
    g_anchor: Tensor
    g_start: Tensor
    g_ends: Tensor
    g_last: Tensor
    g_norms: Tensor


class _Walk(Call):
    """Choices and launches of one call."""

    def __init__(
        self, inputs: Inputs, chunk: int, hidden: int, activation: int, norm: int, loss: int, dual: bool,
        eps: float, scale: float, threshold: float,
    ) -> None:  # fmt: skip
        width = inputs.q.shape[-1]
        super().__init__(inputs, chunk, 2, width * hidden)
        self.hidden, self.dual, self.numbers = hidden, dual, (eps, scale, threshold)
        exact = self.q.dtype == torch.float32
        precision = "tf32x3" if exact else "tf32"
        self.shape = {"C": chunk, "P": width, "HIDDEN": hidden, "PRECISION": precision}
        self.network = {"NORM": norm, "MOMENTUM": self.momentum, "TARGET": self.targets is not None}
        self.activation, self.loss = {"ACTIVATION": activation}, {"LOSS": loss}
        self.events = {"HAS_RESETS": self.resets is not None, "HAS_OPEN": self.opened is not None}
        self.tiled = tiled.covers(self.q.device, self.q.dtype, chunk, width, hidden)
        # Targets as the kernels want them.
        self.operands = self.targets
        if self.tiled:
            self.q, self.k, self.v = (tiled.aligned(x) for x in (self.q, self.k, self.v))
            self.gamma, self.beta = (
                x if x is None or tiled.begins_aligned(x) else x.clone() for x in (self.gamma, self.beta)
            )
            self.operands = None if self.targets is None else tiled.targets_as_tiles(self.targets)
        self.slices = {name: min(32 if exact else size, hidden) for name, size in SLICES.items()}
        if width > 64:
            self.slices["write"] = min(self.slices["write"], 32)
        # Tokens of a chunk whose reads the backward takes at a time.
        self.queries = chunk
        if chunk == 128:
            self.queries = 64 if width <= 64 else 32
            self.slices["chunk"] = min(self.slices["chunk"], self.queries)
        self.split = hidden // (tiled.TILE if self.tiled else self.slices["write"])
        # Parts in which walks follow each other, so that other kernels run beside them; 0: none do.
        self.lanes = tiled.lanes(self.walks, self.split, self.q.device) if self.tiled else 0

    def prepare(
        self, name: str, tensors: tuple[Any, ...], of: tuple[Tensor, ...], span: int,
        sizes: tuple[int, ...] = (), numbers: tuple[float, ...] = (), programs: int = 1, lanes: int = 0,
        **choices: Any,
    ) -> _Queue:  # fmt: skip
        """A kernel, in CUDA or Triton, and its arguments: tensors, strides `of` some, sizes, numbers.

        programs: of a walk, in the largest grid. lanes: of a walk, parts that follow each other; 0: one.
        """
        steps = tuple(step for x in of for step in strides(x))
        sizes = (self.walks, self.heads, self.chunks, self.tokens, 0, span, *sizes)
        choices = self.network | choices
        if self.tiled:
            choices |= {"SPLIT": self.split, **self.activation}
            walk = name in tiled.WALK_TILES
            run = tiled.prepare(
                name, programs // max(lanes, 1), choices, tensors, steps, (*sizes, 0) if walk else sizes,
                numbers, self.q.device,
            )  # fmt: skip
            return functools.partial(self._queue_tiled, run, len(sizes), lanes if walk else 0)
        if name == "read_backward":
            choices |= {"QUERIES": self.queries}
        return functools.partial(self._queue_triton, name, tensors, steps, sizes, numbers, choices)

    def _queue_tiled(
        self, run: tiled.Queue, first_walk: int, lanes: int, grid: tuple[int, ...], first: int
    ) -> None:
        if lanes == 0:
            run(grid, ((FIRST_CHUNK, first),))
            return
        programs = -(-(grid[0] // self.split) // lanes) * self.split
        for begin in range(0, grid[0], programs):
            part = (min(programs, grid[0] - begin),)
            run(part, ((FIRST_CHUNK, first), (first_walk, begin // self.split)))

    def _queue_triton(
        self, name: str, tensors: tuple[Any, ...], steps: tuple[int, ...], sizes: tuple[int, ...],
        numbers: tuple[float, ...], choices: dict[str, Any], grid: tuple[int, ...], first: int,
    ) -> None:  # fmt: skip
        kernel, warps, width = KERNELS[name]
        if name in tiled.WALK_TILES:
            tensors += self.meeting(grid[0] // self.split, self.split)
        sizes = (*sizes[:FIRST_CHUNK], first, *sizes[FIRST_CHUNK + 1 :])
        kernel[grid](
            *tensors, *steps, *sizes, *numbers, **self.shape,
            HS=self.slices[width], **choices, num_warps=min(warps, most_warps(self.q)), num_stages=1,
        )  # fmt: skip

    def written(self, span: int, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Room for what `write` leaves of a span: states and steps; unless `save` also hidden, zh and norm
        (see write.py)."""
        m, c, p = self.walks, self.chunk, self.width
        states, steps = self.new(m, span, self.parts, self.size), self.new(m, span, c, p)
        if save:
            return states, steps, steps, steps, steps
        hidden, zh = self.new(4, m, span, c, self.hidden), self.new(m, span, c, p)
        return states, steps, hidden, zh, self.floats(m, span, 2, c)

    def write(
        self, room: tuple[Tensor, ...], checkpoints: Tensor, ends: Tensor, last: Tensor,
        anchor: Tensor | None, span: int, rows: int, save: bool,
    ) -> _Step:  # fmt: skip
        """Walk a span, from checkpoints that are `rows` chunks apart; leave what `written` has room for."""
        programs = self.walks * self.split
        queue = self.prepare(
            "write", (self.k, self.v, ends, last, checkpoints, *room, self.operands, self.gamma, self.beta,
                      self.start, self.resets, self.opened, anchor),
            (self.k, self.v), span, (INTERVAL, rows), self.numbers, programs * (span // rows),
            self.lanes if save else 0, **self.activation, **self.loss,
            **{**self.events, "HAS_OPEN": self.opened is not None and save}, SAVE=save,
        )  # fmt: skip

        def run(first: int) -> None:
            queue((programs * -(-min(span, self.chunks - first) // rows),), first)

        return run

    def walk_back(self, tensors: tuple[Any, ...], span: int) -> _Step:
        """The gradients of a span's writes, from its last chunk to its first."""
        programs = self.walks * self.split
        queue = self.prepare(
            "write_backward", tensors, (self.k, self.v), span, (), self.numbers[1:], programs, self.lanes,
            **self.loss, **self.events, READS=self.dual,
        )  # fmt: skip
        return lambda first: queue((programs,), first)

    def chunkwise(
        self, name: str, tensors: tuple[Any, ...], of: tuple[Tensor, ...], span: int,
        numbers: tuple[float, ...] = (), **choices: Any,
    ) -> _Step:  # fmt: skip
        """A kernel with a program for each chunk of a span, of each walk."""
        queue = self.prepare(name, tensors, of, span, (), numbers, **choices)
        return lambda first: queue((min(span, self.chunks - first), self.walks), first)

    def forward(self, state: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """y, the final state, the anchor of open chunks, checkpoints, z and r (see read.py)."""
        m, n, c, p = self.walks, self.chunks, self.chunk, self.width
        rows, ends, last, G, _ = self.coefficients(keep=False)
        y = self.q.new_empty(self.q.shape)
        checkpoints = self.floats(-(-n // INTERVAL) + 1, m, self.parts, self.size)
        checkpoints[0] = self.moved(state, -1)
        anchor = self.floats(m, 2, self.size) if self.opened is not None else self.floats(0)
        z, r = (self.new(m, n, c, p), self.floats(m, n, c)) if keep else (self.new(0), self.floats(0))
        span, rooms, stages = self.stages(FORWARD_SPAN)

        def kernels() -> tuple[_Step, _Step]:
            room = self.written(span, True)
            write = self.write(room, checkpoints, ends, last, anchor, span, span, True)
            read = self.chunkwise(
                "read", (self.q, self.k, rows, G, *room[:2], self.operands, self.gamma, self.beta, y, z, r),
                (self.q, self.k, y), span, self.numbers[:1], **self.activation, DUAL=self.dual, KEEP=keep,
            )  # fmt: skip
            return write, read

        steps = [kernels() for _ in range(rooms)]
        # When the reads have had what lies in a room.
        free = [stages.mark()] * rooms
        with stages:
            for index, first in enumerate(range(0, n, span)):
                room = index % rooms
                write, read = steps[room]
                with stages.side():
                    stages.wait(free[room])
                    write(first)
                    written = stages.mark()
                stages.wait(written)
                read(first)
                free[room] = stages.mark()
        if self.opened is not None:
            anchor = self.moved(anchor, 1)
        return y, self.moved(checkpoints[-1], 1), anchor, checkpoints, z, r

    def stages(self, budgets: tuple[int, int]) -> tuple[int, int, Stages]:
        """Chunks of a span, rooms for what its kernels leave for each other, and their queues. Where there
        are lanes, the walks of a span run beside other kernels of the next one or of the last.
        """
        rooms = 2 if self.lanes else 1
        span = span_of(budgets[rooms - 1], self.walks, self.chunks)
        return span, rooms, Stages(self.q.device, two=self.lanes > 0)

    def triton_writes_backward(self, w: _Writes, span: int) -> tuple[_Step, _Step]:
        """From the gradients of the reads of a span to those of its writes, see `_Writes`: the walk, and what
        waits for no other span."""
        m, c, length = self.walks, self.chunk, 2 * self.size
        after, g_z1 = self.new(m, span, self.parts, self.size), self.new(m, span, c, self.hidden)
        walk = self.walk_back(
            (self.k, self.v, w.ends, w.last, w.states, w.steps, w.hidden, w.zh, w.norm, self.operands,
             self.gamma, self.beta, self.resets, self.opened, w.g_states, w.g_u1, w.g_x2, w.g_u2,
             w.carried, after, g_z1, w.g_steps, w.g_anchor, w.g_start), span,
        )  # fmt: skip
        gradients = self.chunkwise(
            "write_gradients",
            (self.k, self.v, w.ends, w.states, w.steps, w.hidden, w.zh, w.norm, self.operands, self.gamma,
             self.beta, after, g_z1, w.g_steps, w.read_k, w.g_k, w.g_v, w.g_ends, w.g_last, w.g_norms),
            (self.k, self.v, w.g_k), span, self.numbers[1:], **self.loss, READS=self.dual,
        )  # fmt: skip

        def rest(first: int) -> None:
            gradients(first)
            if self.targets is not None:
                target_gradients_kernel[(triton.cdiv(length, TARGET_BLOCK), m)](
                    w.last, after, w.g_targets_read, w.g_targets, m, self.chunks, first,
                    min(span, self.chunks - first), span, length, self.parts * self.size,
                    BLOCK=TARGET_BLOCK, READS=self.dual,
                )  # fmt: skip

        return walk, rest

    def cuda_writes_backward(self, w: _Writes, span: int) -> tuple[_Step, _Step]:
        """The same in CUDA, where the walk makes more of the gradients."""
        m, c, p, split = self.walks, self.chunk, self.width, self.split
        # Parts of each program of a walk; of ends those of halves of its columns, of last those of its warps.
        parts = (
            self.new(m, span, split, c, p),
            self.floats(m, span, split, 2, 2, c),
            self.floats(m, span, split, 8, 4),
        )
        walk = self.walk_back(
            (self.k, self.v, w.ends, w.last, w.states, w.steps, w.hidden, w.zh, w.norm, self.operands,
             self.gamma, self.beta, self.resets, self.opened, w.g_states, w.g_targets_read, w.g_u1,
             w.g_x2, w.g_u2, w.carried, w.g_targets, *parts, w.g_steps, w.g_anchor, w.g_start), span,
        )  # fmt: skip
        rest = self.chunkwise(
            "write_gradients",
            (self.k, self.v, w.zh, w.norm, self.gamma, self.beta, w.g_steps, *parts, w.read_k,
             w.g_k, w.g_v, w.g_ends, w.g_last, w.g_norms),
            (self.k, self.v, w.g_k), span, self.numbers[1:], **self.loss, READS=self.dual,
        )  # fmt: skip
        return walk, rest

    def backward(
        self, checkpoints: Tensor, z: Tensor, r: Tensor, g_y: Tensor, g_final: Tensor, g_anchor: Tensor
    ) -> tuple[Tensor, ...]:
        """Gradients of q, k, v, theta, eta, alpha, state, targets, start, gamma, beta (empty: none)."""
        m, n, c, p = self.walks, self.chunks, self.chunk, self.width
        heads, parts, size = self.heads, self.parts, self.size
        rows, ends, last, G, E = self.coefficients(keep=True)
        nothing = self.floats(0)
        g_q, g_k, g_v = (self.q.new_empty(self.q.shape) for _ in range(3))
        g_gates = [nothing if g is None else g.new_empty(g.shape) for g in (self.theta, self.eta, self.alpha)]
        carried = g_final.clone()
        g_y = tiled.aligned(g_y) if self.tiled else g_y
        has_targets = self.targets is not None
        g_targets = self.zeros(1 if self.tiled else 2, m, 2 * size) if has_targets else nothing
        g_start = torch.zeros_like(g_final) if self.resets is not None else nothing
        span, rooms, stages = self.stages(BACKWARD_SPAN)
        g_rows, g_G, g_ends, g_last, g_norms = self.collected(self.dual)
        writes_backward = self.cuda_writes_backward if self.tiled else self.triton_writes_backward

        def kernels() -> tuple[_Step, _Step, _Step, _Step]:
            g_targets_read = self.new(m, span, 2 * size) if has_targets and self.dual else nothing
            g_u1 = g_x2 = g_u2 = nothing
            if self.dual:
                g_u1, g_x2 = self.new(m, span, c, self.hidden), self.new(m, span, c, self.hidden)
                g_u2 = self.new(m, span, c, p)
            room = states, steps, hidden, _, _ = self.written(span, False)
            w = _Writes(
                ends, last, *room, g_states=self.new(m, span, parts, size), g_targets_read=g_targets_read,
                g_u1=g_u1, g_x2=g_x2, g_u2=g_u2, read_k=self.new(m, span, c, p), carried=carried,
                g_targets=g_targets, g_k=g_k, g_v=g_v, g_steps=self.floats(m, span, c, p), g_anchor=g_anchor,
                g_start=g_start, g_ends=g_ends, g_last=g_last, g_norms=g_norms,
            )  # fmt: skip
            read = self.chunkwise(
                "read_backward",
                (self.q, self.k, rows, G, states, steps, hidden, self.operands, self.gamma, z, r, g_y,
                 g_q, w.read_k, g_rows, g_G, w.g_states, g_targets_read, g_u1, g_x2, g_u2, g_norms),
                (self.q, self.k, g_y, g_q), span, (), **self.activation, DUAL=self.dual,
            )  # fmt: skip
            write = self.write(room, checkpoints, ends, last, None, span, INTERVAL, False)
            return write, read, *writes_backward(w, span)

        # What the kernels of a span leave for each other lies where that of an earlier span lay.
        steps = [kernels() for _ in range(rooms)]
        walked: list[tuple[Any, _Step, int]] = []

        def finish(mark: Any, rest: _Step, first: int) -> None:
            stages.wait(mark)
            rest(first)

        with stages:
            for index, first in enumerate(reversed(range(0, n, span))):
                write, read, walk, rest = steps[index % rooms]
                write(first)
                read(first)
                done = stages.mark()
                with stages.side():
                    stages.wait(done)
                    walk(first)
                    walked.append((stages.mark(), rest, first))
                if len(walked) == rooms:
                    finish(*walked.pop(0))
            for one in walked:
                finish(*one)
        self.gate_gradients(g_gates, rows, G, E, g_rows, g_G, g_ends, g_last, self.dual)
        g_shared = self.norm_gradients(g_norms)
        if has_targets:
            g_targets = g_targets.view(-1, self.batch, heads, 2 * size).sum((0, 1))
            g_targets = tiled.targets_from_fragments(g_targets) if self.tiled else g_targets
            g_targets = g_targets.unflatten(1, (2, size))
        if self.resets is not None:
            g_start = g_start.view(self.batch, heads, parts, size).sum(0)
        return (g_q, g_k, g_v, *g_gates, carried, g_targets, g_start, *g_shared)


@operator("memory_walk")
def memory_walk(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, eta: Tensor | None, alpha: Tensor | None, state: Tensor,
    targets: Tensor | None, start: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    valid: Tensor | None, resets: Tensor | None, opened: Tensor | None,
    chunk: int, hidden: int, activation: int, norm: int, loss: int, dual: bool,
    eps: float, scale: float, threshold: float, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Outputs ``[B, T, H, p]``, the final state, the anchor of open chunks, and what the backward needs:
    checkpoints, z, r (the last two empty unless `keep`). Arguments as in write.py and read.py."""
    inputs = Inputs(q, k, v, theta, eta, alpha, targets, start, gamma, beta, valid, resets, opened)
    walk = _Walk(inputs, chunk, hidden, activation, norm, loss, dual, eps, scale, threshold)
    return walk.forward(state, keep)


@operator("memory_walk_backward")
def memory_walk_backward(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, eta: Tensor | None, alpha: Tensor | None,
    targets: Tensor | None, start: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    valid: Tensor | None, resets: Tensor | None, opened: Tensor | None,
    checkpoints: Tensor, z: Tensor, r: Tensor, g_y: Tensor, g_final: Tensor, g_anchor: Tensor,
    chunk: int, hidden: int, activation: int, norm: int, loss: int, dual: bool,
    eps: float, scale: float, threshold: float,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, theta, eta, alpha, state, targets, start, gamma, beta; empty: none."""
    inputs = Inputs(q, k, v, theta, eta, alpha, targets, start, gamma, beta, valid, resets, opened)
    walk = _Walk(inputs, chunk, hidden, activation, norm, loss, dual, eps, scale, threshold)
    found = walk.backward(checkpoints, z, r, g_y, g_final, g_anchor)
    # What an operator returns must not share memory, not even none.
    return [g if g.numel() else g.clone() for g in found]


@memory_walk.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, eta: Tensor | None, alpha: Tensor | None, state: Tensor,
    targets: Tensor | None, start: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    valid: Tensor | None, resets: Tensor | None, opened: Tensor | None,
    chunk: int, hidden: int, activation: int, norm: int, loss: int, dual: bool,
    eps: float, scale: float, threshold: float, keep: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return outputs_like(q, eta, state, opened, chunk, keep)


@memory_walk_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, eta: Tensor | None, alpha: Tensor | None,
    targets: Tensor | None, start: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    valid: Tensor | None, resets: Tensor | None, opened: Tensor | None,
    checkpoints: Tensor, z: Tensor, r: Tensor, g_y: Tensor, g_final: Tensor, g_anchor: Tensor,
    chunk: int, hidden: int, activation: int, norm: int, loss: int, dual: bool,
    eps: float, scale: float, threshold: float,
) -> list[Tensor]:  # fmt: skip
    return gradients_like(q, (theta, eta, alpha), g_final, targets, start, (gamma, beta), resets)


attach_autograd(memory_walk, memory_walk_backward)
