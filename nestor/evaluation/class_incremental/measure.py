"""Streams of classes through arms: accuracy after each session, what was learned, what was lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from nestor.data.tasks.intents import LabelledTexts, Session, class_sessions
from nestor.errors import NonFiniteError
from nestor.evaluation.class_incremental.arms import Arm, make_arm
from nestor.evaluation.class_incremental.settings import LEARNING, ClassIncremental
from nestor.evaluation.scoring import PIECE, Progress
from nestor.evaluation.statistics import mean_interval, wilson_interval
from nestor.evaluation.subjects import Subject

#: Of the stream on which learning rates are chosen; its texts are of the training part.
TUNING_SEED = 0
MEASURES = ("average", "final", "acquired", "forgetting")
Bar = Callable[[str], AbstractContextManager[Progress | None]]


def measure_class_incremental(
    subject: Subject,
    data: LabelledTexts,
    settings: ClassIncremental,
    *,
    seeds: Sequence[int] = (0,),
    batch_size: int = 64,
    piece: int = PIECE,
    bar: Bar | None = None,
) -> dict[str, Any]:
    """All arms on the same streams, one for each seed. The result is JSON.

    Every learning arm tries each learning rate once on a stream of its own, whose test texts are training
    texts that it does not read, and takes the one of the best average accuracy.

    Returns:
        `arms`: for each its runs (`run_stream`), learning rate, `curve` after each session and `MEASURES`;
        `differences`: of every arm from the first learning one, over seeds.

    Raises:
        ConfigError, DataError: settings that do not fit the data or the model.
    """
    settings.check()
    bar = bar or (lambda title: nullcontext(None))
    sizes: dict[str, Any] = {
        "classes": settings.classes,
        "examples": settings.examples,
        "tests": settings.tests,
    }
    streams = {seed: class_sessions(data, seed=seed, sessions=settings.sessions, **sizes) for seed in seeds}
    found = {}
    for name in settings.arms:
        with bar(f"{name}: {subject.name}") as progress:
            options: dict[str, Any] = {"batch_size": batch_size, "piece": piece, "progress": progress}
            tuning: dict[str, float] = {}
            rate = settings.learning_rates[0]
            if name in LEARNING and len(settings.learning_rates) > 1:
                short = min(settings.tuning_sessions, len(next(iter(streams.values()))))
                stream = class_sessions(data, seed=TUNING_SEED, sessions=short, held_out=True, **sizes)
                for tried in settings.learning_rates:
                    arm = make_arm(name, subject, settings, learning_rate=tried, seed=TUNING_SEED, **options)
                    tuning[f"{tried:g}"] = measures(run_stream(arm, stream))["average"]
                rate = max(settings.learning_rates, key=lambda tried: tuning[f"{tried:g}"])
            runs = []
            for seed, stream in streams.items():
                arm = make_arm(name, subject, settings, learning_rate=rate, seed=seed, **options)
                runs.append({"seed": seed, **run_stream(arm, stream)})
        found[name] = summarised(runs) | {
            "learning_rate": rate if name in LEARNING else None,
            "tuning": tuning,
            "runs": runs,
        }
    return {
        "dataset": data.name,
        "labels": len(data.labels),
        "arms": found,
        "differences": _differences(found),
    }


def run_stream(arm: Arm, stream: Sequence[Session]) -> dict[str, Any]:
    """One arm through one stream.

    Returns:
        `right[j][i]`: texts of session i, for i up to j, whose class is chosen among the labels of sessions 0
        to j after session j was read; `asked[i]`: texts of session i; `seen[j]`: labels so far. From a
        session on whose learning is not finite, `diverged`, nothing is right.
    """
    begin = time.perf_counter()
    labels: list[str] = []
    right: list[list[int]] = []
    diverged = None
    for number, session in enumerate(stream):
        labels += session.labels
        try:
            if diverged is None:
                arm.read(session)
                right.append(
                    [
                        sum(arm.choose(one.text, labels) == one.label for one in before.tests)
                        for before in stream[: number + 1]
                    ]
                )
        except NonFiniteError:
            diverged = number
        if diverged is not None:
            right.append([0] * (number + 1))
    seen = [sum(len(session.labels) for session in stream[: n + 1]) for n in range(len(stream))]
    return {
        "right": right,
        "asked": [len(session.tests) for session in stream],
        "seen": seen,
        "classes": [list(session.labels) for session in stream],
        "diverged": diverged,
        "learning": arm.report(),
        "seconds": round(time.perf_counter() - begin, 1),
    }


def curve(run: dict[str, Any]) -> list[float]:
    """Accuracy on all classes so far after each session."""
    return [sum(row) / sum(run["asked"][: len(row)]) for row in run["right"]]


def measures(run: dict[str, Any]) -> dict[str, float]:
    """Figures of one run, with `R[j][i]` the accuracy on session i after session j of S.

    average: mean of the `curve`. final: its last value. acquired: mean of `R[i][i]`. forgetting: mean over
    sessions i but the last of `max_j R[j][i] - R[S][i]`, j from i to S - 1; a text that is taken for one of a
    later class counts in it as well as one that is no longer known.
    """
    accuracy = [
        [right / asked for right, asked in zip(row, run["asked"], strict=False)] for row in run["right"]
    ]
    last = len(accuracy) - 1
    lost = [max(accuracy[j][i] for j in range(i, last)) - accuracy[last][i] for i in range(last)]
    whole = curve(run)
    return {
        "average": sum(whole) / len(whole),
        "final": whole[-1],
        "acquired": sum(accuracy[i][i] for i in range(last + 1)) / (last + 1),
        "forgetting": sum(lost) / len(lost) if lost else 0.0,
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
