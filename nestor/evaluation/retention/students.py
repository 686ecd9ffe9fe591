"""Who reads the stream: models that learn, and those that have the material before them instead.

A student reads documents and is asked about sessions. Each gives a model to ask, a scratch copy in which
nothing is learned, and what is put in front of a question.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from nestor.data.tasks import Session
from nestor.data.tasks.sessions import Question
from nestor.data.windows import windows
from nestor.evaluation.retention.questions import statements_for
from nestor.evaluation.scoring import Progress
from nestor.learning import Learner
from nestor.models.state import State


class Student(Protocol):
    """tokens, again: predicted tokens of the stream, and of what was read again; seconds: spent on both."""

    tokens: int
    again: int
    seconds: float

    def study(self, ids: Sequence[int]) -> None:
        """Read a document of at least two tokens; afterwards its context is gone."""
        ...

    def model(self) -> Any:
        """The model to ask, as it is now. It is one scratch copy: the next call writes over it."""
        ...

    def material(self, read: Sequence[Session], session: Session, question: Question) -> str:
        """What is put in front of a question about a session. read: the sessions so far; nothing of others
        is shown."""
        ...


class Frozen:
    """A model that reads and learns nothing; with `shows`, the material is shown to it when it is asked.

    Args:
        shows: "nothing", "session" (its text, the in-context upper bound) or "statements" (those that share
            the question's rarest words, the retrieval upper bound).
    """

    def __init__(
        self, model: Any, context: int, shows: str = "nothing", progress: Progress | None = None
    ) -> None:
        self._model, self._context, self._shows, self._progress = model, context, shows, progress
        self.tokens, self.again, self.seconds = 0, 0, 0.0

    def study(self, ids: Sequence[int]) -> None:
        begin = time.perf_counter()
        if self._shows == "nothing":
            # Read for the time that it takes; what is shown later needs no reading now.
            with torch.inference_mode():
                for piece in windows(ids, self._context):
                    window = torch.tensor([piece], device=self._model.device)
                    self._model(input_ids=window)
                    if self._progress is not None:
                        self._progress(window.numel() - 1)
        self.tokens += len(ids) - 1
        self.seconds += time.perf_counter() - begin

    def model(self) -> Any:
        return self._model

    def material(self, read: Sequence[Session], session: Session, question: Question) -> str:
        if self._shows == "session":
            return session.text if session in read else ""
        if self._shows == "statements":
            stated = [line for one in read for fact in one.facts for line in fact.statements]
            return "".join(statements_for(question.text, stated))
        return ""


class Reader:
    """A Learner that reads documents in windows of what fits into its model's context.

    Windows begin with the last token of the one before, so that each token but a document's first is
    predicted once, and end where an update of the fastest level falls where that fits.

    Args:
        context: the most tokens of a window.
        replay: share of the tokens read that are read again, from windows drawn by `seed` among earlier ones.
        elastic: of the States before and after each chunk that is learned from (`Learner.study`), the one to
            go on from.
    """

    def __init__(
        self,
        learner: Learner,
        context: int,
        *,
        replay: float = 0.0,
        elastic: Callable[[State, State], State] | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        self.learner, self.state = learner, learner.start()
        self._context, self._replay, self._elastic, self._progress = context, replay, elastic, progress
        self._rng = np.random.default_rng([3, seed])
        self._earlier: list[list[int]] = []
        self._owed = 0.0
        self._clock = 0
        self._scratch: Any = None
        self.tokens, self.again, self.seconds = 0, 0, 0.0

    def study(self, ids: Sequence[int]) -> None:
        begin = time.perf_counter()
        ids, start = list(ids), 0
        while start < len(ids) - 1:
            window = ids[start : start + self._room()]
            self._read(window)
            start += len(window) - 1
            self.tokens += len(window) - 1
            if self._replay:
                self._rehearse(len(window) - 1)
                self._earlier.append(window)
            if self._progress is not None:
                self._progress(len(window) - 1)
        self.seconds += time.perf_counter() - begin

    def model(self) -> Any:
        if self._scratch is None:
            self._scratch = copy.deepcopy(self.learner.model).requires_grad_(False)
        self.learner.write(self.state, self._scratch)
        return self._scratch

    def without(self, level: str) -> Reader:
        """Another reader that goes on from here with the level of that name as it was at first; this one
        stays as it is."""
        other = copy.copy(self)
        other.state = self.learner.forget(self.state, level)
        other._rng, other._earlier = copy.deepcopy(self._rng), list(self._earlier)
        return other

    def material(self, read: Sequence[Session], session: Session, question: Question) -> str:
        return ""

    def _room(self) -> int:
        """Tokens of the next window."""
        most, base = self._context - 1, self.learner.base
        first = base - self._clock % base
        return 1 + (most if first > most else first + (most - first) // base * base)

    def _read(self, window: list[int]) -> None:
        ids = torch.tensor([window], device=self.state.device)
        self.state = self.learner.study(ids, self.state, after_chunk=self._elastic)
        self._clock += len(window) - 1

    def _rehearse(self, tokens: int) -> None:
        """Read again what is owed for so many new tokens, in whole periods of the fastest level where a
        window has one."""
        self._owed += self._replay * tokens
        base = self.learner.base
        while self._earlier and self._owed >= min(base, self._context - 1):
            window = self._earlier[int(self._rng.integers(len(self._earlier)))]
            wanted = int(self._owed) // base * base or int(self._owed)
            count = min(wanted, (len(window) - 1) // base * base or len(window) - 1)
            start = int(self._rng.integers(len(window) - count))
            self._read(window[start : start + count + 1])
            self._owed -= count
            self.again += count
