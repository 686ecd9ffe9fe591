"""Table 2 as Markdown and its plots, from the JSON alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from models import ATTENTION

from nestor.evaluation.plots import Axes, Mark, Plot, Series, curves, heatmap, short_count
from nestor.evaluation.report import with_interval

#: Models that every plot of curves shows: ceilings, without and with convolutions, and the floor.
BASE = ("transformer", "transformer-conv", "sliding-window")
Scores = list[dict[str, Any]]


def table(results: Mapping[str, Any]) -> str:
    """Accuracy of all models, with what the columns mean."""
    settings, rows = results["settings"], results["rows"]
    count = len(settings["seeds"])
    over = (
        f"mean of {count} seeds with Student's 95 % interval"
        if count > 1
        else f"seed {settings['seeds'][0]} alone, with a 95 % interval over documents"
    )
    parts = mqar_parts(settings, rows) if is_mqar(results) else needle_parts(settings, rows)
    title, words, tables = parts
    names = "\n".join(f"- {row['model']}: {row['about']}." for row in rows)
    missing = "".join(f"\n- {name}: left out, {why}." for name, why in results["left_out"].items())
    return (
        f"# {title}\n\n{words} Each number: {over}. Learning rates with * are at an end of those tried.\n\n"
        + "\n\n".join(tables)
        + f"\n\n{names}{missing}\n\nRun on: {'; '.join(results['places'])}; {results['date']}.\n"
    )


def is_mqar(results: Mapping[str, Any]) -> bool:
    """Which of the two tasks it is."""
    return bool(results["format"].endswith("mqar"))


def mqar_parts(settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> tuple[str, str, list[str]]:
    """Title, what was done, and a table by pairs and one by length for each number of pairs there."""
    context = settings["mqar_context"]
    words = (
        f"Right answers. Models of the size {settings['mqar_size']} are trained on documents of {context:,} "
        f"tokens with {', '.join(map(str, settings['pairs']))} pairs, mixed, {settings['mqar_batch']} an "
        f"update for {settings['mqar_steps']:,} updates, of which the first {settings['mqar_short_steps']:,} "
        f"have documents of {settings['mqar_short_context']} tokens; only answers are learned. A guess "
        f"among all values is right in {100 / (settings['vocabulary'] // 3):.1f} %. "
        f"{settings['documents']} documents for each number of pairs, {settings['documents'] // 4} of the "
        f"longer ones, where keys are asked for in the second half only."
    )
    tables = [grid("By the number of pairs", rows, "answers", lambda one: f"{one['pairs']} pairs")]
    for pairs in settings["long_pairs"]:
        tables.append(
            grid(
                f"{pairs} pairs in longer documents", rows, "longer", lambda one: short_count(one["length"]),
                lambda one, pairs=pairs: one["pairs"] == pairs,
            )
        )  # fmt: skip
    return "Multi-query associative recall", words, tables


def needle_parts(
    settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> tuple[str, str, list[str]]:
    """Title, what was done, and a table for each variant."""
    words = (
        f"Needles of which every byte is right. Models of the size {settings['needle_size']} are trained on "
        f"novels of {settings['needle_context']:,} bytes in which one to eight secrets are told and asked "
        f"for, {settings['needle_batch']} an update for {settings['needle_steps']:,} updates; a byte of text "
        f"counts {settings['text_weight']:g} of one of an answer. {settings['needles']} needles at each of "
        f"five depths, in novels that were not trained on; `of 4` are among three others of their kind."
    )
    tables = [
        grid(
            f"{variant[0].upper()}{variant[1:]}", rows, "needles", lambda one: short_count(one["length"]),
            lambda one, variant=variant: one["variant"] == variant,
        )
        for variant in variants(rows)
    ]  # fmt: skip
    return "Needles in novels", words, tables


def variants(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of needles, in their order."""
    return list(dict.fromkeys(one["variant"] for row in rows for one in row["needles"]))


def grid(title: str, rows: Sequence[Mapping[str, Any]], key: str, head: Any, wanted: Any = None) -> str:
    """A table of the scores under a key, a column for each that is wanted."""
    chosen = {row["model"]: [one for one in row[key] if wanted is None or wanted(one)] for row in rows}
    heads = next(([head(one) for one in scores] for scores in chosen.values() if scores), [])
    lines = [f"## {title}", "", "| model | " + " | ".join([*heads, "learning rate", "parameters"]) + " |"]
    lines.append("|---|" + "---:|" * (len(heads) + 2))
    for row in rows:
        cells = [with_interval(one, as_percent=True) for one in chosen[row["model"]]] or ["-"] * len(heads)
        rates = [float(rate) for rate in row["tuning"]]
        edge = "*" if rates and row["learning_rate"] in (min(rates), max(rates)) else ""
        size = f"{row['parameters']['non_embedding'] / 1e6:.2f} M"
        lines.append(
            "| " + " | ".join([row["model"], *cells, f"{row['learning_rate']:g}{edge}", size]) + " |"
        )
    return "\n".join(lines)


def plots(results: Mapping[str, Any]) -> dict[str, Plot]:
    """Curves for each group of models beside transformers, and heat maps of all, by name."""
    return mqar_plots(results) if is_mqar(results) else needle_plots(results)


def mqar_plots(results: Mapping[str, Any]) -> dict[str, Plot]:
    """By the number of pairs, and by length for each number of pairs there."""
    rows, settings = results["rows"], results["settings"]
    trained = [Mark(settings["mqar_context"], "length of training")]
    found = {}
    for group, mine in groups(rows):
        scores = {row["model"]: row["answers"] for row in mine}
        axes = Axes(
            f"Associative recall by pairs, {group}", "pairs", "right answers", y_range=(0, 1), percent=True
        )
        found[f"pairs-{slug(group)}"] = drawn(scores, "pairs", axes)
        for pairs in settings["long_pairs"]:
            scores = {
                row["model"]: [one for one in (*row["answers"], *row["longer"]) if one["pairs"] == pairs]
                for row in mine
            }
            axes = Axes(
                f"Recall of {pairs} pairs by length, {group}", "tokens of the document", "right answers",
                y_range=(0, 1), percent=True, marks=trained,
            )  # fmt: skip
            found[f"length-{pairs}-{slug(group)}"] = drawn(scores, "length", axes)
    return {name: plot for name, plot in found.items() if plot is not None}


def needle_plots(results: Mapping[str, Any]) -> dict[str, Plot]:
    """By length, all variants together, and a heat map for each variant."""
    rows, context = results["rows"], results["settings"]["needle_context"]
    found: dict[str, Plot | None] = {}
    for group, mine in groups(rows):
        scores = {row["model"]: mean_by_length(row["needles"]) for row in mine}
        axes = Axes(
            f"Needles by length, mean of all variants, {group}", "bytes of the text", "needles found",
            y_range=(0, 1), percent=True, marks=[Mark(context, "length of training")],
        )  # fmt: skip
        found[f"length-{slug(group)}"] = drawn(scores, "length", axes)
    for variant in variants(rows):
        chosen = [[one for one in row["needles"] if one["variant"] == variant] for row in rows]
        lengths = [one["length"] for one in next(scores for scores in chosen if scores)]
        found[slug(variant)] = heatmap(
            [[one["estimate"] for one in scores] or [None] * len(lengths) for scores in chosen],
            rows=[row["model"] for row in rows], columns=[short_count(length) for length in lengths],
            title=f"Needles found: {variant}", x="bytes of the text", y="", label="needles found",
            alt=f"Share of needles found by model and length: {variant}.",
        )  # fmt: skip
    return {name: plot for name, plot in found.items() if plot is not None}


def mean_by_length(scores: Scores) -> Scores:
    """The mean over variants of each seed at each length; no interval, for variants share their models."""
    found = []
    for length in dict.fromkeys(one["length"] for one in scores):
        known = [one["estimate"] for one in scores if one["length"] == length]
        mean = None if None in known else sum(known) / len(known)
        found.append({"length": length, "estimate": mean, "low": None, "high": None})
    return found


def groups(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Each group with the transformers in front; alone they are a group where there is no other."""
    base = [row for row in rows if row["model"] in BASE]
    others = [row for row in rows if row["model"] not in BASE]
    names = list(dict.fromkeys(row["group"] for row in others))
    found = [(name, base + [row for row in others if row["group"] == name]) for name in names]
    return found or [(ATTENTION, base)]


def drawn(scores: Mapping[str, Scores], x: str, axes: Axes) -> Plot | None:
    """A curve for each model that has scores; None: none has."""
    series = [
        Series(
            name, [one[x] for one in mine], [one["estimate"] for one in mine], [one["low"] for one in mine],
            [one["high"] for one in mine],
        )
        for name, mine in scores.items()
        if mine
    ]  # fmt: skip
    return curves(series, axes, f"{axes.title}: {', '.join(scores)}.") if series else None


def slug(name: str) -> str:
    """A name for a file."""
    return name.lower().replace(" ", "-")
