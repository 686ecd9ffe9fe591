"""The chunked form of the neural memory: dense products, explicit inner gradients, hand-written backward.

Per chunk, with all gradients at the anchor ``Wa`` (spec/neural-memory.md section 2.3; ``x_0 = k``):

    keys     z_l = x_{l-1} Wa_l        x_l = phi(z_l)        delta_l = (delta_{l+1} Wa_{l+1}^T) phi'(z_l)
    queries  z~_l = A x~_{l-1} W_l + F x~_{l-1} S_l + (1-A) x~_{l-1} M_l - (G * x~_{l-1} x_{l-1}^T) delta_l
    state    W'_l = A_C W_l + F_C S_l + (1-A_C) M_l - (G_C x_{l-1})^T delta_l
             S'_l = m_C S_l - (E_C x_{l-1})^T delta_l

``M`` are the learned initial weights. W, S and M of a layer are kept as one stack of components: a query row
mixes the components by its coefficients (A, F, 1-A), the state update mixes them by a small matrix. A memory
without momentum has no S, one that decays to zero no M; nothing else changes. Nothing of size tokens x
weights exists. The backward differentiates these lines, so it carries the second-order terms of the inner
gradient (section 2.4). Sequences and heads are one batch axis ``m`` here; chunks are the first axis ``n``.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nestor.ops.neural_memory.coefficients import Coefficients
from nestor.ops.neural_memory.functions import ACTIVATIONS, INNER_LOSSES, HeadCache, make_head
from nestor.ops.neural_memory.spec import MemorySpec

Layers = list[Tensor]  # one tensor per layer of the memory network


class Rows(NamedTuple):
    """The tokens of one chunk (or, with a leading n, of all chunks) and their coefficients.

    q, k, v ``[m, C, p]``. read ``[m, C, c]`` and G ``[m, C, C]``: how query rows mix the c components and the
    chunk's own writes; None for chunk-start reads. mix ``[m, c, c]``: how the components after the chunk are
    made from those before it. write ``[m, C, w]``: the weight of each token's gradient in the w components
    that are written (W, or W and S). keep ``[m, C, 1]``: a_t for post-decay gradients, else None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    read: Tensor | None
    G: Tensor | None
    mix: Tensor
    write: Tensor
    keep: Tensor | None

    def chunk(self, n: int) -> "Rows":
        return Rows(*(None if t is None else t[n] for t in self))  # type: ignore[arg-type]


def make_rows(
    q: Tensor, k: Tensor, v: Tensor, c: Coefficients, keep: Tensor | None, spec: MemorySpec, has_target: bool
) -> Rows:
    """Arrange the coefficients of all chunks for components W, S (with momentum), M (with a decay target)."""
    end_rows = [c.G_end] if c.E_end is None else [c.G_end, c.E_end]
    zero, one = torch.zeros_like(c.A_end), torch.ones_like(c.A_end)
    to_weights, others = [c.A_end], []
    if c.F_end is not None:
        assert c.m_end is not None
        to_weights.append(c.F_end)
        others.append([zero, c.m_end])
    if has_target:
        to_weights.append(1.0 - c.A_end)
        others = [[*row, zero] for row in others] + [[zero] * len(to_weights[:-1]) + [one]]
    mix = torch.stack([torch.cat(row, -1) for row in [to_weights, *others]], -2)

    read = G = None
    if spec.read_mode != "chunk_start":
        r = c.exclusive() if spec.read_mode == "exclusive" else c
        columns = [r.A] + ([] if r.F is None else [r.F]) + ([1.0 - r.A] if has_target else [])
        read, G = torch.stack(columns, -1), r.G
    return Rows(q, k, v, read, G, mix, torch.stack(end_rows, -1), keep)


@dataclass(frozen=True)
class Norm:
    """The slow parameters of the head, ``[m, 1, p]``, or None."""

    gamma: Tensor | None
    beta: Tensor | None


@dataclass
class ChunkState:
    """Per layer: stacks, the components ``[m, c, in, out]`` in the order W, S, M; anchor ``[m, in, out]``."""

    stacks: Layers
    anchor: Layers

    def target(self, layer: int, rows: Rows) -> Tensor | None:
        """M of a layer, if the memory decays to its initial weights."""
        return self.stacks[layer][:, -1] if rows.mix.shape[-1] > rows.write.shape[-1] else None


@dataclass
class Tape:
    """Intermediate values of one chunk that its backward uses."""

    key_inputs: Layers = field(default_factory=list)  # x_{l-1}
    key_outputs: Layers = field(default_factory=list)  # z_l
    slopes: Layers = field(default_factory=list)  # phi'(z_l), l < L
    pulled: Layers = field(default_factory=list)  # delta_{l+1} W_{l+1}^T, l < L
    deltas: Layers = field(default_factory=list)  # delta_l
    written: Layers = field(default_factory=list)  # x_{l-1} times the write coefficients
    prediction: Tensor | None = None  # f(k)
    error: Tensor | None = None  # e
    key_head: HeadCache = field(default_factory=HeadCache)
    query_inputs: Layers = field(default_factory=list)  # x~_{l-1}
    query_mixed: Layers = field(default_factory=list)  # x~_{l-1} times the read coefficients
    query_slopes: Layers = field(default_factory=list)  # phi'(z~_l), l < L
    query_head: HeadCache = field(default_factory=HeadCache)


def _t(x: Tensor) -> Tensor:
    return x.transpose(-1, -2)


def _spread(x: Tensor, coefficients: Tensor) -> Tensor:
    """x ``[m, C, in]`` scaled by each of the coefficients ``[m, C, c]``, side by side: ``[m, C, c in]``."""
    return (x.unsqueeze(-2) * coefficients.unsqueeze(-1)).flatten(-2)


def _at_anchor(x: Tensor, anchor: Tensor, target: Tensor | None, keep: Tensor | None) -> Tensor:
    """x times the weights at which the inner gradient is taken."""
    if keep is None:
        return torch.bmm(x, anchor)
    z = torch.bmm(x, anchor) * keep
    return z if target is None else z + torch.bmm(x, target) * (1.0 - keep)


# --- forward ----------------------------------------------------------------------------------------------


def forward_chunk(
    spec: MemorySpec, norm: Norm, rows: Rows, state: ChunkState
) -> tuple[Tensor, ChunkState, Tape]:
    """Outputs of one chunk, the state after it, and the tape for `backward_chunk`."""
    tape = Tape()
    _write_gradients(spec, norm, rows, state, tape)
    y = _read(spec, norm, rows, state, tape)
    stacks = []
    for stack, x, delta in zip(state.stacks, tape.key_inputs, tape.deltas, strict=True):
        written = _spread(x, rows.write)
        tape.written.append(written)
        after = torch.bmm(rows.mix, stack.flatten(2)).view_as(stack)
        after[:, : rows.write.shape[-1]].flatten(1, 2).baddbmm_(_t(written), delta, alpha=-1)
        stacks.append(after)
    return y, ChunkState(stacks, state.anchor), tape


def _write_gradients(spec: MemorySpec, norm: Norm, rows: Rows, state: ChunkState, tape: Tape) -> None:
    """Per-token gradients at the anchor as rows: dW_l of token j is x_{l-1,j}^T delta_{l,j}."""
    activation, head = ACTIVATIONS[spec.activation], make_head(spec.norm, spec.norm_eps)
    depth = len(state.anchor)
    x = rows.k
    for layer in range(depth):
        tape.key_inputs.append(x)
        z = _at_anchor(x, state.anchor[layer], state.target(layer, rows), rows.keep)
        tape.key_outputs.append(z)
        if layer < depth - 1:
            x, slope = activation.with_slope(z)
            tape.slopes.append(slope)
    tape.prediction, cache = head.value(rows.k, z, norm.gamma, norm.beta)
    tape.error = INNER_LOSSES[spec.inner_loss](spec.loss_scale).error(tape.prediction, rows.v)
    delta, tape.key_head = head.pull_back(tape.error, cache)

    deltas, pulled = [delta], []
    for layer in range(depth - 1, 0, -1):
        target = state.target(layer, rows)
        back = _at_anchor(delta, _t(state.anchor[layer]), None if target is None else _t(target), rows.keep)
        delta = back * tape.slopes[layer - 1]
        pulled.append(back)
        deltas.append(delta)
    tape.deltas, tape.pulled = deltas[::-1], pulled[::-1]


def _read(spec: MemorySpec, norm: Norm, rows: Rows, state: ChunkState, tape: Tape) -> Tensor:
    activation, head = ACTIVATIONS[spec.activation], make_head(spec.norm, spec.norm_eps)
    depth = len(state.anchor)
    x = rows.q
    for layer in range(depth):
        tape.query_inputs.append(x)
        if rows.read is None or rows.G is None:
            z = torch.bmm(x, state.anchor[layer])
        else:
            mixed = _spread(x, rows.read)
            tape.query_mixed.append(mixed)
            scores = torch.bmm(x, _t(tape.key_inputs[layer])).mul_(rows.G)
            z = torch.bmm(mixed, state.stacks[layer].flatten(1, 2))
            z = z.baddbmm_(scores, tape.deltas[layer], alpha=-1)
        if layer < depth - 1:
            x, slope = activation.with_slope(z)
            tape.query_slopes.append(slope)
    y, tape.query_head = head.value(rows.q, z, norm.gamma, norm.beta)
    return y


# --- backward ---------------------------------------------------------------------------------------------


@dataclass
class Gradients:
    """Gradients of one chunk: of its rows (by field name), of the state before it, and of gamma and beta."""

    rows: dict[str, Tensor]
    stacks: Layers
    anchor: list[Tensor | None]
    gamma: Tensor | None
    beta: Tensor | None


class _ChunkBackward:
    """Reverse of `forward_chunk`: state update, then read, then the key pass with its second-order terms."""

    def __init__(self, spec: MemorySpec, rows: Rows, state: ChunkState, tape: Tape):
        self.rows, self.state, self.tape = rows, state, tape
        self.depth = len(state.anchor)
        self.activation = ACTIVATIONS[spec.activation]
        self.head = make_head(spec.norm, spec.norm_eps)
        self.loss = INNER_LOSSES[spec.inner_loss](spec.loss_scale)
        self.row_grads: dict[str, Tensor] = {}
        self.g_stacks: list[Any] = [None] * self.depth
        self.g_anchor: list[Any] = [None] * self.depth
        self.g_inputs: list[Any] = [None] * self.depth  # of x_{l-1}
        self.g_deltas: list[Any] = [None] * self.depth
        self.g_gamma: Tensor | None = None
        self.g_beta: Tensor | None = None

    def run(self, g_y: Tensor, g_new_stacks: Layers) -> Gradients:
        for layer in range(self.depth):
            self._state_update(layer, g_new_stacks[layer])
        self._read(g_y)
        self._write_gradients()
        return Gradients(self.row_grads, self.g_stacks, self.g_anchor, self.g_gamma, self.g_beta)

    def _add_row(self, name: str, value: Tensor) -> None:
        present = self.row_grads.get(name)
        self.row_grads[name] = value if present is None else present.add_(value)

    def _add_norm(self, gamma: Tensor | None, beta: Tensor | None) -> None:
        if gamma is not None:
            self.g_gamma = gamma if self.g_gamma is None else self.g_gamma + gamma
        if beta is not None:
            self.g_beta = beta if self.g_beta is None else self.g_beta + beta

    def _state_update(self, layer: int, g_after: Tensor) -> None:
        rows, tape, stack = self.rows, self.tape, self.state.stacks[layer]
        x, delta = tape.key_inputs[layer], tape.deltas[layer]
        flat = g_after.flatten(2)
        self.g_stacks[layer] = torch.bmm(_t(rows.mix), flat).view_as(stack)
        self._add_row("mix", torch.bmm(flat, _t(stack.flatten(2))))
        g_written = g_after[:, : rows.write.shape[-1]].flatten(1, 2)
        along = torch.bmm(delta, _t(g_written)).neg_().unflatten(-1, (-1, x.shape[-1]))
        self._add_row("write", torch.linalg.vecdot(along, x.unsqueeze(-2)))
        self.g_inputs[layer] = along.mul_(rows.write.unsqueeze(-1)).sum(-2)
        self.g_deltas[layer] = torch.bmm(tape.written[layer], g_written).neg_()

    def _read(self, g_y: Tensor) -> None:
        tape = self.tape
        g_z, g_gamma, g_beta = self.head.value_vjp(g_y, tape.query_head)
        self._add_norm(g_gamma, g_beta)
        for layer in range(self.depth - 1, -1, -1):
            x = tape.query_inputs[layer]
            if self.rows.read is None:
                self.g_anchor[layer] = torch.bmm(_t(x), g_z)
                g_x = torch.bmm(g_z, _t(self.state.anchor[layer]))
            else:
                g_x = self._read_layer(layer, x, g_z)
            if layer:
                g_z = g_x.mul_(tape.query_slopes[layer - 1])
        self.row_grads["q"] = g_x.add_(g_y) if self.head.residual else g_x

    def _read_layer(self, layer: int, x: Tensor, g_z: Tensor) -> Tensor:
        """One layer of the dual-form read; returns the gradient of its query-side input x."""
        rows, tape = self.rows, self.tape
        assert rows.read is not None and rows.G is not None
        keys, delta = tape.key_inputs[layer], tape.deltas[layer]
        along = torch.bmm(g_z, _t(self.state.stacks[layer].flatten(1, 2))).unflatten(-1, (-1, x.shape[-1]))
        self.g_stacks[layer].flatten(1, 2).baddbmm_(_t(tape.query_mixed[layer]), g_z)
        self._add_row("read", torch.linalg.vecdot(along, x.unsqueeze(-2)))
        g_x = along.mul_(rows.read.unsqueeze(-1)).sum(-2)

        scores, g_scores = torch.bmm(x, _t(keys)), torch.bmm(g_z, _t(delta))
        self._add_row("G", (scores * g_scores).neg_())
        self.g_deltas[layer].baddbmm_(_t(scores.mul_(rows.G)), g_z, alpha=-1)
        g_scores.mul_(rows.G)
        self.g_inputs[layer].baddbmm_(_t(g_scores), x, alpha=-1)
        return g_x.baddbmm_(g_scores, keys, alpha=-1)

    def _write_gradients(self) -> None:
        tape = self.tape
        g_outputs: list[Any] = [None] * self.depth  # of z_l

        # delta_l = (delta_{l+1} W_{l+1}^T) phi'(z_l): the reverse of pulling delta down walks up.
        for layer in range(self.depth - 1):
            g_delta = self.g_deltas[layer]
            curvature = self.activation.curvature(tape.key_outputs[layer])
            g_outputs[layer] = (g_delta * tape.pulled[layer]).mul_(curvature)
            g_back = g_delta.mul_(tape.slopes[layer])
            g_above = self._anchor_product(g_back, layer + 1, tape.deltas[layer + 1], transposed=True)
            self.g_deltas[layer + 1].add_(g_above)

        assert tape.error is not None and tape.prediction is not None
        g_error, g_z, g_gamma = self.head.pull_back_vjp(self.g_deltas[-1], tape.error, tape.key_head)
        self._add_norm(g_gamma, None)
        g_f, self.row_grads["v"] = self.loss.error_vjp(g_error, tape.prediction, self.rows.v)
        if g_f is not None:
            through_head, g_gamma, g_beta = self.head.value_vjp(g_f, tape.key_head)
            self._add_norm(g_gamma, g_beta)
            g_z = through_head if g_z is None else g_z.add_(through_head)
        g_outputs[-1] = g_z

        for layer in range(self.depth - 1, -1, -1):
            g_x = self.g_inputs[layer]
            if g_outputs[layer] is not None:
                g_x.add_(self._anchor_product(g_outputs[layer], layer, tape.key_inputs[layer]))
            if layer:
                below = g_x.mul_(tape.slopes[layer - 1])
                present = g_outputs[layer - 1]
                g_outputs[layer - 1] = below if present is None else present.add_(below)
        self.row_grads["k"] = g_x.add_(g_f) if self.head.residual and g_f is not None else g_x

    def _anchor_product(self, grad: Tensor, layer: int, x: Tensor, transposed: bool = False) -> Tensor:
        """Reverse of `_at_anchor` on W (or on W^T): the gradient of x; adds those of W, M and keep."""
        keep, anchor, target = self.rows.keep, self.state.anchor[layer], self.state.target(layer, self.rows)
        through = anchor if transposed else _t(anchor)

        def outer(g: Tensor) -> tuple[Tensor, Tensor]:
            return (_t(g), x) if transposed else (_t(x), g)

        kept = grad if keep is None else grad * keep
        present = self.g_anchor[layer]
        self.g_anchor[layer] = torch.bmm(*outer(kept)) if present is None else present.baddbmm_(*outer(kept))
        g_x = torch.bmm(kept, through)
        if keep is not None:
            forward = torch.bmm(x, _t(through))
            if target is not None:
                toward = target if transposed else _t(target)
                forward.sub_(torch.bmm(x, _t(toward)))
                lost = grad * (1.0 - keep)
                self.g_stacks[layer][:, -1].baddbmm_(*outer(lost))
                g_x.baddbmm_(lost, toward)
            self._add_row("keep", torch.linalg.vecdot(grad, forward).unsqueeze(-1))
        return g_x


def backward_chunk(
    spec: MemorySpec, rows: Rows, state: ChunkState, tape: Tape, g_y: Tensor, g_new_stacks: Layers
) -> Gradients:
    """Gradients of one chunk from those of its outputs and of the components after it."""
    return _ChunkBackward(spec, rows, state, tape).run(g_y, g_new_stacks)


def gradient_norm(tape: Tape) -> Tensor:
    """Frobenius norm of each token's inner gradient, ``[m, C]``: its per-layer gradients have rank one."""
    squares = [
        torch.linalg.vecdot(x, x) * torch.linalg.vecdot(delta, delta)
        for x, delta in zip(tape.key_inputs, tape.deltas, strict=True)
    ]
    return torch.stack(squares).sum(0).sqrt()
