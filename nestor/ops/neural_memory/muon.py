"""Orthogonalised steps (Muon) and weights of constant norm (spec/neural-memory.md sections 5.2 and 7.1)."""

from collections.abc import Sequence

import torch
from torch import Tensor

Polynomial = tuple[float, float, float]

#: a, b, c of the step of Muon, the largest slope at 0 that a quintic has without blowing up.
QUINTIC: Polynomial = (3.4445, -4.7750, 2.0315)
#: The classical step: one of gradient descent on being near to X and orthogonal (arXiv 2512.24695, eq. 43).
CUBIC: Polynomial = (1.5, -0.5, 0.0)

# a, b, c of each of the five steps.
NEWTON_SCHULZ: dict[str, tuple[Polynomial, ...]] = {
    "constant": (QUINTIC,) * 5,
    "scheduled": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
}


def newton_schulz(x: Tensor, schedule: str | Sequence[Polynomial] = "constant") -> Tensor:
    """About U V^T for x = U S V^T ``[..., m, n]``; a matrix of zeros stays one.

    ``X /= ||X||_F + 1e-7``, then five times ``X = a X + (b X X^T + c (X X^T)^2) X``, with constant
    coefficients or LaCT's schedule. schedule: one of `NEWTON_SCHULZ`, or a, b, c of each step.
    """
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in NEWTON_SCHULZ[schedule] if isinstance(schedule, str) else schedule:
        square = x @ x.mT
        x = a * x + (b * square + c * (square @ square)) @ x
    return x.mT if tall else x


def restore_norms(weights: Tensor, initial: Tensor) -> Tensor:
    """weights ``[..., in, out]`` with every output unit's column at the norm that it has in `initial`.

    LaCT's ``W <- W / (||row|| + 1e-5) ||row_0||``, whose matrices are out x in.
    """
    norms, wanted = (torch.linalg.vector_norm(w, dim=-2, keepdim=True) for w in (weights, initial))
    return weights / (norms + 1e-5) * wanted
