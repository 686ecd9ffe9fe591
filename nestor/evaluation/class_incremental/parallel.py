"""Runs of arms made by several processes, each with the model on its own device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nestor.data.tasks.intents import LabelledTexts
from nestor.evaluation.class_incremental.runs import Runs, run_name, trial_name
from nestor.evaluation.class_incremental.settings import ClassIncremental
from nestor.evaluation.subjects import Subject
from nestor.jobs import Job, Shared, Workers, run_jobs


def make_runs(runs: Runs, seeds: Sequence[int], workers: Workers) -> None:
    """Put what is missing of all arms and seeds into the folder of the runs, which must have one.

    Raises:
        ConfigError: the subject cannot be opened again. JobError: runs failed.
    """
    run_jobs(jobs_of(runs, seeds), workers, f"class-incremental: {runs.subject.name}")


def jobs_of(runs: Runs, seeds: Sequence[int]) -> list[Job]:
    """A job for each run that is missing, trials of learning rates first."""
    call, kept = _shared(runs).call, runs.kept
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


def _shared(runs: Runs) -> Shared:
    again = partial(
        _open, runs.subject.again(), runs.data, runs.settings, runs.batch_size, runs.piece, runs.folder,
        runs.kept.settings,
    )  # fmt: skip
    return Shared((runs.kept.digest, str(runs.folder)), again)


def _open(
    reopen: Callable[[str], Subject],
    data: LabelledTexts,
    settings: ClassIncremental,
    batch_size: int,
    piece: int,
    folder: Path | None,
    depends: Mapping[str, Any],
    device: str,
) -> Runs:
    subject = reopen(device)
    return Runs(subject, data, settings, batch_size=batch_size, piece=piece, folder=folder, depends=depends)
