"""Decoders of Hugging Face that learn while they read, and which of their weights do."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from nestor.errors import ConfigError
from nestor.learning import Learner, Level, Retrofit, assign_levels, feed_forward_weights
from nestor.learning.inner import OPTIMIZERS
from nestor.learning.retrofit import DEFAULT_RATES, READINGS
from nestor.models import State

SIZES = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 6,
    "num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
KINDS = {
    "llama": {"num_key_value_heads": 2, "pad_token_id": 0},
    "qwen2": {"num_key_value_heads": 2, "pad_token_id": 0},
    "gpt_neox": {},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 5, "pad_token_id": 0},
}


def build(kind, dtype=torch.float64):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **KINDS[kind]}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model.to(dtype).eval()


def tokens(length, rows=1):
    return torch.randint(0, 31, (rows, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_invariant_25_without_a_learning_rate_the_model_is_the_same_to_the_bit(kind, dtype) -> None:
    model, ids = build(kind, dtype), tokens(13)
    learner = Learner(model, assign_levels(model, [16, 32], [0.0, 0.0]))
    with torch.no_grad():
        assert torch.equal(learner.read(ids, learner.start()).logits, model(ids).logits)
    learner = Learner(model, assign_levels(model, [4, 8], [0.0, 0.0]))
    found, state = learner.read(ids, learner.start())
    cache, expected = DynamicCache(), []
    with torch.no_grad():
        for piece in ids.split(4, 1):
            expected.append(model(piece, past_key_values=cache).logits)
    assert torch.equal(found, torch.cat(expected, 1))
    assert [report.updates for report in learner.report(state)[0]] == [3, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_gradient_descent_on_chunks_of_the_stream(kind) -> None:
    model, ids = build(kind), tokens(13)
    (level,) = assign_levels(model, [4], [0.05])
    found, state = Learner(model, [level]).read(ids, Learner(model, [level]).start())
    own, cache, expected = dict(model.named_parameters()), DynamicCache(), []
    for begin in range(0, 13, 4):
        logits = model(ids[:, begin : begin + 4], past_key_values=cache).logits
        expected.append(logits.detach())
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        if begin + 4 < 13:
            loss = F.cross_entropy(logits[0], ids[0, begin + 1 : begin + 5])
            gradients = torch.autograd.grad(loss, [own[name] for name in level.parameters])
            with torch.no_grad():
                for name, g in zip(level.parameters, gradients, strict=True):
                    own[name].sub_(0.05 * g)
    torch.testing.assert_close(found, torch.cat(expected, 1), rtol=1e-9, atol=1e-11)
    assert not torch.allclose(found[:, -1], build(kind)(ids).logits[:, -1])


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_streams_can_be_cut_stacked_and_saved(kind, tmp_path) -> None:
    model, ids = build(kind), tokens(17, rows=2)
    learner = Learner(model, assign_levels(model, [3, 6], [0.05, 0.05], optimizer="momentum"))
    whole = learner.read(ids, learner.start(2))
    _, ahead = learner.read(ids[:1, :5], learner.start())
    state = State.stack([ahead, learner.start()])
    state.save(tmp_path / "state.safetensors", model)
    state = State.load(tmp_path / "state.safetensors", model)
    one, _ = learner.read(ids[:1, 5:], state.select([0]))
    other, _ = learner.read(ids[1:], state.select([1]))
    torch.testing.assert_close(one, whole.logits[:1, 5:], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(other, whole.logits[1:], rtol=1e-9, atol=1e-11)
    closed = learner.close(whole.state)
    assert closed.clock.tolist() == [0, 0] and closed.learned["every 3"]["updates"].tolist() == [5, 5]
    assert closed.layers[0]["keys.cache"].shape[1] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_generation_goes_on_from_the_cache(kind) -> None:
    model, ids = build(kind), tokens(12)
    learner = Learner(model, assign_levels(model, [4], [0.0]))
    state = learner.read(ids[:, :9], learner.start()).state
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    found = learner.generate(ids[:, 9:], state, **options)
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(found, whole[:, 12:])
    eager = Learner(model, assign_levels(model, [4], [2.0]))
    moved = eager.read(ids[:, :9], eager.start()).state
    with eager.applied(moved):
        logits = model(ids).logits
    assert not torch.allclose(logits, model(ids).logits)


def test_layers_and_their_levels() -> None:
    model = build("llama")
    layers = feed_forward_weights(model)
    assert [len(layer) for layer in layers] == [3] * 6 and layers[5][
        0
    ] == "model.layers.5.mlp.gate_proj.weight"

    def groups(*periods, **choices):
        levels = assign_levels(model, periods, [0.1] * len(periods), **choices)
        return [sorted({int(name.split(".")[2]) for name in level.parameters}) for level in levels]

    assert groups(4, 8, 16) == [[3], [4], [5]] and groups(4, 8) == [[3, 4], [5]]
    assert groups(4, 8, order="deep_first") == [[4, 5], [3]]
    assert groups(4, 8, fixed=0.0) == [[0, 1, 2], [3, 4, 5]]
    shuffled = groups(4, 8, 16, fixed=0.0, order="shuffled", seed=3)
    assert shuffled == groups(4, 8, 16, fixed=0.0, order="shuffled", seed=3) != [[0, 1], [2, 3], [4, 5]]
    assert sorted(index for group in shuffled for index in group) == [0, 1, 2, 3, 4, 5]
    level = assign_levels(model, [4], [0.1], optimizer="adam", largest_update=0.01)[0]
    assert (level.optimizer, level.largest_update, level.period) == ("adam", 0.01, 4)


def test_each_inner_step_has_a_learning_rate_of_its_size() -> None:
    model = build("llama")
    assert set(DEFAULT_RATES) == set(OPTIMIZERS)
    for optimizer, rate in DEFAULT_RATES.items():
        for reading in READINGS:
            levels = Retrofit(reading, optimizer=optimizer).apply(build("llama"))
            assert [level.learning_rate for level in levels] == [rate, rate]
    assert [level.learning_rate for level in Retrofit(learning_rates=(0.5, 0.2)).apply(model)] == [0.5, 0.2]


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
@pytest.mark.parametrize("reading", ["copies", "added"])
def test_invariant_25_further_networks_leave_the_function_as_it_was(kind, reading) -> None:
    model, ids = build(kind), tokens(21)
    plain = model(ids).logits
    retrofit = Retrofit(reading, periods=(2, 4), learning_rates=(0.5, 0.25), largest_update=None)
    learner = Learner(model, retrofit.apply(model))
    torch.testing.assert_close(model(ids).logits, plain, rtol=1e-12, atol=1e-13)
    logits, state = learner.read(ids[:, :3], learner.start())
    torch.testing.assert_close(logits[:, :2], plain[:, :2], rtol=1e-12, atol=1e-13)
    assert not torch.allclose(logits[:, 2:], plain[:, 2:3])
    # Each level has networks of its own in each of the upper layers, and all of these learn.
    sets = [set(level.parameters) for level in learner.levels]
    assert not sets[0] & sets[1] and all(".5." in " ".join(names) for names in sets)
    state = learner.read(ids[:, 3:], state).state
    for level in learner.levels:
        for name in level.parameters:
            assert state.learned[level.name][f"delta/{name}"].any(), name
    # The same model again, from what a file notes.
    again = build(kind)
    other = Learner(again, Retrofit.from_notes(retrofit.to_notes()).apply(again))
    assert torch.equal(other.read(ids, other.start()).logits, learner.read(ids, learner.start()).logits)


def test_copies_learn_what_each_alone_would(tmp_path) -> None:
    """The mean of two copies moves by half of what one network would, where only one level is due."""
    ids = tokens(5)
    one, two = build("llama"), build("llama")
    single = Learner(one, assign_levels(one, [4], [0.1], fixed=0.9))
    double = Learner(two, Retrofit("copies", (4, 8), (0.1, 0.1), largest_update=None, fixed=0.9).apply(two))
    alone = single.read(ids, single.start()).state.learned["every 4"]
    both = double.read(ids, double.start()).state.learned
    for name in single.levels[0].parameters:
        place, _, matrix = name.partition("mlp.")
        found = both["every 4"][f"delta/{place}mlp.copies.0.{matrix}"]
        torch.testing.assert_close(found, alone[f"delta/{name}"] / 2, rtol=1e-9, atol=1e-13)
        assert not both["every 8"][f"delta/{place}mlp.copies.1.{matrix}"].any()


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"reading": "copy"}, "Did you mean 'copies'"),
        ({"reading": "copies", "order": "shuffled"}, "leave it out"),
        ({"width": 3}, "only with reading 'added'"),
        ({"order": "deep"}, "known are shallow_first"),
    ],
)
def test_retrofits_that_cannot_be(choices, message) -> None:
    with pytest.raises(ConfigError, match=message):
        Retrofit(**choices)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"periods": [4, 8, 16, 32]}, "4 levels for 3 layers"),
        ({"periods": [8, 4]}, "rising periods"),
        ({"periods": [4], "learning_rates": []}, "a learning rate for each"),
        ({"periods": [4], "order": "shallow"}, "Did you mean 'shallow_first'"),
        ({"periods": [4], "fixed": 1.0}, "fixed is 1.0"),
        ({"periods": []}, "rising periods"),
    ],
)
def test_levels_that_do_not_fit_the_layers(choices, message) -> None:
    rates = choices.pop("learning_rates", [0.1] * len(choices["periods"]))
    with pytest.raises(ConfigError, match=message):
        assign_levels(build("llama"), learning_rates=rates, **choices)


def test_other_models_are_refused_by_what_they_lack() -> None:
    gpt2 = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel has no weights called layers\.N\.mlp"):
        feed_forward_weights(gpt2)
    Learner(gpt2, [Level("by name", ("transformer.h.0.mlp.c_fc.weight",), 4)])
    sizes = {**SIZES, "num_key_value_heads": 2, "num_local_experts": 2, "num_hidden_layers": 2}
    experts = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **sizes))
    with pytest.raises(ConfigError, match="MixtralForCausalLM has no weights"):
        feed_forward_weights(experts)
    mamba = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mamba", hidden_size=8, num_hidden_layers=1, vocab_size=9, state_size=2)
    )
    with pytest.raises(ConfigError, match="MambaForCausalLM does not keep keys and values"):
        Learner(mamba, [Level("a", ("backbone.layers.0.mixer.x_proj.weight",), 4)])
    with pytest.raises(ConfigError, match="no causal language model"):
        Learner(nn.Linear(2, 2), [Level("a", ("weight",), 4)])
