"""Floating point operations of a training step, and the rate of devices, for model FLOPs utilisation."""

from __future__ import annotations

from typing import Any

from torch import nn

from nestor.layers.attention import Attention
from nestor.layers.neural_memory import NeuralMemory

# Dense bfloat16 matrix rates without sparsity, in operations a second.
PEAKS = {"H100 PCIe": 756.5e12, "H100": 989.4e12, "H200": 989.4e12, "A100": 311.9e12}


def peak_of(device: str) -> float | None:
    """The matrix rate of a device by its name; None: not known here."""
    return next((rate for name, rate in PEAKS.items() if name in device), None)


def training_flops(model: Any, tokens: int) -> float:
    """Operations a token of a training step (forward and backward) on sequences of `tokens` tokens.

    A multiplication and an addition are two operations. Elementwise work, norms, convolutions, the lookup of
    embeddings and the recomputation of activations are not counted. The backward counts as twice the forward:

        3 * (2 N + sum over attention layers of 4 v d + sum over memories of H F)

    N: entries of all weights of linear maps, the output head among them. v: tokens that a query sees in the
    mean, `(T + 1) / 2` for full causal attention, and `w - w (w - 1) / (2 T)` within a window `w <= T`, plus
    persistent tokens; d: width of all heads. F: one token of one head of a memory with matrices of n entries
    together, n_1 of them in the first, in the chunked form that every backend computes:

        F = 2 n (keys) + 2 n (queries) + 2 (n - n_1) (back through all but the first layer)
          + 2 n (the chunk's step; 4 n with momentum)
          + C * (sum over layers of in + out) (writes of the chunk, seen by its reads)

    With `inclusive` reads a query sees `C / 2` writes of its chunk in the mean, each for `2 (in + out)`
    operations a layer, hence `C (in + out)`; reads at the chunk's start see none.
    """
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    forward = 2.0 * linear
    for module in model.modules():
        if isinstance(module, Attention):
            forward += 4.0 * visible(module, tokens) * module.heads * module.head_dim
        elif isinstance(module, NeuralMemory):
            forward += module.heads * memory_flops(module)
    return 3.0 * forward


def visible(attention: Attention, tokens: int) -> float:
    """Tokens that a query sees in the mean; see `training_flops`."""
    window = min(tokens, attention.window or tokens)
    persistent = 0 if attention.prefix_key is None else len(attention.prefix_key)
    return window - window * (window - 1) / (2 * tokens) + persistent


def memory_flops(memory: NeuralMemory) -> float:
    """F of `training_flops`."""
    sizes = [weight[0].numel() for weight in memory.initial]
    entries, widths = sum(sizes), sum(sum(weight.shape[1:]) for weight in memory.initial)
    step = 4 if memory.momentum else 2
    seen = 0 if memory.spec.read_mode == "chunk_start" else memory.spec.chunk_size * widths
    return 2.0 * entries + 2.0 * entries + 2.0 * (entries - sizes[0]) + step * entries + seen
