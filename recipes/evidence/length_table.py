"""Table 3 from the pieces of its models: rows, Markdown, plots; the last two from the JSON alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from study import over_seeds

from nestor.evaluation.plots import Axes, Mark, Plot, Series, curves
from nestor.evaluation.report import with_interval

Result = Mapping[str, Any]
BEFORE = "before"
#: Names of two numbers of a row.
RECALL = ("recall within", "recall beyond")
#: Curves of bits a byte begin here: the first tokens of a text are hard for all and would flatten the rest.
SHOWN = 32


def summarised(model: str, kept: Mapping[str | None, Sequence[Result]]) -> list[dict[str, Any]]:
    """A row for each start: every number over seeds, and minus the control of the same seeds.

    kept: the results of each start, in the order of its seeds; None is the model as it is.
    """
    rows = []
    control = [numbers(result) for result in kept.get("none", [])]
    for start, results in kept.items():
        each = [numbers(result) for result in results]
        row: dict[str, Any] = {"model": model, "start": start or BEFORE}
        row["failed"] = [result["failed"] for result in results if "failed" in result]
        row["numbers"] = {name: over_seeds([one[name] for one in each]) for name in each[0]}
        if control and start not in (None, "none"):
            row["minus_none"] = {
                name: over_seeds(
                    [_minus(one[name], base[name]) for one, base in zip(each, control, strict=True)]
                )
                for name in each[0]
            }
        row["curves"] = None if row["failed"] else averaged(results)
        rows.append(row)
    return rows


def numbers(result: Result) -> dict[str, float | None]:
    """What the table says of a piece; None for what is not known.

    Bits a byte within the training length, from there to 4 times, and in the last half of the text; the share
    of facts recalled within it and beyond; remembrance without the first sixteenth and the first half.
    """
    names = ("within", "to 4 times", "last half", *RECALL, "sixteenth", "half")
    if "failed" in result:
        return dict.fromkeys(names)
    context, length = result["context"], result["length"]
    bins = list(pairwise(result["edges"]))
    end = bins[-1][1]

    def bits(low: int, high: int) -> float | None:
        chosen = [i for i, (first, last) in enumerate(bins) if first >= low and last <= high]
        size = sum(result["bytes"][i] for i in chosen)
        return sum(result["bits"][i] for i in chosen) / size if size else None

    def recall(far: bool) -> float | None:
        known = zip(result["distances"], result["right"], strict=True)
        chosen = [right for distance, right in known if (distance > context) is far and right is not None]
        return sum(chosen) / len(chosen) if chosen else None

    def remembered(share: float) -> float:
        fitting = [i for i, count in enumerate(result["dropped"]) if count <= share * length]
        return result["remembrance"][fitting[-1] if fitting else 0]

    found = (
        bits(0, context), bits(context, 4 * context), bits(end // 2, end), recall(False), recall(True),
        remembered(1 / 16), remembered(1 / 2),
    )  # fmt: skip
    return dict(zip(names, found, strict=True))


def averaged(results: Sequence[Result]) -> dict[str, Any]:
    """The curves of a row, their means over seeds."""
    first = results[0]
    ratios = [np.asarray(r["bits"]) / np.maximum(np.asarray(r["bytes"]), 1) for r in results]
    return {
        "context": first["context"],
        "edges": first["edges"],
        "bits_per_byte": np.mean(ratios, axis=0).tolist(),
        "distances": first["distances"],
        "right": _means([r["right"] for r in results]),
        "answer_bits": _means([r["answer_bits"] for r in results]),
        "length": first["length"],
        "dropped": first["dropped"],
        "remembrance": _means([r["remembrance"] for r in results]),
    }


def table(results: Mapping[str, Any]) -> str:
    """The rows as Markdown, with what the columns mean."""
    settings, rows = results["settings"], results["rows"]
    recall = any(row["numbers"][name]["estimate"] for row in rows for name in RECALL)
    heads = ["model", "start", "bits/byte within", "to 4 times", "last half", "minus none"]
    heads += ["recall within", "beyond"] if recall else []
    heads += ["remembrance, 1/16 dropped", "1/2 dropped"]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for row in rows:
        own = row["numbers"]
        cells = [row["model"], row["start"]]
        cells += [with_interval(own[name]) for name in ("within", "to 4 times", "last half")]
        cells.append(with_interval(row["minus_none"]["last half"]) if "minus_none" in row else "")
        cells += [with_interval(own[name], as_percent=True) for name in RECALL if recall]
        cells += [with_interval(own[name]) for name in ("sixteenth", "half")]
        lines.append("| " + " | ".join(cells) + " |")
    failed = [f"{row['model']} from {row['start']}: {row['failed'][0]}" for row in rows if row["failed"]]
    missing = "".join(f"\n\nNo numbers of {one}." for one in failed)
    count = len(settings["seeds"])
    return (
        "# Length generalisation\n\n"
        f"Models before and after {settings['steps']} steps of post-training, by what its sequences started "
        f"from; none: fresh States, with as many steps. Means over {count} seed{'s' if count > 1 else ''} of "
        f"post-training with Student's 95 % intervals. Bits a byte are of held-out text within the training "
        f"length, from there to 4 times, and in the last half of {settings['multiple']} times; minus none is "
        f"of that half, on the same seeds. {planted(recall)} Remembrance: how far (total variation) the "
        f"prediction after the whole text moves without its first tokens. Under state passing and noise "
        f"{100 * settings['fresh_share']:.0f} % of segments start fresh; random noise has a deviation of "
        f"{settings['noise']:g}.\n\n"
        + "\n".join(lines)
        + f"{missing}\n\nRun on: {'; '.join(results['places'])}; {results['date']}.\n"
    )


def planted(recall: bool) -> str:
    """What is said of recall: models that learned text alone have none."""
    if recall:
        return "Recall: planted facts told right, within the training length and beyond."
    return "Of planted facts none is told right by any model."


def plots(results: Mapping[str, Any]) -> dict[str, Plot]:
    """For each model bits a byte by position, recall by distance, and remembrance, a curve for each start."""
    found = {}
    for model in dict.fromkeys(row["model"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["model"] == model and row["curves"]]
        if not rows:
            continue
        marks = [Mark(rows[0]["curves"]["context"], "training length")]
        words = f"of {model}, a curve for each start of post-training."
        found[f"{model}-position"] = curves(
            [_by_position(row) for row in rows],
            Axes(
                f"{model}: bits a byte by position",
                "token of the text (log scale)",
                "bits a byte",
                marks=marks,
            ),
            f"Bits a byte by position {words}",
        )
        if any(right for row in rows for right in row["curves"]["right"]):
            found[f"{model}-recall"] = curves(
                [Series(row["start"], row["curves"]["distances"], row["curves"]["right"]) for row in rows],
                Axes(
                    f"{model}: recall of a planted fact", "distance in tokens (log scale)",
                    "answers exactly right", y_range=(-0.03, 1.05), percent=True, marks=marks,
                ),
                f"Recall by distance {words}",
            )  # fmt: skip
        length = rows[0]["curves"]["length"]
        found[f"{model}-remembrance"] = curves(
            [_by_dropped(row) for row in rows],
            Axes(
                f"{model}: effective remembrance of {length:,} tokens", "first tokens dropped (log scale)",
                "total variation", marks=marks,
            ),
            f"Effective remembrance {words}",
        )  # fmt: skip
    return found


def _by_position(row: Mapping[str, Any]) -> Series:
    own = row["curves"]
    shown = [i for i, first in enumerate(own["edges"][:-1]) if first >= SHOWN]
    middles = [(own["edges"][i] * own["edges"][i + 1]) ** 0.5 for i in shown]
    return Series(row["start"], middles, [own["bits_per_byte"][i] for i in shown])


def _by_dropped(row: Mapping[str, Any]) -> Series:
    own = row["curves"]
    shown = [i for i, count in enumerate(own["dropped"]) if count <= own["length"] // 2]
    return Series(row["start"], [own["dropped"][i] for i in shown], [own["remembrance"][i] for i in shown])


def _means(values: Sequence[Sequence[float | None]]) -> list[float | None]:
    return [None if None in column else float(np.mean(column)) for column in zip(*values, strict=True)]  # type: ignore[arg-type]


def _minus(value: float | None, base: float | None) -> float | None:
    return None if value is None or base is None else value - base
