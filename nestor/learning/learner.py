"""Reading that learns: levels of a model's weights, updated from the stream that a State reads.

For each base chunk, the tokens of the shortest period, one backward of the summed next-token loss gives the
gradients of all levels, at the weights with which the chunk was read and through the whole model; each adds
them up, and levels whose period ends make their steps, all at once (spec nested-learning, d.2; arXiv
2512.24695, eq. 71). A token is predicted before it changes any weight.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import get_total_norm

from nestor.errors import ConfigError, NonFiniteError, ShapeError
from nestor.learning.inner import OPTIMIZERS, bounded, changes_of
from nestor.learning.levels import Level, check_levels
from nestor.learning.readers import reader_of
from nestor.learning.stream import Stream, Tensors, fresh_levels, take_apart
from nestor.models.state import State


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


class Learner:
    """A model and the levels of its weights that learn while it reads.

    The model's own parameters never change: what a stream has learned is in its State, as differences from
    them in float32 (float64 for such a model), with the tokens of the chunk that is not over yet, gradients
    that wait for their level's update, and the state of optimisers. It is saved, stacked and forked with the
    State. Streams of a batch learn each for itself, one after another.

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
        parameters = self._parameters_of(model)
        self.base = check_levels(levels, parameters)
        self.model, self.levels, self._reader = model, tuple(levels), reader_of(model)
        self._adaptive = [level for level in self.levels if level.period is not None]
        self._replaced: Tensors = {}  # the model's own, while others are in their place
        self._whole = {
            level.name: _norm([parameters[name] for name in level.parameters]) for level in self.levels
        }

    def start(self, batch_size: int = 1) -> State:
        """The State of streams that have read and learned nothing."""
        one = self._unread
        fresh = fresh_levels(self._adaptive, self._parameters())
        row = Stream(one, one, [], [], 0, fresh).row(self.base)
        return row if batch_size == 1 else State.stack([row] * batch_size)

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
            ConfigError: the loss does not depend on a parameter of a level.
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
            stream = take_apart(row, self._adaptive)
            logits.append(self._read(stream, input_ids[number].tolist(), counted[number].tolist()))
            states.append(stream.row(self.base))
        return Reading(torch.cat(logits), _stack(states))

    def close(self, state: State) -> State:
        """The State after the context is over: what was learned stays, all else begins anew.

        The tokens of the open chunk but the last one, which nothing followed, are learned from first. Levels
        that reset with the context forget.
        """
        closed = []
        for row in _rows(state):
            stream = take_apart(row, self._adaptive)
            if len(stream.tokens) > 1:
                self._learn(stream, stream.tokens[:-1], stream.tokens[1:], stream.weights[1:])
            stream.now = stream.start = self._unread
            stream.tokens, stream.weights = [], []
            for level in self._adaptive:
                if level.reset == "context":
                    _reset(level, stream.own(level.name))
            closed.append(stream.row(self.base))
        return _stack(closed)

    def weights(self, state: State, row: int = 0) -> Tensors:
        """The model's parameters by name, with what a stream has learned, in their own dtype."""
        return self._adapted(take_apart(state.select([row]), self._adaptive).deltas())

    @torch.no_grad()
    def write(self, state: State, model: nn.Module, row: int = 0) -> None:
        """Put the weights of a stream into a model of the same parameters: a copy, or this one for good."""
        for name, weight in self.weights(state, row).items():
            model.get_parameter(name).copy_(weight)

    @contextmanager
    def applied(self, state: State, row: int = 0) -> Iterator[nn.Module]:
        """The model with what a stream has learned in its parameters, within a `with` block.

        For what takes a model and not a Learner, as `generate`. The block must not be shared by threads.
        """
        if self._replaced:
            raise ConfigError("the model has what another stream has learned; leave that block first")
        learned, own = self.weights(state, row), dict(self.model.named_parameters())
        self._replaced = self._parameters()
        try:
            for name, weight in learned.items():
                own[name].data = weight
            yield self.model
        finally:
            for name, weight in self._replaced.items():
                own[name].data = weight
            self._replaced = {}

    def generate(self, input_ids: Tensor, state: State, **options: object) -> Tensor:
        """Tokens int64 ``[1, n]`` that follow the tokens ``[1, T]`` after what a stream has read.

        Nothing is learned and the State stays as it was. options: of Hugging Face's `generate`.
        """
        if state.batch_size != 1 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
            raise ShapeError(
                f"the tokens have shape {list(input_ids.shape)} and the State {state.batch_size} rows; "
                f"generate goes on with one stream and at least one token"
            )
        now = take_apart(state, self._adaptive).now
        with self.applied(state):
            return self._reader.generate(input_ids, now, options)

    def report(self, state: State) -> list[list[LevelReport]]:
        """For each stream what each level has done.

        Warns of a level whose period is over and that was never updated.
        """
        streams = [take_apart(row, self._adaptive) for row in _rows(state)]
        return [[self._report(level, stream) for level in self.levels] for stream in streams]

    def _report(self, level: Level, stream: Stream) -> LevelReport:
        clock = stream.clock
        if level.period is None:
            return LevelReport(level.name, None, 0, clock, 0.0, 0.0)
        kept = stream.levels[level.name]
        updates, moved = int(kept["updates"]), float(kept["moved"])
        if clock >= (level.phase or level.period) and updates == 0:
            warnings.warn(
                f"level {level.name!r} was never updated in {clock} tokens; all tokens of its periods had "
                f"the weight 0",
                stacklevel=4,
            )
        pending = (clock - level.phase) % level.period if clock >= level.phase else clock
        change = _norm([kept[f"delta/{name}"] for name in level.parameters])
        whole = self._whole[level.name] or 1.0
        return LevelReport(level.name, level.period, updates, pending, moved, change / whole)

    @cached_property
    def _unread(self) -> State:
        """The model's State of a stream that has read nothing, for which a Nestor model runs once."""
        with torch.inference_mode(False):
            return self._reader.initial_state(1)

    def _read(self, stream: Stream, tokens: list[int], weights: list[float]) -> Tensor:
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
                found, stream.now = self._run(stream.deltas(), tokens[:count], stream.now)
            logits.append(found)
            stream.tokens += tokens[:count]
            stream.weights += weights[:count]
            tokens, weights = tokens[count:], weights[count:]
        return torch.cat(logits, 1)

    def _learn(self, stream: Stream, tokens: list[int], targets: list[int], weights: list[float]) -> Tensor:
        """Read a chunk from its start, add its gradients to those of all levels, and update those that are
        due. Returns its logits."""
        with torch.inference_mode(False), torch.enable_grad():
            leaves = {name: _own(x).detach().requires_grad_() for name, x in stream.deltas().items()}
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
            found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        gradients: Tensors = {}
        for name, g in zip(leaves, found, strict=True):
            if g is None:
                raise ConfigError(
                    f"what the model predicts does not depend on {name!r}, which is in a level; leave it out"
                )
            gradients[name] = g
        # One look at the device for all of them.
        if not bool((total.detach().double() + get_total_norm(gradients.values()).double()).isfinite()):
            raise NonFiniteError(
                f"the loss on tokens {stream.clock + 1} to {stream.clock + len(tokens)} of the stream, "
                f"{float(total.detach())}, or a gradient of it is not finite; go on from the State before, "
                f"in float32 or bfloat16, or with lower learning rates"
            )
        with torch.no_grad():
            count = counted.sum()
            for level in self._adaptive:
                kept = stream.own(level.name)
                for name in level.parameters:
                    kept[f"gradient/{name}"].add_(gradients[name])
                kept["count"].add_(count)
            stream.clock += len(tokens)
            for level in self._adaptive:
                if level.due(stream.clock):
                    self._update(level, stream.levels[level.name], stream.clock)
        stream.now = stream.start = after.detach()
        return logits.detach()

    def _update(self, level: Level, kept: Tensors, clock: int) -> None:
        """A level's step, after which its gradients are zero; none where no token counted."""
        count, updates = float(kept["count"]), int(kept["updates"])
        if count == 0:
            return
        names, slots = level.parameters, OPTIMIZERS[level.optimizer][1]
        changes, after = changes_of(
            level,
            {name: kept[f"gradient/{name}"] for name in names},
            {name: {slot: kept[f"{slot}/{name}"] for slot in slots} for name in names},
            count,
            updates,
        )
        kept |= {f"{slot}/{name}": after[name][slot] for name in names for slot in slots}
        moved, scale = torch.stack(bounded(level, changes.values(), self._whole[level.name])).tolist()
        if not moved < float("inf"):
            raise NonFiniteError(
                f"the update of level {level.name!r} at token {clock} of the stream is {moved}; go on from "
                f"the State before, with a lower learning rate than {level.learning_rate}"
            )
        for name, change in changes.items():
            kept[f"delta/{name}"].add_(change, alpha=scale)
            kept[f"gradient/{name}"].zero_()
        kept["count"].zero_()
        kept["updates"].add_(1)
        kept["moved"].fill_(moved * scale)
        if isinstance(level.reset, int) and (updates + 1) % level.reset == 0:
            _reset(level, kept)

    def _run(self, deltas: Mapping[str, Tensor], tokens: list[int], state: State) -> tuple[Tensor, State]:
        ids = torch.tensor([tokens], device=state.device)
        return self._reader(self._adapted(deltas), ids, state)

    def _adapted(self, deltas: Mapping[str, Tensor]) -> Tensors:
        weights = self._parameters()
        for name, delta in deltas.items():
            weights[name] = (weights[name].to(delta.dtype) + delta).to(weights[name].dtype)
        return weights

    def _parameters(self) -> Tensors:
        return dict(self._replaced) or self._parameters_of(self.model)

    @staticmethod
    def _parameters_of(model: nn.Module) -> Tensors:
        return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _reset(level: Level, kept: Tensors) -> None:
    """What a level has learned, and its optimiser's state, back to nothing; waiting gradients stay."""
    for name in level.parameters:
        for part in ("delta", *OPTIMIZERS[level.optimizer][1]):
            kept[f"{part}/{name}"].zero_()


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


def _norm(tensors: object) -> float:
    """Of all numbers together."""
    return float(get_total_norm(list(tensors)))  # type: ignore[call-overload]
