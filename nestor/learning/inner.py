"""Optimisers of levels, as functions of tensors: from a gradient to what is added to the weights.

What an optimiser keeps from update to update, its slots, is part of the level's state and lasts like the
weights. None scales a first step down: means are corrected for how few updates they hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nestor.learning.levels import Level

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


#: Each with the names of its slots, which begin as zeros.
OPTIMIZERS: dict[str, tuple[Step, tuple[str, ...]]] = {
    "sgd": (sgd, ()),
    "momentum": (momentum, ("momentum",)),
    "adam": (adam, ("momentum", "second_momentum")),
}
