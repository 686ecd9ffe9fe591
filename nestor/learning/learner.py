"""Reading that learns: levels of a model's weights, updated from the stream that a State reads.

For each base chunk, the tokens of the shortest period, one backward of the summed next-token loss gives the
gradients of all levels, at the weights with which the chunk was read and through the whole model; each adds
them up, and levels whose period ends make their steps, all at once (spec nested-learning, d.2; arXiv
2512.24695, eq. 71). A token is predicted before it changes any weight.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestor.errors import NonFiniteError, ShapeError, StateMismatchError
from nestor.learning.inner import OPTIMIZERS
from nestor.learning.levels import REDUCTIONS, Level, check_levels
from nestor.learning.readers import reader_of
from nestor.models.state import State

Tensors = dict[str, Tensor]
# What a level keeps beside the tensors of each parameter.
COUNTERS = ("count", "moved", "updates", "settings")


class Reading(NamedTuple):
    """Logits ``[B, T, V]`` of the token after each, and the State after them."""

    logits: Tensor
    state: State


class LevelReport(NamedTuple):
    """What a level of one stream has done.

    updates: how many; pending: tokens since the last; last_update: norm of the last; change: norm of all that
    has changed, over that of the weights.
    """

    name: str
    period: int | None
    updates: int
    pending: int
    last_update: float
    change: float


@dataclass
class _Stream:
    """One row of a State, taken apart.

    Attributes:
        now: the model's State after all tokens; start: where the open chunk began.
        tokens, weights: of the open chunk, all of which have been read, and how much predicting each counts.
        clock: tokens that were learned from.
        levels: by level, `delta`, `gradient` and slots of each parameter; count, updates, moved.
    """

    now: State
    start: State
    tokens: list[int]
    weights: list[float]
    clock: int
    levels: dict[str, Tensors]


class Learner:
    """A model and the levels of its weights that learn while it reads.

    The model's own parameters never change: what a stream has learned is in its State, as differences from
    them in float32 (float64 for such a model), with the tokens of the chunk that is not over yet, gradients
    that wait for their level's update, and the state of optimisers. It is saved, stacked and forked with the
    State. Streams of a batch learn each for itself.

    Gradients do not cross from a chunk into the one before: keys and values that were cached there count as
    given. Chunks are those of the stream, wherever calls cut it.

    Args:
        model: in evaluation mode. A Nestor model, or a Hugging Face decoder whose layers cache keys and
            values.
        levels: periods must be multiples of the shortest. Parameters of no level are fixed.

    Raises:
        ConfigError: levels that do not fit each other or the model, or a model of another kind.
    """

    def __init__(self, model: nn.Module, levels: Sequence[Level]) -> None:
        parameters = dict(model.named_parameters())
        self.base = check_levels(levels, parameters)
        self.model, self.levels, self._reader = model, tuple(levels), reader_of(model)
        self._adaptive = [level for level in self.levels if level.period is not None]
        self._kept = {
            level.name: {
                *COUNTERS,
                *(f"{part}/{name}" for part in _parts(level) for name in level.parameters),
            }
            for level in self._adaptive
        }

    def start(self, batch_size: int = 1) -> State:
        """The State of streams that have read and learned nothing."""
        state = self._reader.initial_state(batch_size)
        one = state.select([0])
        streams = [_Stream(one, one, [], [], 0, self._fresh()) for _ in range(batch_size)]
        return State.stack(self._together(stream) for stream in streams)

    def read(self, input_ids: Tensor, state: State, weights: Tensor | None = None) -> Reading:
        """Read tokens and learn from them. The State given stays as it was.

        Args:
            input_ids: int64 `[B, T]`, at least one token of each stream.
            state: of `start`, `read` or `close`.
            weights: float `[B, T]`, how much it counts to have predicted each token: 0 for what a model wrote
                itself. None: 1.

        Raises:
            ShapeError: sizes that do not fit each other.
            StateMismatchError: a State of other levels.
            NonFiniteError: a loss or an update is infinite or no number; the State given is the one to go on
                from.
        """
        if input_ids.dim() != 2 or input_ids.shape[0] != state.batch_size or input_ids.shape[1] == 0:
            raise ShapeError(
                f"the tokens have shape {list(input_ids.shape)}; give [{state.batch_size}, length], a row "
                f"for each stream of the State, with at least one token"
            )
        if weights is not None and weights.shape != input_ids.shape:
            raise ShapeError(f"weights have shape {list(weights.shape)}, the tokens {list(input_ids.shape)}")
        if weights is not None and not bool((weights.isfinite() & (weights >= 0)).all()):
            raise ShapeError("weights of tokens must be finite and not below 0")
        counted = torch.ones(input_ids.shape) if weights is None else weights
        logits, states = [], []
        for number, row in enumerate(_rows(state)):
            stream = self._apart(row)
            logits.append(self._read(stream, input_ids[number].tolist(), counted[number].tolist()))
            states.append(self._together(stream))
        return Reading(torch.cat(logits), _stack(states))

    def close(self, state: State) -> State:
        """The State after the context is over: what was learned stays, all else begins anew.

        The tokens of the open chunk but the last one, which nothing followed, are learned from first.
        """
        closed = []
        for row in _rows(state):
            stream = self._apart(row)
            if len(stream.tokens) > 1:
                self._learn(stream, stream.tokens[:-1], stream.tokens[1:], stream.weights[1:])
            stream.now = stream.start = self._reader.initial_state(1)
            stream.tokens, stream.weights = [], []
            closed.append(self._together(stream))
        return _stack(closed)

    def weights(self, state: State, row: int = 0) -> Tensors:
        """The model's parameters by name, with what a stream has learned, in their own dtype."""
        return self._adapted(self._deltas(self._apart(state.select([row]))))

    def report(self, state: State) -> list[list[LevelReport]]:
        """For each stream what each level has done.

        Warns of a level whose period is over and that was never updated.
        """
        own = self._parameters()
        whole = {level.name: _norm([own[name] for name in level.parameters]) or 1.0 for level in self.levels}
        found = []
        for row in _rows(state):
            stream = self._apart(row)
            reports = []
            for level in self.levels:
                reports.append(self._report(level, stream, whole[level.name]))
            found.append(reports)
        return found

    def _report(self, level: Level, stream: _Stream, whole: float) -> LevelReport:
        clock = stream.clock
        if level.period is None:
            return LevelReport(level.name, None, 0, clock, 0.0, 0.0)
        kept = stream.levels[level.name]
        updates, moved = int(kept["updates"]), float(kept["moved"])
        if clock >= (level.phase or level.period) and updates == 0:
            warnings.warn(
                f"level {level.name!r} was never updated in {clock} tokens; all tokens of its periods had "
                f"the weight 0",
                stacklevel=3,
            )
        pending = (clock - level.phase) % level.period if clock >= level.phase else clock
        change = _norm([kept[f"delta/{name}"] for name in level.parameters]) / whole
        return LevelReport(level.name, level.period, updates, pending, moved, change)

    def _read(self, stream: _Stream, tokens: list[int], weights: list[float]) -> Tensor:
        """Logits ``[1, T, V]``; the stream is the one after the tokens."""
        logits = []
        while tokens:
            room = self.base - stream.clock % self.base
            if len(stream.tokens) == room:
                # The chunk waited for the token that follows it.
                self._learn(
                    stream, stream.tokens, [*stream.tokens[1:], tokens[0]], [*stream.weights[1:], weights[0]]
                )
                stream.tokens, stream.weights = [], []
                continue
            if not stream.tokens and len(tokens) > room:
                logits.append(self._learn(stream, tokens[:room], tokens[1 : room + 1], weights[1 : room + 1]))
                tokens, weights = tokens[room:], weights[room:]
                continue
            count = min(room - len(stream.tokens), len(tokens))
            with torch.no_grad():
                found, stream.now = self._run(self._deltas(stream), tokens[:count], stream.now)
            logits.append(found)
            stream.tokens += tokens[:count]
            stream.weights += weights[:count]
            tokens, weights = tokens[count:], weights[count:]
        return torch.cat(logits, 1)

    def _learn(self, stream: _Stream, tokens: list[int], targets: list[int], weights: list[float]) -> Tensor:
        """Read a chunk from its start, add its gradients to those of all levels, and update those that are
        due. Returns its logits."""
        with torch.inference_mode(False), torch.enable_grad():
            leaves = {name: _own(x).detach().requires_grad_() for name, x in self._deltas(stream).items()}
            start = State(
                {i: {n: _own(x) for n, x in layer.items()} for i, layer in stream.start.layers.items()},
                _own(stream.start.clock),
            )
            logits, after = self._run(leaves, tokens, start)
            wide = torch.promote_types(logits.dtype, torch.float32)
            losses = F.cross_entropy(
                logits[0].to(wide), torch.tensor(targets, device=logits.device), reduction="none"
            )
            counted = torch.tensor(weights, dtype=wide, device=logits.device)
            total = (losses * counted).sum()
            gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        for x in (total, *gradients):
            if x is not None and not bool(x.isfinite().all()):
                raise NonFiniteError(
                    f"the loss on tokens {stream.clock + 1} to {stream.clock + len(tokens)} of the stream, "
                    f"{float(total)}, or a gradient of it is not finite; go on from the State before, in "
                    f"float32 or bfloat16, or with lower learning rates"
                )
        by_name = dict(zip(leaves, gradients, strict=True))
        with torch.no_grad():
            for level in self._adaptive:
                kept = stream.levels[level.name]
                for name in level.parameters:
                    g = by_name[name]
                    if g is not None:
                        kept[f"gradient/{name}"] = kept[f"gradient/{name}"] + g
                kept["count"] = kept["count"] + counted.sum().to(kept["count"])
            stream.clock += len(tokens)
            due = [level for level in self._adaptive if level.due(stream.clock)]
            for level in due:
                stream.levels[level.name] = self._update(level, stream.levels[level.name], stream.clock)
        stream.now = stream.start = after.detach()
        return logits.detach()

    def _update(self, level: Level, kept: Tensors, clock: int) -> Tensors:
        """The level after its step, with gradients at zero; as it was where no token counted."""
        count, updates = float(kept["count"]), int(kept["updates"])
        if count == 0:
            return kept
        step, slots = OPTIMIZERS[level.optimizer]
        made: Tensors = {}
        changes: Tensors = {}
        for name in level.parameters:
            g = kept[f"gradient/{name}"]
            given = {slot: kept[f"{slot}/{name}"] for slot in slots}
            change, after = step(level, g / count if level.reduce == "mean" else g, given, updates)
            changes[name] = change
            made |= {f"{slot}/{name}": value for slot, value in after.items()}
            made[f"gradient/{name}"] = torch.zeros_like(g)
        moved = _norm(changes.values())
        if not moved < float("inf"):
            raise NonFiniteError(
                f"the update of level {level.name!r} at token {clock} of the stream is {moved}; go on from "
                f"the State before, with a lower learning rate than {level.learning_rate}"
            )
        if level.largest_update is not None:
            own = self._parameters()
            most = level.largest_update * _norm([own[name] for name in level.parameters])
            if moved > most:
                changes = {name: change * (most / moved) for name, change in changes.items()}
                moved = most
        for name, change in changes.items():
            made[f"delta/{name}"] = kept[f"delta/{name}"] + change
        made["count"], made["updates"] = torch.zeros_like(kept["count"]), kept["updates"] + 1
        made["moved"], made["settings"] = torch.full_like(kept["moved"], moved), kept["settings"]
        return made

    def _run(self, deltas: Mapping[str, Tensor], tokens: list[int], state: State) -> tuple[Tensor, State]:
        ids = torch.tensor([tokens], device=state.device)
        return self._reader(self._adapted(deltas), ids, state)

    def _adapted(self, deltas: Mapping[str, Tensor]) -> Tensors:
        weights = self._parameters()
        for name, delta in deltas.items():
            weights[name] = (weights[name].to(delta.dtype) + delta).to(weights[name].dtype)
        return weights

    def _parameters(self) -> Tensors:
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def _deltas(self, stream: _Stream) -> Tensors:
        return {
            name: stream.levels[level.name][f"delta/{name}"]
            for level in self._adaptive
            for name in level.parameters
        }

    def _fresh(self) -> dict[str, Tensors]:
        """By level, zeros."""
        own = self._parameters()
        levels: dict[str, Tensors] = {}
        for level in self._adaptive:
            kept: Tensors = {}
            for name in level.parameters:
                wide = own[name].new_zeros(
                    own[name].shape, dtype=torch.promote_types(own[name].dtype, torch.float32)
                )
                for part in _parts(level):
                    kept[f"{part}/{name}"] = wide
            device = own[level.parameters[0]].device
            kept["count"] = torch.zeros((), dtype=torch.float64, device=device)
            kept["moved"] = torch.zeros((), dtype=torch.float64, device=device)
            kept["updates"] = torch.zeros((), dtype=torch.int64, device=device)
            kept["settings"] = _settings(level).to(device)
            levels[level.name] = kept
        return levels

    def _together(self, stream: _Stream) -> State:
        """The row of a State: what `_apart` takes."""
        device = stream.now.device
        learned = {
            level: {n: x.unsqueeze(0) for n, x in kept.items()} for level, kept in stream.levels.items()
        }
        tokens = torch.zeros(1, self.base, dtype=torch.int64)
        weights = torch.zeros(1, self.base, dtype=torch.float64)
        used = len(stream.tokens)
        tokens[0, :used], weights[0, :used] = torch.tensor(stream.tokens), torch.tensor(stream.weights)
        own = {
            "tokens": tokens,
            "weights": weights,
            "used": torch.tensor([used]),
            "clock": torch.tensor([stream.clock]),
            "start.clock": stream.start.clock,
        }
        for index, layer in stream.start.layers.items():
            own |= {f"start.{index}.{name}": tensor for name, tensor in layer.items()}
        learned["stream"] = {name: tensor.to(device) for name, tensor in own.items()}
        return State(stream.now.layers, stream.now.clock, learned)

    def _apart(self, state: State) -> _Stream:
        found = {level: set(kept) for level, kept in state.learned.items() if level != "stream"}
        if self._kept != found or "stream" not in state.learned:
            raise StateMismatchError(
                f"the State has learned on the levels {sorted(found) or 'none'}, and this Learner has "
                f"{sorted(self._kept)}, or they have other parameters or optimisers; begin with Learner.start"
            )
        for level in self._adaptive:
            before, now = state.learned[level.name]["settings"][0].tolist(), _settings(level).tolist()
            if before != now:
                raise StateMismatchError(
                    f"the State's level {level.name!r} has period {before[0]}, phase {before[1]} and reduces "
                    f"by {REDUCTIONS[before[2]]}; this Learner's has {now[0]}, {now[1]} and {level.reduce}"
                    + "".join(
                        f"; slow periods are {a} and {b}" for a, b in zip(before[3:], now[3:], strict=True)
                    )
                )
        own = dict(state.learned["stream"])
        layers: dict[int, Tensors] = {}
        for name, tensor in own.items():
            head, _, rest = name.partition(".")
            index, _, key = rest.partition(".")
            if head == "start" and key:
                layers.setdefault(int(index), {})[key] = tensor
        used = int(own["used"])
        levels = {
            level: {n: x[0] for n, x in kept.items()}
            for level, kept in state.learned.items()
            if level != "stream"
        }
        return _Stream(
            now=State(state.layers, state.clock),
            start=State(dict(sorted(layers.items())), own["start.clock"]),
            tokens=own["tokens"][0, :used].tolist(),
            weights=own["weights"][0, :used].tolist(),
            clock=int(own["clock"]),
            levels=levels,
        )


def _rows(state: State) -> list[State]:
    """Each stream by itself; the only one as it is, for what is learned is large."""
    if state.batch_size == 1:
        return [state]
    return [state.select([row]) for row in range(state.batch_size)]


def _stack(states: list[State]) -> State:
    return states[0] if len(states) == 1 else State.stack(states)


def _own(x: Tensor) -> Tensor:
    """A tensor that autograd can keep."""
    return x.clone() if x.is_inference() else x


def _settings(level: Level) -> Tensor:
    """What a level must have in common with what was learned before."""
    slow = [level.slow_period] if level.optimizer == "m3" else []
    return torch.tensor([level.period or 0, level.phase, REDUCTIONS.index(level.reduce), *slow])


def _parts(level: Level) -> tuple[str, ...]:
    """What a level keeps of each parameter."""
    return ("delta", "gradient", *OPTIMIZERS[level.optimizer][1])


def _norm(tensors: object) -> float:
    """Of all numbers together."""
    squares = [float(x.double().square().sum()) for x in tensors]  # type: ignore[attr-defined]
    return sum(squares) ** 0.5
