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


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_is_in_exactly_one_group(kind):
    model = small_model()
    optimizers = build_optimizers(model, OptimizerConfig(name=kind))
    held = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert len(optimizers) == (2 if kind == "muon" else 1)


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


@pytest.mark.parametrize("kind", ["adamw", "muon"])
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
