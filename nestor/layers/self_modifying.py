"""The self-modifying memory as a layer: the sequence module of Hope."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from nestor.errors import ConfigError, suggest
from nestor.layers.convolution import ShortConvolution, start_projections
from nestor.layers.neural_memory import HIDDEN_SQUARE, OUTPUT_STD
from nestor.layers.norm import RMSNorm
from nestor.layers.projections import project_together, project_wide
from nestor.layers.registry import register_mixer
from nestor.layers.span import Span
from nestor.layers.writes import recording, report_write
from nestor.ops.fused_streams import convolved_heads
from nestor.ops.gated_norm import gated_norm
from nestor.ops.heads import to_unit
from nestor.ops.self_modifying import (
    MEMORIES,
    Gate,
    SelfModifyingSpec,
    SelfModifyingState,
    self_modifying_memory,
)
from nestor.ops.self_modifying.gates import kept_fraction, write_step

LayerState = dict[str, Tensor]

CONVOLUTIONS = ("projections", "input")
MOMENTA = ("none", "fixed", "gated")
# softplus of it is 1/4: a memory starts by keeping exp(-1 / (4 horizon)) of itself at each token.
RETENTION_BIAS = math.log(math.expm1(0.25))
# Standard deviation of what linear memories start with besides the unit matrix, and of gates' rows.
NOISE_STD = 0.02
GATE_STD = 0.1


def _for_heads(value: float | Sequence[float], heads: int) -> list[float]:
    """A number for each head. Raises ConfigError: other than one finite number, or one for each head."""
    each: list[Any] = list(value) if isinstance(value, list | tuple) else [value] * heads
    finite = (isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in each)
    if len(each) != heads or not all(finite):
        raise ConfigError(
            f"step_bias is {value!r}; give one finite number, or a list of one for each of {heads} heads."
        )
    return [float(x) for x in each]


class SelfModifyingMemory(nn.Module):
    """Memories that make their own keys, values, gates and targets, and rewrite themselves with them.

    "Nested Learning", arXiv 2512.24695, section 8 (spec/nested-learning.md sections c and e.1):
    `y = W_O( RMSNorm(M_mem(q)) * sigmoid(x W_G) )` with `q = unit(W_q u)`, `k = unit(M_k(W_k u))`,
    `v = M_v(W_v u)`, eta and alpha from `M_eta(W_v u)` and `M_alpha(W_v u)`. The paper's memories are as wide
    as the model and read u itself; those of a head see its share of static projections, one for queries, one
    for keys, and one for values and gates, each brought to unit length.

    Args:
        dim: width `d` of input and output. heads: of memories, each of width `p = d / heads`.
        depth: 1, linear memories, which start as the unit matrix; 2, networks with a residual, of hidden
            width `expansion p`.
        chunk_size, projection_chunk_size: tokens between anchors of the memory that is read, and of all
            others; one divides the other. The model must run with those of its training.
        adaptive: which of "k", "v", "q", "eta", "alpha" are memories; the others are static projections.
        momentum: "none", "fixed" (S keeps `momentum_keep` of itself) or "gated" (a projection says how much).
            A gradient that persists is then followed by steps of up to eta / (1 - keep).
        inner_loss, targets, dgd, dgd_hidden, read_mode, step_cap, decay, activation, recompute: see
            `SelfModifyingSpec`. The paper's targets are "self", and its decay is "zero".
        max_step: largest share of a token's error that a write takes away, to first order and at the initial
            weights: eta over the square of the length of a hidden row.
        step_bias: of the sigmoid of eta, one number or one for each head; None: such that at first
            `projection_chunk_size` decays of the same key leave half of it (eta = 1/2 in chunks of one
            token), but eta at most half of its greatest. Heads with small steps add up, those with large ones
            write over what they hold. Memories that make the keys of each other's writes can amplify errors
            from chunk to chunk where writes are much larger: gradients then grow with the text's length.
        horizon: tokens that a memory lasts; at first it loses 1 / 4 of a part in `horizon` at each token.
        conv_kernel: tokens seen by the short convolution; 0: none. convolution: "projections", after each
            static projection, or "input", one before them all.
        output_gate: multiply by `sigmoid(x W_G)` before the output projection.

    State (`[B, ...]`): `weights.NAME.l`, `anchor.NAME.l`, with momentum `momentum.NAME.l`, float32
    `[B, H, in, out]` for each matrix l of each memory NAME, `phase` int64 `[B]`, and the convolutions' tails
    `tail.q|k|v` or `tail.x` `[B, conv_kernel - 1, d]`.

    Raises:
        ConfigError: an impossible combination.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        *,
        depth: int = 1,
        expansion: float = 4,
        chunk_size: int = 64,
        projection_chunk_size: int = 16,
        adaptive: Iterable[str] = ("k", "v", "eta", "alpha"),
        momentum: str = "none",
        momentum_keep: float = 0.9,
        inner_loss: str = "l2",
        targets: str = "bounded",
        dgd: bool = True,
        dgd_hidden: bool = True,
        read_mode: str = "running",
        step_cap: str = "spectral",
        decay: str = "zero",
        max_step: float = 1.0,
        step_bias: float | Sequence[float] | None = None,
        horizon: float = 4096.0,
        conv_kernel: int = 4,
        convolution: str = "projections",
        output_gate: bool = True,
        activation: str = "silu",
        recompute: bool = False,
        rms_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        adaptive = list(adaptive)
        if heads < 1 or dim % heads:
            raise ConfigError(f"width {dim} does not divide into {heads} heads; choose a divisor of {dim}.")
        if depth not in (1, 2):
            raise ConfigError(f"depth is {depth}; memories are linear (1) or networks of two matrices (2).")
        if expansion <= 0 or not max_step > 0:
            raise ConfigError(f"expansion is {expansion} and max_step {max_step}; both must be positive.")
        if momentum not in MOMENTA:
            raise ConfigError(
                f"momentum is {momentum!r}; it must be one of {', '.join(map(repr, MOMENTA))}. "
                f"{suggest(momentum, MOMENTA)}".rstrip()
            )
        if not 0 <= momentum_keep < 1:
            raise ConfigError(f"momentum_keep is {momentum_keep}; it must be at least 0 and below 1.")
        if convolution not in CONVOLUTIONS:
            raise ConfigError(
                f"convolution is {convolution!r}; it must be one of {', '.join(map(repr, CONVOLUTIONS))}. "
                f"{suggest(convolution, CONVOLUTIONS)}".rstrip()
            )
        for name in adaptive:
            if name not in MEMORIES[:-1]:
                raise ConfigError(
                    f"adaptive has {name!r}; it may have {', '.join(MEMORIES[:-1])}. "
                    f"{suggest(name, MEMORIES[:-1])}".rstrip()
                )
        if targets == "value" and depth == 1 and {"eta", "alpha"} & set(adaptive):
            raise ConfigError(
                "targets is 'value' and a gate is a linear memory, whose output is one number and no value; "
                "leave 'eta' and 'alpha' out of adaptive, or use depth=2."
            )
        self.dim, self.heads, self.head_dim, self.depth = dim, heads, dim // heads, depth
        self.hidden = max(1, round(expansion * self.head_dim))
        curvature = 1.0 if depth == 1 else max(1.0, HIDDEN_SQUARE * self.hidden)
        self.spec = SelfModifyingSpec(
            chunk_size=chunk_size, projection_chunk_size=projection_chunk_size, inner_loss=inner_loss,
            targets=targets, dgd=dgd, dgd_hidden=dgd_hidden, read_mode=read_mode, step_cap=step_cap,
            decay=decay, max_step=max_step / curvature, horizon=horizon, activation=activation,
            recompute=recompute,
        )  # fmt: skip
        self.momentum, self.momentum_keep = momentum, momentum_keep
        if step_bias is None:
            share = min(0.5, (1.0 - 0.5 ** (1.0 / projection_chunk_size)) / max_step)
            step_bias = math.log(share / (1.0 - share))
        self.biases = {"eta": _for_heads(step_bias, heads), "alpha": [RETENTION_BIAS] * heads}

        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        names = [] if not conv_kernel else ["x"] if convolution == "input" else ["q", "k", "v"]
        self.convolutions = nn.ModuleDict({name: ShortConvolution(dim, conv_kernel) for name in names})
        memories = [name for name in MEMORIES if name in adaptive or name == "mem"]
        self.initial = nn.ModuleDict({name: self._matrices(name) for name in memories})
        # Gates that are memories have a bias and, for a whole row, a vector to read it with.
        made = [name for name in self.biases if name in memories]
        self.gate_bias = nn.ParameterDict({name: nn.Parameter(torch.empty(heads)) for name in made})
        rows = made if depth == 2 else []
        self.gate_read = nn.ParameterDict(
            {name: nn.Parameter(torch.empty(heads, self.head_dim)) for name in rows}
        )
        self.static_gates = [name for name in self.biases if name not in memories]
        self.static_gates += ["mu"] * (momentum == "gated")
        self.gate_proj = nn.Linear(dim, heads * len(self.static_gates)) if self.static_gates else None
        self.out_norm = RMSNorm(self.head_dim, rms_norm_eps)
        self.output_gate = nn.Linear(dim, dim, bias=False) if output_gate else None
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.initialize(0.02)

    def _matrices(self, name: str) -> nn.ParameterList:
        p, h = self.head_dim, self.hidden
        shapes = [(p, h), (h, p)] if self.depth == 2 else [(p, 1 if name in self.biases else p)]
        return nn.ParameterList(nn.Parameter(torch.empty(self.heads, *shape)) for shape in shapes)

    @torch.no_grad()
    def initialize(self, std: float) -> None:
        """Start as a memory of what came next, with targets that are the values.

        Projections keep the variance of normalised inputs; with a convolution after each, keys look one token
        further back than queries (see `start_projections`). Linear memories start about as the unit matrix,
        which the residual of the networks is.
        """
        start_projections(self.q_proj, self.k_proj, self.v_proj, self.convolutions)
        for name, matrices in self.initial.items():
            self._draw(name, cast(nn.ParameterList, matrices))
        for name, bias in self.gate_bias.items():
            bias.copy_(bias.new_tensor(self.biases[name]))
        for read in self.gate_read.values():
            nn.init.normal_(read, std=GATE_STD)
        if self.gate_proj is not None:
            for index, name in enumerate(self.static_gates):
                part = self.gate_proj.bias[index * self.heads : (index + 1) * self.heads]
                part.copy_(part.new_tensor(self.biases.get(name, [0.0] * self.heads)))

    def _draw(self, name: str, matrices: nn.ParameterList) -> None:
        if self.depth == 2:
            # Of unit inputs: pre-activations of unit variance, outputs half as long as the residual.
            nn.init.normal_(matrices[0], std=1.0)
            std = OUTPUT_STD * (HIDDEN_SQUARE * self.hidden * self.head_dim) ** -0.5
            nn.init.normal_(matrices[1], std=std)
        elif name in self.biases:
            nn.init.normal_(matrices[0], std=GATE_STD)
        else:
            nn.init.normal_(matrices[0], std=NOISE_STD)
            matrices[0].diagonal(dim1=-2, dim2=-1).add_(1.0)

    def forward(
        self, x: Tensor, state: LayerState | None = None, span: Span | None = None
    ) -> tuple[Tensor, LayerState]:
        """`[B, T, d]` to `[B, T, d]` and the state after the call."""
        if span is None:
            span = Span.build(None, x.shape[0], x.shape[1], x.device)
        q, k, v, gate, tails = self.streams(x, state, span)
        given = self.gates(x)
        made = {name: Gate(bias, self.gate_read.get(name))
                for name, bias in self.gate_bias.items()}  # fmt: skip
        initial = {name: tuple(cast(nn.ParameterList, ws)) for name, ws in self.initial.items()}
        result = self_modifying_memory(
            q, k, v, initial, spec=self.spec, g=v if made else None, gates=made,
            eta=given.get("eta"), alpha=given.get("alpha"), mu=given.get("mu"),
            state=None if state is None else unpack(state), mask=span.valid, resets=span.resets,
            return_strength=recording(),
        )  # fmt: skip
        if len(result) == 3:
            report_write(result[2])
        y = gated_norm(result[0], self.out_norm.weight, gate, eps=self.out_norm.eps)
        return self.o_proj(y.to(x.dtype)), {**pack(result[1]), **tails}

    def streams(
        self, x: Tensor, state: LayerState | None, span: Span
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, LayerState]:
        """q, k, v `[B, T, H, p]` of unit length, what the output gate is the sigmoid of (None: no gate), and
        the convolutions' tails after the call."""
        tails: LayerState = {}

        def convolved(name: str, y: Tensor) -> Tensor:
            if name not in self.convolutions:
                return y
            key = f"tail.{name}"
            y, tails[key] = self.convolutions[name](y, None if state is None else state[key], span)
            return y

        def heads(name: str, y: Tensor) -> Tensor:
            # Half precision stays on a GPU, as kernels take it.
            dtype = y.dtype if y.is_cuda else torch.promote_types(y.dtype, torch.float32)
            if name in self.convolutions and span.lengths is None:
                key, convolution = f"tail.{name}", cast(ShortConvolution, self.convolutions[name])
                y, tails[key] = convolved_heads(
                    y, convolution.weight, None if state is None else state[key], heads=self.heads, unit=True,
                    silu=False, position=None if span.resets is None else span.position, dtype=dtype,
                )  # fmt: skip
                return y
            wide = convolved(name, y).to(torch.promote_types(y.dtype, torch.float32))
            return to_unit(wide.unflatten(-1, (self.heads, -1))).to(dtype)

        gate = None if self.output_gate is None else self.output_gate(x)
        projections = [self.q_proj, self.k_proj, self.v_proj]
        parts = project_together(convolved("x", x), projections)
        q, k, v = (heads(name, part) for name, part in zip("qkv", parts, strict=True))
        return q, k, v, gate, tails

    def gates(self, x: Tensor) -> dict[str, Tensor]:
        """eta, alpha and mu `[B, T, H]`, those that are static projections or fixed, in float32 (float64
        stays)."""
        found: dict[str, Tensor] = {}
        if self.gate_proj is not None:
            parts = project_wide(x, self.gate_proj).split(self.heads, -1)
            found = dict(zip(self.static_gates, parts, strict=True))
        if "eta" in found:
            found["eta"] = write_step(self.spec, found["eta"])
        if "alpha" in found:
            found["alpha"] = kept_fraction(self.spec, found["alpha"])
        if "mu" in found:
            found["mu"] = torch.sigmoid(found["mu"])
        elif self.momentum == "fixed":
            found["mu"] = x.new_full((*x.shape[:2], self.heads), self.momentum_keep)
        return found


def pack(memory: SelfModifyingState) -> LayerState:
    """A memory's state by names: `phase`, and `weights|momentum|anchor.NAME.l`."""
    state = {"phase": memory.phase}
    for part in ("weights", "momentum", "anchor"):
        for name, matrices in getattr(memory, part).items():
            state |= {f"{part}.{name}.{index}": w for index, w in enumerate(matrices)}
    return state


def unpack(state: LayerState) -> SelfModifyingState:
    """Reverse of `pack`; other names are left alone."""
    parts: dict[str, dict[str, tuple[Tensor, ...]]] = {"weights": {}, "momentum": {}, "anchor": {}}
    for key in sorted(state):
        part, _, rest = key.partition(".")
        if part in parts:
            name = rest.partition(".")[0]
            parts[part][name] = (*parts[part].get(name, ()), state[key])
    return SelfModifyingState(**parts, phase=state["phase"])


@register_mixer("self_modifying")
def build_self_modifying(config: Any, layer_index: int) -> SelfModifyingMemory:
    """The memory with the `memory` arguments of the configuration; heads and norm epsilon default to its."""
    known = list(inspect.signature(SelfModifyingMemory.__init__).parameters)[2:]
    settings = {"heads": config.num_attention_heads, "rms_norm_eps": config.rms_norm_eps}
    for name, value in (config.memory or {}).items():
        if name not in known:
            raise ConfigError(f"unknown memory setting {name!r}. {suggest(name, known)}".rstrip())
        settings[name] = value
    return SelfModifyingMemory(config.hidden_size, **settings)
