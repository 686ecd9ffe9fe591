"""Optimisers of levels, as functions of tensors: from a gradient to what is added to the weights.

What an optimiser keeps from update to update, its slots, is part of the level's state and lasts like the
weights. None scales a first step down: means are corrected for how few updates they hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nestor.ops.multi_scale_muon import M3_SLOTS, m3_step, match_rms

if TYPE_CHECKING:
    from nestor.learning.levels import Level

Tensors = dict[str, Tensor]
Slots = dict[str, Tensor]
Step = Callable[["Level", Tensor, Slots, int], tuple[Tensor, Slots]]
EPSILON = 1e-8


def sgd(level: Level, g: Tensor, slots: Slots, updates: int) -> tuple[Tensor, Slots]:
    """`-lr g`"""
    return -level.learning_rate * g, {}


def momentum(level: Level, g: Tensor, slots: Slots, updates: int) -> tuple[Tensor, Slots]:
    """`-lr m`, `m = mu m + g`"""
    m = level.momentum * slots["momentum"] + g
    return -level.learning_rate * m, {"momentum": m}


def adam(level: Level, g: Tensor, slots: Slots, updates: int) -> tuple[Tensor, Slots]:
    """Kingma and Ba, arXiv 1412.6980. updates: how many were made before this one."""
    m = torch.lerp(g, slots["momentum"], level.momentum)
    v = torch.lerp(g * g, slots["second_momentum"], level.second_momentum)
    mean = m / (1 - level.momentum ** (updates + 1))
    spread = (v / (1 - level.second_momentum ** (updates + 1))).sqrt()
    return -level.learning_rate * mean / (spread + EPSILON), {"momentum": m, "second_momentum": v}


def m3(level: Level, g: Tensor, slots: Slots, updates: int) -> tuple[Tensor, Slots]:
    """Multi-scale momentum Muon, for matrices (arXiv 2512.24695, algorithm 1; `nestor.ops.multi_scale_muon`).

    Steps are updates of the level. They have a root mean square of 0.2 times the learning rate, about that
    of Adam's. `momentum` is that of both momenta.
    """
    update, after = m3_step(
        g,
        slots,
        updates + 1,
        betas=(level.momentum, level.second_momentum, level.momentum),
        slow_period=level.slow_period,
        slow_weight=level.slow_weight,
        eps=EPSILON,
    )
    return -level.learning_rate * match_rms(update), after


#: Each with the names of its slots, which begin as zeros.
OPTIMIZERS: dict[str, tuple[Step, tuple[str, ...]]] = {
    "sgd": (sgd, ()),
    "momentum": (momentum, ("momentum",)),
    "adam": (adam, ("momentum", "second_momentum")),
    "m3": (m3, M3_SLOTS),
}


def changes_of(
    level: Level, gradients: Mapping[str, Tensor], slots: Mapping[str, Slots], count: float, updates: int
) -> tuple[Tensors, dict[str, Slots]]:
    """By parameter, the step of an update before `bounded`, and the slots after it.

    Args:
        gradients: summed over the tokens since the last update. slots: by parameter.
        count: how many tokens these were. updates: how many were made before this one.
    """
    step, _ = OPTIMIZERS[level.optimizer]
    changes: Tensors = {}
    after: dict[str, Slots] = {}
    for name, g in gradients.items():
        reduced = g / count if level.reduce == "mean" else g
        changes[name], after[name] = step(level, reduced, slots[name], updates)
    return changes, after


def bounded(level: Level, changes: Iterable[Tensor], whole: float | Tensor) -> tuple[Tensor, Tensor]:
    """Norm of an update, and the factor that keeps it within the level's `largest_update`.

    whole: norm of the weights.
    """
    norms = [torch.linalg.vector_norm(change) for change in changes]
    moved = torch.stack([norm.to(norms[0].device) for norm in norms]).norm()
    if level.largest_update is None or math.isinf(level.largest_update):
        return moved, torch.ones_like(moved)
    most = torch.as_tensor(level.largest_update * whole, dtype=moved.dtype, device=moved.device)
    return moved, most / torch.maximum(moved, most)
