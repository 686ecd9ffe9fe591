"""Blocks of a continuum that are updated once in so many steps (arXiv 2512.24695, eq. 71, across steps)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nestor.errors import ConfigError, FileFormatError
from nestor.learning import continuum_blocks
from nestor.training.distributed import whole


class Pace:
    """Gradients of slower blocks wait until their steps are over; their optimiser then gets the mean.

    An optimiser leaves parameters without a gradient as they are, so that a waiting block neither moves nor
    decays, and its moments count its own updates.

    Args:
        steps: for each block, from the fastest to the slowest, steps from update to update; empty: 1 for all.

    Raises:
        ConfigError: a model without such blocks, or not one number for each.
    """

    def __init__(self, model: nn.Module, steps: Sequence[int]) -> None:
        blocks = continuum_blocks(model) if steps else []
        if len(blocks) != len(steps):
            raise ConfigError(
                f"optimizer.block_steps is {list(steps)}, and the model has a continuum of {len(blocks)} "
                f"blocks; give a number of steps for each, or leave it out"
            )
        parameters = dict(model.named_parameters())
        self.steps = {
            name: count for names, count in zip(blocks, steps, strict=True) for name in names if count > 1
        }
        self.parameters = {name: parameters[name] for name in self.steps}
        self.waiting: dict[str, Tensor] = {}

    @torch.no_grad()
    def hold(self, step: int) -> None:
        """Take the gradients of blocks that are not due after this step, counted from 1."""
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            count = self.steps[name]
            total = parameter.grad + self.waiting.pop(name) if name in self.waiting else parameter.grad
            if step % count:
                self.waiting[name], parameter.grad = total, None
            else:
                parameter.grad = total / count

    def state_dict(self) -> dict[str, Tensor]:
        """What waits, by parameter, whole and on the CPU. Every process calls it and gets the same."""
        return {name: whole(gradient).cpu() for name, gradient in self.waiting.items()}

    def load_state_dict(self, waiting: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` gave.

        Raises:
            FileFormatError: something waits of a parameter that is not slow.
        """
        stray = sorted(set(waiting) - set(self.parameters))
        if stray:
            raise FileFormatError(
                f"the checkpoint has a gradient of {stray[0]!r} that waits, which optimizer.block_steps of "
                f"this run does not know; go on with the settings that it was made with"
            )
        self.waiting = {name: _like(self.parameters[name], tensor) for name, tensor in waiting.items()}


def _like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """On the parameter's device and, if that is sharded, in its shards."""
    if not hasattr(parameter, "full_tensor"):
        return tensor.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
