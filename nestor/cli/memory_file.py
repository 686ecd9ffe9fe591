"""A memory file: the State of one conversation on disk, with named snapshots in a folder beside it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nestor.errors import ConfigError, StateMismatchError
from nestor.models.state import State

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class MemoryFile:
    """The State in `path`, and snapshots in `<path>.snapshots/NAME.safetensors`.

    notes: what is written with each State (`State.save`).
    Every write is atomic. Hold a `nestor.files.FileLock(path)` as long as this may write.
    """

    def __init__(self, path: Path, model: Any, notes: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.notes = notes
        self.folder = path.with_name(path.name + ".snapshots")
        self.model = model

    def load(self, required: bool = False) -> State | None:
        """The State in the file, or None if there is no file yet and none is required."""
        return self._load(self.path) if required or self.path.exists() else None

    def save(self, state: State | None) -> None:
        """Replace the State in the file; None, a State that has read nothing, removes the file."""
        if state is None:
            self.path.unlink(missing_ok=True)
        else:
            state.save(self.path, self.model, self.notes)

    def snapshot(self, name: str, state: State) -> Path:
        """Keep `state` under a new name."""
        path = self._snapshot_path(name)
        if path.exists():
            raise ConfigError(f"there is a snapshot {name!r} already; choose another name.")
        state.save(path, self.model, self.notes)
        return path

    def rollback(self, name: str) -> State:
        """The State kept under `name`."""
        path = self._snapshot_path(name)
        if not path.exists():
            names = ", ".join(self.snapshots()) or "none yet"
            raise ConfigError(f"there is no snapshot {name!r}; there are: {names}.")
        return self._load(path)

    def snapshots(self) -> list[str]:
        """The names of the snapshots, in order of the alphabet."""
        return sorted(p.stem for p in self.folder.glob("*.safetensors") if _NAME.fullmatch(p.stem))

    def _load(self, path: Path) -> State:
        state = State.load(path, model=self.model)
        if state.batch_size != 1:
            raise StateMismatchError(
                f"{path} holds {state.batch_size} streams; a conversation is one: select a row first."
            )
        return state

    def _snapshot_path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{name!r} cannot be a snapshot's name: use 1 to 64 letters, digits, - and _.")
        return self.folder / f"{name}.safetensors"
