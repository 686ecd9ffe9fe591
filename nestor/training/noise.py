"""Memories that start from noise instead of their learned start (Ruiz & Gu 2025, arXiv 2507.02782).

    S_0 = W_0 + mean + deviation n,  n ~ N(0, 1) for every entry,

W_0 the State of who has read nothing, mean and deviation one number for each layer, matrix and head: those of
what training sequences make of W_0 (`fit_noise`), or 0 and the same deviation for all (`even_noise`). A
memory's learned start is a parameter and gets its gradient; the noise has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nestor.errors import ConfigError

#: For each noised tensor, by `layer.name`: mean and standard deviation of every head, `[2, H]`.
Noise = dict[str, Tensor]

_MEMORY = {"weights", "momentum", "recurrent"}
# What the numbers that choose fresh lanes are for, so that no others come from the same seed.
_FRESH = 0xF4E5


def is_memory(name: str) -> bool:
    """Whether the layer tensor of this name `[B, H, ...]` is what a memory has learned while it read.

    Fast weights, their momentum and the matrix of a recurrence are. Attention caches, convolution tails and
    what waits inside of a chunk belong to the last tokens, and clocks and phases count them. Local memories
    (TNT) go back to their learned start before the first token of a sequence, whatever they hold.
    """
    parts = name.split(".")
    return bool(_MEMORY & set(parts)) and "local" not in parts


def memories(state: Any) -> dict[str, Tensor]:
    """The memory tensors of a State by `layer.name`, always in the same order.

    Raises:
        ConfigError: it has none.
    """
    found = {
        f"{index}.{name}": layer[name]
        for index, layer in state.layers.items()
        for name in sorted(layer)
        if is_memory(name)
    }
    if not found:
        raise ConfigError(
            "run.state_mode starts memories from noise, and no layer of this model has one: it keeps what it "
            "read in attention caches alone. Use run.state_mode 'reset' or 'carry', or a preset with a memory"
        )
    return found


def even_noise(fresh: Any, sigma: float) -> Noise:
    """The same deviation for all matrices, and none for their momentum: it is of steps, of which a matrix is
    the sum, and much smaller. fresh: the State of who has read nothing. Raises as `memories`."""
    noise = {}
    for name, tensor in memories(fresh).items():
        size = 0.0 if "momentum" in name.split(".") else sigma
        deviation = torch.full((tensor.shape[1],), size, dtype=torch.float32, device=tensor.device)
        noise[name] = torch.stack([torch.zeros_like(deviation), deviation])
    return noise


def fit_noise(fresh: Any, finals: Iterable[Any], total: Callable[[Tensor], Tensor]) -> Noise:
    """Mean and deviation of what sequences make of their start, over rows and entries of each head.

    fresh: the State of a row that has read nothing. finals: States after sequences. total: sums a tensor over
    processes. Raises as `memories`.
    """
    start = memories(fresh)
    sums = {
        name: torch.zeros(3, t.shape[1], dtype=torch.float64, device=t.device) for name, t in start.items()
    }
    for state in finals:
        for name, tensor in memories(state).items():
            change = (tensor.double() - start[name]).transpose(0, 1).flatten(1)
            count = torch.full_like(change[:, 0], change.shape[1])
            sums[name] += torch.stack([count, change.sum(1), change.square().sum(1)])
    noise = {}
    for name, own in sums.items():
        count, first, second = total(own)
        mean = first / count
        variance = (second / count - mean.square()).clamp(min=0)
        noise[name] = torch.stack([mean, variance.sqrt()]).float()
    return noise


def noised_start(fresh: Any, noise: Noise, seed: int, step: int, lanes: Sequence[int]) -> Any:
    """The States with which these lanes start a step, `fresh` being that of a row that has read nothing.

    What is drawn depends on seed, step and lane alone: neither on the parts of a step and the processes of a
    run nor on whether it was interrupted.
    """
    state = fresh.select([0] * len(lanes))
    found = memories(state)
    sizes = [tensor[0].numel() for tensor in found.values()]
    rows = [_normal(sum(sizes), (seed, step, lane), state.device) for lane in lanes]
    drawn = torch.stack(rows).split(sizes, dim=1)
    for (name, tensor), values in zip(found.items(), drawn, strict=True):
        index, _, key = name.partition(".")
        shape = (1, -1, *[1] * (tensor.dim() - 2))
        mean, deviation = (row.reshape(shape) for row in noise[name].to(tensor.dtype))
        state.layers[int(index)][key] = (
            tensor + mean + deviation * values.reshape(tensor.shape).to(tensor.dtype)
        )
    for layer in state.layers.values():
        open_chunk(layer)
    return state


def open_chunk(layer: dict[str, Tensor]) -> None:
    """A chunk, and a segment of memory-as-context, begins with what the memory now holds; in place."""
    for name in layer:
        before, anchor, rest = name.rpartition("anchor.")
        if anchor:
            layer[name] = layer[f"{before}weights.{rest}"]
        elif name.startswith("segment."):
            layer[name] = layer[f"memory.weights.{name.removeprefix('segment.')}"]


def fresh_state(model: Any) -> Any:
    """The State of a row that has read nothing, through which the learned start gets its gradient."""
    pad = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    output = model(pad, attention_mask=torch.zeros_like(pad), use_cache=True, logits_to_keep=1)
    return output.past_key_values


def fresh_lanes(share: float, seed: int, step: int, lanes: int) -> Tensor:
    """Which of all lanes start a step from a fresh State although another is at hand, `[lanes]` bool."""
    return torch.from_numpy(np.random.default_rng((seed, step, _FRESH)).random(lanes) < share)


def _normal(count: int, key: tuple[int, int, int], device: torch.device) -> Tensor:
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(count, generator=generator, device=device)
