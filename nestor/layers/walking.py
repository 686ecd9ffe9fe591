"""What layers that train fast weights share: the call of the operation without momentum, and the state."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nestor.layers.writes import recording
from nestor.ops.neural_memory import MemorySpec, MemoryState, neural_memory

LISTS = ("weights", "momentum", "anchor", "pending", "halo")


def read_and_write(
    owner: Any,
    spec: MemorySpec,
    tokens: tuple[Tensor, ...],
    state: dict[str, Tensor] | None,
    mask: Tensor | None,
    resets: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """Walk q, k, v `[B, T, H, p]` and theta `[B, T, H]` through the memory of `owner`, which has its
    `initial` weights, `memory_gamma` and `memory_beta`.

    Returns outputs `[B, T, H, p]`, the state after the call, and, in a list if writes are recorded, how hard
    each token wrote `[B, T, H]`.
    """
    q, k, v, theta = tokens
    result = neural_memory(
        q, k, v, theta, None, None, list(owner.initial), spec=spec, gamma=owner.memory_gamma,
        beta=owner.memory_beta, state=None if state is None else unpack(state), mask=mask, resets=resets,
        return_surprise=recording(),
    )  # fmt: skip
    writes = [theta.detach() * result[2]] if len(result) == 3 else []
    return result[0], pack(result[1]), writes


def pack(memory: MemoryState) -> dict[str, Tensor]:
    """A memory's state by names: `phase`, `weights.l`, `anchor.l`, and, where the memory has them,
    `momentum.l`, `pending.l`, `pooled` and `halo.i`."""
    state = {"phase": memory.phase}
    for name in LISTS:
        state |= {f"{name}.{index}": tensor for index, tensor in enumerate(getattr(memory, name))}
    return state if memory.pooled is None else {**state, "pooled": memory.pooled}


def unpack(state: dict[str, Tensor]) -> MemoryState:
    """Reverse of `pack`; other names are left alone."""
    lists = {}
    for name in LISTS:
        count = sum(key.startswith(f"{name}.") for key in state)
        lists[name] = tuple(state[f"{name}.{index}"] for index in range(count))
    return MemoryState(phase=state["phase"], pooled=state.get("pooled"), **lists)
