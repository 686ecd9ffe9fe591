"""Bounded targets, gates that memories make, and caps of the write step (spec section
c.5)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from nestor.ops.self_modifying.spec import Gate, SelfModifyingSpec

# Below the square of any gradient that counts; keeps the derivative of a norm finite at 0.
TINY = 1e-24


def bounded(x: Tensor) -> Tensor:
    """x / max(1, ||x||) over the last axis."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True).clamp_min(1.0))


def logit(gate: Gate, output: Tensor) -> Tensor:
    """What a gate is a function of, ``[...]``, from the output of its memory ``[..., out]``; bias and read
    broadcast over ``[...]`` and ``[..., out]``."""
    read = output.squeeze(-1) if gate.read is None else (output * gate.read).sum(-1)
    return read + gate.bias


def write_step(spec: SelfModifyingSpec, x: Tensor) -> Tensor:
    """eta = max_step sigmoid(x)."""
    return spec.max_step * torch.sigmoid(x)


def kept_fraction(spec: SelfModifyingSpec, x: Tensor) -> Tensor:
    """alpha = exp(-softplus(x) / horizon): what is kept, not what is forgotten."""
    return torch.exp(F.softplus(x) / -spec.horizon)


def gradient_size(squares: Tensor) -> Tensor:
    """The norm of a gradient from its square."""
    return torch.sqrt(squares + TINY)


def capped(spec: SelfModifyingSpec, eta: Tensor, alpha: Tensor, key: Tensor, size: Tensor | None) -> Tensor:
    """The write step that is used, ``[...]``: key ``[..., p]``, size of the gradient ``[...]``, which
    only the cap "soft" looks at."""
    if spec.step_cap == "none":
        return eta
    if spec.step_cap == "soft":
        assert size is not None
        ratio = eta * size / (1.0 - alpha).clamp_min(torch.finfo(alpha.dtype).tiny)
        # (1 - exp(-x)) / x, and the first terms of its series where that is 0 / 0.
        small = ratio < 1e-4
        safe = torch.where(small, 1.0, ratio)
        eta = eta * torch.where(small, 1.0 - ratio / 2 + ratio.square() / 6, -torch.expm1(-safe) / safe)
    return torch.minimum(eta, alpha / key.square().sum(-1).clamp_min(TINY))
