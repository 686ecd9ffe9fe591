"""Streams of classes through arms, compared: with intervals over seeds, and in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nestor.data.tasks.intents import LabelledTexts
from nestor.evaluation.class_incremental.parallel import make_runs
from nestor.evaluation.class_incremental.runs import MEASURES, Runs, curve, measures
from nestor.evaluation.class_incremental.settings import LEARNING, ClassIncremental
from nestor.evaluation.scoring import PIECE, Bar
from nestor.evaluation.statistics import mean_interval, wilson_interval
from nestor.evaluation.subjects import Subject
from nestor.jobs import Workers


def measure_class_incremental(
    subject: Subject,
    data: LabelledTexts,
    settings: ClassIncremental,
    *,
    seeds: Sequence[int] = (0,),
    batch_size: int = 64,
    piece: int = PIECE,
    folder: Path | None = None,
    bar: Bar | None = None,
    workers: Workers | None = None,
) -> dict[str, Any]:
    """All arms on the same streams, one for each seed. The result is JSON.

    Every learning arm tries each learning rate once on a stream of its own, whose test texts are training
    texts that it does not read, and takes the one of the best average accuracy.

    Args:
        folder: where finished runs are kept and found again; None: nowhere.
        workers: processes that make the runs, for a subject that can be opened again.

    Returns:
        `arms`: for each its runs (`run_stream`), learning rate, `curve` after each session and `MEASURES`;
        `differences`: of every arm from the first learning one, over seeds.

    Raises:
        ConfigError, DataError: settings that do not fit the data or the model. JobError: runs of workers
            failed.
    """
    settings.check()
    found = {}
    with ExitStack() as stack:
        several = workers is not None and workers.count > 1
        if several and folder is None:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="nestor-classes-")))
        runs = Runs(subject, data, settings, batch_size=batch_size, piece=piece, folder=folder, bar=bar)
        for seed in seeds:
            runs.stream(seed)  # what does not fit the data is said before anything is run
        if workers is not None and several:
            make_runs(runs, seeds, workers)
        for name in settings.arms:
            rate, tuning = runs.tuned(name)
            mine = [runs.run(name, seed) for seed in seeds]
            found[name] = summarised(mine) | {"learning_rate": rate, "tuning": tuning, "runs": mine}
    return {
        "dataset": data.name,
        "labels": len(data.labels),
        "arms": found,
        "differences": _differences(found),
    }


def summarised(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Measures and curve, with intervals over seeds; that of `final` of a single seed is over its texts."""
    each = [measures(run) for run in runs]
    found: dict[str, Any] = {name: mean_interval([one[name] for one in each]).as_dict() for name in MEASURES}
    if len(runs) == 1:
        found["final"] = wilson_interval(sum(runs[0]["right"][-1]), sum(runs[0]["asked"])).as_dict()
    curves = [curve(run) for run in runs]
    found["curve"] = [mean_interval(values).as_dict() for values in zip(*curves, strict=True)]
    found["seen"] = runs[0]["seen"]
    return found


def _differences(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Every arm minus the first that learns, seed by seed."""
    base = next((name for name in found if name in LEARNING), None)
    if base is None:
        return []
    out = []
    for name in found:
        if name == base:
            continue
        pairs = [
            (measures(mine), measures(other))
            for mine, other in zip(found[name]["runs"], found[base]["runs"], strict=True)
        ]
        out.append(
            {
                "arm": name,
                "baseline": base,
                **{one: mean_interval([a[one] - b[one] for a, b in pairs]).as_dict() for one in MEASURES},
            }
        )
    return out
