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


class _GateProducts(torch.autograd.Function):
    """``P_tj = prod_{s=j+1..t} gate_s`` for ``j <= t``, else 0. Exact, as its gradient, at zero gates."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor) -> Tensor:
        length = gate.shape[-1]
        below = torch.ones(length, length, dtype=torch.bool, device=gate.device).tril(-1)
        steps = torch.where(below, gate.unsqueeze(-1), gate.new_ones(()))
        products = torch.cumprod(steps, dim=-2).tril_()
        ctx.save_for_backward(products)
        return products

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        # P_tj = P_ts gate_s P_{s-1,j}, hence d gate_s = sum_j (P^T grad)_sj P_{s-1,j}.
        (products,) = ctx.saved_tensors
        carried = torch.matmul(products.transpose(-1, -2), grad.tril())
        grad_gate = torch.zeros_like(carried[..., 0])
        grad_gate[..., 1:] = (carried[..., 1:, :] * products[..., :-1, :]).sum(-1)
        return grad_gate


def gate_products(gate: Tensor) -> Tensor:
    """[..., C] -> [..., C, C] lower triangular, ``P_tj = prod_{s=j+1..t} gate_s`` (an empty product is 1)."""
    return _GateProducts.apply(gate)


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
    A = decay[..., 0] * keep[..., :1]
    if eta is None:
        G = decay * theta.unsqueeze(-2)
        return Coefficients(A, None, G, A[..., -1:], None, None, G[..., -1, :], None)
    if valid is not None:
        eta = torch.where(valid, eta, 1.0)
    momentum = gate_products(eta)
    m = momentum[..., 0] * eta[..., :1]
    into_weights = decay if valid is None else decay * valid.unsqueeze(-2)
    G = torch.matmul(into_weights, momentum) * theta.unsqueeze(-2)
    F = torch.matmul(into_weights, m.unsqueeze(-1)).squeeze(-1)
    E_end = momentum[..., -1, :] * theta
    return Coefficients(A, F, G, A[..., -1:], F[..., -1:], m[..., -1:], G[..., -1, :], E_end)
