"""Optimisers of levels, as functions of tensors: from gradients to what is added to the weights.

What an optimiser keeps from update to update, its slots, is part of the level's state and lasts like the
weights. None scales a first step down: means are corrected for how few updates they hold. A level's tensors
come as lists, for a level has many and PyTorch's functions of lists take one launch for all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nestor.ops.multi_scale_muon import M3_SLOTS, m3_step, match_rms

if TYPE_CHECKING:
    from nestor.learning.levels import Level

#: By slot, a tensor for each gradient.
Slots = dict[str, list[Tensor]]
Step = Callable[["Level", list[Tensor], Slots, int], tuple[list[Tensor], Slots]]
EPSILON = 1e-8


def sgd(level: Level, g: list[Tensor], slots: Slots, updates: int) -> tuple[list[Tensor], Slots]:
    """`-lr g`"""
    return list(torch._foreach_mul(g, -level.learning_rate)), {}


def momentum(level: Level, g: list[Tensor], slots: Slots, updates: int) -> tuple[list[Tensor], Slots]:
    """`-lr m`, `m = mu m + g`"""
    m = list(torch._foreach_add(torch._foreach_mul(slots["momentum"], level.momentum), g))
    return list(torch._foreach_mul(m, -level.learning_rate)), {"momentum": m}


def adam(level: Level, g: list[Tensor], slots: Slots, updates: int) -> tuple[list[Tensor], Slots]:
    """Kingma and Ba, arXiv 1412.6980. updates: how many were made before this one."""
    m = list(torch._foreach_lerp(g, slots["momentum"], level.momentum))
    squares = torch._foreach_mul(g, g)
    v = list(torch._foreach_lerp(squares, slots["second_momentum"], level.second_momentum))
    spread = torch._foreach_sqrt(torch._foreach_div(v, 1 - level.second_momentum ** (updates + 1)))
    directions = torch._foreach_div(m, torch._foreach_add(spread, EPSILON))
    rate = -level.learning_rate / (1 - level.momentum ** (updates + 1))
    return list(torch._foreach_mul(directions, rate)), {"momentum": m, "second_momentum": v}


def m3(level: Level, g: list[Tensor], slots: Slots, updates: int) -> tuple[list[Tensor], Slots]:
    """Multi-scale momentum Muon, for matrices (arXiv 2512.24695, algorithm 1; `nestor.ops.multi_scale_muon`).

    Steps are updates of the level. They have a root mean square of 0.2 times the learning rate, about that
    of Adam's. `momentum` is that of both momenta.
    """
    changes: list[Tensor] = []
    after: Slots = {slot: [] for slot in M3_SLOTS}
    for index, gradient in enumerate(g):
        update, found = m3_step(
            gradient,
            {slot: kept[index] for slot, kept in slots.items()},
            updates + 1,
            betas=(level.momentum, level.second_momentum, level.momentum),
            slow_period=level.slow_period,
            slow_weight=level.slow_weight,
            eps=EPSILON,
        )
        changes.append(-level.learning_rate * match_rms(update))
        for slot, tensor in found.items():
            after[slot].append(tensor)
    return changes, after


#: Each with the names of its slots, which begin as zeros.
OPTIMIZERS: dict[str, tuple[Step, tuple[str, ...]]] = {
    "sgd": (sgd, ()),
    "momentum": (momentum, ("momentum",)),
    "adam": (adam, ("momentum", "second_momentum")),
    "m3": (m3, M3_SLOTS),
}
