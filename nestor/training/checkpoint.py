"""Checkpoints: folders that are whole or absent, and the choice of which to keep.

    checkpoints/step-000100/
        model.safetensors, config.json, ...   a model folder: AutoModelForCausalLM opens it
        optimizer.safetensors                 state tensors named `parameter/key`
        state.safetensors                     the State that training carries from step to step, if it does
        noise.safetensors                     the noise with which memories start, if they do
        rng.safetensors                       generator states of each process
        trainer.json                          step, data position, best result, size of every file

A checkpoint is written into a hidden folder beside its place, synced to disk, and renamed. A process that
dies at any moment leaves the earlier checkpoints as they were.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nestor.errors import FileFormatError
from nestor.files import read_tensors, write_json, write_tensors

FORMAT_VERSION = 1
PREFIX = "step-"
TRAINER = "trainer.json"


def save_checkpoint(root: Path, step: int, write: Callable[[Path], None], trainer: Mapping[str, Any]) -> Path:
    """Make the checkpoint of a step: `write` puts files into the folder it is given, to which come the
    values of `trainer` as trainer.json."""
    root.mkdir(parents=True, exist_ok=True)
    folder = folder_of(root, step)
    with whole_folder(folder, root / f".{folder.name}.{os.getpid()}.tmp") as unfinished:
        write(unfinished)
        sizes = {
            entry.name: entry.stat().st_size for entry in sorted(unfinished.iterdir()) if entry.is_file()
        }
        write_json(
            unfinished / TRAINER, {"format_version": FORMAT_VERSION, "step": step, **trainer, "files": sizes}
        )
    return folder


@contextmanager
def whole_folder(folder: Path, unfinished: Path) -> Iterator[Path]:
    """Yield `unfinished`, empty and beside `folder`; what is in it takes that place on success, and goes on
    failure."""
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        publish(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def publish(unfinished: Path, folder: Path) -> None:
    """Sync every file of `unfinished` and rename it to `folder`, in whose place an older one may stand."""
    for entry in [*unfinished.iterdir(), unfinished]:
        _sync(entry)
    if folder.exists():
        # A rename cannot replace a folder with files in it; the old one steps aside first and goes last.
        aside = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
        os.rename(unfinished, folder)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.rename(unfinished, folder)
    _sync(folder.parent)


def clean_unfinished(root: Path) -> int:
    """Remove what a killed process left behind; returns how many folders. A folder that was being replaced
    when the process died gets its place back."""
    removed = 0
    for entry in list(root.glob(".*.old")) if root.is_dir() else []:
        place = root / entry.name[1:].split(".")[0]
        if not place.exists():
            os.rename(entry, place)
    for entry in [*root.glob(".*.tmp"), *root.glob(".*.old")] if root.is_dir() else []:
        shutil.rmtree(entry, ignore_errors=True)
        removed += 1
    return removed


def folder_of(root: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return root / f"{PREFIX}{step:06d}"


def list_checkpoints(root: Path) -> list[Path]:
    """All checkpoints, oldest first."""
    found = [entry for entry in root.glob(f"{PREFIX}*") if (entry / TRAINER).is_file()]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The step at which a checkpoint was taken, by its name."""
    digits = folder.name.removeprefix(PREFIX)
    return int(digits) if digits.isdigit() else -1


def read_trainer(folder: Path) -> dict[str, Any]:
    """trainer.json of a checkpoint, after a check that all its files are there and of the recorded size.

    Raises:
        FileFormatError: one is missing, cut off, or of another format version.
    """
    advice = f"Remove the folder {folder} to resume from the checkpoint before it."
    try:
        trainer = json.loads((folder / TRAINER).read_text(encoding="utf-8"))
        version, sizes = trainer["format_version"], trainer["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileFormatError(f"{folder / TRAINER} cannot be read ({error}). {advice}") from error
    if version != FORMAT_VERSION:
        raise FileFormatError(
            f"{folder} has checkpoint format {version}; this version of Nestor reads {FORMAT_VERSION}. "
            "Continue the run with the version that began it."
        )
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            seen = f"has {path.stat().st_size:,}" if path.is_file() else "is missing; it had"
            raise FileFormatError(f"{path} {seen} bytes, {size:,} were written. {advice}")
    return trainer


def prune(root: Path, keep_last: int, best_step: int | None) -> list[Path]:
    """Remove all but the newest `keep_last` checkpoints and the best one; returns those removed."""
    checkpoints = list_checkpoints(root)
    doomed = [folder for folder in checkpoints[:-keep_last] if step_of(folder) != best_step]
    for folder in doomed:
        # Renamed first, so that a half-removed folder is never taken for a checkpoint.
        aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        os.rename(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)
    return doomed


def state_tensors(state: Any) -> dict[str, Tensor]:
    """A State as named tensors."""
    layers = {f"layers.{i}.{name}": t for i, layer in state.layers.items() for name, t in layer.items()}
    return {"clock": state.clock, **layers}


def state_from_tensors(tensors: dict[str, Tensor]) -> Any:
    """The inverse of `state_tensors`."""
    from nestor.models.state import State

    layers: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key != "clock":
            _, index, name = key.split(".", 2)
            layers.setdefault(int(index), {})[name] = tensor
    return State(dict(sorted(layers.items())), tensors["clock"])


def random_state() -> dict[str, Any]:
    """State of every generator that training may draw from, on this process."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, words, following = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)],
        "python": [version, list(words), following],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state["torch"].cpu())
    if state.get("cuda") is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, words, following = state["python"]
    random.setstate((version, tuple(words), following))


def write_random_states(path: Path, states: list[dict[str, Any]]) -> None:
    """Generator states of all processes in one safetensors file; what is no tensor goes into its header."""
    tensors = {
        f"{rank}.{name}": state[name]
        for rank, state in enumerate(states)
        for name in ("torch", "cuda")
        if state[name] is not None
    }
    header = [{name: state[name] for name in ("numpy", "python")} for state in states]
    write_tensors(path, tensors, {"generators": json.dumps(header)})


def read_random_state(path: Path, rank: int) -> dict[str, Any] | None:
    """The generator states of one process; None if the run had fewer."""
    tensors, metadata = read_tensors(path)
    header = json.loads(metadata["generators"])
    if rank >= len(header):
        return None
    return {**header[rank], "torch": tensors[f"{rank}.torch"], "cuda": tensors.get(f"{rank}.cuda")}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
