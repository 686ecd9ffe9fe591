"""Presets: names, sizes and equal budgets."""

import pytest
import torch

import nestor
from nestor import NestorForCausalLM, count_parameters, list_presets, preset
from nestor.data import ByteTokenizer, open_corpus, tokenize
from nestor.errors import ConfigError
from nestor.models.presets import SIZES

NOMINAL = {"quick": 0.51e6, "5m": 5e6, "60m": 43.6e6, "170m": 145e6, "340m": 307e6, "760m": 708e6}


@pytest.mark.parametrize("size", SIZES)
def test_presets_of_a_size_have_the_same_budget_and_shape(size):
    totals = {}
    for name in list_presets():
        config = preset(name, size)
        with torch.device("meta"):
            model = NestorForCausalLM(config)
        counts = count_parameters(model)
        assert counts["total"] == counts["embedding"] + counts["non_embedding"]
        assert counts["embedding"] == config.vocab_size * config.hidden_size
        assert (counts["memory_initial"] > 0) == bool(config.memory)
        totals[name] = counts["non_embedding"]
        assert abs(counts["total"] / NOMINAL[size] - 1) < 0.02
    # The feed-forward's inner width comes in steps of 8.
    step = 8 * 3 * config.hidden_size * config.num_hidden_layers
    assert max(totals.values()) <= min(totals.values()) + max(step, 0.01 * min(totals.values()))


def test_memory_initial_weights_are_counted_once_and_by_their_shapes():
    counts = count_parameters(NestorForCausalLM(preset("titans-lmm", "quick")))
    head, inner = 32, 64
    assert counts["memory_initial"] == 2 * 4 * 2 * head * inner


def test_overrides_take_effect_and_scale_the_budget():
    config = preset("transformer", "quick", hidden_size=64, sliding_window=16, vocab_size=99)
    assert config.layer_types == ["sliding_attention"] * 2
    assert config.vocab_size == 99
    count = count_parameters(NestorForCausalLM(config))["non_embedding"]
    assert abs(count / (2 * 14.5 * 64**2) - 1) < 0.03
    memory = preset("titans-mag", "quick", memory={"chunk_size": 8}).memory
    assert memory == {"heads": 4, "depth": 2, "expansion": 2, "chunk_size": 8}


def test_unknown_names_get_a_suggestion():
    with pytest.raises(ConfigError, match=r"unknown preset 'titan-mag'.*Did you mean 'titans-mag'"):
        preset("titan-mag")
    with pytest.raises(ConfigError, match=r"unknown size '17m'.*Did you mean '170m'"):
        preset("transformer", "17m")
    with pytest.raises(ConfigError, match=r"unknown setting 'sliding_windw'.*Did you mean 'sliding_window'"):
        preset("transformer", sliding_windw=3)
    with pytest.raises(ConfigError, match="set intermediate_size, or a smaller memory"):
        preset("titans-mag", "quick", memory={"expansion": 64})


def test_the_package_exports_what_it_lists():
    for name in nestor.__all__:
        assert getattr(nestor, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = nestor.nothing


def test_gradients_of_hope_do_not_explode_along_a_text() -> None:
    """With write steps that start at 1/2 the norm after one update of this seed is 10^13: an error in a key
    goes into what makes the next ones."""
    text = tokenize(open_corpus("classics"), ByteTokenizer()).document(0)[5000:7048]
    ids = torch.from_numpy(text.astype("int64"))[None]
    torch.manual_seed(2)
    model = nestor.NestorForCausalLM(nestor.preset("hope", "quick"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) < 10
        optimizer.step()
