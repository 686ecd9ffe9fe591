"""Blocks of a continuum that are updated once in several steps of training."""

import pytest
import torch
from torch import nn

from nestor.errors import ConfigError, FileFormatError
from nestor.models import NestorConfig, NestorForCausalLM
from nestor.training import train
from nestor.training.loop import Run
from nestor.training.pace import Pace


@pytest.fixture
def model():
    torch.manual_seed(0)
    return NestorForCausalLM(
        NestorConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
            feed_forward_types=["continuum"], continuum={"periods": [2, 4, None]},
        )
    )  # fmt: skip


def gradient(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_slow_blocks_get_the_mean_of_their_steps(model) -> None:
    pace = Pace(model, (1, 2, 3))
    fast, mid, slow = (f"layers.0.feed_forward.blocks.{k}.up_proj.weight" for k in range(3))
    seen = {name: [] for name in (fast, mid, slow)}
    for step in range(1, 7):
        gradient(model, step)
        own = {name: model.get_parameter(name).grad.clone() for name in seen}
        for name, grads in seen.items():
            grads.append(own[name])
        pace.hold(step)
        for name, count in ((fast, 1), (mid, 2), (slow, 3)):
            found = model.get_parameter(name).grad
            if step % count:
                assert found is None
            else:
                torch.testing.assert_close(found, torch.stack(seen[name][-count:]).mean(0))
        assert model.embed_tokens.weight.grad is not None
    assert not pace.waiting


def test_what_waits_is_saved(model) -> None:
    pace, other = Pace(model, (1, 2, 4)), Pace(model, (1, 2, 4))
    gradient(model, 1)
    pace.hold(1)
    other.load_state_dict(pace.state_dict())
    assert len(other.waiting) == 6
    gradient(model, 2)
    before = {name: parameter.grad for name, parameter in model.named_parameters()}
    pace.hold(2)
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = before[name]
    other.hold(2)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (expected[name] is None)
        assert parameter.grad is None or torch.equal(parameter.grad, expected[name])
    with pytest.raises(FileFormatError, match="which optimizer.block_steps of this run does not know"):
        Pace(model, ()).load_state_dict(other.state_dict())


def test_steps_are_one_for_each_block(model) -> None:
    with pytest.raises(ConfigError, match="continuum of 3 blocks"):
        Pace(model, (1, 2))
    with pytest.raises(ConfigError, match="continuum of 0 blocks"):
        Pace(nn.Linear(2, 2), (1,))


def test_a_run_goes_on_exactly_in_the_middle_of_a_slow_block(tiny, weights, monkeypatch) -> None:
    changes = {
        "model__preset": "hope-attention", "model__overrides__memory": None, "run__eval_every": 0,
        "model__overrides__intermediate_size": 32, "optimizer__block_steps": (1, 2, 3, 6), "run__steps": 8,
    }  # fmt: skip
    one, other = (tiny(run__out=str(tiny().folder / name), **changes) for name in "ab")
    whole = train(one, quiet=True)
    original = Run.train_step

    def fails(run):
        original(run)
        if run.step == 7:
            raise RuntimeError("power is gone")

    monkeypatch.setattr(Run, "train_step", fails)
    with pytest.raises(RuntimeError, match="power is gone"):
        train(other, quiet=True)
    monkeypatch.setattr(Run, "train_step", original)
    resumed = train(other, quiet=True)  # from the checkpoint after step 5
    first, second = weights(whole.final), weights(resumed.final)
    assert all(torch.equal(first[name], second[name]) for name in first)
