"""A trained decoder with levels: three readings of how its feed-forward networks become a continuum.

arXiv 2512.24695, section 7.3, gives levels the networks that are there and does not say how. Each reading
leaves the model's function as it was while nothing is learned.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from nestor.errors import ConfigError, FileFormatError, suggest
from nestor.layers.feed_forward import SwiGLU
from nestor.learning.assignment import (
    ORDERS,
    adaptive_layers,
    assign_levels,
    continuum_blocks,
    continuum_levels,
    feed_forward_weights,
)
from nestor.learning.levels import Level

DEFAULT_PERIODS = (64, 512)
#: By inner step, what helped SmolLM2 with long documents at periods of 512 and 4096; three times the rate of
#: sgd ran away (recipes/retrofit). Shorter periods step more often. Steps of m3, not tried, are as adam's.
DEFAULT_RATES = {"sgd": 0.03, "momentum": 0.03, "adam": 1e-4, "m3": 1e-4}
READINGS = ("existing", "copies", "added")


@dataclass(frozen=True)
class Retrofit:
    """How a trained decoder gets its levels; what a memory file needs to make them again.

    Attributes:
        reading: "existing" deals out the feed-forward networks that are there, to the bit the same model;
            "copies" makes each of them one copy a level, the mean of which it puts out; "added" keeps each
            and adds a small network a level, the output of which begins at zero.
        periods: tokens from update to update of each level, rising; none: 64 and 512, or those of the
            configuration of a Nestor model with a continuum, of which each block is a level.
        learning_rates: of each level; none: that of `DEFAULT_RATES` for all.
        optimizer, largest_update: as in `Level`, the same for all.
        fixed: share of the layers, from the first on, that do not learn.
        order: of "existing", which layers have the shortest period (`assign_levels`).
        seed: of the order "shuffled", and of the weights of added networks.
        width: inner width of an added network; None: a quarter of the model's width.
    """

    reading: str = "existing"
    periods: tuple[int, ...] = ()
    learning_rates: tuple[float, ...] = ()
    optimizer: str = "sgd"
    largest_update: float | None = 0.01
    fixed: float = 0.5
    order: str = "shallow_first"
    seed: int = 0
    width: int | None = None

    def __post_init__(self) -> None:
        if self.reading not in READINGS:
            raise ConfigError(
                f"reading is {self.reading!r}; known are {', '.join(READINGS)}. "
                f"{suggest(self.reading, READINGS)}".rstrip()
            )
        if self.order not in ORDERS:
            raise ConfigError(
                f"order is {self.order!r}; known are {', '.join(ORDERS)}. "
                f"{suggest(self.order, ORDERS)}".rstrip()
            )
        if self.reading != "existing" and self.order != "shallow_first":
            raise ConfigError(
                f"order is {self.order!r}, but with reading {self.reading!r} each layer has all levels; "
                f"leave it out"
            )
        if self.width is not None and (self.reading != "added" or self.width < 1):
            raise ConfigError(f"width is {self.width}; give at least 1, and only with reading 'added'")

    def apply(self, model: nn.Module) -> list[Level]:
        """The levels of a model, which gets the networks of its reading in place of its own.

        Raises:
            ConfigError: a model whose feed-forward networks are not found, or levels that do not fit it.
        """
        choices: dict[str, Any] = {"optimizer": self.optimizer, "largest_update": self.largest_update}
        # Of an unknown one the levels say so.
        rate = DEFAULT_RATES.get(self.optimizer, 0.0)
        blocks = continuum_blocks(model)
        if blocks and self.reading == "existing":
            settings = model.config.continuum or {}  # type: ignore[union-attr, operator]
            periods = self.periods + (None,) * (len(blocks) - len(self.periods))
            periods = periods if self.periods else tuple(settings["periods"])  # type: ignore[index, arg-type]
            learning = sum(period is not None for period in periods)
            rates = self.learning_rates or (rate,) * learning
            return continuum_levels(model, rates, periods, **choices)
        periods = self.periods or DEFAULT_PERIODS
        rates = self.learning_rates or (rate,) * len(periods)
        if self.reading == "existing":
            return assign_levels(
                model, periods, rates, fixed=self.fixed, order=self.order, seed=self.seed, **choices
            )
        return _with_networks(self, model, periods, rates, choices)

    def to_notes(self) -> dict[str, Any]:
        """As JSON knows it, for `State.save`."""
        return asdict(self)

    @classmethod
    def from_notes(cls, notes: Mapping[str, Any]) -> Retrofit:
        """What `to_notes` gave.

        Raises:
            FileFormatError: it is something else.
        """
        known = {field.name for field in fields(cls)}
        try:
            values: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in notes.items()
            }
            if set(values) != known:
                raise TypeError(f"fields {sorted(set(values) ^ known)}")
            return cls(**values)
        except (AttributeError, TypeError, ConfigError) as error:
            raise FileFormatError(f"the file's levels cannot be read ({error})") from error

    def differences(self, other: Retrofit) -> list[str]:
        """What is not the same, as "periods is (64, 512), not (64,)" of this one and the other."""
        return [
            f"{field.name} is {getattr(self, field.name)}, not {getattr(other, field.name)}"
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]


class Copies(nn.Module):
    """The mean of copies of a network, one a level: the network itself while they are equal."""

    def __init__(self, network: nn.Module, levels: int) -> None:
        super().__init__()
        self.copies = nn.ModuleList(copy.deepcopy(network) for _ in range(levels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([one(x) for one in self.copies]).mean(dim=0)


class Added(nn.Module):
    """A network, and small ones beside it, one a level, whose output matrices begin at zero.

    The gradient reaches these matrices at once, and what lies before them from the first update on.
    """

    def __init__(
        self, network: nn.Module, levels: int, sizes: tuple[int, int], like: Tensor, seed: int
    ) -> None:
        super().__init__()
        self.network = network
        added = [SwiGLU(*sizes) for _ in range(levels)]
        self.added = nn.ModuleList(added)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for one in added:
                for matrix in (one.gate_proj.weight, one.up_proj.weight):
                    matrix.normal_(std=sizes[0] ** -0.5, generator=generator)
                one.down_proj.weight.zero_()
        self.added.to(like)

    def forward(self, x: Tensor) -> Tensor:
        y = self.network(x)
        for one in self.added:
            y = y + one(x)
        return y


def _with_networks(
    retrofit: Retrofit, model: nn.Module, periods: Sequence[int], rates: Sequence[float],
    choices: dict[str, Any],
) -> list[Level]:  # fmt: skip
    layers = feed_forward_weights(model)
    count = len(periods)
    adaptive = adaptive_layers(layers, periods, rates, retrofit.fixed)
    parameters: list[list[str]] = [[] for _ in range(count)]
    for names in adaptive:
        # `model.layers.3.mlp.up_proj.weight` is a matrix of `model.layers.3.mlp`.
        place = names[0].rpartition(".")[0].rpartition(".")[0]
        network = model.get_submodule(place)
        own = model.get_parameter(names[0])
        if retrofit.reading == "copies":
            model.set_submodule(place, Copies(network, count))
            for level, found in enumerate(parameters):
                found += [f"{place}.copies.{level}.{name.removeprefix(place + '.')}" for name in names]
        else:
            width = model.config.hidden_size  # type: ignore[union-attr]
            sizes = (width, retrofit.width or max(1, width // 4))  # type: ignore[operator]
            index = int(place.split(".")[-2])
            model.set_submodule(place, Added(network, count, sizes, own, retrofit.seed + index))  # type: ignore[arg-type]
            for level, found in enumerate(parameters):
                found += [
                    f"{place}.added.{level}.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")
                ]
    return [
        Level(f"every {period}", tuple(names), period, rate, **choices)
        for period, rate, names in zip(periods, rates, parameters, strict=True)
    ]
