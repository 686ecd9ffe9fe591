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
