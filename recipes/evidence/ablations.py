"""Table 4: what the parts of Titans and of Hope are worth, and what a memory's chunk size is to it.

    python recipes/evidence/ablations.py --data NOVELS --device cuda --workers 20
    python recipes/evidence/ablations.py --data NOVELS --device cuda --workers 20 --tables Titans chunks
    python recipes/evidence/ablations.py --table-only

Every model is trained as those of language.py, and its feed-forward takes the parameters that a part left out
leaves. The papers' figures stand beside: perplexities of much larger models, of which the change of the
logarithm is what a change of bits a byte compares with. A memory that was trained at one chunk size is also
run at others.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tyro
from ablations_table import plots, table
from novel_runs import NovelOptions, summarised
from novels import Valid, valid
from runs import with_settings
from study import about, over_seeds, run_rows, write_table
from variants import (
    CHUNKED,
    COMPARISONS,
    PAPER_FULL,
    VARIANTS,
    Comparison,
    check_tables,
    chunk_model,
    chunk_name,
    variants_of,
)  # fmt: skip

from nestor.errors import ConfigError, NestorError, NonFiniteError, suggest
from nestor.jobs import Workers


@dataclass
class Args(NovelOptions):
    """Train models without one part each, and memories at several chunk sizes."""

    tables: tuple[str, ...] = (*PAPER_FULL, "chunks")
    """Titans, Hope, chunks."""
    chunks: tuple[int, ...] = (16, 64, 256)
    """Chunk sizes of training."""
    run_chunks: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512)
    """Chunk sizes that models are run with."""
    leave_out: tuple[str, ...] = ()
    """Models of these tables that are not run; the table names them."""
    name: str | None = None
    """Of the results; none given: ablations-SIZE."""

    @property
    def title(self) -> str:
        """The name of the results."""
        return self.name or f"ablations-{self.size}"

    def check(self) -> None:
        """Raises ConfigError for what is out of range or unknown."""
        super().check()
        self.check_options("tables", "chunks", "run_chunks")
        check_tables(self.tables)
        models = variants_of(self.tables)
        for name in self.leave_out:
            if name not in models:
                raise ConfigError(
                    f"--leave-out has {name!r}, which is no model of these tables; they have "
                    f"{', '.join(models)}. {suggest(name, models)}".rstrip()
                )
        if min(*self.chunks, *self.run_chunks) < 1:
            raise ConfigError("chunk sizes must be at least 1")


@dataclass(frozen=True)
class AtChunks:
    """A measure of `study.Maker`: bits a byte where the memory runs with other chunk sizes; `chunks` in the
    result has them, None where a score was no number."""

    report: Valid
    chunks: Sequence[int]

    def __call__(self, model: Any, device: str) -> dict[str, Any]:
        found: dict[str, float | None] = {}
        for chunk in self.chunks:
            try:
                other = with_settings(model, memory={"chunk_size": chunk})
                found[str(chunk)] = self.report(other, device)[self.report.key]
            except NonFiniteError:
                found[str(chunk)] = None
        return {"chunks": found}


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
    rows = {name: args.row(name, VARIANTS[name].model(args.size)) for name in variants_of(args.tables)}
    by_chunk = {chunk: chunk_name(chunk, args.size) for chunk in args.chunks if "chunks" in args.tables}
    rows |= {name: args.row(name, chunk_model(chunk, args.size)) for chunk, name in by_chunk.items()}
    rows = {name: row for name, row in rows.items() if name not in args.leave_out}
    plain = args.sweep(args.title, say)
    _, report = valid(args.data, args.context)
    at_chunks = args.sweep(args.title, say, AtChunks(report, args.run_chunks))
    # The ablations' memory is one of the chunk-size law, so it is run with other chunks in any case.
    measured_at = (CHUNKED, *by_chunk.values())
    studied = {name: (at_chunks if name in measured_at else plain, row) for name, row in rows.items()}
    left_out = dict.fromkeys(args.leave_out, "not run")
    if args.workers > 1:
        left_out |= run_rows(studied, Workers(args.workers, args.device), args.title, say)
    found, at = {}, {}
    for name, (sweep, row) in studied.items():
        if name in left_out:
            continue
        runs = [sweep.run(row, seed) for seed in args.seeds]
        found[name] = {"about": about_model(name)} | summarised(*sweep.rate(row), runs)
        at[name] = [run.get("chunks") for run in runs]
    pairs = [one for one in COMPARISONS if one.table in args.tables and {one.variant, one.base} <= {*found}]
    return {
        "format": "nestor-evidence-ablations",
        "settings": args.settings(),
        **about([place for one in found.values() for place in one.pop("places")]),
        "left_out": left_out,
        "models": found,
        "comparisons": [compared(one, found) for one in pairs],
        "chunks": [
            run_at(chunk, at[name], args.run_chunks) for chunk, name in by_chunk.items() if name in at
        ],
    }


def about_model(name: str) -> str:
    """A model in words."""
    return (
        VARIANTS[name].about if name in VARIANTS else f"the memory alone, trained at {name.replace('-', ' ')}"
    )


def compared(one: Comparison, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A row: bits a byte without a part, how much more that is than with it, and the paper's figures."""
    variant, base = found[one.variant], found[one.base]
    full = PAPER_FULL[one.table]
    return {
        "table": one.table,
        "part": one.part,
        "variant": one.variant,
        "base": one.base,
        "change": relative(variant["bits_per_byte"], base["bits_per_byte"]),
        "long_change": relative(far(variant), far(base)),
        "paper": one.paper and {"full": full, "without": one.paper, "change": log_change(one.paper, full)},
    }


def relative(values: dict[str, Any] | None, base: dict[str, Any] | None) -> dict[str, Any]:
    """How much more the values are than those of the same seeds of the base, as a share of these."""
    pairs = [] if values is None or base is None else zip(values["by_seed"], base["by_seed"], strict=True)
    return over_seeds([None if a is None or b is None else a / b - 1 for a, b in pairs] or [None])


def far(row: dict[str, Any]) -> dict[str, Any] | None:
    """Bits a byte in the last stretch of the long documents."""
    return list(row["long"]["stretches"].values())[-1] if row["long"] else None


def log_change(perplexity: float, full: float) -> float:
    """How much more the logarithm of a perplexity is, as a share: what a change of bits a byte is alike."""
    return math.log(perplexity) / math.log(full) - 1


def run_at(chunk: int, found: Sequence[dict[str, Any] | None], chunks: Sequence[int]) -> dict[str, Any]:
    """A row of the matrix of chunk sizes: bits a byte of a model at each chunk that it is run with."""
    each = [[None if one is None else one[str(at)] for one in found] for at in chunks]
    return {"trained": chunk, "run": {str(at): over_seeds(b) for at, b in zip(chunks, each, strict=True)}}


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except NestorError as error:
        sys.exit(f"ablations.py: {error}")
