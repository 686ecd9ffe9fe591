"""How the steps of a chunk mix into the states after its tokens, for gates per head, matrix or channel.

The matrices A, F, m, G and E of spec/neural-memory.md section 1.3, as in `coefficients.py`, with an axis n of
channels (1, or p for gates per output channel, section 4.4) and for losses over a window of tokens (section
5.2): ``G -> G Gamma`` and ``E -> E Gamma``, where the steps of the window's earlier tokens, its halo, stand
before those of the chunk. J = C, or c - 1 + C with a window of c.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nestor.ops.neural_memory.coefficients import gate_products


@dataclass(frozen=True)
class Mix:
    """W_t = A_t W0 + F_t S0 + sum_j G_tj u_j and S_t = m_t S0 + sum_j E_tj u_j with the steps u_j = -g_j.

    A, F ``[m, n, C]``, m ``[m, 1, C]``, G, E ``[m, n, C, J]``; D ``[m, n, C, C]``, D_ti = A_t / A_i. Without
    momentum F and m are None, and E = diag(theta), so that it is None unless asked for.
    """

    A: Tensor
    F: Tensor | None
    m: Tensor | None
    G: Tensor
    E: Tensor | None
    D: Tensor

    def exclusive(self) -> "Mix":
        """What token t needs to read W_{t-1}."""
        ones = torch.ones_like(self.A[..., :1])
        F = None if self.F is None else torch.cat([torch.zeros_like(self.F[..., :1]), self.F[..., :-1]], -1)
        G = torch.cat([torch.zeros_like(self.G[..., :1, :]), self.G[..., :-1, :]], -2)
        return Mix(torch.cat([ones, self.A[..., :-1]], -1), F, self.m, G, self.E, self.D)


def mix(
    theta: Tensor,
    eta: Tensor | None,
    alpha: Tensor | None,
    valid: Tensor | None,
    band: Tensor | None,
    surprises: bool = False,
    end_only: bool = False,
) -> Mix:
    """theta, alpha ``[m, n, C]``, eta ``[m, C]``, valid bool ``[m, C]``, band = Gamma ``[m, C, J]``.

    Tokens that are not valid are skipped structurally: their rows repeat the row before. surprises: E is
    wanted without momentum too. end_only: A, F, G and D have the chunk's last row alone.
    """
    keep = torch.ones_like(theta[:, :1]) if alpha is None else 1.0 - alpha
    eta = None if eta is None else eta.unsqueeze(1)
    if valid is not None:
        here = valid.unsqueeze(1)
        theta, keep = torch.where(here, theta, 0.0), torch.where(here, keep, 1.0)
        eta = None if eta is None else torch.where(here, eta, 1.0)
    D = _last_products(keep) if end_only else gate_products(keep)
    A = D[..., 0] * keep[..., :1]
    E = F = m = None
    if eta is None:
        G = D * theta.unsqueeze(-2)
        E = torch.diag_embed(theta) if surprises else None
    else:
        products = gate_products(eta)
        E = into_weights = products * theta.unsqueeze(-2)
        m = from_start = products[..., 0] * eta[..., :1]
        if valid is not None:
            into_weights, from_start = E * here.unsqueeze(-1), m * here
        F = torch.matmul(D, from_start.unsqueeze(-1)).squeeze(-1)
        G = torch.matmul(D, into_weights)
    if band is not None:
        band = band.unsqueeze(1)
        G, E = torch.matmul(G, band), None if E is None else torch.matmul(E, band)
    return Mix(A, F, m, G, E, D)


def _last_products(gate: Tensor) -> Tensor:
    """The last row of `gate_products`, ``[..., 1, C]``, without the others."""
    return torch.cat([suffix_products(gate[..., 1:]), torch.ones_like(gate[..., :1])], -1).unsqueeze(-2)


def suffix_products(x: Tensor) -> Tensor:
    """``[..., n]``, at i the product of ``x[..., i:]``."""
    # By doubling: the backwards of cumprod and prod ask the device for zeros and wait for the answer.
    ahead = 1
    while ahead < x.shape[-1]:
        x = torch.cat([x[..., :-ahead] * x[..., ahead:], x[..., -ahead:]], -1)
        ahead *= 2
    return x


def sum_of_steps(theta: Tensor, valid: Tensor | None, band: Tensor | None) -> Tensor:
    """The weight ``[m, n, J]`` of each step in their sum over the chunk; arguments as in `mix`."""
    if valid is not None:
        theta = torch.where(valid.unsqueeze(1), theta, 0.0)
    return theta if band is None else torch.matmul(theta, band)


def window_band(gates: Tensor | None, halo: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Gamma ``[m, C, J]`` of the window, and the gate ``[m, J]`` that stays with each of the J tokens.

    gates: ``[m, C]``, of the token that is learned, or ``[m, C, c]``, of the token that learns it and of how
    many tokens ago it was; None: 1. halo: ``[m, c - 1]``, the same for the tokens before; 0 where there is
    none.
    """
    before = halo.shape[1]
    own = halo.new_ones(halo.shape[0], tokens) if gates is None or gates.dim() == 3 else gates
    slots = torch.cat([halo, own], 1)
    now = torch.arange(tokens, device=halo.device).unsqueeze(1) + before
    ago = now - torch.arange(before + tokens, device=halo.device)
    band = torch.where((ago >= 0) & (ago <= before), slots.unsqueeze(1), 0.0)
    if gates is not None and gates.dim() == 3:
        index = ago.clamp(0, before).expand(halo.shape[0], -1, -1)
        band = band * gates.gather(-1, index)
    return band, slots


def per_matrix(gate: Tensor | None, kind: str, matrices: int, output: int) -> list[Tensor | None]:
    """The gate ``[m, n, C]`` of each matrix from ``[m, C]`` ("head"), ``[m, C, L]`` ("matrix"), or
    ``[m, C, p]`` ("channel"): the output matrix has one for each column, the others their mean."""
    if gate is None:
        return [None] * matrices
    if kind == "head":
        return [gate.unsqueeze(1)] * matrices
    if kind == "matrix":
        return [gate[..., layer].unsqueeze(1) for layer in range(matrices)]
    mean, channels = gate.mean(-1).unsqueeze(1), gate.transpose(1, 2)
    return [channels if layer == output else mean for layer in range(matrices)]
