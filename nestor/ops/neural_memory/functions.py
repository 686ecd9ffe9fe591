"""The small functions that a memory network is made of, each with its hand-written derivatives.

A fast network is ``f(x) = head(x, MLP(x))`` where the MLP has one to four weight matrices. This file holds
the three parts that vary between memories: the activation, the head (residual and norm) and the inner
loss. The chunk engine differentiates through the inner gradient, so each part states its first derivative,
and the vector-Jacobian products of that derivative (spec/neural-memory.md sections 2.3 and 2.4).

Rows are tokens: ``x, z, f, e`` are ``[..., C, width]``; ``gamma, beta`` are ``[..., 1, p]``.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# --- activations ------------------------------------------------------------------------------------------


class Activation(Protocol):
    def value(self, z: Tensor) -> Tensor:
        """phi(z)"""
        ...

    def with_slope(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """phi(z), phi'(z)"""
        ...

    def curvature(self, z: Tensor) -> Tensor:
        """phi''(z)"""
        ...


class Gelu:
    """Gaussian error linear unit, the exact (erf) form."""

    def value(self, z: Tensor) -> Tensor:
        return torch.nn.functional.gelu(z)

    def with_slope(self, z: Tensor) -> tuple[Tensor, Tensor]:
        cdf = torch.erf(z * math.sqrt(0.5)).add_(1.0).mul_(0.5)
        return z * cdf, torch.addcmul(cdf, z, self._density(z))

    def curvature(self, z: Tensor) -> Tensor:
        return self._density(z).mul_(2.0 - z * z)

    @staticmethod
    def _density(z: Tensor) -> Tensor:
        return torch.exp(z * z * -0.5).mul_(1.0 / math.sqrt(2.0 * math.pi))


class Silu:
    """Sigmoid linear unit."""

    def value(self, z: Tensor) -> Tensor:
        return torch.nn.functional.silu(z)

    def with_slope(self, z: Tensor) -> tuple[Tensor, Tensor]:
        s = torch.sigmoid(z)
        value = z * s
        return value, torch.addcmul(s, value, 1.0 - s)

    def curvature(self, z: Tensor) -> Tensor:
        s = torch.sigmoid(z)
        return s * (1.0 - s) * (2.0 + z * (1.0 - 2.0 * s))


ACTIVATIONS: dict[str, Activation] = {"gelu": Gelu(), "silu": Silu()}


# --- heads: how the output of the MLP becomes the output of the memory -------------------------------------


@dataclass(frozen=True)
class HeadCache:
    """What the derivatives of a head need from its forward pass."""

    normalised: Tensor | None = None  # zh, [..., C, p]
    inverse_std: Tensor | None = None  # 1/s, [..., C, 1]
    gamma: Tensor | None = None
    weighted_error: Tensor | None = None  # u = gamma e, [..., C, p]


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
        centred = z - z.mean(-1, keepdim=True)
        inverse_std = torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)
        normalised = centred * inverse_std
        return torch.addcmul(x + beta, gamma, normalised), HeadCache(normalised, inverse_std, gamma)

    def pull_back(self, e: Tensor, cache: HeadCache) -> tuple[Tensor, HeadCache]:
        assert cache.gamma is not None and cache.normalised is not None and cache.inverse_std is not None
        u = cache.gamma * e
        delta = _project(u, cache.normalised) * cache.inverse_std
        return delta, HeadCache(cache.normalised, cache.inverse_std, cache.gamma, u)

    def value_vjp(self, grad_f: Tensor, cache: HeadCache) -> tuple[Tensor, Tensor | None, Tensor | None]:
        assert cache.gamma is not None and cache.normalised is not None and cache.inverse_std is not None
        grad_z = _project(cache.gamma * grad_f, cache.normalised) * cache.inverse_std
        grad_gamma = (grad_f * cache.normalised).sum(-2, keepdim=True)
        return grad_z, grad_gamma, grad_f.sum(-2, keepdim=True)

    def pull_back_vjp(
        self, grad_delta: Tensor, e: Tensor, cache: HeadCache
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        zh, r, u = cache.normalised, cache.inverse_std, cache.weighted_error
        assert zh is not None and r is not None and u is not None and cache.gamma is not None
        width = zh.shape[-1]
        projected = _project(grad_delta, zh)
        grad_u = projected * r
        # d delta / d z has two parts: through 1/s (proportional to delta) and through zh.
        delta = _project(u, zh) * r
        inner = (u * zh).mean(-1, keepdim=True) * grad_delta + u * (grad_delta * zh).mean(-1, keepdim=True)
        grad_z = (
            -zh * (grad_delta * delta).sum(-1, keepdim=True) * (r / width) - _project(inner, zh) * r.square()
        )
        return cache.gamma * grad_u, grad_z, (e * grad_u).sum(-2, keepdim=True)


def _project(w: Tensor, zh: Tensor) -> Tensor:
    """P w = w - mean(w) - zh mean(zh w), the symmetric projection in every layer-norm derivative."""
    return w - w.mean(-1, keepdim=True) - zh * (w * zh).mean(-1, keepdim=True)


NORMS = ("none", "residual", "residual_layernorm")


def make_head(norm: str, eps: float) -> Head:
    """The head called `norm`: "none" (N2), "residual" (N0) or "residual_layernorm" (N1)."""
    if norm == "residual_layernorm":
        return NormHead(eps)
    return PlainHead(residual=norm == "residual")


# --- inner losses (attentional bias) -----------------------------------------------------------------------


class InnerLoss(Protocol):
    def value(self, f: Tensor, v: Tensor) -> Tensor:
        """The loss of each token, ``[..., C]``. Only the reference needs it."""
        ...

    def error(self, f: Tensor, v: Tensor) -> Tensor:
        """e = d loss / d f."""
        ...

    def error_vjp(self, grad_e: Tensor, f: Tensor, v: Tensor) -> tuple[Tensor | None, Tensor]:
        """(grad f, grad v) of `error`; None where e does not depend on f."""
        ...


class L2Loss:
    """``c/2 ||f(k) - v||^2``: e = c (f - v). The paper's printed loss is c = 2, its gradient c = 1."""

    def __init__(self, scale: float):
        self.scale = scale

    def value(self, f: Tensor, v: Tensor) -> Tensor:
        return (f - v).square().sum(-1) * (0.5 * self.scale)

    def error(self, f: Tensor, v: Tensor) -> Tensor:
        return (f - v) * self.scale if self.scale != 1.0 else f - v

    def error_vjp(self, grad_e: Tensor, f: Tensor, v: Tensor) -> tuple[Tensor | None, Tensor]:
        grad_f = grad_e * self.scale if self.scale != 1.0 else grad_e
        return grad_f, -grad_f


class DotProductLoss:
    """``-c <f(k), v>``: e = -c v. With a linear memory this is linear attention."""

    def __init__(self, scale: float):
        self.scale = scale

    def value(self, f: Tensor, v: Tensor) -> Tensor:
        return (f * v).sum(-1) * -self.scale

    def error(self, f: Tensor, v: Tensor) -> Tensor:
        return v * -self.scale

    def error_vjp(self, grad_e: Tensor, f: Tensor, v: Tensor) -> tuple[Tensor | None, Tensor]:
        return None, grad_e * -self.scale


INNER_LOSSES: dict[str, type[L2Loss] | type[DotProductLoss]] = {"l2": L2Loss, "dot_product": DotProductLoss}
