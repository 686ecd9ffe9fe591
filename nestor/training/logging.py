"""What a run shows and records: a live line or plain lines, metrics.jsonl, and an experiment tracker."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nestor.files import write_text
from nestor.training.config import TrainConfig
from nestor.training.distributed import Processes, tracker_of
from nestor.training.settings import flatten

# Dense bfloat16 peak of a card, FLOP/s, from the makers' data sheets.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device_name: str) -> float | None:
    """Peak of the card of this name; None if it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


def flops_per_token(model: Any, length: int) -> float:
    """FLOP of training on one token: 6 per parameter in a matrix product, and attention on `length` tokens.

    The work of fast weights is not counted, so a utilisation computed from this is a lower bound.
    """
    config: Any = getattr(model, "config", None)
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    counted = sum(p.numel() for p in model.parameters())
    if embedding is not None and not getattr(config, "tie_word_embeddings", False):
        counted -= sum(p.numel() for p in embedding.parameters())
    width, layers = getattr(config, "hidden_size", 0), getattr(config, "num_hidden_layers", 0)
    span = min(length, getattr(config, "sliding_window", None) or length)
    return 6.0 * counted + 6.0 * layers * width * span


class MetricsFile:
    """One JSON object a line. A continued run drops the lines of steps that it will do again."""

    def __init__(self, path: Path, from_step: int) -> None:
        self.path = path
        if path.is_file():
            kept = [
                line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= from_step
            ]
            write_text(path, "".join(line + "\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the run)

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Add a line. JSON has no NaN or infinity; they are written as null."""
        values = {key: _finite(value) for key, value in metrics.items()}
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Display:
    """Progress of a run: a live line on a terminal, else a plain line each time there is news.

    Args:
        quiet: show nothing.
    """

    def __init__(self, name: str, total_steps: int, first_step: int, quiet: bool) -> None:
        from rich.console import Console

        self.console = Console(stderr=False, highlight=False, quiet=quiet)
        self.total, self.first = total_steps, first_step
        self._live: Any = None
        if self.console.is_terminal and not quiet:
            self._live = self._progress(name)

    def _progress(self, name: str) -> Any:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[news]}"),
            console=self.console,
            transient=False,
        )
        progress.start()
        self._task = progress.add_task(name, total=self.total, completed=self.first, news="starting")
        return progress

    def step(self, step: int) -> None:
        """A step was done (its results may not have been read yet)."""
        if self._live is not None:
            self._live.update(self._task, completed=step)

    def metrics(self, metrics: Mapping[str, Any]) -> None:
        """Show the metrics of the last steps."""
        parts = [f"loss {metrics['loss']:.4f}", f"{rate(metrics['tokens_per_second'])} tokens/s"]
        if metrics.get("mfu") is not None:
            parts.append(f"MFU {metrics['mfu']:.1%}")
        parts.append(f"{duration(metrics['seconds_left'])} left")
        if self._live is not None:
            self._live.update(self._task, completed=metrics["step"], news="  ".join(parts))
        else:
            parts.insert(1, f"lr {metrics['lr']:.2e}")
            self.console.print(f"step {metrics['step']}/{self.total}  " + "  ".join(parts))

    def say(self, message: str) -> None:
        """A line of text, above the live line if there is one."""
        self.console.print(message, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()
            self._live = None


class Reporter:
    """Everything that a run tells the world: display, metrics.jsonl, tracker, and a listener.

    Made on every process; all but the main one are silent.

    Args:
        processes: this process among all.
        first_step: step from which the run goes on.
        on_step: called with the numbers of each log step and each validation.
        quiet: no display.
    """

    def __init__(
        self,
        config: TrainConfig,
        processes: Processes,
        first_step: int,
        on_step: Callable[[dict[str, Any]], None] | None,
        quiet: bool,
    ) -> None:
        self.config, self.processes, self.on_step = config, processes, on_step
        self.total = config.total_steps
        quiet = quiet or not processes.is_main
        self.display = Display(config.name, self.total, first_step, quiet)
        path = config.folder / "metrics.jsonl"
        self.record = MetricsFile(path, first_step) if processes.is_main else None
        self.tracking = processes.is_main and tracker_of(config) is not None and first_step < self.total
        if self.tracking:
            _open_tracker(config, processes.accelerator)
        self.say = self.display.say
        self.latest: dict[str, Any] = {}
        self.last_step, self.last_time = first_step, time.monotonic()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time in here (validation, saving) is not counted as training."""
        began = time.monotonic()
        yield
        self.last_time += time.monotonic() - began

    def training(self, step: int, loss: float, gradient_norm: float, lr: float, flops: float) -> None:
        """Report the steps since the last call. `flops` is FLOP per token of training."""
        now = time.monotonic()
        per_step = (now - self.last_time) / max(1, step - self.last_step)
        self.last_step, self.last_time = step, now
        speed = self.config.tokens_per_step / per_step
        metrics = {
            "step": step,
            "tokens": step * self.config.tokens_per_step,
            "loss": loss,
            "gradient_norm": gradient_norm,
            "lr": lr,
            "tokens_per_second": speed,
            "mfu": utilisation(speed * flops, self.processes.device, self.processes.world),
            "seconds_left": per_step * (self.total - step),
        }
        self._publish(metrics)
        self.display.metrics(metrics)

    def validation(self, step: int, result: Mapping[str, float]) -> None:
        """Report a measurement on held-out text."""
        self._publish({"step": step, **result})
        parts = [f"{key.replace('_', ' ')} {value:.4f}" for key, value in result.items()]
        self.say(f"step {step}/{self.total}  " + "  ".join(parts))

    def close(self) -> None:
        """Let go of files, tracker and terminal."""
        self.display.close()
        if self.record is not None:
            self.record.close()
        if self.tracking:
            for tracker in self.processes.accelerator.trackers:
                tracker.finish()

    def _publish(self, metrics: dict[str, Any]) -> None:
        self.latest |= metrics
        if self.record is None:
            return
        self.record.write(metrics)
        if self.tracking:
            numbers = {k: v for k, v in metrics.items() if isinstance(v, (int, float)) and k != "step"}
            self.processes.accelerator.log(numbers, step=metrics["step"])
        if self.on_step is not None:
            self.on_step(dict(metrics))


def _open_tracker(config: TrainConfig, accelerator: Any) -> None:
    settings = {
        key: value if isinstance(value, (int, float, str, bool)) else json.dumps(value)
        for key, value in flatten(config.to_dict()).items()
    }
    if config.run.tracker == "wandb":
        accelerator.init_trackers("nestor", config=settings, init_kwargs={"wandb": {"name": config.name}})
    else:
        # The name of the folder in the run folder.
        accelerator.init_trackers("logs", config=settings)


def utilisation(flops_per_second: float, device: torch.device, count: int) -> float | None:
    """Model FLOP utilisation of `count` equal cards; None where the peak is not known."""
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if peak is None else flops_per_second / (peak * count)


def duration(seconds: float) -> str:
    """`1:02:03`, `2:03` or `7 s`."""
    whole = max(0, math.ceil(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}" if minutes else f"{rest} s"


def rate(value: float) -> str:
    """`812`, `51.2k` or `1.20M`."""
    for size, suffix, digits in ((1e6, "M", 2), (1e3, "k", 1)):
        if value >= size:
            return f"{value / size:.{digits}f}{suffix}"
    return f"{value:.0f}"


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        # A line that was cut off when the process died.
        return math.inf


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
