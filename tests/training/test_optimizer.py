import pytest
import torch
from torch import nn

from nestor.errors import FileFormatError
from nestor.models import NestorForCausalLM, preset
from nestor.training.config import OptimizerConfig
from nestor.training.optimizer import (
    build_optimizers,
    decays,
    hidden_matrices,
    load_optimizer_state,
    optimizer_state,
    set_lr,
)


def small_model(name="titans-mag"):
    return NestorForCausalLM(
        preset(
            name, "quick", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
        )
    )


def step(model, optimizers, seed):
    torch.manual_seed(seed)
    tokens = torch.randint(0, 256, (2, 16))
    model(input_ids=tokens, labels=tokens).loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


KINDS = pytest.mark.parametrize("kind", ["adamw", "muon", "adamuon", "m3"])


@KINDS
def test_every_parameter_is_in_exactly_one_group(kind):
    model = small_model()
    optimizers = build_optimizers(model, OptimizerConfig(name=kind))
    held = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert len(optimizers) == (1 if kind == "adamw" else 2)


def test_norms_biases_and_scales_are_not_decayed_and_weights_are():
    model = small_model()
    for name, parameter in model.named_parameters():
        plain = parameter.dim() < 2 or any(part in name for part in ("norm", "gamma", "beta", "bias"))
        assert decays(name, parameter) is not plain, name


def test_muon_takes_hidden_matrices_only():
    names = hidden_matrices(small_model())
    parameters = dict(small_model().named_parameters())
    assert names and all(parameters[name].dim() == 2 for name in names)
    assert any("feed_forward.gate_proj" in name for name in names)
    # Embeddings, gates of the memory, its convolutions and its initial weights learn by AdamW.
    assert not [n for n in names if "embed" in n or "lm_head" in n or "convolution" in n or "initial" in n]
    assert not [n for n in names if "mixer" in n and "gate_proj" in n]


def test_rates_follow_the_factor_of_their_own_peak():
    optimizers = build_optimizers(small_model(), OptimizerConfig(name="muon", lr=1e-3, muon_lr=2e-2))
    set_lr(optimizers, 0.5)
    set_lr(optimizers, 0.25)
    assert {group["lr"] for group in optimizers[0].param_groups} == {0.25e-3}
    assert {group["lr"] for group in optimizers[1].param_groups} == {0.5e-2}


def test_settings_reach_the_optimiser_of_matrices():
    config = OptimizerConfig(
        name="m3", lr=0.1, betas=(0.8, 0.7), muon_lr=0.2, muon_momentum=0.6, weight_decay=0.3, eps=1e-6,
        m3_slow_period=4, m3_slow_weight=0.5, m3_slow_momentum=0.4, m3_v_source="orthogonal",
    )  # fmt: skip
    group = build_optimizers(small_model(), config)[1].param_groups[0]
    wanted = {
        "lr": 0.2, "betas": (0.6, 0.7, 0.4), "slow_period": 4, "slow_weight": 0.5, "weight_decay": 0.3,
        "eps": 1e-6, "v_source": "orthogonal", "accumulate": "decay", "match_rms": True,
    }  # fmt: skip
    assert {key: group[key] for key in wanted} == wanted
    config = OptimizerConfig(name="adamuon", lr=0.1, betas=(0.8, 0.7), muon_momentum=0.6)
    group = build_optimizers(small_model(), config)[1].param_groups[0]
    assert (group["lr"], group["betas"], group["sign"]) == (0.1, (0.6, 0.7), True)


@pytest.mark.parametrize("kind", ["muon", "adamuon", "m3"])
def test_updates_of_hidden_matrices_have_the_size_of_those_of_adamw(kind):
    """A root mean square of 0.2 times the learning rate; Muon's own is near it where matrices are square."""
    model = small_model()
    optimizers = build_optimizers(model, OptimizerConfig(name=kind, lr=1e-3, weight_decay=0.0))
    names = hidden_matrices(model)
    for seed in range(3):
        before = {name: p.detach().clone() for name, p in model.named_parameters() if name in names}
        step(model, optimizers, seed)
        for name, was in before.items():
            rms = float((model.get_parameter(name).detach() - was).square().mean().sqrt())
            assert rms == pytest.approx(0.2e-3, rel=0.4 if kind == "muon" else 1e-3), name


@KINDS
def test_restored_state_continues_bit_for_bit(kind):
    config = OptimizerConfig(name=kind, lr=1e-2)
    model = small_model()
    optimizers = build_optimizers(model, config)
    for seed in range(3):
        step(model, optimizers, seed)
    twin = small_model()
    twin.load_state_dict(model.state_dict())
    twin_optimizers = build_optimizers(twin, config)
    saved = {name: tensor.clone() for name, tensor in optimizer_state(model, optimizers).items()}
    load_optimizer_state(twin, twin_optimizers, saved)
    for seed in range(3, 6):
        step(model, optimizers, seed)
        step(twin, twin_optimizers, seed)
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_state_of_another_model_is_refused_by_name():
    model, other = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))
    optimizers = build_optimizers(model, OptimizerConfig())
    model(torch.ones(1, 4)).sum().backward()
    optimizers[0].step()
    with pytest.raises(FileFormatError, match=r"differ in 4 parameters, first '0\.bias'"):
        load_optimizer_state(
            other, build_optimizers(other, OptimizerConfig()), optimizer_state(model, optimizers)
        )
