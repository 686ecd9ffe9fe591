"""Recipes are programs: their modules lie in folders of their own and are forgotten after a test file."""

import importlib
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def evidence():
    """The modules of recipes/evidence by name. Their names are common ones."""
    folder = RECIPES / "evidence"
    names = ("study", *(path.stem for path in sorted(folder.glob("*.py")) if path.stem != "study"))
    kept = {name: sys.modules.pop(name) for name in (*names, "sweep", "captured") if name in sys.modules}
    sys.path.insert(0, str(folder))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    sys.path.remove(str(folder))
    for name in names:
        del sys.modules[name]
    sys.modules.update(kept)


@pytest.fixture(scope="session")
def some_novels(tmp_path_factory):
    """A folder with small files of the names that the evidence trains on."""
    folder = tmp_path_factory.mktemp("novels")
    draw = random.Random(0)
    words = ("the raven", "a key", "under", "clock", "sold", "green", "boats")
    for name, count in (("train-a", 3), ("train-b", 2), ("valid", 3), ("heldout-long", 2)):
        texts = [" ".join(draw.choice(words) for _ in range(150)) for _ in range(count)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"novels-{name}.jsonl").write_text(lines)
    return folder
