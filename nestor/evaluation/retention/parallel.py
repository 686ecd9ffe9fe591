"""The pieces of the retention suite made by several processes, each with the model on its own device."""

from __future__ import annotations

from collections.abc import Sequence

from nestor.evaluation.keeping import reopened
from nestor.evaluation.retention.arms import given_rates
from nestor.evaluation.retention.pieces import Pieces, record_name, trial_name, units_name
from nestor.evaluation.retention.tuning import steps_of
from nestor.jobs import Job, Workers, run_jobs


def make_pieces(pieces: Pieces, seeds: Sequence[int], workers: Workers) -> None:
    """Put what is missing of all arms and seeds into the folder of the pieces, which must have one.

    Raises:
        ConfigError: the subject cannot be opened again. JobError: runs failed.
    """
    jobs = jobs_of(pieces, seeds)
    run_jobs(jobs, workers, f"retention: {pieces.subject.name}")


def jobs_of(pieces: Pieces, seeds: Sequence[int]) -> list[Job]:
    """A job for each piece that is missing. Sizes of steps come first, then trials, then runs of seeds."""
    again = reopened(pieces, pieces.filler, pieces.settings, batch_size=pieces.batch_size)
    call, kept = again.call, pieces.kept
    steps = steps_of(pieces.settings)
    units, trials, runs = [], [], []
    for arm in pieces.arms.values():
        # Whose learning rates are taken.
        tuned = pieces.arms.get(arm.rates_of, arm)
        sizes, tried = f"{tuned.name}: sizes of steps", [f"{tuned.name}: trying {step:g}" for step in steps]
        searched = tuned.learns and not given_rates(tuned, pieces.settings)
        if searched and arm is tuned:
            if units_name(arm) not in kept:
                units.append(Job(sizes, call, ("units", arm)))
            trials += [
                Job(title, call, ("trial", arm, step), after=(sizes,))
                for title, step in zip(tried, steps, strict=True)
                if trial_name(arm, step) not in kept
            ]
        needed = [units_name(tuned), *(trial_name(tuned, step) for step in steps)] if searched else []
        ready = all(name in kept for name in needed)
        step = pieces.tuned(arm)["step"] if ready else None
        runs += [
            Job(f"{arm.name}: seed {seed}", call, ("record", arm, seed), after=(sizes, *tried))
            for seed in seeds
            if not ready or record_name(arm, step, seed) not in kept
        ]
    return [*units, *trials, *runs]
