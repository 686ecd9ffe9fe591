"""Short causal depthwise convolution as a layer with a tail."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from nestor.errors import ConfigError
from nestor.layers.span import Span
from nestor.ops.short_convolution import next_tail, short_convolution


class ShortConvolution(nn.Module):
    """Depthwise convolution over the last `kernel` tokens of a document; `[B, T, dim]` to `[B, T, dim]`."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        if kernel < 2:
            raise ConfigError(
                f"convolution kernel is {kernel}; it must be at least 2 (1 would be a plain scale)."
            )
        self.kernel = kernel
        self.weight = nn.Parameter(torch.empty(dim, kernel))
        self.initialize(0.02)

    def initialize(self, std: float) -> None:
        """Start as a weighted sum with most weight on the token itself."""
        nn.init.normal_(self.weight, std=0.5 / self.kernel**0.5)
        with torch.no_grad():
            self.weight[:, -1].add_(1.0)

    def forward(
        self, x: Tensor, tail: Tensor | None, span: Span, start: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Output `[B, T, dim]` and the next tail `[B, kernel - 1, dim]`.

        tail: `[B, kernel - 1, dim]`, the inputs before the call, or None at the start of streams.
        start: `[kernel - 1, dim]`, what stands before a document, or None for zeros.
        """
        resets = span.resets is not None
        y = short_convolution(
            x, self.weight, tail, start_tail=start, position=span.position if resets else None
        )
        after = next_tail(
            x,
            self.kernel,
            tail,
            start_tail=start,
            lengths=span.lengths,
            clock=span.clock_after() if resets else None,
        )
        return y, after


@torch.no_grad()
def start_projections(
    q_proj: nn.Linear, k_proj: nn.Linear, v_proj: nn.Linear, convolutions: nn.ModuleDict | None
) -> None:
    """Draw projections that keep the variance of normalised inputs. With convolutions "q", "k" and "v" after
    them, queries and keys start as one projection and convolution, keys one token late, and values as they
    are.

    A memory then starts as one of what came next: a query finds the values of the tokens that followed the
    same few tokens earlier.
    """
    for projection in (q_proj, k_proj, v_proj):
        nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
    if convolutions is None or "q" not in convolutions:
        return
    q, k, v = (cast(ShortConvolution, convolutions[name]) for name in "qkv")
    k_proj.weight.copy_(q_proj.weight)
    for convolution in (q, k, v):
        convolution.weight.zero_()
    nn.init.normal_(q.weight[:, 1:], std=(q.kernel - 1) ** -0.5)
    k.weight[:, :-1] = q.weight[:, 1:]
    # A first token has nothing before it: from a key of zero its unit vector would have no gradient.
    nn.init.normal_(k.weight[:, -1], std=0.1)
    v.weight[:, -1] = 1.0
