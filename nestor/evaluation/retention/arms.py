"""The arms: what learns, on which levels, at which learning rates (spec i.2)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from nestor.errors import ConfigError
from nestor.evaluation.retention.settings import RetentionSettings
from nestor.evaluation.retention.students import Frozen, Reader, Student
from nestor.evaluation.scoring import Progress
from nestor.learning import Learner, Level, assign_levels, feed_forward_weights
from nestor.learning.adapters import with_low_rank
from nestor.learning.elastic import Elastic, fisher_information

_SHOWS = {"frozen": "nothing", "in-context": "session", "retrieval": "statements"}
#: An update is cut to so many times the step that was chosen.
_LARGEST = 4.0
# Places of the tuning stream at which the gradient of a level is measured.
_SAMPLES = 4


@dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
        name: as results call it. base: as settings call it, for a continuum with its number of levels.
        periods: of its levels, rising; empty: it does not learn. all learn at the first, if `together`.
        rates_of: name of the arm whose learning rates it takes; empty: it has its own.
    """

    name: str
    base: str
    periods: tuple[int, ...] = ()
    optimizer: str = ""
    order: str = "shallow_first"
    together: bool = False
    rates_of: str = ""
    rank: int = 0
    replay: float = 0.0
    pull: float = 0.0

    @property
    def learns(self) -> bool:
        return bool(self.periods)


@dataclass(frozen=True)
class Rate:
    """Of one level: its learning rate, and the norm of an update over that of the level's own weights that is
    not exceeded; None: no limit."""

    learning_rate: float
    largest_update: float | None


def arms_of(settings: RetentionSettings) -> list[Arm]:
    """The arms in the order in which they run."""
    periods = settings.periods
    found: list[Arm] = [Arm(name, name) for name in settings.arms if name in _SHOWS]
    for optimizer in settings.optimizers:

        def named(base: str, optimizer: str = optimizer, **choices: Any) -> Arm:
            several = len(settings.optimizers) > 1
            return Arm(f"{base} {optimizer}" if several else base, base, optimizer=optimizer, **choices)

        whole = f"continuum-{len(periods)}"
        made = {
            "single-fast": [named("single-fast", periods=periods[:1])],
            "single-slow": [named("single-slow", periods=periods[-1:])],
            "continuum": [
                named(f"continuum-{k}", periods=_spread(periods, k)) for k in range(2, len(periods) + 1)
            ],
            "equal-periods": [
                named("equal-periods", periods=periods, together=True, rates_of=named(whole).name)
            ],
            "shuffled": [named("shuffled", periods=periods, order="shuffled")],
            "low-rank": [named("low-rank", periods=periods[:1], rank=settings.rank)],
            "replay": [named("replay", periods=periods[:1], replay=settings.replay)],
            "ewc": [named("ewc", periods=periods[:1], pull=settings.pull)],
        }
        found += [arm for name, arms in made.items() if name in settings.arms for arm in arms]
    return found


def _spread(periods: Sequence[int], count: int) -> tuple[int, ...]:
    """`count` of the periods, evenly, with the first and the last."""
    return tuple(periods[round(i * (len(periods) - 1) / (count - 1))] for i in range(count))


def levels_of(
    arm: Arm, model: Any, rates: Sequence[Rate], settings: RetentionSettings, seed: int
) -> tuple[Any, list[Level]]:
    """The model that an arm learns with (its own, or one with adapters) and its levels.

    All arms adapt the feed-forward weights of the same layers.

    Raises:
        ConfigError: more levels than layers to learn in.
    """
    layers = feed_forward_weights(model)
    adaptive = len(layers) - int(len(layers) * settings.fixed)
    if len(arm.periods) > adaptive:
        raise ConfigError(
            f"the arm {arm.name} has {len(arm.periods)} levels, and only {adaptive} of the {len(layers)} "
            f"layers learn; lower fixed ({settings.fixed}) or give fewer periods"
        )
    levels = assign_levels(
        model, arm.periods, [rate.learning_rate for rate in rates], fixed=settings.fixed, order=arm.order,
        seed=seed, optimizer=arm.optimizer,
    )  # fmt: skip
    levels = [
        replace(one, largest_update=rate.largest_update) for one, rate in zip(levels, rates, strict=True)
    ]
    if arm.together:
        levels = [replace(one, name=f"group {n}", period=arm.periods[0]) for n, one in enumerate(levels)]
    if arm.rank:
        names = [name for level in levels for name in level.parameters]
        model, parameters = with_low_rank(model, names, arm.rank, seed)
        levels = [replace(levels[0], parameters=parameters)]
    return model, levels


def make_student(
    arm: Arm,
    model: Any,
    rates: Sequence[Rate],
    settings: RetentionSettings,
    context: int,
    *,
    old: Sequence[Sequence[int]] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> Student:
    """Who reads the stream for an arm.

    Args:
        rates: of each level. context: tokens that are read together.
        old: token ids of old text, from which the ewc arm learns what is important.
    """
    if not arm.learns:
        return Frozen(model, context, _SHOWS[arm.base], progress)
    adapted, levels = levels_of(arm, model, rates, settings, seed)
    elastic = None
    if arm.pull:
        texts = [torch.tensor([list(ids)], device=model.device) for ids in old]
        names = [name for level in levels for name in level.parameters]
        elastic = Elastic(levels, fisher_information(adapted, names, texts), arm.pull)
    return Reader(
        Learner(adapted, levels), context, replay=arm.replay, elastic=elastic, seed=seed, progress=progress
    )


def unit_steps(
    arm: Arm, model: Any, ids: Sequence[int], settings: RetentionSettings, context: int
) -> list[tuple[float, float]]:
    """For each level the step of a first update at learning rate 1, over the norm of the weights: of the
    matrices that the model multiplies by, and of the level's own parameters (which differ for adapters).

    The median over some places of `ids`, text of the tuning stream. A first step is linear in the learning
    rate, so a wanted step follows from it.
    """
    adapted, levels = levels_of(arm, model, [Rate(1.0, 1.0)] * len(arm.periods), settings, seed=0)
    found = []
    for level in levels:
        period = level.period or 1
        places = [int(i * max(0, len(ids) - period - 1) / max(1, _SAMPLES - 1)) for i in range(_SAMPLES)]
        alone = replace(level, largest_update=None)
        steps = []
        for place in dict.fromkeys(places):
            reader = Reader(Learner(adapted, [alone]), context)
            reader.study(ids[place : place + period + 1])
            own = reader.learner.report(reader.state)[0][0].change
            steps.append((_effective(reader, level) if arm.rank else own, own))
        found.append((statistics.median(s for s, _ in steps), statistics.median(s for _, s in steps)))
    return found


def rates_for(step: float, units: Sequence[tuple[float, float]]) -> list[Rate]:
    """Learning rates at which each level's first step is `step` of the norm of its weights.

    Raises:
        ConfigError: a level has no gradient.
    """
    if any(not effective > 0 for effective, _ in units):
        raise ConfigError("a level's weights have no gradient on the tuning stream; it cannot learn")
    return [Rate(step / effective, _LARGEST * step * own / effective) for effective, own in units]


def given_rates(arm: Arm, settings: RetentionSettings) -> list[Rate]:
    """Learning rates that the settings give to the levels of an arm, by period; none: it is tuned."""
    if not settings.learning_rates or arm.rank:
        return []
    rates = dict(zip(settings.periods, settings.learning_rates, strict=True))
    return [Rate(rates[period], settings.largest_update) for period in arm.periods]


def _effective(reader: Reader, level: Level) -> float:
    """Change of the matrices that adapters stand beside, over their norm."""
    model, learned = reader.learner.model, reader.learner.weights(reader.state)
    change = whole = 0.0
    for name in level.parameters:
        if not name.endswith(".up"):
            continue
        path = name.removesuffix(".0.up")
        product = learned[name] @ learned[f"{path}.0.down"]
        change += float(product.double().square().sum())
        whole += float(model.get_parameter(f"{path}.original").detach().double().square().sum())
    return float((change / whole) ** 0.5)
