"""The kernels in order, as two PyTorch operators: the memory of a whole call, and its gradient.

Forward: coefficients of all chunks; then, a span of chunks at a time, the writes (chunk after chunk) and
the reads (all chunks at once). Kept for the backward are inputs, the reads' standardised outputs, and a
checkpoint of the state every INTERVAL chunks, from which the backward writes each span's states again: all
of a span's intervals at once. What is as large as chunks x weights exists for one span only.

Fast weights are packed: ``[M, Q, P HIDDEN]`` for M = sequences x heads and the Q parts W1, W2, S1, S2
(without momentum W1, W2). ``[H, ...]`` is shared by the sequences.
"""

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from nestor.ops.neural_memory.kernels import tiled
from nestor.ops.neural_memory.kernels.calls import most_warps
from nestor.ops.neural_memory.kernels.coefficients import coefficients_backward_kernel, coefficients_kernel
from nestor.ops.neural_memory.kernels.read import read_backward_kernel, read_kernel
from nestor.ops.neural_memory.kernels.write import (
    target_gradients_kernel,
    write_backward_kernel,
    write_gradients_kernel,
    write_kernel,
)

INTERVAL = 8
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
# Chunks of one head that a span holds, over all sequences and heads.
FORWARD_SPAN = 4096
BACKWARD_SPAN = 1024


def _span(budget: int, walks: int, chunks: int) -> int:
    whole = -(-chunks // INTERVAL) * INTERVAL
    return min(whole, max(INTERVAL, budget // walks // INTERVAL * INTERVAL))


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


class _Walk:
    """Sizes, choices and launches of one call."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, theta: Tensor, eta: Tensor | None, alpha: Tensor | None,
        targets: Tensor | None, start: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
        valid: Tensor | None, resets: Tensor | None, opened: Tensor | None,
        chunk: int, hidden: int, activation: int, norm: int, loss: int, dual: bool,
        eps: float, scale: float, threshold: float,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v, self.theta, self.eta, self.alpha = q, k, v, theta, eta, alpha
        self.targets, self.gamma, self.beta = targets, gamma, beta
        self.valid, self.resets, self.opened = valid, resets, opened
        self.batch, self.tokens, self.heads, self.width = q.shape
        self.chunk, self.hidden, self.dual = chunk, hidden, dual
        self.walks, self.chunks = self.batch * self.heads, -(-self.tokens // chunk)
        self.momentum, self.parts = eta is not None, 4 if eta is not None else 2
        self.size = self.width * hidden
        self.numbers = (eps, scale, threshold)
        precision = "tf32x3" if q.dtype == torch.float32 else "tf32"
        self.shape = {"C": chunk, "P": self.width, "HIDDEN": hidden, "PRECISION": precision}
        self.network = {"ACTIVATION": activation, "NORM": norm, "MOMENTUM": self.momentum}
        self.network["TARGET"] = targets is not None
        self.loss = {"LOSS": loss, "HAS_RESETS": resets is not None, "HAS_OPEN": opened is not None}
        self.gates = {"C": chunk, "MOMENTUM": self.momentum, "FORGET": alpha is not None}
        self.gates["MASKED"] = valid is not None
        self.tiled = tiled.covers(q.device, q.dtype, chunk, self.width, hidden, dual)
        if self.tiled:
            self.q, self.k, self.v = (tiled.aligned(x) for x in (q, k, v))
        # Targets as the kernels want them.
        self.operands = tiled.targets_as_tiles(targets) if self.tiled and targets is not None else targets
        self.slices = {name: min(width, hidden) for name, width in SLICES.items()}
        if q.dtype == torch.float32:
            self.slices = {name: min(width, 32) for name, width in self.slices.items()}
        elif self.width > 64:
            self.slices["write"] = min(self.slices["write"], 32)
        elif chunk > 64:
            self.slices["chunk"] = min(self.slices["chunk"], 32)
        self.split = hidden // (tiled.TILE if self.tiled else self.slices["write"])
        self.start = None if start is None else self.moved(start, -1)

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.q.new_empty(shape, dtype=dtype or self.q.dtype)

    def floats(self, *shape: int) -> Tensor:
        return self.new(*shape, dtype=torch.float32)

    def moved(self, state: Tensor, sign: int) -> Tensor:
        """A state ``[rows, .., P HIDDEN]`` with W as the kernels keep it, W - M (sign -1), or back (1)."""
        if self.targets is None:
            return state.clone()
        rows = state.view(-1, self.heads, *state.shape[1:])
        weights = torch.add(rows[:, :, :2], self.targets, alpha=sign)
        return torch.cat((weights, rows[:, :, 2:]), 2).view(state.shape)

    def meeting(self, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where the programs of a walk meet: exchange, arrivals, ticket."""
        size = groups * 2 * self.split * self.chunk * self.width if self.split > 1 else 1
        counters = torch.zeros(groups + 1, dtype=torch.int32, device=self.q.device)
        return self.floats(size), counters, counters[groups:]

    def coefficients(self, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """rows, ends, last, G, and E if it is to be kept (see coefficients.py)."""
        m, n, c = self.walks, self.chunks, self.chunk
        rows, ends = self.floats(m, n, 3, c), self.floats(m, n, 2, c)
        last, G = self.floats(m, n, 4), self.floats(m, n, c, c)
        E = self.floats(m, n, c, c) if keep and self.momentum else G
        coefficients_kernel[(n, m)](
            self.theta, self.eta, self.alpha, self.valid, rows, ends, last, G, E, *_strides(self.theta),
            self.heads, n, self.tokens, **self.gates, KEEP=E is not G, num_warps=1,
        )  # fmt: skip
        return rows, ends, last, G, E

    def launch(
        self, name: str, grid: tuple[int, ...], tensors: tuple[Any, ...], of: tuple[Tensor, ...],
        sizes: tuple[int, ...], numbers: tuple[float, ...] = (), **choices: Any,
    ) -> None:  # fmt: skip
        """Queue a kernel, in CUDA or Triton: tensors, strides `of` some, sizes, numbers, choices."""
        strides = tuple(stride for x in of for stride in _strides(x))
        choices = {key: self.network[key] for key in ("NORM", "MOMENTUM", "TARGET")} | choices
        if self.tiled:
            choices |= {"SPLIT": self.split, "ACTIVATION": self.network["ACTIVATION"]}
            tiled.launch(name, grid, choices, tensors, strides, sizes, numbers, self.q.device)
            return
        kernel, warps, width = KERNELS[name]
        if name in tiled.WALK_TILES:
            tensors += self.meeting(grid[0] // self.split)
        kernel[grid](
            *tensors, *strides, *sizes, *numbers, **self.shape, HS=self.slices[width], **choices,
            num_warps=min(warps, most_warps(self.q)), num_stages=1,
        )  # fmt: skip

    def write(
        self, checkpoints: Tensor, ends: Tensor, last: Tensor, anchor: Tensor | None,
        first: int, span: int, rows: int, save: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """States and steps of a span; unless `save` also hidden, zh and norm (see write.py)."""
        m, c, p = self.walks, self.chunk, self.width
        states, steps = self.new(m, span, self.parts, self.size), self.new(m, span, c, p)
        hidden = zh = norm = steps
        if not save:
            hidden, zh = self.new(4, m, span, c, self.hidden), self.new(m, span, c, p)
            norm = self.floats(m, span, 2, c)
        pieces = -(-min(span, self.chunks - first) // rows)
        self.launch(
            "write", (m * pieces * self.split,),
            (self.k, self.v, ends, last, checkpoints, states, steps, hidden, zh, norm, self.operands,
             self.gamma, self.beta, self.start, self.resets, self.opened, anchor),
            (self.k, self.v), (m, self.heads, self.chunks, self.tokens, first, span, INTERVAL, rows),
            self.numbers, ACTIVATION=self.network["ACTIVATION"],
            **{**self.loss, "HAS_OPEN": self.opened is not None and save}, SAVE=save,
        )  # fmt: skip
        return states, steps, hidden, zh, norm

    def forward(self, state: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """y, the final state, the anchor of open chunks, checkpoints, z and r (see read.py)."""
        m, n, c, p = self.walks, self.chunks, self.chunk, self.width
        rows, ends, last, G, _ = self.coefficients(keep=False)
        y = self.q.new_empty(self.q.shape)
        checkpoints = self.floats(-(-n // INTERVAL) + 1, m, self.parts, self.size)
        checkpoints[0] = self.moved(state, -1)
        anchor = self.floats(m, 2, self.size) if self.opened is not None else self.floats(0)
        z, r = (self.new(m, n, c, p), self.floats(m, n, c)) if keep else (self.new(0), self.floats(0))
        span = _span(FORWARD_SPAN, m, n)
        for first in range(0, n, span):
            states, steps, *_ = self.write(checkpoints, ends, last, anchor, first, span, span, True)
            self.launch(
                "read", (min(span, n - first), m),
                (self.q, self.k, rows, G, states, steps, self.operands, self.gamma, self.beta, y, z, r),
                (self.q, self.k, y), (m, self.heads, n, self.tokens, first, span), self.numbers[:1],
                ACTIVATION=self.network["ACTIVATION"], DUAL=self.dual, KEEP=keep,
            )  # fmt: skip
        if self.opened is not None:
            anchor = self.moved(anchor, 1)
        return y, self.moved(checkpoints[-1], 1), anchor, checkpoints, z, r

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
        has_targets, has_norm = self.targets is not None, self.gamma is not None
        zeros = functools.partial(torch.zeros, dtype=torch.float32, device=g_y.device)
        g_targets = zeros(2, m, 2 * size) if has_targets else nothing
        g_start = torch.zeros_like(g_final) if self.resets is not None else nothing
        g_norm = zeros(m, 2, p)
        span = _span(BACKWARD_SPAN, m, n)
        for first in reversed(range(0, n, span)):
            here = min(span, n - first)
            sizes = (m, heads, n, self.tokens, first, span)
            states, steps, hidden, zh, norm = self.write(
                checkpoints, ends, last, None, first, span, INTERVAL, False
            )
            g_states, after = (self.new(m, span, parts, size) for _ in range(2))
            g_targets_here = self.new(m, span, 2 * size) if has_targets and self.dual else nothing
            g_u1 = g_x2 = g_u2 = g_G = nothing
            if self.dual:
                g_u1, g_x2 = self.new(m, span, c, self.hidden), self.new(m, span, c, self.hidden)
                g_u2, g_G = self.new(m, span, c, p), self.floats(m, span, c, c)
            read_k, g_rows = self.new(m, span, c, p), self.floats(m, span, 2, c)
            g_norms = self.floats(m, span, 2, p)
            self.launch(
                "read_backward", (here, m),
                (self.q, self.k, rows, G, states, steps, hidden, self.operands, self.gamma, z, r, g_y,
                 g_q, read_k, g_rows, g_G, g_states, g_targets_here, g_u1, g_x2, g_u2, g_norms),
                (self.q, self.k, g_y, g_q), sizes, ACTIVATION=self.network["ACTIVATION"], DUAL=self.dual,
            )  # fmt: skip
            g_z1, g_steps = self.new(m, span, c, self.hidden), self.floats(m, span, c, p)
            self.launch(
                "write_backward", (m * self.split,),
                (self.k, self.v, ends, last, states, steps, hidden, zh, norm, self.operands,
                 self.gamma, self.beta, self.resets, self.opened, g_states, g_u1, g_x2, g_u2,
                 carried, after, g_z1, g_steps, g_anchor, g_start),
                (self.k, self.v), sizes, self.numbers[1:], **self.loss, READS=self.dual,
            )  # fmt: skip
            g_ends, g_last = self.floats(m, span, 2, c), self.floats(m, span, 4)
            self.launch(
                "write_gradients", (here, m),
                (self.k, self.v, ends, states, steps, hidden, zh, norm, self.operands, self.gamma, self.beta,
                 after, g_z1, g_steps, read_k, g_k, g_v, g_ends, g_last, g_norms),
                (self.k, self.v, g_k), sizes, self.numbers[1:], LOSS=self.loss["LOSS"], READS=self.dual,
            )  # fmt: skip
            if has_norm:
                g_norm += g_norms[:, :here].sum(1)
            if has_targets:
                target_gradients_kernel[(triton.cdiv(2 * size, TARGET_BLOCK), m)](
                    last, after, g_targets_here, g_targets, m, n, first, here, span, 2 * size, parts * size,
                    BLOCK=TARGET_BLOCK, READS=self.dual,
                )  # fmt: skip
            coefficients_backward_kernel[(here, m)](
                self.theta, self.eta, self.alpha, self.valid, rows, G, E, g_rows, g_ends, g_last, g_G,
                *g_gates, *_strides(self.theta), *_strides(g_gates[0]), heads, n, first, span, self.tokens,
                READ=self.dual, **self.gates, num_warps=1,
            )  # fmt: skip
        g_shared = [nothing, nothing]
        if has_norm:
            total = g_norm.view(self.batch, heads, 2, p).sum(0)
            g_shared = [total[:, 0].clone(), total[:, 1].clone()]
        if has_targets:
            parts_of = g_targets.view(2, self.batch, heads, 2 * size).sum(1)
            whole = tiled.targets_from_tiles(*parts_of) if self.tiled else parts_of.sum(0)
            g_targets = whole.unflatten(1, (2, size))
        if self.resets is not None:
            g_start = g_start.view(self.batch, heads, parts, size).sum(0)
        return (g_q, g_k, g_v, *g_gates, carried, g_targets, g_start, *g_shared)


@torch.library.custom_op("nestor::memory_walk", mutates_args=())
def memory_walk(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, eta: Tensor | None, alpha: Tensor | None, state: Tensor,
    targets: Tensor | None, start: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    valid: Tensor | None, resets: Tensor | None, opened: Tensor | None,
    chunk: int, hidden: int, activation: int, norm: int, loss: int, dual: bool,
    eps: float, scale: float, threshold: float, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Outputs ``[B, T, H, p]``, the final state, the anchor of open chunks, and what the backward needs:
    checkpoints, z, r (the last two empty unless `keep`). Arguments as in write.py and read.py."""
    walk = _Walk(
        q, k, v, theta, eta, alpha, targets, start, gamma, beta, valid, resets, opened,
        chunk, hidden, activation, norm, loss, dual, eps, scale, threshold,
    )  # fmt: skip
    return walk.forward(state, keep)


@torch.library.custom_op("nestor::memory_walk_backward", mutates_args=())
def memory_walk_backward(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, eta: Tensor | None, alpha: Tensor | None,
    targets: Tensor | None, start: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    valid: Tensor | None, resets: Tensor | None, opened: Tensor | None,
    checkpoints: Tensor, z: Tensor, r: Tensor, g_y: Tensor, g_final: Tensor, g_anchor: Tensor,
    chunk: int, hidden: int, activation: int, norm: int, loss: int, dual: bool,
    eps: float, scale: float, threshold: float,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, theta, eta, alpha, state, targets, start, gamma, beta; empty: none."""
    walk = _Walk(
        q, k, v, theta, eta, alpha, targets, start, gamma, beta, valid, resets, opened,
        chunk, hidden, activation, norm, loss, dual, eps, scale, threshold,
    )  # fmt: skip
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
    batch, tokens, heads, width = q.shape
    walks, chunks = batch * heads, -(-tokens // chunk)
    anchor = [walks, 2, width * hidden] if opened is not None else [0]
    kept = [[walks, chunks, chunk, width], [walks, chunks, chunk]] if keep else [[0], [0]]
    return (
        q.new_empty(q.shape),
        torch.empty_like(state),
        q.new_empty(anchor, dtype=torch.float32),
        q.new_empty((-(-chunks // INTERVAL) + 1, *state.shape), dtype=torch.float32),
        q.new_empty(kept[0]),
        q.new_empty(kept[1], dtype=torch.float32),
    )


@memory_walk_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, eta: Tensor | None, alpha: Tensor | None,
    targets: Tensor | None, start: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    valid: Tensor | None, resets: Tensor | None, opened: Tensor | None,
    checkpoints: Tensor, z: Tensor, r: Tensor, g_y: Tensor, g_final: Tensor, g_anchor: Tensor,
    chunk: int, hidden: int, activation: int, norm: int, loss: int, dual: bool,
    eps: float, scale: float, threshold: float,
) -> list[Tensor]:  # fmt: skip
    nothing = q.new_empty((0,), dtype=torch.float32)

    def like(x: Tensor | None) -> Tensor:
        return nothing if x is None else x.new_empty(x.shape)

    inputs = [q.new_empty(q.shape) for _ in range(3)] + [like(g) for g in (theta, eta, alpha)]
    begin = nothing if resets is None or start is None else like(start)
    return [*inputs, g_final.new_empty(g_final.shape), like(targets), begin, like(gamma), like(beta)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    before, (_, *after) = inputs[:6], inputs[6:14]
    _, final, anchor, checkpoints, z, r = output
    ctx.choices = inputs[14:-1]
    ctx.shapes = (final.shape, anchor.shape)
    ctx.mark_non_differentiable(checkpoints, z, r)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*before, *after, checkpoints, z, r)


def _backward(ctx: Any, g_y: Any, g_final: Any, g_anchor: Any, *_: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    q = saved[0]
    final, anchor = ctx.shapes
    g_y = torch.zeros(q.shape, dtype=q.dtype, device=q.device) if g_y is None else g_y
    if g_y.stride(-1) != 1:
        g_y = g_y.contiguous()
    g_final, g_anchor = (
        torch.zeros(shape, dtype=torch.float32, device=q.device) if g is None else g.contiguous()
        for g, shape in ((g_final, final), (g_anchor, anchor))
    )
    found = memory_walk_backward(*saved, g_y, g_final, g_anchor, *ctx.choices)
    present = (*saved[:6], q, *saved[6:10])
    grads = [None if x is None or g.numel() == 0 else g for x, g in zip(present, found, strict=True)]
    return (*grads, *[None] * (3 + len(ctx.choices) + 1))


memory_walk.register_autograd(_backward, setup_context=_setup)
