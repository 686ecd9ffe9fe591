"""The small functions that a memory network is made of, each with its hand-written derivatives.

A fast network is ``f(x) = head(x, MLP(x))`` where the MLP has one to four weight matrices. Three parts vary
between memories: the activation and the head (residual and norm), which are here, and the inner loss, in
`losses.py`. The chunk engine differentiates through the inner gradient, so each states its first derivative,
and the vector-Jacobian products of that derivative (spec/neural-memory.md sections 2.3 and 2.4).

Rows are tokens: ``x, z, f, e`` are ``[..., C, width]``; ``gamma, beta`` are ``[..., 1, p]``.
"""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nestor.ops.neural_memory.losses import INNER_LOSSES as INNER_LOSSES
from nestor.ops.neural_memory.losses import InnerLoss as InnerLoss

# --- activations ------------------------------------------------------------------------------------------


class Activation(Protocol):
    def value(self, z: Tensor) -> Tensor:
        """phi(z)"""
        ...

    def with_slope(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """phi(z), phi'(z)"""
        ...

    def with_curvature(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """phi(z), phi'(z), phi''(z)"""
        ...


class Gelu:
    """Gaussian error linear unit, the exact (erf) form."""

    def value(self, z: Tensor) -> Tensor:
        return torch.nn.functional.gelu(z)

    def with_slope(self, z: Tensor) -> tuple[Tensor, Tensor]:
        value, slope, _ = self._parts(z)
        return value, slope

    def with_curvature(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, slope, density = self._parts(z)
        return value, slope, density.mul_(2.0 - z * z)

    @staticmethod
    def _parts(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """phi, phi', and the density of the normal distribution."""
        cdf = torch.erf(z * math.sqrt(0.5)).add_(1.0).mul_(0.5)
        density = torch.exp(z * z * -0.5).mul_(1.0 / math.sqrt(2.0 * math.pi))
        return z * cdf, torch.addcmul(cdf, z, density), density


class Silu:
    """Sigmoid linear unit."""

    def value(self, z: Tensor) -> Tensor:
        return torch.nn.functional.silu(z)

    def with_slope(self, z: Tensor) -> tuple[Tensor, Tensor]:
        value, slope, _ = self._parts(z)
        return value, slope

    def with_curvature(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # phi'' = (1 - s) (2 phi' - phi): no second exponential.
        value, slope, rest = self._parts(z)
        return value, slope, rest.mul_(torch.sub(slope, value, alpha=0.5)).mul_(2.0)

    @staticmethod
    def _parts(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """phi, phi', and 1 - s for the sigmoid s."""
        s = torch.sigmoid(z)
        value, rest = z * s, 1.0 - s
        return value, torch.addcmul(s, value, rest), rest


ACTIVATIONS: dict[str, Activation] = {"gelu": Gelu(), "silu": Silu()}


# --- heads: how the output of the MLP becomes the output of the memory -------------------------------------


class HeadCache(NamedTuple):
    """What the derivatives of a head need from its forward pass."""

    z: Tensor | None = None  # [..., C, p]
    mean: Tensor | None = None  # of z, [..., C, 1]
    inverse_std: Tensor | None = None  # 1/s, [..., C, 1]
    normalised: Tensor | None = None  # zh, [..., C, p]
    gamma: Tensor | None = None
    weighted_error: Tensor | None = None  # u = gamma e, [..., C, p]
    delta: Tensor | None = None  # [..., C, p]


class Head(Protocol):
    residual: bool
    normalises: bool

    def value(
        self, x: Tensor, z: Tensor, gamma: Tensor | None, beta: Tensor | None
    ) -> tuple[Tensor, HeadCache]:
        """f(x) from the memory's input x and the MLP's output z."""
        ...

    def pull_back(self, e: Tensor, cache: HeadCache) -> tuple[Tensor, HeadCache]:
        """delta = d loss / d z from e = d loss / d f."""
        ...

    def value_vjp(self, grad_f: Tensor, cache: HeadCache) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(grad z, grad gamma, grad beta) of `value`; grad x is grad_f if `residual`, else nothing."""
        ...

    def pull_back_vjp(
        self, grad_delta: Tensor, e: Tensor, cache: HeadCache
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(grad e, grad z, grad gamma) of `pull_back`."""
        ...


class PlainHead:
    """N2: ``f(x) = MLP(x)``; N0: ``f(x) = x + MLP(x)``."""

    normalises = False

    def __init__(self, residual: bool):
        self.residual = residual

    def value(
        self, x: Tensor, z: Tensor, gamma: Tensor | None, beta: Tensor | None
    ) -> tuple[Tensor, HeadCache]:
        return (x + z if self.residual else z), HeadCache()

    def pull_back(self, e: Tensor, cache: HeadCache) -> tuple[Tensor, HeadCache]:
        return e, cache

    def value_vjp(self, grad_f: Tensor, cache: HeadCache) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return grad_f, None, None

    def pull_back_vjp(
        self, grad_delta: Tensor, e: Tensor, cache: HeadCache
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return grad_delta, None, None


class NormHead:
    """N1: ``f(x) = x + gamma LN(MLP(x)) + beta`` with slow gamma, beta.

    The layer norm's ``eps`` is large on purpose: its backward multiplies by up to ``1/sqrt(eps)`` when the
    MLP's output is near zero, which is where a forgetting memory goes (spec section 9, row 6).
    """

    residual = True
    normalises = True

    def __init__(self, eps: float):
        self.eps = eps

    def value(
        self, x: Tensor, z: Tensor, gamma: Tensor | None, beta: Tensor | None
    ) -> tuple[Tensor, HeadCache]:
        assert gamma is not None and beta is not None
        normalised, mean, inverse_std = torch.native_layer_norm(z, z.shape[-1:], None, None, self.eps)
        cache = HeadCache(z, mean, inverse_std, normalised, gamma)
        return torch.addcmul(x + beta, gamma, normalised), cache

    def pull_back(self, e: Tensor, cache: HeadCache) -> tuple[Tensor, HeadCache]:
        assert cache.gamma is not None
        u = cache.gamma * e
        delta = _through_norm(u, cache)
        return delta, cache._replace(weighted_error=u, delta=delta)

    def value_vjp(self, grad_f: Tensor, cache: HeadCache) -> tuple[Tensor, Tensor | None, Tensor | None]:
        assert cache.gamma is not None and cache.normalised is not None
        grad_gamma = (grad_f * cache.normalised).sum(-2, keepdim=True)
        return _through_norm(cache.gamma * grad_f, cache), grad_gamma, grad_f.sum(-2, keepdim=True)

    def pull_back_vjp(
        self, grad_delta: Tensor, e: Tensor, cache: HeadCache
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        zh, r, u, delta = cache.normalised, cache.inverse_std, cache.weighted_error, cache.delta
        assert zh is not None and r is not None and u is not None and delta is not None
        assert cache.gamma is not None
        grad_u = _through_norm(grad_delta, cache)
        # delta = P u / s depends on z through 1/s (a part proportional to delta) and through zh. P is linear,
        # so that the projections of the latter part are delta and grad_u again.
        total = zh * torch.linalg.vecdot(grad_delta, delta).unsqueeze(-1)
        total.addcmul_(grad_u, torch.linalg.vecdot(u, zh).unsqueeze(-1))
        total.addcmul_(delta, torch.linalg.vecdot(grad_delta, zh).unsqueeze(-1))
        grad_z = total.mul_(r * (-1.0 / zh.shape[-1]))
        return cache.gamma * grad_u, grad_z, (e * grad_u).sum(-2, keepdim=True)


def _through_norm(w: Tensor, cache: HeadCache) -> Tensor:
    """P w / s with P w = w - mean(w) - zh mean(zh w): the derivative of a layer norm, which is symmetric."""
    return torch.ops.aten.native_layer_norm_backward(
        w, cache.z, w.shape[-1:], cache.mean, cache.inverse_std, None, None, [True, False, False]
    )[0]


NORMS = ("none", "residual", "residual_layernorm")


def make_head(norm: str, eps: float) -> Head:
    """The head called `norm`: "none" (N2), "residual" (N0) or "residual_layernorm" (N1)."""
    if norm == "residual_layernorm":
        return NormHead(eps)
    return PlainHead(residual=norm == "residual")
