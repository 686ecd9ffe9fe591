"""Table 4 as Markdown and its plots, from the JSON alone."""

from __future__ import annotations

import math
from typing import Any

from novel_runs import about_training, chosen
from variants import PAPER_CHUNK, PAPER_CHUNKS

from nestor.evaluation.plots import Axes, Mark, Plot, Point, Series, curves, scatter
from nestor.evaluation.report import with_interval

SOURCES = {
    "Titans": "Titans, arXiv 2501.00663, table 5, about 400 M parameters, mean of two perplexities",
    "Hope": "Nested Learning, arXiv 2512.24695, table 6, about 1.3 B parameters, mean of two perplexities",
}


def table(results: dict[str, Any]) -> str:
    """The comparisons, the models and the matrix of chunk sizes, with what the columns mean."""
    settings = results["settings"]
    parts = [f"# Ablations, {settings['size']}\n\n{about_training(settings)}"]
    for name in dict.fromkeys(one["table"] for one in results["comparisons"]):
        parts.append(comparisons(name, results))
    if results["chunks"]:
        parts.append(chunks(results))
    parts.append(models(results))
    parts.append(f"Run on: {'; '.join(results['places'])}; {results['date']}.")
    return "\n\n".join(parts) + "\n"


def comparisons(name: str, results: dict[str, Any]) -> str:
    """What the parts of a model are worth, and what the paper has."""
    lines = [
        "| without | compared with | bits a byte | change | change, long | paper | paper's change |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for one in results["comparisons"]:
        if one["table"] == name:
            bits = results["models"][one["variant"]]["bits_per_byte"]
            lines.append(
                f"| {one['part']} | {one['base']} | {with_interval(bits)} | {share(one['change'])} | "
                f"{share(one['long_change'])} | {of_paper(one['paper'])} |"
            )
    return (
        f"## {name}\n\n"
        f"Change: of bits a byte, against the model that has the part; long: in the last stretch of the "
        f"long documents. Paper: {SOURCES[name]}; its change is that of the logarithm of the perplexity.\n\n"
        + "\n".join(lines)
    )


def of_paper(paper: dict[str, Any] | None) -> str:
    """Two cells: the paper's perplexities, and the change of their logarithm."""
    if paper is None:
        return "- | -"
    return f"{paper['without']:.2f} for {paper['full']:.2f} | {100 * paper['change']:+.1f} %"


def models(results: dict[str, Any]) -> str:
    """Every model with its number."""
    lines = ["| model | | bits a byte | learning rate | parameters |", "|---|---|---:|---:|---:|"]
    lines += [
        f"| {name} | {row['about']} | {with_interval(row['bits_per_byte'])} | {chosen(row)} | "
        f"{row['parameters']['non_embedding'] / 1e6:.2f} M |"
        for name, row in results["models"].items()
    ]
    missing = "".join(f"\n- {name}: left out, {why}." for name, why in results["left_out"].items())
    return "## Models\n\n" + "\n".join(lines) + (f"\n{missing}" if missing else "")


def chunks(results: dict[str, Any]) -> str:
    """The matrix: trained at a chunk size, run at others."""
    at = list(results["chunks"][0]["run"])
    lines = ["| trained at | " + " | ".join(f"run at {one}" for one in at) + " |"]
    lines.append("|---:|" + "---:|" * len(at))
    for row in results["chunks"]:
        lines.append(
            f"| {row['trained']} | " + " | ".join(with_interval(row["run"][one]) for one in at) + " |"
        )
    paper = [
        f"{100 * (math.log(PAPER_CHUNKS[int(one)]) / math.log(PAPER_CHUNKS[PAPER_CHUNK]) - 1):+.0f} %"
        if int(one) in PAPER_CHUNKS
        else ""
        for one in at
    ]
    lines.append(f"| paper, {PAPER_CHUNK} | " + " | ".join(paper) + " |")
    return (
        "## Chunk sizes\n\n"
        "Bits a byte of titans-lmm, run with other chunks than it was trained with. Paper: TNT, arXiv "
        "2511.07343, a Titans of 550 M parameters, as the change of the logarithm of its perplexity.\n\n"
        + "\n".join(lines)
    )


def share(interval: dict[str, Any]) -> str:
    """A share in percent, with its sign and interval."""
    if interval["estimate"] is None:
        return "-"
    text = f"{100 * interval['estimate']:+.2f} %"
    if interval["low"] is None:
        return text
    return f"{text} [{100 * interval['low']:+.2f}, {100 * interval['high']:+.2f}]"


def plots(results: dict[str, Any]) -> dict[str, Plot]:
    """Our changes against the papers', and bits a byte by the chunk that a model is run with, by name."""
    found = {}
    for name in dict.fromkeys(one["table"] for one in results["comparisons"]):
        mine = [
            one
            for one in results["comparisons"]
            if one["table"] == name and one["paper"] and one["change"]["estimate"] is not None
        ]
        if mine:
            found[name.lower()] = scatter(
                [point(one) for one in mine],
                Axes(
                    f"What the parts of {name} are worth", "change of the loss in the paper, %",
                    "change of bits a byte here, %", log_x=False,
                    marks=[Mark(0.0, "no change", horizontal=True)],
                ),
                f"For each part of {name}, how much the loss grows without it, here and in the paper.",
            )  # fmt: skip
    if results["chunks"]:
        found["chunks"] = curves(
            [by_chunk(row) for row in results["chunks"]],
            Axes(
                "Bits a byte by the chunk size of the run", "chunk size of the run, tokens",
                "bits a byte",
                marks=[
                    Mark(row["trained"], f"trained at {row['trained']}", series=number)
                    for number, row in enumerate(results["chunks"])
                ],
            ),
            "Bits a byte by the chunk size of the run, a curve for each chunk size of training.",
        )  # fmt: skip
    return found


def point(one: dict[str, Any]) -> Point:
    """Ours over the paper's, in percent."""
    change = one["change"]
    ends = tuple(None if change[end] is None else 100 * change[end] for end in ("low", "high"))
    return Point(one["part"], 100 * one["paper"]["change"], 100 * change["estimate"], y_ends=ends)


def by_chunk(row: dict[str, Any]) -> Series:
    """The curve of a model."""
    bits = list(row["run"].values())
    return Series(
        f"trained at {row['trained']}", [int(chunk) for chunk in row["run"]],
        *([one[end] for one in bits] for end in ("estimate", "low", "high")),
    )  # fmt: skip
