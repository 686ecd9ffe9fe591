"""The model that a run starts from: a saved one, with settings that its weights do not depend on changed."""

from pathlib import Path

import pytest
import torch

from nestor.errors import ConfigError
from nestor.training import train
from nestor.training.config import load_config
from nestor.training.model import open_model

TNT = {"chunk_size": 8, "shard_size": 16, "local_chunk_sizes": [4, 8]}


@pytest.fixture
def stage_one(tiny, tmp_path):
    """The folder of a small trained TNT."""
    config = tiny(
        model__preset="tnt", model__overrides__memory=TNT, model__overrides__sliding_window=None,
        run__steps=2, run__eval_every=0, run__out=str(tmp_path / "one"),
    )  # fmt: skip
    train(config, quiet=True)
    return tmp_path / "one" / "final"


def test_a_second_stage_goes_on_with_smaller_chunks(tiny, stage_one, tmp_path, weights):
    before = weights(stage_one)
    config = tiny(
        model__path=str(stage_one), model__overrides={"memory": {"local_chunk_sizes": [1, 2]}},
        optimizer__lr=1e-4, run__steps=2, run__eval_every=0, run__out=str(tmp_path / "two"),
    )  # fmt: skip
    train(config, quiet=True)
    final = tmp_path / "two" / "final"
    model = open_model(final, torch.float32)
    assert model.config.memory == {**model.config.memory, **TNT, "local_chunk_sizes": [1, 2]}
    assert [local.spec.chunk_size for local in model.layers[0].mixer.locals] == [1, 2]
    after = weights(final)
    assert after.keys() == before.keys()
    moved = [(after[name] - before[name]).abs().max() for name in before]
    assert 0 < max(moved) < 1e-2


@pytest.mark.parametrize(
    "memory",
    [{"expansion": 3}, {"local_chunk_sizes": [4, 8, 16]}, {"local_chunk_sizes": [4]}],
    ids=["another shape", "more weights", "fewer weights"],
)
def test_settings_that_the_weights_do_not_fit_are_refused(stage_one, memory):
    with pytest.raises(ConfigError, match=r"do not fit model.overrides .*Change only what has no weights"):
        open_model(stage_one, torch.float32, {"memory": memory})


def test_an_unknown_setting_is_refused(stage_one):
    with pytest.raises(
        ConfigError, match="unknown setting 'memry' in model.overrides. Did you mean 'memory'"
    ):
        open_model(stage_one, torch.float32, {"memry": {}})


def test_the_two_recipes_of_tnt_fit_each_other():
    folder = Path(__file__).parents[2] / "recipes" / "tnt"
    first, second = (load_config(folder / f"tnt-stage-{n}.toml") for n in (1, 2))
    assert Path(second.model.path) == first.folder / "final"
    larger, smaller = (c.model.overrides["memory"]["local_chunk_sizes"] for c in (first, second))
    assert len(larger) == len(smaller) and all(a > b for a, b in zip(larger, smaller, strict=True))
    assert second.run.tokens == first.run.tokens // 20
    assert set(second.model.overrides["memory"]) == {"local_chunk_sizes"}
