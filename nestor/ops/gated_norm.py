"""What leaves the heads of a memory: RMS norm of each head, times the output gate."""

import torch
from torch import Tensor
from torch.nn import functional as F

from nestor.ops.kernels import covered

WIDEST = 256


def gated_norm(y: Tensor, weight: Tensor, g: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """``y / sqrt(mean(y^2) + eps) * weight * sigmoid(g)``, the mean over each head; ``[B, T, H p]``.

    y: ``[B, T, H, p]``, in any order in memory; weight: ``[p]``; g: ``[B, T, H p]``, what the gate's sigmoid
    is taken of (None: no gate).

    On a GPU with Triton one kernel does it in float32, from bfloat16 or float32, and the result has the dtype
    of g: under autocast that of the matrix product which follows.
    """
    if y.shape[-1] <= WIDEST and covered(y, weight, g) and (g is None or g.shape == y.flatten(-2).shape):
        from nestor.ops.kernels import gated_norm as kernels

        y = y if y.stride(-1) == 1 else y.contiguous()
        g = g if g is None or g.stride(-1) == 1 else g.contiguous()
        return kernels.gated_norm(y, weight.contiguous(), g, eps)
    # The norm passes over y several times, which is slow where heads lie outside of tokens.
    out = F.rms_norm(y.contiguous(), (y.shape[-1],), weight.to(y.dtype), eps).flatten(-2)
    return out if g is None else out * torch.sigmoid(g)
