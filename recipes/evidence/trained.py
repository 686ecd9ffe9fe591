"""The parts of table 5 in which models are trained: relations, capacity and text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import associations
import relations
from arms import ARMS, memory_bytes
from associations import Answers, Associations, Question
from novels import novels, valid
from relations import Related, Relation, Relations
from runs import Model, Run
from study import TUNING_SEED, Maker, Options, about, by_validation, line, over_seeds, run_rows
from sweep import Row, Sweep

from nestor.errors import ConfigError
from nestor.jobs import Workers

PARTS = ("relations", "capacity", "text")


@dataclass
class TrainedSettings:
    """What is trained. Tasks are learned by models of the size quick, text by those of another."""

    data: Path = Path("data/text")
    """Folder with novels-train-a, -train-b and -valid."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    """Of tasks: tried once for every memory and relation."""
    chunk_size: int = 16
    """Of tasks: tokens between updates of the weights at which memories take their steps."""
    linear_width: int = 64
    """Of tasks: width of a plain linear memory's heads, which all bytes follow from."""
    relations: tuple[str, ...] = ("linear", "xor", "network")
    """Of those in relations.py."""
    shown: tuple[int, ...] = (32, 64, 128, 192)
    """Numbers of pairs that a relation is shown on."""
    relation_steps: int = 2000
    """Updates of a run; of one that tries a learning rate half of them."""
    relation_batch: int = 64
    """Documents of an update."""
    capacities: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512)
    """Numbers of random pairs."""
    vocabulary: int = 1536
    """Of random pairs: a third of these are keys and a third values."""
    capacity_context: int = 2048
    """Tokens of a document of random pairs."""
    capacity_steps: int = 2000
    """Updates of a run; of one that tries a learning rate half of them."""
    capacity_batch: int = 16
    """Documents of an update."""
    documents: int = 128
    """Of a test, for each number of pairs."""
    text_size: str = "5m"
    """Size of the models of text."""
    text_linear_width: int = 128
    """As --linear-width, in models of text."""
    text_rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    """Learning rates of models of text."""
    text_tokens: int = 2**24
    """Bytes that a run reads; one that tries a learning rate reads a quarter of them."""
    text_batch: int = 16
    """Rows of an update."""
    text_context: int = 2048
    """Bytes of a row."""


@dataclass(frozen=True)
class Plan:
    """Runs that are made in the same way.

    Attributes:
        group: what the table has them under, such as a relation.
        rows: by the name of the memory.
        validate, measure: of `study.Maker`.
        scores: from a result of `measure`, what is compared: `{(pairs, asked): number}`.
    """

    group: str
    rows: dict[str, Row]
    rates: tuple[float, ...]
    validate: Any
    measure: Any
    scores: Callable[[Mapping[str, Any]], dict[tuple[int, str], float | None]]


def measured(
    settings: TrainedSettings, part: str, arms: Sequence[str], options: Options, say: Callable[[str], None]
) -> dict[str, Any]:
    """The results of a part, the runs that are missing made now. Raises as `linear.main`."""
    plans = {"relations": relation_plans, "capacity": capacity_plans, "text": text_plans}[part](
        settings, arms, options.seeds
    )
    studied = {}
    for plan in plans:
        maker = Maker(options.weights_folder("linear") / part, plan.validate, plan.measure)
        sweep = Sweep(
            options.folder("linear") / part,
            plan.rates,
            maker,
            by_validation,
            line,
            options.device,
            say,
            maker.identity(),
        )
        studied |= {f"{plan.group}, {name}": (plan, name, sweep, row) for name, row in plan.rows.items()}
    left_out = {}
    if options.workers > 1:
        begin = {title: (sweep, row) for title, (_plan, _name, sweep, row) in studied.items()}
        left_out = run_rows(begin, Workers(options.workers, options.device), part, say)
    found, places = [], []
    for title, (plan, name, sweep, row) in studied.items():
        if title not in left_out:
            rate, tried = sweep.rate(row)
            runs = [sweep.run(row, seed) for seed in options.seeds]
            found.append(summarised(plan, name, rate, tried, runs))
            places += [one["place"] for one in (*tried.values(), *runs)]
    return {
        "format": f"nestor-evidence-linear-{part}",
        "settings": used(settings, part) | {"arms": list(arms), "seeds": list(options.seeds)},
        **about(places),
        "left_out": left_out,
        "rows": found,
    }


def summarised(
    plan: Plan,
    name: str,
    rate: float,
    tried: Mapping[float, Mapping[str, Any]],
    runs: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """A row of the table."""
    each = [plan.scores(one) for one in runs]
    asked = list(dict.fromkeys(key for one in each for key in one))
    best = min((one["valid"] for one in tried.values() if "valid" in one), default=None)
    if not tried:
        # One learning rate alone leaves nothing else to choose a memory by.
        best = next((one["valid"] for one in runs if "valid" in one), None)
    return {
        "group": plan.group,
        "arm": name,
        "family": ARMS[name].family,
        "bytes": memory_bytes(next(iter(plan.rows[name].runs.values())).model.build(0)),
        "parameters": runs[0]["parameters"],
        "learning_rate": rate,
        "tried": {f"{one:g}": result.get("valid") for one, result in tried.items()},
        "tuning": None if best is None else -best,
        "scores": [
            {"pairs": pairs, "asked": what, **over_seeds([one.get((pairs, what)) for one in each])}
            for pairs, what in asked
        ],
        "losses": [one["loss"] for one in runs],
        "seconds": [one["seconds"] for one in runs],
    }


def relation_plans(settings: TrainedSettings, arms: Sequence[str], seeds: Sequence[int]) -> list[Plan]:
    """A plan for each relation."""
    plans = []
    for name in settings.relations:
        relation = Relation(name, settings.shown)
        run = Run(
            model(settings, arms[0], relations.VOCABULARY), Relations(relation), 0.0, settings.relation_steps,
            settings.relation_batch, relation.length, 0,
        )  # fmt: skip
        rows = {
            arm: row(f"{name}-{arm}", replace(run, model=model(settings, arm, relations.VOCABULARY)), seeds)
            for arm in arms
        }
        plans.append(
            Plan(
                name, rows, settings.learning_rates,
                Related(relation, max(1, settings.documents // 4), relations.VALIDATION),
                Related(relation, settings.documents, relations.TEST), related_scores,
            )
        )  # fmt: skip
    return plans


def related_scores(result: Mapping[str, Any]) -> dict[tuple[int, str], float | None]:
    """By the number of pairs and the sort of key."""
    return {
        (one["pairs"], sort): one[sort]
        for one in result.get("answers", ())
        for sort in ("shown", "others")
        if sort in one
    }


def capacity_plans(settings: TrainedSettings, arms: Sequence[str], seeds: Sequence[int]) -> list[Plan]:
    """Random pairs: one plan."""
    vocabulary, context = settings.vocabulary, settings.capacity_context
    run = Run(
        model(settings, arms[0], vocabulary), Associations(settings.capacities, vocabulary), 0.0,
        settings.capacity_steps, settings.capacity_batch, context, 0,
    )  # fmt: skip
    rows = {arm: row(arm, replace(run, model=model(settings, arm, vocabulary)), seeds) for arm in arms}
    questions = tuple(Question(pairs, context) for pairs in settings.capacities)
    answers = partial(Answers, questions, vocabulary)
    validation = answers(count=max(1, settings.documents // 4), purpose=associations.VALIDATION)
    test = answers(count=settings.documents, purpose=associations.TEST)
    return [Plan("random", rows, settings.learning_rates, validation, test, capacity_scores)]


def capacity_scores(result: Mapping[str, Any]) -> dict[tuple[int, str], float | None]:
    """By the number of pairs."""
    return {
        (one["pairs"], "shown"): one["accuracy"] and one["accuracy"]["estimate"]
        for one in result.get("answers", ())
    }


def text_plans(settings: TrainedSettings, arms: Sequence[str], seeds: Sequence[int]) -> list[Plan]:
    """Novels: one plan."""
    steps = settings.text_tokens // (settings.text_batch * settings.text_context)
    if steps < 4:
        raise ConfigError(
            f"--text-tokens is {settings.text_tokens}; that is {steps} updates, and 4 are least"
        )
    reading = novels(settings.data)
    # Opened here once, the text is in the cache when workers want it.
    reading.identity()
    rows = {}
    for arm in arms:
        one = text_model(settings, arm)
        run = Run(one, reading, 0.0, steps, settings.text_batch, settings.text_context, 0)
        rows[arm] = row(arm, run, seeds, share=4)
    choose, report = valid(settings.data, settings.text_context)
    return [Plan("text", rows, settings.text_rates, choose, report, text_scores)]


def text_scores(result: Mapping[str, Any]) -> dict[tuple[int, str], float | None]:
    """Bits a byte."""
    return {(0, "text"): result.get("bits_per_byte")}


def model(settings: TrainedSettings, arm: str, vocabulary: int) -> Model:
    """Of tasks."""
    overrides = {"vocab_size": vocabulary, "tokenizer_name": None}
    return with_arm("quick", arm, settings.linear_width, overrides, {"chunk_size": settings.chunk_size})


def text_model(settings: TrainedSettings, arm: str) -> Model:
    """Of text, in the chunks of its size."""
    return with_arm(settings.text_size, arm, settings.text_linear_width, {}, {})


def with_arm(
    size: str, arm: str, linear_width: int, overrides: dict[str, Any], memory: dict[str, Any]
) -> Model:
    """A model of the memory alone, of the same parameters and bytes as with any other memory."""
    dim = Model("titans-lmm", size).config().hidden_size
    memory = ARMS[arm].memory(dim, linear_width) | memory
    return Model("titans-lmm", size, overrides | {"memory": memory})


def row(name: str, run: Run, seeds: Sequence[int], share: int = 2) -> Row:
    """The runs of a memory; those that try a learning rate have a `share`-th of the steps."""
    tuning = replace(run, seed=TUNING_SEED, steps=max(1, run.steps // share))
    return Row(name, tuning, {seed: replace(run, seed=seed) for seed in seeds})


def used(settings: TrainedSettings, part: str) -> dict[str, Any]:
    """The settings that a part depends on, as JSON."""
    beginnings = {
        "relations": ("relation", "shown", "documents", "learning_rates", "chunk_size", "linear_width"),
        "capacity": ("capac", "vocabulary", "documents", "learning_rates", "chunk_size", "linear_width"),
        "text": ("text",),
    }[part]
    values = {name: getattr(settings, name) for name in TrainedSettings.__dataclass_fields__}
    return json.loads(json.dumps({key: value for key, value in values.items() if key.startswith(beginnings)}))
