"""Inner losses, or attentional biases (MIRAS, arXiv 2504.13173): what a memory is trained on as it reads.

A loss enters the memory by ``e = d loss / d f`` alone (spec/neural-memory.md section 4.2), so each states its
error, and the vector-Jacobian product of the error, which the outer backward needs. Rows are tokens:
``f, v, e`` are ``[..., C, p]``, the residual ``r = f - v``. Every loss is multiplied by c = `scale`.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nestor.errors import ConfigError, ShapeError


@dataclass(frozen=True)
class LossSettings:
    """The numbers of the inner losses; each takes those that it knows.

    exponent: p of "lp", at least 1.
    smooth: "lp", "l1" and "yaad" with ``tanh(nu r)`` for the sign of r, "lp" with ``(r^2 + eps)^(1/2)`` for
        its size.
    sharpness, eps: nu and eps of the smooth forms.
    threshold: delta of "huber", "huber_norm" and "yaad", unless each token brings its own.
    shift: Delta of "worst_case_shift", how far a value may be off.
    """

    exponent: float = 3.0
    smooth: bool = False
    sharpness: float = 10.0
    eps: float = 1e-6
    threshold: float = 1.0
    shift: float = 0.1

    def __post_init__(self) -> None:
        if not self.exponent >= 1:
            raise ConfigError(f"loss_exponent is {self.exponent}; it must be at least 1.")
        for name in ("sharpness", "eps", "threshold"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"loss_{name} is {getattr(self, name)}; it must be positive.")
        if not self.shift >= 0:
            raise ConfigError(f"loss_shift is {self.shift}; it must not be negative.")


class InnerLoss(Protocol):
    """`threshold`, if given, is the delta of each token, ``[..., C, 1]`` (or ``[..., C, p]``, each channel's
    own, where the loss allows); losses without one ignore it."""

    thresholded: bool

    def value(self, f: Tensor, v: Tensor, threshold: Tensor | None = None) -> Tensor:
        """The loss of each token, ``[..., C]``. Only the reference needs it."""
        ...

    def error(self, f: Tensor, v: Tensor, threshold: Tensor | None = None) -> Tensor:
        """e = d loss / d f."""
        ...

    def error_vjp(
        self, grad_e: Tensor, f: Tensor, v: Tensor, threshold: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """(grad f, grad v) of `error`; None where e does not depend on f."""
        ...

    def threshold_vjp(self, grad_e: Tensor, f: Tensor, v: Tensor, threshold: Tensor) -> Tensor:
        """The gradient of the threshold of `error`, in its shape; zero where there is none in e."""
        ...


class L2Loss:
    """``c/2 ||f(k) - v||^2``: e = c (f - v). The paper's printed loss is c = 2, its gradient c = 1."""

    thresholded = False

    def __init__(self, scale: float, settings: LossSettings | None = None):
        self.scale = scale

    def value(self, f: Tensor, v: Tensor, threshold: Tensor | None = None) -> Tensor:
        return (f - v).square().sum(-1) * (0.5 * self.scale)

    def error(self, f: Tensor, v: Tensor, threshold: Tensor | None = None) -> Tensor:
        return (f - v) * self.scale if self.scale != 1.0 else f - v

    def error_vjp(
        self, grad_e: Tensor, f: Tensor, v: Tensor, threshold: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        grad_f = grad_e * self.scale if self.scale != 1.0 else grad_e
        return grad_f, -grad_f

    def threshold_vjp(self, grad_e: Tensor, f: Tensor, v: Tensor, threshold: Tensor) -> Tensor:
        return torch.zeros_like(threshold)


class DotProductLoss:
    """``-c <f(k), v>``: e = -c v. With a linear memory this is linear attention."""

    thresholded = False

    def __init__(self, scale: float, settings: LossSettings | None = None):
        self.scale = scale

    def value(self, f: Tensor, v: Tensor, threshold: Tensor | None = None) -> Tensor:
        return (f * v).sum(-1) * -self.scale

    def error(self, f: Tensor, v: Tensor, threshold: Tensor | None = None) -> Tensor:
        return v * -self.scale

    def error_vjp(
        self, grad_e: Tensor, f: Tensor, v: Tensor, threshold: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        return None, grad_e * -self.scale

    def threshold_vjp(self, grad_e: Tensor, f: Tensor, v: Tensor, threshold: Tensor) -> Tensor:
        return torch.zeros_like(threshold)


class _ResidualLoss(ABC):
    """A loss of r = f - v: a potential, its slope e, and the product of a row with the slope's derivative,
    which is symmetric. All three are for c = 1; d is the threshold."""

    thresholded = False

    def __init__(self, scale: float, settings: LossSettings | None = None):
        self.scale, self.settings = scale, settings or LossSettings()

    def value(self, f: Tensor, v: Tensor, threshold: Tensor | None = None) -> Tensor:
        return self._potential(f - v, self._delta(threshold)) * self.scale

    def error(self, f: Tensor, v: Tensor, threshold: Tensor | None = None) -> Tensor:
        return self._slope(f - v, self._delta(threshold)) * self.scale

    def error_vjp(
        self, grad_e: Tensor, f: Tensor, v: Tensor, threshold: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        grad_f = self._curve(grad_e, f - v, self._delta(threshold)) * self.scale
        return grad_f, -grad_f

    def threshold_vjp(self, grad_e: Tensor, f: Tensor, v: Tensor, threshold: Tensor) -> Tensor:
        along = self._along_delta(f - v, self._delta(threshold))
        if along is None:
            return torch.zeros_like(threshold)
        return (grad_e * along * self.scale).sum_to_size(threshold.shape)

    def _delta(self, threshold: Tensor | None) -> Any:
        return self.settings.threshold if threshold is None else threshold

    @abstractmethod
    def _potential(self, r: Tensor, d: Any) -> Tensor: ...

    @abstractmethod
    def _slope(self, r: Tensor, d: Any) -> Tensor: ...

    @abstractmethod
    def _curve(self, g: Tensor, r: Tensor, d: Any) -> Tensor: ...

    def _along_delta(self, r: Tensor, d: Any) -> Tensor | None:
        """d e / d delta, element by element."""
        return None


class LpLoss(_ResidualLoss):
    """``c ||r||_p^p``: e = c p sign(r) |r|^(p-1); smooth: e = c p tanh(nu r) (r^2 + eps)^((p-1)/2).

    The integral of the smooth error has no closed form: its `value` is the number of the exact loss with the
    gradient of the smooth one.
    """

    def _potential(self, r: Tensor, d: Any) -> Tensor:
        if self.settings.smooth:
            return _SmoothPower.apply(r, self)
        return r.abs().pow(self.settings.exponent).sum(-1)

    def _slope(self, r: Tensor, d: Any) -> Tensor:
        p = self.settings.exponent
        if not self.settings.smooth:
            return torch.sign(r) * r.abs().pow(p - 1) * p
        return torch.tanh(r * self.settings.sharpness) * (r * r + self.settings.eps).pow((p - 1) / 2) * p

    def _curve(self, g: Tensor, r: Tensor, d: Any) -> Tensor:
        p, nu, eps = self.settings.exponent, self.settings.sharpness, self.settings.eps
        if not self.settings.smooth:
            if p == 1:
                return torch.zeros_like(g)
            slope = r.abs().pow(p - 2)
            # Below p = 2 the slope of e has a pole at 0, where autograd takes 0 as well.
            return g * (slope if p >= 2 else slope.masked_fill(r == 0, 0.0)) * (p * (p - 1))
        t, s = torch.tanh(r * nu), r * r + eps
        return g * (s.pow((p - 1) / 2) * (1 - t * t) * nu + t * r * s.pow((p - 3) / 2) * (p - 1)) * p


class _SmoothPower(torch.autograd.Function):
    """The exact ``||r||_p^p`` of each token with the smooth slope as its gradient."""

    @staticmethod
    def forward(ctx: Any, r: Tensor, loss: LpLoss) -> Tensor:
        ctx.save_for_backward(r)
        ctx.loss = loss
        return r.abs().pow(loss.settings.exponent).sum(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (r,) = ctx.saved_tensors
        return grad.unsqueeze(-1) * ctx.loss._slope(r, None), None


class L1Loss(_ResidualLoss):
    """``c ||r||_1``: e = c sign(r), which forgets how large r is; smooth: ``log cosh(nu r) / nu`` per
    coordinate, e = c tanh(nu r)."""

    def _potential(self, r: Tensor, d: Any) -> Tensor:
        return _size(r, self.settings).sum(-1)

    def _slope(self, r: Tensor, d: Any) -> Tensor:
        return _sign(r, self.settings)

    def _curve(self, g: Tensor, r: Tensor, d: Any) -> Tensor:
        return g * _sign_slope(r, self.settings)


class HuberLoss(_ResidualLoss):
    """Quadratic up to delta and linear beyond, per coordinate: e = c clip(r, -delta, delta)."""

    thresholded = True

    def _potential(self, r: Tensor, d: Any) -> Tensor:
        size = r.abs()
        return torch.where(size <= d, 0.5 * r * r, d * (size - 0.5 * d)).sum(-1)

    def _slope(self, r: Tensor, d: Any) -> Tensor:
        return r.clamp(-d, d)

    def _curve(self, g: Tensor, r: Tensor, d: Any) -> Tensor:
        return torch.where(r.abs() <= d, g, 0.0)

    def _along_delta(self, r: Tensor, d: Any) -> Tensor | None:
        return torch.where(r.abs() <= d, 0.0, torch.sign(r))


class HuberNormLoss(_ResidualLoss):
    """Quadratic in the norm of r up to delta and linear beyond: e = c r min(1, delta/||r||), which clips the
    gradient of each token. Its delta is one for all channels."""

    thresholded = True

    def _delta(self, threshold: Tensor | None) -> Any:
        if threshold is not None and threshold.shape[-1] != 1:
            raise ShapeError(
                f"the threshold of inner_loss 'huber_norm' has shape {list(threshold.shape)}; it bounds the "
                f"norm of a token's error, so its last axis must be 1"
            )
        return super()._delta(threshold)

    def _potential(self, r: Tensor, d: Any) -> Tensor:
        norm, far = _outer_norm(r, d)
        inner = 0.5 * (r * r).sum(-1, keepdim=True)
        return torch.where(far, d * (norm - 0.5 * d), inner).squeeze(-1)

    def _slope(self, r: Tensor, d: Any) -> Tensor:
        norm, far = _outer_norm(r, d)
        return r * torch.where(far, d / norm, 1.0)

    def _curve(self, g: Tensor, r: Tensor, d: Any) -> Tensor:
        norm, far = _outer_norm(r, d)
        unit = r / norm
        return torch.where(far, (g - unit * torch.linalg.vecdot(g, unit).unsqueeze(-1)) * (d / norm), g)

    def _along_delta(self, r: Tensor, d: Any) -> Tensor | None:
        norm, far = _outer_norm(r, d)
        return torch.where(far, r / norm, 0.0)


class YaadLoss(_ResidualLoss):
    """The mixture as the paper prints it: the L2 error where ||r|| <= delta, else delta times the L1 error.

    It jumps at ||r|| = delta, from length c delta to up to c delta sqrt(p). "huber_norm" does not.
    """

    thresholded = True

    def _potential(self, r: Tensor, d: Any) -> Tensor:
        return torch.where(_near(r, d), 0.5 * r * r, d * _size(r, self.settings)).sum(-1)

    def _slope(self, r: Tensor, d: Any) -> Tensor:
        return torch.where(_near(r, d), r, d * _sign(r, self.settings))

    def _curve(self, g: Tensor, r: Tensor, d: Any) -> Tensor:
        return torch.where(_near(r, d), g, g * d * _sign_slope(r, self.settings))

    def _along_delta(self, r: Tensor, d: Any) -> Tensor | None:
        return torch.where(_near(r, d), 0.0, _sign(r, self.settings))


class WorstCaseShiftLoss(_ResidualLoss):
    """The largest L2 loss over values within Delta of v, ``c/2 (||r|| + Delta)^2``: e = c (r + Delta
    r/||r||), and 0 where r is 0."""

    def _potential(self, r: Tensor, d: Any) -> Tensor:
        norm, _ = _outer_norm(r, 0.0)
        shift = self.settings.shift
        return 0.5 * (r * r).sum(-1) + shift * norm.squeeze(-1) + 0.5 * shift * shift

    def _slope(self, r: Tensor, d: Any) -> Tensor:
        norm, _ = _outer_norm(r, 0.0)
        return r * (1.0 + self.settings.shift / norm)

    def _curve(self, g: Tensor, r: Tensor, d: Any) -> Tensor:
        norm, far = _outer_norm(r, 0.0)
        unit, pull = r / norm, self.settings.shift / norm
        around = (g - unit * torch.linalg.vecdot(g, unit).unsqueeze(-1)) * pull
        return g + torch.where(far, around, 0.0)


def _outer_norm(r: Tensor, d: Any) -> tuple[Tensor, Tensor]:
    """``||r||`` where it exceeds d, else a constant 1 (so that nothing differentiates a root at 0), and where
    it does; both ``[..., C, 1]``."""
    square = (r * r).sum(-1, keepdim=True)
    far = square.sqrt() > d
    return torch.where(far, square, 1.0).sqrt(), far


def _near(r: Tensor, d: Any) -> Tensor:
    """Where ``||r|| <= d``."""
    return torch.linalg.vector_norm(r.detach(), dim=-1, keepdim=True) <= d


def _size(r: Tensor, settings: LossSettings) -> Tensor:
    """|r| per coordinate, or log cosh(nu r) / nu."""
    if not settings.smooth:
        return r.abs()
    x = r * settings.sharpness
    return (torch.logaddexp(x, -x) - math.log(2.0)) / settings.sharpness


def _sign(r: Tensor, settings: LossSettings) -> Tensor:
    """The derivative of `_size`."""
    return torch.tanh(r * settings.sharpness) if settings.smooth else torch.sign(r)


def _sign_slope(r: Tensor, settings: LossSettings) -> Tensor:
    """The derivative of `_sign`."""
    if not settings.smooth:
        return torch.zeros_like(r)
    return torch.cosh(r * settings.sharpness).pow(-2) * settings.sharpness


INNER_LOSSES: dict[str, Any] = {
    "l2": L2Loss,
    "dot_product": DotProductLoss,
    "lp": LpLoss,
    "l1": L1Loss,
    "huber": HuberLoss,
    "huber_norm": HuberNormLoss,
    "yaad": YaadLoss,
    "worst_case_shift": WorstCaseShiftLoss,
}


def make_loss(name: str, scale: float, settings: LossSettings | None = None) -> InnerLoss:
    """The inner loss called `name`, a key of `INNER_LOSSES`."""
    loss: InnerLoss = INNER_LOSSES[name](scale, settings)
    return loss
