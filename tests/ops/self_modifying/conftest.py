"""Random problems for the self-modifying memory, in float64."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nestor.ops.self_modifying import (
    Gate,
    SelfModifyingSpec,
    SelfModifyingState,
    self_modifying_memory,
)

ALL = ("k", "v", "q", "eta", "alpha", "mem")
USUAL = ("k", "v", "eta", "alpha", "mem")
TOKENS = ("q", "k", "v", "g", "eta", "alpha", "mu", "mask", "resets")


@dataclass(frozen=True)
class Problem:
    """The arguments of one call."""

    spec: SelfModifyingSpec
    q: Tensor
    k: Tensor
    v: Tensor
    initial: dict[str, tuple[Tensor, ...]]
    g: Tensor | None = None
    eta: Tensor | None = None
    alpha: Tensor | None = None
    mu: Tensor | None = None
    gates: dict[str, Gate] | None = None
    mask: Tensor | None = None
    resets: Tensor | None = None
    state: SelfModifyingState | None = None

    def run(self, backend: str = "chunked", **changes: Any) -> Any:
        p = self.replace(**changes) if changes else self
        return self_modifying_memory(
            p.q, p.k, p.v, p.initial, spec=p.spec, g=p.g, eta=p.eta, alpha=p.alpha, mu=p.mu,
            gates=p.gates, mask=p.mask, resets=p.resets, state=p.state, backend=backend, return_strength=True,
        )  # fmt: skip

    def replace(self, **changes: Any) -> "Problem":
        """With other arguments, or, by their names, choices of the spec."""
        ours = {name: value for name, value in changes.items() if name in self.__dataclass_fields__}
        spec = {name: value for name, value in changes.items() if name not in ours}
        return replace(self, **{"spec": replace(self.spec, **spec), **ours})

    def part(self, at: slice, state: SelfModifyingState | None = None) -> "Problem":
        """Some tokens, from a state."""
        cut = {n: getattr(self, n)[:, at] for n in TOKENS if getattr(self, n) is not None}
        return replace(self, state=state, **cut)

    def leaves(self) -> dict[str, Tensor]:
        """All that an outer gradient may be taken of."""
        found = {n: getattr(self, n) for n in TOKENS[:7] if getattr(self, n) is not None}
        for name, matrices in self.initial.items():
            found |= {f"initial {name} {i}": w for i, w in enumerate(matrices)}
        for name, gate in (self.gates or {}).items():
            found |= {f"gate {name} {i}": x for i, x in enumerate(gate) if x is not None}
        return found


def draw(
    seed: int = 0,
    *,
    memories: tuple[str, ...] = USUAL,
    depth: int = 1,
    batch: int = 2,
    length: int = 11,
    heads: int = 2,
    width: int = 3,
    hidden: int = 5,
    momentum: bool = False,
    masked: bool = False,
    documents: bool = False,
    gate_rows: bool = False,
    scale: float = 1.0,
    **choices: Any,
) -> Problem:
    """Gates open, so that a wrong token or sign shows; memories not so large that what they make explodes."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator) * scale

    def uniform(low: float, high: float) -> Tensor:
        shape = (batch, length, heads)
        return low + (high - low) * torch.rand(*shape, dtype=torch.float64, generator=generator)

    initial, gates = {}, {}
    for name in memories:
        if depth == 2:
            initial[name] = (normal(heads, width, hidden, scale=0.6), normal(heads, hidden, width, scale=0.3))
        else:
            outputs = width if name not in ("eta", "alpha") or gate_rows else 1
            initial[name] = (normal(heads, width, outputs, scale=0.6 * scale),)
        if name in ("eta", "alpha"):
            read = normal(heads, width) if depth == 2 or gate_rows else None
            gates[name] = Gate(normal(heads), read)
    tokens = [normal(batch, length, heads, width) for _ in range(4)]
    mask = torch.rand(batch, length, generator=generator) < 0.7 if masked else None
    resets = torch.rand(batch, length, generator=generator) < 0.2 if documents else None
    return Problem(
        SelfModifyingSpec(**{"chunk_size": 4, "projection_chunk_size": 2, "horizon": 3.0, **choices}),
        *tokens[:3],
        initial=initial,
        g=tokens[3] if gates else None,
        eta=None if "eta" in memories else uniform(0.0, 0.8),
        alpha=None if "alpha" in memories else uniform(0.5, 1.0),
        mu=uniform(0.0, 0.9) if momentum else None,
        gates=gates,
        mask=mask,
        resets=resets,
    )


def flat(result: Any) -> dict[str, Tensor]:
    """Outputs, state and strengths of a run as tensors by name."""
    y, state, *strength = result
    found = {"y": y, "phase": state.phase}
    found |= {"strength": strength[0]} if strength else {}
    for part in ("weights", "momentum", "anchor"):
        for name, matrices in getattr(state, part).items():
            found |= {f"{part} {name} {i}": w for i, w in enumerate(matrices)}
    return found


def assert_same(result: Any, expected: Any, tolerance: float = 1e-9) -> None:
    """Equal in every output and every part of the state."""
    found, wanted = flat(result), flat(expected)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}"
        )


# Test modules do not import each other; hypothesis needs session scope.


@pytest.fixture(scope="session")
def draw_problem():
    """`draw_problem(seed, memories=..., depth=..., momentum=..., **choices of the spec)`."""
    return draw


@pytest.fixture(scope="session")
def same():
    """`same(result, expected)` asserts equality of outputs and states."""
    return assert_same


@pytest.fixture(scope="session")
def flatten():
    """`flatten(result)`: tensors by name."""
    return flat
