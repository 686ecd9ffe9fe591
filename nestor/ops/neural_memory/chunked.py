"""The chunked form of the neural memory: dense products, explicit inner gradients, hand-written backward.

Per chunk, with all gradients at the anchor ``Wa`` (spec/neural-memory.md section 2.3; ``x_0 = k``), and with
the deviation ``D = W - M`` from the learned initial weights M that the memory decays to:

    keys     z_l = x_{l-1} Wa_l        x_l = phi(z_l)        delta_l = (delta_{l+1} Wa_{l+1}^T) phi'(z_l)
    state    D'_l = A_C D_l + F_C S_l - (G_C x_{l-1})^T delta_l
             S'_l = m_C S_l - (E_C x_{l-1})^T delta_l
    queries  z~_l = x~_{l-1} M_l + A x~_{l-1} D_l + F x~_{l-1} S_l - (G * x~_{l-1} x_{l-1}^T) delta_l

Only the writes (keys and state) wait for the chunk before: they go chunk by chunk, as `write_chunk`. Reads
(queries) wait for nothing but their chunk's state: `read_block` takes many chunks at once. D and S of a layer
are one stack of components. A memory without momentum has no S, one that decays to zero no M, and its D is W.
Nothing of size tokens x weights exists. The backward differentiates these lines, so it carries the
second-order terms of the inner gradient (section 2.4). Steps are ``u_l = -delta_l``, so that all signs are
plus. Sequences and heads are one batch axis ``m``; a block of reads has the batch axis ``b``, m x its chunks.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nestor.ops.neural_memory.coefficients import chunk_coefficients
from nestor.ops.neural_memory.functions import ACTIVATIONS, HeadCache, make_head
from nestor.ops.neural_memory.spec import MemorySpec

Layers = list[Tensor]  # one tensor per layer of the memory network


class Tokens(NamedTuple):
    """The tokens of all chunks and their gates: q, k, v ``[m, N, C, p]``; theta, eta, alpha, and valid (bool)
    ``[m, N, C]``, None where there is none."""

    q: Tensor
    k: Tensor
    v: Tensor
    theta: Tensor
    eta: Tensor | None
    alpha: Tensor | None
    valid: Tensor | None


class Rows(NamedTuple):
    """The tokens of all chunks and their coefficients, ``[m, N, ...]``; of one chunk without the N.

    k, v ``[C, p]``. carry ``[c]``: the share of each component that the chunk keeps (A_C, or A_C and m_C),
    and cross ``[1]`` = F_C, what it moves from S to D. write ``[C, c]``: the weight of each token's step in
    the components. keep ``[C, 1]``: a_t for post-decay gradients, else None. q ``[C, p]``, read ``[C, c]``,
    G ``[C, C]``: how query rows mix the components and the chunk's own steps; None for chunk-start reads.
    """

    k: Tensor
    v: Tensor
    carry: Tensor
    cross: Tensor | None
    write: Tensor
    keep: Tensor | None
    q: Tensor
    read: Tensor | None
    G: Tensor | None

    def chunk(self, n: int) -> "Rows":
        """Chunk n, ``[m, ...]``."""
        return Rows(*(None if t is None else t[:, n] for t in self))  # type: ignore[arg-type]

    def queries(self, block: slice) -> "Queries":
        """What the reads of a block of chunks take, ``[b, ...]``."""
        taken = (None if t is None else t[:, block].flatten(0, 1) for t in (self.q, self.read, self.G))
        return Queries(*taken)  # type: ignore[arg-type]


class Queries(NamedTuple):
    """q, read and G of `Rows`, for the chunks of a block: ``[b, C, ...]``."""

    q: Tensor
    read: Tensor | None
    G: Tensor | None


def make_rows(tokens: Tokens, spec: MemorySpec) -> Rows:
    """Arrange the coefficients of all chunks for the components D and S."""
    c = chunk_coefficients(tokens.theta, tokens.eta, tokens.alpha, tokens.valid)
    keep = None
    if spec.grad_at == "post_decay" and tokens.alpha is not None:
        keep = (1.0 - tokens.alpha).unsqueeze(-1)

    def components(of_weights: Tensor, of_momentum: Tensor | None) -> Tensor:
        return torch.stack([of_weights] if of_momentum is None else [of_weights, of_momentum], -1)

    read = G = None
    if spec.read_mode != "chunk_start":
        r = c.exclusive() if spec.read_mode == "exclusive" else c
        read, G = components(r.A, r.F), r.G
    carry = components(c.A_end, c.m_end).squeeze(-2)
    return Rows(tokens.k, tokens.v, carry, c.F_end, components(c.G_end, c.E_end), keep, tokens.q, read, G)


@dataclass(frozen=True)
class Norm:
    """The slow parameters of the head, ``[m, 1, p]``, or None."""

    gamma: Tensor | None
    beta: Tensor | None


@dataclass
class ChunkState:
    """Per layer: stacks, the components ``[m, c, in, out]`` in the order D, S; anchor ``[m, in, out]``;
    targets, M ``[m, in, out]``, the same in every chunk, or None if the memory decays to zero."""

    stacks: Layers
    anchor: Layers
    targets: Layers | None

    def target(self, layer: int) -> Tensor | None:
        """M of a layer."""
        return None if self.targets is None else self.targets[layer]


@dataclass
class Writing:
    """Intermediate values of the writes of one chunk."""

    inputs: Layers = field(default_factory=list)  # x_{l-1}
    slopes: Layers = field(default_factory=list)  # phi'(z_l), l < L
    curvatures: Layers = field(default_factory=list)  # phi''(z_l), l < L
    pulled: Layers = field(default_factory=list)  # u_{l+1} W_{l+1}^T, l < L
    steps: Layers = field(default_factory=list)  # u_l
    prediction: Tensor | None = None  # f(k)
    error: Tensor | None = None  # e
    head: HeadCache = field(default_factory=HeadCache)


@dataclass
class Reading:
    """Intermediate values of the reads of a block of chunks, and what they saw of its writes."""

    keys: Layers  # x_{l-1}
    steps: Layers  # u_l
    stacks: Layers  # D, S; of a chunk-start read the anchor
    inputs: Layers = field(default_factory=list)  # x~_{l-1}
    scores: Layers = field(default_factory=list)  # x~_{l-1} x_{l-1}^T
    weighted: Layers = field(default_factory=list)  # scores times G
    slopes: Layers = field(default_factory=list)  # phi'(z~_l), l < L
    head: HeadCache = field(default_factory=HeadCache)


def _t(x: Tensor) -> Tensor:
    return x.transpose(-1, -2)


def _spread(x: Tensor, coefficients: Tensor) -> Tensor:
    """x ``[b, C, in]`` scaled by each of the coefficients ``[b, C, c]``, side by side: ``[b, C, c in]``."""
    return (x.unsqueeze(-2) * coefficients.unsqueeze(-1)).flatten(-2)


def _gather(along: Tensor, x: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Reverse of `_spread`: from the gradient ``[b, C, c in]`` of its result those of x and coefficients."""
    along = along.unflatten(-1, (-1, x.shape[-1]))
    g_coefficients = torch.linalg.vecdot(along, x.unsqueeze(-2))
    g_x = along[..., 0, :] * coefficients[..., :1]
    for c in range(1, coefficients.shape[-1]):
        g_x.addcmul_(along[..., c, :], coefficients[..., c : c + 1])
    return g_x, g_coefficients


def _by_sequence(x: Tensor, like: Tensor) -> Tensor:
    """``[b, C, w]`` as ``[m, tokens, w]``, for what all chunks of a sequence share (like: ``[m, ...]``)."""
    return x.reshape(like.shape[0], -1, x.shape[-1])


def _at_anchor(x: Tensor, anchor: Tensor, target: Tensor | None, keep: Tensor | None) -> Tensor:
    """x times the weights at which the inner gradient is taken."""
    if keep is None:
        return torch.bmm(x, anchor)
    z = torch.bmm(x, anchor) * keep
    return z if target is None else z + torch.bmm(x, target) * (1.0 - keep)


# --- forward ----------------------------------------------------------------------------------------------


def write_chunk(spec: MemorySpec, norm: Norm, rows: Rows, state: ChunkState) -> tuple[Layers, Writing]:
    """The components after one chunk, and what its reads and its backward use."""
    tape = write_gradients(spec, norm, rows, state)
    carry = rows.carry[..., None, None]
    stacks = []
    for stack, x, step in zip(state.stacks, tape.inputs, tape.steps, strict=True):
        after = stack * carry
        if rows.cross is not None:
            after[:, 0].addcmul_(stack[:, 1], rows.cross.unsqueeze(-1))
        after.flatten(1, 2).baddbmm_(_t(_spread(x, rows.write)), step)
        stacks.append(after)
    return stacks, tape


def write_gradients(spec: MemorySpec, norm: Norm, rows: Rows, state: ChunkState) -> Writing:
    """Per-token gradients at the anchor as rows: -dW_l of token j is x_{l-1,j}^T u_{l,j}."""
    activation, head = ACTIVATIONS[spec.activation], make_head(spec.norm, spec.norm_eps)
    depth = len(state.anchor)
    tape = Writing()
    x = rows.k
    for layer in range(depth):
        tape.inputs.append(x)
        z = _at_anchor(x, state.anchor[layer], state.target(layer), rows.keep)
        if layer < depth - 1:
            x, slope, curvature = activation.with_curvature(z)
            tape.slopes.append(slope)
            tape.curvatures.append(curvature)
    tape.prediction, cache = head.value(rows.k, z, norm.gamma, norm.beta)
    tape.error = spec.loss().error(tape.prediction, rows.v)
    delta, tape.head = head.pull_back(tape.error, cache)

    steps, pulled = [-delta], []
    for layer in range(depth - 1, 0, -1):
        target = state.target(layer)
        back = _at_anchor(
            steps[-1], _t(state.anchor[layer]), None if target is None else _t(target), rows.keep
        )
        pulled.append(back)
        steps.append(back * tape.slopes[layer - 1])
    tape.steps, tape.pulled = steps[::-1], pulled[::-1]
    return tape


def read_block(
    spec: MemorySpec, norm: Norm, queries: Queries, targets: Layers | None, tape: Reading
) -> Tensor:
    """Outputs ``[b, C, p]`` of the chunks of a block; fills the tape."""
    activation, head = ACTIVATIONS[spec.activation], make_head(spec.norm, spec.norm_eps)
    depth = len(tape.stacks)
    x = queries.q
    for layer, stack in enumerate(tape.stacks):
        tape.inputs.append(x)
        if queries.read is None or queries.G is None:
            z = torch.bmm(x, stack)
        else:
            tape.scores.append(torch.bmm(x, _t(tape.keys[layer])))
            tape.weighted.append(tape.scores[layer] * queries.G)
            z = torch.bmm(_spread(x, queries.read), stack.flatten(1, 2))
            z.baddbmm_(tape.weighted[layer], tape.steps[layer])
            if targets is not None:
                _by_sequence(z, targets[layer]).baddbmm_(_by_sequence(x, targets[layer]), targets[layer])
        if layer < depth - 1:
            x, slope = activation.with_slope(z)
            tape.slopes.append(slope)
    if norm.gamma is None:
        y, tape.head = head.value(queries.q, z, None, None)
        return y
    y, tape.head = head.value(
        _by_sequence(queries.q, norm.gamma), _by_sequence(z, norm.gamma), norm.gamma, norm.beta
    )
    return y.view_as(queries.q)


def gradient_norm(tape: Reading) -> Tensor:
    """Frobenius norm of each token's inner gradient, ``[b, C]``: its per-layer gradients have rank one."""
    squares = [
        torch.linalg.vecdot(x, x) * torch.linalg.vecdot(step, step)
        for x, step in zip(tape.keys, tape.steps, strict=True)
    ]
    return torch.stack(squares).sum(0).sqrt()


# --- backward ---------------------------------------------------------------------------------------------


class Sums:
    """Gradients of what all chunks share, added up: gamma, beta ``[m, 1, p]`` and the targets per layer."""

    def __init__(self) -> None:
        self.gamma: Tensor | None = None
        self.beta: Tensor | None = None
        self.targets: dict[int, Tensor] = {}

    def add_norm(self, gamma: Tensor | None, beta: Tensor | None) -> None:
        if gamma is not None:
            self.gamma = gamma if self.gamma is None else self.gamma.add_(gamma)
        if beta is not None:
            self.beta = beta if self.beta is None else self.beta.add_(beta)

    def add_target(self, layer: int, grad: Tensor) -> None:
        present = self.targets.get(layer)
        self.targets[layer] = grad.clone() if present is None else present.add_(grad)

    def add_target_product(self, layer: int, x: Tensor, grad: Tensor) -> None:
        """The gradient of M from that of ``x M``."""
        present = self.targets.get(layer)
        self.targets[layer] = torch.bmm(_t(x), grad) if present is None else present.baddbmm_(_t(x), grad)


@dataclass
class BlockGradients:
    """Gradients from the reads of a block: of its `Queries`, and per layer of what they saw, as in `Reading`.
    The lists of keys and steps are empty for chunk-start reads."""

    queries: Queries
    keys: Layers
    steps: Layers
    stacks: Layers


def read_block_backward(
    spec: MemorySpec, queries: Queries, targets: Layers | None, tape: Reading, g_y: Tensor, sums: Sums
) -> BlockGradients:
    """Reverse of `read_block`."""
    head = make_head(spec.norm, spec.norm_eps)
    depth = len(tape.stacks)
    g_keys, g_steps, g_stacks = [], [], []
    g_read: Tensor | None = None
    g_G: Tensor | None = None
    g_out = g_y if tape.head.gamma is None else _by_sequence(g_y, tape.head.gamma)
    g_z, g_gamma, g_beta = head.value_vjp(g_out, tape.head)
    sums.add_norm(g_gamma, g_beta)
    g_z = g_z.reshape(g_y.shape)
    for layer in range(depth - 1, -1, -1):
        x, stack = tape.inputs[layer], tape.stacks[layer]
        if queries.read is None or queries.G is None:
            g_stacks.append(torch.bmm(_t(x), g_z))
            g_x = torch.bmm(g_z, _t(stack))
        else:
            along = torch.bmm(g_z, _t(stack.flatten(1, 2)))
            g_x, g_coefficients = _gather(along, x, queries.read)
            g_read = g_coefficients if g_read is None else g_read.add_(g_coefficients)
            g_stacks.append(torch.bmm(_t(_spread(x, queries.read)), g_z).view_as(stack))
            g_weighted = torch.bmm(g_z, _t(tape.steps[layer]))
            g_steps.append(torch.bmm(_t(tape.weighted[layer]), g_z))
            scores = tape.scores[layer]
            g_G = scores * g_weighted if g_G is None else g_G.addcmul_(scores, g_weighted)
            g_scores = g_weighted.mul_(queries.G)
            g_keys.append(torch.bmm(_t(g_scores), x))
            g_x.baddbmm_(g_scores, tape.keys[layer])
            if targets is not None:
                target = targets[layer]
                sums.add_target_product(layer, _by_sequence(x, target), _by_sequence(g_z, target))
                _by_sequence(g_x, target).baddbmm_(_by_sequence(g_z, target), _t(target))
        if layer:
            g_z = g_x.mul_(tape.slopes[layer - 1])
    g_q = g_x.add_(g_y) if head.residual else g_x
    return BlockGradients(Queries(g_q, g_read, g_G), g_keys[::-1], g_steps[::-1], g_stacks[::-1])


@dataclass
class ChunkGradients:
    """Gradients of one chunk: of its rows (by field name), and per layer of the state before it."""

    rows: dict[str, Tensor]
    stacks: Layers
    anchor: list[Tensor | None]


class _WriteBackward:
    """Reverse of `write_chunk`: state update, then the key pass with its second-order terms."""

    def __init__(self, spec: MemorySpec, rows: Rows, state: ChunkState, tape: Writing, sums: Sums):
        self.rows, self.state, self.tape, self.sums = rows, state, tape, sums
        self.depth = len(state.anchor)
        self.head = make_head(spec.norm, spec.norm_eps)
        self.loss = spec.loss()
        self.row_grads: dict[str, Tensor] = {}
        self.g_stacks: Layers = []
        self.g_anchor: list[Any] = [None] * self.depth
        self.g_inputs: Layers = []  # of x_{l-1}
        self.g_steps: Layers = []

    def run(self, g_after: Layers, seen: BlockGradients | None) -> ChunkGradients:
        """g_after: gradients of the components after the chunk. seen: those from its dual-form reads."""
        for layer in range(self.depth):
            self._state_update(layer, g_after[layer])
            if seen is not None:
                self.g_stacks[layer].add_(seen.stacks[layer])
                self.g_inputs[layer].add_(seen.keys[layer])
                self.g_steps[layer].add_(seen.steps[layer])
        self._write_gradients()
        return ChunkGradients(self.row_grads, self.g_stacks, self.g_anchor)

    def _add_row(self, name: str, value: Tensor) -> None:
        present = self.row_grads.get(name)
        self.row_grads[name] = value if present is None else present.add_(value)

    def _state_update(self, layer: int, g_after: Tensor) -> None:
        rows, tape, stack = self.rows, self.tape, self.state.stacks[layer]
        x = tape.inputs[layer]
        g_before = g_after * rows.carry[..., None, None]
        gram = torch.bmm(g_after.flatten(2), _t(stack.flatten(2)))
        self._add_row("carry", gram.diagonal(dim1=-2, dim2=-1))
        if rows.cross is not None:
            g_before[:, 1].addcmul_(g_after[:, 0], rows.cross.unsqueeze(-1))
            self._add_row("cross", gram[:, 0, 1:])
        self.g_stacks.append(g_before)
        flat = g_after.flatten(1, 2)
        along = torch.bmm(tape.steps[layer], _t(flat))
        g_x, g_write = _gather(along, x, rows.write)
        self._add_row("write", g_write)
        self.g_inputs.append(g_x)
        self.g_steps.append(torch.bmm(_spread(x, rows.write), flat))

    def _write_gradients(self) -> None:
        tape = self.tape
        g_outputs: list[Any] = [None] * self.depth  # of z_l

        # u_l = (u_{l+1} W_{l+1}^T) phi'(z_l): the reverse of pulling steps down walks up.
        for layer in range(self.depth - 1):
            g_step = self.g_steps[layer]
            g_outputs[layer] = (g_step * tape.pulled[layer]).mul_(tape.curvatures[layer])
            g_back = g_step.mul_(tape.slopes[layer])
            above, g_above = tape.steps[layer + 1], self.g_steps[layer + 1]
            self._anchor_product(g_back, layer + 1, above, g_above, transposed=True)

        assert tape.error is not None and tape.prediction is not None
        g_delta = self.g_steps[-1].neg_()
        g_error, g_z, g_gamma = self.head.pull_back_vjp(g_delta, tape.error, tape.head)
        self.sums.add_norm(g_gamma, None)
        g_f, self.row_grads["v"] = self.loss.error_vjp(g_error, tape.prediction, self.rows.v)
        if g_f is not None:
            through_head, g_gamma, g_beta = self.head.value_vjp(g_f, tape.head)
            self.sums.add_norm(g_gamma, g_beta)
            g_z = through_head if g_z is None else g_z.add_(through_head)
        g_outputs[-1] = g_z

        for layer in range(self.depth - 1, -1, -1):
            g_x = self.g_inputs[layer]
            if g_outputs[layer] is not None:
                self._anchor_product(g_outputs[layer], layer, tape.inputs[layer], g_x)
            if layer:
                present = g_outputs[layer - 1]
                below = tape.slopes[layer - 1]
                g_outputs[layer - 1] = g_x * below if present is None else present.addcmul_(g_x, below)
        self.row_grads["k"] = g_x.add_(g_f) if self.head.residual and g_f is not None else g_x

    def _anchor_product(
        self, grad: Tensor, layer: int, x: Tensor, g_x: Tensor, transposed: bool = False
    ) -> None:
        """Reverse of `_at_anchor` on W (or on W^T): adds the gradients of x, W, M and keep."""
        keep, anchor, target = self.rows.keep, self.state.anchor[layer], self.state.target(layer)
        through = anchor if transposed else _t(anchor)

        def outer(g: Tensor) -> tuple[Tensor, Tensor]:
            return (g, x) if transposed else (x, g)

        kept = grad if keep is None else grad * keep
        left, right = outer(kept)
        present = self.g_anchor[layer]
        self.g_anchor[layer] = (
            torch.bmm(_t(left), right) if present is None else present.baddbmm_(_t(left), right)
        )
        g_x.baddbmm_(kept, through)
        if keep is not None:
            forward = torch.bmm(x, _t(through))
            if target is not None:
                toward = target if transposed else _t(target)
                forward.sub_(torch.bmm(x, _t(toward)))
                lost = grad * (1.0 - keep)
                self.sums.add_target_product(layer, *outer(lost))
                g_x.baddbmm_(lost, toward)
            self._add_row("keep", torch.linalg.vecdot(grad, forward).unsqueeze(-1))


def write_chunk_backward(
    spec: MemorySpec,
    rows: Rows,
    state: ChunkState,
    tape: Writing,
    g_after: Layers,
    seen: BlockGradients | None,
    sums: Sums,
) -> ChunkGradients:
    """Gradients of one chunk from those of the components after it and of what its reads saw."""
    return _WriteBackward(spec, rows, state, tape, sums).run(g_after, seen)
