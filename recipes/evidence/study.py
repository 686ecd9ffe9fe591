"""What the programs of the evidence share: their options, how a run is made and kept, and what is written.

A run of a seed is kept as NAME.json, and its trained weights, which other tables measure again, in a folder
NAME; of a run that tries a learning rate only the JSON is kept.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from novels import corpus
from runs import Run, keep_weights, train

from nestor.errors import ConfigError, JobError, NonFiniteError
from nestor.evaluation.plots import Axes
from nestor.evaluation.statistics import t_interval
from nestor.evaluation.suites import versions
from nestor.files import write_json, write_text
from nestor.jobs import Workers, run_jobs
from nestor.models.presets import count_parameters

# Beside the folders of the recipes lies what they share.
sys.path.append(str(Path(__file__).parents[1]))
from sweep import TUNING, Row, Sweep, place

RESULTS = Path(__file__).parents[1] / "results"
#: The seed of the runs that choose a learning rate.
TUNING_SEED = 1_000_003

#: `measure(model, device)` is JSON; it is pickled with a run.
Measure = Callable[[Any, str], dict[str, Any]]


@dataclass
class Options:
    """What every program takes."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Each draws its own weights and batches."""
    out: Path | None = None
    """Folder of the runs; none given: runs/evidence/NAME."""
    weights: Path | None = None
    """Folder of the trained weights, which may stay on the machine of the runs; none given: OUT/weights."""
    results: Path = RESULTS
    """Folder of the table, its plots and its JSON."""
    device: str = "cpu"
    """cpu or cuda; with several workers cuda is all GPUs in turn."""
    workers: int = 1
    """Processes that make runs at the same time, each on one thread of the CPU."""
    table_only: bool = False
    """Make the table and the plots again from the JSON that there is."""

    def folder(self, title: str) -> Path:
        """Of the runs."""
        return self.out or Path("runs/evidence") / title

    def weights_folder(self, title: str) -> Path:
        """Of the trained weights."""
        return self.weights or self.folder(title) / "weights"

    def settings(self) -> dict[str, Any]:
        """What the results depend on, as JSON: not where they are made and kept."""
        places = ("out", "weights", "results", "data", "device", "workers", "table_only", "name")
        values = {key: value for key, value in asdict(self).items() if key not in places}
        return json.loads(json.dumps(values))

    def check_options(self, *names: str) -> None:
        """Raises ConfigError: a list of these is empty or has something twice, or a seed is not allowed."""
        for name in ("seeds", *names):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"--{name.replace('_', '-')} are {list(values)}; give some, each once")
        Workers(self.workers, self.device).devices()
        if min(self.seeds) < 0 or TUNING_SEED in self.seeds:
            raise ConfigError(f"--seeds are {list(self.seeds)}; give none below 0, and not {TUNING_SEED}")


@dataclass(frozen=True)
class Measures:
    """Several measures of a `Maker` as one."""

    each: tuple[Measure, ...]

    def __call__(self, model: Any, device: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for measure in self.each:
            found |= measure(model, device)
        return found


@dataclass(frozen=True)
class Maker:
    """How a run is made, for `sweep.Sweep`.

    Attributes:
        weights: folder with one for the trained weights of each run.
        validate: of every run; `valid` in it is what learning rates are chosen by, the less the better.
        measure: besides, of the runs of seeds.
    """

    weights: Path
    validate: Measure
    measure: Measure

    def identity(self) -> dict[str, Any]:
        """What results depend on besides their runs, for `Sweep.also`."""
        return identity(self.validate, "validate") | identity(self.measure, "measure")

    def __call__(self, run: Run, name: str, device: str) -> dict[str, Any]:
        trained = train(run, device)
        result = {"parameters": count_parameters(trained.model), **trained.summary(), "place": place(device)}
        found = attempt(self.validate, trained.model, device) if trained.finite else {}
        if found and not name.startswith(TUNING):
            keep_weights(trained.model, self.weights / name)
            found |= attempt(self.measure, trained.model, device)
        return result | found


def identity(value: Any, name: str) -> dict[str, Any]:
    """What a measure depends on, by dotted name: files by their text and not their place."""
    if is_dataclass(value):
        parts = {"kind": type(value).__name__} | {one.name: getattr(value, one.name) for one in fields(value)}
    elif isinstance(value, tuple) and any(map(is_dataclass, value)):
        parts = dict(enumerate(value))
    else:
        is_file = isinstance(value, str) and Path(value).is_file()
        return {name: corpus((value,)).identity if is_file else value}
    return {k: v for part, one in parts.items() for k, v in identity(one, f"{name}.{part}").items()}


def attempt(measure: Measure, model: Any, device: str) -> dict[str, Any]:
    """What is measured; nothing where a score is no number."""
    try:
        return measure(model, device)
    except NonFiniteError:
        return {}


def by_validation(result: dict[str, Any]) -> float:
    """For a Sweep: the validation number, infinite where training came to no number."""
    return result.get("valid", float("inf"))


def line(result: dict[str, Any]) -> str:
    """For a Sweep: a result in a few words."""
    found = f"{result['valid']:.4f} in validation" if "valid" in result else "training came to no number"
    return f"{found}, {result['seconds']} s"


def run_rows(
    rows: Mapping[str, tuple[Sweep, Row]], workers: Workers, title: str, say: Callable[[str], None]
) -> dict[str, str]:
    """Make what is missing in workers, in the order of the rows; those that then are not finished, with what
    a table says of them.

    A model that fails, as for want of memory, leaves the others their rows. Raises JobError: no row is
    finished. Otherwise as `Sweep.jobs`.
    """
    try:
        run_jobs([job for sweep, row in rows.values() for job in sweep.jobs([row])], workers, title)
    except JobError as error:
        left_out = {name: "a run failed" for name, (sweep, row) in rows.items() if not sweep.finished(row)}
        if len(left_out) == len(rows):
            raise
        say(str(error))
        return left_out
    return {}


def write_table(
    path: Path,
    results: Mapping[str, Any],
    table: Callable[[Any], str],
    plots: Callable[[Any], Mapping[str, Axes]],
    say: Callable[[str], None],
) -> None:
    """Results as JSON, and beside it the table and the plots that are made from them."""
    write_json(path, results)
    write_text(path.with_suffix(".md"), table(results))
    for name, plot in plots(results).items():
        plot.write(path.with_name(f"{path.stem}-{name}.png"))
    say(table(results))


def over_seeds(values: Sequence[float | None]) -> dict[str, Any]:
    """Student's interval over seeds. Of seeds without a number nothing is said, and there is no mean."""
    if any(value is None for value in values):
        return {"estimate": None, "low": None, "high": None, "by_seed": list(values)}
    return t_interval(values).as_dict() | {"by_seed": list(values)}


def differences(values: Sequence[float | None], base: Sequence[float | None]) -> dict[str, Any]:
    """The same of what is left of the values when those of the same seeds of another model are taken off."""
    return over_seeds([None if a is None or b is None else a - b for a, b in zip(values, base, strict=True)])


def about(places: Sequence[str]) -> dict[str, Any]:
    """When and where results were made, and with what."""
    date = datetime.now(UTC).date().isoformat()
    return {"date": date, "places": sorted(set(places)), "versions": versions()}
