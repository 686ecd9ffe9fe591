"""What the walks of all depths share: sizes and launches of a call, and the autograd of its operator.

A walk's operator takes q, k, v, theta, eta, alpha; the packed state; targets, start, gamma, beta, valid,
resets, opened; then numbers, `keep` last. It returns y, the final state, the anchor of open chunks, and what
the backward needs: checkpoints, z, r. Its backward's operator takes the same but the state and `keep`, with
checkpoints, z, r and the gradients of the first three outputs before the numbers.

Fast weights are packed: ``[M, Q, size]`` for M = sequences x heads and the Q parts W of each layer, then S of
each (without momentum W alone). ``[H, ...]`` is shared by the sequences.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nestor.errors import ShapeError
from nestor.ops.neural_memory.kernels.coefficients import coefficients_backward_kernel, coefficients_kernel

# Chunks from one checkpoint of the state to the next.
INTERVAL = 8
# Sequences x heads, one side of a grid.
MOST_WALKS = 65_535
# Chunks of one head that a span holds, over all sequences and heads: of one room for spans, and of two.
FORWARD_SPAN = (4096, 2048)
BACKWARD_SPAN = (1024, 768)


def span_of(budget: int, walks: int, chunks: int) -> int:
    """Chunks of a span, a multiple of INTERVAL."""
    whole = -(-chunks // INTERVAL) * INTERVAL
    return min(whole, max(INTERVAL, budget // walks // INTERVAL * INTERVAL))


def strides(x: Tensor) -> tuple[int, int, int]:
    """Of sequences, tokens and heads."""
    return x.stride(0), x.stride(1), x.stride(2)


class Inputs(NamedTuple):
    """What the forward and the backward of a walk take besides the state: q, k, v ``[B, T, H, p]``; gates
    ``[B, T, H]``; targets and start ``[H, parts, size]``; gamma, beta ``[H, p]``; uint8 valid ``[B, T]`` and
    resets ``[B, chunks]``; int32 opened ``[B]``, the chunk that the call leaves open, or -1."""

    q: Tensor
    k: Tensor
    v: Tensor
    theta: Tensor
    eta: Tensor | None
    alpha: Tensor | None
    targets: Tensor | None
    start: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    valid: Tensor | None
    resets: Tensor | None
    opened: Tensor | None


class Call:
    """Sizes and choices of one call, and the launches that do not depend on the network."""

    def __init__(self, inputs: Inputs, chunk: int, layers: int, size: int) -> None:
        """layers, size: matrices of the network, and numbers of each."""
        self.q, self.k, self.v, self.theta, self.eta, self.alpha = inputs[:6]
        self.targets, start, self.gamma, self.beta = inputs[6:10]
        self.valid, self.resets, self.opened = inputs[10:]
        self.batch, self.tokens, self.heads, self.width = self.q.shape
        self.walks, self.chunks, self.chunk = self.batch * self.heads, -(-self.tokens // chunk), chunk
        if self.walks > MOST_WALKS:
            raise ShapeError(
                f"{self.batch} sequences with {self.heads} heads each are {self.walks} memories; the kernels "
                f"take at most {MOST_WALKS} in a call. Split the batch."
            )
        self.layers, self.size, self.momentum = layers, size, self.eta is not None
        self.parts = 2 * layers if self.momentum else layers
        self.gates = {"C": chunk, "MOMENTUM": self.momentum, "FORGET": self.alpha is not None}
        self.gates["MASKED"] = self.valid is not None
        self.start = None if start is None else self.moved(start, -1)

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.q.new_empty(shape, dtype=dtype or self.q.dtype)

    def floats(self, *shape: int) -> Tensor:
        return self.new(*shape, dtype=torch.float32)

    def zeros(self, *shape: int) -> Tensor:
        return self.q.new_zeros(shape, dtype=torch.float32)

    def moved(self, state: Tensor, sign: int) -> Tensor:
        """A state ``[rows, .., size]`` with W as the kernels keep it, W - M (sign -1), or back (1)."""
        if self.targets is None:
            return state.clone()
        rows = state.view(-1, self.heads, *state.shape[1:])
        weights = torch.add(rows[:, :, : self.layers], self.targets, alpha=sign)
        return torch.cat((weights, rows[:, :, self.layers :]), 2).view(state.shape)

    def meeting(self, groups: int, split: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where the programs of a walk meet: exchange, arrivals, ticket."""
        size = groups * 2 * split * self.chunk * self.width if split > 1 else 1
        counters = torch.zeros(groups + 1, dtype=torch.int32, device=self.q.device)
        return self.floats(size), counters, counters[groups:]

    def coefficients(self, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """rows, ends, last, G, and E if it is to be kept (see coefficients.py)."""
        m, n, c = self.walks, self.chunks, self.chunk
        rows, ends = self.floats(m, n, 3, c), self.floats(m, n, 2, c)
        last, G = self.floats(m, n, 4), self.new(m, n, c, c)
        E = self.new(m, n, c, c) if keep and self.momentum else G
        coefficients_kernel[(n, m)](
            self.theta, self.eta, self.alpha, self.valid, rows, ends, last, G, E, *strides(self.theta),
            self.heads, n, self.tokens, **self.gates, KEEP=E is not G, num_warps=1,
        )  # fmt: skip
        return rows, ends, last, G, E

    def collected(self, read: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Room for small gradients of each chunk: of rows and G (by the reads), ends, last and the norm."""
        c, p = self.chunk, self.width
        rows, ends, last, norms = (
            self.floats(self.walks, self.chunks, *size) for size in ((2, c), (2, c), (4,), (2, p))
        )
        G = self.new(self.walks, self.chunks, c, c) if read else self.new(0)
        return rows, G, ends, last, norms

    def norm_gradients(self, collected: Tensor) -> list[Tensor]:
        """The gradients of gamma and beta, of which `collected` has the parts; empty without a norm."""
        if self.gamma is None:
            # Two, for what an operator returns must not share memory.
            return [self.floats(0), self.floats(0)]
        by_head = collected.unflatten(0, (self.batch, self.heads)).sum((0, 2))
        return [g.clone() for g in by_head.unbind(1)]

    def gate_gradients(
        self, out: list[Tensor], rows: Tensor, G: Tensor, E: Tensor, g_rows: Tensor, g_G: Tensor,
        g_ends: Tensor, g_last: Tensor, read: bool,
    ) -> None:  # fmt: skip
        """Write the gradients of theta, eta, alpha to `out`, from what was `collected`."""
        coefficients_backward_kernel[(self.chunks, self.walks)](
            self.theta, self.eta, self.alpha, self.valid, rows, G, E, g_rows, g_ends, g_last, g_G,
            *out, *strides(self.theta), *strides(out[0]), self.heads, self.chunks,
            self.tokens, READ=read, **self.gates, num_warps=1,
        )  # fmt: skip


def outputs_like(
    q: Tensor, eta: Tensor | None, state: Tensor, opened: Tensor | None, chunk: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Empty outputs of a walk, for torch.compile."""
    walks, parts, size = state.shape
    chunks = -(-q.shape[1] // chunk)
    anchor = [walks, parts if eta is None else parts // 2, size] if opened is not None else [0]
    kept = [[walks, chunks, chunk, q.shape[3]], [walks, chunks, chunk]] if keep else [[0], [0]]
    return (
        q.new_empty(q.shape),
        torch.empty_like(state),
        q.new_empty(anchor, dtype=torch.float32),
        q.new_empty((-(-chunks // INTERVAL) + 1, *state.shape), dtype=torch.float32),
        q.new_empty(kept[0]),
        q.new_empty(kept[1], dtype=torch.float32),
    )


def gradients_like(
    q: Tensor, gates: tuple[Tensor | None, ...], state: Tensor, targets: Tensor | None, start: Tensor | None,
    norm: tuple[Tensor | None, ...], resets: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """Empty gradients of a walk, for torch.compile."""

    def like(x: Tensor | None) -> Tensor:
        return q.new_empty((0,), dtype=torch.float32) if x is None else x.new_empty(x.shape)

    begin = None if resets is None else start
    inputs = [q.new_empty(q.shape) for _ in range(3)]
    return [*inputs, *map(like, (*gates, state, targets, begin, *norm))]


def attach_autograd(walk: Any, backward: Callable[..., list[Tensor]]) -> None:
    """Make a walk's operator differentiable by the operator `backward`."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, final, anchor, checkpoints, z, r = output
        ctx.choices = inputs[14:-1]
        ctx.shapes = (final.shape, anchor.shape)
        ctx.mark_non_differentiable(checkpoints, z, r)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:6], *inputs[7:14], checkpoints, z, r)

    def gradients(ctx: Any, g_y: Any, g_final: Any, g_anchor: Any, *_: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        q = saved[0]
        g_y = torch.zeros(q.shape, dtype=q.dtype, device=q.device) if g_y is None else g_y
        if g_y.stride(-1) != 1:
            g_y = g_y.contiguous()
        g_final, g_anchor = (
            torch.zeros(shape, dtype=torch.float32, device=q.device) if g is None else g.contiguous()
            for g, shape in zip((g_final, g_anchor), ctx.shapes, strict=True)
        )
        found = backward(*saved, g_y, g_final, g_anchor, *ctx.choices)
        present = (*saved[:6], q, *saved[6:10])
        grads = [None if x is None or g.numel() == 0 else g for x, g in zip(present, found, strict=True)]
        return (*grads, *[None] * (3 + len(ctx.choices) + 1))

    walk.register_autograd(gradients, setup_context=setup)
