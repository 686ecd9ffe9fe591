"""Titans MAL: the neural memory first, sliding-window attention on what it returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nestor.layers.attention import Attention, attention_from_config
from nestor.layers.neural_memory import NeuralMemory, memory_from_config
from nestor.layers.norm import RMSNorm
from nestor.layers.registry import register_mixer
from nestor.layers.span import Span
from nestor.layers.substate import join_states, part_of


class MemoryAsLayer(nn.Module):
    """`y = LMM([P | x]); o = SWA(RMSNorm(y))`, Titans, arXiv 2501.00663, equations 29-31.

    The norm between the two is ours; the paper shows none. Persistent tokens P `[N_p, d]` go through the
    memory first, once; what it makes of them stands before every document in the attention. State:
    `memory.*` and `attention.*`.
    """

    def __init__(
        self, attention: Attention, memory: NeuralMemory, persistent_tokens: int = 0, norm_eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.attention, self.memory = attention, memory
        self.norm = RMSNorm(memory.dim, norm_eps)
        self.persistent = (
            nn.Parameter(torch.empty(persistent_tokens, memory.dim)) if persistent_tokens else None
        )
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
            remembered, start = self.memory.read_prefix(self.persistent.to(x.dtype))
            prefix = self.norm(remembered)
        y, memory_state = self.memory(x, part_of(state, "memory"), span, start=start)
        out, attention_state = self.attention(self.norm(y), part_of(state, "attention"), span, prefix=prefix)
        return out, join_states(memory=memory_state, attention=attention_state)


@register_mixer("memory_as_layer")
def build_memory_as_layer(config: Any, layer_index: int) -> MemoryAsLayer:
    """MAL with the configuration's window, persistent tokens and memory."""
    return MemoryAsLayer(
        attention_from_config(config, window=config.sliding_window, persistent_tokens=0),
        memory_from_config(config, config.memory),
        config.persistent_tokens,
        config.rms_norm_eps,
    )
