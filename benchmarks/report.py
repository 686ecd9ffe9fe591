"""The tables of a result, printed and in the README."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from settings import BARS
from verdicts import verdicts

from nestor.files import write_text


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """One line a measurement: what, tokens/s, ratio with quartiles, decoding tokens/s, peak memory."""

    def cells(what: str, timing: dict[str, Any], decode: str, peak: int) -> list[str]:
        ratio = "-"
        if "ratio_median" in timing:
            low, high = timing["ratio_quartiles"]
            ratio = f"{timing['ratio_median']:.2f} ({low:.2f} to {high:.2f})"
        return [what, f"{timing['tokens_per_second']:,.0f}", ratio, decode, f"{peak / 2**20:,.0f}"]

    lines = [
        cells(
            f"layer {name}",
            r["forward_backward"],
            f"{r['decode']['tokens_per_second']:,.0f}",
            r["peak_bytes"],
        )
        for name, r in result.get("layers", {}).items()
    ]
    return lines + [
        cells(f"model {name}", r["step"], "-", r["peak_bytes"])
        for name, r in result.get("models", {}).items()
    ]


HEADER = ["", "training tokens/s", "time over the reference's", "decoding tokens/s", "peak MiB"]


def remarks_of(result: dict[str, Any]) -> list[str]:
    lines = []
    if "length" in result and "exponent" in result["length"]:
        r = result["length"]
        longest = list(r["seconds_min"])[-1]
        lines.append(
            f"Time of the memory layer to T = {longest}: T^{r['exponent']:.2f}; a token costs "
            f"{r['per_token_last_over_first']:.2f} times what it does at the shortest T."
        )
    for name, r in result.get("long", {}).items():
        state = "all outputs and state finite" if r["finite"] else "NOT FINITE"
        lines.append(f"{r['tokens']:,} tokens in one call, {name} settings: {state}.")
    return lines


def markdown(result: dict[str, Any]) -> str:
    """The table of benchmarks/README.md."""
    table = ["| " + " | ".join(line) + " |" for line in [HEADER, ["---"] * len(HEADER), *rows_of(result)]]
    about = result["about"]
    shape = about["settings"]
    head = (
        f"{about['device']}, {shape['threads']} threads, "
        f"PyTorch {about['versions']['torch']}, {about['date']}; "
        f"B{shape['batch']} x T{shape['tokens']}, layers of width {shape['dim']}, models of size "
        f"{shape['size']}, {shape['dtype']}, {shape['repeats']} rounds."
    )
    parts = (
        [head, "", *table, "", *(f"- {line}" for line in remarks_of(result)), ""] if rows_of(result) else []
    )
    bars = bars_markdown(result)
    if bars:
        place = next(result[name]["about"] for name in BARS if name in result)
        parts += [f"The bars, on {place['device']}, {place['date']}.", "", bars, ""]
    return "\n".join(parts)


# Columns of speed over that of another layer: keys of a result, and what they are called.
RATIOS = {
    "speed_over_kda": "over KDA",
    "speed_over_nestor-kda": "over nestor-kda",
    "speed_over_titans-pytorch-x4": "over titans-pytorch x4",
}
BAR_HEADER = ["layer at B x T", "tokens/s", *RATIOS.values(), "peak MiB"]


def bar_rows_of(result: dict[str, Any]) -> list[list[str]]:
    """One line a layer and shape of the section shapes, one a model and T of training and captured."""
    lines = []
    for shape, layers in result.get("shapes", {}).items():
        for name, one in layers.items() if "x" in shape else ():
            speed, *others = (one.get(key) for key in ("tokens_per_second", *RATIOS))
            peak = one.get("peak_bytes")
            cells = ["-" if ratio is None else f"{ratio:.2f}" for ratio in others]
            rate = one.get("failure", "-") if speed is None else f"{speed:,.0f}"
            lines.append([f"{name} {shape}", rate, *cells, "-" if peak is None else f"{peak / 2**20:,.0f}"])
    steps = {f"processes: {n}": one for n, one in result.get("training", {}).items() if n.isdigit()}
    steps |= {"captured": result["captured"]} if "captured" in result else {}
    for how, contexts in steps.items():
        for context, models in contexts.items():
            for name, one in models.items() if context.isdigit() else ():
                speed, mfu, peak = (one.get(k) for k in ("tokens_per_second", "mfu", "step_peak_bytes"))
                rate = one.get("failure", "-") if speed is None else f"{speed:,.0f}"
                rate += "" if mfu is None else f" (MFU {mfu:.1%})"
                size = "-" if peak is None else f"{peak / 2**20:,.0f}"
                how_here = "compiled, recomputed" if how == "captured" and not one["captured"] else how
                lines.append([f"model {name} T{context}, {how_here}", rate, *["-"] * len(RATIOS), size])
    return lines


def bars_markdown(result: dict[str, Any]) -> str:
    """Tables of the bars; empty if the result has none of their sections."""

    def table(header: list[str], rows: list[list[str]]) -> str:
        return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])

    lines = bar_rows_of(result)
    found = [[v.bar, v.wanted, v.measured, "yes" if v.met else "no"] for v in verdicts(result)]
    parts = [table(BAR_HEADER, lines)] if lines else []
    parts += [table(VERDICT_HEADER, found)] if found else []
    return "\n\n".join(parts)


VERDICT_HEADER = ["bar", "wanted", "measured", "met"]


def print_tables(result: dict[str, Any], console: Console) -> None:
    found = [[v.bar, v.wanted, v.measured, "yes" if v.met else "no"] for v in verdicts(result)]
    for header, rows in (
        (HEADER, rows_of(result)),
        (BAR_HEADER, bar_rows_of(result)),
        (VERDICT_HEADER, found),
    ):
        table = Table(*header)
        for line in rows:
            table.add_row(*line)
        if table.row_count:
            console.print(table)
    for line in remarks_of(result):
        console.print(line)


START, END = "<!-- tables of layers.py -->", "<!-- end -->"


def update_readme(readme: Path) -> None:
    """Write the tables of all results of this benchmark between the marks of the README."""
    text = readme.read_text(encoding="utf-8")
    files = sorted((readme.parent / "results").glob("layers-*.json"))
    tables = [markdown(json.loads(file.read_text(encoding="utf-8"))) for file in files]
    before, rest = text.split(START)
    write_text(readme, f"{before}{START}\n\n" + "\n".join(tables) + END + rest.split(END)[1])
