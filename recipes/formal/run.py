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

import torch
import tyro
from entries import MODELS, check_models
from trial import TUNING_SEED, Trial, run_trial

from nestor.data.tasks.formal_languages import LANGUAGES, NOTATION, formal_language
from nestor.errors import ConfigError, DataError, NestorError
from nestor.evaluation.plots import heatmap
from nestor.evaluation.report import with_interval
from nestor.evaluation.statistics import mean_interval
from nestor.evaluation.suites import device_name, versions
from nestor.files import write_json, write_text
from nestor.jobs import Job, Workers, run_jobs


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

    def path(self, name: str) -> Path:
        """Where the run of that name is kept."""
        return self.out / f"{name}.json"

    def trial(self, model: str, language: str, seed: int, learning_rate: float) -> Trial:
        """The run of that name."""
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
    if args.workers > 1:
        run_jobs(jobs_of(args), Workers(args.workers, args.device), "formal languages")
    rows = []
    for language in args.languages:
        for model in args.models:
            rate, tried = tuned_rate(args, model, language, say)
            found = [seed_run(args, model, language, seed, say) for seed in args.seeds]
            rows.append(summarised(model, language, rate, tried, found))
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


def tuned_rate(
    args: Args, model: str, language: str, say: Callable[[str], None]
) -> tuple[float, dict[str, Any]]:
    """The learning rate with the most strings of training length right, and what each came to; of equals the
    one of the lower loss. One rate alone is taken without a trial."""
    if len(args.learning_rates) == 1:
        return args.learning_rates[0], {}
    tried = {}
    for rate in args.learning_rates:
        result = tuning_run(args, model, language, rate, say)
        tried[rate] = (-result["bins"][0]["right"], result["loss"] or float("inf"))
    best = min(tried, key=lambda rate: tried[rate])
    return best, {f"{rate:g}": {"right": -right} for rate, (right, _) in tried.items()}


def jobs_of(args: Args) -> list[Job]:
    """The runs that are missing in the folder, those of seeds after those that choose their learning rates.

    Raises as `kept_result`.
    """
    jobs = []
    for model in reversed(args.models):  # the slower ones first, so that none is left for the end
        for language in args.languages:
            which = (args, model, language)
            rates = args.learning_rates if len(args.learning_rates) > 1 else ()
            trials = [tuning_trial(*which, rate) for rate in rates]
            jobs += [
                Job(name, _make, (tuning_run, *which, trial.learning_rate))
                for name, trial in trials
                if kept_result(args, trial, name) is None
            ]
            names = tuple(name for name, _ in trials)
            jobs += [
                Job(seed_name(model, language, seed), _make, (seed_run, *which, seed), after=names)
                for seed in args.seeds
                if not args.path(seed_name(model, language, seed)).is_file()
            ]
    return jobs


def _make(run: Callable[..., Any], args: Args, *which: Any, device: str) -> None:
    """In a worker: a run, which is kept in the folder."""
    run(replace(args, device=device), *which, say=lambda text: None)


def tuning_trial(args: Args, model: str, language: str, rate: float) -> tuple[str, Trial]:
    """The run that tries a learning rate, with its name."""
    # Longer strings have no say in the choice, so none is scored.
    trial = replace(args.trial(model, language, TUNING_SEED, rate), bins=(args.lengths,))
    return f"tuning/{model}-{language}-{rate:g}", trial


def tuning_run(
    args: Args, model: str, language: str, rate: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """The result of a learning rate that is tried."""
    name, trial = tuning_trial(args, model, language, rate)
    return load_or_run(args, trial, name, say)


def seed_name(model: str, language: str, seed: int) -> str:
    """What the run of a seed is called."""
    return f"{model}-{language}-{seed}"


def seed_run(args: Args, model: str, language: str, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """The result of a seed at the learning rate that was chosen."""
    rate, _ = tuned_rate(args, model, language, say)
    return load_or_run(args, args.trial(model, language, seed, rate), seed_name(model, language, seed), say)


def load_or_run(args: Args, trial: Trial, name: str, say: Callable[[str], None]) -> dict[str, Any]:
    """The result in the folder, or that of a run that is then kept there. Raises as `kept_result`."""
    result = kept_result(args, trial, name)
    if result is None:
        result = run_trial(trial, args.device)
        # Those who go on may do so on another machine.
        result["place"] = f"{device_name(args.device)}, PyTorch {torch.__version__}"
        write_json(args.path(name), {"settings": _settings(trial), "result": result})
        right = ", ".join(f"{one['right']}/{one['n']}" for one in result["bins"])
        say(f"{name} at {trial.learning_rate:g}: {right} strings right, {result['seconds']} s")
    return result


def kept_result(args: Args, trial: Trial, name: str) -> dict[str, Any] | None:
    """The result in the folder; None if there is none.

    Raises:
        ConfigError: the file is of a run with other settings.
        DataError: the file is none of this program.
    """
    path = args.path(name)
    if not path.is_file():
        return None
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        # Results of older versions do not say where they ran.
        before, result, _ = kept["settings"], kept["result"], kept["result"]["place"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a result of this program ({error!r}); remove it") from error
    settings = _settings(trial)
    other = {key: before.get(key) for key, value in settings.items() if before.get(key) != value}
    if other:
        now = {key: settings[key] for key in other}
        raise ConfigError(
            f"{path} is of a run with {other}, and this one has {now}; name another folder with --out"
        )
    return result


def _settings(trial: Trial) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(trial)))


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
