"""A level: weights that are updated together, once in so many tokens (Nested Learning, arXiv 2512.24695)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from nestor.errors import ConfigError, suggest
from nestor.learning.inner import OPTIMIZERS

REDUCTIONS = ("mean", "sum")
RESETS = ("never", "context")


@dataclass(frozen=True)
class Level:
    """Weights with one period, learning rate and optimiser.

    Attributes:
        name: what reports and saved States call it. Levels are named, for papers count them either way.
        parameters: names of the model's parameters.
        period: tokens C from one update to the next; None: these weights never change.
        learning_rate: of a step along the reduced gradient.
        reduce: "mean" over the period's tokens, or "sum", the paper's equation 71 to the letter.
        optimizer: "sgd", "momentum", "adam" or "m3" (matrices only); its state lasts as long as the level's
            weights.
        momentum, second_momentum: how much of a mean stays from update to update.
        phase: updates fall on tokens `phase, phase + C, phase + 2 C, ...` of the stream (not on 0).
        largest_update: norm of an update over that of the weights that is not exceeded; None: no limit.
        reset: when what the level has learned is dropped, with the state of its optimiser: "never", at the
            end of a "context", or every so many of its own updates (eq. 72, the nested wiring).
        slow_period: of "m3", updates that its slow momentum takes in at once when they are over.
        slow_weight: of "m3", how much the slow momentum counts beside the fast one.
    """

    name: str
    parameters: tuple[str, ...]
    period: int | None
    learning_rate: float = 0.0
    reduce: str = "mean"
    optimizer: str = "sgd"
    momentum: float = 0.9
    second_momentum: float = 0.999
    phase: int = 0
    largest_update: float | None = None
    reset: str | int = "never"
    slow_period: int = 10
    slow_weight: float = 0.3

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name == "stream":
            raise ConfigError(
                f"a level is called {self.name!r}; give it a name without '/' that is not 'stream'"
            )
        if not self.parameters or len(set(self.parameters)) < len(self.parameters):
            raise ConfigError(f"level {self.name!r} has no parameters, or one of them twice; name each once")
        if self.period is not None and self.period < 1:
            raise ConfigError(
                f"level {self.name!r} has a period of {self.period}; give tokens, or None: never"
            )
        if self.phase < 0 or (self.period is not None and self.phase >= self.period):
            raise ConfigError(f"level {self.name!r} has phase {self.phase}; it must be in 0 to period - 1")
        for name, known in (("reduce", REDUCTIONS), ("optimizer", tuple(OPTIMIZERS))):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(
                    f"level {self.name!r} has {name}={value!r}; known are {', '.join(known)}. "
                    f"{suggest(value, known)}".rstrip()
                )
        if not math.isfinite(self.learning_rate) or self.learning_rate < 0:
            raise ConfigError(
                f"level {self.name!r} has learning rate {self.learning_rate}; give a number from 0 on"
            )
        for name in ("momentum", "second_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(
                    f"level {self.name!r} has {name}={getattr(self, name)}; it must be in [0, 1)"
                )
        if self.slow_period < 1 or not (math.isfinite(self.slow_weight) and self.slow_weight >= 0):
            raise ConfigError(
                f"level {self.name!r} has slow_period={self.slow_period} and slow_weight={self.slow_weight}; "
                f"they must be at least 1 and at least 0"
            )
        if self.largest_update is not None and not self.largest_update > 0:
            raise ConfigError(
                f"level {self.name!r} has largest_update={self.largest_update}; it must be above 0"
            )

        if self.reset not in RESETS and not (type(self.reset) is int and self.reset > 0):
            raise ConfigError(
                f"level {self.name!r} has reset={self.reset!r}; give {' or '.join(map(repr, RESETS))}, or a "
                f"number of updates. {suggest(str(self.reset), RESETS)}".rstrip()
            )

    def due(self, clock: int) -> bool:
        """Whether an update falls on the token of this number, counted from 1."""
        if self.period is None or clock < max(self.phase, 1):
            return False
        return (clock - self.phase) % self.period == 0


def check_levels(levels: Sequence[Level], parameters: Mapping[str, Tensor]) -> int:
    """Tokens of a base chunk, the shortest period, of levels that go together and with a model's parameters.

    A parameter may be in several levels if all but one of these drop what they have learned: the one that
    does not learns where they begin, by the same gradients (eq. 72 to first order).

    Raises:
        ConfigError: they do not.
    """
    names = [level.name for level in levels]
    if len(set(names)) < len(names):
        raise ConfigError(f"levels are called {', '.join(names)}; give each its own name")
    lasting: dict[str, str] = {}
    for level in levels:
        for name in level.parameters:
            if name not in parameters:
                raise ConfigError(
                    f"level {level.name!r} has {name!r}, which is no parameter of this model. "
                    f"{suggest(name, parameters)}".rstrip()
                )
            if level.reset == "never":
                if name in lasting:
                    raise ConfigError(
                        f"{name!r} is in the levels {lasting[name]!r} and {level.name!r}, which both keep "
                        f"what they learn; choose one, or let the faster one reset"
                    )
                lasting[name] = level.name
            if level.optimizer == "m3" and parameters[name].dim() != 2:
                raise ConfigError(
                    f"level {level.name!r} has optimizer='m3', which is for matrices, and {name!r} of shape "
                    f"{list(parameters[name].shape)}; give that to a level with optimizer='adam'"
                )
    periods = [level.period for level in levels if level.period is not None]
    if not periods:
        raise ConfigError("no level has a period, so nothing would be learned; give one of them a period")
    base = min(periods)
    for level in levels:
        for what, value in (("period", level.period), ("phase", level.phase)):
            if value is not None and value % base:
                raise ConfigError(
                    f"level {level.name!r} has a {what} of {value} tokens, which is no multiple of the "
                    f"shortest period, {base}"
                )
    return base
