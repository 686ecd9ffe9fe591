"""Table and picture of a class-incremental measurement."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nestor.evaluation.class_incremental.measure import MEASURES
from nestor.evaluation.figures import file_name
from nestor.evaluation.plots import Axes, Plot, Series, curves
from nestor.evaluation.report import with_interval
from nestor.files import write_json, write_text

_HEADS = ("arm", "learning rate", *MEASURES)


def table_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """A row for each arm: learning rate and measures."""
    rows = []
    for name, arm in result["arms"].items():
        rate = "-" if arm["learning_rate"] is None else f"{arm['learning_rate']:g}"
        rows.append([name, rate, *(with_interval(arm[one], as_percent=True) for one in MEASURES)])
    return rows


def markdown(result: Mapping[str, Any]) -> str:
    """The page of a whole result: for each model a table, then what the columns mean."""
    settings, seeds = result["settings"], len(result["seeds"])
    parts = [f"# Class-incremental learning on {settings['dataset']}"]
    for name, one in result["models"].items():
        parts.append(f"## {name}")
        lines = ["| " + " | ".join(_HEADS) + " |", "|---|" + "---:|" * (len(_HEADS) - 1)]
        lines += ["| " + " | ".join(row) + " |" for row in table_rows(one)]
        parts.append("\n".join(lines))
        for difference in one["differences"]:
            if difference["average"]["low"] is not None:
                parts.append(
                    f"{difference['arm']} minus {difference['baseline']}: average "
                    f"{with_interval(difference['average'], as_percent=True)}, forgetting "
                    f"{with_interval(difference['forgetting'], as_percent=True)}."
                )
    over = "with 95 % intervals over seeds" if seeds > 1 else "the interval of final is over its texts"
    over += " (too narrow for fewer than five)" if 1 < seeds < 5 else ""
    parts.append(
        f"{settings['classes']} classes a session, {settings['examples']} texts of each read "
        f"{_times(settings['passes'], 'time')}, up to {settings['tests']} of each asked among all labels so "
        f"far; mean of {_times(seeds, 'seed')}, {over}. average: mean accuracy after each session on all "
        f"classes so far. final: after the last. acquired: on a session's own classes right after it. "
        f"forgetting: mean fall of a session's accuracy from its best to its last, to which classes that "
        f"come later, and are chosen instead, add."
    )
    parts.append(f"{result['device']}, {result['date']}.")
    return "\n\n".join(parts) + "\n"


def _times(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count > 1 else ''}"


def accuracy_plot(name: str, result: Mapping[str, Any]) -> Plot:
    """Accuracy on all classes so far against their number, a curve for each arm."""
    series = []
    for arm, one in result["arms"].items():
        y, low, high = ([point[key] for point in one["curve"]] for key in ("estimate", "low", "high"))
        series.append(Series(arm, one["seen"], y, low, high))
    axes = Axes(
        f"New classes in sessions: {name}", "classes so far", "accuracy on all of them", log_x=False,
        y_range=(-0.03, 1.05), percent=True,
    )  # fmt: skip
    return curves(series, axes, "Accuracy on all classes so far after each session, one curve for each arm.")


def write_class_incremental(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write class-incremental.json, .md and a plot for each model; returns their paths."""
    plots = {
        folder / "plots" / f"class-incremental-{file_name(name)}.png": accuracy_plot(name, one)
        for name, one in result["models"].items()
    }
    page = markdown(result)
    write_json(folder / "class-incremental.json", result)
    write_text(folder / "class-incremental.md", page)
    for path, plot in plots.items():
        plot.write(path)
    return [folder / "class-incremental.json", folder / "class-incremental.md", *plots]
