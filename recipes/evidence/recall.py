"""Table 2: what models with and without a memory recall, by the number of pairs and by length.

    python recipes/evidence/recall.py --tasks mqar --device cuda --workers 24
    python recipes/evidence/recall.py --tasks needles --data NOVELS --device cuda --workers 16
    python recipes/evidence/recall.py --table-only

Two tasks, for each of which models are trained from the start: multi-query associative recall of 4 to 256
pairs, asked for again in longer documents (associations.py), and needles in novels, trained at 2,048 bytes
and asked for at up to 16 times that (needles.py). All models of a task have the same non-embedding parameters
and read the same documents in the same order, short ones of pairs first. For each, every learning rate is
tried once, and the best, by validation documents of the training length, goes into a run for each seed. Each
run is a file in the folder --out, and the same command goes on where it was stopped. A task is written as
recall-TASK.json, with a table and plots.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import associations
import needles
import tyro
from associations import Answers, Associations, Question
from models import MODELS as EVIDENCE
from models import OTHERS, Entry, obstacle
from needles import Found, Needles
from novels import LONG, TRAIN, VALID, existing
from recall_table import plots, table
from runs import Run
from study import (
    TUNING_SEED,
    Maker,
    Measures,
    Options,
    about,
    by_validation,
    line,
    over_seeds,
    run_rows,
    write_table,
)
from sweep import Row, Sweep

from nestor.errors import ConfigError, NestorError, suggest
from nestor.jobs import Workers

TASKS = ("mqar", "needles")
#: Rows of the tables: to add a model, add an entry here or in models.py.
MODELS = {
    **{name: EVIDENCE[name] for name in ("transformer", "transformer-conv", "sliding-window")},
    "linear-attention": Entry(
        "titans-lmm", "one matrix to which v k^T is added, without decay or norm", OTHERS,
        overrides={
            "memory": {
                "depth": 1, "norm": "none", "inner_loss": "dot_product", "momentum": False, "forget": False,
            }
        },
    ),
    **{
        name: EVIDENCE[name]
        for name in ("ttt-linear", "titans-lmm", "titans-mag", "titans-mac", "moneta", "atlas", "hope", "kda")
    },
}  # fmt: skip


@dataclass
class Args(Options):
    """Train models on recall and measure it by the number of pairs and by length."""

    tasks: tuple[str, ...] = TASKS
    """mqar, needles."""
    models: tuple[str, ...] = tuple(name for name in MODELS if name != "kda")
    """Rows of the tables; kda, which takes minutes to compile, may be named as well."""
    data: Path = Path("data/text")
    """Folder with novels-train-a, -train-b and -heldout-long."""
    mqar_size: str = "quick"
    """Of the models."""
    mqar_rates: tuple[float, ...] = (5e-4, 1e-3, 3e-3)
    """Learning rates, tried once for every model."""
    pairs: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256)
    """Of a document; training draws them evenly."""
    vocabulary: int = 1536
    """A third of these are keys and a third values."""
    mqar_context: int = 1024
    """Tokens of a document of training."""
    mqar_steps: int = 2500
    """Updates of a run."""
    mqar_short_steps: int = 500
    """Of these, the first, which read documents of --mqar-short-context tokens."""
    mqar_short_context: int = 64
    """Tokens of a short document."""
    mqar_batch: int = 64
    """Documents of an update."""
    lengths: tuple[int, ...] = (2048, 4096, 8192, 16_384, 32_768)
    """Longer documents, asked in their second half only."""
    long_pairs: tuple[int, ...] = (4, 32)
    """Pairs of the longer ones."""
    documents: int = 64
    """Of a test; of longer ones a quarter."""
    needle_size: str = "5m"
    """Of the models."""
    needle_rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    """Learning rates, tried once for every model."""
    needle_context: int = 2048
    """Bytes of a text of training."""
    needle_lengths: tuple[int, ...] = (2048, 4096, 8192, 16_384, 32_768)
    """Bytes of the texts of a test."""
    needle_steps: int = 2000
    """Updates of a run; of one that tries a learning rate half of them."""
    needle_batch: int = 16
    """Texts of an update."""
    needles: int = 10
    """Of a test, for each variant, length and one of five depths."""

    def check(self) -> None:
        """Raises ConfigError for what is out of range or unknown."""
        self.check_options(
            "tasks",
            "models",
            "mqar_rates",
            "needle_rates",
            "pairs",
            "lengths",
            "long_pairs",
            "needle_lengths",
        )
        for kind, names, known in (("task", self.tasks, TASKS), ("model", self.models, MODELS)):
            for name in names:
                if name not in known:
                    raise ConfigError(
                        f"there is no {kind} {name!r} in this recipe; there are {', '.join(known)}. "
                        f"{suggest(name, known)}".rstrip()
                    )
        least = min(*self.mqar_rates, *self.needle_rates, self.documents // 4, self.needles // 2)
        if least <= 0 or min(self.mqar_steps, self.mqar_batch, self.needle_steps // 2, self.needle_batch) < 1:
            raise ConfigError(
                "learning rates, steps and batches must be above 0, with 4 documents and 2 needles at least"
            )
        too_long = self.mqar_short_steps and self.mqar_short_context > self.mqar_context
        if not 0 <= self.mqar_short_steps < self.mqar_steps or too_long:
            raise ConfigError(
                f"--mqar-short-steps is {self.mqar_short_steps} of {self.mqar_steps} updates, on documents "
                f"of {self.mqar_short_context} tokens, where later ones have {self.mqar_context}; give fewer "
                f"updates, and documents that are not longer"
            )


@dataclass(frozen=True)
class Plan:
    """How the runs of a task are made. `names`: the settings that it depends on begin with one of these;
    `said`: what else the table tells."""

    run: Run
    size: str
    overrides: dict[str, Any]
    tuning_steps: int
    rates: tuple[float, ...]
    validate: Any
    measure: Any
    names: tuple[str, ...]
    said: dict[str, Any] = field(default_factory=dict)


def main(args: Args, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run what is missing and write the results of the tasks, which are returned by name.

    Raises:
        ConfigError: a setting; a file in the folder from other settings. DataError: no text.
        JobError: runs of workers failed.
    """
    args.check()
    results = {}
    for task in args.tasks:
        path = args.results / f"recall-{task}.json"
        if args.table_only and not path.is_file():
            continue
        found = json.loads(path.read_text(encoding="utf-8")) if args.table_only else measured(args, task, say)
        results[task] = found
        write_table(path, found, table, plots, say)
    return results


def measured(args: Args, task: str, say: Callable[[str], None]) -> dict[str, Any]:
    """The results of a task, the runs that are missing made now."""
    plan = mqar_plan(args) if task == "mqar" else needle_plan(args)
    # What needs a GPU is among the evidence's own entries.
    left_out = {
        name: reason for name in args.models if name in EVIDENCE and (reason := obstacle(name, args.device))
    }
    for name, reason in left_out.items():
        say(f"{name} is left out: {reason}")
    rows = {name: row(args, plan, task, name) for name in args.models if name not in left_out}
    maker = Maker(args.weights_folder("recall") / task, plan.validate, plan.measure)
    sweep = Sweep(
        args.folder("recall") / task,
        plan.rates,
        maker,
        by_validation,
        line,
        args.device,
        say,
        maker.identity(),
    )
    if args.workers > 1:
        # Slower ones first, so that none is left for the end.
        begin = {name: (sweep, one) for name, one in reversed(rows.items())}
        left_out |= run_rows(begin, Workers(args.workers, args.device), task, say)
        rows = {name: one for name, one in rows.items() if name not in left_out}
    found, places = [], []
    for name, one in rows.items():
        rate, tried = sweep.rate(one)
        runs = [sweep.run(one, seed) for seed in args.seeds]
        found.append(summarised(task, name, rate, tried, runs))
        places += [result["place"] for result in (*tried.values(), *runs)]
    settings = {key: value for key, value in asdict(args).items() if key.startswith(plan.names)}
    return {
        "format": f"nestor-evidence-recall-{task}",
        "settings": json.loads(
            json.dumps(settings | plan.said | {"seeds": args.seeds, "models": args.models})
        ),
        **about(places),
        "left_out": left_out,
        "rows": found,
    }


def mqar_plan(args: Args) -> Plan:
    """Multi-query associative recall."""
    run = Run(
        MODELS[args.models[0]].model(args.mqar_size),
        Associations(args.pairs, args.vocabulary, args.mqar_short_steps, args.mqar_short_context), 0.0,
        args.mqar_steps, args.mqar_batch, args.mqar_context, 0,
    )  # fmt: skip
    near = tuple(Question(pairs, args.mqar_context) for pairs in args.pairs)
    far = tuple(Question(pairs, length, far=True) for pairs in args.long_pairs for length in args.lengths)
    return Plan(
        run, args.mqar_size, {"vocab_size": args.vocabulary, "tokenizer_name": None},
        args.mqar_steps, args.mqar_rates,
        Answers(near, args.vocabulary, args.documents // 4, associations.VALIDATION),
        Measures((
            Answers(near, args.vocabulary, args.documents, associations.TEST),
            Answers(far, args.vocabulary, args.documents // 4, associations.TEST, key="longer"),
        )),
        ("mqar", "pairs", "vocabulary", "lengths", "long_pairs", "documents"),
    )  # fmt: skip


def needle_plan(args: Args) -> Plan:
    """Needles in novels."""
    reading = Needles(tuple(str(existing(args.data, name)) for name in TRAIN))
    # Opened here once, the text is in the cache when workers want it.
    reading.identity()
    hay = str(existing(args.data, LONG))
    run = Run(
        MODELS[args.models[0]].model(args.needle_size), reading, 0.0, args.needle_steps, args.needle_batch,
        args.needle_context, 0,
    )  # fmt: skip
    return Plan(
        run, args.needle_size, {}, args.needle_steps // 2, args.needle_rates,
        Found(str(existing(args.data, VALID)), (args.needle_context,), args.needles // 2, needles.VALIDATION),
        Found(hay, args.needle_lengths, args.needles, needles.TEST), ("needle",),
        {"text_weight": needles.TEXT_WEIGHT},
    )  # fmt: skip


def row(args: Args, plan: Plan, task: str, name: str) -> Row:
    """The runs of a model."""
    entry = MODELS[name]
    model = replace(entry, overrides=entry.overrides | plan.overrides).model(plan.size)
    run = replace(plan.run, model=model)
    tuning = replace(run, seed=TUNING_SEED, steps=plan.tuning_steps)
    return Row(name, tuning, {seed: replace(run, seed=seed) for seed in args.seeds})


def summarised(
    task: str,
    name: str,
    rate: float,
    tried: Mapping[float, Mapping[str, Any]],
    runs: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """A row of the table."""
    entry = MODELS[name]
    scores = mqar_scores(runs) if task == "mqar" else needle_scores(runs)
    return {
        "model": name, "about": entry.about, "group": entry.group, "parameters": runs[0]["parameters"],
        "learning_rate": rate, "tuning": {f"{one:g}": result.get("valid") for one, result in tried.items()},
        **scores, "losses": [one["loss"] for one in runs], "seconds": [one["seconds"] for one in runs],
    }  # fmt: skip


def mqar_scores(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy over seeds for each question; empty lists where training came to no number."""
    found = {}
    for key in ("answers", "longer"):
        each = [one.get(key, []) for one in runs]
        found[key] = [
            {
                "pairs": same[0]["pairs"],
                "length": same[0]["length"],
                **over_runs([one["accuracy"] for one in same]),
            }
            for same in zip(*each, strict=False)
        ]
    return found


def needle_scores(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Exact answers over seeds for each variant and length, and at each depth the mean."""
    found = []
    for same in zip(*(one.get("needles", []) for one in runs), strict=False):
        depths = [one["by_depth"] for one in same]
        mean = None if None in depths else [sum(at) / len(at) for at in zip(*depths, strict=True)]
        found.append(
            {
                "variant": same[0]["variant"], "length": same[0]["length"], "by_depth": mean,
                **over_runs([one["exact"] for one in same]),
            }
        )  # fmt: skip
    return {"needles": found}


def over_runs(each: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    """The interval over seeds; of one seed alone that over its documents."""
    if len(each) == 1 and each[0] is not None:
        return dict(each[0]) | {"by_seed": [each[0]["estimate"]]}
    return over_seeds([None if one is None else one["estimate"] for one in each])


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except NestorError as error:
        sys.exit(f"recall.py: {error}")
