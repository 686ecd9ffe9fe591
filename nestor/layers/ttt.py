"""TTT-Linear and TTT-MLP, the layers that the neural memories descend from, as points of reference."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestor.errors import ConfigError, suggest
from nestor.layers.projections import project_wide
from nestor.layers.registry import register_mixer
from nestor.layers.rotary import rotary_table, rotate
from nestor.layers.span import Span
from nestor.layers.walking import read_and_write
from nestor.layers.writes import report_write
from nestor.ops.neural_memory import MemorySpec


class TTT(nn.Module):
    """`y = W_O LayerNorm(q + LN(f(q; W_t)))`, Sun et al. 2024, arXiv 2407.04620 (spec section 8).

    Each token takes a step on `1/2 ||k + LN(f(k; W)) - v||^2` at the weights of the mini-batch's start, of
    size `base_step sigmoid(w.x) / p`. q and k carry a rotary embedding of the position in the mini-batch. No
    momentum, no forgetting, no convolution.

    Two things differ from the published code:
    - its learned factor of a position t in the mini-batch (at first 1/t) multiplies the sum of all gradients
      up to t, so a read inside of the mini-batch sees a running mean. That is no step size of a token.
      Factors here are the constant 1/C: the weights at the end of a mini-batch are those of the published
      code at its initial factors, and reads inside see the partial sums that lead to them;
    - the fast network has no biases.

    Args:
        dim: width `d`, of `heads` memories of width `p`.
        depth: 1 is TTT-Linear, 2 and more TTT-MLP with GELU and a hidden width of `expansion p`.
        chunk_size: tokens C of a mini-batch.
        base_step: 1.0 and 0.1 in the paper, for TTT-Linear and TTT-MLP.
        output_gate: multiply by `gelu(x W_G)` before the output projection.

    State (`[B, ...]`): `weights.l`, `anchor.l` float32 `[B, H, in, out]` for each layer l, `phase` int64.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        *,
        depth: int = 1,
        expansion: float = 4,
        chunk_size: int = 16,
        base_step: float = 1.0,
        output_gate: bool = False,
        norm_eps: float = 1e-6,
        rope_theta: float = 10_000.0,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads or (dim // heads) % 2:
            raise ConfigError(f"width {dim} in {heads} heads; heads must divide it into even widths.")
        if not 1 <= depth <= 4:
            raise ConfigError(f"memory depth is {depth}; it must be 1 (linear) to 4.")
        if expansion <= 0 or base_step <= 0:
            raise ConfigError(f"expansion is {expansion} and base_step {base_step}; both must be positive.")
        self.spec = MemorySpec(chunk_size, "gelu", "residual_layernorm", norm_eps, recompute=recompute)
        self.dim, self.heads, self.head_dim, self.rope_theta = dim, heads, dim // heads, rope_theta
        self.largest_step = base_step / (self.head_dim * chunk_size)

        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(dim, dim, bias=False) for _ in range(4)
        )
        self.step_proj = nn.Linear(dim, heads)
        self.output_gate = nn.Linear(dim, dim, bias=False) if output_gate else None
        hidden = max(1, round(expansion * self.head_dim))
        widths = [self.head_dim] + [hidden] * (depth - 1) + [self.head_dim]
        self.initial = nn.ParameterList(nn.Parameter(torch.empty(heads, a, b)) for a, b in pairwise(widths))
        self.memory_gamma = nn.Parameter(torch.ones(heads, self.head_dim))
        self.memory_beta = nn.Parameter(torch.zeros(heads, self.head_dim))
        self.post_norm_weight = nn.Parameter(torch.ones(dim))
        self.post_norm_bias = nn.Parameter(torch.zeros(dim))
        self.initialize(0.02)

    def initialize(self, std: float) -> None:
        """Initial weights N(0, std^2), norms the identity."""
        for weight in self.initial:
            nn.init.normal_(weight, std=std)
        for gain, shift in (
            (self.memory_gamma, self.memory_beta),
            (self.post_norm_weight, self.post_norm_bias),
        ):
            nn.init.ones_(gain)
            nn.init.zeros_(shift)

    def forward(
        self, x: Tensor, state: dict[str, Tensor] | None = None, span: Span | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`[B, T, d]` to `[B, T, d]` and the state after the call."""
        if span is None:
            span = Span.build(None, x.shape[0], x.shape[1], x.device)
        q, k, v = self.project(x, None if state is None else state["phase"], span)
        y, after, writes = read_and_write(
            self, self.spec, (q, k, v, self.steps(x)), state, span.valid, span.resets
        )
        for strength in writes:
            report_write(strength)
        y = y.flatten(-2).to(x.dtype)
        weight, bias = self.post_norm_weight.to(x.dtype), self.post_norm_bias.to(x.dtype)
        y = F.layer_norm(y, (self.dim,), weight, bias, self.spec.norm_eps)
        if self.output_gate is not None:
            y = y * F.gelu(self.output_gate(x))
        return self.o_proj(y), after

    def project(self, x: Tensor, phase: Tensor | None, span: Span) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v `[B, T, H, p]`, of which q and k are turned by the position in their mini-batch."""
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        batch, length = span.shape
        place = Span.build(phase, batch, length, x.device, span.lengths, span.resets).position
        table = rotary_table(place % self.spec.chunk_size, self.head_dim, self.rope_theta, x.dtype)
        return rotate(q, table), rotate(k, table), v

    def steps(self, x: Tensor) -> Tensor:
        """theta `[B, T, H]`, `base_step sigmoid(w.x) / (p C)`, in float32 (float64 stays)."""
        return torch.sigmoid(project_wide(x, self.step_proj)) * self.largest_step


@register_mixer("ttt_linear")
def build_ttt_linear(config: Any, layer_index: int) -> TTT:
    """TTT-Linear with the `memory` arguments of the configuration."""
    return _build(config, depth=1, base_step=1.0)


@register_mixer("ttt_mlp")
def build_ttt_mlp(config: Any, layer_index: int) -> TTT:
    """TTT-MLP with the `memory` arguments of the configuration."""
    return _build(config, depth=2, base_step=0.1)


def _build(config: Any, **defaults: Any) -> TTT:
    settings = {"heads": config.num_attention_heads, "rope_theta": config.rope_theta, **defaults}
    known = list(inspect.signature(TTT.__init__).parameters)[2:]
    for name, value in (config.memory or {}).items():
        if name not in known:
            raise ConfigError(f"unknown memory setting {name!r}. {suggest(name, known)}".rstrip())
        settings[name] = value
    return TTT(config.hidden_size, **settings)
