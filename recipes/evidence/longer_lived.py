"""A small trained model made longer-lived: what do levels that learn, and a memory beside attention, add?

    python recipes/evidence/longer_lived.py MODEL --data ../shared/data

Ways of reading are compared on the same texts: the model as it is in windows of its context, and with a
window that slides; with levels of its weights that learn while it reads (`nestor.learning.Retrofit`); with
memory branches beside its attention, trained here on books (`nestor.learning.Branches`); with both. Parts:
`train` trains the branches; `cost` measures speed and memory; `documents` gives bits a byte of long documents
by position; `needles` recall from texts beyond the context; `zeroshot` accuracy on short questions. Each
piece is a file in --out, and the same command, with other parts and arms or on another machine, goes on with
what is missing. results/<name>.json, .md and .png are made from all pieces that are there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import tyro
from longer_lived_measures import Reader, draw
from longer_lived_settings import RESULTS, Args, Arm, kept
from longer_lived_table import collect, write_report
from longer_lived_training import train
from rich.progress import track

from nestor.cli.loading import pick_device
from nestor.data import open_corpus
from nestor.errors import NestorError
from nestor.evaluation.harness import require
from nestor.files import write_json
from nestor.jobs import Job, Shared, Workers, run_jobs


def main(args: Args, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run what is missing, and write the result.

    Raises:
        ConfigError: a setting, or a piece of other settings. JobError: pieces that failed.
    """
    path = RESULTS / f"{args.name}.json"
    if args.table_only:
        result = json.loads(path.read_text(encoding="utf-8"))
    else:
        args.check()
        if "zeroshot" in args.parts:
            require(args.tasks)
        args.out.mkdir(parents=True, exist_ok=True)
        if "train" in args.parts:
            found = train(args)
            say(f"branches of {found['parameters']:,} parameters, {found['tokens']:,} tokens of training")
        if "cost" in args.parts:
            measure_cost(args, say)
        run(args, jobs_of(args))
        result = collect(args, count_documents(args))
        write_json(path, result)
    table = write_report(result, args.name)
    say(table)
    return result


def run(args: Args, jobs: list[Job]) -> None:
    """Run the pieces that are missing, here or in processes of their own."""
    if args.workers > 1:
        run_jobs(jobs, Workers(args.workers, args.device), "longer lived")
        return
    device = str(pick_device(args.device))
    for job in track(jobs, "longer lived"):
        job.call(*job.arguments, device=device)


def measure_cost(args: Args, say: Callable[[str], None]) -> None:
    """The cost of each arm that is not there yet, one after another: others would take part of the speed."""
    for arm in args.chosen():
        if arm.forget:
            # It costs what its arm costs.
            continue
        path, settings = args.piece("cost", arm), args.settings("cost", arm)
        if kept(path, settings) is None:
            Reader(args, arm, args.device).piece("cost", path, settings)
            say(f"cost of {arm.name}: {kept(path, settings)['tokens_per_second']:,.0f} tokens a second")


def jobs_of(args: Args) -> list[Job]:
    """Pieces that are missing in the folder, arm by arm."""
    drawn: dict[str, Job] = {}
    slow: list[Job] = []
    quick: list[Job] = []
    for arm in args.chosen():
        # A worker keeps the arm that it opened last.
        shared = Shared((str(args.out), arm.name), partial(Reader, args, arm))
        for part, which in pieces(args, arm):
            path, settings = args.piece(part, arm, *which), args.settings(part, arm)
            if part not in args.parts or kept(path, settings) is not None:
                continue
            after: tuple[str, ...] = ()
            if part == "needles":
                name = "drawing " + " ".join(map(str, which))
                drawn.setdefault(name, Job(name, draw, (args, *which)))
                after = (name,)
            name = " ".join(map(str, (part, arm.name, *which)))
            job = Job(name, shared.call, ("piece", part, path, settings, *which), after)
            (slow if arm.levels else quick).append(job)
    # None of the slow ones is to be left for the end.
    return [*drawn.values(), *slow, *quick]


def pieces(args: Args, arm: Arm) -> list[tuple[str, tuple[Any, ...]]]:
    """All that is asked of an arm in pieces."""
    wanted = args.wanted(arm, count_documents(args))
    return [(part, which) for part, each in wanted.items() if part != "cost" for which in each]


def count_documents(args: Args) -> int:
    """Long documents that are measured."""
    if args.documents is not None:
        return args.documents
    return _count(args.text("novels-heldout-long"))


@lru_cache
def _count(path: Path) -> int:
    return sum(1 for _ in open_corpus(path))


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except NestorError as error:
        sys.exit(f"longer_lived.py: {error}")
