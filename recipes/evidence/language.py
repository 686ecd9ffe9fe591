"""Table 1: how well models with and without a memory predict novels, within and beyond their context.

    python recipes/evidence/language.py --data NOVELS --device cuda --workers 24
    python recipes/evidence/language.py --data NOVELS --device cuda --workers 8 --size 60m --seeds 0 \
        --models transformer titans-mac titans-mag hope lact
    python recipes/evidence/language.py --table-only

All models have the same non-embedding parameters and read the same bytes in the same order. For each, every
learning rate is tried once on a shorter run, and the best of them on one half of the held-out novels goes
into a run for each seed; bits a byte are those of the other half. Long documents are read as a stream of
many times the context of training. Each run is a file in the folder --out, and the same command goes on
where it was stopped. Last, training speed and memory are measured on GPUs that do nothing else.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from language_table import plots, table
from models import MODELS, check_models, check_size, obstacle
from novels import LONG, LongDocuments, existing, novels, valid
from runs import WARM, Run, train
from study import (
    TUNING_SEED,
    Maker,
    Options,
    about,
    by_validation,
    differences,
    line,
    over_seeds,
)  # fmt: skip
from sweep import Row, Sweep, place

from nestor.errors import ConfigError, NestorError
from nestor.evaluation.plots import short_count
from nestor.files import write_json, write_text
from nestor.jobs import Workers

#: Learning rates that are tried, by size.
RATES = {"5m": (1e-3, 2e-3, 4e-3), "60m": (5e-4, 1e-3, 2e-3)}
#: Steps that are timed.
TIMED = 20


@dataclass
class Args(Options):
    """Train models of one size on novels and measure bits a byte, by position, speed and memory."""

    models: tuple[str, ...] = tuple(MODELS)
    """Rows of the table in models.py; differences are to the transformer, if it is among them."""
    data: Path = Path("data/text")
    """Folder with novels-train-a, -train-b, -valid and -heldout-long."""
    size: str = "5m"
    """quick, 5m, 60m ..."""
    learning_rates: tuple[float, ...] | None = None
    """Tried once for every model; none given: three by the size."""
    tokens: int = 2**24
    """Bytes that a run reads; a run that tries a learning rate reads a quarter of them."""
    batch_size: int = 16
    """Rows of an update."""
    context: int = 2048
    """Bytes of a row."""
    long: int = 65_536
    """Bytes of each long document."""
    long_documents: int = 12
    """How many of them."""
    name: str | None = None
    """Of the results; none given: language-SIZE."""

    @property
    def title(self) -> str:
        """The name of the results."""
        return self.name or f"language-{self.size}"

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates that are tried."""
        return self.learning_rates or RATES.get(self.size, RATES["60m"])

    def check(self) -> None:
        """Raises ConfigError for what is out of range or unknown."""
        self.check_options("models", "rates")
        check_models(self.models)
        check_size(self.size)
        if min(self.batch_size, self.context, self.long_documents, *self.rates) <= 0:
            raise ConfigError("batch size, context, long documents and learning rates must be above 0")
        if self.tokens < 4 * self.batch_size * self.context:
            raise ConfigError(
                f"--tokens is {self.tokens}; a step reads {self.batch_size * self.context}, and a quarter "
                f"of the tokens must be at least one"
            )


def main(args: Args, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run what is missing and write the results.

    Raises:
        ConfigError: a setting; a file in the folder from other settings. DataError: no text.
        JobError: runs of workers failed.
    """
    path = args.results / f"{args.title}.json"
    results = json.loads(path.read_text(encoding="utf-8")) if args.table_only else measured(args, say)
    write_json(path, results)
    write_text(path.with_suffix(".md"), table(results))
    for name, plot in plots(results).items():
        plot.write(args.results / f"{args.title}-{name}.png")
    say(table(results))
    return results


def measured(args: Args, say: Callable[[str], None]) -> dict[str, Any]:
    """The results of runs, those that are missing made now."""
    args.check()
    left_out = {name: reason for name in args.models if (reason := obstacle(name, args.device))}
    for name, reason in left_out.items():
        say(f"{name} is left out: {reason}")
    names = [name for name in args.models if name not in left_out]
    choose, report = valid(args.data, args.context)
    # Opened here once, the text is in the cache when workers want it.
    reading = novels(args.data)
    reading.identity()
    rows = {name: row(args, name) for name in names}
    measures = Measures(
        report, LongDocuments(str(existing(args.data, LONG)), args.long, args.long_documents, args.context)
    )
    sweep = Sweep(
        args.folder(args.title),
        args.rates,
        Maker(args.weights_folder(args.title), choose, measures),
        by_validation,
        line,
        args.device,
        say,
    )
    timing = replace(sweep, rates=args.rates[:1], make=timed, line=timed_line)
    timings = {name: timed_row(args, name) for name in names}
    if args.workers > 1:
        # Slower ones first, so that none is left for the end.
        sweep.run_missing(list(reversed(rows.values())), Workers(args.workers, args.device), args.title)
        alone = Workers(max(1, torch.cuda.device_count()) if args.device == "cuda" else 1, args.device)
        timing.run_missing(list(timings.values()), alone, "speed")
    found = {}
    for name in names:
        rate, tried = sweep.rate(rows[name])
        runs = [sweep.run(rows[name], seed) for seed in args.seeds]
        found[name] = summarised(name, rate, tried, runs, timing.run(timings[name], 0))
    if "transformer" in found:
        base = found["transformer"]["bits_per_byte"]["by_seed"]
        for one in found.values():
            one["minus_transformer"] = differences(one["bits_per_byte"]["by_seed"], base)
    places = [place for one in found.values() for place in one.pop("places")]
    return {
        "format": "nestor-evidence-language",
        "settings": args.settings() | {"learning_rates": list(args.rates)},
        **about(places),
        "left_out": left_out,
        "rows": list(found.values()),
    }


@dataclass(frozen=True)
class Measures:
    """Several measures of `study.Maker` as one."""

    report: Callable[[Any, str], dict[str, Any]]
    long: Callable[[Any, str], dict[str, Any]]

    def __call__(self, model: Any, device: str) -> dict[str, Any]:
        return self.report(model, device) | self.long(model, device)


def row(args: Args, name: str) -> Row:
    """The runs of a model."""
    steps = args.tokens // (args.batch_size * args.context)
    run = Run(MODELS[name].model(args.size), novels(args.data), 0.0, steps, args.batch_size, args.context, 0)
    tuning = replace(run, seed=TUNING_SEED, steps=steps // 4)
    return Row(name, tuning, {seed: replace(run, seed=seed) for seed in args.seeds})


def timed_row(args: Args, name: str) -> Row:
    """The run of a few steps that is timed."""
    run = row(args, name).tuning
    return Row(f"speed/{name}", run, {0: replace(run, seed=0, steps=WARM + TIMED)})


def timed(run: Run, name: str, device: str) -> dict[str, Any]:
    """Speed and memory of training."""
    trained = train(run, device).summary()
    return {key: trained[key] for key in ("tokens_per_second", "peak_memory", "seconds")} | {
        "place": place(device)
    }


def timed_line(result: dict[str, Any]) -> str:
    """A timing in a few words."""
    memory = "" if result["peak_memory"] is None else f", {result['peak_memory'] / 2**30:.1f} GiB"
    return f"{result['tokens_per_second']:,.0f} tokens/s{memory}"


def summarised(
    name: str,
    rate: float,
    tried: dict[float, dict[str, Any]],
    runs: list[dict[str, Any]],
    timing: dict[str, Any],
) -> dict[str, Any]:
    """A row of the table."""
    entry = MODELS[name]
    return {
        "model": name,
        "about": entry.about,
        "group": entry.group,
        "parameters": runs[0]["parameters"],
        "learning_rate": rate,
        "tuning": {f"{one:g}": result.get("valid") for one, result in tried.items()},
        "bits_per_byte": over_seeds([one.get("bits_per_byte") for one in runs]),
        "long": by_position([one.get("long") for one in runs]),
        "losses": [one["loss"] for one in runs],
        "seconds": [one["seconds"] for one in runs],
        "tokens_per_second": timing["tokens_per_second"],
        "peak_memory": timing["peak_memory"],
        "places": [one["place"] for one in (*tried.values(), *runs, timing)],
    }


def by_position(found: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Bits a byte of long documents in bins of positions, and in stretches of the table, over seeds; None
    where a seed has none."""
    known = [one for one in found if one is not None]
    if len(known) < len(found):
        return None
    edges = known[0]["edges"]

    def between(first: int, last: int) -> dict[str, Any]:
        bins = [i for i, edge in enumerate(edges[:-1]) if first <= edge < last]
        return over_seeds(
            [sum(one["bits"][i] for i in bins) / sum(one["bytes"][i] for i in bins) for one in known]
        )

    stretches = [edge for edge in STRETCHES if edge < edges[-1]] + [edges[-1]]
    return {
        "edges": edges,
        "bins": [between(*pair) for pair in itertools.pairwise(edges)],
        "stretches": {
            f"{short_count(first)} to {short_count(last)}": between(first, last)
            for first, last in itertools.pairwise(stretches)
        },
    }


#: Positions of a long document that the table takes together.
STRETCHES = (0, 2048, 16_384)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except NestorError as error:
        sys.exit(f"language.py: {error}")
