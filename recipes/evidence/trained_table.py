"""The results of `trained.py` as Markdown and plots, from the JSON alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from study import differences
from verdicts import compared, verdict

from nestor.evaluation.plots import Axes, Plot, Series, curves
from nestor.evaluation.report import with_interval

#: What a score is of, by its name.
ASKED = {
    "shown": "keys that were shown", "others": "keys that were not shown", "text": "bits a byte of novels",
}  # fmt: skip
PART = "nestor-evidence-linear-"


def comparisons(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For every score the best memory of each family, by seed."""
    found = []
    for group, pairs, asked in questions(rows):
        mine = [row for row in rows if row["group"] == group and score(row, pairs, asked) is not None]

        def gain(
            deep: Mapping[str, Any], linear: Mapping[str, Any], pairs: int = pairs, asked: str = asked
        ) -> dict[str, Any]:
            ends = [score(row, pairs, asked)["by_seed"] for row in (deep, linear)]
            # Of bits less is better.
            return differences(*(reversed(ends) if asked == "text" else ends))

        one = compared({"group": group, "pairs": pairs, "asked": asked}, mine, gain)
        if one is not None:
            found.append(one)
    return found


def questions(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, str]]:
    """Group, number of pairs and what is asked, in their order."""
    return list(
        dict.fromkeys((row["group"], one["pairs"], one["asked"]) for row in rows for one in row["scores"])
    )


def score(row: Mapping[str, Any], pairs: int, asked: str) -> Any:
    """The row's number for a question, over seeds; None: it has none."""
    return next((one for one in row["scores"] if (one["pairs"], one["asked"]) == (pairs, asked)), None)


def verdicts(results: Mapping[str, Any]) -> list[str]:
    """A sentence for each group and what is asked."""
    found, sentences = results["comparisons"], []
    for group, asked in dict.fromkeys((one["group"], one["asked"]) for one in found):
        mine = [one for one in found if (one["group"], one["asked"]) == (group, asked)]
        what = "Text" if asked == "text" else f"Trained models, {named(group)}, {ASKED[asked]}"
        sentences.append(verdict(what, mine))
    return sentences


def named(group: str) -> str:
    """A group in words."""
    return "random pairs" if group == "random" else f"the relation {group}"


def table(results: Mapping[str, Any]) -> str:
    """A table for each group and what is asked, and what follows."""
    rows, settings = results["rows"], results["settings"]
    lines = []
    for group, asked in dict.fromkeys((group, asked) for group, _, asked in questions(rows)):
        mine = [row for row in rows if row["group"] == group]
        columns = [pairs for one, pairs, what in questions(rows) if (one, what) == (group, asked)]
        title = ASKED[asked] if asked == "text" else f"{named(group)}: {ASKED[asked]}"
        heads = ["bits a byte"] if asked == "text" else [f"{pairs} pairs" for pairs in columns]
        lines += ["", f"## {title[0].upper()}{title[1:]}", ""]
        lines += ["| memory | bytes a layer | " + " | ".join([*heads, "learning rate", "parameters"]) + " |"]
        lines += ["|---|---:|" + "---:|" * (len(heads) + 2)]
        for row in mine:
            cells = [row["arm"], f"{row['bytes'][0]:,}"]
            for pairs in columns:
                cells.append(with_interval(score(row, pairs, asked), as_percent=asked != "text"))
            rates = [float(rate) for rate in row["tried"]]
            edge = "*" if rates and row["learning_rate"] in (min(rates), max(rates)) else ""
            cells += [f"{row['learning_rate']:g}{edge}", f"{row['parameters']['non_embedding'] / 1e6:.2f} M"]
            lines.append("| " + " | ".join(cells) + " |")
        ahead = [
            f"{one['ahead']} ({difference(one)}: {with_interval(one['gain'], as_percent=asked != 'text')})"
            for pairs in columns
            for one in results["comparisons"]
            if (one["group"], one["pairs"], one["asked"]) == (group, pairs, asked)
        ]
        if ahead:
            lines.append("| ahead | | " + " | ".join([*ahead, "", ""]) + " |")
    part, count = results["format"].removeprefix(PART), len(settings["seeds"])
    over = (
        f"mean of {count} seeds with Student's 95 % interval, differences by seed"
        if count > 1
        else f"seed {settings['seeds'][0]} alone, so without intervals"
    )
    said = ", ".join(f"{key} {value}" for key, value in settings.items() if key not in ("arms", "seeds"))
    return (
        f"# Deep against linear: {part}\n\n"
        f"Models whose only difference is the memory, which keeps the same bytes (float32, weights and "
        f"momentum) in all: {over}. Ahead: the family whose best memory, by the runs that chose learning "
        f"rates, is better, and by how much the deep one is, where 0 is not in the interval. Learning rates "
        f"with * are at an end of those tried. Settings: {said}.\n\n"
        + "\n".join(f"- {sentence}" for sentence in verdicts(results))
        + "\n"
        + "\n".join(lines)
        + "".join(f"\n\nLeft out: {name}, {why}." for name, why in results["left_out"].items())
        + f"\n\nRun on: {'; '.join(results['places'])}; {results['date']}.\n"
    )


def difference(one: Mapping[str, Any]) -> str:
    """Which two memories a gain is between: of bits less is better."""
    ends = (one["deep"], one["linear"])
    first, last = reversed(ends) if one["asked"] == "text" else ends
    return f"{first} less {last}"


def plots(results: Mapping[str, Any]) -> dict[str, Plot]:
    """Answers by the number of pairs, for each group and sort of key."""
    rows, found = results["rows"], {}
    for group, asked in dict.fromkeys((group, asked) for group, _, asked in questions(rows)):
        columns = [pairs for one, pairs, what in questions(rows) if (one, what) == (group, asked)]
        series = []
        for row in rows:
            scores = [score(row, pairs, asked) for pairs in columns]
            if row["group"] == group and None not in scores:
                ends = [[one[key] for one in scores] for key in ("estimate", "low", "high")]
                series.append(Series(row["arm"], columns, *ends))
        if asked == "text" or not series:
            continue
        found[f"{group}-{asked}"] = curves(
            series,
            Axes(
                f"Right answers at equal bytes, {named(group)}: {ASKED[asked]}", "pairs", "right answers",
                y_range=(0, 1), percent=True,
            ),
            f"Share of right answers by the number of pairs, {named(group)}, a curve for each memory.",
        )  # fmt: skip
    return found
