"""Several projections of one input."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def project_together(x: Tensor, projections: Sequence[nn.Module]) -> list[Tensor]:
    """What each of the projections makes of x ``[B, T, d]``.

    On a GPU, for more than one token, as one product: one launch, and one product for the gradient of x. Only
    of plain `nn.Linear` without biases and hooks; what stands in their place (adapters, quantised weights) is
    called.
    """
    biased = any(getattr(projection, "bias", None) is not None for projection in projections)
    weights = stacked(projections) if x.is_cuda and x.shape[1] > 1 and not biased else None
    if weights is None:
        return [projection(x) for projection in projections]
    return list(F.linear(x, weights).split([len(projection.weight) for projection in projections], -1))  # type: ignore[arg-type]


def project_wide(x: Tensor, projection: nn.Module) -> Tensor:
    """What a projection makes of x in float32 (float64 stays), inside of autocast, too.

    For gates, some of which are near 0 or 1. What stands in place of `nn.Linear` (see `plain`) computes in
    the dtype of its weight.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        if plain(projection):
            linear = cast(nn.Linear, projection)
            bias = None if linear.bias is None else linear.bias.to(dtype)
            return F.linear(x.to(dtype), linear.weight.to(dtype), bias)
        weight = getattr(projection, "weight", None)
        known = isinstance(weight, Tensor) and weight.is_floating_point()
        return projection(x.to(weight.dtype) if known else x).to(dtype)  # type: ignore[union-attr]


def stacked(projections: Sequence[nn.Module]) -> Tensor | None:
    """The weights of several projections as one matrix; None unless all are plain and alike."""
    if not all(map(plain, projections)):
        return None
    weights = [cast(Tensor, projection.weight) for projection in projections]
    if len({(weight.dtype, weight.device) for weight in weights}) > 1:
        return None
    return torch.cat(weights)


def plain(module: nn.Module) -> bool:
    """Whether a module is `nn.Linear` and nothing else, so that its weight can be used without calling it."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    hooked = any(hooks) or module._backward_pre_hooks or "forward" in vars(module)
    # Quantised and distributed weights are tensors of another class.
    return type(module) is nn.Linear and not hooked and type(module.weight) in (nn.Parameter, Tensor)
