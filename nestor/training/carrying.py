"""The State from one training step to the next: `carry` and `pass` hand it on, other modes do not."""

from __future__ import annotations

from typing import Any

from torch import Tensor

#: Values of `run.state_mode` with which a step starts from a State that the step before it came to.
HANDED_ON = ("carry", "pass")


def next_start(state: Any, mode: str) -> Any:
    """The State with which the next batch starts, given the one after this batch, its gradient stopped.

    `carry`: the State itself, so that lanes go on as streams (truncated back-propagation through time).
    `pass`: what the *memories* of the neighbouring lane hold, an unrelated sequence, so that training meets
    the states that long reading leads to (state passing, Ruiz & Gu 2025). Attention caches, convolution tails
    and positions belong to the other text's tokens and are not passed. Other modes: None;
    a step starts fresh, or from noise (`noise.py`).
    """
    if mode not in HANDED_ON or state is None:
        return None
    state = state.detach()
    return state if mode == "carry" else _passed(state)


def _passed(state: Any) -> Any:
    layers = {
        index: {name: _pass_tensor(name, layer) for name in layer} for index, layer in state.layers.items()
    }
    return type(state)(layers, state.clock.new_zeros(state.clock.shape))


def _pass_tensor(name: str, layer: dict[str, Tensor]) -> Tensor:
    tensor = layer[name]
    first, _, rest = name.partition(".")
    if "cache" in name.split("."):
        return tensor[:, :0]
    if "tail" in name or name.endswith("clock"):
        return tensor.new_zeros(tensor.shape)
    if first == "segment":
        # Memory-as-context reads from the memory as it was when the segment began, and one begins now.
        tensor = layer[f"memory.weights.{rest}"]
    return tensor.roll(1, 0)
