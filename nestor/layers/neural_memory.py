"""The neural memory as a layer: Titans' long-term memory module (LMM)."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestor.errors import ConfigError, suggest
from nestor.layers.convolution import ShortConvolution, start_projections
from nestor.layers.norm import RMSNorm
from nestor.layers.projections import project_together, project_wide, stacked
from nestor.layers.registry import register_mixer
from nestor.layers.span import Span
from nestor.layers.walking import pack, unpack
from nestor.layers.writes import recording, report_write, unrecorded
from nestor.ops.fused_streams import convolved_heads, fuses, memory_inputs
from nestor.ops.gated_norm import gated_norm
from nestor.ops.heads import silu_heads
from nestor.ops.neural_memory import MemorySpec, MemoryState, apply_network, neural_memory

LayerState = dict[str, Tensor]

# Standard deviation of the initial output weights of a memory network. A layer norm behind them multiplies
# inner gradients by its inverse, and their square is the natural write step: small weights make a memory that
# explodes.
OUTPUT_STD = 0.5
# Means of silu(z)^2 and silu'(z)^2, and nearly of gelu's, for a standard normal z.
HIDDEN_SQUARE = 0.36
SLOPE_SQUARE = 0.38


@dataclass
class Gates:
    """Write step, momentum keep, forget fraction, and what only some members of the family have: gates of a
    window, threshold of the loss, size of orthogonalised steps. float32, shaped as `neural_memory` says, in
    general `[B, T, H]`, per token and head; None: off."""

    theta: Tensor
    eta: Tensor | None
    alpha: Tensor | None
    omega: Tensor | None = None
    delta: Tensor | None = None
    step: Tensor | None = None


class NeuralMemory(nn.Module):
    """A small network per head that learns, while the sequence is read, to map keys to values.

    Titans, arXiv 2501.00663, section 3.1; block as in spec/neural-memory.md section 3.1:
    `y = W_O( RMSNorm(f(q; W_t)) * sigmoid(x W_G) )` with `q, k, v = silu(conv(x W))`, q and k of unit
    length.

    Args:
        dim: width `d` of input and output.
        heads: memories per layer, each of width `p = d / heads`.
        depth: layers of the memory network, 1 (linear) to 4. expansion: hidden width over p.
        chunk_size: tokens that share one anchor; the model must run with the chunk size of its training.
        momentum, forget: whether the surprise has momentum, and whether the memory forgets.
        max_step: largest write strength, before the factor `1 - eta`: the share of a token's error that one
            step at that strength takes away, to first order and at the initial weights. The write step theta
            is the strength over the curvature of the inner loss (`_curvature`). A model that is to remember
            what it reads once needs strengths near 1; bounds like `4 / chunk_size`, below which equal keys
            in a chunk cannot overshoot, forbid that.
        step_bias, momentum_bias, forget_bias: biases of the three gates' sigmoids at initialisation.
        conv_kernel: tokens seen by the short convolution on q, k, v; 0: none.
        output_gate: multiply by `sigmoid(x W_G)` before the output projection.
        activation, norm, norm_eps, inner_loss, loss_scale, read_mode, decay, grad_at, recompute: see
            `MemorySpec`.

    State (`[B, ...]`): `weights.l`, `momentum.l`, `anchor.l` float32 `[B, H, in, out]` for each layer l of
    the memory network, `phase` int64 `[B]`, and the convolution tails `tail.q|k|v` `[B, conv_kernel - 1, d]`.

    Raises:
        ConfigError: an impossible combination.
    """

    gate_biases: dict[str, float] = {}

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        *,
        depth: int = 2,
        expansion: float = 4,
        chunk_size: int = 64,
        momentum: bool = True,
        forget: bool = True,
        max_step: float = 1.0,
        step_bias: float = -3.0,
        momentum_bias: float = 0.0,
        forget_bias: float = -8.0,
        conv_kernel: int = 4,
        output_gate: bool = True,
        activation: str = "silu",
        norm: str = "residual_layernorm",
        norm_eps: float = 1e-3,
        inner_loss: str = "l2",
        loss_scale: float = 1.0,
        read_mode: str = "inclusive",
        decay: str = "initial",
        grad_at: str = "pre_decay",
        recompute: bool = False,
        rms_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ConfigError(
                f"memory width {dim} does not divide into {heads} heads; choose a divisor of {dim}."
            )
        if not 1 <= depth <= 4:
            raise ConfigError(f"memory depth is {depth}; it must be 1 (linear) to 4.")
        if expansion <= 0 or max_step <= 0:
            raise ConfigError(f"expansion is {expansion} and max_step {max_step}; both must be positive.")
        self.spec = MemorySpec(
            chunk_size, activation, norm, norm_eps, inner_loss, loss_scale, read_mode,
            decay, grad_at, recompute,
        )  # fmt: skip
        self.dim, self.heads, self.head_dim = dim, heads, dim // heads
        self.conv_kernel = conv_kernel
        self.momentum, self.forget = momentum, forget
        self.gate_biases = self.gate_biases | {"theta": step_bias, "eta": momentum_bias, "alpha": forget_bias}

        keys, inputs = self._key_widths()
        self.q_proj = nn.Linear(dim, heads * keys, bias=False)
        self.k_proj = nn.Linear(dim, heads * keys, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self._add_gates()
        self.convolutions = None
        if conv_kernel:
            streams = {"q": heads * keys, "k": heads * keys, "v": dim}
            self.convolutions = nn.ModuleDict(
                {name: ShortConvolution(width, conv_kernel) for name, width in streams.items()}
            )
        hidden = max(1, round(expansion * self.head_dim))
        self.max_theta = max_step / (loss_scale * _curvature(norm, depth, hidden))
        shapes = self._matrices([inputs] + [hidden] * (depth - 1) + [self.head_dim])
        self.depth = len(shapes)
        self.initial = nn.ParameterList(nn.Parameter(torch.empty(heads, a, b)) for a, b in shapes)
        has_norm = norm == "residual_layernorm"
        self.memory_gamma = nn.Parameter(torch.ones(heads, self.head_dim)) if has_norm else None
        self.memory_beta = nn.Parameter(torch.zeros(heads, self.head_dim)) if has_norm else None
        self.threshold_entries = 0  # of a token's and head's loss threshold, 0 where the loss has none
        self.out_norm = RMSNorm(self.head_dim, rms_norm_eps)
        self.output_gate = nn.Linear(dim, dim, bias=False) if output_gate else None
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.initialize(0.02)

    def initialize(self, std: float) -> None:
        """Start as a memory of what came next.

        Queries and keys start equal, but a key looks one token further back: a query finds the values of
        the tokens that followed the same few tokens earlier. From independent projections a model has to
        learn that before any recall can pay. Projections keep the variance of normalised inputs, gates start
        mild, and the memory network starts with pre-activations of unit variance for unit keys.
        """
        start_projections(self.q_proj, self.k_proj, self.v_proj, self.convolutions)
        self._open_gates(std)
        self._draw_network()
        if self.memory_gamma is not None and self.memory_beta is not None:
            nn.init.ones_(self.memory_gamma)
            nn.init.zeros_(self.memory_beta)

    # What the other members of the family build in another way (`miras.py`, `atlas.py`).

    def _key_widths(self) -> tuple[int, int]:
        """Width of a head's projected keys, and of what the memory network reads."""
        return self.head_dim, self.head_dim

    def _matrices(self, widths: list[int]) -> list[tuple[int, int]]:
        """`(in, out)` of the memory network's matrices, in the order of the operation."""
        return list(pairwise(widths))

    def _gate_names(self) -> list[str]:
        return ["theta"] + ["eta"] * self.momentum + ["alpha"] * self.forget

    def _add_gates(self) -> None:
        self.gate_proj = nn.Linear(self.dim, self.heads * len(self._gate_names()))

    @torch.no_grad()
    def _open_gates(self, std: float) -> None:
        for index, name in enumerate(self._gate_names()):
            part = self.gate_proj.bias[index * self.heads : (index + 1) * self.heads]
            nn.init.constant_(part, self.gate_biases[name])

    def _draw_network(self) -> None:
        draw_network(self.initial)

    def initial_weights(self) -> list[Tensor]:
        """What the fast weights are before the first token, `[H, in, out]` each."""
        return list(self.initial)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        span: Span | None = None,
        start: LayerState | None = None,
    ) -> tuple[Tensor, LayerState]:
        """`[B, T, d]` to `[B, T, d]` and the state after the call.

        start: state of a batch of one (from `read_prefix`) with which documents begin; None: the learned
        initial weights, no momentum, no tail.
        """
        return self._read_and_write(x, state, span, start, self.spec)

    def _read_and_write(
        self,
        x: Tensor,
        state: LayerState | None,
        span: Span | None,
        start: LayerState | None,
        spec: MemorySpec,
    ) -> tuple[Tensor, LayerState]:
        if span is None:
            span = Span.build(None, x.shape[0], x.shape[1], x.device)
        q, k, v, gate, gates, tails, _ = self.inputs(x, state, span, start)
        opening = None if state is None else unpack(state)
        begin = None if start is None else unpack(start)
        result = neural_memory(
            q, k, v, gates.theta, gates.eta, gates.alpha, self.initial_weights(),
            spec=spec, gamma=self.memory_gamma, beta=self.memory_beta,
            omega=gates.omega, delta=gates.delta, step=gates.step,
            state=opening, start=begin, mask=span.valid, resets=span.resets,
            return_surprise=recording(),
        )  # fmt: skip
        y, after = result[0], result[1]
        if len(result) == 3:
            theta = gates.theta.detach()
            report_write((theta if theta.dim() == 3 else theta.mean(-1)) * result[2])
        return self._output(y, gate, x.dtype), {**pack(after), **tails}

    def inputs(
        self,
        x: Tensor,
        state: LayerState | None,
        span: Span,
        start: LayerState | None,
        others: Sequence[Any] = (),
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Gates, LayerState, list[Tensor]]:
        """What the memory reads: `project` and `gates` in one, and the write steps `[B, T, H]` of `others`.

        others: each with a `step_proj`, of which `max_theta` times the sigmoid is its step, `theta(x)`. On a
        GPU one product makes streams and gates, gates then being as exact as the streams before their biases
        are added.
        """
        low = x
        if x.is_cuda and torch.is_autocast_enabled("cuda"):
            # Once for all projections; autocast would do it for each.
            low = x.to(torch.get_autocast_dtype("cuda"))
        weights = self._fused_weights(low, span, start, others)
        if weights is None:
            q, k, v, gate, tails = self.project(low, state, span, start)
            wide = x.to(torch.promote_types(x.dtype, torch.float32)) if others else x  # once for all
            return q, k, v, gate, self.gates(wide), tails, [other.theta(wide) for other in others]
        convolutions = [cast(ShortConvolution, module) for module in self.convolutions.values()]  # type: ignore[union-attr]
        names = [f"tail.{name}" for name in "qkv"]
        before = None
        if state is not None:
            before = [state[name] for name in names]
        elif start is not None:
            before = [start[name].expand(len(x), -1, -1) for name in names]
        biases = [self.gate_proj.bias, *(other.step_proj.bias for other in others)]
        ones = [1.0] * (len(self._gate_names()) - 1)
        (q, k, v), made, after = memory_inputs(
            F.linear(low, weights), torch.cat([module.weight for module in convolutions]), torch.cat(biases),
            before, self.heads, [self.max_theta, *ones, *(other.max_theta for other in others)],
            coupled=self.momentum, position=None if span.resets is None else span.position,
        )  # fmt: skip
        own: dict[str, Any] = dict(zip(self._gate_names(), made, strict=False))
        gate = None if self.output_gate is None else self.output_gate(low)
        steps = made[len(own) :]
        gates = Gates(**{"eta": None, "alpha": None, **own})
        return q, k, v, gate, gates, dict(zip(names, after, strict=True)), steps

    def _fused_weights(
        self, x: Tensor, span: Span, start: LayerState | None, others: Sequence[Any]
    ) -> Tensor | None:
        """Of all projections that the memory reads, as one matrix; None where they are not to be fused."""
        usual = type(self).gates is NeuralMemory.gates and self._key_widths()[0] == self.head_dim
        whole = span.lengths is None and (span.resets is None or start is None)
        if not (usual and whole and fuses(x, self.head_dim, self.conv_kernel)):
            return None
        projections = [self.q_proj, self.k_proj, self.v_proj, self.gate_proj]
        weights = stacked(projections + [other.step_proj for other in others])
        if weights is None or not (weights.dtype == x.dtype or torch.is_autocast_enabled("cuda")):
            return None
        # Rows of the product are loaded in pieces of 16 bytes.
        return F.pad(weights, (0, 0, 0, -len(weights) % 16))

    def project(
        self, x: Tensor, state: LayerState | None, span: Span, start: LayerState | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, LayerState]:
        """q, k, v `[B, T, H, p]`, what the output gate is the sigmoid of `[B, T, d]` (None: no gate), and the
        convolution tails after the call."""
        tails: LayerState = {}
        projections = [self.q_proj, self.k_proj, self.v_proj]
        if self.output_gate is not None:
            projections.append(self.output_gate)
        streams = project_together(x, projections)
        gate = None if self.output_gate is None else streams.pop()
        q, k, v = (
            self._stream(name, stream, state, span, start, tails)
            for name, stream in zip("qkv", streams, strict=True)
        )
        return q, k, v, gate, tails

    def queries(
        self, x: Tensor, state: LayerState | None, span: Span, start: LayerState | None = None
    ) -> tuple[Tensor, LayerState]:
        """q alone `[B, T, H, p]`, for a read without a write, and its tail."""
        tails: LayerState = {}
        return self._stream("q", self.q_proj(x), state, span, start, tails), tails

    def _stream(
        self,
        name: str,
        x: Tensor,
        state: LayerState | None,
        span: Span,
        start: LayerState | None,
        tails: LayerState,
    ) -> Tensor:
        dtype = x.dtype if x.is_cuda else None
        if self.convolutions is not None:
            key = f"tail.{name}"
            tail = None if state is None else state[key]
            first = None if start is None else start[key][0]
            if span.lengths is None:
                weight = cast(ShortConvolution, self.convolutions[name]).weight
                y, tails[key] = convolved_heads(
                    x, weight, tail, heads=self.heads, unit=name != "v", start_tail=first,
                    position=None if span.resets is None else span.position, dtype=dtype,
                )  # fmt: skip
                return y
            x, tails[key] = self.convolutions[name](x, tail, span, first)
        y = silu_heads(x, self.heads, unit=name != "v")
        return y if dtype is None else y.to(dtype)

    def gates(self, x: Tensor) -> Gates:
        """The gates from the layer's input `[B, T, d]`, in float32 (float64 stays)."""
        raw = torch.sigmoid(project_wide(x, self.gate_proj)).split(self.heads, -1)
        gates = Gates(**{"eta": None, "alpha": None, **dict(zip(self._gate_names(), raw, strict=True))})
        gates.theta = gates.theta * self.max_theta
        if gates.eta is not None:
            # Momentum multiplies a persistent step by 1 / (1 - eta); the factor takes that back.
            gates.theta = gates.theta * (1.0 - gates.eta)
        return gates

    def read(self, q: Tensor, weights: list[Tensor]) -> Tensor:
        """f(q; W) for q `[B, T, H, p]` and weights `[B, H, in, out]`: a read that writes nothing."""
        return apply_network(self.spec, q, weights, self.memory_gamma, self.memory_beta)

    def read_prefix(self, prefix: Tensor) -> tuple[Tensor, LayerState]:
        """Outputs `[N_p, d]` at the persistent tokens `[N_p, d]`, and the state (batch of one) after them.

        Persistent tokens do not depend on the input, so what the memory makes of them is a constant that
        every document begins with; the chunk grid starts at the first real token.
        """
        # What happens at the end of a chunk happens at theirs.
        spec = replace(self.spec, chunk_size=len(prefix)) if self.spec.pools else self.spec
        with unrecorded():
            y, state = self._read_and_write(prefix.unsqueeze(0), None, None, None, spec)
        anchors = {f"anchor.{layer}": state[f"weights.{layer}"] for layer in range(self.depth)}
        return y[0], {**state, **anchors, "phase": torch.zeros_like(state["phase"])}

    def fresh_state(self, batch: int, like: Tensor) -> LayerState:
        """The state of sequences that have read nothing: initial weights, no momentum, empty tails."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        initial = tuple(w.to(dtype) for w in self.initial_weights())
        state = pack(MemoryState.fresh(initial, batch, self.momentum, self.spec, self.threshold_entries))
        for name, convolution in (self.convolutions or {}).items():
            width = cast(ShortConvolution, convolution).weight.shape[0]
            state[f"tail.{name}"] = like.new_zeros(batch, self.conv_kernel - 1, width)
        return state

    def _output(self, y: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
        # A GPU's operations take and give half precision; elsewhere the memory is float32 at least.
        y = y if y.is_cuda else y.to(dtype)
        return self.o_proj(gated_norm(y, self.out_norm.weight, gate, eps=self.out_norm.eps))


def draw_network(initial: nn.ParameterList, key: float = 1.0) -> None:
    """Draw initial weights with which a key of length `key` gives pre-activations of unit variance."""
    for layer, weight in enumerate(initial):
        # A hidden row has a length of about sqrt(HIDDEN_SQUARE * width).
        length = key if layer == 0 else (HIDDEN_SQUARE * weight.shape[-2]) ** 0.5
        last = layer == len(initial) - 1
        nn.init.normal_(weight, std=(OUTPUT_STD if last else 1.0 / length))


def _curvature(norm: str, depth: int, hidden: int) -> float:
    """Curvature, about, of one token's inner L2 loss in the memory network's initial weights.

    A layer adds the square of what goes into it times the square of the gain from there to the output. The
    last one adds `|a|^2` for the hidden row `a` (the key, of length 1, in a linear memory); each one between
    the first and the last also has the gain of the output weights, the square of which is `OUTPUT_STD^2`
    times the width, times the slope of the activation. A layer norm divides by the square of
    `OUTPUT_STD |a|`.
    """
    row = 1.0 if depth == 1 else HIDDEN_SQUARE * hidden
    between = max(0, depth - 2) * OUTPUT_STD**2 * SLOPE_SQUARE * hidden
    scale = (OUTPUT_STD**2 * row) if norm == "residual_layernorm" else 1.0
    return row * (1.0 + between) / scale


@register_mixer("neural_memory")
def build_neural_memory(config: Any, layer_index: int) -> NeuralMemory:
    """The memory of a layer, from the `memory` arguments of the configuration."""
    return memory_from_config(config, config.memory)


# Each member of the family that can stand where a memory does: its module, class, and settings of its own.
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "titans": ("nestor.layers.neural_memory", "NeuralMemory", {}),
    "moneta": ("nestor.layers.miras", "Miras", {"inner_loss": "lp", "retention": "lq"}),
    "yaad": ("nestor.layers.miras", "Miras", {"inner_loss": "huber_norm"}),
    "memora": ("nestor.layers.miras", "Miras", {"retention": "softmax"}),
    "omega": ("nestor.layers.atlas", "Atlas", {"momentum": False, "muon": False}),
    "atlas": ("nestor.layers.atlas", "Atlas", {}),
    "atlas++": ("nestor.layers.atlas", "Atlas", {"network": "gated"}),
}


def memory_from_config(config: Any, arguments: dict[str, Any] | None, **fixed: Any) -> NeuralMemory:
    """The memory of the given `kind` ("titans" if there is none) with the given arguments, alone or as part
    of a hybrid; heads and norm epsilon default to the configuration's."""
    arguments = dict(arguments or {})
    kind = arguments.pop("kind", "titans")
    if kind not in KINDS:
        kinds = ", ".join(map(repr, KINDS))
        raise ConfigError(f"memory kind is {kind!r}; it must be one of {kinds}. {suggest(kind, KINDS)}")
    module, class_name, own = KINDS[kind]
    build = getattr(import_module(module), class_name)
    defaults = {"heads": config.num_attention_heads, "rms_norm_eps": config.rms_norm_eps}
    settings = {**defaults, **own, **arguments, **fixed}
    known = inspect.signature(build.__init__).parameters
    for name in settings:
        if name not in known:
            raise ConfigError(f"unknown memory setting {name!r}. {suggest(name, list(known)[2:])}".rstrip())
    return cast(NeuralMemory, build(config.hidden_size, **settings))
