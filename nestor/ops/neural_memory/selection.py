"""Which backend computes a memory: the fastest one that covers its choices."""

import functools
import importlib.util
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from nestor.ops.neural_memory.arrangement import beyond_fast_forms
from nestor.ops.neural_memory.native import unsupported
from nestor.ops.neural_memory.spec import MemorySpec

BACKENDS = ("kernels", "native", "chunked", "general", "reference")


def choose_backend(
    spec: MemorySpec,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    initial: Sequence[Tensor] | None = None,
) -> tuple[str, str]:
    """The backend that `neural_memory` uses for these choices on this device, and why.

    dtype: of q, k, v. initial: the initial weights, whose sizes decide whether the GPU kernels cover them;
    None: the choices alone decide.
    """
    beyond = beyond_fast_forms(spec)
    if beyond is not None:
        return "general", beyond
    if device.type == "cuda":
        obstacle = kernel_obstacle(spec, device, dtype, initial)
        if obstacle is None:
            return "kernels", "the Triton kernels cover these choices on a GPU"
        return "chunked", obstacle
    if torch.compiler.is_compiling():
        return "chunked", "torch.compile can trace the chunked PyTorch form"
    obstacle = unsupported(spec, device, dtype)
    if obstacle is not None:
        return "chunked", obstacle
    return "native", "the C++ form covers these choices on a cpu"


def kernel_obstacle(
    spec: MemorySpec, device: torch.device, dtype: torch.dtype, initial: Sequence[Tensor] | None = None
) -> str | None:
    """Why the Triton kernels cannot compute these choices on this device; None: they can."""
    if device.type != "cuda":
        return f"the Triton kernels run on a GPU, not on {device.type}"
    if not _has_triton():
        return "Triton is not installed; pip install 'nestor[gpu]'"
    from nestor.ops.neural_memory.kernels import obstacle

    return obstacle(spec, initial, dtype)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def notice_fallback(reason: str) -> None:
    """Warn, once for each reason, that a GPU computes a memory without its kernels."""
    warnings.warn(
        f"a neural memory runs on the GPU in its PyTorch form, many times slower than its kernels: {reason}. "
        "`nestor doctor` shows which form is used and why.",
        stacklevel=3,
    )
