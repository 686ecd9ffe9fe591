"""M3, multi-scale momentum Muon: one step of a matrix (arXiv 2512.24695, algorithm 1).

Two momenta are orthogonalised: a fast one of every gradient, and a slow one that takes in the gradients of a
block of steps when the block is over, so that its direction is a block late. Element-wise second moments
divide their sum. Spec nested-learning b.6 says where the printed algorithm is repaired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nestor.ops.neural_memory.muon import newton_schulz

#: What M3 keeps of a matrix, each of its shape and zeros at first: M1, M2, V, B and O2 of the algorithm.
M3_SLOTS = ("momentum", "slow_momentum", "second_momentum", "slow_gradient", "slow_direction")
ACCUMULATE = ("decay", "paper")
V_SOURCES = ("gradient", "orthogonal", "none")


def m3_step(
    g: Tensor,
    slots: Mapping[str, Tensor],
    step: int,
    *,
    betas: tuple[float, float, float],
    slow_period: float,
    slow_weight: float,
    eps: float = 1e-8,
    accumulate: str = "decay",
    v_source: str = "gradient",
    orthogonalize: Callable[[Tensor], Tensor] = newton_schulz,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What is to be subtracted from a matrix, but for the learning rate, and the slots after.

    At the first step of each block of f but the first block, ``M2 = b3 M2 + B``, ``O2 = NS(M2)``, ``B = 0``.
    Then ``B += g``, ``M1 = b1 M1 + g``, ``V = b2 V + (1 - b2) s^2``, and the result is
    ``(NS(M1) + a O2) / (sqrt(V / (1 - b2^step)) + eps)``.

    Args:
        g: the gradient `[m, n]`. slots: those of `M3_SLOTS`. step: number of this step, from 1.
        betas: b1, b2, b3. slow_period: f, steps of a block; infinity: the slow branch stays at zero.
        slow_weight: a.
        accumulate: "paper" keeps to the print: ``M1 += b1 g``, ``M2 += b3 B``, ``V += b2 s^2``, nothing
            decays or is corrected. Then b1 and b3 have no effect, for NS does not see a scale, and steps
            shrink as 1 / sqrt(step).
        v_source: s is the gradient, or "orthogonal": NS(M1), with which the step does not depend on the
            gradient's scale either. "none": no division.
        orthogonalize: NS; zero for zero.
    """
    beta1, beta2, beta3 = betas
    printed = accumulate == "paper"
    slow, pending, direction = (slots[name] for name in ("slow_momentum", "slow_gradient", "slow_direction"))
    if step > 1 and (step - 1) % slow_period == 0:
        slow = slow + beta3 * pending if printed else beta3 * slow + pending
        direction = orthogonalize(slow)
        pending = torch.zeros_like(pending)
    pending = pending + g
    fast = slots["momentum"] + beta1 * g if printed else beta1 * slots["momentum"] + g
    fast_direction = orthogonalize(fast)
    update = fast_direction + slow_weight * direction
    second = slots["second_momentum"]
    if v_source != "none":
        seen = g if v_source == "gradient" else fast_direction
        second = second + beta2 * seen * seen if printed else beta2 * second + (1 - beta2) * seen * seen
        spread = second if printed else second / (1 - beta2**step)
        update = update / (spread.sqrt() + eps)
    return update, dict(zip(M3_SLOTS, (fast, slow, second, pending, direction), strict=True))


def match_rms(update: Tensor, size: float = 0.2) -> Tensor:
    """An update scaled to a root mean square of `size`; zeros stay zeros.

    0.2 is about that of AdamW's (Liu et al., arXiv 2502.16982), so that a learning rate serves both. Scaled
    so, a step does not depend on the size of gradients, whatever the second moments are of.
    """
    norm = torch.linalg.vector_norm(update).clamp(min=torch.finfo(update.dtype).tiny)
    # In this order, or zeros would be multiplied by infinity.
    return update / norm * (size * math.sqrt(update.numel()))
