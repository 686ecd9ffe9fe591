"""The results of `operation.py` as Markdown and plots, from the JSON alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from operation import FEATURES, RELATIONS, WIDTH
from verdicts import compared, verdict

from nestor.evaluation.plots import Axes, Mark, Plot, Series, curves
from nestor.evaluation.report import with_interval
from nestor.evaluation.statistics import mean_interval

#: What is asked for, by the key of its scores.
ASKED = {"shown": "keys that were written", "others": "keys that were not"}


def comparisons(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For every question the best memory of each family, paired by sequence."""
    found = []
    for cell in distinct(rows):
        mine = [row for row in rows if row["cell"] == cell]
        for key in ASKED:
            if key not in mine[0]:
                continue

            def gain(deep: Mapping[str, Any], linear: Mapping[str, Any], key: str = key) -> dict[str, Any]:
                return mean_interval([a - b for a, b in zip(deep[key], linear[key], strict=True)]).as_dict()

            one = compared({**cell, "asked": key}, mine, gain)
            if one is not None:
                found.append(one)
    return found


def distinct(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The questions, in their order."""
    return [dict(items) for items in dict.fromkeys(tuple(row["cell"].items()) for row in rows)]


def verdicts(results: Mapping[str, Any]) -> list[str]:
    """A sentence on capacity, and one on each relation."""
    found = results["comparisons"]
    sentences = [verdict("Random pairs", [one for one in found if one["relation"] == "random"])]
    for relation in RELATIONS:
        mine = [one for one in found if one["relation"] == relation]
        sentences.append(verdict(f"Values that are a function of keys ({relation})", mine))
    return sentences


def table(results: Mapping[str, Any]) -> str:
    """Both questions, and what follows."""
    rows, settings = results["rows"], results["settings"]
    sizes = sorted({row["bytes"] for row in rows})
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    lines = []
    for relation in ("random", *RELATIONS):
        for key, asked in ASKED.items():
            cells = [cell for cell in distinct(rows) if cell["relation"] == relation]
            if not cells or key not in next(row for row in rows if row["cell"] == cells[0]):
                continue
            title = "Random pairs" if relation == "random" else f"Values are a function of keys ({relation})"
            lines += ["", f"## {title}: {asked}", ""]
            lines += ["| pairs | passes | " + " | ".join(arms) + " | ahead |"]
            lines += ["|---:|---:|" + "---:|" * len(arms) + "---|"]
            for cell in cells:
                values = [
                    with_interval(mean_interval(row[key]).as_dict(), as_percent=True)
                    for arm in arms
                    for row in rows
                    if row["cell"] == cell and row["arm"] == arm
                ]
                ahead = [
                    f"{one['ahead']} ({with_interval(one['gain'], as_percent=True)})"
                    for one in results["comparisons"]
                    if (one["asked"], {name: one[name] for name in cell}) == (key, cell)
                ]
                lines.append(
                    f"| {cell['pairs']} | {cell['passes']} | " + " | ".join(values) + f" | {''.join(ahead)} |"
                )
    budget = settings["budget"]
    return (
        "# Deep against linear: the bare memory\n\n"
        f"Memories of {', '.join(f'{size:,}' for size in sizes)} bytes in float32, weights and momentum, for "
        f"keys and values of {WIDTH} numbers. Pairs are written token by token, in so many passes, and then "
        f"asked for. Random pairs: reads to which their own value is the nearest, of all that were written. "
        f"Functions: the share of the variance of values that is read, keys having {FEATURES} numbers; below "
        f"0 is worse than the values' mean. Mean of {budget['tested']} sequences with its 95 % interval; "
        f"{budget['trials']} settings tried for each number, on {budget['tuning']} other sequences. Ahead: "
        f"the family whose best memory, by those, has more, and what the deep one has more than the linear "
        f"one, paired by sequence.\n\n"
        + "\n".join(f"- {sentence}" for sentence in verdicts(results))
        + "\n"
        + "\n".join(lines)
        + f"\n\nRun on: {'; '.join(results['places'])}; {results['date']}.\n"
    )


def plots(results: Mapping[str, Any]) -> dict[str, Plot]:
    """Recall by the number of random pairs, for each number of passes."""
    rows, found = results["rows"], {}
    random = [row for row in rows if row["cell"]["relation"] == "random"]
    for passes in dict.fromkeys(row["cell"]["passes"] for row in random):
        series = []
        for arm in dict.fromkeys(row["arm"] for row in random):
            mine = [row for row in random if (row["arm"], row["cell"]["passes"]) == (arm, passes)]
            means = [mean_interval(row["shown"]) for row in mine]
            series.append(
                Series(
                    arm, [row["cell"]["pairs"] for row in mine], [one.estimate for one in means],
                    [one.low for one in means], [one.high for one in means],
                )
            )  # fmt: skip
        times = "one pass" if passes == 1 else f"{passes} passes"
        found[f"capacity-{passes}"] = curves(
            series,
            Axes(
                f"Random pairs read back after {times}, at equal bytes", "pairs", "pairs read back",
                y_range=(0, 1), percent=True, marks=[Mark(WIDTH, "rank of the linear memory")],
            ),
            f"Share of random pairs read back after {times}, by their number, a curve for each memory.",
        )  # fmt: skip
    return found
