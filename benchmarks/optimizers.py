"""AdamW, Muon, AdaMuon and M3: held-out loss of one small model, against steps and against time.

Every optimiser gets the same trials: one for each learning rate on one seed, then the best rate on seeds of
their own. Hidden matrices go to the optimiser that is named, all else to AdamW at the same rate; updates have
AdamW's size, so that one grid of rates serves (`nestor.training.optimizer`). A step's time is measured in
interleaved rounds, in which every optimiser takes its turn, so that a busy machine slows all alike.

The second section is of tasks whose gradients lie in orthogonal subspaces, learned one after another: what an
optimiser's step for the present task does to the past ones (arXiv 2512.24695, eq. 45; `orthogonal_tasks.py`).

Results are written after each trial, and the same command goes on with those that are missing:
    python benchmarks/optimizers.py                                     # minutes on one core
    python benchmarks/optimizers.py --device cuda --size 5m --steps 3000 --batch 32 --tokens 512 --warmup 100
"""

from __future__ import annotations

import dataclasses
import datetime
import io
import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib.image
import numpy as np
import orthogonal_tasks
import torch
import tyro
from rich.console import Console
from rich.table import Table

from nestor.errors import NonFiniteError
from nestor.evaluation.plots import Axes, Series, curves
from nestor.files import FileLock, atomic_write, write_json
from nestor.models import NestorForCausalLM, preset
from nestor.training import TrainConfig, train
from nestor.training.optimizer import build_optimizers

#: Settings of `optimizer` by the name under which it is measured. The last three tell what M3's parts do;
#: muon-float32 is what is left of it without them. PyTorch's Muon orthogonalises in bfloat16, which a CPU may
#: only be able to emulate, several times slower.
SUBJECTS: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw"},
    "muon": {"name": "muon"},
    "adamuon": {"name": "adamuon"},
    "m3": {"name": "m3"},
    "m3-orthogonal": {"name": "m3", "m3_v_source": "orthogonal"},
    "m3-fast": {"name": "m3", "m3_slow_weight": 0.0},
    "muon-float32": {"name": "m3", "m3_slow_weight": 0.0, "m3_v_source": "none"},
}
TUNING_SEED = 0
SECTIONS = ("language", "tasks")


@dataclass
class Settings:
    """What is trained, and how often.

    Attributes:
        subjects: m3-orthogonal takes second moments of the orthogonalised momentum, m3-fast has no slow
            branch, muon-float32 neither of the two.
        rates: of each optimiser, on the tuning seed 0. seeds: of the best rate.
        rounds: in which a step is timed; steps: of one trial; points: measurements of a curve.
        output: default: results/optimizers-<device>.json; the picture lies beside it.
    """

    sections: tuple[str, ...] = SECTIONS
    subjects: tuple[str, ...] = tuple(SUBJECTS)
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
    seeds: tuple[int, ...] = (1, 2, 3)
    device: Literal["cpu", "cuda"] = "cpu"
    model: str = "transformer"
    size: str = "quick"
    text: str = "classics"
    steps: int = 100
    batch: int = 4
    tokens: int = 128
    warmup: int = 10
    weight_decay: float = 0.1
    points: int = 10
    eval_batches: int = 16
    rounds: int = 5
    threads: int = 1
    output: Path | None = None

    def result_file(self) -> Path:
        return self.output or Path(__file__).with_name("results") / f"optimizers-{self.device}.json"


# Settings that do not change what a trial gives.
FREE = ("sections", "subjects", "seeds", "rates", "rounds", "output")


def describe(s: Settings) -> dict[str, Any]:
    """What the numbers depend on."""
    device = torch.cuda.get_device_name() if s.device == "cuda" else f"{platform.machine()} CPU"
    kept = {key: value for key, value in dataclasses.asdict(s).items() if key not in FREE}
    return {
        "device": device,
        "torch": torch.__version__,
        "date": str(datetime.date.today()),
        "settings": kept,
    }


def opened(s: Settings) -> dict[str, Any]:
    """The results so far, if they are of these settings.

    Raises:
        SystemExit: they are of others.
    """
    about, file = describe(s), s.result_file()
    if not file.exists():
        return {"about": about, "trials": {}, "step_seconds": {}}
    found = json.loads(file.read_text(encoding="utf-8"))
    if found["about"]["settings"] != about["settings"] or found["about"]["device"] != about["device"]:
        raise SystemExit(
            f"{file} holds trials of {found['about']}, and this would be {about}; remove it or name another "
            "file with --output"
        )
    return found


def config_of(s: Settings, subject: str, rate: float, seed: int, folder: str) -> TrainConfig:
    """One trial as a training run."""
    return TrainConfig.from_dict(
        {
            "name": f"{subject}-{rate}-{seed}",
            "model": {"preset": s.model, "size": s.size},
            "data": {"sources": [s.text], "sequence_length": s.tokens, "batch_size": s.batch},
            "optimizer": {**SUBJECTS[subject], "lr": rate, "weight_decay": s.weight_decay},
            "schedule": {"warmup": s.warmup},
            "run": {
                "out": f"{folder}/run",
                "steps": s.steps,
                "seed": seed,
                "precision": "bf16" if s.device == "cuda" else "fp32",
                "device": "cpu" if s.device == "cpu" else "auto",
                "eval_every": max(1, s.steps // s.points),
                "eval_batches": s.eval_batches,
                "save_every": 0,
                "log_every": max(1, s.steps // s.points),
                "tracker": "none",
            },
        }
    )


def trial(s: Settings, subject: str, rate: float, seed: int) -> dict[str, Any]:
    """The curve of held-out loss of one run; `final` is None where it did not stay finite."""
    curve: list[list[float]] = []

    def note(metrics: dict[str, Any]) -> None:
        if "valid_loss" in metrics:
            curve.append([metrics["step"], metrics["valid_loss"]])

    with tempfile.TemporaryDirectory() as folder:
        try:
            run = train(config_of(s, subject, rate, seed, folder), resume="never", on_step=note, quiet=True)
            if run.signal:
                raise SystemExit(run.exit_code)
            final = curve[-1][1]
        except NonFiniteError:
            final = None
    return {"subject": subject, "rate": rate, "seed": seed, "final": final, "curve": curve}


def best_rate(s: Settings, trials: dict[str, Any], subject: str) -> float:
    """The rate with the least loss on the tuning seed."""

    def loss(rate: float) -> float:
        final = trials[key_of(subject, rate, TUNING_SEED)]["final"]
        return math.inf if final is None or not math.isfinite(final) else final

    return min(s.rates, key=loss)


def key_of(subject: str, rate: float, seed: int) -> str:
    return f"{subject} rate {rate:g} seed {seed}"


def run_trials(s: Settings, result: dict[str, Any], console: Console) -> None:
    """All trials that are missing, each written when it is done."""
    for subject in s.subjects:
        for stage in ("tune", "seeds"):
            plan = (
                [(rate, TUNING_SEED) for rate in s.rates]
                if stage == "tune"
                else [(best_rate(s, result["trials"], subject), seed) for seed in s.seeds]
            )
            for rate, seed in plan:
                key = key_of(subject, rate, seed)
                if key not in result["trials"]:
                    result["trials"][key] = trial(s, subject, rate, seed)
                    write_json(s.result_file(), result)
                    console.print(f"{key}: {result['trials'][key]['final']}")


def time_steps(s: Settings) -> dict[str, Any]:
    """Seconds of a training step of each optimiser, medians over interleaved rounds."""
    device = torch.device(s.device)
    works: dict[str, Callable[[], None]] = {}
    for subject in s.subjects:
        model = NestorForCausalLM(preset(s.model, s.size, vocab_size=260)).to(device)
        config = config_of(s, subject, s.rates[0], TUNING_SEED, "unused").optimizer
        works[subject] = _step_of(model, build_optimizers(model, config), s, device)
    times: dict[str, list[float]] = {subject: [] for subject in s.subjects}
    # As many steps as a period of the slow momentum, the one that orthogonalises it among them.
    steps = 10
    for round_ in range(s.rounds + 1):
        for subject, work in works.items():
            began = time.perf_counter()
            for _ in range(steps):
                work()
            if round_:
                times[subject].append((time.perf_counter() - began) / steps)
    first = s.subjects[0]
    return {
        subject: {
            "seconds": statistics.median(found),
            f"over_{first}": statistics.median(a / b for a, b in zip(found, times[first], strict=True)),
        }
        for subject, found in times.items()
    }


def _step_of(model: Any, optimizers: list[Any], s: Settings, device: torch.device) -> Callable[[], None]:
    ids = torch.randint(0, 256, (s.batch, s.tokens), device=device)

    def work() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=s.device == "cuda"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if s.device == "cuda":
            torch.cuda.synchronize()

    return work


def summarise(s: Settings, result: dict[str, Any]) -> dict[str, Any]:
    """By subject: the best rate, held-out loss at the end of each seed, time of a step."""
    summary = {}
    for subject in s.subjects:
        rate = best_rate(s, result["trials"], subject)
        finals = [result["trials"][key_of(subject, rate, seed)]["final"] for seed in s.seeds]
        finite = [final for final in finals if final is not None]
        summary[subject] = {
            "rate": rate,
            "at_edge": rate in (min(s.rates), max(s.rates)) and len(s.rates) > 1,
            "finals": finals,
            "mean": statistics.mean(finite) if len(finite) == len(finals) else None,
            "deviation": statistics.stdev(finite) if len(finite) == len(finals) > 1 else None,
            **result["step_seconds"].get(subject, {}),
        }
    return summary


def draw(s: Settings, result: dict[str, Any]) -> Path:
    """Loss against steps and against seconds, side by side; bands are the least and the most of the seeds."""
    by_step, by_time = [], []
    for subject, row in result["summary"].items():
        found = [result["trials"][key_of(subject, row["rate"], seed)]["curve"] for seed in s.seeds]
        steps = [step for step, _ in min(found, key=len)]
        columns = list(zip(*([loss for _, loss in curve[: len(steps)]] for curve in found), strict=True))
        y, low, high = ([f(c) for c in columns] for f in (statistics.mean, min, max))
        by_step.append(Series(subject, steps, y, low, high))
        by_time.append(Series(subject, [step * row["seconds"] for step in steps], y, low, high))
    title = f"{s.model} {s.size} on {s.text}"
    plots = [
        curves(by_step, Axes(title, "steps", "held-out loss, nats a token", log_x=False)),
        curves(by_time, Axes(title, "seconds", "held-out loss, nats a token", log_x=False)),
    ]
    pictures = [matplotlib.image.imread(io.BytesIO(plot.light)) for plot in plots]
    height = max(picture.shape[0] for picture in pictures)
    whole = [np.pad(p, ((0, height - p.shape[0]), (0, 0), (0, 0)), constant_values=1.0) for p in pictures]
    path = s.result_file().with_suffix(".png")
    with atomic_write(path) as temporary:
        matplotlib.image.imsave(temporary, np.concatenate(whole, axis=1), format="png")
    return path


def print_summary(result: dict[str, Any], console: Console) -> None:
    table = Table("optimiser", "rate", "held-out loss", "deviation", "ms a step", "time over the first's")
    for subject, row in result["summary"].items():
        ratio = next((value for key, value in row.items() if key.startswith("over_")), math.nan)
        edge = " (edge of the grid)" if row["at_edge"] else ""
        mean, deviation = (math.nan if row[key] is None else row[key] for key in ("mean", "deviation"))
        table.add_row(
            subject, f"{row['rate']:g}{edge}", f"{mean:.4f}", f"{deviation:.4f}",
            f"{1e3 * row.get('seconds', math.nan):.1f}", f"{ratio:.2f}",
        )  # fmt: skip
    console.print(table)


def main(s: Settings) -> None:
    """Measure, print, draw; what is measured is in the file after each trial."""
    for what, chosen, known in (("section", s.sections, SECTIONS), ("subject", s.subjects, tuple(SUBJECTS))):
        unknown = set(chosen) - set(known)
        if unknown:
            raise SystemExit(f"unknown {what} {', '.join(sorted(unknown))}; known are {', '.join(known)}")
    if s.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda, but PyTorch sees no GPU; use --device cpu")
    torch.set_num_threads(s.threads)
    with FileLock(s.result_file()):
        measure(s)


def measure(s: Settings) -> None:
    """The chosen sections, as far as they are not in the file."""
    console, result = Console(), opened(s)
    if "tasks" in s.sections:
        if "tasks" not in result:
            result["tasks"] = orthogonal_tasks.run()
            write_json(s.result_file(), result)
        console.print(orthogonal_tasks.table(result["tasks"]))
    if "language" in s.sections:
        run_trials(s, result, console)
        if set(s.subjects) - set(result["step_seconds"]):
            result["step_seconds"] = time_steps(s)
        result["summary"] = summarise(s, result)
        write_json(s.result_file(), result)
        print_summary(result, console)
        console.print(f"drawn in {draw(s, result)}")
    console.print(f"written to {s.result_file()}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
