"""Titans MAG: sliding-window attention and the neural memory side by side, one gating the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nestor.errors import ConfigError
from nestor.layers.attention import Attention, attention_from_config
from nestor.layers.neural_memory import NeuralMemory, memory_from_config
from nestor.layers.norm import RMSNorm
from nestor.layers.registry import register_mixer
from nestor.layers.span import Span
from nestor.layers.substate import join_states, part_of

COMBINATIONS = ("product", "mix")


class MemoryAsGate(nn.Module):
    """`o = combine(SWA([P | x]), LMM([P | x]))`, Titans, arXiv 2501.00663, equations 26-28.

    The paper leaves the gate's form open. "product" is `RMSNorm(y) * sigmoid(RMSNorm(m))`; "mix" is the
    convex combination `s RMSNorm(y) + (1 - s) RMSNorm(m)` with `s = sigmoid(x W_S)`, through which the memory
    can speak where attention is silent.

    Both branches read the persistent tokens P `[N_p, d]`: attention as keys visible from everywhere, the
    memory once, as the constant state that every document begins with. State: that of the two branches, as
    `attention.*` and `memory.*`.
    """

    def __init__(
        self,
        attention: Attention,
        memory: NeuralMemory,
        persistent_tokens: int = 0,
        combine: str = "mix",
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if combine not in COMBINATIONS:
            raise ConfigError(
                f"combine is {combine!r}; it must be one of {', '.join(map(repr, COMBINATIONS))}."
            )
        dim = memory.dim
        self.attention, self.memory, self.combine = attention, memory, combine
        self.persistent = nn.Parameter(torch.empty(persistent_tokens, dim)) if persistent_tokens else None
        self.attention_norm, self.memory_norm = RMSNorm(dim, norm_eps), RMSNorm(dim, norm_eps)
        self.gate_proj = nn.Linear(dim, dim) if combine == "mix" else None
        self.initialize(0.02)

    def initialize(self, std: float) -> None:
        """Persistent tokens are drawn at the scale of normalised inputs."""
        if self.persistent is not None:
            nn.init.normal_(self.persistent)

    def forward(
        self, x: Tensor, state: dict[str, Tensor] | None = None, span: Span | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`[B, T, d]` to `[B, T, d]` and the state after the call."""
        start = prefix = None
        if self.persistent is not None:
            prefix = self.persistent.to(x.dtype)
            _, start = self.memory.read_prefix(prefix)
        y, attention_state = self.attention(x, part_of(state, "attention"), span, prefix=prefix)
        m, memory_state = self.memory(x, part_of(state, "memory"), span, start=start)
        y, m = self.attention_norm(y), self.memory_norm(m)
        if self.gate_proj is None:
            out = y * torch.sigmoid(m)
        else:
            out = torch.lerp(m, y, torch.sigmoid(self.gate_proj(x)))
        return out, join_states(attention=attention_state, memory=memory_state)


@register_mixer("memory_as_gate")
def build_memory_as_gate(config: Any, layer_index: int) -> MemoryAsGate:
    """MAG with the configuration's window, persistent tokens and memory."""
    arguments = dict(config.memory or {})
    combine = arguments.pop("combine", "mix")
    return MemoryAsGate(
        attention_from_config(config, window=config.sliding_window, persistent_tokens=0),
        memory_from_config(config, arguments, output_gate=False),
        config.persistent_tokens,
        combine,
        config.rms_norm_eps,
    )
