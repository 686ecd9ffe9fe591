"""Retention: how fast weights follow from what the memory accumulates (spec/neural-memory.md 4.3 and 4.4).

The linear recurrence ``A_t = a_t A_{t-1} - theta_t g_t`` runs on an accumulator A; the gradient g is taken at
the weights ``W = weights(A)``. Everything here is a pure function of one matrix ``[..., in, out]``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from nestor.errors import ConfigError

if TYPE_CHECKING:
    from nestor.ops.neural_memory.spec import MemorySpec

RETENTIONS = ("l2", "softmax", "lq", "elastic_net", "elastic_net_ftrl", "bregman_logit")
DUALS = ("paper", "exact")


class Retention(Protocol):
    linear: bool  # inside of a chunk the weights are linear in A, so that a dual form can read them

    def weights(self, a: Tensor) -> Tensor:
        """W of A."""
        ...

    def accumulator(self, w: Tensor) -> Tensor:
        """The A that gives learned initial weights."""
        ...

    def scale(self, anchor: Tensor) -> Tensor | None:
        """What reads inside of a chunk multiply A by, ``[..., 1, 1]``; None: nothing."""
        ...

    def settle(self, a: Tensor) -> Tensor:
        """A after the end of a chunk."""
        ...


class Multiplicative:
    """W = A: decay alone (l2)."""

    linear = True

    def weights(self, a: Tensor) -> Tensor:
        return a

    def accumulator(self, w: Tensor) -> Tensor:
        return w

    def scale(self, anchor: Tensor) -> Tensor | None:
        return None

    def settle(self, a: Tensor) -> Tensor:
        return a


class ElasticNet(Multiplicative):
    """W' = Soft(a W - theta g) at the chunk's end; linear in between."""

    def __init__(self, threshold: float):
        self.threshold = threshold

    def settle(self, a: Tensor) -> Tensor:
        return soft_threshold(a, self.threshold)


class ElasticNetFTRL(Multiplicative):
    """W = Soft(A)."""

    linear = False

    def __init__(self, threshold: float):
        self.threshold = threshold

    def weights(self, a: Tensor) -> Tensor:
        return soft_threshold(a, self.threshold)

    def accumulator(self, w: Tensor) -> Tensor:
        return w + self.threshold * torch.sign(w)


class Simplex(Multiplicative):
    """W = c softmax(A) over the inputs of each output unit (Memora): entries >= 0, columns that sum to c.

    Equal to ``W_t = c softmax(a_t log W_{t-1} - theta_t g_t)``: the constants that log adds, softmax drops.
    """

    linear = False

    def __init__(self, total: float):
        self.total = total

    def weights(self, a: Tensor) -> Tensor:
        return self.total * torch.softmax(a, -2)

    def accumulator(self, w: Tensor) -> Tensor:
        _require(w, w > 0, "softmax", "positive")
        return torch.log(w)


class Power(Multiplicative):
    """W = A / ||A||_q^(q-2) over all entries of a matrix, as printed (Moneta); degree 3 - q in A."""

    def __init__(self, power: float):
        self.power = power

    def weights(self, a: Tensor) -> Tensor:
        return a * self.scale(a)

    def accumulator(self, w: Tensor) -> Tensor:
        return w * _norm(w, self.power).pow((self.power - 2) / (3 - self.power))

    def scale(self, anchor: Tensor) -> Tensor:
        return _norm(anchor, self.power).pow(2 - self.power)


class ExactPower(Multiplicative):
    """W = grad ||A||_q^2 / 2 = sign(A) |A|^(q-1) / ||A||_q^(q-2); the inverse has the dual power p,
    1/p + 1/q = 1."""

    linear = False

    def __init__(self, power: float):
        self.power = power

    def weights(self, a: Tensor) -> Tensor:
        return self._dual(a, self.power)

    def accumulator(self, w: Tensor) -> Tensor:
        return self._dual(w, self.power / (self.power - 1))

    @staticmethod
    def _dual(x: Tensor, power: float) -> Tensor:
        return torch.sign(x) * x.abs().pow(power - 1) * _norm(x, power).pow(2 - power)


class Logit(Multiplicative):
    """W = sigmoid(A), the Bregman divergence of F' = logit: entries stay inside of (0, 1)."""

    linear = False

    def weights(self, a: Tensor) -> Tensor:
        return torch.sigmoid(a)

    def accumulator(self, w: Tensor) -> Tensor:
        _require(w, (w > 0) & (w < 1), "bregman_logit", "between 0 and 1")
        return torch.logit(w)


def soft_threshold(x: Tensor, threshold: float) -> Tensor:
    """sign(x) max(0, |x| - threshold)"""
    return torch.sign(x) * torch.relu(x.abs() - threshold)


def make_retention(spec: MemorySpec) -> Retention:
    """The retention that the spec names."""
    match spec.retention:
        case "softmax":
            return Simplex(spec.simplex_sum)
        case "lq":
            return (Power if spec.retention_dual == "paper" else ExactPower)(spec.retention_power)
        case "elastic_net":
            return ElasticNet(spec.retention_threshold)
        case "elastic_net_ftrl":
            return ElasticNetFTRL(spec.retention_threshold)
        case "bregman_logit":
            return Logit()
    return Multiplicative()


def _norm(x: Tensor, power: float) -> Tensor:
    return torch.linalg.vector_norm(x, power, dim=(-2, -1), keepdim=True)


def _require(w: Tensor, fits: Tensor, retention: str, wanted: str) -> None:
    # Values are looked at where that does not wait for a device.
    if w.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(fits.all()):
        raise ConfigError(
            f"initial weights lie between {float(w.min()):.3g} and {float(w.max()):.3g}; with retention "
            f"{retention!r} all must be {wanted}. Pass a function of the parameters that is."
        )
