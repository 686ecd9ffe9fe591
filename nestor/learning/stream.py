"""What one stream that learns has become, as a row of a State and taken apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nestor.errors import StateMismatchError
from nestor.learning.inner import OPTIMIZERS
from nestor.learning.levels import REDUCTIONS, Level
from nestor.models.state import State

Tensors = dict[str, Tensor]
# What a level keeps beside the tensors of each parameter.
COUNTERS = ("count", "moved", "updates", "settings")


@dataclass
class Stream:
    """One row of a State, taken apart.

    Attributes:
        now: the model's State after all tokens; start: where the open chunk began.
        tokens, weights: of the open chunk, all of which have been read, and how much predicting each counts.
        clock: tokens that were learned from.
        levels: by level, `delta`, `gradient` and slots of each parameter; count, updates, moved.
        owned: levels whose tensors are in no State, so that they may be changed in place.
    """

    now: State
    start: State
    tokens: list[int]
    weights: list[float]
    clock: int
    levels: dict[str, Tensors]
    owned: set[str] = field(default_factory=set)

    def own(self, level: str) -> Tensors:
        """The tensors of a level, to be changed in place."""
        if level not in self.owned:
            self.levels[level] = {name: tensor.clone() for name, tensor in self.levels[level].items()}
            self.owned.add(level)
        return self.levels[level]

    def deltas(self) -> Tensors:
        """By parameter, what all levels have added to it."""
        total: Tensors = {}
        for kept in self.levels.values():
            for key, tensor in kept.items():
                part, _, name = key.partition("/")
                if part == "delta":
                    total[name] = total[name] + tensor if name in total else tensor
        return total

    def row(self, chunk: int) -> State:
        """The row of a State: what `take_apart` takes. chunk: tokens of a base chunk."""
        device = self.now.device
        learned = {
            level: {name: x.unsqueeze(0) for name, x in kept.items()} for level, kept in self.levels.items()
        }
        self.owned.clear()
        tokens = torch.zeros(1, chunk, dtype=torch.int64)
        weights = torch.zeros(1, chunk, dtype=torch.float64)
        used = len(self.tokens)
        tokens[0, :used] = torch.tensor(self.tokens)
        weights[0, :used] = torch.tensor(self.weights, dtype=weights.dtype)
        own = {
            "tokens": tokens,
            "weights": weights,
            "used": torch.tensor([used]),
            "clock": torch.tensor([self.clock]),
            "start.clock": self.start.clock,
        }
        for index, layer in self.start.layers.items():
            own |= {f"start.{index}.{name}": tensor for name, tensor in layer.items()}
        learned["stream"] = {name: tensor.to(device) for name, tensor in own.items()}
        return State(self.now.layers, self.now.clock, learned)


def parts_of(level: Level) -> tuple[str, ...]:
    """What a level keeps of each parameter."""
    return ("delta", "gradient", *OPTIMIZERS[level.optimizer][1])


def settings_of(level: Level) -> Tensor:
    """What a level must have in common with what was learned before."""
    reset = {"never": -1, "context": 0}.get(str(level.reset), level.reset)
    slow = [level.slow_period] if level.optimizer == "m3" else []
    return torch.tensor([level.period or 0, level.phase, REDUCTIONS.index(level.reduce), int(reset), *slow])


def fresh_levels(levels: Sequence[Level], parameters: Tensors) -> dict[str, Tensors]:
    """What levels keep that have learned nothing. A parameter's zeros are one tensor, shared by its parts."""
    made: dict[str, Tensors] = {}
    for level in levels:
        kept: Tensors = {}
        for name in level.parameters:
            own = parameters[name]
            wide = own.new_zeros(own.shape, dtype=torch.promote_types(own.dtype, torch.float32))
            kept |= {f"{part}/{name}": wide for part in parts_of(level)}
        device = parameters[level.parameters[0]].device
        kept["count"] = torch.zeros((), dtype=torch.float64, device=device)
        kept["moved"] = torch.zeros((), dtype=torch.float64, device=device)
        kept["updates"] = torch.zeros((), dtype=torch.int64, device=device)
        kept["settings"] = settings_of(level).to(device)
        made[level.name] = kept
    return made


def take_apart(state: State, levels: Sequence[Level]) -> Stream:
    """The stream in the only row of a State.

    Raises:
        StateMismatchError: it has learned on other levels; the message says what differs.
    """
    wanted = {
        level.name: {*COUNTERS, *(f"{part}/{name}" for part in parts_of(level) for name in level.parameters)}
        for level in levels
    }
    found = {level: set(kept) for level, kept in state.learned.items() if level != "stream"}
    if wanted != found or "stream" not in state.learned:
        raise StateMismatchError(
            f"the State has learned on the levels {sorted(found) or 'none'}, and this Learner has "
            f"{sorted(wanted)}, or they have other parameters or optimisers; begin with Learner.start"
        )
    for level in levels:
        before, now = state.learned[level.name]["settings"][0].tolist(), settings_of(level).tolist()
        if before != now:
            raise StateMismatchError(
                f"the State's level {level.name!r} has {_described(before)}; this Learner's has "
                f"{_described(now)}"
            )
    own = state.learned["stream"]
    layers: dict[int, Tensors] = {}
    for name, tensor in own.items():
        head, _, rest = name.partition(".")
        index, _, key = rest.partition(".")
        if head == "start" and key:
            layers.setdefault(int(index), {})[key] = tensor
    used = int(own["used"])
    return Stream(
        now=State(state.layers, state.clock),
        start=State(dict(sorted(layers.items())), own["start.clock"]),
        tokens=own["tokens"][0, :used].tolist(),
        weights=own["weights"][0, :used].tolist(),
        clock=int(own["clock"]),
        levels={
            level: {name: tensor[0] for name, tensor in kept.items()}
            for level, kept in state.learned.items()
            if level != "stream"
        },
    )


def _described(settings: Sequence[int]) -> str:
    period, phase, reduction, reset, *slow = settings
    again = {-1: "never resets", 0: "resets with the context"}.get(reset, f"resets every {reset} updates")
    slower = "".join(f", with a slow period of {updates} updates" for updates in slow)
    return f"period {period}, phase {phase}, reduces by {REDUCTIONS[reduction]} and {again}{slower}"
