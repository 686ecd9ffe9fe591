"""Which feed-forward weights of a trained model belong to which level (arXiv 2512.24695, section 7.3)."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from torch import nn

from nestor.errors import ConfigError, suggest
from nestor.learning.levels import Level

# Llama, Qwen, SmolLM, Mistral: `mlp.up_proj`; GPT-NeoX: `mlp.dense_h_to_4h`; Nestor: `feed_forward.up_proj`.
MATRICES = "gate_proj|up_proj|down_proj|gate_up_proj|dense_h_to_4h|dense_4h_to_h|fc1|fc2"
WEIGHT = re.compile(rf"^(.*\.|)layers\.(\d+)\.(?:mlp|feed_forward)\.(?:{MATRICES})\.weight$")
BLOCK = re.compile(r"(?:^|\.)layers\.\d+\.feed_forward\.blocks\.(\d+)\.(?:gate|up|down)_proj\.weight$")
ORDERS = ("shallow_first", "deep_first", "shuffled")


def feed_forward_weights(model: nn.Module) -> list[list[str]]:
    """Names of the matrices of each layer's feed-forward network, from the first layer to the last.

    Raises:
        ConfigError: there are none by the names that are known.
    """
    by_layer: dict[int, list[str]] = {}
    stacks: set[str] = set()
    for name, parameter in model.named_parameters():
        found = WEIGHT.search(name)
        if found and parameter.dim() == 2:
            stacks.add(found.group(1))
            by_layer.setdefault(int(found.group(2)), []).append(name)
    if not by_layer:
        raise ConfigError(
            f"a {type(model).__name__} has no weights called layers.N.mlp.*.weight or "
            f"layers.N.feed_forward.*.weight that are those of a feed-forward network ({MATRICES}); give the "
            f"levels their parameters by name"
        )
    if len(stacks) > 1 or sorted(by_layer) != list(range(max(by_layer) + 1)):
        raise ConfigError(
            f"a {type(model).__name__} has feed-forward networks in {sorted(stacks)}, layers "
            f"{sorted(by_layer)}, and not one in each layer of one stack (as a mixture of experts); give the "
            f"levels their parameters by name"
        )
    return [by_layer[index] for index in sorted(by_layer)]


def continuum_blocks(model: nn.Module) -> list[list[str]]:
    """Names of the matrices of each block of a model's continuum, of all layers together, from the fastest to
    the slowest; empty where no layer has one."""
    blocks: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters():
        found = BLOCK.search(name)
        if found and parameter.dim() == 2:
            blocks.setdefault(int(found.group(1)), []).append(name)
    return [blocks[index] for index in sorted(blocks)]


def continuum_levels(
    model: nn.Module, learning_rates: Sequence[float], periods: Sequence[int | None] = (), **choices: object
) -> list[Level]:
    """Levels of a model whose layers have a continuum, one a block.

    With the wiring "nested" (eq. 72) a block returns to where it began whenever the next slower one is
    updated, and where it begins is learned by that one, from the same gradients: to first order, for they do
    not cross the block's updates.

    Args:
        learning_rates: one for each block that learns.
        periods: in place of those of the model's configuration; None: a block that never learns.
        choices: further fields of `Level`, the same for all.

    Raises:
        ConfigError: a model without a continuum, or not one number for each block.
    """
    blocks = continuum_blocks(model)
    settings = getattr(getattr(model, "config", None), "continuum", None) or {}
    periods = tuple(periods) or tuple(settings.get("periods", ()))
    if not blocks or len(periods) != len(blocks):
        raise ConfigError(
            f"a {type(model).__name__} has a continuum of {len(blocks)} blocks, and there are {len(periods)} "
            f"periods {list(periods)}; give one for each"
        )
    learning = [period for period in periods if period is not None]
    if learning != sorted(set(learning)) or None in periods[: len(learning)]:
        raise ConfigError(f"periods are {list(periods)}; give rising ones, and None for the slowest blocks")
    if len(learning_rates) != len(learning):
        raise ConfigError(
            f"there are {len(learning)} blocks that learn, with periods {learning}, and learning rates "
            f"{list(learning_rates)}; give one for each"
        )
    nested = settings.get("wiring") == "nested"
    levels = []
    for index, (period, rate) in enumerate(zip(learning, learning_rates, strict=True)):
        own = blocks[: index + 1] if nested else [blocks[index]]
        names = tuple(name for block in own for name in block)
        slower = learning[index + 1] if nested and index + 1 < len(learning) else None
        if slower is not None and slower % period:
            raise ConfigError(f"nested periods are multiples of each other; {slower} is none of {period}")
        reset = "never" if slower is None else slower // period
        levels.append(Level(f"every {period}", names, period, rate, reset=reset, **choices))  # type: ignore[arg-type]
    return levels


def adaptive_layers(
    layers: list[list[str]], periods: Sequence[int], learning_rates: Sequence[float], fixed: float
) -> list[list[str]]:
    """Those of the layers that learn: all but a share `fixed` of the first.

    Raises:
        ConfigError: no level, periods that do not rise, rates that are not one for each, or no layer.
    """
    if not periods or len(periods) != len(learning_rates) or list(periods) != sorted(set(periods)):
        raise ConfigError(
            f"periods are {list(periods)} and learning rates {list(learning_rates)}; give rising periods, "
            f"and a learning rate for each"
        )
    if not 0 <= fixed < 1:
        raise ConfigError(f"fixed is {fixed}; it must be a share of the layers, from 0 to below 1")
    return layers[int(len(layers) * fixed) :]


def assign_levels(
    model: nn.Module,
    periods: Sequence[int],
    learning_rates: Sequence[float],
    *,
    fixed: float = 0.5,
    order: str = "shallow_first",
    seed: int = 0,
    **choices: object,
) -> list[Level]:
    """Levels of the feed-forward networks of a model that is already trained.

    The first layers stay as they are; the rest is split into as many groups of neighbours as there are
    periods, the first groups having one layer more where it does not come out even.

    Args:
        periods: tokens from update to update, from short to long. learning_rates: one for each.
        fixed: share of the layers that stay.
        order: "shallow_first" gives the shortest period to the shallowest group, "deep_first" to the deepest;
            "shuffled" deals the layers out by `seed`.
        choices: further fields of `Level`, the same for all.

    Raises:
        ConfigError: more levels than layers for them, or a model without such networks.
    """
    if order not in ORDERS:
        raise ConfigError(
            f"order is {order!r}; known are {', '.join(ORDERS)}. {suggest(order, ORDERS)}".rstrip()
        )
    adaptive = adaptive_layers(feed_forward_weights(model), periods, learning_rates, fixed)
    if len(periods) > len(adaptive):
        raise ConfigError(
            f"there are {len(periods)} levels for {len(adaptive)} layers; give each level a layer (fixed is "
            f"{fixed})"
        )
    if order == "shuffled":
        random.Random(seed).shuffle(adaptive)
    elif order == "deep_first":
        adaptive = adaptive[::-1]
    least, more = divmod(len(adaptive), len(periods))
    levels, begin = [], 0
    for index, (period, rate) in enumerate(zip(periods, learning_rates, strict=True)):
        end = begin + least + (index < more)
        names = tuple(name for layer in adaptive[begin:end] for name in layer)
        levels.append(Level(f"every {period}", names, period, rate, **choices))  # type: ignore[arg-type]
        begin = end
    return levels
