"""A level's step, and its way back to nothing. Nothing here waits for a GPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from nestor.learning.inner import OPTIMIZERS
from nestor.learning.levels import Level
from nestor.learning.stream import Stream, Tensors


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
    step, slots = OPTIMIZERS[level.optimizer]
    gradients = tensors_of(level, kept, "gradient")
    if level.reduce == "mean":
        # In place, for they are zeros in the end.
        torch._foreach_div_(gradients, count)
    given = {slot: tensors_of(level, kept, slot) for slot in slots}
    changes, after = step(level, gradients, given, stream.updates[level.name])
    for slot, tensors in after.items():
        kept |= {f"{slot}/{name}": x for name, x in zip(level.parameters, tensors, strict=True)}
    moved = get_total_norm(changes)
    stream.checks.add(
        moved,
        f"the norm of the update of level {level.name!r} at token {stream.clock} of the stream",
        f"with a lower learning rate than {level.learning_rate}",
    )
    if level.largest_update is not None:
        # Where nothing moved, infinite, and so 1.
        scale = (level.largest_update * whole / moved).clamp(max=1.0)
        torch._foreach_mul_(changes, scale)
        moved = moved * scale
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
