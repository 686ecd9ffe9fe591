"""Attention reaches as far as it is said to, and not one token further."""

import pytest
import torch

import nestor
from nestor.errors import ConfigError
from nestor.evaluation import Subject, attention_reach
from nestor.evaluation.subjects import check_names


@pytest.mark.parametrize(("layers", "window", "conv"), [(1, 5, 0), (2, 5, 0), (3, 4, 0), (2, 5, 3)])
def test_the_reach_of_stacked_windows_is_what_a_token_depends_on(make_tiny, layers, window, conv):
    """A convolution of `conv` tokens has as many less one before each key in it."""
    model = make_tiny(num_hidden_layers=layers, sliding_window=window, attention_conv_kernel=conv)
    reach = attention_reach(model.config)
    own = window + max(0, conv - 1)
    assert reach.window == own and reach.tokens == layers * (own - 1) + 1
    ids = torch.randint(0, 256, (1, 30))
    last = model(ids).logits[0, -1]
    for back, changes in ((reach.tokens - 1, True), (reach.tokens, False)):
        other = ids.clone()
        other[0, -1 - back] = (other[0, -1 - back] + 1) % 256
        assert bool((model(other).logits[0, -1] != last).any()) == changes


@pytest.mark.parametrize(
    ("preset", "window", "tokens"),
    [
        ("transformer", None, None),
        ("titans-mag", 64, 4 * 63 + 1),
        ("titans-mal", 64, 4 * 63 + 1),
        ("titans-mac", 64, 64),
        ("titans-lmm", 1, 1),
        ("lact", 64, 4 * 63 + 1),
    ],
)
def test_the_reach_of_each_preset(preset, window, tokens):
    sizes = {"num_hidden_layers": 4}
    if preset != "transformer":
        sizes |= {"sliding_window": 64, "segment_size": 64, "memory": {"chunk_size": 16}}
    reach = attention_reach(nestor.preset(preset, "quick", **sizes))
    assert (reach.window, reach.tokens) == (window, tokens)


def test_windows_carry_across_the_edges_of_segments():
    kinds = ["memory_as_context", "memory_as_gate", "memory_as_context"]
    sizes = {"num_hidden_layers": 3, "sliding_window": 8, "segment_size": 16, "memory": {"chunk_size": 16}}
    config = nestor.preset("titans-mag", "quick", layer_types=kinds, **sizes)
    assert attention_reach(config).tokens == 15 + 7 + 15 + 1
    assert attention_reach(config).window == 16


def test_a_foreign_model_has_a_limit_and_a_first_token(foreign, models):
    assert (foreign.limit, foreign.prefix, foreign.stateful) == (256, [256], False)
    assert (models[0].limit, models[0].prefix, models[0].stateful) == (None, [], True)
    # What is read together is what is wanted, as far as it fits.
    assert [foreign.context(wanted) for wanted in (None, 100, 300)] == [256, 100, 256]
    assert [models[0].context(wanted) for wanted in (None, 100, 5000)] == [2048, 100, 5000]
    assert foreign.reach.tokens is None and models[1].describe()["attention_reach"] == 2 * 15 + 1


def test_names_must_differ(models):
    check_names(models)
    with pytest.raises(ConfigError, match="two models are named 'a'"):
        check_names([Subject("a", None, None), Subject("a", None, None)])
    with pytest.raises(ConfigError, match="no model"):
        check_names([])
