"""Low-rank adapters as parameters of the model itself, so that a Learner can have them as a level.

A weight `W [o, i]` is read as `W + up down`, `up [o, r]` zero and `down [r, i]` random at first (LoRA, Hu et
al., arXiv 2106.09685): the model gives what it gave, and only `up` and `down` learn.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nestor.errors import ConfigError


class LowRank(nn.Module):
    """The map `W -> W + up down`. Parameters are float32, or float64 for such a weight."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        dtype = torch.promote_types(weight.dtype, torch.float32)
        bound = 1 / math.sqrt(columns)
        down = torch.empty(rank, columns, dtype=dtype).uniform_(-bound, bound, generator=generator)
        self.up = nn.Parameter(torch.zeros(rows, rank, dtype=dtype, device=weight.device))
        self.down = nn.Parameter(down.to(weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).to(weight.dtype)


def with_low_rank(
    model: nn.Module, names: Sequence[str], rank: int, seed: int = 0
) -> tuple[nn.Module, tuple[str, ...]]:
    """A copy of a model with adapters on some matrices, and the names of the adapters' parameters.

    Args:
        names: matrices, as `named_parameters` calls them. rank: at least 1. seed: of `down`.

    Raises:
        ConfigError: a rank below 1, or a name that is no matrix of the model.
    """
    if rank < 1:
        raise ConfigError(f"the rank of an adapter is {rank}; it must be at least 1")
    adapted = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    made = []
    for name in names:
        owner, _, leaf = name.rpartition(".")
        try:
            module = adapted.get_submodule(owner)
            weight = getattr(module, leaf)
        except AttributeError as error:
            raise ConfigError(f"{name!r} is no weight of this model") from error
        if not isinstance(weight, nn.Parameter) or weight.dim() != 2:
            raise ConfigError(f"{name!r} is no matrix; adapters are for matrices")
        parametrize.register_parametrization(module, leaf, LowRank(weight, rank, generator))
        path = f"{owner}.parametrizations.{leaf}.0" if owner else f"parametrizations.{leaf}.0"
        made += [f"{path}.up", f"{path}.down"]
    return adapted, tuple(made)
