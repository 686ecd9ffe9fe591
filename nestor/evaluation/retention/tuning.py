"""The learning rate of each arm, chosen on a stream of its own, after the same number of trials for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nestor.errors import NonFiniteError
from nestor.evaluation.retention.measures import Record, old_loss, pooled
from nestor.evaluation.retention.settings import ENDPOINT, RetentionSettings


@dataclass(frozen=True)
class Trial:
    """One step, in shares of the weights' norm, on the tuning stream.

    recall: share right after the gap of the endpoint; margin: mean nats over the best other answer; old_loss:
    rise of old text's bits. All None: the run ended in numbers that are not finite.
    """

    step: float
    recall: float | None = None
    margin: float | None = None
    old_loss: float | None = None


def steps_of(settings: RetentionSettings) -> list[float]:
    """The steps that every arm tries, from small to great, evenly on a logarithmic scale."""
    steps = np.geomspace(settings.smallest_step, settings.largest_step, settings.trials)
    return [float(f"{step:.3g}") for step in steps]


def try_step(run: Callable[[float], Record], step: float) -> Trial:
    """The trial of a step. run: reads the tuning stream at a step, and is asked at the endpoint."""
    try:
        record = run(step)
    except NonFiniteError:
        return Trial(step)
    recall = float(np.mean(np.concatenate(pooled([record], "correct", gap=ENDPOINT))))
    margin = float(np.mean(np.concatenate(pooled([record], "margin", gap=ENDPOINT))))
    return Trial(step, recall, margin, float(old_loss(record).mean()))


def choose(trials: Sequence[Trial], old_limit: float) -> Trial:
    """The trial of the highest recall, then margin, among those within the limit of old knowledge lost; if
    none is, the one that lost least.

    Raises:
        NonFiniteError: every trial ended in numbers that are not finite.
    """
    finite = [trial for trial in trials if trial.old_loss is not None]
    if not finite:
        raise NonFiniteError(
            f"none of the steps {[trial.step for trial in trials]} gave finite numbers; try smaller ones"
        )
    within = [trial for trial in finite if trial.old_loss <= old_limit]  # type: ignore[operator]
    if within:
        return max(within, key=lambda trial: (trial.recall, trial.margin))
    return min(finite, key=lambda trial: trial.old_loss)  # type: ignore[arg-type, return-value]
