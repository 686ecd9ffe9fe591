"""Continuum memory (Nested Learning, arXiv 2512.24695, eqs. 70 to 74): a feed-forward of blocks that learn at
different paces.

The blocks are ordinary feed-forward networks and this module is an ordinary function of its input. What makes
it a memory is that a `nestor.learning.Learner` updates each block once in its own period.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nestor.errors import ConfigError, suggest
from nestor.layers.feed_forward import SwiGLU
from nestor.layers.norm import RMSNorm
from nestor.layers.registry import register_feed_forward

WIRINGS = ("sequential", "independent", "nested")
SETTINGS = ("periods", "wiring")


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
        _check_wiring(wiring)
        if blocks < 1 or intermediate_size % blocks:
            raise ConfigError(
                f"intermediate_size is {intermediate_size} and the continuum has {blocks} blocks; make it a "
                f"multiple of their number"
            )
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


def check_continuum(settings: Mapping[str, Any]) -> tuple[tuple[int | None, ...], str]:
    """Periods, from the shortest to the longest (None: never, last), and wiring of the configuration.

    Raises:
        ConfigError: unknown settings, or periods that do not rise.
    """
    for name in settings:
        if name not in SETTINGS:
            raise ConfigError(
                f"continuum has {name!r}; known are {', '.join(SETTINGS)}. {suggest(name, SETTINGS)}".rstrip()
            )
    periods = tuple(settings.get("periods", ()))
    finite = [period for period in periods if period is not None]
    rising = finite == sorted(set(finite)) and periods[len(finite) :] in ((), (None,))
    if not finite or not rising or any(type(period) is not int or period < 1 for period in finite):
        raise ConfigError(
            f"continuum has periods {list(periods)}; give rising numbers of tokens, the last may be None: "
            f"the block that never learns from the stream"
        )
    wiring = settings.get("wiring", "sequential")
    _check_wiring(wiring)
    return periods, wiring


def _check_wiring(wiring: str) -> None:
    if wiring not in WIRINGS:
        raise ConfigError(
            f"wiring is {wiring!r}; known are {', '.join(WIRINGS)}. {suggest(str(wiring), WIRINGS)}".rstrip()
        )


@register_feed_forward("continuum")
def build_continuum(config: Any, layer_index: int) -> ContinuumFeedForward:
    """The blocks of the configuration's `continuum`, which share its `intermediate_size`."""
    periods, wiring = check_continuum(config.continuum or {})
    return ContinuumFeedForward(
        config.hidden_size, config.intermediate_size, len(periods), wiring, config.rms_norm_eps
    )
