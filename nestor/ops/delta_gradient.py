"""Gradient descent with a delta rule on the weights, and momenta that are memories of gradients.

Delta gradient descent (DGD, arXiv 2512.24695, section 4.5): a linear layer y = W x steps to

    W' = argmin  1/2 |W' x - u|^2 + 1/(2 eta) |W' - W|^2,   u = -dL/dy at W,

which decays W along x before it writes there. Repeated on one pair of unit k with L = 1/2 |W k - v|^2 it
rests at W k = v / 2, not at v; with L = -<W k, v> it is the delta rule and rests at v (spec nested-learning,
b.5). Momenta of section 4.3 end in `W <- W + m`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nestor.errors import ShapeError

Tensors = dict[str, Tensor]


def dgd_coefficient(x: Tensor, eta: float) -> Tensor:
    """``eta' = eta / (1 + eta |x|^2)`` of inputs ``[..., i]``, ``[...]``.

    The paper prints ``eta / (1 + eta)``, which is this for |x| = 1.
    """
    return eta / (1 + eta * x.square().sum(-1))


def delta_gradient_step(
    weight: Tensor, x: Tensor, grad_y: Tensor, eta: float, *, alpha: float = 1.0, form: str = "exact"
) -> Tensor:
    """The weights after a step of DGD, ``W (alpha 1 - eta' x x^T) - eta' grad_y x^T``.

    Args:
        weight: W `[o, i]`. x: input `[i]`. grad_y: dL/dy at the output W x `[o]`, not of a loss's mean.
        alpha: what is kept of the weights; 1: the minimum above.
        form: "short", of the paper's first version: ``W (alpha 1 - x x^T) - eta grad_y x^T``, for unit x.

    With a batch, x `[B, i]` and grad_y `[B, o]`, each at the same W, the result is the mean of what each
    token alone makes of W. This is an extension: the paper has no batches. For the sequential rule, step
    token by token.

    Raises:
        ShapeError: tensors that do not fit each other, or an unknown form.
    """
    fits = x.dim() in (1, 2) and x.shape[:-1] == grad_y.shape[:-1]
    if not fits or weight.shape != (grad_y.shape[-1], x.shape[-1]):
        raise ShapeError(
            f"weight, x and grad_y have shapes {list(weight.shape)}, {list(x.shape)} and "
            f"{list(grad_y.shape)}; give [o, i], [i] and [o], or [o, i], [B, i] and [B, o]"
        )
    if form not in ("exact", "short"):
        raise ShapeError(f"form is {form!r}; it is 'exact' or 'short'")
    x, grad_y = torch.atleast_2d(x), torch.atleast_2d(grad_y)
    if form == "exact":
        written = dgd_coefficient(x, eta)[:, None] * (x @ weight.mT + grad_y)
    else:
        written = x @ weight.mT + eta * grad_y
    return alpha * weight - written.mT @ x / x.shape[0]


def delta_momentum_step(
    m: Tensor,
    g: Tensor,
    eta: float,
    *,
    alpha: float = 0.9,
    kappa: float | None = None,
    value: Tensor | None = None,
    elementwise: bool = False,
) -> Tensor:
    """A momentum that decays where it is written, ``m (alpha 1 - kappa g^T g) - eta P g`` ``[o, i]``.

    Gradient descent on ``1/2 |m g^T - P|^2`` with weight decay; alpha = 0.9 and kappa = 0 is momentum.

    Args:
        m, g: momentum and gradient `[o, i]`.
        kappa: None: eta, as derived. It is taken down to 1 / |g|^2 where it is above, for the rule grows
            without bound from kappa |g|^2 = 2 on.
        value: P `[o, o]`; None: the identity.
        elementwise: each number is a memory of its own, ``(alpha - kappa g^2) m - eta P g``.
    """
    strength = g.square() if elementwise else g.square().sum()
    kappa = eta if kappa is None else kappa
    # Also right for g = 0, where 1 / |g|^2 is infinite.
    safe = torch.clamp(1 / strength, max=kappa)
    decay = safe * strength * m if elementwise else safe * (m @ g.mT) @ g
    return alpha * m - decay - eta * (g if value is None else value @ g)


def inner_product(written: Tensor, g: Tensor) -> Tensor:
    """``<m(g), g>``: to step down along it makes m(g) point against g."""
    return (written * g).sum()


def deep_momentum_step(
    phi: Tensors,
    g: Tensor,
    eta: float,
    network: Callable[[Tensors, Tensor], Tensor],
    *,
    alpha: float = 0.9,
    objective: Callable[[Tensor, Tensor], Tensor] = inner_product,
) -> tuple[Tensor, Tensors]:
    """A momentum that is a network m_phi: what is added to the weights ``[o, i]``, and phi after.

    ``phi' = alpha phi - eta d objective(m_phi(g), g) / d phi``, and the update is ``m_phi'(g)``. With
    ``network = lambda phi, g: phi["m"]`` this is momentum. The paper's objective is ``<m(g), 1>``, for which
    all outputs of a network with biases fall alike, whatever g is; the default is to be preferred.

    Args:
        phi: parameters by name. g: a gradient `[o, i]`.
        network: m as a function of phi and g, to `[o, i]`, differentiable.
        objective: a number, of what the network says of a gradient, and the gradient.
    """
    slopes = torch.func.grad(lambda p: objective(network(p, g), g))(phi)
    after = {name: alpha * parameter - eta * slopes[name] for name, parameter in phi.items()}
    return network(after, g), after
