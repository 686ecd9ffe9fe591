"""The training loop, top to bottom: `train` opens a run folder, `Run` holds what a run is made of.

One step reads one global batch of B lanes x T tokens. Each process computes its own lanes, in `accumulation`
parts; every part has its own State if State is carried. Nothing in a step waits for the device: losses and
gradient norms stay there until a log step reads them, all at once.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from nestor.data import IGNORED, Batch, Prefetcher, check_vocabulary
from nestor.errors import ConfigError, NonFiniteError
from nestor.files import FileLock, read_tensors, write_json, write_tensors, write_text
from nestor.training import checkpoint as checkpoints
from nestor.training.carrying import next_start
from nestor.training.config import TrainConfig, load_config
from nestor.training.distributed import Processes, clip_gradient, tracker_of
from nestor.training.inputs import open_tokenizer, train_stream, valid_stream
from nestor.training.interrupt import StopRequest
from nestor.training.logging import Clock, Display, MetricsFile, flops_per_token, peak_flops
from nestor.training.model import build_model, save_model
from nestor.training.optimizer import build_optimizers, load_optimizer_state, optimizer_state, set_lr
from nestor.training.schedule import lr_factor
from nestor.training.settings import flatten
from nestor.training.validation import validate

Resume = Literal["auto", "force", "never"]
OnStep = Callable[[dict[str, Any]], None]


@dataclass
class RunResult:
    """What a run came to. `final` is the model folder of a finished run; `signal` the one that ended it early."""

    folder: Path
    final: Path | None
    step: int
    tokens: int
    finished: bool
    signal: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0, or 128 + the signal, as a shell reports it."""
        return 128 + self.signal if self.signal else 0


def train(
    config: TrainConfig, *, resume: Resume = "auto", on_step: OnStep | None = None, quiet: bool = False
) -> RunResult:
    """Train a model as configured, or go on with the run that is in the folder already.

    Args:
        resume: `auto` continues a run of the same configuration and refuses one of another; `force` continues
            it in any case; `never` removes what is there and starts anew.
        on_step: called with the metrics of each log step and each validation (main process only).
        quiet: print nothing.

    Raises:
        ConfigError: settings that cannot work together, or a run folder of another configuration.
        DataError: no text, or too little.
        LockedError: another process writes this run folder.
        NonFiniteError: a loss or gradient became infinite or NaN.
    """
    processes = Processes(config)
    folder = config.folder
    with FileLock(folder) if processes.is_main else nullcontext():
        found = open_folder(folder, config, resume) if processes.is_main else None
        processes.wait()
        if not processes.is_main:
            found = newest_checkpoint(folder)
        run = Run(config, processes, found, on_step, quiet)
        try:
            with StopRequest() as stop:
                return run.execute(stop)
        finally:
            run.close()


def open_folder(folder: Path, config: TrainConfig, resume: Resume) -> Path | None:
    """Make the run folder, or check that it holds a run of this configuration; the checkpoint to go on from."""
    saved = folder / "config.toml"
    if resume == "never":
        for entry in (folder / "checkpoints", folder / "final", folder / "logs"):
            shutil.rmtree(entry, ignore_errors=True)
        (folder / "metrics.jsonl").unlink(missing_ok=True)
    elif not saved.exists() and folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no run (no config.toml); choose another run.out")
    elif saved.exists() and resume == "auto":
        differences = load_config(saved).differences(config)
        if differences:
            listed = "; ".join(f"{key} was {old!r} and is {new!r}" for key, (old, new) in differences.items())
            raise ConfigError(
                f"{folder} holds a run of another configuration: {listed}. Choose another run.out, continue it "
                "under the new settings with --resume, or remove it with --restart"
            )
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints.clean_unfinished(folder / "checkpoints")
    checkpoints.clean_unfinished(folder)
    write_text(saved, config.to_toml())
    return newest_checkpoint(folder)


def newest_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint of a run folder."""
    found = checkpoints.list_checkpoints(folder / "checkpoints")
    return found[-1] if found else None


class Run:
    """A run under way: model, optimisers, data, the States of its lanes, and where it stands."""

    def __init__(
        self,
        config: TrainConfig,
        processes: Processes,
        found: Path | None,
        on_step: OnStep | None,
        quiet: bool,
    ) -> None:
        self.config, self.processes, self.on_step = config, processes, on_step
        self.folder = config.folder
        self.total = config.total_steps
        self.step, self.best, self.best_step = 0, math.inf, None
        self.metrics: dict[str, Any] = {}
        saved = checkpoints.read_trainer(found) if found else None
        if saved is not None:
            self.step, self.best_step = saved["step"], saved["best_step"]
            self.best = math.inf if saved["best"] is None else saved["best"]
            self.metrics = saved["metrics"]

        seed_everything(config.run.seed)
        self.tokenizer = open_tokenizer(config.data, config.model.path)
        model = build_model(config, self.tokenizer, found)
        check_vocabulary(self.tokenizer, model.config.vocab_size)
        if config.run.activation_checkpointing:
            model.gradient_checkpointing_enable()
        self.stream = Prefetcher(
            train_stream(config.data, self.tokenizer, config.run.seed, processes.lanes), config.run.prefetch
        )
        self.held_out = None
        if config.run.eval_every:
            self.held_out = valid_stream(
                config.data,
                self.tokenizer,
                config.run.seed,
                config.run.eval_batches,
                processes.rank,
                processes.world,
            )
        model.to(processes.device)
        self.flops_per_token = flops_per_token(model, config.data.sequence_length)
        optimizers = build_optimizers(model, config.optimizer)
        self.model, self.optimizers = processes.prepare(model, optimizers)
        if config.run.compile:
            self.model.compile()
        self.model.train()
        # The State with which each part of the next batch starts.
        self.states: list[Any] = [None] * config.run.accumulation
        if found is not None and saved is not None:
            self.restore(found, saved)

        self.display = Display(
            config.name, self.total, self.step, config.tokens_per_step, quiet or not processes.is_main
        )
        self.record = MetricsFile(self.folder / "metrics.jsonl", self.step) if processes.is_main else None
        self.clock = Clock(self.step)
        # Losses and gradient norms of the steps since the last log step, on the device.
        self.pending: list[Tensor] = []
        self.flag: Tensor | None = None
        self.last_finite = found
        self.start_tracker()

    # The run.

    def execute(self, stop: StopRequest) -> RunResult:
        """Train up to the last step, or until a signal asks to end."""
        run = self.config.run
        self.announce()
        if self.step >= self.total and (self.folder / "final" / "config.json").is_file():
            return self.result(finished=True)
        while self.step < self.total:
            self.train_step()
            self.display.step(self.step)
            done = self.step == self.total
            signal = self.agree_on(stop.received)
            if done or signal or self.step % run.log_every == 0:
                self.log()
            if self.held_out is not None and (done or self.step % run.eval_every == 0):
                self.evaluate()
            if done or signal or (run.save_every and self.step % run.save_every == 0):
                self.save()
            if signal and not done:
                self.display.say(
                    f"stopped by {'Ctrl-C' if signal == 2 else 'SIGTERM'} after step {self.step}; everything is "
                    f"saved in {self.folder}. The same command goes on from there."
                )
                return self.result(finished=False, signal=signal)
        final = self.finish()
        self.display.say(f"finished: {final}")
        return self.result(finished=True)

    def train_step(self) -> None:
        """One global batch: forward and backward of each part, then one update of the weights."""
        config = self.config
        set_lr(self.optimizers, lr_factor(self.step, self.total, config.schedule))
        batch = next(self.stream)
        targets = self.count_targets(batch)
        loss = torch.zeros((), device=self.processes.device)
        parts = split(batch, config.run.accumulation)
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            with nullcontext() if last else self.processes.without_sync(self.model):
                part_loss, state = self.forward(part, self.states[index], targets)
                # Processes average their gradients, and the loss is a share of the global mean.
                (part_loss * self.processes.world).backward()
            self.states[index] = next_start(state, config.run.state_mode)
            loss = loss + part_loss.detach()
        norm = clip_gradient(
            [p for p in self.model.parameters() if p.grad is not None], config.optimizer.clip
        )
        self.pending.append(torch.stack([loss.double(), norm.detach().double()]))
        self.step += 1
        if self.processes.device.type == "cpu":
            # Reading costs nothing here, so a bad gradient does not reach the weights.
            self.check_finite()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def forward(self, part: Batch, state: Any, targets: Tensor) -> tuple[Tensor, Any]:
        """Loss of some lanes (their share of the batch's mean) and the State after them."""
        device = self.processes.device
        resets = part["resets"]
        if state is None:
            # A fresh row needs no reset at its start, and without any reset the layers take shorter ways.
            resets = resets.clone()
            resets[:, 0] = False
        inputs = {"input_ids": part["input_ids"], "shift_labels": part["labels"]}
        if bool(resets.any()):
            inputs["resets"] = resets
        with self.autocast():
            output = self.model(
                **{name: to_device(tensor, device) for name, tensor in inputs.items()},
                num_items_in_batch=targets,
                past_key_values=state,
                use_cache=self.config.run.state_mode != "reset",
            )
        return output.loss, output.past_key_values

    def count_targets(self, batch: Batch) -> Tensor:
        """Number of targets of the global batch, on the device; at least 1."""
        counted = (batch["labels"] != IGNORED).sum()
        return self.processes.sum(to_device(counted, self.processes.device)).clamp(min=1)

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 for the matrix products, if the run is so configured; weights stay float32."""
        if self.config.run.precision != "bf16":
            return nullcontext()
        return torch.autocast(self.processes.device.type, dtype=torch.bfloat16)

    def agree_on(self, signal: int) -> int:
        """The signal that any process has received, the same on all of them in the same step."""
        if self.processes.world == 1:
            return signal
        # Read a step late, so that no process waits for the device.
        before, self.flag = (
            self.flag,
            self.processes.maximum(torch.tensor(signal, device=self.processes.device)),
        )
        return 0 if before is None else int(before)

    # What is read from the device.

    def check_finite(self) -> None:
        """Stop if a step since the last log step had a loss or gradient that is not finite."""
        first = self.step - len(self.pending) + 1
        values = self.processes.sum(torch.stack(self.pending)).tolist()
        for step, (loss, norm) in enumerate(values, start=first):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                what = "the loss" if not math.isfinite(loss) else "the gradient"
                last = (
                    f"The last finite checkpoint is {self.last_finite}"
                    if self.last_finite
                    else "There is no checkpoint yet"
                )
                raise NonFiniteError(
                    f"{what} is not finite at step {step} (loss {loss:.4g}, gradient norm "
                    f"{norm / self.processes.world:.4g}). {last}. Lower optimizer.lr (now "
                    f"{self.config.optimizer.lr:g}) or optimizer.clip ({self.config.optimizer.clip:g}), lengthen "
                    f"schedule.warmup, or set run.precision to fp32; --resume continues under changed settings."
                )

    def log(self) -> None:
        """Read the losses of the steps since the last log, check them, and report."""
        if not self.pending:
            return
        self.check_finite()
        values = self.processes.sum(torch.stack(self.pending))
        loss, norm = values.mean(0).tolist()
        self.pending = []
        per_step, left = self.clock.lap(self.step, self.total)
        speed = self.config.tokens_per_step / per_step
        self.report(
            {
                "step": self.step,
                "tokens": self.step * self.config.tokens_per_step,
                "loss": loss,
                "gradient_norm": norm / self.processes.world,
                "lr": self.optimizers[0].param_groups[0]["lr"],
                "tokens_per_second": speed,
                "mfu": self.utilisation(speed),
                "seconds_left": left,
            }
        )
        self.display.metrics(self.metrics)

    def utilisation(self, tokens_per_second: float) -> float | None:
        """Model FLOP utilisation, where the peak of the card is known."""
        if self.processes.device.type != "cuda":
            return None
        peak = peak_flops(torch.cuda.get_device_name(self.processes.device))
        return (
            None if peak is None else tokens_per_second * self.flops_per_token / (peak * self.processes.world)
        )

    def evaluate(self) -> None:
        """Measure on the held-out text."""
        assert self.held_out is not None
        self.log()
        began = time.monotonic()
        stream, batches = self.held_out
        result = validate(
            self.model,
            stream,
            batches,
            self.tokenizer,
            self.processes,
            carry=self.config.run.state_mode != "reset",
            autocast=self.autocast,
        )
        if result["valid_loss"] < self.best:
            self.best, self.best_step = result["valid_loss"], self.step
            if self.config.run.save_every:
                self.save()
        self.clock.paused(time.monotonic() - began)
        self.report({"step": self.step, **result})
        self.display.say(
            f"step {self.step}  " + "  ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in result.items())
        )

    def report(self, metrics: dict[str, Any]) -> None:
        """To metrics.jsonl, the tracker, and whoever listens."""
        self.metrics |= metrics
        if self.record is None:
            return
        self.record.write(metrics)
        if self.tracking:
            numbers = {k: v for k, v in metrics.items() if isinstance(v, (int, float)) and k != "step"}
            self.processes.accelerator.log(numbers, step=self.step)
        if self.on_step is not None:
            self.on_step(dict(metrics))

    # What is written and read back.

    def save(self) -> Path:
        """Write a checkpoint of this moment, unless there is one, and remove those no longer kept."""
        self.log()
        root = self.folder / "checkpoints"
        folder = root / f"{checkpoints.PREFIX}{self.step:06d}"
        if folder == self.last_finite:
            return folder
        began = time.monotonic()
        weights = self.processes.weights(self.model)
        moments = optimizer_state(self.model, self.optimizers)
        generators = self.processes.gather(checkpoints.random_state())
        states = self.gather_states()
        if self.processes.is_main:
            trainer = {
                "tokens": self.step * self.config.tokens_per_step,
                "data": self.stream.state_dict(),
                "best": None if math.isinf(self.best) else self.best,
                "best_step": self.best_step,
                "metrics": self.metrics,
            }

            def write(place: Path) -> None:
                save_model(self.processes.plain(self.model), place, weights)
                write_tensors(place / "optimizer.safetensors", moments)
                checkpoints.write_random_states(place / "rng.safetensors", generators)
                if states is not None:
                    write_tensors(place / "state.safetensors", checkpoints.state_tensors(states))

            checkpoints.save_checkpoint(root, self.step, write, trainer)
            checkpoints.prune(root, self.config.run.keep_last, self.best_step)
        self.processes.wait()
        self.last_finite = folder
        self.clock.paused(time.monotonic() - began)
        return folder

    def restore(self, found: Path, saved: dict[str, Any]) -> None:
        """Everything but the weights, which the model was built with."""
        moments, _ = read_tensors(found / "optimizer.safetensors")
        load_optimizer_state(self.model, self.optimizers, moments)
        self.stream.load_state_dict(saved["data"])
        if (found / "state.safetensors").is_file() and self.config.run.state_mode != "reset":
            tensors, _ = read_tensors(found / "state.safetensors")
            everyone = checkpoints.state_from_tensors(tensors)
            mine = everyone.select(list(self.processes.lanes)).to(self.processes.device)
            size = mine.batch_size // self.config.run.accumulation
            self.states = [mine.select(range(i, i + size)) for i in range(0, mine.batch_size, size)]
        generators = checkpoints.read_random_state(found / "rng.safetensors", self.processes.rank)
        if generators is not None:
            checkpoints.set_random_state(generators)

    def gather_states(self) -> Any:
        """The State of all lanes of all processes on the CPU, None if none is carried."""
        if self.states[0] is None:
            return None
        mine = type(self.states[0]).stack(self.states).to("cpu")
        everyone = self.processes.gather(mine)
        return everyone[0] if len(everyone) == 1 else type(mine).stack(everyone)

    def finish(self) -> Path:
        """The `final` folder: model, tokenizer, and a summary of how it was trained."""
        final = self.folder / "final"
        weights = self.processes.weights(self.model)
        if self.processes.is_main:
            unfinished = self.folder / ".final.tmp"
            shutil.rmtree(unfinished, ignore_errors=True)
            save_model(self.processes.plain(self.model), unfinished, weights)
            self.tokenizer.save_pretrained(unfinished)
            write_json(unfinished / "training.json", self.summary())
            write_text(unfinished / "README.md", model_card(self.summary()))
            checkpoints.publish(unfinished, final)
        self.processes.wait()
        return final

    def summary(self) -> dict[str, Any]:
        """How the model came to be, JSON-able."""
        from nestor import __version__

        return {
            "name": self.config.name,
            "nestor_version": __version__,
            "torch_version": torch.__version__,
            "steps": self.step,
            "tokens": self.step * self.config.tokens_per_step,
            "parameters": sum(p.numel() for p in self.processes.plain(self.model).parameters()),
            "metrics": self.metrics,
            "best_valid_loss": None if math.isinf(self.best) else self.best,
            "best_step": self.best_step,
            "config": self.config.to_dict(),
        }

    def result(self, *, finished: bool, signal: int = 0) -> RunResult:
        """What `train` returns."""
        final = self.folder / "final" if finished else None
        tokens = self.step * self.config.tokens_per_step
        return RunResult(self.folder, final, self.step, tokens, finished, signal, dict(self.metrics))

    # Beginning and end.

    def announce(self) -> None:
        """Say what runs where."""
        config, count = self.config, sum(p.numel() for p in self.processes.plain(self.model).parameters())
        kind = config.model.path or f"{config.model.preset} {config.model.size}"
        where = str(self.processes.device) + (
            f" x {self.processes.world}" if self.processes.world > 1 else ""
        )
        self.display.say(
            f"{config.name}: {kind}, {count:,} parameters, {self.total:,} steps of {config.data.batch_size} x "
            f"{config.data.sequence_length} tokens, {config.run.precision}, on {where}; run folder {self.folder}"
        )
        if self.last_finite is not None and self.step < self.total:
            self.display.say(f"resuming from {self.last_finite} after step {self.step}")
        elif self.last_finite is not None:
            self.display.say(f"this run is complete at step {self.step}; --restart would train it again")
        if config.run.tracker != "none" and tracker_of(config) is None:
            self.display.say(f"{config.run.tracker} is not installed: metrics go to metrics.jsonl only")

    def start_tracker(self) -> None:
        """Open the experiment tracker, if there is one."""
        self.tracking = (
            self.processes.is_main and tracker_of(self.config) is not None and self.step < self.total
        )
        if self.tracking:
            settings = {key: value for key, value in flatten(self.config.to_dict()).items()}
            plain = {
                k: v if isinstance(v, (int, float, str, bool)) else json.dumps(v) for k, v in settings.items()
            }
            self.processes.accelerator.init_trackers("logs", config=plain)

    def close(self) -> None:
        """Let go of threads, files and the terminal."""
        self.display.close()
        self.stream.close()
        if self.record is not None:
            self.record.close()
        if self.tracking:
            for tracker in self.processes.accelerator.trackers:
                tracker.finish()


def seed_everything(seed: int) -> None:
    """Seed every generator that building a model or training may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def split(batch: Batch, parts: int) -> list[Batch]:
    """The lanes of a batch in equal parts, in order."""
    if parts == 1:
        return [batch]
    pieces = {name: tensor.chunk(parts) for name, tensor in batch.items()}  # type: ignore[attr-defined]
    return [Batch(**{name: piece[i] for name, piece in pieces.items()}) for i in range(parts)]  # type: ignore[typeddict-item]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that does not wait for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def model_card(summary: dict[str, Any]) -> str:
    """A README for the model folder."""
    measured = [f"- {key.replace('_', ' ')}: {value:.4f}" for key, value in summary["metrics"].items()
                if key.startswith("valid") and isinstance(value, float)]  # fmt: skip
    lines = [
        "---",
        "library_name: nestor",
        "pipeline_tag: text-generation",
        "---",
        f"# {summary['name']}",
        "",
        f"A Nestor model with {summary['parameters']:,} parameters, trained for {summary['steps']:,} steps on "
        f"{summary['tokens']:,} tokens. All settings and measurements are in `training.json`.",
        "",
        *measured,
        "",
        "```python",
        "import nestor",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("PATH/TO/THIS/FOLDER")',
        "```",
        "",
    ]
    return "\n".join(lines)
