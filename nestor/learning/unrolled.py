"""The loss of a stream that is learned from, as a function of where the levels begin (arXiv 2512.24695, d.3).

A `Learner` reads and learns; its updates are final. Here they stay in the graph, so that outer training can
learn initial weights, and learning rates, from which a stream is learned well: gradients of later losses go
back through the updates that came before them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nestor.errors import ConfigError, ShapeError
from nestor.learning.inner import OPTIMIZERS, Slots
from nestor.learning.levels import Level, check_levels
from nestor.learning.readers import reader_of

Tensors = dict[str, Tensor]


def unrolled_loss(
    model: nn.Module,
    levels: Sequence[Level],
    input_ids: Tensor,
    *,
    initial: Mapping[str, Tensor] | None = None,
    scales: Mapping[str, Tensor] | None = None,
    reach: int | None = None,
    score: Tensor | None = None,
) -> Tensor:
    """Mean next-token loss of one stream that learns as a `Learner` would, to be differentiated.

    Inner gradients are those of a Learner: they do not cross from a chunk into caches of the one before. The
    outer gradient goes through caches, and through the updates as far as `reach`.

    Args:
        model: as for a Learner; its parameters may require gradients.
        levels: that learn; what they have learned begins at nothing.
        input_ids: int64 `[1, T]`, at least 2.
        initial: where parameters begin, by name; None: the model's own.
        scales: by level, a factor of all its updates (to learn its rate: the exponential of a parameter).
        reach: own updates that the outer gradient may cross, the newest first: 0 is first order, updates
            count as given; None is all. Short of all, it does not cross the state of an optimiser.
        score: float `[1, T]`, how much predicting each token counts in this loss, as for a later recall;
            None: 1. All tokens are learned from.

    Raises:
        ShapeError: not one stream of at least two tokens, or a score of another shape.
        ConfigError: levels that do not fit the model, or a reach below 0.
    """
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < 2:
        raise ShapeError(f"the tokens have shape {list(input_ids.shape)}; give [1, T] with at least two")
    if score is not None and score.shape != input_ids.shape:
        raise ShapeError(f"score has shape {list(score.shape)}, the tokens {list(input_ids.shape)}")
    if reach is not None and reach < 0:
        raise ConfigError(f"reach is {reach}; give a number of updates from 0 on, or None for all")
    begin = {**dict(model.named_parameters()), **dict(initial or {})}
    base = check_levels(levels, begin)
    reader = reader_of(model)
    learning = [_Unrolled(level, begin, reach) for level in levels if level.period is not None]
    counted = torch.ones(input_ids.shape) if score is None else score
    counted = counted[0, 1:].to(input_ids.device)
    state, clock, losses = reader.initial_state(1), 0, []
    for chunk, targets in zip(
        input_ids[:, :-1].split(base, dim=1), input_ids[0, 1:].split(base), strict=True
    ):
        # Nodes of their own, by which this chunk's part in the gradient is told from that of its caches.
        weights = {name: tensor.view_as(tensor) for name, tensor in begin.items()}
        for name in {name for level in learning for name in level.spec.parameters}:
            weights[name] = begin[name] + sum(one.delta(name) for one in learning if name in one.names)
        # Of PyTorch's attention only this form can be differentiated twice.
        with nullcontext() if reach == 0 else sdpa_kernel(SDPBackend.MATH):
            logits, state = reader(weights, chunk, state)
        wide = torch.promote_types(logits.dtype, torch.float32)
        chunk_losses = F.cross_entropy(logits[0].to(wide), targets, reduction="none")
        losses.append(chunk_losses)
        if len(targets) < base:
            break
        names = sorted({name for one in learning for name in one.names})
        with torch.enable_grad():
            found = torch.autograd.grad(
                chunk_losses.sum(),
                [weights[name] for name in names],
                create_graph=reach != 0,
                retain_graph=True,
            )
        gradients = dict(zip(names, found, strict=True))
        clock += base
        for one in learning:
            one.take(gradients, base)
        for one in learning:
            if one.spec.due(clock):
                one.update(None if scales is None else scales.get(one.spec.name))
    total = torch.cat(losses)
    return (total * counted.to(total)).sum() / counted.sum().to(total)


class _Unrolled:
    """What a level has become, in the graph."""

    def __init__(self, level: Level, begin: Mapping[str, Tensor], reach: int | None) -> None:
        self.spec, self.reach, self.names = level, reach, frozenset(level.parameters)
        self.zeros = {name: torch.zeros_like(begin[name]) for name in level.parameters}
        self.whole = torch.stack([begin[name].detach().norm() for name in level.parameters]).norm()
        self.gradients, self.count, self.updates = dict(self.zeros), 0, 0
        self.reset()

    def reset(self) -> None:
        slots = OPTIMIZERS[self.spec.optimizer][1]
        self.older, self.recent = dict(self.zeros), list[Tensors]()
        self.slots: Slots = {slot: list(self.zeros.values()) for slot in slots}

    def delta(self, name: str) -> Tensor:
        """What the level has added to a parameter."""
        return self.older[name] + sum(change[name] for change in self.recent)

    def take(self, gradients: Mapping[str, Tensor], tokens: int) -> None:
        """Add a chunk's gradients to those that wait."""
        self.gradients = {name: g + gradients[name] for name, g in self.gradients.items()}
        self.count += tokens

    def update(self, scale: Tensor | None) -> None:
        """The level's step."""
        step, _ = OPTIMIZERS[self.spec.optimizer]
        gradients = list(self.gradients.values())
        if self.spec.reduce == "mean":
            gradients = [g / self.count for g in gradients]
        found, after = step(self.spec, gradients, self.slots, self.updates)
        changes: Tensors = dict(zip(self.gradients, found, strict=True))
        short = self.reach is not None
        self.slots = {slot: [x.detach() if short else x for x in kept] for slot, kept in after.items()}
        if self.spec.largest_update is not None:
            moved = torch.stack([change.norm() for change in changes.values()]).norm()
            limit = (self.spec.largest_update * self.whole / moved).clamp(max=1)
            changes = {name: change * limit for name, change in changes.items()}
        if scale is not None:
            changes = {name: change * scale for name, change in changes.items()}
        self.recent.append(changes)
        if self.reach is not None and len(self.recent) > self.reach:
            oldest = self.recent.pop(0)
            self.older = {name: x + oldest[name].detach() for name, x in self.older.items()}
        self.updates += 1
        self.gradients, self.count = dict(self.zeros), 0
        if isinstance(self.spec.reset, int) and self.updates % self.spec.reset == 0:
            self.reset()
