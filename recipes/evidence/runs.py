"""One training run of the evidence: what a model is, what it reads, how it learns, and what that took.

The loop is that of `nestor.training` without what a long run needs: no folder of its own, no checkpoints, no
processes. A run here takes minutes, so that one which is cut starts again.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from gradients import Gradients, own_queue
from torch import Tensor

from nestor import NestorForCausalLM, preset
from nestor.data import Batch, ByteTokenizer
from nestor.training.config import OptimizerConfig, ScheduleConfig
from nestor.training.distributed import clip_gradient
from nestor.training.loop import seed_everything
from nestor.training.model import open_model
from nestor.training.optimizer import build_optimizers, set_lr
from nestor.training.schedule import lr_factor

#: Steps before the clock starts: kernels are compiled in them, and on a GPU a graph is captured.
WARM = 5
#: Steps from one look at the loss to the next, which on a GPU is a wait.
LOOK = 25


class Reading(Protocol):
    """What a run reads. It is pickled with the run, so it opens its files when it is asked for batches."""

    def batches(self, seed: int, batch_size: int, length: int) -> Iterator[Batch]:
        """Batches without end; the k-th is a function of the arguments and k alone."""

    def identity(self) -> dict[str, Any]:
        """What the batches depend on besides, JSON-able: the content of files and not their place."""


@dataclass(frozen=True)
class Model:
    """A preset of Nestor at a size, with settings of `NestorConfig` replaced."""

    preset: str
    size: str = "5m"
    overrides: dict[str, Any] = field(default_factory=dict)

    def config(self) -> Any:
        """Its configuration, for bytes where the overrides name no other vocabulary."""
        return preset(self.preset, self.size, **{"tokenizer_name": ByteTokenizer.name} | self.overrides)

    def build(self, seed: int) -> Any:
        """The untrained model on the CPU, in float32."""
        seed_everything(seed)
        return NestorForCausalLM(self.config())


@dataclass(frozen=True)
class Run:
    """Everything that a run depends on."""

    model: Model
    reading: Reading
    learning_rate: float
    """Its peak."""
    steps: int
    batch_size: int
    context: int
    """Tokens of a row, each of which is read from a fresh State."""
    seed: int
    """Of the weights and of what is read."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Its own learning rate is not used."""
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(warmup=0.05))

    def settings(self) -> dict[str, Any]:
        """The same as JSON."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values |= {name: asdict(values[name]) for name in ("model", "optimizer", "schedule")}
        del values["optimizer"]["lr"]
        return json.loads(json.dumps(values | {"reading": self.reading.identity()}))


@dataclass
class Trained:
    """What a run came to."""

    model: Any
    """On the device, in evaluation mode."""
    curve: list[tuple[int, float]]
    """Steps done, and the mean loss in nats a token over those since the last entry."""
    finite: bool
    """False: a loss or a gradient was no number, and the run ended there."""
    seconds: float
    """Of the whole run, compilation of kernels included."""
    tokens_per_second: float | None
    """After the first steps; None: there were no others. Of a GPU that others use too, its share."""
    peak_memory: int | None
    """Bytes of all tensors on the GPU at most; None: on a CPU."""
    captured: bool
    """Whether most steps were replayed from a CUDA graph."""

    @property
    def loss(self) -> float | None:
        """The last of the curve; None: no number."""
        return self.curve[-1][1] if self.finite else None

    def summary(self) -> dict[str, Any]:
        """All but the model, as JSON."""
        return {
            "loss": self.loss,
            "curve": [[step, loss if math.isfinite(loss) else None] for step, loss in self.curve],
            "seconds": round(self.seconds, 1),
            "tokens_per_second": self.tokens_per_second,
            "peak_memory": self.peak_memory,
            "captured": self.captured,
        }


def train(run: Run, device: str | torch.device = "cpu", model: Any = None) -> Trained:
    """Train a model from the start, in bfloat16 where the device is a GPU; weights stay float32.

    model: trained on, instead of the one that the run describes.

    Raises:
        ConfigError: a preset or setting that is not. DataError: of what is read.
    """
    device = torch.device(device)
    begin = time.perf_counter()
    model = (run.model.build(run.seed) if model is None else model).to(device).train()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    optimizers = build_optimizers(model, replace(run.optimizer, lr=run.learning_rate))
    batches = run.reading.batches(run.seed, run.batch_size, run.context)
    gradients = Gradients(model, device)
    curve: list[tuple[int, float]] = []
    pending: list[Tensor] = []
    started, finite, read = None, True, 0
    with own_queue(device):
        for step in range(run.steps):
            if step == WARM:
                started, read = now(device), 0
            set_lr(optimizers, lr_factor(step, run.steps, run.schedule))
            batch = next(batches)
            read += batch["input_ids"].numel()
            loss = gradients(batch)
            norm = clip_gradient(model, run.optimizer.clip)
            for optimizer in optimizers:
                optimizer.step()
            pending.append(torch.stack([loss.detach(), norm.detach()]))
            if (step + 1) % LOOK == 0 or step + 1 == run.steps:
                values = torch.stack(pending)
                pending = []
                finite = bool(torch.isfinite(values).all())
                curve.append((step + 1, float(values[:, 0].mean())))
                if not finite:
                    break
    end = now(device)
    speed = None if started is None else read / (end - started)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    captured = gradients.replays > run.steps // 2
    # What a graph holds goes back only with it, and measuring follows.
    model.zero_grad(set_to_none=True)
    del gradients
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Trained(model.eval(), curve, finite, end - begin, speed, peak, captured)


def keep_weights(model: Any, folder: Path) -> None:
    """Write a folder that `load_weights`, and `AutoModelForCausalLM.from_pretrained`, open."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(folder)


def load_weights(folder: Path, device: str | torch.device, **overrides: Any) -> Any:
    """A trained model, in evaluation mode.

    overrides: settings of `NestorConfig` on which no weight depends, such as a memory's chunk size.

    Raises:
        FileFormatError: it cannot be read. ConfigError: the weights do not fit the overrides.
    """
    return open_model(folder, torch.float32, overrides).to(device).eval()


def with_settings(model: Any, **overrides: Any) -> Any:
    """The same weights under settings of `NestorConfig` on which no weight depends; `memory` is merged."""
    config = copy.deepcopy(model.config)
    for name, value in overrides.items():
        setattr(config, name, {**config.memory, **value} if name == "memory" else value)
    other = NestorForCausalLM(config)
    other.load_state_dict(model.state_dict())
    return other.to(model.device).train(model.training)


def now(device: torch.device) -> float:
    """The clock, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
