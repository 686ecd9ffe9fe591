"""Table 3: models with a memory, post-trained from other initial states, far beyond their training length.

    python recipes/evidence/length.py lmm=runs/a/final mag=runs/b/final
    python recipes/evidence/length.py lmm=WEIGHTS/titans-lmm-0 mag=WEIGHTS/titans-mag-0 --data NOVELS \
        --context 2048 --batch-size 16 --learning-rate 2e-4 --device cuda --workers 16
    python recipes/evidence/length.py --table-only

Each model, a folder that `nestor train` or another recipe left, goes on for some hundred steps on text, once
for every way in which sequences can start, and for every seed: from fresh States, which is the control, and
from those of the four interventions of arXiv 2507.02782. Before and after, bits a byte by position, recall
and effective remembrance are measured to 16 times the training length. Each piece is a file in the folder
--out; the same command goes on where it was stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from length_table import plots, summarised, table
from study import write_table

from nestor.cli.loading import Opener
from nestor.errors import ConfigError, DataError, NestorError, NonFiniteError
from nestor.evaluation import Settings, evaluate
from nestor.evaluation.figures import file_name
from nestor.evaluation.suites import device_name, versions
from nestor.files import write_json
from nestor.jobs import Job, Workers, run_jobs
from nestor.training import TrainConfig, train

RESULTS = Path(__file__).parents[1] / "results"
TRAIN = ("novels-train-a.jsonl.xz", "novels-train-b.jsonl.xz")
LONG = "novels-heldout-long.jsonl.xz"

#: How sequences start, by name: values of `run.state_mode`.
STARTS = {
    "none": "reset",
    "state-passing": "pass",
    "truncated-bptt": "carry",
    "fitted-noise": "fitted-noise",
    "random-noise": "random-noise",
}
#: Beside which a fresh start needs no share of its own: documents that begin have it.
WITHOUT_SHARE = ("none", "truncated-bptt")
#: Layers whose models have no memory that a start could be in.
ATTENTION = {"full_attention", "sliding_attention"}
#: Post-training reads its text in another order than a training of the same seed.
FIRST_SEED = 1000


@dataclass
class Args:
    """Post-train models from other initial states and measure them to 16 times their training length."""

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[NAME=FOLDER ...]")] = ()
    """Folders with trained models, each with a name of its own."""
    starts: tuple[str, ...] = tuple(STARTS)
    """none (the control), state-passing, truncated-bptt, fitted-noise, random-noise."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of post-training: each reads its text in another order."""
    steps: int = 500
    """Updates of post-training."""
    fresh_share: float = 0.1
    """Segments that start fresh under state passing and noise."""
    noise: float = 0.1
    """Standard deviation of random noise."""
    context: int | None = None
    """Tokens of a segment; none given: those of the model's training, if its folder says so."""
    batch_size: int | None = None
    """Segments of an update; none given: as in the model's training."""
    learning_rate: float | None = None
    """Held after a short warm-up; none given: a tenth of the peak of the model's training."""
    data: Path | None = None
    """Folder with the novels, to train on and to measure on; none given: the text of the model's training,
    and the held-out part of the shipped classics."""
    multiple: int = 16
    """Measure to so many training lengths."""
    passages: int = 8
    """Texts of that length, for bits a byte and for remembrance."""
    questions: int = 16
    """Facts asked for at each distance."""
    templates: tuple[str, ...] = ("key",)
    """Wordings of the facts, those of the model's training if it learned any: key, house, phone, call."""
    measured_together: int = 16
    """Texts read at the same time."""
    out: Path = Path("runs/evidence/length")
    """Folder of the pieces."""
    results: Path = RESULTS
    """Folder of the table, its plots and its JSON."""
    device: str = "cpu"
    """cpu or cuda; with several workers cuda is all GPUs in turn."""
    workers: int = 1
    """Processes that make pieces at the same time, each on one thread of the CPU."""
    table_only: bool = False
    """Make the table and the plots again from the JSON that there is."""

    def check(self) -> None:
        """Raises ConfigError for what is out of range or unknown."""
        if not self.models:
            raise ConfigError("no model is named; give folders of trained models, as NAME=FOLDER")
        names = list(self.folders())
        if len(names) < len(self.models):
            raise ConfigError(f"models are {list(self.models)}; give each a name of its own, as NAME=FOLDER")
        for start in self.starts:
            if start not in STARTS:
                raise ConfigError(f"there is no start {start!r}; there are {', '.join(STARTS)}")
        for name in ("starts", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"--{name} are {list(values)}; give some, each once")
        for name in ("steps", "multiple", "passages", "questions", "measured_together", "workers"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1"
                )
        if min(self.seeds) < 0:
            raise ConfigError(f"--seeds are {list(self.seeds)}; give none below 0")
        Workers(self.workers, self.device).devices()

    def folders(self) -> dict[str, Path]:
        """The folder of each model by its name."""
        pairs = [model.rpartition("=") for model in self.models]
        return {file_name(name or Path(folder).name): Path(folder) for name, _, folder in pairs}

    def settings(self) -> dict[str, Any]:
        """What the results depend on, as JSON: not where they are made and kept."""
        places = ("models", "data", "out", "results", "device", "workers", "table_only")
        return json.loads(json.dumps({k: v for k, v in asdict(self).items() if k not in places}))


@dataclass(frozen=True)
class Piece:
    """A model with one way to start and one seed; without a start it is measured as it is."""

    args: Args
    model: str
    folder: Path
    start: str | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.model}-{self.start}-{self.seed}" if self.start else f"{self.model}-before"

    @property
    def path(self) -> Path:
        """Where its result is kept."""
        return self.args.out / f"{self.name}.json"

    def config(self, device: str = "cpu") -> TrainConfig:
        """Post-training; of a piece without a start what it would be from fresh States.

        Raises:
            ConfigError: the folder is none of a trained model, or does not say what the arguments leave open.
        """
        args, before = self.args, training_of(self.folder)
        given = {
            "context": args.context or before.get("data", {}).get("sequence_length"),
            "batch-size": args.batch_size or before.get("data", {}).get("batch_size"),
            "learning-rate": args.learning_rate or before.get("optimizer", {}).get("lr", 0) / 10,
        }
        for name, value in given.items():
            if not value:
                raise ConfigError(f"{self.folder} does not say how it was trained; give --{name}")
        if args.data is not None:
            sources: Any = [{"text": [str(existing(args.data, name)) for name in TRAIN]}]
            valid: Any = []
        else:
            sources, valid = before.get("data", {}).get("sources"), before.get("data", {}).get("valid", [])
            if not sources:
                raise ConfigError(f"{self.folder} does not say what it was trained on; give --data")
        start = self.start or "none"
        return TrainConfig.from_dict(
            {
                "name": self.name,
                "model": {"path": str(self.folder)},
                "data": {
                    "sources": sources,
                    "valid": valid,
                    "sequence_length": given["context"],
                    "batch_size": given["batch-size"],
                },
                "optimizer": before.get("optimizer", {}) | {"lr": given["learning-rate"]},
                "schedule": {"name": "constant", "warmup": 0.05},
                "run": {
                    "out": str(args.out / "training" / self.name / "run"),
                    "steps": args.steps,
                    "precision": "bf16" if device.startswith("cuda") else "fp32",
                    "state_mode": STARTS[start],
                    "fresh_share": 0.0 if start in WITHOUT_SHARE else args.fresh_share,
                    "noise": args.noise,
                    "seed": FIRST_SEED + self.seed,
                    "device": "auto" if device.startswith("cuda") else "cpu",
                    "eval_every": 0,
                    "save_every": 0,
                    "tracker": "none",
                },
            }
        )

    def settings(self) -> dict[str, Any]:
        """All that its result depends on, as JSON. Raises as `config`."""
        found = self.config().to_dict()
        training = {
            "data": {"sequence_length": found["data"]["sequence_length"]},
            "weights": hashlib.blake2b((self.folder / "model.safetensors").read_bytes()).hexdigest()[:32],
            "novels": self.args.data is not None,
        }
        if self.start:
            run = {key: found["run"][key] for key in ("steps", "state_mode", "fresh_share", "seed")}
            training |= {"optimizer": found["optimizer"], "schedule": found["schedule"], "run": run}
            training["data"]["batch_size"] = found["data"]["batch_size"]
            if self.start == "random-noise":
                run["noise"] = found["run"]["noise"]
        asked = ("multiple", "passages", "questions", "templates")
        return json.loads(json.dumps(training | {key: getattr(self.args, key) for key in asked}))

    def kept(self) -> dict[str, Any] | None:
        """The result in the folder; None if there is none.

        Raises:
            ConfigError: the file is of a piece with other settings. DataError: it is none of this program.
        """
        if not self.path.is_file():
            return None
        try:
            kept = json.loads(self.path.read_text(encoding="utf-8"))
            before, result, _ = kept["settings"], kept["result"], kept["result"]["place"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.path} is not a result of this program ({error!r}); remove it") from error
        settings = self.settings()
        if before != settings:
            other = {key: before.get(key) for key, value in settings.items() if before.get(key) != value}
            now = {key: settings[key] for key in other}
            raise ConfigError(
                f"{self.path} is of a piece with {other}, and this one has {now}; name another --out"
            )
        return result

    def get(self, device: str) -> dict[str, Any]:
        """The result in the folder, or that of a run which is then kept there. Raises as `kept`."""
        result = self.kept()
        if result is None:
            result = self.measure(device)
            write_json(self.path, {"settings": self.settings(), "result": result})
        return result

    def measure(self, device: str) -> dict[str, Any]:
        """Post-train, if there is a start, and measure. The trained weights are not kept.

        Where training or measuring comes to no number, the result says so instead.
        """
        config, folder = self.config(device), self.folder
        result: dict[str, Any] = {"place": f"{device_name(device)}, PyTorch {torch.__version__}"}
        try:
            if self.start:
                trained = train(config, resume="never", quiet=True)
                if trained.final is None:
                    sys.exit(trained.exit_code)
                folder = trained.final
                result["loss"] = trained.metrics["loss"]
            result |= measured(self.args, self.model, folder, config.data.sequence_length, device)
        except NonFiniteError as error:
            result["failed"] = str(error)
        # The folder of the run, and the lock beside it.
        shutil.rmtree(config.folder.parent, ignore_errors=True)
        return result


def measured(args: Args, name: str, folder: Path, context: int, device: str) -> dict[str, Any]:
    """Bits a byte by position, recall by distance and effective remembrance of a trained model."""
    subject = Opener(name, str(folder), "float32", None)(device)
    settings = Settings(
        suites=("perplexity", "remembrance"),
        lengths=(args.multiple * context,),
        repeats=args.passages,
        corpus=("classics",) if args.data is None else (str(existing(args.data, LONG)),),
        batch_size=args.measured_together,
        by_context=False,
        recall_tasks=("facts",),
        templates=args.templates,
    )
    found = evaluate([subject], settings)["results"]
    found |= evaluate([subject], replace(settings, suites=("recall",), repeats=args.questions))["results"]
    bits, recall, remembrance = (
        found[one]["models"][name] for one in ("perplexity", "recall", "remembrance")
    )
    return {
        "context": context,
        "edges": bits["by_position"]["edges"],
        "bits": np.sum(bits["sums"]["bits"], axis=0).tolist(),
        "bytes": np.sum(bits["sums"]["bytes"], axis=0).tolist(),
        "distances": [row["distance"] for row in recall["distances"]],
        "right": [row["exact_match"]["estimate"] for row in recall["distances"]],
        "answer_bits": [row["answer_bits"]["estimate"] for row in recall["distances"]],
        "length": remembrance["length"],
        "dropped": remembrance["dropped"],
        "remembrance": [one["estimate"] for one in remembrance["remembrance"]],
    }


def main(args: Args, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Make what is missing and write the results.

    Raises:
        ConfigError: a setting; a file in the folder from other settings. DataError: no text or no such file.
        JobError: pieces of workers failed.
    """
    path = args.results / "length.json"
    results = json.loads(path.read_text(encoding="utf-8")) if args.table_only else collected(args, say)
    write_table(path, results, table, plots, say)
    return results


def collected(args: Args, say: Callable[[str], None]) -> dict[str, Any]:
    """The results of all pieces, those that are missing made now."""
    args.check()
    pieces = [piece for name, folder in args.folders().items() for piece in pieces_of(args, name, folder)]
    missing = [piece for piece in pieces if piece.kept() is None]
    if args.workers > 1:
        jobs = [Job(piece.name, _make, (piece,)) for piece in missing]
        run_jobs(jobs, Workers(args.workers, args.device), "length generalisation")
    else:
        for number, piece in enumerate(missing, start=1):
            piece.get(args.device)
            say(f"{number}/{len(missing)} {piece.name}")
    rows, places = [], set()
    for name in args.folders():
        kept: dict[str | None, list[dict[str, Any]]] = {}
        for piece in pieces:
            if piece.model == name:
                kept.setdefault(piece.start, []).append(piece.get(args.device))
        rows += summarised(name, kept)
        places |= {result["place"] for results in kept.values() for result in results}
    return {
        "format": "nestor-length",
        "date": datetime.now(UTC).date().isoformat(),
        "settings": args.settings(),
        "versions": versions(),
        "places": sorted(places),
        "rows": rows,
    }


def pieces_of(args: Args, name: str, folder: Path) -> list[Piece]:
    """The model as it is, and each start and seed; a model without a memory is measured as it is alone."""
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder} holds no model; give a folder with config.json and model.safetensors")
    layers = set(json.loads(path.read_text(encoding="utf-8")).get("layer_types") or ())
    starts = args.starts if layers - ATTENTION else ()
    return [Piece(args, name, folder)] + [
        Piece(args, name, folder, start, seed) for start in starts for seed in args.seeds
    ]


def existing(folder: Path, name: str) -> Path:
    """The file of that name, with or without its compression. Raises DataError: there is none."""
    for path in (folder / name, folder / name.removesuffix(".xz")):
        if path.is_file():
            return path
    raise DataError(f"{folder} has no {name}; give the folder with the novels as --data")


def training_of(folder: Path) -> dict[str, Any]:
    """The configuration with which the model of a folder was trained, as far as the folder has it."""
    path = folder / "training.json"
    return json.loads(path.read_text(encoding="utf-8"))["config"] if path.is_file() else {}


def _make(piece: Piece, device: str) -> None:
    """In a worker: a piece, which is kept in the folder."""
    piece.get(device)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except NestorError as error:
        sys.exit(f"length.py: {error}")
