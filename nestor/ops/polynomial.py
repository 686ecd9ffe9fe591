"""Polynomial features of degree 2, with which a linear memory holds more pairs than its width.

ATLAS, arXiv 2505.23735; spec/neural-memory.md section 5.3.
"""

import math

import torch
from torch import Tensor

from nestor.errors import ShapeError


def polynomial_features(x: Tensor, coefficients: Tensor | None = None, *, root: bool = True) -> Tensor:
    """phi(x) with ``phi(q) . phi(k) = a_0 + a_1 q.k + a_2 (q.k)^2``.

    ``phi(x) = [sqrt(a_0), sqrt(a_1) x_i, sqrt(a_2) w_ij x_i x_j for i <= j]``, w = 1 on the diagonal and
    sqrt(2) off it. For unit x its square norm is a_0 + a_1 + a_2, 2.5 at the usual initial values
    a_i = 1/i!; write steps should be divided by it.

    x: ``[..., H, p]``. coefficients: a, ``[3]`` or one row a head ``[H, 3]``; None: 1.
    root: multiply by sqrt(a), on both sides of the product. Coefficients that are learned may become
    negative, and the square root has no derivative at 0: for those multiply by a itself (root=False) on one
    side, and pass None on the other.
    Returns ``[..., H, (p + 1)(p + 2) / 2]``.
    """
    width = x.shape[-1]
    if coefficients is not None and (coefficients.shape[-1] != 3 or coefficients.dim() > 2):
        raise ShapeError(
            f"coefficients have shape {tuple(coefficients.shape)}; they must be [3] or [heads, 3]."
        )
    row, column = torch.triu_indices(width, width, device=x.device)
    off = x.new_ones(len(row)).masked_fill(row != column, math.sqrt(2.0))
    parts = [torch.ones_like(x[..., :1]), x, x[..., row] * x[..., column] * off]
    if coefficients is None:
        return torch.cat(parts, -1)
    a = coefficients.to(x.dtype)
    a = a.sqrt() if root else a
    return torch.cat([part * a[..., i : i + 1] for i, part in enumerate(parts)], -1)
