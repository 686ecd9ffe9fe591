"""recipes/retention/meta_tune.py: recall of what was never trained on gets likelier, and a run goes on."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from nestor.cli.loading import load_model
from nestor.errors import ConfigError

ROOT = Path(__file__).parents[2]
STORIES = ROOT / "checkpoints" / "stories260K"
MODULES = ("meta_tune", "drawing", "measuring", "options", "tuner")


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "recipes" / "retention")
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("meta_tune")
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def arguments(recipe):
    def make(out, **choices):
        few = {
            "facts": 4, "relations": 1, "sessions": 1, "repeats": (1,), "filler": 40, "gap": 2,
            "periods": (16, 64), "steps": 6, "streams": 4, "measure_every": 6, "validation": 2,
            "old_passages": 8, "old_length": 16, "warmup": 1, "save_every": 1, "device": "cpu",
        }  # fmt: skip
        return recipe.Args(model=str(STORIES), out=out, **{**few, **choices})

    return make


def test_tuning_makes_the_recall_of_new_words_likelier(recipe, arguments, tmp_path) -> None:
    result = recipe.main(arguments(tmp_path / "tuned"))
    first, last = (one["recall"]["new words"]["at once"]["nats"] for one in result["history"])
    assert last < first - 0.05
    assert result["history"][0]["learning_rates"] != result["history"][1]["learning_rates"]
    # The folder is a model of its own, with other weights in the levels and no others.
    untuned, tuned = (
        dict(load_model(str(folder), "cpu", "float32")[0].named_parameters())
        for folder in (STORIES, tmp_path / "tuned" / "model")
    )
    moved = {name for name, x in tuned.items() if not x.equal(untuned[name])}
    assert moved and all(".mlp." in name for name in moved)
    rates = json.loads((tmp_path / "tuned" / "rates.json").read_text())
    assert rates["learning_rates"] == result["history"][-1]["learning_rates"]
    assert "--retention.learning-rates" in rates["nestor eval"]


def test_a_stopped_run_ends_as_one_that_was_not(recipe, arguments, tmp_path) -> None:
    whole = recipe.main(arguments(tmp_path / "whole", steps=3))
    recipe.main(arguments(tmp_path / "cut", steps=3, minutes=0.0))
    so_far = json.loads((tmp_path / "cut" / "results.json").read_text())
    assert len(so_far["losses"]) < 3 and (tmp_path / "cut" / "model" / "model.safetensors").is_file()
    found = recipe.main(arguments(tmp_path / "cut", steps=3))
    assert found["losses"] == whole["losses"]
    with pytest.raises(ConfigError, match="other settings"):
        recipe.main(arguments(tmp_path / "cut", steps=3, learning_rate=0.5))


def test_the_control_learns_no_rates(recipe, arguments, tmp_path) -> None:
    result = recipe.main(arguments(tmp_path / "control", steps=2, control=True))
    assert result["history"][0]["learning_rates"] == result["history"][-1]["learning_rates"]
    assert not (tmp_path / "control" / "rates.json").exists()
    assert (tmp_path / "control" / "model" / "model.safetensors").is_file()


def test_a_stream_too_short_for_a_level_is_refused(recipe, arguments, tmp_path) -> None:
    with pytest.raises(ConfigError, match="makes no update; give a shorter period"):
        recipe.main(arguments(tmp_path / "short", periods=(16, 4096)))
