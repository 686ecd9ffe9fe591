"""Runs of several seeds at a learning rate that was chosen before, each kept as a file.

For every row of a table each learning rate is tried once, on a run of its own, and the best goes into a run
for each seed. A run is a JSON file in a folder, which is found again under the settings that it was made
with and refused under others, so that the same command goes on where it was stopped, here or elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from nestor.errors import ConfigError, DataError
from nestor.evaluation.suites import device_name
from nestor.files import write_json
from nestor.jobs import Job, Workers, run_jobs

Say = Callable[[str], None]

#: What the names of runs that try a learning rate begin with.
TUNING = "tuning/"


class Trial(Protocol):
    """A dataclass with all that a run depends on."""

    learning_rate: float

    def settings(self) -> dict[str, Any]:
        """The same as JSON; where two differ, the result of one is none of the other."""


#: `make(trial, name, device)` is a run; its result is JSON.
Make = Callable[[Any, str, str], dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """A row of a table.

    tuning: the run that is made once for every learning rate, with that rate in place of its own.
    runs: those of the seeds, which get the rate that was chosen. Both are `Trial`.
    """

    name: str
    tuning: Any
    runs: Mapping[int, Any]

    def trials(self, rates: Sequence[float]) -> dict[str, Any]:
        """The runs that try the learning rates, by name. One rate alone is taken without a trial."""
        if len(rates) == 1:
            return {}
        return {f"{TUNING}{self.name}-{rate:g}": replace(self.tuning, learning_rate=rate) for rate in rates}

    def run_name(self, seed: int) -> str:
        """What the run of a seed is called."""
        return f"{self.name}-{seed}"


@dataclass(frozen=True)
class Sweep:
    """How rows become results.

    Attributes:
        folder: of the results.
        rates: learning rates that are tried.
        make: a run; to be pickled if there are workers, as are the trials.
        order: what is compared of the results of `tuning`; the least is the best.
        line: what is said of a result.
        device: of runs that are not made by workers.
        also: settings of `make` that a result depends on besides its trial, as JSON.
    """

    folder: Path
    rates: tuple[float, ...]
    make: Make
    order: Callable[[dict[str, Any]], Any]
    line: Callable[[dict[str, Any]], str]
    device: str = "cpu"
    say: Say = print
    also: Mapping[str, Any] = field(default_factory=dict)

    def run_missing(self, rows: Sequence[Row], workers: Workers, title: str) -> None:
        """Make what is not in the folder, many runs at once. Raises as `kept`; JobError: runs failed."""
        run_jobs(self.jobs(rows), workers, title)

    def finished(self, row: Row) -> bool:
        """Whether the runs of all seeds are in the folder."""
        return all(self.path(row.run_name(seed)).is_file() for seed in row.runs)

    def jobs(self, rows: Sequence[Row]) -> list[Job]:
        """The runs that are missing in the folder, those of seeds after those that choose their learning
        rates. Raises as `kept`."""
        quiet = replace(self, say=_silent)
        tries = [
            Job(name, _try, (quiet, name, trial))
            for row in rows
            for name, trial in row.trials(self.rates).items()
            if self.kept(name, trial) is None
        ]
        runs = [
            Job(row.run_name(seed), _run, (quiet, row, seed), after=tuple(row.trials(self.rates)))
            for row in rows
            for seed in row.runs
            if not self.path(row.run_name(seed)).is_file()
        ]
        return tries + runs

    def rate(self, row: Row) -> tuple[float, dict[float, dict[str, Any]]]:
        """The learning rate of the best trial, the first of equals, and the results of all."""
        trials = row.trials(self.rates)
        if not trials:
            return self.rates[0], {}
        found = {trial.learning_rate: self.get(name, trial) for name, trial in trials.items()}
        return min(found, key=lambda rate: self.order(found[rate])), found

    def run(self, row: Row, seed: int) -> dict[str, Any]:
        """The result of a seed at the learning rate that was chosen."""
        rate, _ = self.rate(row)
        return self.get(row.run_name(seed), replace(row.runs[seed], learning_rate=rate))

    def get(self, name: str, trial: Trial) -> dict[str, Any]:
        """The result in the folder, or that of a run that is then kept there. Raises as `kept`."""
        result = self.kept(name, trial)
        if result is None:
            result = self.make(trial, name, self.device)
            write_json(self.path(name), {"settings": self.settings(trial), "result": result})
            self.say(f"{name} at {trial.learning_rate:g}: {self.line(result)}")
        return result

    def kept(self, name: str, trial: Trial) -> dict[str, Any] | None:
        """The result in the folder; None if there is none.

        Raises:
            ConfigError: the file is of a run with other settings.
            DataError: the file is none of this program.
        """
        path = self.path(name)
        if not path.is_file():
            return None
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            # Results of older versions do not say where they ran.
            before, result, _ = kept["settings"], kept["result"], kept["result"]["place"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is not a result of this program ({error!r}); remove it") from error
        settings = self.settings(trial)
        other = {key: before.get(key) for key, value in settings.items() if before.get(key) != value}
        if other:
            now = {key: settings[key] for key in other}
            raise ConfigError(
                f"{path} is of a run with {other}, and this one has {now}; name another folder with --out"
            )
        return result

    def settings(self, trial: Trial) -> dict[str, Any]:
        """All that a result depends on."""
        return json.loads(json.dumps({**trial.settings(), **self.also}))

    def path(self, name: str) -> Path:
        """Where the result of that name is kept."""
        return self.folder / f"{name}.json"


def place(device: str) -> str:
    """Where a run is made, in words: those who go on may do so on another machine."""
    return f"{device_name(device)}, PyTorch {torch.__version__}"


def _try(sweep: Sweep, name: str, trial: Any, device: str) -> None:
    """In a worker: a trial of a learning rate."""
    replace(sweep, device=device).get(name, trial)


def _run(sweep: Sweep, row: Row, seed: int, device: str) -> None:
    """In a worker: the run of a seed. Its trials are finished."""
    replace(sweep, device=device).run(row, seed)


def _silent(text: str) -> None:
    """Workers leave it to the progress bar to say something."""
