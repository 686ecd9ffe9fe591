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
