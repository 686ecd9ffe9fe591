"""Feed-forward networks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from nestor.layers.registry import register_feed_forward


class SwiGLU(nn.Module):
    """`y = (silu(x W_gate) * x W_up) W_down` (Shazeer 2020, arXiv 2002.05202); `[B, T, d]` to `[B, T, d]`."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@register_feed_forward("swiglu")
def build_swiglu(config: Any, layer_index: int) -> SwiGLU:
    """The SwiGLU of a layer: `hidden_size` and `intermediate_size` of the configuration."""
    return SwiGLU(config.hidden_size, config.intermediate_size)
