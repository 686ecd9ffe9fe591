"""Does a trained model that learns from a long document predict it better than one that does not?

    python recipes/retrofit/documents.py MODEL --documents NOVELS.jsonl.xz --tune CLASSICS.jsonl.xz

Each document is read from its start for `--tokens` tokens, in windows of `--context` tokens that a model
reads together, once frozen and once learning (`nestor.learning.Learner`); what was learned goes on from
window to window and begins anew with each document. The learning rate is the best of `--grid` on the texts of
`--tune`, which are no part of the result. Writes results/documents-<name>.json after every document (a run
that was cut goes on with the rest), and a table and a plot from it.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.progress import Progress
from torch.nn import functional as F

from nestor.cli.loading import Dtype, load_model
from nestor.data import open_corpus
from nestor.data.windows import windows
from nestor.errors import ConfigError, NonFiniteError
from nestor.evaluation.plots import Axes, Series, curves
from nestor.evaluation.statistics import mean_interval, wilson_interval
from nestor.files import write_json, write_text
from nestor.learning import Learner, Retrofit

RESULTS = Path(__file__).parent / "results"


@dataclass
class Args:
    """Bits a byte of long documents, learning against frozen."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A folder with a model, or the id of one on the Hugging Face hub."""
    documents: Path
    """Texts to be measured, as JSON lines with a field `text`, or a plain text."""
    tune: Path
    """Other texts, on which the learning rate is chosen."""
    name: str = "model"
    """Of the result's files."""
    tokens: int = 32_768
    """Of each document."""
    context: int = 2048
    """Tokens that are read together."""
    periods: tuple[int, ...] = (512, 4096)
    """Of the levels."""
    optimizer: str = "sgd"
    """Of the levels: sgd, momentum or adam."""
    fixed: float = 0.5
    """Share of the layers that do not learn."""
    grid: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    """Learning rates that are tried."""
    tune_documents: int = 2
    """Documents for it, of tune_tokens tokens each."""
    tune_tokens: int = 32_768
    """Of each document for tuning: as many as are measured, for a rate can serve long and then run away."""
    limit: int | None = None
    """Documents to measure; none given: all."""
    bins: int = 16
    """Stretches of a document, for the plot."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ..."""
    dtype: Dtype = "auto"
    """Type of the weights."""


@dataclass
class Measured:
    """Nats of each token but the first, and seconds, of one document."""

    learning: list[float]
    frozen: list[float]
    learning_seconds: float
    frozen_seconds: float
    updates: dict[str, int]
    change: dict[str, float]


def encode(tokenizer: Any, text: str, tokens: int) -> tuple[list[int], list[int]]:
    """Ids of a text's beginning, and the byte at which each token ends."""
    # More than enough characters: no tokenizer here makes tokens of more than 16 on average.
    found = tokenizer(text[: 16 * tokens], return_offsets_mapping=True, verbose=False)
    ids, offsets = found["input_ids"][:tokens], found["offset_mapping"][:tokens]
    ends, at, size = [], 0, 0
    for _, end in offsets:
        size += len(text[at : max(at, end)].encode())
        at = max(at, end)
        ends.append(size)
    return ids, ends


def nats(logits: torch.Tensor, ids: torch.Tensor) -> list[float]:
    """Of each token but the first. All work that was queued on a GPU before is done when they are there, so
    that the clock may be read after it."""
    return F.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none").tolist()


def measure(model: Any, learner: Learner, ids: list[int], context: int, progress: Any) -> Measured:
    """Read a document both ways, window by window."""
    state, out = learner.start(), Measured([], [], 0.0, 0.0, {}, {})
    for piece in windows(ids, context):
        window = torch.tensor([piece], device=model.device)
        started = time.perf_counter()
        logits, state = learner.read(window, state)
        state = learner.close(state)
        out.learning += nats(logits, window)
        middle = time.perf_counter()
        with torch.no_grad():
            out.frozen += nats(model(window).logits, window)
        out.learning_seconds += middle - started
        out.frozen_seconds += time.perf_counter() - middle
        progress(window.shape[1] - 1)
    for report in learner.report(state)[0]:
        out.updates[report.name], out.change[report.name] = report.updates, report.change
    return out


def row(index: int, found: Measured, ends: list[int], bins: int) -> dict[str, Any]:
    """What is kept of a document: bits a byte, in all and by stretch."""

    def bits(values: list[float], first: int, last: int) -> float:
        return sum(values[first:last]) / math.log(2) / max(1, ends[last] - ends[first])

    count = len(found.learning)
    edges = [count * k // bins for k in range(bins + 1)]
    stretches = list(pairwise(edges))
    return {
        "document": index,
        "tokens": count,
        "bytes": ends[-1] - ends[0],
        "learning": bits(found.learning, 0, count),
        "frozen": bits(found.frozen, 0, count),
        "learning_by_position": [bits(found.learning, *edge) for edge in stretches],
        "frozen_by_position": [bits(found.frozen, *edge) for edge in stretches],
        "seconds": {"learning": found.learning_seconds, "frozen": found.frozen_seconds},
        "updates": found.updates,
        "change": found.change,
    }


def choose_rate(args: Args, model: Any, tokenizer: Any, progress: Progress) -> dict[str, float]:
    """Mean bits a byte at each learning rate of the grid, infinite where it came to no number."""
    trials: dict[str, float] = {}
    documents = [encode(tokenizer, text, args.tune_tokens) for text, _ in zip(
        open_corpus(args.tune), range(args.tune_documents), strict=False
    )]  # fmt: skip
    total = sum(len(ids) - 1 for ids, _ in documents) * len(args.grid)
    task = progress.add_task("learning rates", total=total)
    for rate in args.grid:
        learner = Learner(model, retrofit(args, rate).apply(model))
        try:
            rows = [
                row(
                    0,
                    measure(model, learner, ids, args.context, lambda n: progress.advance(task, n)),
                    ends,
                    1,
                )
                for ids, ends in documents
            ]
            trials[str(rate)] = sum(one["learning"] for one in rows) / len(rows)
        except NonFiniteError:
            trials[str(rate)] = math.inf
    return trials


def retrofit(args: Args, rate: float) -> Retrofit:
    """The levels of a run."""
    return Retrofit(
        periods=args.periods, learning_rates=(rate,) * len(args.periods), optimizer=args.optimizer,
        fixed=args.fixed,
    )  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Share of documents that learning predicts better, mean gain in bits a byte, cost over frozen."""
    gains = [one["frozen"] - one["learning"] for one in rows]
    better = sum(gain > 0 for gain in gains)
    seconds = {kind: sum(one["seconds"][kind] for one in rows) for kind in ("learning", "frozen")}
    return {
        "documents": len(rows),
        "better": wilson_interval(better, len(rows)).as_dict(),
        "gain": mean_interval(gains).as_dict(),
        "gain_least": min(gains),
        "frozen": sum(one["frozen"] for one in rows) / len(rows),
        "learning": sum(one["learning"] for one in rows) / len(rows),
        "time_over_frozen": seconds["learning"] / seconds["frozen"],
        "tokens_per_second": sum(one["tokens"] for one in rows) / seconds["learning"],
    }


def write_report(result: dict[str, Any], name: str) -> None:
    """The table and the plot of a result."""
    rows, found = result["rows"], result["summary"]
    lines = [
        "| document | tokens | frozen | learning | less |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {one['document']} | {one['tokens']:,} | {one['frozen']:.3f} | {one['learning']:.3f} | "
            f"{one['frozen'] - one['learning']:.3f} |"
            for one in rows
        ),
    ]
    gain = found["gain"]
    between = "" if gain["low"] is None else f" ({gain['low']:.3f} to {gain['high']:.3f}, 95 %)"
    lines += [
        "",
        f"Bits a byte. Learning is lower on {found['better']['estimate']:.0%} of {len(rows)} documents, "
        f"by {gain['estimate']:.3f}{between}, at {found['time_over_frozen']:.1f} times the time of "
        f"the frozen pass; learning rate {result['learning_rate']}, periods {result['settings']['periods']}.",
    ]
    write_text(RESULTS / f"documents-{name}.md", "\n".join(lines) + "\n")
    bins = len(rows[0]["frozen_by_position"])
    places = [rows[0]["tokens"] * (k + 0.5) / bins for k in range(bins)]

    def mean(kind: str) -> list[float | None]:
        return [sum(one[f"{kind}_by_position"][k] for one in rows) / len(rows) for k in range(bins)]

    plot = curves(
        [Series("frozen", places, mean("frozen")), Series("learning", places, mean("learning"))],
        Axes("Long documents, frozen and learning", "token of the document", "bits a byte", log_x=False),
    )
    plot.write(RESULTS / f"documents-{name}.png")


def main(args: Args) -> None:
    """Tune, measure what is not measured yet, and report."""
    settings = {k: v.name if isinstance(v, Path) else v for k, v in asdict(args).items() if k != "limit"}
    settings = json.loads(json.dumps(settings))
    path = RESULTS / f"documents-{args.name}.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if result and result["settings"] != settings:
        raise ConfigError(f"{path} has other settings; choose another --name, or remove it")
    model, tokenizer = load_model(args.model, args.device, args.dtype)
    with Progress() as progress:
        if not result:
            trials = choose_rate(args, model, tokenizer, progress)
            rate = min(args.grid, key=lambda rate: trials[str(rate)])
            result = {
                "about": {
                    "date": datetime.now(UTC).date().isoformat(),
                    "device": torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu",
                    "torch": torch.__version__,
                },
                "settings": settings, "trials": trials, "learning_rate": rate, "rows": [],
            }  # fmt: skip
        learner = Learner(model, retrofit(args, result["learning_rate"]).apply(model))
        for index, text in enumerate(open_corpus(args.documents)):
            if index < len(result["rows"]):
                continue
            if args.limit is not None and index >= args.limit:
                break
            ids, ends = encode(tokenizer, text, args.tokens)
            task = progress.add_task(f"document {index}", total=len(ids) - 1)
            found = measure(model, learner, ids, args.context, lambda n, t=task: progress.advance(t, n))
            result["rows"].append(row(index, found, ends, args.bins))
            result["summary"] = summary(result["rows"])
            RESULTS.mkdir(exist_ok=True)
            write_json(path, result)
    write_report(result, args.name)
    print((RESULTS / f"documents-{args.name}.md").read_text())


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
