"""What is finished is kept in the folder of results, so that a run that was stopped goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nestor.evaluation.figures import file_name
from nestor.files import write_json


class Kept:
    """Pieces of a measurement in a folder, each found again only under the settings that it was made with.

    Args:
        folder: None: nothing is kept. settings: JSON of all that a piece depends on.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]) -> None:
        self._folder = folder
        text = json.dumps(settings, sort_keys=True, default=str)
        self._digest = hashlib.sha256(text.encode()).hexdigest()

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """The piece of that name: from the folder, or made and kept there."""
        if self._folder is None:
            return make()
        path = self._folder / f"{file_name(name)}.json"
        found = self._read(path)
        if found is None:
            # Both ways the piece is what JSON makes of it.
            found = json.loads(json.dumps(make()))
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"settings": self._digest, "piece": found})
        return found

    def _read(self, path: Path) -> Any:
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        whole = isinstance(kept, dict) and kept.get("settings") == self._digest
        return kept.get("piece") if whole else None
