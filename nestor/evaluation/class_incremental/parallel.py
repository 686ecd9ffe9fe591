"""Runs of arms made by several processes, each with the model on its own device."""

from __future__ import annotations

from collections.abc import Sequence

from nestor.evaluation.class_incremental.runs import Runs, run_name, trial_name
from nestor.evaluation.keeping import reopened
from nestor.jobs import Job, Workers, run_jobs


def make_runs(runs: Runs, seeds: Sequence[int], workers: Workers) -> None:
    """Put what is missing of all arms and seeds into the folder of the runs, which must have one.

    Raises:
        ConfigError: the subject cannot be opened again. JobError: runs failed.
    """
    run_jobs(jobs_of(runs, seeds), workers, f"class-incremental: {runs.subject.name}")


def jobs_of(runs: Runs, seeds: Sequence[int]) -> list[Job]:
    """A job for each run that is missing, trials of learning rates first."""
    again = reopened(runs, runs.data, runs.settings, batch_size=runs.batch_size, piece=runs.piece)
    call, kept = again.call, runs.kept
    trials, found = [], []
    for arm in runs.settings.arms:
        tried = {f"{arm}: trying {rate:g}": rate for rate in runs.rates(arm)}
        missing = {title: rate for title, rate in tried.items() if trial_name(arm, rate) not in kept}
        trials += [Job(title, call, ("trial", arm, rate)) for title, rate in missing.items()]
        rate = None if missing else runs.tuned(arm)[0]
        found += [
            Job(f"{arm}: seed {seed}", call, ("run", arm, seed), after=tuple(tried))
            for seed in seeds
            if missing or run_name(arm, rate, seed) not in kept
        ]
    return [*trials, *found]
