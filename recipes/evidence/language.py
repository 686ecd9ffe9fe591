"""Table 1: how well models with and without a memory predict novels, within and beyond their context.

    python recipes/evidence/language.py --data NOVELS --device cuda --workers 20
    python recipes/evidence/language.py --data NOVELS --device cuda --workers 6 --size 60m --seeds 0 \
        --models transformer titans-mac titans-mag hope lact
    python recipes/evidence/language.py --table-only

All models have the same non-embedding parameters and read the same bytes in the same order. For each, every
learning rate is tried once on a shorter run, and the best of them on one half of the held-out novels goes
into a run for each seed; bits a byte are those of the other half. Long documents are read as a stream of
many times the context of training. Each run is a file in the folder --out, and the same command goes on
where it was stopped. Last, training speed and memory are measured on GPUs that do nothing else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import tyro
from language_table import plots, table
from models import MODELS, check_models, obstacle, slowest_first
from novel_runs import NovelOptions, summarised
from runs import WARM, Run, train
from study import about, differences, run_rows, write_table
from sweep import Row, place

from nestor.errors import NestorError
from nestor.evaluation.suites import device_name
from nestor.jobs import Workers

#: Steps that are timed.
TIMED = 20


@dataclass
class Args(NovelOptions):
    """Train models of one size on novels and measure bits a byte, by position, speed and memory."""

    models: tuple[str, ...] = tuple(MODELS)
    """Rows of the table in models.py; differences are to the transformer, if it is among them."""
    name: str | None = None
    """Of the results; none given: language-SIZE."""

    @property
    def title(self) -> str:
        """The name of the results."""
        return self.name or f"language-{self.size}"

    def check(self) -> None:
        """Raises ConfigError for what is out of range or unknown."""
        super().check()
        self.check_options("models")
        check_models(self.models)


def main(args: Args, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run what is missing and write the results.

    Raises:
        ConfigError: a setting; a file in the folder from other settings. DataError: no text.
        JobError: runs of workers failed.
    """
    path = args.results / f"{args.title}.json"
    results = json.loads(path.read_text(encoding="utf-8")) if args.table_only else measured(args, say)
    write_table(path, results, table, plots, say)
    return results


def measured(args: Args, say: Callable[[str], None]) -> dict[str, Any]:
    """The results of runs, those that are missing made now."""
    args.check()
    left_out = {name: reason for name in args.models if (reason := obstacle(name, args.device))}
    for name, reason in left_out.items():
        say(f"{name} is left out: {reason}")
    names = [name for name in args.models if name not in left_out]
    rows = {name: args.row(name, MODELS[name].model(args.size)) for name in names}
    sweep = args.sweep(args.title, say)
    timing = replace(
        sweep, rates=args.rates[:1], make=timed, line=timed_line, also={"on": device_name(args.device)}
    )
    timings = {name: timed_row(name, rows[name].tuning) for name in names}
    if args.workers > 1:
        begin = {name: (sweep, rows[name]) for name in slowest_first(names)}
        left_out |= run_rows(begin, Workers(args.workers, args.device), args.title, say)
        alone = Workers(max(1, torch.cuda.device_count()) if args.device == "cuda" else 1, args.device)
        begin = {name: (timing, row) for name, row in timings.items() if name not in left_out}
        left_out |= run_rows(begin, alone, "speed", say)
        names = [name for name in names if name not in left_out]
    found = {}
    for name in names:
        rate, tried = sweep.rate(rows[name])
        runs = [sweep.run(rows[name], seed) for seed in args.seeds]
        timing_of = timing.run(timings[name], 0)
        found[name] = summarised(rate, tried, runs) | described(name, timing_of)
        found[name]["places"].append(timing_of["place"])
    if "transformer" in found:
        base = found["transformer"]["bits_per_byte"]["by_seed"]
        for one in found.values():
            one["minus_transformer"] = differences(one["bits_per_byte"]["by_seed"], base)
    places = [place for one in found.values() for place in one.pop("places")]
    return {
        "format": "nestor-evidence-language",
        "settings": args.settings(),
        **about(places),
        "left_out": left_out,
        "rows": list(found.values()),
    }


def timed_row(name: str, run: Run) -> Row:
    """The run of a few steps that is timed."""
    return Row(f"speed/{name}", run, {0: replace(run, seed=0, steps=WARM + TIMED)})


def timed(run: Run, name: str, device: str) -> dict[str, Any]:
    """Speed and memory of training."""
    trained = train(run, device).summary()
    return {key: trained[key] for key in ("tokens_per_second", "peak_memory", "captured", "seconds")} | {
        "place": place(device)
    }


def timed_line(result: dict[str, Any]) -> str:
    """A timing in a few words."""
    memory = "" if result["peak_memory"] is None else f", {result['peak_memory'] / 2**30:.1f} GiB"
    return f"{result['tokens_per_second']:,.0f} tokens/s{memory}"


def described(name: str, timing: dict[str, Any]) -> dict[str, Any]:
    """What a row says of its model besides the results of its runs."""
    entry = MODELS[name]
    return {
        "model": name,
        "about": entry.about,
        "group": entry.group,
        "recomputed": entry.recomputed,
        "tokens_per_second": timing["tokens_per_second"],
        "peak_memory": timing["peak_memory"],
        "captured": timing["captured"],
    }


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except NestorError as error:
        sys.exit(f"language.py: {error}")
