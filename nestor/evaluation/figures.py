"""The plots of each suite, from the results as they stand in the JSON.

Every function takes `{model name: result}` and returns figures in the order in which a report shows them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nestor.evaluation.plots import Axes, Mark, Plot, Series, curves, heatmap, short_count

Results = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Figure:
    """A plot with the name of its file (without .png) and what a reader should see in it."""

    name: str
    plot: Plot
    caption: str


def reach_marks(models: Sequence[Mapping[str, Any]]) -> list[Mark]:
    """The attention window and the attention reach of each described model, once where models share them."""
    marks: dict[tuple[float, str], Mark] = {}
    described = [(i, m) for i, m in enumerate(models) if m.get("attention_reach")]
    for kind, field in (("window", "attention_window"), ("reach", "attention_reach")):
        shared = {m[field] for _, m in described}
        for number, model in described:
            value = model[field]
            if value <= 1:
                continue
            alone = len(shared) > 1
            label = f"attention {kind} {value}" + (f" ({model['name']})" if alone else "")
            marks.setdefault((value, kind), Mark(value, label, number if alone else None))
    return list(marks.values())


def perplexity_figures(results: Results, models: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Bits per byte by position, and by context length where it was measured."""
    first = next(iter(results.values()))
    unit, log_x = first["unit"], first["by_position"]["scale"] == "log"
    marks = reach_marks(models) if unit == "tokens" or all(m["tokenizer"] == "bytes" for m in models) else []
    by_position = []
    for name, result in results.items():
        edges = list(result["by_position"]["edges"])
        # The first bin begins at 0, which a logarithmic axis does not have.
        drawn = [max(edges[1] / 2, 1), *edges[1:]] if log_x else edges
        estimate, low, high = _columns(result["by_position"]["bits_per_byte"])
        by_position.append(Series(name, drawn[:-1], estimate, low, high, steps=drawn))
    figures = [
        Figure(
            "perplexity-by-position",
            curves(
                by_position,
                Axes(
                    "Bits per byte by position",
                    f"position in the text ({unit}{', log scale' if log_x else ''})",
                    "bits per byte (lower is better)",
                    log_x=log_x,
                    marks=marks,
                ),
                "Bits per byte against the position in the text, one curve for each model.",
            ),
            "Each step is the mean over all tokens at these positions, read from the beginning of the "
            "passage with the State carried. Bands are 95 % bootstrap intervals. Left of the dashed lines "
            "attention alone can see the whole text.",
        )
    ]
    by_context, carried = [], []
    for number, (name, result) in enumerate(results.items()):
        rows = [row for row in result["by_context"]["contexts"] if row["bits_per_byte"] is not None]
        if not rows:
            continue
        estimate, low, high = _columns([row["bits_per_byte"] for row in rows])
        by_context.append(Series(name, [row["context"] for row in rows], estimate, low, high))
        whole = result["by_context"]["carried"]
        if whole is not None:
            carried.append(Mark(whole["estimate"], f"{name}, whole text", number, horizontal=True))
    if by_context:
        block = first["by_context"]["block"]
        figures.append(
            Figure(
                "perplexity-by-context",
                curves(
                    by_context,
                    Axes(
                        "Bits per byte by length of context",
                        f"context given before the scored block ({unit}, log scale)",
                        "bits per byte (lower is better)",
                        marks=[*marks, *carried],
                    ),
                    "Bits per byte of the same tokens against the context they are given.",
                ),
                f"The same blocks of {block} {unit} each time, read from a fresh State that starts so "
                f"many {unit} before the block. Dotted: the State carried from the beginning of the text.",
            )
        )
    return figures


def recall_figures(results: Results, models: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Exact match and answer bits of planted facts against distance."""
    marks = reach_marks(models)
    exact: list[Series] = []
    bits: list[Series] = []
    unstated: list[Series] = []
    guess = next(iter(results.values()))["guess_bits"]
    for name, result in results.items():
        rows = [row for row in result["distances"] if row["n"]]
        if not rows:
            continue
        x = [row["distance"] for row in rows]
        exact.append(Series(name, x, *_columns([row["exact_match"] for row in rows])))
        bits.append(Series(name, x, *_columns([row["answer_bits"] for row in rows])))
        without = _columns([row["unstated_bits"] for row in rows])[0]
        unstated.append(Series(f"{name}, never stated", x, without, of=len(bits) - 1))
    if not exact:
        return []
    x_label = "distance from the fact to the question (tokens, log scale)"
    return [
        Figure(
            "recall-by-distance",
            curves(
                exact,
                Axes(
                    "Recall of a planted fact", x_label, "answers exactly right", y_range=(-0.03, 1.05),
                    percent=True, marks=marks,
                ),
                "Share of exactly right answers against the distance of the fact, one curve for each model.",
            ),
            "A fact is stated in real text and asked for so many tokens later. An answer counts if greedy "
            "decoding gives all of it. Bands are 95 % Wilson intervals. Right of the attention reach "
            "nothing but the memory can know the answer.",
        ),
        Figure(
            "recall-answer-bits",
            curves(
                [*bits, *unstated],
                Axes(
                    "Surprise at the right answer", x_label, "bits of the whole answer (lower is better)",
                    marks=[*marks, Mark(guess, f"guessing, {guess:.1f} bits", None, horizontal=True)],
                ),
                "Bits of the right answer against the distance of the fact.",
            ),
            "The same questions: -log2 of the probability of the right answer. It moves before exact "
            "match does: who guesses needs the bits of the dotted line on average, so what is below it was "
            "kept. Dotted in colour: at the same places, questions about a fact that was never stated.",
        ),
    ]  # fmt: skip


def mqar_figures(results: Results, models: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Accuracy of multi-query associative recall by distance."""
    series = []
    for name, result in results.items():
        edges = [max(result["edges"][1] / 2, 1), *result["edges"][1:]]
        series.append(Series(name, edges[:-1], *_columns(result["accuracy"]), steps=edges))
    chance = next(iter(results.values()))["chance"]
    return [
        Figure(
            "mqar-by-distance",
            curves(
                series,
                Axes(
                    "Multi-query associative recall",
                    "distance from the pair to the query (tokens, log scale)",
                    "values exactly right",
                    y_range=(-0.03, 1.05),
                    percent=True,
                    marks=[*reach_marks(models), Mark(chance, "chance", None, horizontal=True)],
                ),
                "Accuracy of associative recall against distance.",
            ),
            "Key-value pairs of plain tokens, then every key again: only a model that was trained on this "
            "task can do it. Bands are 95 % bootstrap intervals over documents.",
        )
    ]


def needle_figures(results: Results, models: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """A heatmap for each model and variant."""
    del models
    figures = []
    for name, result in results.items():
        for variant in result["variants"]:
            grid = [
                [None if cell["exact_match"] is None else cell["exact_match"]["estimate"] for cell in row]
                for row in result["grid"][variant]
            ]
            per_cell = max(cell["n"] for row in result["grid"][variant] for cell in row)
            figures.append(
                Figure(
                    f"needle-{file_name(name)}-{variant}",
                    heatmap(
                        grid,
                        rows=[f"{100 * depth:.0f} %" for depth in result["depths"]],
                        columns=[short_count(length) for length in result["lengths"]],
                        title=f"{name}: {variant}",
                        x="length of the text (tokens)",
                        y="depth of the needle",
                        label="exactly right",
                        alt=f"Share of exactly right answers of {name} for the {variant} needle, by length "
                        f"and depth.",
                    ),
                    f"Percent of {per_cell} needles in each cell that greedy decoding retrieves exactly.",
                )
            )
    return figures


def remembrance_figures(results: Results, models: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Effective remembrance by tokens dropped and by tokens kept, each up to half of the text."""
    dropped: list[Series] = []
    kept: list[Series] = []
    for name, result in results.items():
        columns = _columns(result["remembrance"])
        counts = {"dropped": result["dropped"], "kept": [result["length"] - n for n in result["dropped"]]}
        for series, numbers in ((dropped, counts["dropped"]), (kept, counts["kept"])):
            # The axes are logarithmic, and where nothing is dropped there is nothing to see.
            shown = [i for i, number in enumerate(numbers) if 0 < number <= (result["length"] + 1) // 2]
            estimate, low, high = ([values[i] for i in shown] for values in columns)
            series.append(Series(name, [numbers[i] for i in shown], estimate, low, high))
    lengths = " and ".join(f"{one:,}" for one in sorted({result["length"] for result in results.values()}))
    y, above = "effective remembrance (total variation)", (-0.03, 1.05)
    return [
        Figure(
            "remembrance-by-dropped",
            curves(
                dropped,
                Axes(
                    f"Effective remembrance of {lengths} tokens", "first tokens dropped (log scale)", y,
                    y_range=above,
                ),
                "Effective remembrance against the number of first tokens that are dropped.",
            ),
            "How far the prediction after the text moves when its first tokens are not read: 0, not at all; "
            "1, to another altogether. In a long text the left should be near 0; where it is high, the first "
            "tokens still steer a state to which training never led. Numbers that are no multiple of a "
            "memory's chunk also move its chunks. Bands are 95 % bootstrap intervals.",
        ),
        Figure(
            "remembrance-by-kept",
            curves(
                kept,
                Axes(
                    f"Effective remembrance of {lengths} tokens", "last tokens kept (log scale)", y,
                    y_range=above, marks=reach_marks(models),
                ),
                "Effective remembrance against the number of last tokens that are kept.",
            ),
            "The same against how much of the text is still read. What is left right of the attention reach "
            "is the memory's doing; a model without one has 0 there.",
        ),
    ]  # fmt: skip


def file_name(name: str) -> str:
    """`name` with everything but letters, digits, dot, dash and underscore replaced by a dash."""
    return (
        "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name).strip(".-")
        or "model"
    )


def _columns(intervals: Sequence[Mapping[str, Any]]) -> tuple[list, list, list]:
    return tuple([interval[key] for interval in intervals] for key in ("estimate", "low", "high"))  # type: ignore[return-value]
