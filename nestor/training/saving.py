"""What a run leaves on disk: checkpoints from which it goes on exactly, and the final model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nestor.files import read_tensors, write_tensors
from nestor.training import checkpoint as checkpoints
from nestor.training.carrying import HANDED_ON
from nestor.training.folder import write_final
from nestor.training.model import save_model
from nestor.training.optimizer import load_optimizer_state, optimizer_state

if TYPE_CHECKING:
    from nestor.training.loop import Run


def save_run(run: Run) -> None:
    """Write a checkpoint of this moment on the main process, and remove those no longer kept.

    Every process takes part: each has its own lanes, generators and perhaps a shard of the weights.
    """
    root = run.folder / "checkpoints"
    weights = run.processes.weights(run.model)
    moments = optimizer_state(run.plain, run.optimizers)
    waiting = run.pace.state_dict()
    generators = run.processes.gather(checkpoints.random_state())
    state = _gather_state(run)

    def write(folder: Path) -> None:
        save_model(run.plain, folder, weights)
        write_tensors(folder / "optimizer.safetensors", moments)
        if waiting:
            write_tensors(folder / "waiting.safetensors", waiting)
        checkpoints.write_random_states(folder / "rng.safetensors", generators)
        if run.config.run.state_mode == "fitted-noise" and run.noise is not None:
            write_tensors(folder / "noise.safetensors", run.noise)
        if state is not None:
            write_tensors(folder / "state.safetensors", checkpoints.state_tensors(state))

    if run.processes.is_main:
        trainer = {
            "data": run.stream.state_dict(),
            "best": None if math.isinf(run.best) else run.best,
            "best_step": run.best_step,
            "metrics": run.reporter.latest,
        }
        checkpoints.save_checkpoint(root, run.step, write, trainer)
        checkpoints.prune(root, run.config.run.keep_last, run.best_step)
    run.processes.wait()


def restore_run(run: Run, found: Path, saved: dict[str, Any]) -> None:
    """Put back everything but the weights, which the model was built with.

    found: the checkpoint; saved: its trainer.json.
    """
    moments, _ = read_tensors(found / "optimizer.safetensors")
    load_optimizer_state(run.plain, run.optimizers, moments, waiting=run.pace.steps)
    if (found / "waiting.safetensors").is_file():
        run.pace.load_state_dict(read_tensors(found / "waiting.safetensors")[0])
    run.stream.load_state_dict(saved["data"])
    if (found / "noise.safetensors").is_file() and run.config.run.state_mode == "fitted-noise":
        fitted, _ = read_tensors(found / "noise.safetensors")
        run.noise = {name: tensor.to(run.processes.device) for name, tensor in fitted.items()}
    if (found / "state.safetensors").is_file() and run.config.run.state_mode in HANDED_ON:
        tensors, _ = read_tensors(found / "state.safetensors")
        state = checkpoints.state_from_tensors(tensors).select(list(run.processes.lanes))
        size = state.batch_size // run.config.run.accumulation
        parts = [range(start, start + size) for start in range(0, state.batch_size, size)]
        run.states = [state.select(list(rows)).to(run.processes.device) for rows in parts]
    generators = checkpoints.read_random_state(found / "rng.safetensors", run.processes.rank)
    if generators is not None:
        checkpoints.set_random_state(generators)


def finish_run(run: Run) -> Path:
    """Write the `final` folder; returns where it is."""
    weights = run.processes.weights(run.model)

    def write(folder: Path) -> None:
        save_model(run.plain, folder, weights)
        run.tokenizer.save_pretrained(folder)

    if run.processes.is_main:
        write_final(run.folder, write, _summary(run))
    run.processes.wait()
    return run.folder / "final"


def _gather_state(run: Run) -> Any:
    """The State of all lanes of all processes on the CPU, None if none is carried."""
    if run.states[0] is None:
        return None
    everyone = run.processes.gather(type(run.states[0]).stack(run.states).to("cpu"))
    return type(everyone[0]).stack(everyone)


def _summary(run: Run) -> dict[str, Any]:
    """How the model came to be, JSON-able."""
    from nestor import __version__

    return {
        "name": run.config.name,
        "nestor_version": __version__,
        "torch_version": torch.__version__,
        "steps": run.step,
        "tokens": run.step * run.config.tokens_per_step,
        "parameters": sum(p.numel() for p in run.plain.parameters()),
        "metrics": run.reporter.latest,
        "best_valid_loss": None if math.isinf(run.best) else run.best,
        "best_step": run.best_step,
        "config": run.config.to_dict(),
    }
