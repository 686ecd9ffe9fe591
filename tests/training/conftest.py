"""A run small enough to be repeated in every test: two layers, four lanes, ten steps."""

from pathlib import Path

import pytest

from nestor.training import TrainConfig
from nestor.training.settings import apply_overrides

LINE = "The {} sat by the window number {} and counted {} boats on the river.\n"


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    words = ("baker", "sailor", "clerk", "widow", "doctor")
    path.write_text("".join(LINE.format(words[i % 5], i, i * i % 97) for i in range(120)), encoding="utf-8")
    return path


@pytest.fixture
def tiny(text_file, tmp_path, monkeypatch):
    """Makes configurations: `tiny(**{"run.steps": 3})` replaces settings by their dotted names."""
    # One cache for all tests of a session; the user's own is left alone.
    monkeypatch.setenv("XDG_CACHE_HOME", str(text_file.parent / "cache"))
    base = {
        "name": "tiny",
        "model": {
            "preset": "titans-mag",
            "size": "quick",
            "overrides": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 32,
                "sliding_window": 8,
                "memory": {"chunk_size": 8},
            },
        },
        "data": {"sources": [{"text": [str(text_file)]}], "sequence_length": 32, "batch_size": 4},
        "optimizer": {"lr": 1e-2},
        "run": {
            "out": str(tmp_path / "run"),
            "steps": 10,
            "device": "cpu",
            "tracker": "none",
            "state_mode": "carry",
            "eval_every": 4,
            "eval_batches": 2,
            "save_every": 5,
            "log_every": 3,
        },
    }

    def make(**changes) -> TrainConfig:
        overrides = [(key.replace("__", "."), value) for key, value in changes.items()]
        return TrainConfig.from_dict(apply_overrides(base, overrides, TrainConfig))

    return make


@pytest.fixture
def weights():
    """Reads the weights of a model folder."""
    from safetensors.torch import load_file

    return lambda folder: load_file(Path(folder) / "model.safetensors")
