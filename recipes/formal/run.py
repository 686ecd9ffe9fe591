"""Which formal languages small models learn, and whether they go on being right on longer strings.

    python recipes/formal/run.py --models transformer linear-attention titans-lmm --languages parity aa anbn

For each model and language every learning rate is tried once, on strings of its own seed, and the one with
the most right strings of training length goes into a run for each seed. Each run is a file in the folder
--out; the same command goes on where it was stopped. At the end table.md, plot.png and results.json are
written from those files. --workers N makes N runs at the same time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from entries import MODELS, check_models
from trial import TUNING_SEED, Trial, run_trial

from nestor.data.tasks.formal_languages import LANGUAGES, NOTATION, formal_language
from nestor.errors import ConfigError, NestorError
from nestor.evaluation.plots import heatmap
from nestor.evaluation.report import with_interval
from nestor.evaluation.statistics import mean_interval
from nestor.evaluation.suites import versions
from nestor.files import write_json, write_text
from nestor.jobs import Workers

# Beside the folders of the recipes lies what they share.
sys.path.append(str(Path(__file__).parents[1]))
from sweep import Row, Sweep, place


@dataclass
class Args:
    """Train small models on formal languages and score them within and beyond the lengths of training."""

    models: tuple[str, ...] = (
        "transformer", "linear-attention", "deltanet", "ttt-linear", "titans-lmm", "hope",
    )  # fmt: skip
    """Rows of the table in entries.py."""
    languages: tuple[str, ...] = tuple(LANGUAGES)
    """parity, aa, abab, anbn, anbncn, shuffle-2."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each draws its own weights and strings."""
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """Tried once for every model and language."""
    steps: int = 10_000
    """Updates of a run."""
    batch_size: int = 32
    """Strings of an update."""
    width: int = 64
    """Of the models."""
    layers: int = 2
    """Of the models."""
    chunk_size: int = 1
    """Tokens of a chunk of memories that take gradients at a chunk's start."""
    lengths: tuple[int, int] = (2, 50)
    """Of training, and of bin 0."""
    longer: tuple[int, int] = (52, 100)
    """Of bin 1."""
    strings: int = 500
    """Strings of a bin, all different; of languages with one string a length, all there are."""
    out: Path = Path("runs/formal")
    """Folder of the results."""
    device: str = "cpu"
    """cpu or cuda; with several workers cuda is all GPUs in turn."""
    workers: int = 1
    """Processes that make runs at the same time, each on one thread of the CPU."""

    def check(self) -> None:
        """Raises ConfigError for what is out of range or unknown."""
        check_models(self.models)
        for name in self.languages:
            formal_language(name)
        for name in ("models", "languages", "seeds", "learning_rates"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"--{name.replace('_', '-')} are {list(values)}; give some, each once")
        if min(self.steps, self.batch_size, self.strings, self.lengths[0], *self.learning_rates) <= 0:
            raise ConfigError("steps, batch size, strings, lengths and learning rates must be above 0")
        Workers(self.workers)
        if min(self.seeds) < 0 or TUNING_SEED in self.seeds:
            raise ConfigError(f"--seeds are {list(self.seeds)}; give none below 0, and not {TUNING_SEED}")
        if self.longer[0] <= self.lengths[1]:
            raise ConfigError(
                f"--longer begins at {self.longer[0]} and --lengths ends at {self.lengths[1]}; bin 1 is to "
                f"be longer than what was trained"
            )

    def trial(self, model: str, language: str, seed: int, learning_rate: float = 0.0) -> Trial:
        """A run, whose learning rate may be left to the sweep."""
        bins = (self.lengths, self.longer)
        return Trial(
            model, language, seed, learning_rate, self.steps, self.batch_size, self.width, self.layers,
            self.chunk_size, bins, self.strings,
        )  # fmt: skip


def main(args: Args, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run what is missing and write the results.

    Raises:
        ConfigError: a setting; a file in the folder from other settings. JobError: runs of workers failed.
    """
    args.check()
    sweep = sweep_of(args, say)
    if args.workers > 1:
        sweep.run_missing(rows_of(args), Workers(args.workers, args.device), "formal languages")
    rows = []
    for language in args.languages:
        for model in args.models:
            row = row_of(args, model, language)
            rate, tried = sweep.rate(row)
            found = [sweep.run(row, seed) for seed in args.seeds]
            right = {f"{one:g}": {"right": result["bins"][0]["right"]} for one, result in tried.items()}
            rows.append(summarised(model, language, rate, right, found))
    results = {
        "format": "nestor-formal",
        "settings": json.loads(json.dumps(asdict(args) | {"out": None})),
        "versions": versions(),
        "places": sorted({place for row in rows for place in row["places"]}),
        "models": {name: MODELS[name].about for name in args.models},
        "rows": rows,
    }
    write_json(args.out / "results.json", results)
    write_text(args.out / "table.md", table(results))
    plot(results).write(args.out / "plot.png")
    say(table(results))
    return results


def sweep_of(args: Args, say: Callable[[str], None]) -> Sweep:
    """How rows become results."""
    return Sweep(args.out, args.learning_rates, make, by_right_strings, line, args.device, say)


def rows_of(args: Args) -> list[Row]:
    """All rows, the models with slower ones first, so that none is left for the end."""
    return [row_of(args, model, language) for model in reversed(args.models) for language in args.languages]


def row_of(args: Args, model: str, language: str) -> Row:
    """The runs of a model and a language."""
    # Longer strings have no say in the choice of the learning rate, so none is scored.
    tuning = replace(args.trial(model, language, TUNING_SEED), bins=(args.lengths,))
    runs = {seed: args.trial(model, language, seed) for seed in args.seeds}
    return Row(f"{model}-{language}", tuning, runs)


def make(trial: Trial, name: str, device: str) -> dict[str, Any]:
    """A run with the place where it was made."""
    return run_trial(trial, device) | {"place": place(device)}


def by_right_strings(result: dict[str, Any]) -> tuple[int, float]:
    """Most strings of training length right; of equals, the lower loss."""
    return -result["bins"][0]["right"], result["loss"] or float("inf")


def line(result: dict[str, Any]) -> str:
    """A result in a few words."""
    right = ", ".join(f"{one['right']}/{one['n']}" for one in result["bins"])
    return f"{right} strings right, {result['seconds']} s"


def summarised(
    model: str, language: str, rate: float, tried: dict[str, Any], found: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """A row of the table: for each bin the accuracy of each seed, and their mean with its interval."""
    bins = []
    for number, first in enumerate(found[0]["bins"]):
        each = [result["bins"][number]["right"] / result["bins"][number]["n"] for result in found]
        bins.append(
            {
                "lengths": first["lengths"],
                "n": first["n"],
                "accuracy": mean_interval(each).as_dict(),
                "by_seed": each,
                "places": [result["bins"][number]["places"] for result in found],
            }
        )
    return {
        "model": model, "language": language, "learning_rate": rate, "tuning": tried,
        "parameters": found[0]["parameters"], "losses": [result["loss"] for result in found], "bins": bins,
        "places": sorted({result["place"] for result in found}),
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """The rows as Markdown, with what the columns mean."""
    settings = results["settings"]
    heads = ["language", "model", "learning rate"]
    for number, lengths in enumerate((settings["lengths"], settings["longer"])):
        heads += [f"bin {number}: {lengths[0]} to {lengths[1]}", "best seed"]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for row in results["rows"]:
        cells = [NOTATION[row["language"]], row["model"], f"{row['learning_rate']:g}"]
        for one in row["bins"]:
            cells += [with_interval(one["accuracy"], as_percent=True), f"{100 * max(one['by_seed']):.0f} %"]
        lines.append("| " + " | ".join(cells) + " |")
    count = len(settings["seeds"])
    few = " A bootstrap over fewer than five seeds is too narrow." if 1 < count < 5 else ""
    models = "\n".join(f"- {name}: {about}." for name, about in results["models"].items())
    return (
        "# Formal languages\n\n"
        f"Strings that are right at every place, of up to {settings['strings']} different ones a bin; mean "
        f"of {count} seed{'s' if count > 1 else ''} with its 95 % interval over seeds (none where all seeds "
        f"agree).{few} Layers: {settings['layers']}, of width {settings['width']}; {settings['steps']} steps "
        f"of {settings['batch_size']} strings, chunks of {settings['chunk_size']}; learning rates "
        f"{', '.join(f'{rate:g}' for rate in settings['learning_rates'])} tried once for each row.\n\n"
        + "\n".join(lines)
        + f"\n\n{models}\n\nRun on: {'; '.join(results['places'])}.\n"
    )


def plot(results: dict[str, Any]) -> Any:
    """A cell for each model, language and bin."""
    settings = results["settings"]
    models, languages = settings["models"], settings["languages"]
    found = {(row["model"], row["language"]): row["bins"] for row in results["rows"]}
    values = [
        [one["accuracy"]["estimate"] for language in languages for one in found[model, language]]
        for model in models
    ]
    return heatmap(
        values, rows=models,
        columns=[f"{NOTATION[language]}\nbin {number}" for language in languages for number in range(2)],
        title="Strings of formal languages right at every place", x="", y="", label="strings right",
        alt="Share of right strings for each model and language, within and beyond the lengths of training.",
    )  # fmt: skip


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except NestorError as error:
        sys.exit(f"run.py: {error}")
