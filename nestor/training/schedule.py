"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to restore."""

import math

from nestor.training.config import ScheduleConfig


def lr_factor(step: int, total: int, schedule: ScheduleConfig) -> float:
    """What fraction of the peak learning rate step `step` (counted from 0) of `total` uses.

    Warm-up rises linearly and reaches 1 at its last step. Then `constant` stays; `cosine` falls to
    `final` along half a cosine (Loshchilov & Hutter 2017); `wsd` stays until the last `decay` of the steps
    and falls linearly to `final` (warmup-stable-decay, Hu et al. 2024).
    """
    warmup = warmup_steps(total, schedule)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.name == "constant":
        return 1.0
    begin = warmup if schedule.name == "cosine" else max(warmup, round(total * (1 - schedule.decay)))
    if step < begin:
        return 1.0
    # The last step, total - 1, is the end of the decay.
    progress = min(1.0, (step - begin) / max(1, total - 1 - begin))
    falling = (1 + math.cos(math.pi * progress)) / 2 if schedule.name == "cosine" else 1 - progress
    return schedule.final + (1 - schedule.final) * falling


def warmup_steps(total: int, schedule: ScheduleConfig) -> int:
    """Length of the warm-up in steps; a setting below 1 is a fraction of the run."""
    return math.ceil(schedule.warmup * total) if schedule.warmup < 1 else min(total, round(schedule.warmup))
