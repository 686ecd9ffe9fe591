"""Runs on novels: the options, rows and measures that the tables of language models and ablations share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from models import check_size
from novels import LONG, LongDocuments, existing, novels, valid
from runs import Model, Run
from study import TUNING_SEED, Maker, Measure, Measures, Options, by_validation, line, over_seeds
from sweep import Row, Sweep

from nestor.errors import ConfigError
from nestor.evaluation.plots import short_count

#: Learning rates that are tried, by size.
RATES = {"5m": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3), "60m": (5e-4, 1e-3, 2e-3)}
#: Positions of a long document from which on a table takes them together.
STRETCHES = (0, 2048, 16_384)


@dataclass
class NovelOptions(Options):
    """Options of programs that train on novels."""

    data: Path = Path("data/text")
    """Folder with novels-train-a, -train-b, -valid and -heldout-long."""
    size: str = "5m"
    """quick, 5m, 60m ..."""
    learning_rates: tuple[float, ...] | None = None
    """Tried once for every model; none given: some by the size."""
    tokens: int = 2**24
    """Bytes that a run reads."""
    tuning_share: float = 0.5
    """Of these, what a run that tries a learning rate reads."""
    batch_size: int = 16
    """Rows of an update."""
    context: int = 2048
    """Bytes of a row."""
    long: int = 65_536
    """Bytes of each long document."""
    long_documents: int = 12
    """How many of them."""

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates that are tried."""
        return self.learning_rates or RATES.get(self.size, RATES["60m"])

    def settings(self) -> dict[str, Any]:
        """What the results depend on, as JSON."""
        return super().settings() | {"learning_rates": list(self.rates)}

    def check(self) -> None:
        """Raises ConfigError for what is out of range or unknown."""
        self.check_options("rates")
        check_size(self.size)
        if min(self.batch_size, self.context, self.long_documents, *self.rates) <= 0:
            raise ConfigError("batch size, context, long documents and learning rates must be above 0")
        if not 0 < self.tuning_share <= 1:
            raise ConfigError(f"--tuning-share is {self.tuning_share}; it must be above 0 and at most 1")
        if self.tuning_steps < 1:
            raise ConfigError(
                f"--tokens is {self.tokens} and --tuning-share {self.tuning_share}; a step reads "
                f"{self.batch_size * self.context}, and the share must be at least one"
            )

    @property
    def steps(self) -> int:
        """Updates of a run."""
        return self.tokens // (self.batch_size * self.context)

    @property
    def tuning_steps(self) -> int:
        """Updates of a run that tries a learning rate."""
        return int(self.steps * self.tuning_share)

    def row(self, name: str, model: Model) -> Row:
        """The runs of a model."""
        run = Run(model, novels(self.data), 0.0, self.steps, self.batch_size, self.context, 0)
        tuning = replace(run, seed=TUNING_SEED, steps=self.tuning_steps)
        return Row(name, tuning, {seed: replace(run, seed=seed) for seed in self.seeds})

    def sweep(self, title: str, say: Callable[[str], None], *more: Measure) -> Sweep:
        """How the rows become results; `more` is measured besides."""
        choose, report = valid(self.data, self.context)
        file = str(existing(self.data, LONG))
        long = LongDocuments(file, self.long, self.long_documents, self.context)
        # Opened here once, the text is in the cache when workers want it.
        novels(self.data).identity()
        maker = Maker(self.weights_folder(title), choose, Measures((report, long, *more)))
        return Sweep(
            self.folder(title), self.rates, maker, by_validation, line, self.device, say, maker.identity()
        )


def summarised(
    rate: float, tried: Mapping[float, dict[str, Any]], runs: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """What a table says of a row: the choice of its learning rate, and its numbers over seeds."""
    return {
        "parameters": runs[0]["parameters"],
        "learning_rate": rate,
        "tuning": {f"{one:g}": result.get("valid") for one, result in tried.items()},
        "bits_per_byte": over_seeds([one.get("bits_per_byte") for one in runs]),
        "long": by_position([one.get("long") for one in runs]),
        "losses": [one["loss"] for one in runs],
        "seconds": [one["seconds"] for one in runs],
        "places": [one["place"] for one in (*tried.values(), *runs)],
    }


def by_position(found: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
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
        "bins": [between(*pair) for pair in pairwise(edges)],
        "stretches": {
            f"{short_count(first)} to {short_count(last)}": between(first, last)
            for first, last in pairwise(stretches)
        },
    }


def chosen(row: Mapping[str, Any]) -> str:
    """The learning rate, marked if a lower or higher one was not tried."""
    tried = [float(rate) for rate in row["tuning"]]
    edge = bool(tried) and row["learning_rate"] in (min(tried), max(tried))
    return f"{row['learning_rate']:g}{'*' if edge else ''}"


def about_training(settings: Mapping[str, Any]) -> str:
    """How the models of a table were trained, in words."""
    count = len(settings["seeds"])
    over = (
        f"Means of {count} seeds with Student's 95 % interval, differences by seed."
        if count > 1
        else f"Seed {settings['seeds'][0]} alone, so without intervals."
    )
    rates = ", ".join(f"{rate:g}" for rate in settings["learning_rates"])
    tried = (
        f"learning rates {rates} tried once for each model on {settings['tuning_share']:g} of that, and "
        f"chosen by other held-out novels (* at an end of those tried)"
        if len(settings["learning_rates"]) > 1
        else f"learning rate {rates}"
    )
    return (
        f"{over} Trained on {settings['tokens'] / 1e6:.1f} M bytes of novels in rows of "
        f"{settings['context']:,}, {settings['batch_size']} rows an update; {tried}. Parameters "
        f"without embeddings."
    )
