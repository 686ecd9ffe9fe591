"""A small model of Nestor, levels of it and streams for it."""

import pytest
import torch

from nestor.learning import Level
from nestor.models import NestorConfig, NestorForCausalLM

VOCABULARY = 23
FAST, SLOW = "layers.0.feed_forward.down_proj.weight", "layers.1.feed_forward.up_proj.weight"


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = NestorConfig(
        vocab_size=VOCABULARY, hidden_size=12, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, sliding_window=5, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return NestorForCausalLM(config).double().eval()


@pytest.fixture
def levels():
    """Makes two levels of the model, the slower with twice the learning rate."""

    def make(fast=3, slow=6, rate=0.5, **choices):
        return [
            Level("fast", (FAST,), fast, rate, **choices),
            Level("slow", (SLOW,), slow, 2 * rate, **choices),
        ]

    return make


@pytest.fixture
def stream():
    """Makes random tokens ``[rows, length]``."""

    def make(length, rows=1, seed=1):
        return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))

    return make
