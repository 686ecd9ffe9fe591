"""Memory as gate: both ways of combining, against the formula."""

import pytest
import torch

from nestor.errors import ConfigError
from nestor.layers.attention import Attention
from nestor.layers.memory_as_gate import MemoryAsGate
from nestor.layers.neural_memory import NeuralMemory

EXACT = {"rtol": 1e-9, "atol": 1e-10}


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


@pytest.mark.parametrize("kind", ["memory_as_gate", "memory_as_gate_product"])
@pytest.mark.parametrize("persistent", [0, 4])
def test_the_layer_is_the_formula_of_its_two_branches(build_layer, kind, persistent):
    """The memory reads [P | x]: with as many persistent tokens as a chunk has, in one call on both."""
    layer, x = build_layer(kind, persistent=persistent), normal(2, 11, 8)
    torch.nn.init.normal_(layer.attention_norm.weight)
    torch.nn.init.normal_(layer.memory_norm.weight)
    prefix = layer.persistent
    read = x if prefix is None else torch.cat([prefix.expand(2, -1, -1), x], 1)
    m = layer.memory(read)[0][:, persistent:]
    y = layer.attention(x, prefix=prefix)[0]
    y, m = rms(y, layer.attention_norm.weight), rms(m, layer.memory_norm.weight)
    if kind == "memory_as_gate":
        share = torch.sigmoid(x @ layer.gate_proj.weight.T + layer.gate_proj.bias)
        expected = share * y + (1 - share) * m
    else:
        assert layer.gate_proj is None
        expected = y * torch.sigmoid(m)
    torch.testing.assert_close(layer(x)[0], expected, **EXACT)


@torch.no_grad()
def test_in_a_mix_the_memory_speaks_where_attention_is_silent_and_in_a_product_it_does_not(build_layer):
    for kind, silent in (("memory_as_gate", False), ("memory_as_gate_product", True)):
        layer = build_layer(kind)
        layer.attention_norm.weight.zero_()
        assert (not layer(normal(1, 6, 8))[0].any()) is silent


@torch.no_grad()
def test_the_window_ends_and_the_memory_does_not(build_layer):
    """A token outside the window of every later query still changes them, through the memory alone."""
    layer, x = build_layer("memory_as_gate", window=3), normal(1, 12, 8)
    changed = x.clone()
    changed[:, 0] += 1.0
    attention = [layer.attention(z, prefix=layer.persistent)[0] for z in (x, changed)]
    assert torch.equal(attention[0][:, 3:], attention[1][:, 3:])
    assert (layer(x)[0] - layer(changed)[0])[0, 3:].abs().amax(1).min() > 1e-9


@torch.no_grad()
def test_a_window_longer_than_the_sequence_is_full_attention(build_layer):
    """Invariant 25."""
    x = normal(1, 12, 8)
    wide, full = build_layer("memory_as_gate", window=13), build_layer("memory_as_gate", window=None)
    torch.testing.assert_close(wide(x)[0], full(x)[0], **EXACT)
    assert not torch.allclose(build_layer("memory_as_gate", window=11)(x)[0], full(x)[0])


def test_an_unknown_combination_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="combine is 'sum'; it must be one of 'product', 'mix'"):
        MemoryAsGate(Attention(8, 2), NeuralMemory(8, 2), combine="sum")
