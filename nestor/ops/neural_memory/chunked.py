"""The chunked form of the neural memory: dense matrix products, explicit inner gradients, hand-written backward.

Per chunk, with all gradients at the anchor ``Wa`` (spec/neural-memory.md section 2.3; ``x_0 = k``):

    keys     z_l = x_{l-1} Wa_l        x_l = phi(z_l)        delta_l = (delta_{l+1} Wa_{l+1}^T) phi'(z_l)
    queries  z~_l = A x~_{l-1} W_l + F x~_{l-1} S_l + (1-A) x~_{l-1} M_l - (G * x~_{l-1} x_{l-1}^T) delta_l
    state    W'_l = A_C W_l + F_C S_l + (1-A_C) M_l - (G_C x_{l-1})^T delta_l ,  S'_l = m_C S_l - (E_C x_{l-1})^T delta_l

``M`` are the learned initial weights (absent when decay is to zero). Nothing of size tokens x weights exists.
The backward differentiates these lines, so it carries the second-order terms of the inner gradient
(section 2.4). Sequences and heads are one batch axis ``m`` here; chunks are the first axis ``n``.
"""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nestor.ops.neural_memory.functions import ACTIVATIONS, INNER_LOSSES, HeadCache, make_head
from nestor.ops.neural_memory.spec import MemorySpec

Weights = list[Tensor]  # one [m, in, out] per layer of the memory network


class Rows(NamedTuple):
    """The tokens of one chunk (or, with a leading n, of all chunks) and their coefficients.

    q, k, v ``[m, C, p]``; A, F, keep ``[m, C, 1]``; G ``[m, C, C]``; A_end, F_end, m_end ``[m, 1, 1]``;
    G_end, E_end ``[m, C, 1]``. F, F_end, m_end, E_end are None without momentum, A to G for chunk-start
    reads, keep (a_t, for post-decay gradients) otherwise.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    A: Tensor | None
    F: Tensor | None
    G: Tensor | None
    A_end: Tensor
    F_end: Tensor | None
    m_end: Tensor | None
    G_end: Tensor
    E_end: Tensor | None
    keep: Tensor | None

    def chunk(self, n: int) -> "Rows":
        return Rows(*(None if t is None else t[n] for t in self))


@dataclass(frozen=True)
class SlowParts:
    """What does not change in the scan: the decay target M (None for zero) and the norm's gamma and beta."""

    target: Weights | None
    gamma: Tensor | None
    beta: Tensor | None


@dataclass
class ChunkState:
    weights: Weights
    momentum: Weights  # empty without momentum
    anchor: Weights


@dataclass
class Tape:
    """Intermediate values of one chunk that its backward uses."""

    key_inputs: Weights = field(default_factory=list)  # x_{l-1}
    key_outputs: Weights = field(default_factory=list)  # z_l
    slopes: Weights = field(default_factory=list)  # phi'(z_l), l < L
    pulled: Weights = field(default_factory=list)  # delta_{l+1} W_{l+1}^T, l < L
    deltas: Weights = field(default_factory=list)  # delta_l
    prediction: Tensor | None = None  # f(k)
    error: Tensor | None = None  # e
    key_head: HeadCache = field(default_factory=HeadCache)
    query_inputs: Weights = field(default_factory=list)  # x~_{l-1}
    query_slopes: Weights = field(default_factory=list)  # phi'(z~_l), l < L
    query_head: HeadCache = field(default_factory=HeadCache)


def _t(x: Tensor) -> Tensor:
    return x.transpose(-1, -2)


def _at_anchor(x: Tensor, anchor: Tensor, target: Tensor | None, keep: Tensor | None) -> Tensor:
    """x times the weights at which the inner gradient is taken."""
    if keep is None:
        return torch.bmm(x, anchor)
    z = torch.bmm(x, anchor) * keep
    return z if target is None else z + torch.bmm(x, target) * (1.0 - keep)


# --- forward ----------------------------------------------------------------------------------------------


def forward_chunk(spec: MemorySpec, slow: SlowParts, rows: Rows, state: ChunkState) -> tuple[Tensor, ChunkState, Tape]:
    """Outputs of one chunk, the state after it, and the tape for `backward_chunk`."""
    tape = Tape()
    _write_gradients(spec, slow, rows, state, tape)
    y = _read(spec, slow, rows, state, tape)

    weights, momentum = [], []
    for layer, (w, x, delta) in enumerate(zip(state.weights, tape.key_inputs, tape.deltas, strict=True)):
        new = w * rows.A_end
        if slow.target is not None:
            new = new.addcmul_(slow.target[layer], 1.0 - rows.A_end)
        if rows.F_end is not None:
            assert rows.m_end is not None and rows.E_end is not None
            s = state.momentum[layer]
            new.addcmul_(s, rows.F_end)
            momentum.append(torch.baddbmm(s * rows.m_end, _t(x * rows.E_end), delta, alpha=-1))
        weights.append(new.baddbmm_(_t(x * rows.G_end), delta, alpha=-1))
    return y, ChunkState(weights, momentum, state.anchor), tape


def _write_gradients(spec: MemorySpec, slow: SlowParts, rows: Rows, state: ChunkState, tape: Tape) -> None:
    """Per-token gradients at the anchor as rows: dW_l of token j is x_{l-1,j}^T delta_{l,j}."""
    activation, head = ACTIVATIONS[spec.activation], make_head(spec.norm, spec.norm_eps)
    depth = len(state.anchor)
    target = slow.target or [None] * depth
    x = rows.k
    for layer in range(depth):
        tape.key_inputs.append(x)
        z = _at_anchor(x, state.anchor[layer], target[layer], rows.keep)
        tape.key_outputs.append(z)
        if layer < depth - 1:
            x, slope = activation.with_slope(z)
            tape.slopes.append(slope)
    tape.prediction, cache = head.value(rows.k, z, slow.gamma, slow.beta)
    tape.error = INNER_LOSSES[spec.inner_loss](spec.loss_scale).error(tape.prediction, rows.v)
    delta, tape.key_head = head.pull_back(tape.error, cache)

    deltas, pulled = [delta], []
    for layer in range(depth - 1, 0, -1):
        above = target[layer]
        back = _at_anchor(delta, _t(state.anchor[layer]), None if above is None else _t(above), rows.keep)
        delta = back * tape.slopes[layer - 1]
        pulled.append(back)
        deltas.append(delta)
    tape.deltas, tape.pulled = deltas[::-1], pulled[::-1]


def _read(spec: MemorySpec, slow: SlowParts, rows: Rows, state: ChunkState, tape: Tape) -> Tensor:
    activation, head = ACTIVATIONS[spec.activation], make_head(spec.norm, spec.norm_eps)
    depth = len(state.weights)
    x = rows.q
    for layer in range(depth):
        tape.query_inputs.append(x)
        if rows.A is None:
            z = torch.bmm(x, state.anchor[layer])
        else:
            assert rows.G is not None
            z = torch.bmm(x * rows.A, state.weights[layer])
            if slow.target is not None:
                z.baddbmm_(x * (1.0 - rows.A), slow.target[layer])
            if rows.F is not None:
                z.baddbmm_(x * rows.F, state.momentum[layer])
            scores = torch.bmm(x, _t(tape.key_inputs[layer])).mul_(rows.G)
            z.baddbmm_(scores, tape.deltas[layer], alpha=-1)
        if layer < depth - 1:
            x, slope = activation.with_slope(z)
            tape.query_slopes.append(slope)
    y, tape.query_head = head.value(rows.q, z, slow.gamma, slow.beta)
    return y


# --- backward ---------------------------------------------------------------------------------------------


@dataclass
class Gradients:
    """Gradients of one chunk: of its rows (by field name), of the state before it, and of the slow parts."""

    rows: dict[str, Tensor]
    weights: Weights
    momentum: Weights
    anchor: Weights
    target: Weights | None
    gamma: Tensor | None
    beta: Tensor | None


class _ChunkBackward:
    """Reverse of `forward_chunk`: read, then state update, then the key pass with its second-order terms."""

    def __init__(self, spec: MemorySpec, slow: SlowParts, rows: Rows, state: ChunkState, tape: Tape):
        self.spec, self.slow, self.rows, self.state, self.tape = spec, slow, rows, state, tape
        self.depth = len(state.weights)
        self.activation = ACTIVATIONS[spec.activation]
        self.head = make_head(spec.norm, spec.norm_eps)
        self.row_grads: dict[str, Tensor] = {}
        self.g_weights: list[Any] = [None] * self.depth
        self.g_momentum: list[Any] = [None] * self.depth
        self.g_anchor: list[Any] = [None] * self.depth
        self.g_target: list[Any] = [None] * self.depth
        self.g_gamma: Tensor | None = None
        self.g_beta: Tensor | None = None
        self.g_inputs: list[Any] = [None] * self.depth  # of x_{l-1}
        self.g_deltas: list[Any] = [None] * self.depth

    def run(self, g_y: Tensor, g_new_weights: Weights, g_new_momentum: Weights) -> Gradients:
        self._state_update(g_new_weights, g_new_momentum)
        self._read(g_y)
        self._write_gradients()
        return Gradients(
            self.row_grads,
            self.g_weights,
            self.g_momentum if self.state.momentum else [],
            self.g_anchor,
            self.g_target if self.slow.target is not None else None,
            self.g_gamma,
            self.g_beta,
        )

    def _add_row(self, name: str, value: Tensor) -> None:
        present = self.row_grads.get(name)
        self.row_grads[name] = value if present is None else present.add_(value)

    def _add_norm(self, gamma: Tensor | None, beta: Tensor | None) -> None:
        if gamma is not None:
            self.g_gamma = gamma if self.g_gamma is None else self.g_gamma + gamma
        if beta is not None:
            self.g_beta = beta if self.g_beta is None else self.g_beta + beta

    @staticmethod
    def _product(into: list[Any], layer: int, left: Tensor, right: Tensor) -> None:
        """into[layer] += left right"""
        present = into[layer]
        into[layer] = torch.bmm(left, right) if present is None else present.baddbmm_(left, right)

    def _state_update(self, g_weights: Weights, g_momentum: Weights) -> None:
        rows, state, tape, target = self.rows, self.state, self.tape, self.slow.target
        dots: dict[str, Tensor] = {}

        def dot(name: str, left: Tensor, right: Tensor) -> None:
            value = (left * right).sum((-1, -2), keepdim=True)
            dots[name] = value if name not in dots else dots[name] + value

        for layer in range(self.depth):
            g_w, x, delta = g_weights[layer], tape.key_inputs[layer], tape.deltas[layer]
            self.g_weights[layer] = g_w * rows.A_end
            dot("A_end", g_w, state.weights[layer] if target is None else state.weights[layer] - target[layer])
            if target is not None:
                self.g_target[layer] = g_w * (1.0 - rows.A_end)
            back_x, back_delta = torch.bmm(delta, _t(g_w)), torch.bmm(x, g_w)
            self._add_row("G_end", (x * back_x).sum(-1, keepdim=True).neg_())
            g_x, g_delta = back_x.mul_(rows.G_end), back_delta.mul_(rows.G_end)
            if state.momentum:
                assert rows.F_end is not None and rows.m_end is not None and rows.E_end is not None
                g_s, s = g_momentum[layer], state.momentum[layer]
                self.g_momentum[layer] = torch.addcmul(g_w * rows.F_end, g_s, rows.m_end)
                dot("F_end", g_w, s)
                dot("m_end", g_s, s)
                back_x = torch.bmm(delta, _t(g_s))
                self._add_row("E_end", (x * back_x).sum(-1, keepdim=True).neg_())
                g_x.addcmul_(back_x, rows.E_end)
                g_delta.addcmul_(torch.bmm(x, g_s), rows.E_end)
            self.g_inputs[layer], self.g_deltas[layer] = g_x.neg_(), g_delta.neg_()
        self.row_grads.update(dots)

    def _read(self, g_y: Tensor) -> None:
        rows, state, tape, target = self.rows, self.state, self.tape, self.slow.target
        g_z, g_gamma, g_beta = self.head.value_vjp(g_y, tape.query_head)
        self._add_norm(g_gamma, g_beta)
        for layer in range(self.depth - 1, -1, -1):
            x = tape.query_inputs[layer]
            if rows.A is None:
                self._product(self.g_anchor, layer, _t(x), g_z)
                g_x = torch.bmm(g_z, _t(state.anchor[layer]))
            else:
                g_x = self._read_layer(layer, x, g_z)
            if layer:
                g_z = g_x.mul_(tape.query_slopes[layer - 1])
        self.row_grads["q"] = g_x.add_(g_y) if self.head.residual else g_x

    def _read_layer(self, layer: int, x: Tensor, g_z: Tensor) -> Tensor:
        """One layer of the dual-form read; returns the gradient of its query-side input x."""
        rows, state, tape = self.rows, self.state, self.tape
        target = None if self.slow.target is None else self.slow.target[layer]
        assert rows.A is not None and rows.G is not None
        keys, delta = tape.key_inputs[layer], tape.deltas[layer]

        along_w = torch.bmm(g_z, _t(state.weights[layer]))
        self.g_weights[layer].baddbmm_(_t(x * rows.A), g_z)
        g_x = along_w * rows.A
        if target is not None:
            along_m = torch.bmm(g_z, _t(target))
            self.g_target[layer].baddbmm_(_t(x * (1.0 - rows.A)), g_z)
            g_x.addcmul_(along_m, 1.0 - rows.A)
            along_w = along_w.sub_(along_m)
        self._add_row("A", (x * along_w).sum(-1, keepdim=True))
        if rows.F is not None:
            along_s = torch.bmm(g_z, _t(state.momentum[layer]))
            self.g_momentum[layer].baddbmm_(_t(x * rows.F), g_z)
            g_x.addcmul_(along_s, rows.F)
            self._add_row("F", (x * along_s).sum(-1, keepdim=True))

        scores = torch.bmm(x, _t(keys))
        g_scores = torch.bmm(g_z, _t(delta))
        self._add_row("G", (scores * g_scores).neg_())
        self.g_deltas[layer].baddbmm_(_t(scores.mul_(rows.G)), g_z, alpha=-1)
        g_scores.mul_(rows.G)
        self.g_inputs[layer].baddbmm_(_t(g_scores), x, alpha=-1)
        return g_x.baddbmm_(g_scores, keys, alpha=-1)

    def _write_gradients(self) -> None:
        tape, slow = self.tape, self.slow
        anchor, target = self.state.anchor, slow.target or [None] * self.depth
        g_outputs: list[Any] = [None] * self.depth  # of z_l

        # delta_l = (delta_{l+1} W_{l+1}^T) phi'(z_l), in the order in which delta_L was pulled down, reversed.
        for layer in range(self.depth - 1):
            g_delta = self.g_deltas[layer]
            g_outputs[layer] = (g_delta * tape.pulled[layer]).mul_(self.activation.curvature(tape.key_outputs[layer]))
            g_back = g_delta.mul_(tape.slopes[layer])
            above = target[layer + 1]
            self.g_deltas[layer + 1].add_(
                self._anchor_product(g_back, layer + 1, anchor[layer + 1], above, tape.deltas[layer + 1], transposed=True)
            )

        assert tape.error is not None and tape.prediction is not None
        loss = INNER_LOSSES[self.spec.inner_loss](self.spec.loss_scale)
        g_error, g_z, g_gamma = self.head.pull_back_vjp(self.g_deltas[-1], tape.error, tape.key_head)
        self._add_norm(g_gamma, None)
        g_f, self.row_grads["v"] = loss.error_vjp(g_error, tape.prediction, self.rows.v)
        if g_f is not None:
            through_head, g_gamma, g_beta = self.head.value_vjp(g_f, tape.key_head)
            self._add_norm(g_gamma, g_beta)
            g_z = through_head if g_z is None else g_z.add_(through_head)
        g_outputs[-1] = g_z

        for layer in range(self.depth - 1, -1, -1):
            g_x = self.g_inputs[layer]
            if g_outputs[layer] is not None:
                g_x.add_(self._anchor_product(g_outputs[layer], layer, anchor[layer], target[layer], tape.key_inputs[layer]))
            if layer:
                below = g_x.mul_(tape.slopes[layer - 1])
                present = g_outputs[layer - 1]
                g_outputs[layer - 1] = below if present is None else present.add_(below)
        self.row_grads["k"] = g_x.add_(g_f) if self.head.residual and g_f is not None else g_x

    def _anchor_product(
        self, grad: Tensor, layer: int, anchor: Tensor, target: Tensor | None, x: Tensor, transposed: bool = False
    ) -> Tensor:
        """Reverse of `_at_anchor(x, W)` (or of `_at_anchor(x, W^T)`): gradient of x; adds those of W, M and keep."""
        keep = self.rows.keep

        def add_outer(into: list[Any], g: Tensor) -> None:
            left, right = (g, x) if transposed else (x, g)
            self._product(into, layer, _t(left), right)

        through = anchor if transposed else _t(anchor)
        if keep is None:
            add_outer(self.g_anchor, grad)
            return torch.bmm(grad, through)
        forward = torch.bmm(x, _t(through))
        kept = grad * keep
        add_outer(self.g_anchor, kept)
        g_x = torch.bmm(kept, through)
        if target is not None:
            toward = target if transposed else _t(target)
            forward = forward.sub_(torch.bmm(x, _t(toward)))
            lost = grad * (1.0 - keep)
            add_outer(self.g_target, lost)
            g_x.baddbmm_(lost, toward)
        self._add_row("keep", (grad * forward).sum(-1, keepdim=True))
        return g_x


def backward_chunk(
    spec: MemorySpec, slow: SlowParts, rows: Rows, state: ChunkState, tape: Tape,
    g_y: Tensor, g_new_weights: Weights, g_new_momentum: Weights,
) -> Gradients:  # fmt: skip
    """Gradients of one chunk from those of its outputs and of the state after it."""
    return _ChunkBackward(spec, slow, rows, state, tape).run(g_y, g_new_weights, g_new_momentum)


# --- the walk over the chunks -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How to walk: for each chunk whether it starts with a reset and whether it closes (see `ChunkGrid`).

    Masks are None, a bool, or bool ``[m, 1, 1]``.
    """

    spec: MemorySpec
    depth: int
    momentum: bool
    resets: list[Tensor | None]
    closes: list[bool | Tensor]
    has_target: bool
    has_norm: bool


def _pack_state(state: ChunkState) -> list[Tensor]:
    return [*state.weights, *state.momentum, *state.anchor]


class _Scan(torch.autograd.Function):
    """All chunks in order. Inputs: the plan, the twelve fields of `Rows` with a leading n, then the tensors
    target, gamma, beta, start weights, start momentum, weights, momentum, anchor (those that exist)."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, keep_tape: bool, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        rows, slow, start, state = _unpack(plan, tensors)
        outputs = torch.empty_like(rows.q)
        surprise = rows.q.new_empty(rows.q.shape[:-1])
        states, tapes = [], []
        for n in range(rows.q.shape[0]):
            state = _enter(plan, n, state, start)
            y, after, tape = forward_chunk(plan.spec, slow, rows.chunk(n), state)
            outputs[n] = y
            surprise[n] = gradient_norm(tape)
            if keep_tape:
                states.append(state)
                tapes.append(None if plan.spec.recompute else tape)
            state = _leave(plan, n, after)
        ctx.plan, ctx.states, ctx.tapes = plan, states, tapes
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(surprise)
        # Autograd needs outputs that are neither inputs nor each other; an anchor may be both.
        anchor = [a.clone() for a in state.anchor]
        return outputs, surprise, *state.weights, *state.momentum, *anchor

    @staticmethod
    def backward(ctx: Any, g_outputs: Tensor, _: Tensor, *g_final: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        plan: Plan = ctx.plan
        tensors = ctx.saved_tensors
        rows, slow, _, _ = _unpack(plan, tensors)
        depth, count = plan.depth, plan.depth if plan.momentum else 0
        g_w = [g.clone() for g in g_final[:depth]]
        g_s = [g.clone() for g in g_final[depth : depth + count]]
        g_a = [g.clone() for g in g_final[depth + count :]]
        total = _Totals(plan, rows, slow)
        for n in range(rows.q.shape[0] - 1, -1, -1):
            state, tape, chunk = ctx.states[n], ctx.tapes[n], rows.chunk(n)
            if tape is None:
                _, _, tape = forward_chunk(plan.spec, slow, chunk, state)
            passed = _leave_backward(plan, n, g_w, g_a)
            grads = backward_chunk(plan.spec, slow, chunk, state, tape, g_outputs[n], g_w, g_s)
            ctx.tapes[n] = None
            total.add(n, grads)
            g_w, g_s = grads.weights, grads.momentum
            g_a = [p if g is None else (g if p is None else g.add_(p)) for g, p in zip(grads.anchor, passed, strict=True)]
            g_a = [torch.zeros_like(w) if a is None else a for a, w in zip(g_a, g_w, strict=True)]
            if plan.resets[n] is not None:
                g_w, g_s, g_a = total.reset(plan.resets[n], g_w, g_s, g_a)
        return (None, None, *total.rows(), *total.slow(), *total.start(), *g_w, *g_s, *g_a)


def gradient_norm(tape: Tape) -> Tensor:
    """Frobenius norm of each token's inner gradient, ``[m, C]``: its per-layer gradients have rank one."""
    squares = [
        x.square().sum(-1) * delta.square().sum(-1) for x, delta in zip(tape.key_inputs, tape.deltas, strict=True)
    ]
    return torch.stack(squares).sum(0).sqrt()


def _unpack(plan: Plan, tensors: tuple[Tensor | None, ...]) -> tuple[Rows, SlowParts, ChunkState, ChunkState]:
    rest: list[Any] = list(tensors)

    def take(n: int) -> list[Any]:
        head, rest[:] = rest[:n], rest[n:]
        return head

    rows = Rows(*take(len(Rows._fields)))
    target = take(plan.depth) if plan.has_target else None
    gamma, beta = take(2) if plan.has_norm else (None, None)
    count = plan.depth if plan.momentum else 0
    start = ChunkState(take(plan.depth), take(count), [])
    state = ChunkState(take(plan.depth), take(count), take(plan.depth))
    return rows, SlowParts(target, gamma, beta), start, state


def _enter(plan: Plan, n: int, state: ChunkState, start: ChunkState) -> ChunkState:
    fresh = plan.resets[n]
    if fresh is None:
        return state
    weights = [torch.where(fresh, s, w) for s, w in zip(start.weights, state.weights, strict=True)]
    momentum = [torch.where(fresh, s, w) for s, w in zip(start.momentum, state.momentum, strict=True)]
    anchor = [torch.where(fresh, s, w) for s, w in zip(start.weights, state.anchor, strict=True)]
    return ChunkState(weights, momentum, anchor)


def _leave(plan: Plan, n: int, state: ChunkState) -> ChunkState:
    closed = plan.closes[n]
    if closed is True:
        return replace(state, anchor=state.weights)
    if closed is False:
        return state
    return replace(state, anchor=[torch.where(closed, w, a) for w, a in zip(state.weights, state.anchor, strict=True)])


def _leave_backward(plan: Plan, n: int, g_weights: Weights, g_anchor: Weights) -> list[Tensor | None]:
    """Reverse of `_leave`: adds to g_weights in place, returns what passes to the anchor before the chunk."""
    closed = plan.closes[n]
    if closed is False:
        return list(g_anchor)
    if closed is True:
        for g_w, g_a in zip(g_weights, g_anchor, strict=True):
            g_w.add_(g_a)
        return [None] * len(g_anchor)
    for g_w, g_a in zip(g_weights, g_anchor, strict=True):
        g_w.add_(torch.where(closed, g_a, 0.0))
    return [torch.where(closed, 0.0, g_a) for g_a in g_anchor]


class _Totals:
    """Gradients summed over the chunks, laid out as the inputs of `_Scan`."""

    def __init__(self, plan: Plan, rows: Rows, slow: SlowParts):
        self.plan = plan
        self._rows = [None if t is None else torch.zeros_like(t) for t in rows]
        self._target = [torch.zeros_like(t) for t in slow.target or []]
        self._gamma = None if slow.gamma is None else torch.zeros_like(slow.gamma)
        self._beta = None if slow.beta is None else torch.zeros_like(slow.beta)
        self._start_weights: list[Tensor | None] = [None] * plan.depth
        self._start_momentum: list[Tensor | None] = [None] * (plan.depth if plan.momentum else 0)

    def add(self, n: int, grads: Gradients) -> None:
        for name, into in zip(Rows._fields, self._rows, strict=True):
            if into is not None and name in grads.rows:
                into[n] = grads.rows[name]
        for into, g in zip(self._target, grads.target or [], strict=True):
            into.add_(g)
        if self._gamma is not None and grads.gamma is not None:
            self._gamma.add_(grads.gamma)
        if self._beta is not None and grads.beta is not None:
            self._beta.add_(grads.beta)

    def reset(self, fresh: Any, g_w: Weights, g_s: Weights, g_a: Weights) -> tuple[Weights, Weights, Weights]:
        """Reverse of `_enter`: what flows to the start state is summed, the rest goes on to the chunk before."""

        def split(into: list[Tensor | None], gradients: Weights) -> Weights:
            for layer, g in enumerate(gradients):
                part = torch.where(fresh, g, 0.0)
                present = into[layer]
                into[layer] = part if present is None else present + part
            return [torch.where(fresh, 0.0, g) for g in gradients]

        return split(self._start_weights, g_w), split(self._start_momentum, g_s), split(self._start_weights, g_a)

    def rows(self) -> list[Tensor | None]:
        return self._rows

    def slow(self) -> list[Tensor | None]:
        norm = [self._gamma, self._beta] if self.plan.has_norm else []
        return [*self._target, *norm]

    def start(self) -> list[Tensor | None]:
        return [*self._start_weights, *self._start_momentum]


def scan(plan: Plan, rows: Rows, slow: SlowParts, start: ChunkState, state: ChunkState) -> tuple[Tensor, Tensor, ChunkState]:
    """Walk the chunks. Returns outputs ``[n, m, C, p]``, the gradient norms ``[n, m, C]`` and the final state."""
    norm = [slow.gamma, slow.beta] if plan.has_norm else []
    tensors = [*rows, *(slow.target or []), *norm, *start.weights, *start.momentum, *_pack_state(state)]
    keep_tape = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    outputs, surprise, *final = _Scan.apply(plan, keep_tape, *tensors)
    count = plan.depth if plan.momentum else 0
    after = ChunkState(final[: plan.depth], final[plan.depth : plan.depth + count], final[plan.depth + count :])
    return outputs, surprise, after
