"""The gates of a chunk, collapsed into the matrices A, F, m, G and E (spec/neural-memory.md section 1.3).

Inside a chunk with start state ``(W0, S0)`` and gradients ``g_j`` taken at a fixed anchor, the recurrences
``S_t = eta_t S_{t-1} - theta_t g_t`` and ``W_t = a_t W_{t-1} + S_t`` (``a = 1 - alpha``) unroll to

    W_t = A_t W0 + F_t S0 - sum_{j<=t} G_tj g_j          S_t = m_t S0 - sum_{j<=t} E_tj g_j

Nothing here divides or takes a logarithm, so a gate may be exactly 0 or 1.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def _products(gate: Tensor) -> Tensor:
    """[..., C] -> [..., C, C], ``P_tj = prod_{s=j+1..t} gate_s`` for t >= j, else 0."""
    length = gate.shape[-1]
    # Transposed, so that the product runs along memory.
    above = torch.ones(length, length, dtype=torch.bool, device=gate.device).triu(1)
    steps = torch.where(above, gate.unsqueeze(-2), 1.0)
    return steps.cumprod_(-1).triu_().transpose(-1, -2)


class _Products(torch.autograd.Function):
    """The gate's products P ``[..., C, C]``; the gradient is exact at zero gates.

    P and its column from the start are solutions of ``y_t = gate_t y_{t-1} + x_t``, see `_Recurrence`.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor) -> Tensor:
        products = _products(gate)
        ctx.save_for_backward(products)
        return products

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (products,) = ctx.saved_tensors
        return _gate_gradient(torch.matmul(products.mT, grad), products)


class _Recurrence(torch.autograd.Function):
    """``y_t = gate_t y_{t-1} + x_t`` from ``y_{-1} = 0``, with the gate's products P: ``y = P x``.

    gate ``[..., C]``, x and y ``[..., C, K]``. The gradient is exact at zero gates: ``g_x = P^T g_y`` is the
    recurrence backwards, and ``g_gate_t`` is the product ``g_x_t . y_{t-1}``.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, products: Tensor, x: Tensor) -> Tensor:
        y = torch.matmul(products, x)
        ctx.save_for_backward(products, y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:  # type: ignore[override]
        products, y = ctx.saved_tensors
        grad_x = torch.matmul(products.mT, grad)
        return _gate_gradient(grad_x, y), None, grad_x


def _gate_gradient(grad_x: Tensor, y: Tensor) -> Tensor:
    grad_gate = torch.zeros_like(grad_x[..., 0])
    grad_gate[..., 1:] = torch.linalg.vecdot(grad_x[..., 1:, :], y[..., :-1, :])
    return grad_gate


def gate_products(gate: Tensor) -> Tensor:
    """[..., C] -> [..., C, C] lower triangular, ``P_tj = prod_{s=j+1..t} gate_s`` (an empty product is 1)."""
    return _Products.apply(gate)


def _recur(gate: Tensor, products: Tensor, x: Tensor) -> Tensor:
    """`_Recurrence` with the products of the gate already at hand."""
    return _Recurrence.apply(gate, products.detach(), x)


def _from_start(gate: Tensor, products: Tensor) -> Tensor:
    """``prod_{s<=t} gate_s``, what is left at t of the value at the chunk's start, ``[..., C, 1]``."""
    first = torch.nn.functional.pad(gate[..., :1], (0, gate.shape[-1] - 1))
    return _recur(gate, products, first.unsqueeze(-1))


@dataclass(frozen=True)
class Coefficients:
    """Coefficients of one or many chunks; leading axes are free. F, m, E are None without momentum.

    A, F: ``[..., C]`` for every row. G: ``[..., C, C]`` lower triangular. The others belong to the end of the
    chunk: A_end, F_end, m_end ``[..., 1]`` and G_end, E_end ``[..., C]``.
    """

    A: Tensor
    F: Tensor | None
    G: Tensor
    A_end: Tensor
    F_end: Tensor | None
    m_end: Tensor | None
    G_end: Tensor
    E_end: Tensor | None

    def exclusive(self) -> "Coefficients":
        """The rows that token t needs to read W_{t-1}: every row moves down by one."""
        ones, zeros = torch.ones_like(self.A[..., :1]), torch.zeros_like(self.G[..., :1, :])
        return Coefficients(
            A=torch.cat([ones, self.A[..., :-1]], -1),
            F=None if self.F is None else torch.cat([torch.zeros_like(ones), self.F[..., :-1]], -1),
            G=torch.cat([zeros, self.G[..., :-1, :]], -2),
            A_end=self.A_end, F_end=self.F_end, m_end=self.m_end, G_end=self.G_end, E_end=self.E_end,
        )  # fmt: skip


def chunk_coefficients(
    theta: Tensor, eta: Tensor | None, alpha: Tensor | None, valid: Tensor | None
) -> Coefficients:
    """Coefficients from the gates of a chunk.

    theta, eta, alpha: ``[..., C]`` write step, momentum keep and forget gates; None switches one off.
    valid: bool ``[..., C]`` or None. An invalid token is skipped structurally: no setting of the gates is an
    identity step while momentum is non-zero, so its line of the recurrence is left out.
    """
    keep = torch.ones_like(theta) if alpha is None else 1.0 - alpha
    if valid is not None:
        theta = torch.where(valid, theta, 0.0)
        keep = torch.where(valid, keep, 1.0)
    decay = gate_products(keep)
    A = _from_start(keep, decay).squeeze(-1)
    if eta is None:
        G = decay * theta.unsqueeze(-2)
        return Coefficients(A, None, G, A[..., -1:], None, None, G[..., -1, :], None)
    if valid is not None:
        eta = torch.where(valid, eta, 1.0)
    momentum = gate_products(eta)
    E, m = momentum * theta.unsqueeze(-2), _from_start(eta, momentum)
    into_weights = [E, m] if valid is None else [x * valid.unsqueeze(-1) for x in (E, m)]
    G, F = (_recur(keep, decay, x) for x in into_weights)
    F, m = F.squeeze(-1), m.squeeze(-1)
    return Coefficients(A, F, G, A[..., -1:], F[..., -1:], m[..., -1:], G[..., -1, :], E[..., -1, :])
