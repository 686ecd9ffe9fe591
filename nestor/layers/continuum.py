"""Continuum memory (Nested Learning, arXiv 2512.24695, eqs. 70 to 74): a feed-forward of blocks that learn at
different paces.

The blocks are ordinary feed-forward networks and this module is an ordinary function of its input. What makes
it a memory is that a `nestor.learning.Learner` updates each block once in its own period.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nestor.layers.continuum_settings import check_blocks, check_continuum
from nestor.layers.feed_forward import SwiGLU
from nestor.layers.norm import RMSNorm
from nestor.layers.registry import register_feed_forward


class ContinuumFeedForward(nn.Module):
    """Blocks of one width, from the one that learns fastest to the slowest; `[B, T, d]` to `[B, T, d]`.

    Reads and returns the residual stream: "sequential" and "nested" are `x = x + block(norm(x))` for each
    block, "independent" is `x + sum_l a_l block_l(norm(x))` with learned `a`, which are positive, sum to 1
    and begin equal. Blocks that are nested differ in how they learn, not in what they compute: a faster one
    returns to where it began whenever the slower one learns (`nestor.learning.continuum_levels`).

    Raises:
        ConfigError: a width that does not divide into the blocks, or an unknown wiring.
    """

    own_residual = True

    def __init__(
        self, hidden_size: int, intermediate_size: int, blocks: int, wiring: str = "sequential",
        norm_eps: float = 1e-6,
    ) -> None:  # fmt: skip
        super().__init__()
        check_blocks(blocks, wiring, intermediate_size)
        self.wiring = wiring
        self.blocks = nn.ModuleList(SwiGLU(hidden_size, intermediate_size // blocks) for _ in range(blocks))
        norms = 1 if wiring == "independent" else blocks
        self.norms = nn.ModuleList(RMSNorm(hidden_size, norm_eps) for _ in range(norms))
        self.mixture = nn.Parameter(torch.zeros(blocks)) if wiring == "independent" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.mixture is None:
            for norm, block in zip(self.norms, self.blocks, strict=True):
                x = x + block(norm(x))
            return x
        u = self.norms[0](x)
        shares = self.mixture.softmax(dim=0).to(x.dtype)
        for share, block in zip(shares, self.blocks, strict=True):
            x = x + share * block(u)
        return x


@register_feed_forward("continuum")
def build_continuum(config: Any, layer_index: int) -> ContinuumFeedForward:
    """The blocks of the configuration's `continuum`, which share its `intermediate_size`."""
    periods, wiring = check_continuum(config.continuum or {}, config.intermediate_size)
    return ContinuumFeedForward(
        config.hidden_size, config.intermediate_size, len(periods), wiring, config.rms_norm_eps
    )
