"""Fast networks, with the inner gradient of a loss written out in formulas that autograd can differentiate.

A network is a way to combine products with its matrices, and never sees the matrices themselves: the same
lines serve a read of one set of weights and the dual form, in which every token has weights of its own. Its
inner gradient is one row pair per token and matrix, ``dW_l = x_l^T delta_l`` (spec/neural-memory.md sections
2.3 and 7.2), so that it needs neither autograd nor a weight matrix per token.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from nestor.ops.neural_memory.functions import ACTIVATIONS, Activation
from nestor.ops.neural_memory.losses import InnerLoss

NETWORKS = ("mlp", "gated")
Product = Callable[[int, Tensor], Tensor]  # (matrix, x) -> x W, or delta W^T


class Gradient(NamedTuple):
    """Per matrix: inputs x_l ``[..., C, in]`` and deltas ``[..., C, out]``, of which dW_l of a token is
    ``x_l^T delta_l``."""

    inputs: list[Tensor]
    deltas: list[Tensor]


class Network(Protocol):
    matrices: int
    output: int  # the matrix whose columns are the channels of f

    def value(self, x: Tensor, product: Product) -> Tensor:
        """The output before the head."""
        ...

    def gradient(
        self, x: Tensor, product: Product, pull_back: Product, of_output: Callable[[Tensor], Tensor]
    ) -> Gradient:
        """The inner gradient; `of_output` gives d loss / d z of the output z before the head."""
        ...


class _Activate(torch.autograd.Function):
    """phi(z) and phi'(z). The activations' own formulas write in place, which autograd does not follow."""

    @staticmethod
    def forward(ctx: Any, activation: Activation, z: Tensor) -> tuple[Tensor, Tensor]:
        ctx.activation = activation
        ctx.save_for_backward(z)
        return activation.with_slope(z)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_value: Tensor, g_slope: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        _, slope, curvature = ctx.activation.with_curvature(*ctx.saved_tensors)
        return None, torch.addcmul(g_value * slope, g_slope, curvature)


class LossError(torch.autograd.Function):
    """e = d loss / d f, with the derivatives that the loss states."""

    @staticmethod
    def forward(ctx: Any, loss: InnerLoss, f: Tensor, v: Tensor, threshold: Tensor | None) -> Tensor:
        ctx.loss = loss
        ctx.save_for_backward(f, v, threshold)
        return loss.error(f, v, threshold)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        f, v, threshold = ctx.saved_tensors
        g_threshold = None if threshold is None else ctx.loss.threshold_vjp(grad, f, v, threshold)
        return None, *ctx.loss.error_vjp(grad, f, v, threshold), g_threshold


class Mlp:
    """z = phi(... phi(x W_0) W_1 ...) W_{L-1} (section 2.3)."""

    def __init__(self, activation: str, matrices: int):
        self.activation = ACTIVATIONS[activation]
        self.matrices, self.output = matrices, matrices - 1

    def value(self, x: Tensor, product: Product) -> Tensor:
        for layer in range(self.output):
            x = self.activation.value(product(layer, x))
        return product(self.output, x)

    def gradient(
        self, x: Tensor, product: Product, pull_back: Product, of_output: Callable[[Tensor], Tensor]
    ) -> Gradient:
        inputs, slopes = [x], []
        for layer in range(self.output):
            x, slope = _Activate.apply(self.activation, product(layer, x))
            inputs.append(x)
            slopes.append(slope)
        deltas = [of_output(product(self.output, x))]
        for layer in range(self.output, 0, -1):
            deltas.append(pull_back(layer, deltas[-1]) * slopes[layer - 1])
        return Gradient(inputs, deltas[::-1])


class Gated:
    """z = (phi(x W0) * (x W2)) W1, matrices in the order W0, W1, W2 (LaCT; section 7.2)."""

    matrices, output = 3, 1

    def __init__(self, activation: str):
        self.activation = ACTIVATIONS[activation]

    def value(self, x: Tensor, product: Product) -> Tensor:
        return product(1, self.activation.value(product(0, x)) * product(2, x))

    def gradient(
        self, x: Tensor, product: Product, pull_back: Product, of_output: Callable[[Tensor], Tensor]
    ) -> Gradient:
        gate, slope = _Activate.apply(self.activation, product(0, x))
        up = product(2, x)
        hidden = gate * up
        delta = of_output(product(1, hidden))
        back = pull_back(1, delta)
        return Gradient([x, hidden, x], [back * up * slope, delta, back * gate])


def make_network(network: str, activation: str, matrices: int) -> Network:
    """The network of this name with this many matrices."""
    return Gated(activation) if network == "gated" else Mlp(activation, matrices)
