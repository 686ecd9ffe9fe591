"""Models of the literature, by name and size, with the same parameter budget at each size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nestor.errors import ConfigError, suggest
from nestor.layers.registry import build_mixer
from nestor.models.configuration import OPTIONS, NestorConfig


@dataclass(frozen=True)
class Size:
    """What the presets of one size share.

    Attributes:
        layers, width, heads: dimensions of the decoder.
        budget: parameters of one layer in units of `width^2`, the memory's initial weights counted. The
            feed-forward takes what the mixer leaves, so that presets of a size can be compared.
        expansion: inner width of the memory network over its head width.
        chunk: tokens a memory reads between updates of its anchor.
        window: tokens of the attention window, and of a segment of memory-as-context.
        persistent: learned key-value pairs of the attention of memory models.
    """

    layers: int
    width: int
    heads: int
    budget: float
    expansion: int
    chunk: int
    window: int
    persistent: int


# From 60m on, the budget makes the named size together with a tied embedding of 32,000 tokens.
SIZES = {
    "quick": Size(layers=2, width=128, heads=4, budget=14.5, expansion=2, chunk=64, window=64, persistent=4),
    "5m": Size(layers=4, width=256, heads=4, budget=18.8, expansion=2, chunk=64, window=256, persistent=8),
    "60m": Size(layers=10, width=512, heads=8, budget=16.6, expansion=4, chunk=64, window=512, persistent=16),
    "170m": Size(
        layers=12, width=768, heads=16, budget=20.5, expansion=4, chunk=64, window=1024, persistent=16
    ),
    "340m": Size(
        layers=24, width=1024, heads=16, budget=12.2, expansion=4, chunk=64, window=1024, persistent=16
    ),
    "760m": Size(
        layers=24, width=1536, heads=16, budget=12.5, expansion=4, chunk=64, window=1024, persistent=16
    ),
}

EMBEDDINGS = {"embed_tokens", "lm_head"}

Recipe = Callable[[Size, dict[str, Any]], dict[str, Any]]


def _transformer(size: Size, overrides: dict[str, Any]) -> dict[str, Any]:
    """Attention everywhere: full, or over a window if `sliding_window` is given."""
    return {"mixer": "full_attention" if overrides.get("sliding_window") is None else "sliding_attention"}


def _memory(size: Size) -> dict[str, Any]:
    return {"depth": 2, "expansion": size.expansion, "chunk_size": size.chunk}


def _titans_lmm(size: Size, overrides: dict[str, Any]) -> dict[str, Any]:
    """The neural memory alone."""
    return {"mixer": "neural_memory", "memory": _memory(size)}


def _titans_mac(size: Size, overrides: dict[str, Any]) -> dict[str, Any]:
    """Attention inside segments, on what the memory recalls for them."""
    context = {"segment_size": size.window, "persistent_tokens": size.persistent}
    return {"mixer": "memory_as_context", "memory": _memory(size), **context}


def _titans_mag(size: Size, overrides: dict[str, Any]) -> dict[str, Any]:
    """Sliding-window attention, gated by the memory."""
    context = {"sliding_window": size.window, "persistent_tokens": size.persistent}
    return {"mixer": "memory_as_gate", "memory": _memory(size), **context}


def _titans_mal(size: Size, overrides: dict[str, Any]) -> dict[str, Any]:
    """Sliding-window attention on what the memory puts out."""
    context = {"sliding_window": size.window, "persistent_tokens": size.persistent}
    return {"mixer": "memory_as_layer", "memory": _memory(size), **context}


def _tnt(size: Size, overrides: dict[str, Any]) -> dict[str, Any]:
    """A global memory that reads in chunks of a window, and two local ones that start anew every window."""
    chunks = {"chunk_size": size.window, "shard_size": size.window, "local_chunk_sizes": [8, 32]}
    return {"mixer": "tnt", "memory": _memory(size) | chunks}


def _family(kind: str, **choices: Any) -> Recipe:
    def recipe(size: Size, overrides: dict[str, Any]) -> dict[str, Any]:
        return {"mixer": "neural_memory", "memory": {"kind": kind, **_memory(size), **choices}}

    return recipe


# MIRAS, with its expansion and the smaller of its chunks: Memora reads nothing newer than its chunk.
_moneta, _yaad, _memora = (_family(kind, expansion=4, chunk_size=16) for kind in ("moneta", "yaad", "memora"))
# Of a chunk of equal keys no more than the error can be written, so short chunks write more of each token;
# orthogonalised steps are large whatever the chunk, and cost less the longer it is.
_omega, _atlas, _atlas_gated = _family("omega", chunk_size=16), _family("atlas"), _family("atlas++")


def _lact(size: Size, overrides: dict[str, Any]) -> dict[str, Any]:
    """Sliding-window attention, and few wide memories that learn once a window."""
    window = overrides.get("sliding_window") or size.window
    return {"mixer": "lact", "memory": {"heads": 4, "chunk_size": window}, "sliding_window": window}


def _ttt_linear(size: Size, overrides: dict[str, Any]) -> dict[str, Any]:
    """A linear memory that learns in mini-batches of 16."""
    return {"mixer": "ttt_linear", "memory": {"chunk_size": 16}}


def _ttt_mlp(size: Size, overrides: dict[str, Any]) -> dict[str, Any]:
    """A memory of two layers that learns in mini-batches of 16."""
    return {"mixer": "ttt_mlp", "memory": {"expansion": size.expansion, "chunk_size": 16}}


# Tokens from update to update of each block of a continuum; the last learns in training alone.
CONTINUUM = {"periods": [64, 512, 4096, None]}


def _hope(size: Size, overrides: dict[str, Any]) -> dict[str, Any]:
    """Memories that make their own keys, values, gates and targets, and a continuum."""
    memory = {"chunk_size": size.chunk, "projection_chunk_size": 16}
    return {"mixer": "self_modifying", "memory": memory, "feed_forward": "continuum", "continuum": CONTINUUM}


def _hope_attention(size: Size, overrides: dict[str, Any]) -> dict[str, Any]:
    """Attention everywhere, and a feed-forward of blocks that learn at different paces."""
    return {"mixer": "full_attention", "feed_forward": "continuum", "continuum": CONTINUUM}


def _kda(size: Size, overrides: dict[str, Any]) -> dict[str, Any]:
    """Kimi Delta Attention everywhere; needs a GPU."""
    return {"mixer": "kda"}


def _gated_deltanet(size: Size, overrides: dict[str, Any]) -> dict[str, Any]:
    """Gated DeltaNet everywhere; needs a GPU."""
    return {"mixer": "gated_deltanet"}


PRESETS: dict[str, Recipe] = {
    "transformer": _transformer,
    "titans-lmm": _titans_lmm,
    "titans-mac": _titans_mac,
    "titans-mag": _titans_mag,
    "titans-mal": _titans_mal,
    "tnt": _tnt,
    "moneta": _moneta,
    "yaad": _yaad,
    "memora": _memora,
    "omega": _omega,
    "atlas": _atlas,
    "atlas++": _atlas_gated,
    "lact": _lact,
    "ttt-linear": _ttt_linear,
    "ttt-mlp": _ttt_mlp,
    "hope": _hope,
    "hope-attention": _hope_attention,
    "kda": _kda,
    "gated-deltanet": _gated_deltanet,
}


def list_presets() -> list[str]:
    """The names of the presets."""
    return list(PRESETS)


def preset(name: str, size: str = "quick", **overrides: Any) -> NestorConfig:
    """The configuration of a model of the literature.

    Args:
        name: one of `list_presets()`.
        size: quick, 5m, 60m, 170m, 340m or 760m. Models of one size have the same number of layers, width
            and, to rounding, non-embedding parameters; the feed-forward's inner width is what makes them
            equal.
        overrides: settings of `NestorConfig`. `memory` is merged into the preset's. Given
            `intermediate_size`, parameters are not matched.

    Raises:
        ConfigError: unknown preset, size or setting, or values that do not fit together.
    """
    recipe = _lookup("preset", name, PRESETS)
    dimensions = _lookup("size", size, SIZES)
    for key in overrides:
        if key not in OPTIONS and key not in ("dtype", "attn_implementation"):
            raise ConfigError(f"unknown setting {key!r} for a preset. {suggest(key, OPTIONS)}".rstrip())
    settings = recipe(dimensions, overrides)
    mixer, feed_forward = settings.pop("mixer"), settings.pop("feed_forward", None)
    settings |= {
        "num_hidden_layers": dimensions.layers,
        "hidden_size": dimensions.width,
        "num_attention_heads": dimensions.heads,
    }
    memory = {**settings.pop("memory", {}), **(overrides.pop("memory", None) or {})}
    settings |= overrides
    settings.setdefault("layer_types", [mixer] * settings["num_hidden_layers"])
    if feed_forward is not None:
        settings.setdefault("feed_forward_types", [feed_forward] * settings["num_hidden_layers"])
    if memory:
        settings["memory"] = {"heads": settings["num_attention_heads"], **memory}
    if settings.get("intermediate_size") is None:
        blocks = len((settings.get("continuum") or {}).get("periods", [None]))
        step = math.lcm(8, blocks)
        # Any width that divides into the blocks stands in for the one that is looked for.
        probe = NestorConfig(**{**settings, "intermediate_size": step})
        settings["intermediate_size"] = _matched_intermediate_size(probe, dimensions.budget, step)
    return NestorConfig(**settings)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters of a model: `total`, `embedding` (input and, if not tied, output), `non_embedding`, and
    `memory_initial`, the part of the latter that is the initial state of fast weights."""
    unique = {id(p): p.numel() for p in model.parameters()}
    embedding = {
        id(p): p.numel() for name, p in model.named_parameters() if set(name.split(".")) & EMBEDDINGS
    }
    initial = {id(p): p.numel() for name, p in model.named_parameters() if "initial" in name.split(".")}
    total, embedded = sum(unique.values()), sum(embedding.values())
    return {
        "total": total,
        "embedding": embedded,
        "non_embedding": total - embedded,
        "memory_initial": sum(initial.values()),
    }


def _matched_intermediate_size(config: NestorConfig, budget: float, step: int) -> int:
    """The inner width of the feed-forward that spends `budget * width^2` a layer, in steps of `step`."""
    assert config.layer_types is not None
    width, layers = config.hidden_size, config.num_hidden_layers
    with torch.device("meta"):
        mixers = {
            kind: build_mixer(kind, config, config.layer_types.index(kind))
            for kind in set(config.layer_types)
        }
    sizes = {kind: sum(p.numel() for p in mixer.parameters()) for kind, mixer in mixers.items()}
    mixing = sum(sizes[kind] for kind in config.layer_types) / layers
    inner = round((budget * width**2 - mixing - 2 * width) / (3 * width) / step) * step
    if inner < width // 4:
        raise ConfigError(
            f"the mixers take {mixing:,.0f} of {budget * width**2:,.0f} parameters a layer, which leaves a "
            f"feed-forward of width {inner}; set intermediate_size, or a smaller memory"
        )
    return inner


def _lookup(kind: str, name: str, table: dict[str, Any]) -> Any:
    if name not in table:
        raise ConfigError(
            f"unknown {kind} {name!r}; known are {', '.join(table)}. {suggest(name, table)}".rstrip()
        )
    return table[name]
