"""Table 1 as Markdown and its plots, from the JSON alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from novel_runs import about_training, chosen

from nestor.evaluation.plots import Axes, Mark, Plot, Point, Series, curves, scatter, short_count
from nestor.evaluation.report import with_interval

#: Where curves begin: the first bytes of a document are hard for all and would flatten the rest.
SHOWN = 64


def table(results: dict[str, Any]) -> str:
    """The rows, best first, with what the columns mean."""
    settings, rows = results["settings"], ranked(results["rows"])
    stretches = next((list(row["long"]["stretches"]) for row in rows if row["long"]), [])
    heads = ["model", "bits a byte", "minus transformer", *(f"long, {one}" for one in stretches)]
    heads += ["tokens/s", "GiB", "learning rate", "parameters"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for row in rows:
        speed, memory = row["tokens_per_second"], row["peak_memory"]
        cells = [row["model"], with_interval(row["bits_per_byte"])]
        own = row["model"] == "transformer"
        cells.append("" if own else with_interval(row.get("minus_transformer")))
        cells += [with_interval(row["long"]["stretches"][one]) if row["long"] else "-" for one in stretches]
        cells.append("-" if speed is None else f"{speed:,.0f}")
        cells.append("-" if memory is None else f"{memory / 2**30:.1f}")
        cells += [chosen(row), f"{row['parameters']['non_embedding'] / 1e6:.2f} M"]
        lines.append("| " + " | ".join(cells) + " |")
    names = "\n".join(f"- {row['model']}: {row['about']}." for row in rows)
    missing = "".join(f"\n- {name}: left out, {why}." for name, why in results["left_out"].items())
    return (
        f"# Language modelling, {settings['size']}\n\n"
        f"Bits a byte of novels by authors that were not trained on, read {settings['context']:,} bytes at a "
        f"time from fresh States. Long: by position in {settings['long_documents']} long documents of "
        f"{settings['long']:,} bytes, each read as one stream. {about_training(settings)} Tokens/s and GiB "
        f"are of training alone on the device{as_graph(rows)}{recomputed(rows)}.\n\n"
        + "\n".join(lines)
        + f"\n\n{names}{missing}\n\nRun on: {'; '.join(results['places'])}; {results['date']}.\n"
    )


def recomputed(rows: list[dict[str, Any]]) -> str:
    """Who saves memory by time."""
    names = [row["model"] for row in rows if row["recomputed"]]
    return f"; backward computes the inside of chunks again for {', '.join(names)}" if names else ""


def as_graph(rows: list[dict[str, Any]]) -> str:
    """Who launches a step as a whole, and who one operation after another."""
    eager = [row["model"] for row in rows if not row["captured"]]
    if len(eager) == len(rows):
        return ""
    return ", loss and gradient replayed as a CUDA graph" + (f" (but {', '.join(eager)})" if eager else "")


def ranked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lowest bits a byte first; those without a number last."""
    return sorted(rows, key=lambda row: row["bits_per_byte"]["estimate"] or float("inf"))


def plots(results: dict[str, Any]) -> dict[str, Plot]:
    """Bits a byte by position for each group of models, and against speed for all, by name."""
    rows, context = results["rows"], results["settings"]["context"]
    found = {}
    known = [row for row in rows if row["long"]]
    base = [row for row in known if row["model"] == "transformer"]
    for group in dict.fromkeys(row["group"] for row in known):
        mine = base + [row for row in known if row["group"] == group and row not in base]
        series = [by_position(row) for row in mine]
        found[f"position-{group.lower().replace(' ', '-')}"] = curves(
            series,
            Axes(
                f"Long documents, {group}: bits a byte by position", "byte of the document", "bits a byte",
                marks=[Mark(context, f"context of training, {short_count(context)}")],
                y_range=y_range(series),
            ),
            f"Bits a byte by position: {', '.join(row['model'] for row in mine)}.",
        )  # fmt: skip
    timed = [row for row in rows if row["tokens_per_second"] and row["bits_per_byte"]["estimate"]]
    if timed:
        found["speed"] = scatter(
            [
                Point(
                    row["model"], row["tokens_per_second"], row["bits_per_byte"]["estimate"],
                    y_ends=(row["bits_per_byte"]["low"], row["bits_per_byte"]["high"]),
                )
                for row in timed
            ],
            Axes("Bits a byte against speed", "tokens/s of training", "bits a byte"),
            "Bits a byte of held-out novels against tokens a second of training, a point for each model.",
        )  # fmt: skip
    return found


def by_position(row: dict[str, Any]) -> Series:
    """The curve of a model from `SHOWN` on, at the middle of each bin on a logarithmic axis."""
    pairs = list(pairwise(row["long"]["edges"]))
    shown = [(pair, one) for pair, one in zip(pairs, row["long"]["bins"], strict=True) if pair[0] >= SHOWN]
    middles = [(first * last) ** 0.5 for (first, last), _ in shown]
    return Series(
        row["model"], middles,
        *([one[end] for _, one in shown] for end in ("estimate", "low", "high")),
    )  # fmt: skip


def y_range(series: list[Series]) -> tuple[float, float]:
    """All curves, or a bit a byte of them: a model that fails beyond its context leaves through the top."""
    values = [value for one in series for value in one.y if value is not None]
    low, high = min(values), max(values)
    room = 0.05 * (min(high, low + 1) - low) + 0.01
    return low - room, min(high, low + 1) + room
