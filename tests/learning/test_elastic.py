"""Elastic weights against the minimum they are defined by, and low-rank adapters against the plain model."""

import copy

import pytest
import torch
from torch.nn import functional as F

import nestor
from nestor.errors import ConfigError
from nestor.learning import Learner, Level, assign_levels, feed_forward_weights
from nestor.learning.adapters import with_low_rank
from nestor.learning.elastic import Elastic, fisher_information


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    config = nestor.preset(
        "transformer", "quick", hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, initializer_range=0.2,
    )  # fmt: skip
    return nestor.NestorForCausalLM(config).double().eval().requires_grad_(False)


@pytest.fixture
def ids():
    return torch.randint(0, 250, (1, 13))


def test_the_fisher_information_is_the_mean_squared_gradient(model, ids):
    name = feed_forward_weights(model)[1][0]
    texts = [ids[:, :6], ids[:, 6:]]
    found = fisher_information(model, [name], texts)
    wanted = torch.zeros_like(found[name])
    other = copy.deepcopy(model).requires_grad_(True)
    for text in texts:
        other.zero_grad()
        F.cross_entropy(other(text).logits[0, :-1], text[0, 1:], reduction="sum").backward()
        wanted += other.get_parameter(name).grad.square() / 2
    torch.testing.assert_close(found[name], wanted)
    assert not model.get_parameter(name).requires_grad
    with pytest.raises(ConfigError, match="at least one text"):
        fisher_information(model, [name], [])


def test_a_pull_is_the_proximal_step_of_the_penalty(model, ids):
    levels = assign_levels(model, [4], [0.5], fixed=0.5)
    learner = Learner(model, levels)
    importance = {name: torch.rand_like(model.get_parameter(name)) for name in levels[0].parameters}
    before = learner.start()
    after = learner.read(ids[:, :5], before).state
    pulled = Elastic(levels, importance, 0.3)(before, after)
    mean = torch.cat([x.flatten() for x in importance.values()]).mean()
    for name in levels[0].parameters:
        delta, new = (s.learned["every 4"][f"delta/{name}"][0] for s in (after, pulled))
        # The gradient of 1/2 |x - delta|^2 + pull / 2 sum F / mean F x^2 is 0 at what is left.
        torch.testing.assert_close(new - delta + 0.3 * importance[name] / mean * new, torch.zeros_like(new))
        assert bool((new.abs() < delta.abs())[importance[name] > 1e-3].all()) and delta.abs().max() > 0
    # Two updates are two pulls, none is none, and a pull of nothing changes nothing.
    twice = learner.read(ids[:, 5:10], after).state
    at_once = Elastic(levels, importance, 0.3)(before, twice)
    name = levels[0].parameters[0]
    factor = (1 + 0.3 * importance[name] / mean) ** 2
    torch.testing.assert_close(
        at_once.learned["every 4"][f"delta/{name}"][0] * factor, twice.learned["every 4"][f"delta/{name}"][0]
    )
    assert torch.equal(
        Elastic(levels, importance, 0.3)(after, after).learned["every 4"][f"delta/{name}"],
        after.learned["every 4"][f"delta/{name}"],
    )
    same = Elastic(levels, importance, 0.0)(before, after)
    assert torch.equal(same.learned["every 4"][f"delta/{name}"], after.learned["every 4"][f"delta/{name}"])


def test_elastic_weights_refuse_what_they_cannot_weigh(model):
    levels = assign_levels(model, [4], [0.5], fixed=0.5)
    ones = {name: torch.ones_like(model.get_parameter(name)) for name in levels[0].parameters}
    with pytest.raises(ConfigError, match="pull is -1"):
        Elastic(levels, ones, -1.0)
    with pytest.raises(ConfigError, match="no importance of"):
        Elastic(levels, {}, 0.1)
    with pytest.raises(ConfigError, match="at least 0"):
        Elastic(levels, {name: -x for name, x in ones.items()}, 0.1)


def test_an_adapter_begins_as_the_plain_model_and_is_all_that_learns(model, ids):
    names = feed_forward_weights(model)[1]
    adapted, parameters = with_low_rank(model, names, 2, seed=1)
    assert torch.equal(adapted(ids).logits, model(ids).logits)
    assert set(parameters) <= {name for name, _ in adapted.named_parameters()} and len(parameters) == 6
    learner = Learner(adapted, [Level("adapter", parameters, 4, 0.5)])
    state = learner.read(ids, learner.start()).state
    learned = learner.weights(state)
    for name, weight in adapted.named_parameters():
        assert torch.equal(weight, learned[name]) == (name not in parameters), name
    # The first step is the plain one of `up`: W changes by -lr dL/dW down^T down.
    first = learner.weights(learner.read(ids[:, :5], learner.start()).state)
    plain = copy.deepcopy(model).requires_grad_(True)
    (F.cross_entropy(plain(ids[:, :4]).logits[0], ids[0, 1:5])).backward()
    path = parameters[0].removesuffix(".up")
    step = first[f"{path}.up"] @ first[f"{path}.down"]
    down = adapted.get_parameter(f"{path}.down")
    torch.testing.assert_close(step, -0.5 * plain.get_parameter(names[0]).grad @ down.T @ down)
    assert torch.equal(model(ids).logits, with_low_rank(model, names, 2)[0](ids).logits)


def test_adapters_refuse_what_is_no_matrix(model):
    with pytest.raises(ConfigError, match="rank of an adapter is 0"):
        with_low_rank(model, feed_forward_weights(model)[0], 0)
    with pytest.raises(ConfigError, match="no weight of this model"):
        with_low_rank(model, ["model.layers.9.weight"], 1)
    norm = next(name for name, p in model.named_parameters() if p.dim() == 1)
    with pytest.raises(ConfigError, match="no matrix"):
        with_low_rank(model, [norm], 1)
