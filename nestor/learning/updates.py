"""A level's step, and its way back to nothing. Nothing here waits for a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nestor.learning.inner import OPTIMIZERS, Slots
from nestor.learning.levels import Level
from nestor.learning.stream import Stream, Tensors


class LevelStep(NamedTuple):
    """A level's step: `changes`, each times `factor` (None: 1), are added to its weights.

    slots: what the optimiser keeps. moved: norm of what is added.
    """

    changes: list[Tensor]
    factor: Tensor | None
    slots: Slots
    moved: Tensor


def level_step(
    level: Level,
    gradients: Sequence[Tensor],
    count: float,
    slots: Slots,
    updates: int,
    whole: Tensor | float,
    scale: Tensor | None = None,
) -> LevelStep:
    """The step of a level, which can be differentiated; what is given stays as it is.

    Args:
        gradients: summed over so many tokens. updates: how many were made before.
        whole: norm of the model's own weights in the level. scale: of its learning rate; None: 1.
    """
    step, _ = OPTIMIZERS[level.optimizer]
    given = list(gradients)
    if level.reduce == "mean":
        given = list(torch._foreach_div(given, count))
    changes, after = step(level, given, slots, updates)
    # PyTorch's norm of many tensors has no gradient.
    moved = torch.stack(torch._foreach_norm(changes)).norm()
    if scale is not None:
        moved = scale * moved
    factor = scale
    if level.largest_update is not None:
        # So that it is 1, and has a gradient, where nothing moved.
        most = level.largest_update * whole
        limit = most / moved.clamp(min=most)
        factor = limit if scale is None else scale * limit
        moved = moved * limit
    return LevelStep(changes, factor, after, moved)


def update(level: Level, stream: Stream, whole: float) -> None:
    """A level's step, after which its gradients are zero; none where no token counted.

    Args:
        stream: which owns the tensors of the level. whole: norm of the model's own weights in the level.

    Raises:
        NonFiniteError: the step is infinite or no number; on a GPU when the stream's checks are looked at.
    """
    kept, count = stream.levels[level.name], stream.counts[level.name]
    if count == 0:
        return
    gradients = tensors_of(level, kept, "gradient")
    slots = {slot: tensors_of(level, kept, slot) for slot in OPTIMIZERS[level.optimizer][1]}
    changes, factor, after, moved = level_step(
        level, gradients, count, slots, stream.updates[level.name], whole
    )
    for slot, tensors in after.items():
        kept |= {f"{slot}/{name}": x for name, x in zip(level.parameters, tensors, strict=True)}
    stream.checks.add(
        moved,
        f"the norm of the update of level {level.name!r} at token {stream.clock} of the stream",
        f"with a lower learning rate than {level.learning_rate}",
    )
    if factor is not None:
        torch._foreach_mul_(changes, factor)
    torch._foreach_add_(tensors_of(level, kept, "delta"), changes)
    torch._foreach_zero_(gradients)
    kept["moved"] = moved.double()
    stream.counts[level.name] = 0.0
    stream.updates[level.name] += 1
    if isinstance(level.reset, int) and stream.updates[level.name] % level.reset == 0:
        reset(level, kept)


def reset(level: Level, kept: Tensors) -> None:
    """What a level has learned, and its optimiser's state, back to nothing; waiting gradients stay."""
    for part in ("delta", *OPTIMIZERS[level.optimizer][1]):
        torch._foreach_zero_(tensors_of(level, kept, part))


def tensors_of(level: Level, kept: Tensors, part: str) -> list[Tensor]:
    """A part of what a level keeps, of each of its parameters."""
    return [kept[f"{part}/{name}"] for name in level.parameters]
