"""LaCT: sliding-window attention, and wide fast weights that take one large step for a whole chunk."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestor.errors import ConfigError, suggest
from nestor.layers.attention import Attention, attention_from_config
from nestor.layers.norm import RMSNorm
from nestor.layers.projections import project_wide
from nestor.layers.registry import register_mixer
from nestor.layers.span import Span
from nestor.layers.substate import join_states, part_of
from nestor.layers.walking import pack, unpack
from nestor.layers.writes import recording, report_write
from nestor.ops.heads import silu_heads
from nestor.ops.neural_memory import MemorySpec, neural_memory


class LaCT(nn.Module):
    """`o = W_O( SWA(q, k, v) + RMSNorm(f(q~; W)) silu(x W_S) )`, "Test-Time Training Done Right", arXiv
    2505.23884 (spec/neural-memory.md section 7).

    The fast network is a SwiGLU, f(x) = W1( silu(W0 x) * (W2 x) ), that learns -<f(k~), v~> by one step a
    chunk: momentum with the mean keep factor of the chunk, five Newton-Schulz steps, and output units
    rescaled to their initial norms. Its reads see the weights of the chunk's start; the window, which must
    cover a chunk, supplies what is newer. Queries, keys and values are the attention's own: `q~, k~ =
    silu(q s + b)` with a learned scale and shift per channel and of unit length per head, without positions;
    `v~ = silu(v)`.

    The published code decodes with the initial weights; here the fast weights, and the open chunk's summed
    gradients, are part of the State and go on learning.

    Args:
        attention: of as many key heads as query heads; its window, if it has one, covers a chunk.
        heads: fast networks, few and wide. expansion: hidden width over a head's.
        chunk_size: tokens of a step.
        momentum, muon: whether there are, of a step.
        base_step: `softplus(x W + softplus^-1(base_step))` is the step of a token, head and matrix, in
            float32. With Muon the common size of a chunk's steps is lost, their ratios are not.

    State: `attention.*`; `memory.weights|momentum|anchor|pending.l` float32 `[B, H, in, out]` for the
    matrices W0, W1, W2, `memory.pooled` `[B, H, 4]` and `memory.phase` int64 `[B]`.

    Raises:
        ConfigError: an impossible combination.
    """

    def __init__(
        self,
        attention: Attention,
        heads: int = 4,
        *,
        chunk_size: int = 2048,
        expansion: float = 1.0,
        momentum: bool = True,
        muon: bool = True,
        base_step: float = 0.001,
        newton_schulz: str = "scheduled",
        recompute: bool = False,
        rms_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        dim = attention.o_proj.out_features
        if attention.kv_heads != attention.heads:
            raise ConfigError(
                f"attention has {attention.kv_heads} key-value heads for {attention.heads} query heads; LaCT "
                f"shares all three with its fast weights and needs as many of each."
            )
        if heads < 1 or dim % heads:
            raise ConfigError(f"width {dim} does not divide into {heads} heads; choose a divisor of {dim}.")
        if expansion <= 0 or base_step <= 0:
            raise ConfigError(f"expansion is {expansion} and base_step {base_step}; both must be positive.")
        if attention.window is not None and chunk_size > attention.window:
            raise ConfigError(
                f"chunk_size is {chunk_size} and the attention window {attention.window}; what is newer than "
                f"the chunk's start is seen by the window alone, so it must be at least as long."
            )
        self.spec = MemorySpec(
            chunk_size, "silu", "none", inner_loss="dot_product", read_mode="chunk_start", decay="zero",
            recompute=recompute, network="gated", optimizer="muon" if muon else "gd",
            newton_schulz=newton_schulz, renormalize="rows", granularity="chunk", step_sizes="matrix",
        )  # fmt: skip
        self.attention, self.heads, self.dim = attention, heads, dim
        self.step_bias = math.log(math.expm1(base_step))
        width = dim // heads
        hidden = max(1, round(expansion * width))
        self.initial = nn.ParameterList(
            nn.Parameter(torch.empty(heads, *shape))
            for shape in ((width, hidden), (hidden, width), (width, hidden))
        )
        self.q_scale, self.k_scale = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
        self.q_shift, self.k_shift = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.step_proj = nn.Linear(dim, heads * 3)
        self.momentum_proj = nn.Linear(dim, heads) if momentum else None
        self.out_norm = RMSNorm(width, rms_norm_eps)
        self.scale_proj = nn.Linear(dim, heads)
        self.initialize(0.02)

    def initialize(self, std: float) -> None:
        """Fast weights N(0, 1 / in), scales 1, shifts 0, steps of `base_step`."""
        for weight in self.initial:
            nn.init.normal_(weight, std=weight.shape[-2] ** -0.5)
        for scale, shift in ((self.q_scale, self.q_shift), (self.k_scale, self.k_shift)):
            nn.init.ones_(scale)
            nn.init.zeros_(shift)
        nn.init.constant_(self.step_proj.bias, self.step_bias)

    def forward(
        self, x: Tensor, state: dict[str, Tensor] | None = None, span: Span | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`[B, T, d]` to `[B, T, d]` and the state after the call."""
        own = part_of(state, "attention")
        if span is None:
            span = Span.build(None if own is None else own["clock"], x.shape[0], x.shape[1], x.device)
        q, k, v = self.attention.q_proj(x), self.attention.k_proj(x), self.attention.v_proj(x)
        near, attention_state = self.attention.mix(q, k, v, own, span)
        far, memory_state = self.remember(x, q, k, v, part_of(state, "memory"), span)
        out = self.attention.o_proj(near + far.to(near.dtype))
        return out, join_states(attention=attention_state, memory=memory_state)

    def remember(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, state: dict[str, Tensor] | None, span: Span
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the fast weights add to the attention `[B, T, d]`, and their state after the call."""
        fast_q = silu_heads(q * self.q_scale.to(q.dtype) + self.q_shift.to(q.dtype), self.heads, unit=True)
        fast_k = silu_heads(k * self.k_scale.to(k.dtype) + self.k_shift.to(k.dtype), self.heads, unit=True)
        fast_v = silu_heads(v, self.heads, unit=False)
        theta, eta = self.gates(x)
        result = neural_memory(
            fast_q, fast_k, fast_v, theta, eta, None, list(self.initial), spec=self.spec,
            state=None if state is None else unpack(state), mask=span.valid, resets=span.resets,
            return_surprise=recording(),
        )  # fmt: skip
        if len(result) == 3:
            report_write(theta.detach().mean(-1) * result[2])
        y = self.out_norm(result[0].contiguous()) * F.silu(self.scale_proj(x)).unsqueeze(-1)
        return y.flatten(-2), pack(result[1])

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """theta `[B, T, H, 3]`, the steps of W0, W1, W2, and eta `[B, T, H]`, in float32 (float64 stays)."""
        theta = F.softplus(project_wide(x, self.step_proj)).unflatten(-1, (self.heads, 3))
        eta = None if self.momentum_proj is None else torch.sigmoid(project_wide(x, self.momentum_proj))
        return theta, eta


@register_mixer("lact")
def build_lact(config: Any, layer_index: int) -> LaCT:
    """LaCT with the configuration's attention and window, and the `memory` arguments of the configuration."""
    known = list(inspect.signature(LaCT.__init__).parameters)[2:]
    settings = {"rms_norm_eps": config.rms_norm_eps, "chunk_size": config.sliding_window}
    for name, value in (config.memory or {}).items():
        if name not in known:
            raise ConfigError(f"unknown memory setting {name!r}. {suggest(name, known)}".rstrip())
        settings[name] = value
    return LaCT(attention_from_config(config, window=config.sliding_window), **settings)
