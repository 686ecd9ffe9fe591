"""Memory as layer: the memory first, attention on what it returns."""

import pytest
import torch

EXACT = {"rtol": 1e-9, "atol": 1e-10}


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


@pytest.mark.parametrize("persistent", [0, 4])
def test_the_layer_is_attention_on_the_memory_s_outputs(build_layer, persistent):
    """Persistent tokens pass the memory too: with as many as a chunk has, in one call with the rest."""
    layer, x = build_layer("memory_as_layer", persistent=persistent), normal(2, 11, 8)
    torch.nn.init.normal_(layer.norm.weight)
    read = x if layer.persistent is None else torch.cat([layer.persistent.expand(2, -1, -1), x], 1)
    y = rms(layer.memory(read)[0], layer.norm.weight)
    prefix = y[0, :persistent] if persistent else None
    expected, _ = layer.attention(y[:, persistent:], prefix=prefix)
    torch.testing.assert_close(layer(x)[0], expected, **EXACT)


@torch.no_grad()
def test_what_stands_before_a_document_is_what_the_memory_made_of_the_persistent_tokens(build_layer):
    """Not the tokens themselves: another memory makes other keys of the same persistent tokens."""
    layer, x = build_layer("memory_as_layer"), normal(1, 6, 8)
    seen = []
    layer.attention.register_forward_pre_hook(
        lambda module, arguments, kwargs: seen.append(kwargs["prefix"]), with_kwargs=True
    )
    layer(x)
    layer.memory.o_proj.weight.mul_(-1)
    layer(x)
    torch.testing.assert_close(seen[1], -seen[0], **EXACT)
    assert not torch.allclose(seen[0], layer.norm(layer.persistent))
