"""The training loop, top to bottom: `train` opens a run folder, `Run` holds what a run is made of.

One step reads one global batch of B lanes x T tokens. Each process computes its own lanes, in `accumulation`
parts; every part has its own State if State is carried. Nothing in a step waits for a GPU: losses and
gradient norms stay there until a log step reads them, all at once.
"""

from __future__ import annotations

import math
import random
import signal as signals
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nestor.data import IGNORED, Batch, LaneStream, Prefetcher, WorkerStream, check_vocabulary
from nestor.errors import NonFiniteError
from nestor.files import FileLock
from nestor.training import checkpoint as checkpoints
from nestor.training.carrying import HANDED_ON, next_start
from nestor.training.config import TrainConfig
from nestor.training.distributed import Processes, clip_gradient, tracker_of
from nestor.training.folder import Resume, newest_checkpoint, open_folder
from nestor.training.inputs import open_tokenizer, train_stream, valid_stream
from nestor.training.interrupt import StopRequest
from nestor.training.logging import Reporter, flops_per_token
from nestor.training.model import build_model
from nestor.training.noise import Noise, even_noise, fit_noise, fresh_lanes, fresh_state, noised_start
from nestor.training.optimizer import build_optimizers, set_lr
from nestor.training.pace import Pace
from nestor.training.saving import finish_run, restore_run, save_run
from nestor.training.schedule import lr_factor
from nestor.training.validation import validate

OnStep = Callable[[dict[str, Any]], None]
# Batches of training text, the first ones, to whose final States noise is fitted.
FIT_BATCHES = 16


@dataclass
class RunResult:
    """What a run came to. `final` is the model folder of a finished run, `signal` what ended it early."""

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
    with FileLock(config.folder) if processes.is_main else nullcontext():
        if processes.is_main:
            open_folder(config, resume)
        processes.wait()
        run = Run(config, processes, newest_checkpoint(config.folder), on_step, quiet)
        try:
            with StopRequest(quiet or not processes.is_main) as stop:
                return run.execute(stop)
        finally:
            run.close()


class Run:
    """A run under way: model, optimisers, data, the States of its lanes, and where it stands.

    Args:
        found: checkpoint to go on from; None begins at step 0.
    """

    def __init__(
        self,
        config: TrainConfig,
        processes: Processes,
        found: Path | None,
        on_step: OnStep | None,
        quiet: bool,
    ) -> None:
        self.config, self.processes = config, processes
        self.folder, self.total = config.folder, config.total_steps
        saved = checkpoints.read_trainer(found) if found else {}
        self.step: int = saved.get("step", 0)
        self.best: float = math.inf if saved.get("best") is None else saved["best"]
        self.best_step: int | None = saved.get("best_step")
        # The newest checkpoint: nothing is saved that was not checked to be finite.
        self.last_saved = found

        seed_everything(config.run.seed)
        self.tokenizer = open_tokenizer(config.data, config.model.path)
        model = build_model(config, self.tokenizer, found)
        check_vocabulary(self.tokenizer, model.config.vocab_size)
        if config.run.activation_checkpointing:
            # Named differently by the versions of transformers that are supported.
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        make = partial(train_stream, config.data, self.tokenizer, config.run.seed)
        stream: LaneStream = make(processes.lanes)
        if config.run.data_workers:
            stream = WorkerStream(stream, make, config.run.data_workers)
        self.stream = Prefetcher(stream, config.run.prefetch)
        self.held_out = valid_stream(config, self.tokenizer, processes) if config.run.eval_every else None

        self.flops_per_token = flops_per_token(model, config.data.sequence_length)
        self.model = processes.prepare(model)
        self.plain = processes.plain(self.model)
        self.optimizers = build_optimizers(self.plain, config.optimizer)
        self.pace = Pace(self.plain, config.optimizer.block_steps)
        if config.run.compile:
            # One block at a time: equal ones are compiled once, in seconds where a whole model takes minutes.
            for block in self.plain.layers:
                block.compile()
        self.model.train()
        # The State with which each part of the next batch starts.
        self.states: list[Any] = [None] * config.run.accumulation
        # What the memories of each sequence start with instead, if it is noise.
        self.noise: Noise | None = None
        # Loss and gradient norm of each step since the last log step, on the device.
        self.pending: list[Tensor] = []
        self.flag: Tensor | None = None
        if found is not None:
            restore_run(self, found, saved)
        if config.run.state_mode == "random-noise":
            self.noise = even_noise(self.plain.initial_state(1), config.run.noise)
        elif config.run.state_mode == "fitted-noise" and self.noise is None:
            self.noise = self.fit_noise(make(processes.lanes))
        self.reporter = Reporter(config, processes, self.step, on_step, quiet)
        self.reporter.latest = saved.get("metrics", {})

    def execute(self, stop: StopRequest) -> RunResult:
        """Train up to the last step, or until a signal asks to end."""
        run = self.config.run
        self.announce()
        if self.step >= self.total and (self.folder / "final" / "config.json").is_file():
            return self.result()
        while self.step < self.total:
            self.train_step()
            self.reporter.display.step(self.step)
            done = self.step == self.total
            signal = self.agree_on(stop.received)
            if done or signal or self.step % run.log_every == 0:
                self.log()
            if self.held_out is not None and (done or self.step % run.eval_every == 0):
                self.evaluate()
            if done or signal or (run.save_every and self.step % run.save_every == 0):
                self.save()
            if signal and not done:
                self.reporter.say(
                    f"stopped by {signals.Signals(signal).name} after step {self.step}, saved as "
                    f"{self.last_saved}; the same command goes on from there"
                )
                return self.result(signal)
        self.reporter.say(f"finished: {finish_run(self)}")
        return self.result()

    def train_step(self) -> None:
        """One global batch: forward and backward of each part, then one update of the weights."""
        config = self.config
        set_lr(self.optimizers, lr_factor(self.step, self.total, config.schedule))
        batch = next(self.stream)
        targets = self.count_targets(batch)
        parts = split(batch, config.run.accumulation)
        losses = []
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            with nullcontext() if last else self.processes.without_sync(self.model):
                loss, state = self.forward(part, *self.start(index), targets)
                # Processes average their gradients, and `loss` is a share of the mean over all of them.
                (loss * self.processes.world).backward()
            self.states[index] = next_start(state, config.run.state_mode)
            losses.append(loss.detach())
        norm = clip_gradient(self.model, config.optimizer.clip)
        self.pending.append(torch.stack([torch.stack(losses).sum(), norm.detach()]))
        self.step += 1
        if self.processes.device.type == "cpu":
            # Reading costs nothing here, so a bad gradient does not reach the weights.
            self.read_pending()
        self.pace.hold(self.step)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def start(self, index: int) -> tuple[Any, Tensor]:
        """The State with which a part of this step starts, and which rows start fresh all the same `[b]`."""
        run, processes = self.config.run, self.processes
        size = len(processes.lanes) // run.accumulation
        lanes = processes.lanes[index * size : (index + 1) * size]
        fresh = fresh_lanes(run.fresh_share, run.seed, self.step, self.config.data.batch_size)
        fresh = fresh[lanes.start : lanes.stop]
        if bool(fresh.all()):
            return None, fresh
        if self.noise is None:
            return self.states[index], fresh
        with self.autocast():
            one = fresh_state(self.plain)
        return noised_start(one, self.noise, run.seed, self.step, lanes), fresh

    @torch.no_grad()
    def fit_noise(self, stream: LaneStream) -> Noise:
        """The noise fitted to the States in which the first batches of `stream` leave fresh rows."""

        def finals() -> Iterator[Any]:
            for batch in islice(stream, FIT_BATCHES):
                for part in split(batch, self.config.run.accumulation):
                    nowhere = torch.zeros(len(part["resets"]), dtype=torch.bool)
                    yield self.forward(part, None, nowhere, self.count_targets(batch), use_cache=True)[1]

        return fit_noise(self.plain.initial_state(1), finals(), self.processes.sum)

    def forward(
        self, part: Batch, state: Any, fresh: Tensor, targets: Tensor, use_cache: bool | None = None
    ) -> tuple[Tensor, Any]:
        """Loss of some lanes, summed and divided by the weight of the whole batch, and the State after.

        fresh: `[b]` bool, rows that start fresh instead of from `state`. use_cache: make the State after; by
            default if it is handed on.
        """
        run, device = self.config.run, self.processes.device
        resets = part["resets"].clone()
        if state is None:
            # A fresh row needs no reset at its start, and without any reset the layers take shorter ways.
            resets[:, 0] = False
        elif run.state_mode == "carry":
            resets[:, 0] |= fresh
        else:
            # What is passed or drawn is no document's past, so a document may begin with it.
            resets[:, 0] = fresh
        inputs = {
            "input_ids": part["input_ids"],
            "shift_labels": part["labels"],
        }
        if bool((part["weights"] != 1).any()):
            inputs["loss_weights"] = part["weights"]
        if bool(resets.any()):
            inputs["resets"] = resets
        with self.autocast():
            output = self.model(
                **{name: to_device(tensor, device) for name, tensor in inputs.items()},
                num_items_in_batch=targets,
                loss_only=True,
                past_key_values=state,
                use_cache=run.state_mode in HANDED_ON if use_cache is None else use_cache,
            )
        return output.loss, output.past_key_values

    def count_targets(self, batch: Batch) -> Tensor:
        """Targets of the global batch, each by its weight, on the device; at least 1."""
        counted = (batch["weights"] * (batch["labels"] != IGNORED)).sum()
        return self.processes.sum(to_device(counted, self.processes.device)).clamp(min=1)

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 for the matrix products, if the run is so configured; weights stay float32."""
        if self.config.run.precision != "bf16":
            return nullcontext()
        return torch.autocast(self.processes.device.type, dtype=torch.bfloat16)

    def agree_on(self, signal: int) -> int:
        """The signal that any process has received, the same on all of them after the same step."""
        if self.processes.world == 1:
            return signal
        # Read a step late, so that no process waits for its device.
        before = self.flag
        self.flag = self.processes.maximum(torch.tensor(signal, device=self.processes.device))
        return 0 if before is None else int(before)

    def read_pending(self) -> list[list[float]]:
        """Loss and gradient norm of each step since the last log step.

        Raises:
            NonFiniteError: one of them is infinite or NaN; names the step.
        """
        share = torch.tensor([1.0, 1.0 / self.processes.world])
        values = (self.processes.sum(torch.stack(self.pending)).cpu() * share).tolist()
        for step, (loss, norm) in enumerate(values, start=self.step - len(values) + 1):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                what = "gradient" if math.isfinite(loss) else "loss"
                last = f"The last finite checkpoint is {self.last_saved}"
                optimizer = self.config.optimizer
                raise NonFiniteError(
                    f"the {what} is not finite at step {step} (loss {loss:.4g}, gradient norm {norm:.4g}). "
                    f"{last if self.last_saved else 'There is no checkpoint yet'}. Lower optimizer.lr (now "
                    f"{optimizer.lr:g}) or optimizer.clip (now {optimizer.clip:g}), lengthen "
                    "schedule.warmup, or set run.precision to fp32; --resume continues under changed settings"
                )
        return values

    def log(self) -> None:
        """Read the steps since the last log step, check them, and report."""
        if not self.pending:
            return
        values = self.read_pending()
        self.pending = []
        loss, norm = (sum(column) / len(values) for column in zip(*values, strict=True))
        lr = self.optimizers[0].param_groups[0]["lr"]
        self.reporter.training(self.step, loss, norm, lr, self.flops_per_token)

    def evaluate(self) -> None:
        """Measure on the held-out text; a new best is saved."""
        assert self.held_out is not None
        self.log()
        carry = self.config.run.state_mode in HANDED_ON
        with self.reporter.pause():
            result = validate(
                self.model,
                *self.held_out,
                self.tokenizer,
                self.processes,
                carry=carry,
                autocast=self.autocast,
            )
        self.reporter.validation(self.step, result)
        if result["valid_loss"] < self.best:
            self.best, self.best_step = result["valid_loss"], self.step
            if self.config.run.save_every:
                self.save()

    def save(self) -> None:
        """Write a checkpoint of this moment, unless there is one."""
        self.log()
        place = checkpoints.folder_of(self.folder / "checkpoints", self.step)
        if self.last_saved == place:
            return
        with self.reporter.pause():
            save_run(self)
        self.last_saved = place

    def result(self, signal: int = 0) -> RunResult:
        """What `train` returns."""
        final = None if signal else self.folder / "final"
        tokens = self.step * self.config.tokens_per_step
        return RunResult(
            self.folder, final, self.step, tokens, not signal, signal, dict(self.reporter.latest)
        )

    def announce(self) -> None:
        """Say what runs where, and what may surprise."""
        config, say = self.config, self.reporter.say
        model = self.plain
        kind = config.model.path or f"{config.model.preset} {config.model.size}"
        count = f"{sum(p.numel() for p in model.parameters()):,} parameters"
        length = f"{self.total:,} steps of {config.data.batch_size} x {config.data.sequence_length} tokens"
        say(f"{config.name}: {kind}, {count}, {length}, {config.run.precision}, on {self.processes}")
        if self.step >= self.total:
            say(f"{self.folder} is complete at step {self.step}; --restart trains it again")
        elif self.last_saved is not None:
            say(f"resuming from {self.last_saved} after step {self.step}")
        else:
            say(f"run folder {self.folder}")
        if config.run.tracker != "none" and tracker_of(config) is None:
            say(f"{config.run.tracker} is not installed; metrics go to {self.folder / 'metrics.jsonl'} only")
        if config.run.state_mode == "carry" and "full_attention" in (model.config.layer_types or ()):
            say(
                "full attention keeps every token of a document that is carried on; give the model a "
                "sliding_window if documents are long"
            )

    def close(self) -> None:
        """Let go of threads, files and the terminal."""
        self.stream.close()
        self.reporter.close()


def seed_everything(seed: int) -> None:
    """Seed every generator that building a model or training may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def split(batch: Batch, parts: int) -> list[Batch]:
    """The lanes of a batch in equal parts, in order."""
    pieces = zip(*(tensor.chunk(parts) for tensor in batch.values()), strict=True)  # type: ignore[attr-defined]
    return [Batch(**dict(zip(batch, piece, strict=True))) for piece in pieces]  # type: ignore[typeddict-item]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, made without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
