"""The continuum: what its blocks compute, and how a Learner updates each (spec nested-learning, d and h)."""

import copy

import pytest
import torch
from torch.nn import functional as F

from nestor.errors import ConfigError
from nestor.layers.continuum import ContinuumFeedForward
from nestor.learning import Learner, Retrofit, continuum_levels
from nestor.models import NestorConfig, NestorForCausalLM
from nestor.models.presets import preset

WIRINGS = ("sequential", "independent", "nested")


def build(wiring="sequential", periods=(2, 4, None)):
    torch.manual_seed(0)
    config = NestorConfig(
        vocab_size=19, hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=18,
        feed_forward_types=["continuum"] * 2, continuum={"periods": list(periods), "wiring": wiring},
        initializer_range=0.3,
    )  # fmt: skip
    return NestorForCausalLM(config).double().eval()


def stream(length, seed=1):
    return torch.randint(0, 19, (1, length), generator=torch.Generator().manual_seed(seed))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_blocks_in_sequence_have_a_residual_each() -> None:
    layer, x = ContinuumFeedForward(6, 12, 3).double(), random(2, 5, 6)
    first = x + layer.blocks[0](layer.norms[0](x))
    second = first + layer.blocks[1](layer.norms[1](first))
    torch.testing.assert_close(layer(x), second + layer.blocks[2](layer.norms[2](second)))
    nested = ContinuumFeedForward(6, 12, 3, "nested").double()
    nested.load_state_dict(layer.state_dict())
    assert torch.equal(nested(x), layer(x))


def test_invariant_13_independent_blocks_are_mixed() -> None:
    layer, x = ContinuumFeedForward(6, 12, 3, "independent").double(), random(2, 5, 6)
    u = layer.norms[0](x)
    torch.testing.assert_close(layer(x), x + sum(block(u) for block in layer.blocks) / 3)
    with torch.no_grad():
        layer.mixture.copy_(torch.tensor([-800.0, 0.0, -800.0]))
    torch.testing.assert_close(layer(x), x + layer.blocks[1](u))
    for block in layer.blocks:
        block.load_state_dict(layer.blocks[1].state_dict())
    with torch.no_grad():
        layer.mixture.copy_(torch.tensor([0.3, -0.2, 1.1]))
    torch.testing.assert_close(layer(x), x + layer.blocks[1](u))


@pytest.mark.parametrize("wiring", WIRINGS)
def test_invariant_1_a_frozen_continuum_is_a_plain_model(wiring) -> None:
    model, ids = build(wiring), stream(15)
    learner = Learner(model, continuum_levels(model, [0.0, 0.0]))
    logits, state = learner.read(ids, learner.start())
    torch.testing.assert_close(logits, model(ids).logits, rtol=1e-12, atol=1e-13)
    for level in learner.levels:
        assert not any(state.learned[level.name][f"delta/{name}"].any() for name in level.parameters)


@pytest.mark.parametrize("wiring", WIRINGS)
def test_invariant_11_gradients_go_through_the_blocks_that_follow(wiring) -> None:
    model, ids = build(wiring, (4, 8, None)), stream(6)
    learner = Learner(model, continuum_levels(model, [0.0, 0.0]))
    kept = learner.read(ids, learner.start()).state.learned["every 8"]
    blocks = (0, 1) if wiring == "nested" else (1,)
    for block in blocks:
        name = f"layers.0.feed_forward.blocks.{block}.up_proj.weight"

        def loss(amount, name=name):
            other = copy.deepcopy(model)
            with torch.no_grad():
                other.get_parameter(name)[2, 3] += amount
                return F.cross_entropy(other(ids[:, :4]).logits[0], ids[0, 1:5], reduction="sum")

        expected = float(loss(1e-5) - loss(-1e-5)) / 2e-5
        assert float(kept[f"gradient/{name}"][0, 2, 3]) == pytest.approx(expected, rel=1e-6)
        assert abs(expected) > 1e-4
    assert len([name for name in kept if name.startswith("gradient/")]) == 6 * len(blocks)


def test_invariants_4_and_14_blocks_learn_at_their_own_pace() -> None:
    for wiring in WIRINGS:
        model = build(wiring)
        learner = Learner(model, continuum_levels(model, [0.1, 0.05]))
        state = learner.read(stream(14), learner.start()).state  # 13 predictions
        fast, slow = learner.report(state)[0]
        assert (fast.updates, slow.updates, slow.change > 0) == (6, 3, True)
        never = {name for name in dict(model.named_parameters()) if ".blocks.2." in name}
        assert len(never) == 6 and not never & {n for level in learner.levels for n in level.parameters}
        # 12 predictions: at a boundary of the slow level.
        state = learner.read(stream(13), learner.start()).state
        name = "layers.1.feed_forward.blocks.0.down_proj.weight"
        moved = state.learned["every 2"][f"delta/{name}"].any()
        assert moved == (wiring != "nested")
        if wiring == "nested":
            begin = model.get_parameter(name) + state.learned["every 4"][f"delta/{name}"][0]
            assert torch.equal(learner.weights(state)[name], begin) and fast.updates == 6
        else:
            assert f"delta/{name}" not in state.learned["every 4"]


def test_every_block_has_a_gradient_from_the_start() -> None:
    for wiring in WIRINGS:
        model, ids = build(wiring), stream(12)
        model(ids, labels=ids).loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.norm() > 0, name


def test_the_same_in_training_and_evaluation() -> None:
    model, ids = build(), stream(9)
    assert torch.equal(model(ids).logits, model.train()(ids).logits)


def test_hope_attention_spends_what_a_transformer_does_and_learns() -> None:
    config = preset("hope-attention", "quick")
    assert config.feed_forward_types == ["continuum"] * 2 and config.intermediate_size % 4 == 0
    model = NestorForCausalLM(config).eval()
    retrofit = Retrofit(learning_rates=(0.1, 0.1, 0.1))
    levels = retrofit.apply(model)
    assert [level.period for level in levels] == [64, 512, 4096]
    shorter = Retrofit(periods=(4, 8), learning_rates=(0.1, 0.1)).apply(model)
    assert [level.period for level in shorter] == [4, 8]
    learner = Learner(model, shorter)
    state = learner.read(torch.randint(0, 256, (1, 18)), learner.start()).state
    assert [report.updates for report in learner.report(state)[0]] == [4, 2]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"periods": [4, 2]}, "rising numbers of tokens"),
        ({"periods": [None, 4]}, "rising numbers of tokens"),
        ({"periods": ["2", 4]}, "rising numbers of tokens"),
        ({"periods": [None]}, "rising numbers of tokens"),
        ({"periods": [2, 4], "wires": 1}, "Did you mean 'wiring'"),
        ({"periods": [2, 4], "wiring": "series"}, "known are sequential"),
        ({"periods": [2, 4, 8, 16, 32]}, "multiple of their number"),
        ({}, "for example"),
    ],
)
def test_a_continuum_that_cannot_be(choices, message) -> None:
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 18}
    with pytest.raises(ConfigError, match=message):
        NestorConfig(**sizes, feed_forward_types=["continuum"], continuum=choices)


def test_levels_that_do_not_fit_the_blocks() -> None:
    model = build()
    for arguments, message in (
        (([0.1],), "give one for each"),
        (([0.1, 0.1], (2, 4)), "continuum of 3 blocks, and there are 2 periods"),
        (([0.1, 0.1], (4, 2, None)), "rising ones"),
    ):
        with pytest.raises(ConfigError, match=message):
            continuum_levels(model, *arguments)
    with pytest.raises(ConfigError, match="6 is none of 4"):
        continuum_levels(build("nested"), [0.1] * 3, (2, 4, 6))
    plain = NestorForCausalLM(NestorConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(ConfigError, match="continuum of 0 blocks"):
        continuum_levels(plain, [0.1])
