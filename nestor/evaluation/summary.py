"""From the results of `suites.evaluate` to tables, figures and the report."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from nestor.evaluation import figures as drawing
from nestor.evaluation.figures import Figure
from nestor.evaluation.report import Report, Section, with_interval
from nestor.evaluation.retention.drawing import headline, retention_figures, retention_tables

TITLES = {
    "perplexity": "Perplexity",
    "recall": "Recall of facts",
    "mqar": "Associative recall",
    "needle": "Needle in a haystack",
    "remembrance": "Effective remembrance",
    "retention": "Retention",
}
_FIGURES = {
    "perplexity": drawing.perplexity_figures,
    "recall": drawing.recall_figures,
    "mqar": drawing.mqar_figures,
    "needle": drawing.needle_figures,
    "remembrance": drawing.remembrance_figures,
    "retention": retention_figures,
}


def figures_of(result: Mapping[str, Any]) -> list[Figure]:
    """All figures of a result, in the order of its suites."""
    found = []
    for suite, part in result["results"].items():
        found += _FIGURES[suite](part["models"], result["models"])
    return found


def summary_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: a model in each column, the headline number of each suite in the rows."""
    results = result["results"]
    columns = ["model", "parameters", "attention reach"]
    columns += [name for suite, part in results.items() for name in _headlines(suite, part, None)]
    rows = []
    for model in result["models"]:
        reach = "unlimited" if model["attention_reach"] is None else f"{model['attention_reach']:,}"
        row = [model["name"], f"{model['parameters']:,}", reach]
        row += [
            value
            for suite, part in results.items()
            for value in _headlines(suite, part, model["name"]).values()
        ]
        rows.append(row)
    return ["", *[row[0] for row in rows]], [
        [column, *[row[number] for row in rows]] for number, column in enumerate(columns) if number
    ]


def build_report(
    result: Mapping[str, Any], figures: Sequence[Figure], commands: Sequence[tuple[str, str]] = ()
) -> Report:
    """The report of one evaluation; `commands` are (words, command line) pairs of how to go on."""
    names = [model["name"] for model in result["models"]]
    date = result["date"].replace("T", " ").replace("+00:00", " UTC")
    report = Report(
        f"Evaluation of {' and '.join(names) if len(names) < 3 else f'{len(names)} models'}",
        subtitle=f"{date}, {result['device']}",
        footer=f"Nestor {result['versions'].get('nestor', '')}. All numbers are in results.json beside it.",
    )
    summary = report.section("Summary")
    summary.table(*summary_table(result), "Estimates with 95 % intervals.")
    for suite, part in result["results"].items():
        for model in part["models"].values():
            for note in model["notes"]:
                summary.text(note + ".", note=True)
        section = report.section(TITLES[suite])
        _TABLES[suite](section, part)
        _differences(section, suite, part)
        for figure in figures:
            if figure.name.startswith(suite):
                section.plot(figure.plot, figure.caption)
    _samples(report, result)
    settings = report.section("Settings")
    settings.settings("Evaluation", result["settings"], open=True)
    settings.settings("Versions and device", {**result["versions"], "device": result["device"]})
    for model in result["models"]:
        settings.settings(f"Model {model['name']}", model)
    if commands:
        report.section("How to go on").commands(commands)
    return report


def _headlines(suite: str, part: Mapping[str, Any], name: str | None) -> dict[str, str]:
    """Column -> cell of one model; for `name` None only the columns count."""
    model = part["models"][name if name is not None else next(iter(part["models"]))]
    if suite == "perplexity":
        return {"bits per byte": with_interval(model["bits_per_byte"])}
    if suite == "recall":
        rows = model["distances"]
        # One near, one in the middle, one far: the table says the shape of the curve.
        chosen = sorted({0, len(rows) // 2, len(rows) - 1})
        return {
            f"recall at {rows[i]['distance']:,}": with_interval(rows[i]["exact_match"], as_percent=True)
            for i in chosen
        }
    if suite == "mqar":
        return {"associative recall": with_interval(model["overall"], as_percent=True)}
    if suite == "retention":
        return headline(model)
    if suite == "remembrance":
        return {
            f"remembrance, about {words} dropped": with_interval(_without(model, share))
            for words, share in (("a sixteenth", 1 / 16), ("half", 1 / 2))
        }
    return {
        f"needle: {variant}": with_interval(cell["exact_match"], as_percent=True)
        for variant, cell in model["overall"].items()
    }


def _without(model: Mapping[str, Any], share: float) -> Mapping[str, Any]:
    """The remembrance where the most tokens are dropped that are not above that share of the text."""
    fitting = [i for i, count in enumerate(model["dropped"]) if count <= share * model["length"]]
    return model["remembrance"][fitting[-1] if fitting else 0]


def _perplexity_table(section: Section, part: Mapping[str, Any]) -> None:
    first = next(iter(part["models"].values()))
    section.text(
        f"{first['passages']} passages of {first['length']:,} {first['unit']} from {first['documents']} "
        f"document{'s' if first['documents'] != 1 else ''}. Intervals resample the {first['resampled']}s."
    )
    edges = first["by_position"]["edges"]
    rows = [
        [f"{low:,} to {high - 1:,}"]
        + [with_interval(model["by_position"]["bits_per_byte"][i]) for model in part["models"].values()]
        for i, (low, high) in enumerate(itertools.pairwise(edges))
    ]
    section.table([f"position ({first['unit']})", *part["models"]], rows, "Bits per byte by position.")
    context = first["by_context"]
    rows = [
        [f"{row['context']:,}"]
        + [
            with_interval(model["by_context"]["contexts"][i]["bits_per_byte"])
            for model in part["models"].values()
        ]
        for i, row in enumerate(context["contexts"])
    ]
    if not rows:
        return
    rows.append(["whole text"] + [with_interval(m["by_context"]["carried"]) for m in part["models"].values()])
    section.table(
        [f"context ({first['unit']})", *part["models"]],
        rows,
        f"Bits per byte of the same blocks of {context['block']} {first['unit']}, by how much comes "
        f"before them.",
    )


def _recall_table(section: Section, part: Mapping[str, Any]) -> None:
    models = part["models"]
    section.text(
        "A fact is stated in real text; after the distance it is asked for. Exact match counts answers "
        "that greedy decoding gives completely. Bits are -log2 of the probability of the right answer: who "
        f"does not know the fact needs at least {next(iter(models.values()))['guess_bits']:.1f} on average."
    )
    columns = ["distance (tokens)", "n"]
    columns += [f"{name}: {what}" for name in models for what in ("exact", "bits")]
    rows = []
    for i, row in enumerate(next(iter(models.values()))["distances"]):
        cells = [f"{row['distance']:,}", str(max(m["distances"][i]["n"] for m in models.values()))]
        for model in models.values():
            here = model["distances"][i]
            cells += [
                with_interval(here["exact_match"], as_percent=True),
                with_interval(here["answer_bits"], digits=1),
            ]
        rows.append(cells)
    section.table(columns, rows, "Exact match, and bits of the right answer, by distance.")
    section.text(
        "Right answers to questions about facts never stated (luck or a leak): "
        + ", ".join(
            f"{name} {m['control']['right']} of {m['control']['asked']}" for name, m in models.items()
        )
        + "."
    )


def _mqar_table(section: Section, part: Mapping[str, Any]) -> None:
    first = next(iter(part["models"].values()))
    section.text(
        f"{first['pairs']} pairs of plain tokens in documents of {first['document_length']:,} tokens, from "
        f"{first['vocab_size']} token ids; guessing is right in {100 * first['chance']:.1f} % of cases. A "
        f"model that "
        f"was not trained on this task has no way to know what is asked."
    )
    edges = first["edges"]
    rows = [
        [f"{low:,} to {high - 1:,}", str(first["n"][i])]
        + [with_interval(model["accuracy"][i], as_percent=True) for model in part["models"].values()]
        for i, (low, high) in enumerate(itertools.pairwise(edges))
        if first["n"][i]
    ]
    section.table(["distance (tokens)", "n", *part["models"]], rows, "Accuracy by distance.")


def _needle_table(section: Section, part: Mapping[str, Any]) -> None:
    models = part["models"]
    section.text("One sentence hidden in real text, asked for at the end of the text.")
    variants = next(iter(models.values()))["variants"]
    rows = [
        [name, *[with_interval(model["overall"][v]["exact_match"], as_percent=True) for v in variants]]
        for name, model in models.items()
    ]
    section.table(["model", *variants], rows, "Exact match over all lengths and depths.")


def _remembrance_table(section: Section, part: Mapping[str, Any]) -> None:
    models = part["models"]
    first = next(iter(models.values()))
    section.text(
        f"Total variation between what is predicted after {first['length']:,} tokens and after the same text "
        f"without its first ones; {first['passages']} passages from {first['documents']} "
        f"document{'s' if first['documents'] != 1 else ''}. Intervals resample the {first['resampled']}s."
    )
    cells = {
        name: dict(zip(model["dropped"], model["remembrance"], strict=True)) for name, model in models.items()
    }
    counts = sorted({count for model in models.values() for count in model["dropped"]})
    rows = [[f"{count:,}", *[with_interval(cells[name].get(count)) for name in models]] for count in counts]
    section.table(["first tokens dropped", *models], rows, "Effective remembrance.")


_TABLES = {
    "perplexity": _perplexity_table,
    "recall": _recall_table,
    "mqar": _mqar_table,
    "needle": _needle_table,
    "remembrance": _remembrance_table,
    "retention": retention_tables,
}


# What differences are of; others are of exact matches.
_COMPARED = {"perplexity": "bits per byte", "remembrance": "remembrance"}


def _differences(section: Section, suite: str, part: Mapping[str, Any]) -> None:
    """Paired differences against the first model, in words that say which is better."""
    rows = []
    for difference in part["differences"]:
        pair = f"{difference['model']} minus {difference['baseline']}"
        if suite == "perplexity":
            rows.append([pair, "all positions", with_interval(difference["bits_per_byte"])])
        elif suite == "remembrance":
            rows += [
                [pair, f"first {count:,} dropped", with_interval(interval)]
                for count, interval in zip(difference["dropped"], difference["remembrance"], strict=True)
            ]
        elif suite in ("mqar", "needle"):
            what = "all needles" if suite == "needle" else "all queries"
            rows.append([pair, what, with_interval(difference["exact_match"], as_percent=True)])
        else:
            rows += [
                [pair, f"distance {row['distance']:,}", with_interval(row["exact_match"], as_percent=True)]
                for row in difference["distances"]
            ]
    if rows:
        section.table(
            ["difference", "over", _COMPARED.get(suite, "exact match")],
            rows,
            "Paired differences on the same text; an interval without zero is a difference beyond chance.",
            left=(0, 1),
        )
    elif len(part["models"]) > 1 and part.get("paired") is False:
        section.text(
            "The models have different tokenizers, so their texts differ and are not paired.", note=True
        )


def _samples(report: Report, result: Mapping[str, Any]) -> None:
    for suite in ("recall", "needle"):
        part = result["results"].get(suite)
        for name, model in (part or {"models": {}})["models"].items():
            section = report.section("Samples")
            for sample in model["samples"]:
                where = (
                    f"distance {sample['distance']:,}"
                    if suite == "recall"
                    else f"{sample['variant']} in {sample['length']:,} tokens, depth {sample['depth']:.2f}"
                )
                parts = {"fact": sample["statement"]} if "statement" in sample else {}
                parts |= {
                    "question": sample["question"],
                    "wanted": sample["wanted"],
                    "given": sample["given"],
                }
                section.sample(parts, f"{name}, {where}", right=sample["right"])
