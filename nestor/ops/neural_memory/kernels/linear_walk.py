"""The kernels of a memory of one layer in order, as two PyTorch operators; walk.py does it for two layers."""

import torch
from torch import Tensor

from nestor.ops.kernels import most_warps
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
from nestor.ops.neural_memory.kernels.linear_read import (
    linear_read_backward_kernel,
    linear_read_kernel,
    linear_scores_backward_kernel,
)
from nestor.ops.neural_memory.kernels.linear_write import (
    linear_gradients_kernel,
    linear_write_backward_kernel,
    linear_write_kernel,
)
from nestor.ops.operators import operator

# Rows of W of one program of a walk and of one turn of the other kernels, and keys of one turn.
SLICES = {
    torch.bfloat16: {"walk": 64, "chunk": 64, "keys": 64},
    torch.float32: {"walk": 32, "chunk": 16, "keys": 32},
}
WARPS = 8


class _LinearWalk(Call):
    """Choices and launches of one call."""

    def __init__(
        self, inputs: Inputs, chunk: int, norm: int, loss: int, dual: bool, eps: float, scale: float,
        threshold: float,
    ) -> None:  # fmt: skip
        width = inputs.q.shape[-1]
        super().__init__(inputs, chunk, 1, width * width)
        self.dual, self.numbers = dual, (eps, scale, threshold)
        precision = "tf32x3" if self.q.dtype == torch.float32 else "tf32"
        self.shape = {"C": chunk, "P": width, "NORM": norm, "MOMENTUM": self.momentum, "PRECISION": precision}
        self.target = {"TARGET": self.targets is not None}
        self.loss = {"LOSS": loss}
        self.events = {"HAS_RESETS": self.resets is not None, "HAS_OPEN": self.opened is not None}
        slices = SLICES[self.q.dtype]
        self.walk_rows, self.rows = min(slices["walk"], width), min(slices["chunk"], width)
        self.keys, self.split = min(slices["keys"], chunk), width // self.walk_rows

    def write(
        self, checkpoints: Tensor, ends: Tensor, last: Tensor, anchor: Tensor | None,
        first: int, span: int, rows: int, save: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """States and steps of a span; unless `save` also zh and norms (see linear_write.py)."""
        m, c, p = self.walks, self.chunk, self.width
        states, steps = self.new(m, span, self.parts, self.size), self.new(m, span, c, p)
        zh = norms = steps
        if not save:
            zh, norms = self.new(m, span, c, p), self.floats(m, span, 2, c)
        pieces = -(-min(span, self.chunks - first) // rows)
        events = {**self.events, "HAS_OPEN": self.opened is not None and save}
        linear_write_kernel[(m * pieces * self.split,)](
            self.k, self.v, ends, last, checkpoints, states, steps, zh, norms,
            self.targets, self.gamma, self.beta, self.start, self.resets, self.opened, anchor,
            *self.meeting(m * pieces, self.split), *strides(self.k), *strides(self.v), m, self.heads,
            self.chunks, self.tokens, first, span, INTERVAL, rows, *self.numbers,
            **self.shape, PS=self.walk_rows, **self.loss, **self.target, **events, SAVE=save,
            num_warps=min(WARPS, most_warps(self.q)), num_stages=1,
        )  # fmt: skip
        return states, steps, zh, norms

    def forward(self, state: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """y, the final state, the anchor of open chunks, checkpoints, z and r (see linear_read.py)."""
        m, n, c, p = self.walks, self.chunks, self.chunk, self.width
        rows, ends, last, G, _ = self.coefficients(keep=False)
        y = self.q.new_empty(self.q.shape)
        checkpoints = self.floats(-(-n // INTERVAL) + 1, m, self.parts, self.size)
        checkpoints[0] = self.moved(state, -1)
        anchor = self.floats(m, 1, self.size) if self.opened is not None else self.floats(0)
        z, r = (self.new(m, n, c, p), self.floats(m, n, c)) if keep else (self.new(0), self.floats(0))
        span = span_of(FORWARD_SPAN[0], m, n)
        for first in range(0, n, span):
            states, steps, *_ = self.write(checkpoints, ends, last, anchor, first, span, span, True)
            linear_read_kernel[(min(span, n - first), m)](
                self.q, self.k, rows, G, states, steps, self.targets, self.gamma, self.beta, y, z, r,
                *strides(self.q), *strides(self.k), *strides(y), m, self.heads, n, self.tokens,
                first, span, self.numbers[0], **self.shape, PS=self.rows, **self.target,
                DUAL=self.dual, KEEP=keep, num_warps=min(WARPS, most_warps(self.q)), num_stages=1,
            )  # fmt: skip
        if self.opened is not None:
            anchor = self.moved(anchor, 1)
        return y, self.moved(checkpoints[-1], 1), anchor, checkpoints, z, r

    def backward(
        self, checkpoints: Tensor, z: Tensor, r: Tensor, g_y: Tensor, g_final: Tensor, g_anchor: Tensor
    ) -> list[Tensor]:
        """Gradients of q, k, v, theta, eta, alpha, state, targets, start, gamma, beta (empty: none)."""
        m, n, c, p = self.walks, self.chunks, self.chunk, self.width
        rows, ends, last, G, E = self.coefficients(keep=True)
        g_q, g_k, g_v = (self.q.new_empty(self.q.shape) for _ in range(3))
        gates = (self.theta, self.eta, self.alpha)
        g_gates = [self.floats(0) if g is None else g.new_empty(g.shape) for g in gates]
        carried = g_final.clone()
        has_targets = self.targets is not None
        g_targets = self.zeros(m, self.size) if has_targets else self.floats(0)
        g_start = torch.zeros_like(g_final) if self.resets is not None else self.floats(0)
        span = span_of(BACKWARD_SPAN[0], m, n)
        g_rows, g_G, g_ends, g_last, g_norms = collected = self.collected(self.dual)
        for first in reversed(range(0, n, span)):
            here = min(span, n - first)
            states, steps, zh, norms = self.write(checkpoints, ends, last, None, first, span, INTERVAL, False)
            g_states, after = (self.new(m, span, self.parts, self.size) for _ in range(2))
            read_k, g_u, g_z = (self.new(m, span, c, p) for _ in range(3))
            # The reads' first kernel leaves to the second what it found in g_z and g_steps.
            g_steps = self.floats(m, span, c, p)
            g_reads = self.new(m, span, self.size) if has_targets and self.dual else self.floats(0)
            place = (m, self.heads, n, self.tokens, first, span)
            linear_read_backward_kernel[(here, m)](
                self.q, rows, states, self.targets, self.gamma, z, r, g_y,
                g_q, g_steps, g_z, g_rows, g_states, g_reads, g_norms,
                *strides(self.q), *strides(g_y), *strides(g_q), *place, **self.shape, PS=self.rows,
                **self.target, DUAL=self.dual, num_warps=min(WARPS, most_warps(self.q)), num_stages=1,
            )  # fmt: skip
            if self.dual:
                linear_scores_backward_kernel[(here, m)](
                    self.q, self.k, G, steps, g_steps, g_z, g_q, read_k, g_G, g_u,
                    *strides(self.q), *strides(self.k), *strides(g_q), *place,
                    C=c, CS=self.keys, P=p, PS=self.rows, PRECISION=self.shape["PRECISION"],
                    num_warps=min(WARPS, most_warps(self.q)), num_stages=1,
                )  # fmt: skip
            linear_write_backward_kernel[(m * self.split,)](
                self.k, self.v, ends, last, steps, zh, norms, self.gamma, self.beta, self.resets, self.opened,
                g_states, g_u, carried, after, g_z, g_steps, g_anchor, g_start, *self.meeting(m, self.split),
                *strides(self.k), *strides(self.v), *place, *self.numbers[1:],
                **self.shape, PS=self.walk_rows, **self.loss, **self.events, READS=self.dual,
                num_warps=min(WARPS, most_warps(self.q)), num_stages=1,
            )  # fmt: skip
            linear_gradients_kernel[(here, m)](
                self.k, self.v, ends, states, steps, zh, norms, self.targets, self.gamma, self.beta,
                after, g_z, g_steps, read_k, g_k, g_v, g_ends, g_last, g_norms,
                *strides(self.k), *strides(self.v), *strides(g_k), *place, *self.numbers[1:],
                **self.shape, PS=self.rows, **self.loss, **self.target, READS=self.dual,
                num_warps=min(WARPS, most_warps(self.q)), num_stages=1,
            )  # fmt: skip
            if has_targets:
                # W' = A W + (1 - A) M + ..., and the reads' own.
                lost = (1.0 - last[:, first : first + here, :1]).to(after.dtype)
                g_targets += torch.bmm(lost.mT, after[:, :here, 0]).squeeze(1)
                if self.dual:
                    g_targets += g_reads[:, :here].sum(1, dtype=torch.float32)
        self.gate_gradients(g_gates, rows, G, E, *collected[:-1], self.dual)

        def over_sequences(x: Tensor, *shape: int) -> Tensor:
            return x.view(self.batch, self.heads, *shape).sum(0)

        g_shared = self.norm_gradients(collected[-1])
        if has_targets:
            g_targets = over_sequences(g_targets, 1, self.size)
        if self.resets is not None:
            g_start = over_sequences(g_start, self.parts, self.size)
        return [g_q, g_k, g_v, *g_gates, carried, g_targets, g_start, *g_shared]


@operator("linear_memory_walk")
def linear_memory_walk(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, eta: Tensor | None, alpha: Tensor | None, state: Tensor,
    targets: Tensor | None, start: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    valid: Tensor | None, resets: Tensor | None, opened: Tensor | None,
    chunk: int, norm: int, loss: int, dual: bool, eps: float, scale: float, threshold: float, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Outputs ``[B, T, H, p]``, the final state, the anchor of open chunks, and what the backward needs:
    checkpoints, z, r (the last two empty unless `keep`). Arguments as in calls.py and the kernels."""
    inputs = Inputs(q, k, v, theta, eta, alpha, targets, start, gamma, beta, valid, resets, opened)
    walk = _LinearWalk(inputs, chunk, norm, loss, dual, eps, scale, threshold)
    return walk.forward(state, keep)


@operator("linear_memory_walk_backward")
def linear_memory_walk_backward(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, eta: Tensor | None, alpha: Tensor | None,
    targets: Tensor | None, start: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    valid: Tensor | None, resets: Tensor | None, opened: Tensor | None,
    checkpoints: Tensor, z: Tensor, r: Tensor, g_y: Tensor, g_final: Tensor, g_anchor: Tensor,
    chunk: int, norm: int, loss: int, dual: bool, eps: float, scale: float, threshold: float,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, theta, eta, alpha, state, targets, start, gamma, beta; empty: none."""
    inputs = Inputs(q, k, v, theta, eta, alpha, targets, start, gamma, beta, valid, resets, opened)
    walk = _LinearWalk(inputs, chunk, norm, loss, dual, eps, scale, threshold)
    return walk.backward(checkpoints, z, r, g_y, g_final, g_anchor)


@linear_memory_walk.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, eta: Tensor | None, alpha: Tensor | None, state: Tensor,
    targets: Tensor | None, start: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    valid: Tensor | None, resets: Tensor | None, opened: Tensor | None,
    chunk: int, norm: int, loss: int, dual: bool, eps: float, scale: float, threshold: float, keep: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return outputs_like(q, eta, state, opened, chunk, keep)


@linear_memory_walk_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, eta: Tensor | None, alpha: Tensor | None,
    targets: Tensor | None, start: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    valid: Tensor | None, resets: Tensor | None, opened: Tensor | None,
    checkpoints: Tensor, z: Tensor, r: Tensor, g_y: Tensor, g_final: Tensor, g_anchor: Tensor,
    chunk: int, norm: int, loss: int, dual: bool, eps: float, scale: float, threshold: float,
) -> list[Tensor]:  # fmt: skip
    return gradients_like(q, (theta, eta, alpha), g_final, targets, start, (gamma, beta), resets)


attach_autograd(linear_memory_walk, linear_memory_walk_backward)
