"""The pieces of the retention suite made by several processes, each with the model on its own device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from nestor.data.tasks import FillerText
from nestor.errors import ConfigError
from nestor.evaluation.retention.pieces import Pieces, record_name, trial_name, units_name
from nestor.evaluation.retention.settings import RetentionSettings
from nestor.evaluation.retention.tuning import steps_of
from nestor.evaluation.subjects import Subject
from nestor.jobs import Job, Workers, run_jobs


def make_pieces(pieces: Pieces, seeds: Sequence[int], workers: Workers) -> None:
    """Put what is missing of all arms and seeds into the folder of the pieces.

    Raises:
        ConfigError: there is no folder, or the subject cannot be opened again. JobError: runs failed.
    """
    jobs = jobs_of(pieces, seeds)
    run_jobs(jobs, workers, f"retention: {pieces.subject.name}")


def jobs_of(pieces: Pieces, seeds: Sequence[int]) -> list[Job]:
    """A job for each piece that is missing. Sizes of steps come first, then trials, then runs of seeds."""
    opening, kept = _opening(pieces), pieces.kept
    steps = steps_of(pieces.settings)
    units, trials, runs = [], [], []
    for arm in pieces.arms.values():
        # Whose learning rates are taken.
        tuned = pieces.arms.get(arm.rates_of, arm)
        sizes, tried = f"{tuned.name}: sizes of steps", [f"{tuned.name}: trying {step:g}" for step in steps]
        if arm.learns and arm is tuned:
            if units_name(arm) not in kept:
                units.append(Job(sizes, _units, (opening, arm.name)))
            trials += [
                Job(title, _trial, (opening, arm.name, step), after=(sizes,))
                for title, step in zip(tried, steps, strict=True)
                if trial_name(arm, step) not in kept
            ]
        needed = [units_name(tuned), *(trial_name(tuned, step) for step in steps)] if tuned.learns else []
        ready = all(name in kept for name in needed)
        step = pieces.tuned(arm)["step"] if ready else None
        runs += [
            Job(f"{arm.name}: seed {seed}", _record, (opening, arm.name, seed), after=(sizes, *tried))
            for seed in seeds
            if not ready or record_name(arm, step, seed) not in kept
        ]
    return [*units, *trials, *runs]


@dataclass(frozen=True)
class _Opening:
    """What a process needs to have the same pieces. Two of the same digest and folder are one."""

    digest: str
    folder: Path
    depends: Mapping[str, Any] = field(compare=False)
    reopen: Callable[[str], Subject] = field(compare=False)
    filler: FillerText = field(compare=False)
    settings: RetentionSettings = field(compare=False)
    batch_size: int = field(compare=False)


def _opening(pieces: Pieces) -> _Opening:
    subject, folder = pieces.subject, pieces.folder
    if subject.reopen is None or folder is None:
        raise ConfigError(
            f"workers need a folder, and open the model {subject.name!r} themselves; give a folder, and the "
            f"Subject `reopen`, or one worker"
        )
    return _Opening(
        pieces.kept.digest, folder, pieces.kept.settings, subject.reopen, pieces.filler, pieces.settings,
        pieces.batch_size,
    )  # fmt: skip


@lru_cache(maxsize=1)
def _pieces(opening: _Opening, device: str) -> Pieces:
    """Opened once in a process."""
    return Pieces(
        opening.reopen(device), opening.filler, opening.settings, batch_size=opening.batch_size,
        folder=opening.folder, depends=opening.depends,
    )  # fmt: skip


def _units(opening: _Opening, arm: str, *, device: str) -> None:
    pieces = _pieces(opening, device)
    pieces.units(pieces.arms[arm])


def _trial(opening: _Opening, arm: str, step: float, *, device: str) -> None:
    pieces = _pieces(opening, device)
    pieces.trial(pieces.arms[arm], step)


def _record(opening: _Opening, arm: str, seed: int, *, device: str) -> None:
    pieces = _pieces(opening, device)
    one = pieces.arms[arm]
    pieces.record(one, pieces.tuned(one), seed)
