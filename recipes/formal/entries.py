"""The models that the recipe compares, by name: a preset each, small."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from nestor import NestorForCausalLM, list_presets, preset
from nestor.errors import ConfigError, suggest

#: Heads of every model; a memory's keys have `width / HEADS` numbers.
HEADS = 4

# A memory that is one matrix, without network, momentum, forgetting or convolution.
MATRIX = {"depth": 1, "norm": "none", "momentum": False, "forget": False, "conv_kernel": 0}


@dataclass(frozen=True)
class Entry:
    """A row of the table. `memory`: settings of its memory; `chunks`: those that are chunk sizes on which it
    depends what is computed."""

    preset: str
    about: str
    memory: dict[str, Any] = field(default_factory=dict)
    chunks: tuple[str, ...] = ()


MODELS = {
    "transformer": Entry("transformer", "softmax attention with rotary positions"),
    "linear-attention": Entry(
        "titans-lmm",
        "linear attention, as a memory: gradient descent on -<M k, v> from a learned M_0 without decay or "
        "norm is M_t = M_{t-1} + theta_t v k^T, read by q; q and k are unit vectors, theta_t a gate",
        # What a chunk begins with does not change its sums, so it may be as long as is fast.
        {**MATRIX, "inner_loss": "dot_product", "chunk_size": 64},
    ),
    "deltanet": Entry(
        "titans-lmm",
        "the delta rule, as a memory: gradient descent on ||M k - v||^2 / 2 token by token, "
        "M_t = M_{t-1} (I - theta_t k k^T) + theta_t v k^T with theta_t in (0, 1)",
        {**MATRIX, "inner_loss": "l2", "chunk_size": 1},
    ),
    "ttt-linear": Entry("ttt-linear", "a linear memory with a layer norm (TTT)", chunks=("chunk_size",)),
    "titans-lmm": Entry(
        "titans-lmm", "a memory of two layers with momentum and forgetting (Titans)", chunks=("chunk_size",)
    ),
    "gated-deltanet": Entry("gated-deltanet", "Gated DeltaNet; needs a GPU"),
    "hope": Entry(
        "hope",
        "self-modifying memory and levels of feed-forward networks (Nested Learning)",
        # Of the memory that is read, and of those that make its keys, values and gates.
        chunks=("chunk_size", "projection_chunk_size"),
    ),
    "hope-self-targets": Entry(
        "hope",
        "Hope's memory, which makes its targets and nothing else: M_t = M_{t-1} (alpha_t I + eta_t v k^T), "
        "but M_{t-1} v at most of length 1; eta_t in (0, 2) and alpha_t are gates; q, k and v are static",
        # What delta gradient descent takes along a key is taken from a count, and a memory that makes keys or
        # values changes with what it counts. Short convolutions cost length on these languages as well.
        {
            "adaptive": [],
            "inner_loss": "dot_product",
            "dgd": False,
            "step_cap": "none",
            "max_step": 2.0,
            "step_bias": 0.0,
            "conv_kernel": 0,
        },
        chunks=("chunk_size", "projection_chunk_size"),
    ),
}


def check_models(names: tuple[str, ...]) -> None:
    """Raises ConfigError: a name that is not in the table, or a preset that is not in Nestor."""
    for name in names:
        if name not in MODELS:
            raise ConfigError(
                f"there is no model {name!r} in this recipe; there are {', '.join(MODELS)}. "
                f"{suggest(name, MODELS)}".rstrip()
            )
        wanted = MODELS[name].preset
        if wanted not in list_presets():
            raise ConfigError(
                f"the model {name!r} is the preset {wanted!r}, which this version of Nestor lacks; it has "
                f"{', '.join(list_presets())}. Leave the model out"
            )


def build(name: str, vocab_size: int, *, width: int, layers: int, chunk_size: int, seed: int) -> Any:
    """A model of the table, of about as many parameters as the others of its width and depth.

    chunk_size: of memories whose gradients are those at a chunk's start. With 1 they are the recurrences of
    their papers; inside of a longer chunk a memory only adds up, as linear attention does.

    Raises:
        ConfigError: see `check_models`; or a width that heads do not divide.
    """
    check_models((name,))
    entry = MODELS[name]
    memory = entry.memory | dict.fromkeys(entry.chunks, chunk_size)
    config = preset(
        entry.preset, "quick", vocab_size=vocab_size, hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=HEADS, tie_word_embeddings=False, **({"memory": memory} if memory else {}),
    )  # fmt: skip
    torch.manual_seed(seed)
    return NestorForCausalLM(config)
