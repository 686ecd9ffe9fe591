"""The result of longer_lived.py: pieces put together, tables, plots."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import numpy as np
from longer_lived_settings import RESULTS, Args, Arm, kept

from nestor.errors import ConfigError, DataError
from nestor.evaluation.plots import Axes, Mark, Series, curves
from nestor.evaluation.report import with_interval
from nestor.evaluation.statistics import (
    paired_proportion_difference,
    paired_ratio_differences,
    ratio_intervals,
    wilson_interval,
)
from nestor.evaluation.suites import versions
from nestor.files import write_text

QUARTERS = 4
#: What counts as right, where it is not the likeliest choice but the likeliest for its length.
METRICS = {"openbook_qa": "acc_norm", "arc_challenge": "acc_norm"}


def collect(args: Args, documents: int) -> dict[str, Any]:
    """The result of all pieces in the folder.

    Raises:
        DataError: no piece is there. ConfigError: pieces of other settings, or of two models.
    """
    known = args.all_arms()
    found = {name: pieces for name, arm in known.items() if (pieces := _pieces(args, arm, documents))}
    if not found:
        raise DataError(f"{args.out} has no piece of a result; run some of --parts")
    each = [one for parts in found.values() for part in parts.values() for one in part.values() if one]
    if len({one["weights"] for one in each}) > 1:
        raise ConfigError(
            f"{args.out} has pieces of two models, or of two dtypes; name another folder with --out"
        )
    rows = []
    for name, arm in known.items():
        if name not in found:
            continue
        under = found.get(arm.baseline or "")
        rows.append(
            {
                "name": name,
                "about": arm.about,
                "baseline": arm.baseline if under else None,
                "cost": next(iter(found[name]["cost"].values()), None),
                "documents": _documents(found[name], under),
                "carried": _less(found[name], found.get(arm.control or "")),
                "needles": _needles(args, found[name], under),
                "zeroshot": _zeroshot(args, found[name], found.get("as it is")),
                "missing": sum(one is None for part in found[name].values() for one in part.values()),
            }
        )
    training = args.out / "training.json"
    left_out = {"out": None, "data": None, "workers": None, "device": None, "parts": None, "arms": None}
    return {
        "format": "nestor-longer-lived",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions(),
        "places": sorted({one["place"] for one in each}),
        "settings": json.loads(json.dumps(asdict(args) | left_out)),
        "documents": documents,
        "training": json.loads(training.read_text()) if training.is_file() else None,
        "arms": rows,
    }


def _pieces(args: Args, arm: Arm, documents: int) -> dict[str, dict[Any, Any]]:
    """By part and which, each piece or None; empty if none is there."""
    wanted = args.wanted(arm, documents)
    if not any(args.piece(part, arm, *which).is_file() for part, each in wanted.items() for which in each):
        return {}
    return {
        part: {which: kept(args.piece(part, arm, *which), args.settings(part, arm)) for which in each}
        for part, each in wanted.items()
    }


def _sums(parts: dict[str, dict[Any, Any]] | None) -> tuple[np.ndarray, np.ndarray] | None:
    """Bits and bytes `[documents, bins]`; None unless all documents are there."""
    found = [] if parts is None else list(parts["documents"].values())
    if not found or any(one is None for one in found):
        return None
    return np.array([one["bits"] for one in found]), np.array([one["bytes"] for one in found])


def _views(sums: tuple[np.ndarray, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """As a whole, in quarters, and in bins."""

    def grouped(x: np.ndarray, count: int) -> np.ndarray:
        return np.stack([part.sum(1) for part in np.array_split(x, count, axis=1)], 1)

    counts = {"whole": 1, "quarters": min(QUARTERS, sums[0].shape[1]), "bins": sums[0].shape[1]}
    return {name: (grouped(sums[0], n), grouped(sums[1], n)) for name, n in counts.items()}


def _documents(mine: dict[str, Any], base: dict[str, Any] | None) -> dict[str, Any] | None:
    sums = _sums(mine)
    if sums is None:
        return None
    found: dict[str, Any] = {
        name: [one.as_dict() for one in ratio_intervals(*view)] for name, view in _views(sums).items()
    }
    return found | {
        "bits": sums[0].round(4).tolist(),
        "bytes": sums[1].tolist(),
        "less": _less(mine, base),
    }


def _less(mine: dict[str, Any], base: dict[str, Any] | None) -> dict[str, Any] | None:
    """Bits a byte less than the base, as a whole, in quarters, and in bins."""
    sums, under = _sums(mine), _sums(base)
    if sums is None or under is None:
        return None
    views = _views(sums)
    return {
        name: [one.as_dict() for one in paired_ratio_differences(view, views[name])]
        for name, view in _views(under).items()
    }


def _needles(args: Args, mine: dict[str, Any], base: dict[str, Any] | None) -> list[dict[str, Any]] | None:
    if not mine["needles"]:
        return None
    rows = []
    for length in args.lengths:

        def exact(parts: dict[str, Any] | None, length: int = length) -> list[bool] | None:
            found = [None if parts is None else parts["needles"][v, length] for v in args.variants]
            return None if None in found else [right for one in found for right in one["exact"]]

        right, under = exact(mine), exact(base)
        if right is None:
            return None
        row: dict[str, Any] = {"length": length, "right": wilson_interval(sum(right), len(right)).as_dict()}
        row["variants"] = {
            variant: float(np.mean(mine["needles"][variant, length]["exact"])) for variant in args.variants
        }
        row["bits"] = float(np.mean([mine["needles"][v, length]["bits"] for v in args.variants]))
        row["depths"] = _by_depth([mine["needles"][v, length] for v in args.variants])
        row["more"] = None if under is None else paired_proportion_difference(right, under).as_dict()
        rows.append(row)
    return rows


def _by_depth(parts: list[dict[str, Any]]) -> dict[str, float]:
    """Share of right answers by depth, all variants together."""
    pairs = [pair for one in parts for pair in zip(one["depths"], one["exact"], strict=True)]
    depths = sorted({depth for depth, _ in pairs})
    return {f"{depth:g}": float(np.mean([right for d, right in pairs if d == depth])) for depth in depths}


def _zeroshot(args: Args, mine: dict[str, Any], base: dict[str, Any] | None) -> list[dict[str, Any]] | None:
    rows = []
    for task in args.tasks:
        found = mine["zeroshot"].get((task,))
        if found is None:
            continue
        metric = METRICS.get(task, "acc")
        right = [bool(x) for x in found[metric]]
        row: dict[str, Any] = {"task": task, "metric": metric}
        row["right"] = wilson_interval(sum(right), len(right)).as_dict()
        under = None if base is None or base is mine else base["zeroshot"].get((task,))
        if under is not None:
            before = [bool(x) for x in under[metric]]
            row["more"] = paired_proportion_difference(right, before).as_dict()
        rows.append(row)
    return rows or None


def write_report(result: dict[str, Any], name: str) -> str:
    """Write and return the tables; write the plots."""
    parts = [_summary(result), _documents_table(result), _needles_table(result), _zeroshot_table(result)]
    parts += [_cost_table(result)]
    text = "\n\n".join(["# A small model made longer-lived", *(part for part in parts if part)]) + "\n"
    write_text(RESULTS / f"{name}.md", text)
    for suffix, short in (("", False), ("-short", True)):
        _position_plot(result, RESULTS / f"{name}{suffix}.png", short)
    _needles_plot(result, RESULTS / f"{name}-needles.png")
    return text


def _summary(result: dict[str, Any]) -> str:
    settings, training = result["settings"], result["training"]
    lines = [
        f"{settings['model'].rstrip('/').rpartition('/')[2]}, {result['date']}, on "
        f"{'; '.join(result['places'])}. Intervals are of 95 %; differences are paired, over documents or "
        f"items, against the model as it is in the same windows.",
        "\n".join(f"- {row['name']}: {row['about']}." for row in result["arms"]),
    ]
    if training:
        first, last = training["history"][0], training["history"][-1]
        lines.append(
            f"Branches: {training['parameters']:,} parameters beside layers "
            f"{', '.join(map(str, training['layers']))}; {training['step']:,} steps, {training['tokens']:,} "
            f"tokens, {training['seconds'] / 60:.1f} minutes on {training['device']}; loss from "
            f"{first['loss']:.3f} to {last['loss']:.3f} nats a token."
        )
    missing = sum(row["missing"] for row in result["arms"])
    if missing:
        lines.append(f"{missing} pieces of these arms have not been run.")
    return "\n\n".join(lines)


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _documents_table(result: dict[str, Any]) -> str:
    arms = [row for row in result["arms"] if row["documents"]]
    if not arms:
        return ""
    count, tokens = len(arms[0]["documents"]["quarters"]), result["settings"]["tokens"]
    edges = [f"{tokens * k // count:,} to {tokens * (k + 1) // count:,}" for k in range(count)]
    rows = []
    for row in arms:
        found = row["documents"]
        less = found["less"]
        cells = [with_interval(one) for one in less["quarters"]] if less else ["-"] * count
        whole = with_interval(less["whole"][0]) if less else "-"
        rows.append([row["name"], f"{found['whole'][0]['estimate']:.4f}", whole, *cells])
    at = [f"tokens {edge}" for edge in edges]
    text = f"## {result['documents']} long documents\n\n"
    text += _table(["", "bits a byte", "less than as it is", *at], rows)
    carried = [
        [row["name"], *(with_interval(one) for view in ("whole", "quarters") for one in row["carried"][view])]
        for row in arms
        if row["carried"]
    ]
    if carried:
        text += "\n\nBits a byte less than of the same branches that begin anew with each window:\n\n"
        text += _table(["", "whole", *at], carried)
    return text


def _needles_table(result: dict[str, Any]) -> str:
    arms = [row for row in result["arms"] if row["needles"]]
    if not arms:
        return ""
    rows = []
    for row in arms:
        cells = []
        for one in row["needles"]:
            more = one["more"]
            change = f" ({100 * more['estimate']:+.0f})" if more else ""
            cells.append(with_interval(one["right"], as_percent=True) + change)
        rows.append([row["name"], *cells])
    heads = ["", *(f"{one['length']:,} tokens" for one in arms[0]["needles"])]
    kinds = ", ".join(result["settings"]["variants"])
    text = f"## Needles ({kinds}), {arms[0]['needles'][0]['right']['n']} a length\n\n" + _table(heads, rows)
    return text + "\n\nIn brackets the difference to as it is, in points."


def _zeroshot_table(result: dict[str, Any]) -> str:
    arms = [row for row in result["arms"] if row["zeroshot"]]
    if not arms:
        return ""
    tasks = {one["task"]: one["metric"] for row in arms for one in row["zeroshot"]}
    rows = []
    for row in arms:
        found = {one["task"]: one for one in row["zeroshot"]}
        cells = []
        for task in tasks:
            one = found.get(task)
            if one is None:
                cells.append("-")
                continue
            more = one.get("more")
            change = f" ({with_interval(more, as_percent=True)})" if more else ""
            cells.append(f"{100 * one['right']['estimate']:.1f} %{change}")
        rows.append([row["name"], *cells])
    text = f"## Zero-shot, {arms[0]['zeroshot'][0]['right']['n']} items of each task at most\n\n"
    about = "In brackets the difference to as it is. Levels have learned from one long document before."
    heads = [f"{task} ({metric})" for task, metric in tasks.items()]
    return text + _table(["", *heads], rows) + f"\n\n{about}"


def _cost_table(result: dict[str, Any]) -> str:
    arms = [row for row in result["arms"] if row["cost"]]
    if not arms:
        return ""
    rows = []
    for row in arms:
        cost = row["cost"]
        sizes = [cost[f"{kind}_bytes"] / 2**20 for kind in ("peak", "cache", "memory", "learned")]
        rows.append(
            [row["name"], f"{cost['tokens_per_second']:,.0f}", *(f"{size:,.1f}" for size in sizes),
             f"{cost['added']:,}"]
        )  # fmt: skip
    heads = ["", "tokens/s", "peak MiB", "keys and values", "memory", "learned weights", "parameters added"]
    return "## Cost of reading one document\n\n" + _table(heads, rows)


def _position_plot(result: dict[str, Any], path: Any, short: bool) -> None:
    """Bits a byte less than as it is, by position."""
    settings, series = result["settings"], []
    tokens, bins = settings["tokens"], settings["bins"]
    at = [tokens * (k + 0.5) / bins for k in range(bins)]
    base = next(
        (row for row in result["arms"] if row["name"] == ("as it is, short" if short else "as it is")), None
    )
    for row in result["arms"]:
        if base is None or row is base or row["name"].endswith(", short") != short or not row["documents"]:
            continue
        if not base["documents"]:
            continue
        under, mine = (
            (np.array(one["documents"]["bits"]), np.array(one["documents"]["bytes"])) for one in (base, row)
        )
        less = paired_ratio_differences(under, mine)
        series.append(
            Series(
                row["name"], at, [one.estimate for one in less], [one.low for one in less],
                [one.high for one in less],
            )
        )  # fmt: skip
    if series:
        window = settings["short" if short else "window"]
        marks = (Mark(0.0, f"as it is, windows of {window:,}", horizontal=True),)
        axes = Axes("Long documents", "token of the document", "bits a byte less", log_x=False, marks=marks)
        curves(series, axes, "Bits a byte less than the model as it is, by position.").write(path)


def _needles_plot(result: dict[str, Any], path: Any) -> None:
    """Recall by length of the text, but of controls, whose curves would lie on those of their arms."""
    series = [
        Series(
            row["name"],
            [one["length"] for one in row["needles"]],
            [one["right"]["estimate"] for one in row["needles"]],
            [one["right"]["low"] for one in row["needles"]],
            [one["right"]["high"] for one in row["needles"]],
        )
        for row in result["arms"]
        if row["needles"] and not row["name"].endswith(", short") and not row["name"].startswith("forgetful")
    ]
    if series:
        axes = Axes("Needles", "tokens of the text", "right answers", y_range=(-0.02, 1.02), percent=True)
        curves(series, axes, "Share of needles recalled, by length of the text.").write(path)
