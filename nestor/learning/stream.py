"""What one stream that learns has become, as a row of a State and taken apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from nestor.errors import StateMismatchError
from nestor.learning.checks import Checks
from nestor.learning.inner import OPTIMIZERS
from nestor.learning.levels import REDUCTIONS, Level
from nestor.models.state import State

Tensors = dict[str, Tensor]
# What a level keeps beside the tensors of each parameter.
COUNTERS = ("count", "moved", "updates", "settings")


@dataclass(frozen=True)
class Piece:
    """Tokens of one stream.

    Attributes:
        ids: int64 `[n]`. weights: float64 `[n]`, how much it counts to have predicted each.
        known: the weights again, on the CPU, where looking at them waits for no GPU.
    """

    ids: Tensor
    weights: Tensor
    known: Tensor

    def __len__(self) -> int:
        return len(self.known)

    def cut(self, begin: int, end: int | None = None) -> Piece:
        """Tokens `begin` to `end`."""
        return Piece(self.ids[begin:end], self.weights[begin:end], self.known[begin:end])

    def then(self, other: Piece) -> Piece:
        """This one with another after it."""
        pairs = ((self.ids, other.ids), (self.weights, other.weights), (self.known, other.known))
        return Piece(*(torch.cat(pair) for pair in pairs))


@dataclass
class Stream:
    """One row of a State, taken apart.

    Attributes:
        now: the model's State after all tokens; start: where the open chunk began.
        open: tokens of the open chunk, all of which have been read.
        clock: tokens that were learned from.
        levels: by level, `delta`, `gradient` and slots of each parameter; moved, settings.
        counts, updates: by level, weight of the tokens since its last update, and how many it made.
        owned: levels whose tensors are in no State, so that they may be changed in place.
        checks: numbers that must be finite before this becomes a State.
    """

    now: State
    start: State
    open: Piece
    clock: int
    levels: dict[str, Tensors]
    counts: dict[str, float]
    updates: dict[str, int]
    owned: set[str] = field(default_factory=set)
    checks: Checks = field(default_factory=Checks)

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
        """The row of a State: what `take_apart` takes. chunk: tokens of a base chunk.

        Raises:
            NonFiniteError: a check is not met.
        """
        self.checks.look()
        device = self.now.device
        learned: dict[str, Tensors] = {}
        for level, kept in self.levels.items():
            count = torch.full((1,), self.counts[level], dtype=torch.float64, device=device)
            updates = torch.full((1,), self.updates[level], dtype=torch.int64, device=device)
            learned[level] = {name: x.unsqueeze(0) for name, x in kept.items()}
            learned[level] |= {"count": count, "updates": updates}
        self.owned.clear()
        used = len(self.open)
        learned["stream"] = {
            "tokens": F.pad(self.open.ids, (0, chunk - used)).unsqueeze(0),
            "weights": F.pad(self.open.weights, (0, chunk - used)).unsqueeze(0),
            "used": torch.full((1,), used, device=device),
            "clock": torch.full((1,), self.clock, device=device),
            "start.clock": self.start.clock,
        }
        for index, layer in self.start.layers.items():
            learned["stream"] |= {f"start.{index}.{name}": tensor for name, tensor in layer.items()}
        return State(self.now.layers, self.now.clock, learned)


def fresh_stream(unread: State, levels: Sequence[Level], parameters: Tensors) -> Stream:
    """A stream that has read and learned nothing. unread: the model's State of it."""
    device = unread.device
    nothing = torch.zeros(0, dtype=torch.float64)
    return Stream(
        now=unread,
        start=unread,
        open=Piece(torch.zeros(0, dtype=torch.int64, device=device), nothing.to(device), nothing),
        clock=0,
        levels=fresh_levels(levels, parameters),
        counts={level.name: 0.0 for level in levels},
        updates={level.name: 0 for level in levels},
    )


def parts_of(level: Level) -> tuple[str, ...]:
    """What a level keeps of each parameter."""
    return ("delta", "gradient", *OPTIMIZERS[level.optimizer][1])


# What the numbers of `settings_of` are; of "m3" there is one more.
_SETTINGS = ("period", "phase", "reduction", "reset")


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
        kept["moved"] = torch.zeros((), dtype=torch.float64, device=device)
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
    own = state.learned["stream"]
    kept = [state.learned[level.name] for level in levels]
    (used, clock), weights, counts, updates, *settings = _fetched(
        [own["used"], own["clock"]],
        [own["weights"]],
        [one["count"] for one in kept],
        [one["updates"] for one in kept],
        *([one["settings"]] for one in kept),
    )
    for level, found_settings in zip(levels, settings, strict=True):
        before, now = [int(x) for x in found_settings], settings_of(level).tolist()
        if len(before) < len(_SETTINGS):
            raise StateMismatchError(
                f"the State's level {level.name!r} has the settings {before}, as older versions of Nestor "
                f"wrote them; wanted are {len(_SETTINGS)} numbers or more: {', '.join(_SETTINGS)}. Begin "
                f"with Learner.start, or with another memory file, and read the texts again"
            )
        if before != now:
            raise StateMismatchError(
                f"the State's level {level.name!r} has {_described(before)}; this Learner's has "
                f"{_described(now)}"
            )
    layers: dict[int, Tensors] = {}
    for name, tensor in own.items():
        head, _, rest = name.partition(".")
        index, _, key = rest.partition(".")
        if head == "start" and key:
            layers.setdefault(int(index), {})[key] = tensor
    read = int(used)
    known = torch.tensor(weights[:read], dtype=torch.float64)
    return Stream(
        now=State(state.layers, state.clock),
        start=State(dict(sorted(layers.items())), own["start.clock"]),
        open=Piece(own["tokens"][0, :read], own["weights"][0, :read], known),
        clock=int(clock),
        levels={
            level: {name: x[0] for name, x in tensors.items() if name not in ("count", "updates")}
            for level, tensors in state.learned.items()
            if level != "stream"
        },
        counts={level.name: count for level, count in zip(levels, counts, strict=True)},
        updates={level.name: int(count) for level, count in zip(levels, updates, strict=True)},
    )


def _fetched(*groups: list[Tensor]) -> list[list[float]]:
    """The numbers of each group of tensors. Waits for the device once for all."""
    flat = [torch.cat([x.reshape(-1).double() for x in group]) for group in groups]
    return [part.tolist() for part in torch.cat(flat).cpu().split([len(x) for x in flat])]


def _described(settings: Sequence[int]) -> str:
    period, phase, reduction, reset, *slow = settings
    again = {-1: "never resets", 0: "resets with the context"}.get(reset, f"resets every {reset} updates")
    slower = "".join(f", with a slow period of {updates} updates" for updates in slow)
    return f"period {period}, phase {phase}, reduces by {REDUCTIONS[reduction]} and {again}{slower}"
