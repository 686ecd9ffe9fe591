"""A neural memory beside a layer that is already trained: what it adds begins as nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nestor.layers.neural_memory import NeuralMemory
from nestor.layers.norm import RMSNorm
from nestor.layers.span import Span

LayerState = dict[str, Tensor]


class MemoryBranch(nn.Module):
    """`m = W_O (RMSNorm(f(q; W_t)) * sigmoid(x W_G))` of normalised inputs, to be added to a layer's output.

    The branch and the gate of Titans' memory as gate (arXiv 2501.00663, equations 26-28), where attention is
    trained and has to stay as it is: neither of that layer's two combinations has it among its values, a sum
    has. W_O begins at zero, so the sum is the trained layer to the bit. The first step moves W_O alone, those
    after it everything.

    Parameters are float32 (float64 stays). Inputs of half precision are projected in that precision, and the
    memory's weights, which are the state, are float32 all the same.

    Args:
        dim: width `d`. heads, settings: of `NeuralMemory`.

    State: that of the memory.
    """

    def __init__(self, dim: int, heads: int, norm_eps: float = 1e-6, **settings: Any) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, norm_eps)
        self.memory = NeuralMemory(dim, heads, rms_norm_eps=norm_eps, **settings)
        self.initialize(0.02)

    def initialize(self, std: float) -> None:
        """Close the branch; the memory has drawn its own weights."""
        nn.init.zeros_(self.memory.o_proj.weight)

    def forward(
        self, x: Tensor, state: LayerState | None = None, span: Span | None = None
    ) -> tuple[Tensor, LayerState]:
        """`[B, T, d]` to `[B, T, d]` in the dtype of x, and the state after the call."""
        half = x.dtype in (torch.bfloat16, torch.float16)
        # Not under autocast, which would make float32 of it: the memory's inputs and tails are half as well.
        x = self.norm(x)
        with torch.autocast(x.device.type, dtype=x.dtype if half else None, enabled=half):
            y, after = self.memory(x, state, span)
        return y.to(x.dtype), after

    def fresh_state(self, batch: int, like: Tensor) -> LayerState:
        """The state of sequences that have read nothing, for inputs like `like`."""
        return self.memory.fresh_state(batch, like)
