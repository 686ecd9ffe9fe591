"""Elastic weights: what old text needs is pulled back after every update (EWC, Kirkpatrick et al. 2017).

EWC adds `(lambda / 2) sum_i F_i delta_i^2` to the loss, with the diagonal Fisher information F of old text.
Its step is taken here as a proximal one, after each update of a level, so that it is stable for any strength:

    delta <- argmin_x 1/2 |x - delta|^2 + (pull / 2) sum_i (F_i / mean F) x_i^2
           = delta / (1 + pull F / mean F)

`pull` is learning rate times lambda times the mean of F over the level's weights: a weight of average
importance loses about this share of what it has learned at each update.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestor.errors import ConfigError
from nestor.learning.levels import Level
from nestor.models.state import State


def fisher_information(model: nn.Module, names: Iterable[str], texts: Iterable[Tensor]) -> dict[str, Tensor]:
    """Diagonal of the empirical Fisher information of some parameters: the mean over texts of the squared
    gradient of the text's log-probability.

    Args:
        model: a causal language model that takes ids and gives `logits`. texts: int64 `[1, T]`, T at least 2.

    Raises:
        ConfigError: there is no text.
    """
    found = dict(model.named_parameters())
    chosen = {name: found[name] for name in names}
    sums = {
        name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        for name, p in chosen.items()
    }
    before = {name: p.requires_grad for name, p in chosen.items()}
    count = 0
    try:
        for p in chosen.values():
            p.requires_grad_(True)
        with torch.inference_mode(False), torch.enable_grad():
            for ids in texts:
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
                wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
                loss = F.cross_entropy(wide, ids[0, 1:], reduction="sum")
                gradients = torch.autograd.grad(loss, list(chosen.values()), allow_unused=True)
                for name, g in zip(chosen, gradients, strict=True):
                    if g is not None:
                        sums[name] += g.to(sums[name].dtype).square()
                count += 1
    finally:
        for name, p in chosen.items():
            p.requires_grad_(before[name])
    if not count:
        raise ConfigError("the Fisher information needs at least one text of two tokens")
    return {name: total / count for name, total in sums.items()}


class Elastic:
    """Pulls what levels have learned back to nothing, by how important each weight is.

    Args:
        levels: of the Learner whose States are pulled. importance: of each of their parameters, not below 0,
            as `fisher_information` gives it. pull: share that an average weight loses at each update.

    Raises:
        ConfigError: an importance is missing, negative or all zero, or the pull is below 0.
    """

    def __init__(self, levels: Sequence[Level], importance: Mapping[str, Tensor], pull: float) -> None:
        if not math.isfinite(pull) or pull < 0:
            raise ConfigError(f"pull is {pull}; give a number from 0 on")
        self._levels = [level for level in levels if level.period is not None]
        self._strength: dict[str, dict[str, Tensor]] = {}
        for level in self._levels:
            missing = [name for name in level.parameters if name not in importance]
            if missing:
                raise ConfigError(
                    f"there is no importance of {missing[0]!r}, a weight of level {level.name!r}"
                )
            weights = {name: importance[name] for name in level.parameters}
            total = sum(float(x.double().sum()) for x in weights.values())
            if any(bool((x < 0).any()) for x in weights.values()) or not 0 < total < math.inf:
                raise ConfigError(
                    f"importances of level {level.name!r} must be at least 0, and some above it"
                )
            mean = total / sum(x.numel() for x in weights.values())
            self._strength[level.name] = {name: pull * x / mean for name, x in weights.items()}

    def __call__(self, before: State, after: State) -> State:
        """`after`, a State that was read on from `before`, pulled once for each update in between."""
        learned = dict(after.learned)
        for level in self._levels:
            kept = dict(after.learned[level.name])
            updates = kept["updates"] - before.learned[level.name]["updates"]
            if not bool(updates.any()):
                continue
            for name, strength in self._strength[level.name].items():
                delta = kept[f"delta/{name}"]
                times = updates.to(delta.dtype).reshape(-1, *[1] * strength.dim())
                kept[f"delta/{name}"] = delta / (1 + strength.to(delta)).pow(times)
            learned[level.name] = kept
        return State(after.layers, after.clock, learned)
