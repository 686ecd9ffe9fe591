"""The state of a layer that is made of layers: the parts' keys, each behind its part's name and a dot."""

from __future__ import annotations

from torch import Tensor


def join_states(**parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """`join_states(memory={"phase": p})` is `{"memory.phase": p}`."""
    return {f"{name}.{key}": value for name, state in parts.items() for key, value in state.items()}


def part_of(state: dict[str, Tensor] | None, name: str) -> dict[str, Tensor] | None:
    """The state of the part `name`; None for a fresh sequence."""
    if state is None:
        return None
    head = f"{name}."
    return {key[len(head) :]: value for key, value in state.items() if key.startswith(head)}
