"""Table 5: does a deep memory do anything that a linear one of the same bytes does not?

    python recipes/evidence/linear.py --parts operation --workers 8
    python recipes/evidence/linear.py --data NOVELS --device cuda --workers 24
    python recipes/evidence/linear.py --table-only

Memories of one matrix and of two, with and without momentum and forgetting, keep the same number of bytes
from token to token (arms.py). Four parts: the bare operation (operation.py), where no model is trained;
models that learn to recall values that are a function of their keys, shown or not (relations.py); models that
learn to recall more and more random pairs (associations.py); and text, in bits a byte of novels. Each part is
written as linear-PART.json, with a table and plots, and linear.md has what follows from all that there are.
Every run is kept in the folder --out; the same command goes on where it was stopped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import operation
import operation_table
import trained_table
import tyro
from arms import ARMS, check_arms
from study import Options, about, write_table
from sweep import Sweep
from trained import PARTS as TRAINED
from trained import TrainedSettings, measured

from nestor.errors import ConfigError, NestorError
from nestor.files import write_text
from nestor.jobs import Workers

PARTS = ("operation", *TRAINED)


@dataclass
class Args(Options, TrainedSettings):
    """Compare memories of one matrix and of two at equal bytes."""

    parts: tuple[str, ...] = PARTS
    """operation, relations, capacity, text."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Memories of models; the bare operation has its own."""
    pairs: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512)
    """Of the bare operation: numbers of random pairs."""
    function_pairs: tuple[int, ...] = (64, 512)
    """Of the bare operation: numbers of pairs whose values are a function of their keys."""
    passes: tuple[int, ...] = (1, 8)
    """Of the bare operation: how often all pairs are written."""
    budget: operation.Budget = field(default_factory=operation.Budget)
    """Of the bare operation: settings that are tried, and sequences."""

    def check(self) -> None:
        """Raises ConfigError for what is out of range or unknown."""
        self.check_options("parts", "arms", "learning_rates", "pairs", "function_pairs", "passes")
        check_arms(self.arms)
        unknown = set(self.parts) - set(PARTS)
        if unknown:
            raise ConfigError(f"--parts has {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
        if min(*self.pairs, *self.function_pairs, *self.passes, *self.learning_rates) <= 0:
            raise ConfigError("pairs, passes and learning rates must be above 0")


def main(args: Args, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run what is missing and write the results of the parts, which are returned by name.

    Raises:
        ConfigError: a setting; a file in the folder from other settings. DataError: no text.
        JobError: runs of workers failed.
    """
    args.check()
    results = {}
    for part in args.parts:
        path = args.results / f"linear-{part}.json"
        if args.table_only:
            if not path.is_file():
                continue
            found = json.loads(path.read_text(encoding="utf-8"))
        elif part == "operation":
            found = operated(args, say)
        else:
            found = measured(args, part, args.arms, args, say)
        results[part] = found
        tables = tables_of(part)
        found["comparisons"] = tables.comparisons(found["rows"])
        write_table(path, found, tables.table, tables.plots, say)
    write_text(args.results / "linear.md", summary(args.results))
    return results


def tables_of(part: str) -> Any:
    """The module that makes the tables of a part."""
    return operation_table if part == "operation" else trained_table


def operated(args: Args, say: Callable[[str], None]) -> dict[str, Any]:
    """The bare operation."""
    rows = operation.rows(operation.cells(args.pairs, args.function_pairs, args.passes), args.budget)
    sweep = Sweep(
        args.folder("linear") / "operation",
        (0.0,),
        operation.make,
        lambda result: 0,
        operation.line,
        "cpu",
        say,
    )
    if args.workers > 1:
        # The longest are the last ones of each kind.
        sweep.run_missing(rows, Workers(args.workers, "cpu"), "bare operation")
    found = [sweep.run(row, 0) for row in rows]
    settings = {name: getattr(args, name) for name in ("pairs", "function_pairs", "passes")}
    return {
        "format": "nestor-evidence-linear-operation",
        "settings": json.loads(json.dumps(settings | {"budget": asdict(args.budget)})),
        **about([one.pop("place") for one in found]),
        "rows": [rounded(one) for one in found],
    }


def rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    """Scores of sequences with the digits that they deserve."""
    return {
        key: [round(one, 4) for one in value] if key in ("shown", "others") else value
        for key, value in row.items()
    }


def summary(folder: Path) -> str:
    """What follows from the parts that there are."""
    lines = []
    for part in PARTS:
        path = folder / f"linear-{part}.json"
        if path.is_file():
            results = json.loads(path.read_text(encoding="utf-8"))
            lines += [f"\n[{part}](linear-{part}.md):\n"]
            lines += [f"- {sentence}" for sentence in tables_of(part).verdicts(results)]
    return (
        "# Deep against linear\n\nMemories of one matrix and of two that keep the same number of bytes; the "
        "best of each kind are compared, and what is clear is what 95 % intervals of their differences say.\n"
        + "\n".join(lines)
        + "\n"
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except NestorError as error:
        sys.exit(f"linear.py: {error}")
