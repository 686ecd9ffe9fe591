"""What layers that train fast weights without momentum share: the call of the operation, and the state."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nestor.layers.writes import recording
from nestor.ops.neural_memory import MemorySpec, MemoryState, neural_memory


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
        beta=owner.memory_beta, state=None if state is None else _unpack(state), mask=mask, resets=resets,
        return_surprise=recording(),
    )  # fmt: skip
    writes = [theta.detach() * result[2]] if len(result) == 3 else []
    return result[0], pack(result[1]), writes


def pack(memory: MemoryState) -> dict[str, Tensor]:
    """`weights.l`, `anchor.l` and `phase` of a memory without momentum."""
    state = {"phase": memory.phase}
    for name in ("weights", "anchor"):
        state |= {f"{name}.{layer}": tensor for layer, tensor in enumerate(getattr(memory, name))}
    return state


def _unpack(state: dict[str, Tensor]) -> MemoryState:
    def layers(name: str) -> tuple[Tensor, ...]:
        count = sum(key.startswith(f"{name}.") for key in state)
        return tuple(state[f"{name}.{layer}"] for layer in range(count))

    return MemoryState(layers("weights"), (), layers("anchor"), state["phase"])
