"""Cross-entropy of the outputs of a linear layer, which need not all be in memory at once.

On a GPU Liger's kernel (package `liger-kernel`, extra `gpu`) computes logits a few rows at a time, and their
gradient with them; elsewhere PyTorch computes all logits.
"""

import functools
import importlib.util

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
#: Whether Liger's kernel is used where it can be, and from which vocabulary on: benchmarks/cross_entropy.py.
PREFER_LIGER = True
LEAST_VOCABULARY = 8192

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def choose_backend(device: torch.device, dtype: torch.dtype, vocabulary: int) -> tuple[str, str]:
    """The backend of `linear_cross_entropy` for inputs of this kind, "liger" or "torch", and why."""
    if device.type != "cuda":
        return "torch", f"Liger's kernel runs on a GPU, not on {device.type}"
    if not has_liger():
        return "torch", "Liger is not installed; pip install 'nestor[gpu]'"
    if dtype not in DTYPES:
        return "torch", f"Liger's kernel does not compute in {dtype}"
    if torch.compiler.is_compiling():
        return "torch", "torch.compile can trace PyTorch's form"
    if not PREFER_LIGER:
        return "torch", "Liger's kernel is switched off (PREFER_LIGER)"
    if vocabulary < LEAST_VOCABULARY:
        return "torch", f"a vocabulary of {vocabulary} is less than {LEAST_VOCABULARY}"
    return "liger", "Liger's kernel never holds all logits"


@functools.cache
def has_liger() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec("liger_kernel") is not None


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, backend: str | None = None) -> Tensor:
    """Sum over rows of the cross-entropy in nats of the logits `x W^T` on `targets`; float32 at least.

    x: `[N, d]`; weight: `[V, d]`; targets: int64 `[N]`, rows of -100 do not count. Under autocast the logits
    are of its dtype. backend: that of `choose_backend` unless named. Gradients flow to x and weight.
    """
    if backend is None:
        backend, _ = choose_backend(x.device, x.dtype, weight.shape[0])
    if backend == "liger":
        return _liger(x, weight, targets)
    logits = F.linear(x, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def _liger(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    if torch.is_autocast_enabled(x.device.type):
        # Once, not for every few rows.
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    # In order: bias, class weights, ignored target, z-loss, label smoothing, reduction, soft cap, return of
    # the z-loss, dtype in which the gradient of the weight is summed.
    return LigerFusedLinearCrossEntropyFunction.apply(
        x, weight, targets, None, None, IGNORED, 0.0, 0.0, "sum", None, False, torch.float32
    )[0]
