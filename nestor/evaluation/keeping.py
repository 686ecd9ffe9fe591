"""What is finished is kept in the folder of results, so that a run that was stopped goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nestor.evaluation.figures import file_name
from nestor.files import write_json
from nestor.jobs import Shared


class Kept:
    """Pieces of a measurement in a folder, each found again only under the settings that it was made with.

    Args:
        folder: None: nothing is kept. settings: JSON of all that a piece depends on.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        text = json.dumps(settings, sort_keys=True, default=str)
        self.digest = hashlib.sha256(text.encode()).hexdigest()

    def __contains__(self, name: str) -> bool:
        return self._read(name) is not None

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """The piece of that name: from the folder, or made and kept there."""
        if self.folder is None:
            return make()
        found = self._read(name)
        if found is None:
            # Both ways the piece is what JSON makes of it.
            found = json.loads(json.dumps(make()))
            write_json(self._path(self.folder, name), {"settings": self.digest, "piece": found})
        return found

    def _read(self, name: str) -> Any:
        if self.folder is None:
            return None
        try:
            kept = json.loads(self._path(self.folder, name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        whole = isinstance(kept, dict) and kept.get("settings") == self.digest
        return kept.get("piece") if whole else None

    @staticmethod
    def _path(folder: Path, name: str) -> Path:
        return folder / f"{file_name(name)}.json"


def reopened(made: Any, *given: Any, **options: Any) -> Shared:
    """For jobs of workers: another of the kind of `made`, which each opens with the subject on its device.

    made: with a `subject`, a `folder` and what is `kept` there. given, options: what it is made with besides.

    Raises:
        ConfigError: the subject cannot be opened again.
    """
    options |= {"folder": made.folder, "depends": made.kept.settings}
    again = partial(_open, type(made), made.subject.again(), given, options)
    return Shared((made.kept.digest, str(made.folder)), again)


def _open(
    kind: Callable[..., Any],
    reopen: Callable[[str], Any],
    given: Sequence[Any],
    options: Mapping[str, Any],
    device: str,
) -> Any:
    return kind(reopen(device), *given, **options)
