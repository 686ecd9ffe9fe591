"""Reading that learns: levels of a model's weights, updated from the stream that a State reads.

For each base chunk, the tokens of the shortest period, one backward of the summed next-token loss gives the
gradients of all levels, at the weights with which the chunk was read and through the whole model; each adds
them up, and levels whose period ends make their steps, all at once (spec nested-learning, d.2; arXiv
2512.24695, eq. 71). A token is predicted before it changes any weight.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from nestor.errors import ConfigError, ShapeError, suggest
from nestor.learning.chunks import Chunk, adapted
from nestor.learning.graphed import step_of
from nestor.learning.levels import Level, check_levels
from nestor.learning.readers import reader_of
from nestor.learning.stream import Piece, Stream, Tensors, fresh_stream, take_apart
from nestor.learning.updates import reset, tensors_of, update
from nestor.models.state import State

AfterChunk = Callable[[State, State], State]


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
        capture: whether chunks are learned from in fixed shapes, on a GPU as a CUDA graph
            (`nestor.learning.graphed`): the same but for the rounding of attention, and for small models
            several times as fast. None: on a GPU, where the model can. Then one thread may use the Learner.

    Raises:
        ConfigError: levels that do not fit each other or the model, a model of another kind, or one that
            cannot be captured, and `capture` is True; the message says why.
    """

    def __init__(self, model: nn.Module, levels: Sequence[Level], capture: bool | None = None) -> None:
        parameters = self._parameters_of(model)
        self.base = check_levels(levels, parameters)
        self.model, self.levels, self._reader = model, tuple(levels), reader_of(model)
        self._step = step_of(self._reader, self.base, capture)
        self._adaptive = [level for level in self.levels if level.period is not None]
        self._replaced: Tensors = {}  # the model's own, while others are in their place
        self._whole = {
            level.name: _norm([parameters[name] for name in level.parameters]) for level in self.levels
        }

    def start(self, batch_size: int = 1) -> State:
        """The State of streams that have read and learned nothing."""
        row = fresh_stream(self._unread, self._adaptive, self._parameters()).row(self.base)
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
        logits, states = [], []
        for row, text in zip(_rows(state), self._texts(input_ids, state, weights), strict=True):
            stream = take_apart(row, self._adaptive)
            logits.append(self._read(stream, text))
            states.append(stream.row(self.base))
        return Reading(torch.cat(logits), _stack(states))

    def study(
        self,
        input_ids: Tensor,
        state: State,
        weights: Tensor | None = None,
        after_chunk: AfterChunk | None = None,
    ) -> State:
        """The State after the tokens and the end of their context: what `read` and then `close` give.

        No logits are given, so no chunk is read twice, as by `read` while what follows it is not known. Takes
        and raises what `read` does. after_chunk: of the States of one stream before and after a chunk was
        learned from, the one to go on from.
        """
        texts = self._texts(input_ids, state, weights)
        rows = zip(_rows(state), texts, strict=True)
        return _stack([self._to_the_end(row, text, after_chunk) for row, text in rows])

    def close(self, state: State) -> State:
        """The State after the context is over: what was learned stays, all else begins anew.

        The tokens of the open chunk but the last one, which nothing followed, are learned from first. Levels
        that reset with the context forget.
        """
        return _stack([self._to_the_end(row) for row in _rows(state)])

    def forget(self, state: State, level: str) -> State:
        """The State in which one level is as at the beginning: its weights are the model's own, and its
        optimiser's state is nothing. Its clock and gradients that wait stay. The State given stays as it was.

        Raises:
            ConfigError: there is no such level that learns.
        """
        known = {one.name: one for one in self._adaptive}
        if level not in known:
            raise ConfigError(
                f"no level {level!r} learns; those that do are {', '.join(known)}. "
                f"{suggest(level, known)}".rstrip()
            )
        streams = [take_apart(row, self._adaptive) for row in _rows(state)]
        for stream in streams:
            reset(known[level], stream.own(level))
        return _stack([stream.row(self.base) for stream in streams])

    def weights(self, state: State, row: int = 0) -> Tensors:
        """The model's parameters by name, with what a stream has learned, in their own dtype."""
        return adapted(self._parameters(), take_apart(state.select([row]), self._adaptive).deltas())

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
        updates, moved = stream.updates[level.name], float(kept["moved"])
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

    def _texts(self, input_ids: Tensor, state: State, weights: Tensor | None) -> list[Piece]:
        """The tokens of each stream with their weights; raises ShapeError as `read` says."""
        if input_ids.dim() != 2 or input_ids.shape[0] != state.batch_size or input_ids.shape[1] == 0:
            raise ShapeError(
                f"the tokens have shape {list(input_ids.shape)}; give [{state.batch_size}, length], a row "
                f"for each stream of the State, with at least one token"
            )
        if weights is not None and weights.shape != input_ids.shape:
            raise ShapeError(f"weights have shape {list(weights.shape)}, the tokens {list(input_ids.shape)}")
        known = torch.ones(input_ids.shape) if weights is None else weights
        known = known.to("cpu", torch.float64)
        if not bool((known.isfinite() & (known >= 0)).all()):
            raise ShapeError("weights of tokens must be finite and not below 0")
        # Once for all chunks, for each move to a GPU waits for what is queued there.
        ids, counted = input_ids.to(state.device, torch.int64), known.to(state.device)
        return [Piece(*row) for row in zip(ids, counted, known, strict=True)]

    def _to_the_end(
        self, row: State, text: Piece | None = None, after_chunk: AfterChunk | None = None
    ) -> State:
        """A stream after its open chunk, this text, and the end of the context."""
        stream = take_apart(row, self._adaptive)
        text = stream.open if text is None else stream.open.then(text)
        stream.open = stream.open.cut(0, 0)
        while len(text) > 1:
            count = min(self.base - stream.clock % self.base, len(text) - 1)
            self._learn(stream, text.cut(0, count + 1))
            text = text.cut(count)
            if after_chunk is not None:
                row = after_chunk(row, stream.row(self.base))
                stream = take_apart(row, self._adaptive)
        stream.now = stream.start = self._unread
        for level in self._adaptive:
            if level.reset == "context":
                reset(level, stream.own(level.name))
        return stream.row(self.base)

    def _read(self, stream: Stream, text: Piece) -> Tensor:
        """Logits ``[1, T, V]``; the stream is the one after the tokens."""
        logits = []
        while len(text):
            room = self.base - stream.clock % self.base
            if len(stream.open) == room:
                # The chunk waited for the token that follows it.
                self._learn(stream, stream.open.then(text.cut(0, 1)))
                stream.open = stream.open.cut(0, 0)
                continue
            if not len(stream.open) and len(text) > room:
                logits.append(self._learn(stream, text.cut(0, room + 1)))
                text = text.cut(room)
                continue
            part = text.cut(0, room - len(stream.open))
            with torch.no_grad():
                weights = adapted(self._parameters(), stream.deltas())
                found, stream.now = self._reader(weights, part.ids[None], stream.now)
            logits.append(found)
            stream.open = stream.open.then(part)
            text = text.cut(len(part))
        return torch.cat(logits, 1)

    def _learn(self, stream: Stream, text: Piece) -> Tensor:
        """Read a chunk from its start, add its gradients to those of all levels, and update those that are
        due. Returns its logits. text: the chunk and the token after it, which is only predicted."""
        chunk = Chunk(text.ids[:-1], text.ids[1:], text.weights[1:])
        logits, loss, gradients, norm, after = self._step(
            self._parameters(), stream.deltas(), chunk, stream.start
        )
        stream.checks.add(
            loss.double() + norm.double(),
            f"the loss on tokens {stream.clock + 1} to {stream.clock + len(text) - 1} of the stream and the "
            f"norm of its gradients together",
            "in float32 or bfloat16, or with lower learning rates",
        )
        with torch.no_grad():
            count = float(text.known[1:].sum())
            for level in self._adaptive:
                waiting = tensors_of(level, stream.own(level.name), "gradient")
                torch._foreach_add_(waiting, [gradients[name] for name in level.parameters])
                stream.counts[level.name] += count
            stream.clock += len(text) - 1
            for level in self._adaptive:
                if level.due(stream.clock):
                    update(level, stream, self._whole[level.name])
        stream.now = stream.start = after
        return logits

    def _parameters(self) -> Tensors:
        return dict(self._replaced) or self._parameters_of(self.model)

    @staticmethod
    def _parameters_of(model: nn.Module) -> Tensors:
        return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _rows(state: State) -> list[State]:
    """Each stream by itself; the only one as it is, for what is learned is large."""
    if state.batch_size == 1:
        return [state]
    return [state.select([row]) for row in range(state.batch_size)]


def _stack(states: list[State]) -> State:
    return states[0] if len(states) == 1 else State.stack(states)


def _norm(tensors: object) -> float:
    """Of all numbers together."""
    return float(get_total_norm(list(tensors)))  # type: ignore[call-overload]
