"""The decays and writes of a chunk as a few matrix products (the UT form of delta rules).

Over a chunk with start state (W0, S0), unit keys k_t and gradients k_t^T e_t that are all given,

    S_t = mu_t S_{t-1} - eta_t k_t^T e_t       W_t = (alpha_t I - eta_t k_t^T k_t) W_{t-1} + S_t

unrolls to

    W_t = A_t W0 + F_t S0 + sum_{j<=t} k_j^T (D_tj a_j - G_tj e_j)
    S_t = m_t S0 - sum_{j<=t} E_tj k_j^T e_j

where D_tj is the product of alpha after j and A, F, m, G, E are the coefficients of a memory whose decay is a
number (spec/neural-memory.md section 1.3). The corrections ``a_t = -eta_t k_t W_{t-1}`` are what the
decay takes along the key; they need the rows before them, so that they solve

    (I + eta (D- . K K^T)) a = -eta (A- K W0 + F- K S0 - (G- . K K^T) e)

with a unit lower triangle; a minus marks rows of the token before. Without momentum what is taken along a key
and what is written there are one row ``u_t = a_t - eta_t e_t``: F, G and E go, and the right side is ``-eta
(A- K W0 + e)``. Nothing divides by a product of gates, so that alpha may be 0 or 1. Leading axes are free.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nestor.ops.neural_memory.coefficients import gate_products


class Transition(NamedTuple):
    """Everything of a chunk that does not depend on its start state.

    keys ``[..., C, i]``, eta ``[..., C, 1]``. A, F ``[..., C, 1]``, D, G ``[..., C, C]``: rows of the token
    before. scores: ``G . K K^T``; solve: the inverse of the triangle times diag(eta) ``[..., C, C]``, None
    for a decay without keys. A_end, F_end, m_end ``[..., 1, 1]``, D_end, G_end, E_end ``[..., C, 1]``: rows
    of the last token. F, G, scores, m and E are None without momentum.
    """

    keys: Tensor
    eta: Tensor
    A: Tensor
    F: Tensor | None
    D: Tensor
    G: Tensor | None
    scores: Tensor | None
    solve: Tensor | None
    A_end: Tensor
    F_end: Tensor | None
    m_end: Tensor | None
    D_end: Tensor
    G_end: Tensor | None
    E_end: Tensor | None


def make_transition(
    keys: Tensor, eta: Tensor, alpha: Tensor, mu: Tensor | None, valid: Tensor | None, dgd: bool
) -> Transition:
    """keys ``[..., C, i]`` of unit length; eta, alpha (kept), mu ``[..., C]``; valid bool ``[..., C]``.

    Tokens that are not valid are skipped: no gates are an identity step while there is momentum, so that
    their lines are left out.
    """
    if valid is not None:
        eta, alpha = torch.where(valid, eta, 0.0), torch.where(valid, alpha, 1.0)
        mu = None if mu is None else torch.where(valid, mu, 1.0)
    D = gate_products(alpha)
    A = D[..., :1] * alpha[..., :1, None]
    D_before, overlap = _delayed(D), torch.matmul(keys, keys.mT)
    solve = None
    if dgd:
        # The solver takes the diagonal for 1 and does not look above it.
        triangle = eta.unsqueeze(-1) * (D_before * overlap)
        solve = torch.linalg.solve_triangular(
            triangle, torch.diag_embed(eta), upper=False, unitriangular=True
        )
    plain = Transition(
        keys, eta.unsqueeze(-1), _delayed(A, first=1.0), None, D_before, None, None, solve,
        A[..., -1:, :], None, None, D[..., -1, :, None], None, None,
    )  # fmt: skip
    if mu is None:
        return plain
    M = gate_products(mu)
    E, m = M * eta.unsqueeze(-2), M[..., :1] * mu[..., :1, None]
    into = (E, m) if valid is None else (E * valid.unsqueeze(-1), m * valid.unsqueeze(-1))
    G, F_all = torch.matmul(D, into[0]), torch.matmul(D, into[1])
    G_before = _delayed(G)
    return plain._replace(
        F=_delayed(F_all),
        G=G_before,
        scores=G_before * overlap,
        F_end=F_all[..., -1:, :],
        m_end=m[..., -1:, :],
        G_end=G[..., -1, :, None],
        E_end=E[..., -1, :, None],
    )


def _delayed(rows: Tensor, first: float = 0.0) -> Tensor:
    """Rows ``[..., C, n]`` one token later."""
    return F.pad(rows[..., :-1, :], (0, 0, 1, 0), value=first)


def corrections(
    t: Transition,
    start: Tensor | None,
    momentum: Tensor | None,
    errors: Tensor,
    kept: Tensor | None = None,
) -> Tensor | None:
    """The rows u, or with momentum a, ``[..., C, o]`` from K W0, K S0 and e, each ``[..., C, o]``. Without
    keys in the decay K W0 may be None, and a is None. kept: what keys find that does not fade, such as
    K W_initial where W0 is what deviates from it."""
    if t.scores is None:
        if t.solve is None or start is None:
            return -t.eta * errors
        right = t.A * start + errors
        return -torch.matmul(t.solve, right if kept is None else right + kept)
    if t.solve is None or start is None:
        return None
    right = t.A * start - torch.matmul(t.scores, errors)
    right = right if kept is None else right + kept
    if t.F is not None and momentum is not None:
        right = right + t.F * momentum
    return -torch.matmul(t.solve, right)


def added(t: Transition, a: Tensor | None, errors: Tensor) -> Tensor:
    """What the chunk's tokens add to the weights at its end, ``[..., i, o]``."""
    rows = None if a is None else t.D_end * a
    if t.G_end is not None:
        written = -t.G_end * errors
        rows = written if rows is None else rows + written
    assert rows is not None
    return torch.matmul(t.keys.mT, rows)


def advance(
    t: Transition,
    weights: Tensor,
    momentum: Tensor | None,
    errors: Tensor,
    target: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weights, momentum ``[..., i, o]`` at the chunk's end, and the corrections, from those at its start.
    target: what weights decay to, None for zero."""
    fading = weights if target is None else weights - target
    on_weights = on_momentum = kept = None
    if t.solve is not None:
        on_weights = torch.matmul(t.keys, fading)
        on_momentum = None if momentum is None else torch.matmul(t.keys, momentum)
        kept = None if target is None else torch.matmul(t.keys, target)
    a = corrections(t, on_weights, on_momentum, errors, kept)
    after = t.A_end * fading + added(t, a, errors)
    after = after if target is None else after + target
    if momentum is not None and t.F_end is not None and t.m_end is not None and t.E_end is not None:
        after = after + t.F_end * momentum
        momentum = t.m_end * momentum - torch.matmul(t.keys.mT, t.E_end * errors)
    return after, momentum, a


def read_running(
    t: Transition,
    q: Tensor,
    weights: Tensor,
    momentum: Tensor | None,
    a: Tensor | None,
    errors: Tensor,
    target: Tensor | None = None,
) -> Tensor:
    """q_t W_{t-1} for rows q ``[..., C, i]``, from the weights at the chunk's start: ``[..., C, o]``. target:
    what weights decay to, None for zero."""
    y = t.A * torch.matmul(q, weights if target is None else weights - target)
    y = y if target is None else y + torch.matmul(q, target)
    if momentum is not None and t.F is not None:
        y = y + t.F * torch.matmul(q, momentum)
    overlap = torch.matmul(q, t.keys.mT)
    if t.G is not None:
        y = y - torch.matmul(overlap * t.G, errors)
    return y if a is None else y + torch.matmul(overlap * t.D, a)
