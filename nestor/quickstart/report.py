"""The report of a quickstart: the evaluation's own, with training, lasting memory and samples around it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nestor.evaluation.figures import Figure
from nestor.evaluation.plots import Axes, Series, curves
from nestor.evaluation.report import Report, Section
from nestor.evaluation.summary import build_report, figures_of
from nestor.files import write_json
from nestor.quickstart.recipe import Entrant
from nestor.quickstart.samples import TEMPERATURE
from nestor.quickstart.tables import summary

_ORDER = ("Summary", "Recall of facts", "Perplexity", "Memory that lasts", "Training", "Samples")


def write_everything(result: Mapping[str, Any], folder: Path) -> Path:
    """Write results.json, plots/*.png and report.html into `folder`; returns the path of the report."""
    write_json(folder / "results.json", result)
    figures = figures_of(result["evaluation"])
    training = training_figures(result["training"])
    for figure in [*figures, *training]:
        figure.plot.write(folder / "plots" / f"{figure.name}.png")
    return make_report(result, figures, training).write(folder / "report.html")


def make_report(result: Mapping[str, Any], figures: Sequence[Figure], training: Sequence[Figure]) -> Report:
    """The whole page."""
    evaluation = result["evaluation"]
    report = build_report(evaluation, figures, result["commands"])
    names = [model["name"] for model in evaluation["models"]]
    report.title = f"Nestor quickstart: {' and '.join(names)}"
    _summary(report.section("Summary"), result)
    _memory(report.section("Memory that lasts"), result["memory"])
    _training(report.section("Training"), result["training"], training)
    samples = report.section("Samples")
    samples.blocks[:0] = _written(result["samples"])
    settings = report.section("Settings")
    settings.settings("Quickstart", result["settings"], open=True)
    for run in result["training"]:
        settings.settings(f"Training of {run['name']} here", run["config"])
        if run["origin"]:
            settings.settings(f"Training of {run['name']} before", run["origin"])
    rest = [section for section in report.sections if section.title not in _ORDER]
    report.sections = [report.section(title) for title in _ORDER] + rest
    return report


def training_figures(runs: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Loss, and bits per byte of held-out text, by tokens of training."""
    found = []
    for name, key, title, label, caption in (
        (
            "training-loss",
            "loss",
            "Loss in training",
            "nats per token, text and questions (lower is better)",
            "Mean of the steps since the last point, on all sources of the recipe.",
        ),
        (
            "training-bits-per-byte",
            "valid_bits_per_byte",
            "Held-out text in training",
            "bits per byte (lower is better)",
            "Text that training does not see, in segments of the training length.",
        ),
    ):
        series = []
        for run in runs:
            points = [(row["step"], row[key]) for row in run["curve"] if row.get(key) is not None]
            if points:
                steps, values = zip(*points, strict=True)
                series.append(Series(run["name"], steps, values))
        if series:
            axes = Axes(title, "step of the training on this machine", label, log_x=False)
            found.append(Figure(name, curves(series, axes), caption))
    return found


def _summary(section: Section, result: Mapping[str, Any]) -> None:
    section.blocks.clear()
    section.facts(_headlines(result))
    for sentence in result["verdict"]:
        section.text(sentence)
    section.table(*summary(result), "Estimates with 95 % intervals.")
    before = [run for run in result["training"] if run["before"]]
    if before:
        told = "; ".join(f"{run['name']}: {run['before']}" for run in before)
        section.text(
            f"Both models were trained before, by the same recipes: {told}. This machine went on from there.",
            note=True,
        )
    for part in result["evaluation"]["results"].values():
        for model in part["models"].values():
            for note in model["notes"]:
                section.text(note + ".", note=True)


def _headlines(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    evaluation, memory = result["evaluation"], result["memory"]
    first, second = (model["name"] for model in evaluation["models"])
    asked = memory["asked"]
    facts = []
    beyond = evaluation["beyond_reach"]
    if beyond is not None:
        recall, bits = beyond["recall"], beyond["bits_per_byte"]
        facts += [
            (
                f"Recall from {beyond['distance']:,} tokens back, {second}",
                f"{100 * recall[second]['estimate']:.0f} %",
                f"{first}: {100 * recall[first]['estimate']:.0f} %",
            ),
            (
                f"Bits per byte from position {beyond['reach']:,} on, {second}",
                f"{bits[second]['estimate']:.3f}",
                f"{first}: {bits[first]['estimate']:.3f}",
            ),
        ]
    total = len(asked[second]["answers"])
    return [
        *facts,
        (
            f"Answers of a new process from the saved memory, {second}",
            f"{asked[second]['right']} of {total}",
            f"after /forget: {memory['after_forget']['right']} of {total}; "
            f"{first}: {asked[first]['right']} of {total}",
        ),
    ]


def _memory(section: Section, memory: Mapping[str, Any]) -> None:
    name = memory["remembering"]
    section.text(
        f"Process {memory['process']} let each model read a page of {memory['page_tokens']:,} tokens, once, "
        f"and saved its State. {len(memory['asked'][name]['answers'])} facts stand at its beginning, "
        f"{memory['distance']:,} tokens of real text after them. The names are kept out of all training. "
        "Then new processes loaded a State and answered; the text was not given to them."
    )
    section.sample({"facts on the page": memory["facts"].rstrip()}, "What was read")
    for model, asking in memory["asked"].items():
        size = memory["memory_bytes"][model] / 1000
        _asking(section, f"{model}, from its saved State of {size:,.0f} kB", asking)
    forget = memory["forget"]
    section.heading("Forgetting")
    section.commands([("A process is told to forget a copy of that memory:", forget["command"])])
    gone = "is still there" if forget["file_left"] else "is gone"
    section.text(f"It said: {' '.join(forget['said'])} The file {gone}.")
    _asking(section, f"{name}, after /forget", memory["after_forget"])
    same = "the same, byte for byte" if memory["weights_unchanged"] else "NOT the same"
    section.text(f"The file of the weights is {same} before and after all this.", note=True)


def _asking(section: Section, title: str, asking: Mapping[str, Any]) -> None:
    section.heading(f"{title}: {asking['right']} of {len(asking['answers'])} right")
    section.commands([(f"Process {asking['process']}:", asking["command"])])
    section.table(
        ["question", "wanted", "given", ""],
        [
            [a["question"], a["wanted"].strip(), a["given"].strip(), "right" if a["right"] else "wrong"]
            for a in asking["answers"]
        ],
        left=(0, 1, 2, 3),
    )


def _training(section: Section, runs: Sequence[Mapping[str, Any]], figures: Sequence[Figure]) -> None:
    for run in runs:
        start = f"went on from a model trained for {run['before']}" if run["before"] else "began from scratch"
        section.text(
            f"{run['name']} {start}, and was trained here for {run['steps']:,} steps on {run['tokens']:,} "
            f"tokens by the recipe {run['recipe']}."
        )
    for figure in figures:
        section.plot(figure.plot, figure.caption)


def _written(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    section = Section("", "")
    section.text(
        "Both models go on from the same beginning, which is held out; "
        f"sampled at temperature {TEMPERATURE:g}."
    )
    for sample in samples:
        section.sample({"beginning": sample["prompt"], "written": sample["text"]}, sample["model"])
    section.text("Questions of the recall suite, one of each distance:")
    return section.blocks


def commands(output: Path, entrants: Sequence[Entrant]) -> list[tuple[str, str]]:
    """How to go on: (words, command line)."""
    finals = [shlex.quote(str(entrant.final)) for entrant in entrants]
    models, memory = " ".join(finals), shlex.quote(str(output / "memory" / "mine.safetensors"))
    longer = shlex.quote(f"{output}-long")
    found = [
        ("Talk with the model whose memory lasts:", f"nestor chat {finals[-1]} --memory {memory}"),
        ("Train for longer here:", f"nestor quickstart --minutes 60 --output {longer}"),
        ("Measure with narrower intervals:", f"nestor eval {models} --suite recall --seeds 1 2 3 4"),
        ("Look for needles of other kinds:", f"nestor eval {models} --suite needle"),
    ]
    for entrant in entrants:
        made = entrant.origin.training.get("command") if entrant.origin else None
        recipe = shlex.quote(entrant.recipe)
        found.append(
            (f"Make the model that {entrant.name} went on from:", made)
            if made
            else (f"Train {entrant.name} by its whole recipe:", f"nestor train {recipe}")
        )
    return found
