"""Tiny models of presets, in float64, with weights large enough that a wrong token shows."""

from importlib.util import find_spec

import pytest
import torch

import nestor
from nestor.layers.registry import MIXER_MODULES

VARIANTS = {
    "transformer": ("transformer", {}),
    "transformer-window": ("transformer", {"sliding_window": 6, "num_key_value_heads": 1, "qk_norm": True}),
    "titans-lmm": ("titans-lmm", {}),
    "titans-mac": ("titans-mac", {}),
    "titans-mag": ("titans-mag", {}),
    "titans-mal": ("titans-mal", {}),
    "moneta": ("moneta", {"memory": {"chunk_size": 4, "rank": 4}}),
    "memora": ("memora", {"memory": {"chunk_size": 3, "rank": 4}}),
    "atlas": ("atlas", {"memory": {"chunk_size": 4, "key_width": 4, "window": 3}}),
    "hope": ("hope", {"memory": {"chunk_size": 4, "projection_chunk_size": 2}}),
    "lact": ("lact", {"sliding_window": 6, "memory": {"heads": 2, "chunk_size": 4, "base_step": 0.1}}),
}


def available(variant):
    kind = {"titans-lmm": "neural_memory", "titans-mac": "memory_as_context"}
    kind |= {"titans-mag": "memory_as_gate", "titans-mal": "memory_as_layer"}
    return variant not in kind or find_spec(MIXER_MODULES[kind[variant]]) is not None


def build(variant, **overrides):
    name, settings = VARIANTS[variant]
    if name.startswith("titans"):
        settings = {"memory": {"chunk_size": 4}, "persistent_tokens": 2, **settings}
    if name == "titans-mac":
        settings = {"segment_size": 8, **settings}
    if name in ("titans-mag", "titans-mal"):
        settings = {"sliding_window": 6, **settings}
    config = nestor.preset(
        name,
        "quick",
        **{
            "num_hidden_layers": 2,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            **settings,
            **overrides,
        },
    )
    torch.manual_seed(1)
    model = nestor.NestorForCausalLM(config).double().eval()
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            torch.nn.init.normal_(module.weight, std=0.4)
    return model


@pytest.fixture
def tiny():
    """`tiny(variant, **overrides)` builds a model."""
    return build


@pytest.fixture
def variants():
    """The names of all kinds of model that can be built."""
    return [name for name in VARIANTS if available(name)]


@pytest.fixture(params=[name for name in VARIANTS if available(name)])
def variant(request):
    """The name of each kind of model in turn."""
    return request.param


@pytest.fixture
def model(variant):
    """A model of each kind in turn."""
    return build(variant)


@pytest.fixture
def tokens():
    """`tokens(B, T)` draws token ids."""
    return lambda batch, length: torch.randint(0, 256, (batch, length))
