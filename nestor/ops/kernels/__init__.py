"""Small fused operations on a GPU, in Triton: the other files here are imported where it is installed."""

import importlib.util

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float32)
HAS_TRITON = importlib.util.find_spec("triton") is not None


def covered(*tensors: Tensor | None) -> bool:
    """Whether kernels can take these tensors: some elements, on a GPU, in a dtype that they know."""
    present = [x for x in tensors if x is not None]
    return HAS_TRITON and all(x.is_cuda and x.dtype in DTYPES and x.numel() > 0 for x in present)


def most_warps(x: Tensor) -> int:
    """Warps at most of a Triton program that multiplies rows of x.

    On rows of 64 bytes Triton 3.6's products of warp groups fail (an illegal memory access); programs of two
    warps have no warp group.
    """
    return 2 if x.shape[-1] * x.element_size() == 64 else 8
