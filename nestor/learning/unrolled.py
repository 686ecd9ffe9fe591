"""Streams that are learned from, as a function of where the levels begin (arXiv 2512.24695; spec d.3).

A `Learner` reads and learns; its updates are final. Here they stay in the graph, so that outer training can
learn initial weights, and learning rates, from which a stream is learned well: gradients of later losses go
back through the updates that came before them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import get_total_norm

from nestor.errors import ConfigError, ShapeError
from nestor.learning.inner import OPTIMIZERS, Slots
from nestor.learning.levels import Level, check_levels
from nestor.learning.readers import reader_of
from nestor.learning.stream import Tensors
from nestor.learning.updates import level_step
from nestor.models.decoder import NestorForCausalLM
from nestor.models.state import State


def unrolled_loss(
    model: nn.Module,
    levels: Sequence[Level],
    input_ids: Tensor,
    *,
    initial: Mapping[str, Tensor] | None = None,
    scales: Mapping[str, Tensor] | None = None,
    reach: int | None = None,
    score: Tensor | None = None,
) -> Tensor:
    """Mean next-token loss of documents that are learned from as a `Learner` would, to be differentiated.

    Args:
        input_ids: int64 `[B, T]`, each row a stream of its own, at least 2 tokens.
        score: float `[B, T]`, how much predicting each token counts in this loss, as for a later recall;
            None: 1. All tokens are learned from.
        model, levels, initial, scales, reach: as for `Unrolled`.

    Raises:
        ShapeError: fewer than two tokens, or a score of another shape.
        ConfigError: levels that do not fit the model, or a reach below 0.
    """
    if score is not None and score.shape != input_ids.shape:
        raise ShapeError(f"score has shape {list(score.shape)}, the tokens {list(input_ids.shape)}")
    streams = Unrolled(model, levels, streams=len(input_ids), initial=initial, scales=scales, reach=reach)
    nats = streams.read(input_ids)
    counted = torch.ones_like(nats) if score is None else score[:, 1:].to(nats)
    return (nats * counted).sum() / counted.sum()


#: Kinds of layers of Nestor's models whose gradients can be differentiated once more.
TWICE = {"full_attention", "sliding_attention"}


class Unrolled:
    """Streams that learn as those of a `Learner`, all in step, with every update in the graph.

    Inner gradients are those of a Learner: they do not cross from a chunk into caches of the one before. The
    outer gradient goes through caches, and through the updates as far as `reach`.

    Args:
        model: as for a Learner; its parameters may require gradients.
        levels: that learn; what they have learned begins at nothing.
        streams: how many, B. Several run the model under `torch.func.vmap`: decoders of Hugging Face alone.
        initial: where parameters begin, by name; None: the model's own.
        scales: by level, a factor of its learning rate (to learn it: the exponential of a parameter).
        reach: own updates that the outer gradient may cross, the newest first: 0 is first order, updates
            count as given; None is all. Short of all, it does not cross the state of an optimiser.
        caches: False: what is cached counts as given to the outer gradient too, which frees a chunk's memory
            as soon as its update is out of reach.

    Raises:
        ConfigError: levels that do not fit the model, several streams of one of Nestor's, a reach below 0, or
            one beyond 0 for layers with a memory.
    """

    def __init__(
        self,
        model: nn.Module,
        levels: Sequence[Level],
        *,
        streams: int = 1,
        initial: Mapping[str, Tensor] | None = None,
        scales: Mapping[str, Tensor] | None = None,
        reach: int | None = None,
        caches: bool = True,
    ) -> None:
        if reach is not None and reach < 0:
            raise ConfigError(f"reach is {reach}; give a number of updates from 0 on, or None for all")
        if streams > 1 and isinstance(model, NestorForCausalLM):
            raise ConfigError(
                f"{streams} streams of a model of Nestor's cannot be unrolled together, for it looks at the "
                f"values of its tokens; give one at a time"
            )
        kinds = set(model.config.layer_types or ()) - TWICE if isinstance(model, NestorForCausalLM) else set()
        if kinds and reach != 0:
            raise ConfigError(
                f"reach is {reach} and the model has layers {', '.join(sorted(kinds))}, whose gradients have "
                f"none themselves; give 0, updates as given, or a model of attention alone"
            )
        self.model, self.streams = model, streams
        self._begin = {**dict(model.named_parameters()), **dict(initial or {})}
        self._base = check_levels(levels, self._begin)
        self._reader = reader_of(model)
        self._learning = [
            _Unrolled(level, self._begin, (scales or {}).get(level.name), reach, streams)
            for level in levels
            if level.period is not None
        ]
        self._names = sorted({name for one in self._learning for name in one.names})
        self._reach, self._caches, self._clock = reach, caches, 0

    def read(self, input_ids: Tensor, *, through: bool = True) -> Tensor:
        """Read a document and learn from all of it; afterwards its context is gone.

        Args:
            input_ids: int64 `[B, T]`, a row for each stream, at least 2 tokens.
            through: False: its inner gradients and what is cached count as given, which is as cheap as a
                reach of 0. The outer gradient still reaches the scales of its updates, and crosses them to
                earlier ones.

        Returns:
            Nats of each token but the first, `[B, T - 1]`, as predicted before it changed any weight; without
            a graph, if not through, so that of each chunk only what it changed stays in memory.
        """
        if input_ids.dim() != 2 or input_ids.shape[0] != self.streams or input_ids.shape[1] < 2:
            raise ShapeError(
                f"the tokens have shape {list(input_ids.shape)}; give [{self.streams}, T] with at least two"
            )
        state, losses = self._unread(), []
        for chunk, targets in self._chunks(input_ids):
            # Of what outer training does not learn a gradient is wanted all the same.
            weights = {
                name: one if one.requires_grad else one.detach().requires_grad_()
                for name, one in self._learned().items()
            }
            with self._attention():
                logits, state = self._run(weights, chunk, state)
            wide = torch.promote_types(logits.dtype, torch.float32)
            nats = F.cross_entropy(logits.to(wide).flatten(0, 1), targets.flatten(), reduction="none")
            losses.append((nats if through else nats.detach()).view_as(targets))
            self._learn(weights, nats.sum(), targets.shape[1], through and self._reach != 0)
            state = state if self._caches and through else state.detach()
        for one in self._learning:
            if one.spec.reset == "context":
                one.reset()
        return torch.cat(losses, 1)

    def logits(self, input_ids: Tensor) -> Tensor:
        """What the models as they are now predict of texts that stand alone: int64 `[B, N, T]` to
        `[B, N, T, V]`. Nothing is learned."""
        if input_ids.dim() != 3 or input_ids.shape[0] != self.streams:
            raise ShapeError(f"the texts have shape {list(input_ids.shape)}; give [{self.streams}, N, T]")

        def ask(weights: Tensors, ids: Tensor) -> Tensor:
            every = {**self._begin, **weights}
            return functional_call(self.model, every, (ids,), {"use_cache": False}).logits

        learned = self._learned()
        with self._attention():
            if self.streams == 1:
                return ask(self._all(learned), input_ids[0])[None]
            return vmap(ask)(learned, input_ids)

    def detach(self, scales: Mapping[str, Tensor] | None = None) -> None:
        """What was learned so far counts as given from here on, as in truncated back-propagation: the streams
        go on, with other initial weights and scales if outer training has changed them."""
        for one in self._learning:
            one.detach(self._begin, (scales or {}).get(one.spec.name))

    def weights(self, stream: int = 0) -> Tensors:
        """Parameters by name, with what a stream has learned."""
        return self._all(self._learned(), stream)

    def _learned(self) -> Tensors:
        """Parameters of levels, `[B, ...]`."""
        return {
            name: self._begin[name] + sum(one.delta(name) for one in self._learning if name in one.names)
            for name in self._names
        }

    def _chunks(self, ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens and those that follow them, cut where the shortest period ends."""
        start, last = 0, ids.shape[1] - 1
        while start < last:
            end = min(start + self._base - self._clock % self._base, last)
            yield ids[:, start:end], ids[:, start + 1 : end + 1]
            start = end

    def _learn(self, weights: Tensors, loss: Tensor, tokens: int, through: bool) -> None:
        """Gradients of a chunk, which levels take in; those that are due make their steps, all at once."""
        with torch.enable_grad():
            found = torch.autograd.grad(
                loss, [weights[name] for name in self._names], create_graph=through,
                retain_graph=True,
            )  # fmt: skip
            gradients = dict(zip(self._names, found, strict=True))
            self._clock += tokens
            for one in self._learning:
                one.take(gradients, tokens)
            for one in self._learning:
                if one.spec.due(self._clock):
                    one.update()

    def _attention(self) -> AbstractContextManager[object]:
        # Of PyTorch's attention only this form can be differentiated twice, or runs under vmap as one.
        return nullcontext() if self._reach == 0 and self.streams == 1 else sdpa_kernel(SDPBackend.MATH)

    def _unread(self) -> State:
        """The State of a stream that has read nothing; of several the tensors are `[B, 1, ...]`."""
        one = self._reader.initial_state(1)
        if self.streams == 1:
            return one
        layers = {
            index: {name: x.expand(self.streams, *x.shape) for name, x in layer.items()}
            for index, layer in one.layers.items()
        }
        return State(layers, one.clock)

    def _run(self, weights: Tensors, ids: Tensor, state: State) -> tuple[Tensor, State]:
        """Logits `[B, T, V]` and the State after the tokens `[B, T]`."""
        if self.streams == 1:
            return self._reader(self._all(weights), ids, state)

        def read(own: Tensors, ids: Tensor, layers: dict[int, Tensors]) -> tuple[Tensor, dict[int, Tensors]]:
            logits, after = self._reader({**self._begin, **own}, ids[None], State(layers, state.clock))
            return logits[0], after.layers

        logits, layers = vmap(read)(weights, ids, state.layers)
        return logits, State(layers, state.clock + ids.shape[1])

    def _all(self, weights: Tensors, stream: int = 0) -> Tensors:
        return {**self._begin, **{name: one[stream] for name, one in weights.items()}}


class _Unrolled:
    """What a level has become in each stream, in the graph. Tensors are `[B, ...]`."""

    def __init__(
        self,
        level: Level,
        begin: Mapping[str, Tensor],
        scale: Tensor | None,
        reach: int | None,
        streams: int,
    ) -> None:
        self.spec, self.scale, self.reach, self.names = level, scale, reach, frozenset(level.parameters)
        self.whole, self.streams = _norm(begin, level), streams
        self.zeros = {
            name: torch.zeros_like(begin[name]).expand(streams, *begin[name].shape)
            for name in level.parameters
        }
        self.gradients, self.count, self.updates = dict(self.zeros), 0, 0
        self.reset()

    def reset(self) -> None:
        slots = OPTIMIZERS[self.spec.optimizer][1]
        self.older, self.recent = dict(self.zeros), list[Tensors]()
        self.slots: Slots = {slot: list(self.zeros.values()) for slot in slots}

    def detach(self, begin: Mapping[str, Tensor], scale: Tensor | None) -> None:
        self.older, self.recent = {name: self.delta(name).detach() for name in self.zeros}, []
        self.gradients = {name: g.detach() for name, g in self.gradients.items()}
        self.slots = _detached(self.slots)
        self.scale, self.whole = scale, _norm(begin, self.spec)

    def delta(self, name: str) -> Tensor:
        """What the level has added to a parameter."""
        return self.older[name] + sum(change[name] for change in self.recent)

    def take(self, gradients: Mapping[str, Tensor], tokens: int) -> None:
        """Add a chunk's gradients to those that wait."""
        self.gradients = {name: g + gradients[name] for name, g in self.gradients.items()}
        self.count += tokens

    def update(self) -> None:
        """The level's step, of each stream by itself."""
        steps, slots = zip(*(self._step(stream) for stream in range(self.streams)), strict=True)
        changes = {name: torch.stack([one[n] for one in steps]) for n, name in enumerate(self.gradients)}
        self.slots = {
            slot: [torch.stack(parts) for parts in zip(*(one[slot] for one in slots), strict=True)]
            for slot in self.slots
        }
        if self.reach is not None:
            self.slots = _detached(self.slots)
        self.recent.append(changes)
        if self.reach is not None and len(self.recent) > self.reach:
            oldest = self.recent.pop(0)
            self.older = {name: x + oldest[name].detach() for name, x in self.older.items()}
        self.updates += 1
        self.gradients, self.count = dict(self.zeros), 0
        if isinstance(self.spec.reset, int) and self.updates % self.spec.reset == 0:
            self.reset()

    def _step(self, stream: int) -> tuple[list[Tensor], Slots]:
        gradients = [g[stream] for g in self.gradients.values()]
        slots = {slot: [x[stream] for x in kept] for slot, kept in self.slots.items()}
        step = level_step(self.spec, gradients, self.count, slots, self.updates, self.whole, self.scale)
        # PyTorch's product of many tensors with one has no gradient for that one.
        changes = step.changes if step.factor is None else [x * step.factor for x in step.changes]
        return changes, step.slots


def _norm(begin: Mapping[str, Tensor], level: Level) -> Tensor:
    """Of the weights of a level."""
    return get_total_norm([begin[name].detach() for name in level.parameters])


def _detached(slots: Slots) -> Slots:
    return {slot: [x.detach() for x in kept] for slot, kept in slots.items()}
