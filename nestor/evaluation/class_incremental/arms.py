"""What is compared: ways to read a session's examples, and then to say the class of a text.

- nearest: no model; the class of the example with the most words in common. What overlap alone tells.
- frozen: the model without examples.
- in-context: the frozen model with examples of all sessions in its context, those with the most words in
  common with the text, as many as fit, the nearest one last.
- online: all adaptive layers in one level with the shortest period; online-slow with the longest.
- continuum: the adaptive layers in as many levels as there are periods.
- replay: as online, and after an example, by chance, one of an earlier session is read again.

An example is a context of its own, `text -> label` and a line end, closed before the next one: later the
label is asked of a text without anything before it. The clock of levels runs on through all of them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from nestor.data.tasks.intents import Labelled, Session
from nestor.data.tokenizers import encode_text
from nestor.errors import ConfigError
from nestor.evaluation.class_incremental.settings import ClassIncremental
from nestor.evaluation.scoring import PIECE, Progress, score_choices
from nestor.evaluation.subjects import Subject
from nestor.learning import Learner, assign_levels


class Arm(Protocol):
    """One arm on one stream."""

    def read(self, session: Session) -> None:
        """Take in a session's examples."""
        ...

    def choose(self, text: str, labels: Sequence[str]) -> str:
        """The class of a text, one of `labels`."""
        ...

    def report(self) -> dict[str, Any]:
        """What learning did, JSON-able."""
        ...


class Nearest:
    """The class of the example of the greatest `overlap`; of equals, of the earliest."""

    def __init__(self) -> None:
        self.examples: list[Labelled] = []

    def read(self, session: Session) -> None:
        self.examples += session.examples

    def choose(self, text: str, labels: Sequence[str]) -> str:
        return max(self.examples, key=lambda one: overlap(one.text, text)).label

    def report(self) -> dict[str, Any]:
        return {}


class Frozen:
    """The model as it is, with nothing or with examples in front of the text."""

    def __init__(
        self,
        subject: Subject,
        settings: ClassIncremental,
        *,
        in_context: bool,
        batch_size: int = 64,
        piece: int = PIECE,
        progress: Progress | None = None,
    ) -> None:
        self.subject, self.settings, self.in_context = subject, settings, in_context
        self.batch_size, self.piece, self.progress = batch_size, piece, progress
        self.model = subject.model
        self.examples: list[Labelled] = []
        self.context = subject.context(settings.context)

    def read(self, session: Session) -> None:
        if self.in_context:
            self.examples += session.examples

    def choose(self, text: str, labels: Sequence[str]) -> str:
        prompt, answers = self.prompt(text), [self.answer(label) for label in labels]
        room = self.context - len(self.subject.prefix) - len(prompt) - max(map(len, answers))
        if room < 0:
            raise ConfigError(
                f"a text of {len(prompt)} tokens and the longest label do not fit into {self.context} "
                f"tokens; read fewer tokens of a text than {self.settings.text_tokens}"
            )
        bits = score_choices(
            self.model, [*self.demonstrations(text, room), *prompt], answers, prefix=self.subject.prefix,
            batch_size=self.batch_size, piece=self.piece, progress=self.progress,
        )  # fmt: skip
        return labels[int(bits.argmin())]

    def report(self) -> dict[str, Any]:
        return {}

    def prompt(self, text: str) -> list[int]:
        """Tokens of a text, cut where settings say, and of the arrow."""
        tokens = encode_text(self.subject.tokenizer, text)[: self.settings.text_tokens]
        return [*tokens, *encode_text(self.subject.tokenizer, " ->")]

    def answer(self, label: str) -> list[int]:
        """Tokens of a label and the line end, without which a label that begins another would win."""
        return encode_text(self.subject.tokenizer, f" {label}\n")

    def demonstrations(self, text: str, room: int) -> list[int]:
        """Tokens of the nearest examples that fit, the nearest last."""
        found: list[int] = []
        for one in sorted(self.examples, key=lambda one: -overlap(one.text, text)):
            line = [*self.prompt(one.text), *self.answer(one.label)]
            if len(line) + len(found) > room:
                break
            found = [*line, *found]
        return found


class Learning(Frozen):
    """A model whose levels learn from the examples; it is asked in a copy that no longer learns."""

    def __init__(
        self,
        subject: Subject,
        settings: ClassIncremental,
        *,
        periods: Sequence[int],
        learning_rate: float,
        replay: float,
        seed: int,
        **options: Any,
    ) -> None:
        super().__init__(subject, settings, in_context=False, **options)
        levels = assign_levels(
            subject.model, periods, [learning_rate] * len(periods), fixed=settings.fixed,
            optimizer=settings.optimizer, largest_update=settings.largest_update,
        )  # fmt: skip
        self.learner = Learner(subject.model, levels)
        self.state = self.learner.start()
        self.replay, self.rng = replay, np.random.default_rng((seed, 0x5EED))
        self.earlier: list[Labelled] = []
        self.tokens = 0
        # Parameters of a copy are written after each session; those of the model stay.
        self.model = copy.deepcopy(subject.model)

    def read(self, session: Session) -> None:
        for _ in range(self.settings.passes):
            for one in session.examples:
                self._line(one)
                if self.earlier and self.rng.random() < self.replay:
                    self._line(self.earlier[int(self.rng.integers(len(self.earlier)))])
        self.earlier += session.examples
        self.learner.write(self.state, self.model)

    def _line(self, one: Labelled) -> None:
        prompt, answer = self.prompt(one.text), self.answer(one.label)
        ids = torch.tensor([[*self.subject.prefix, *prompt, *answer]], device=self.model.device)
        weights = torch.full(ids.shape, self.settings.text_weight)
        weights[0, -len(answer) :] = 1.0
        # What came before was closed, so nothing of it is in the context.
        self.state = self.learner.study(ids, self.state, weights)
        self.tokens += ids.numel()
        if self.progress is not None:
            self.progress(ids.numel())

    def report(self) -> dict[str, Any]:
        levels = self.learner.report(self.state)[0]
        return {
            "tokens": self.tokens,
            "levels": [
                {"name": one.name, "period": one.period, "updates": one.updates, "change": one.change}
                for one in levels
            ],
        }


def make_arm(
    name: str,
    subject: Subject,
    settings: ClassIncremental,
    *,
    learning_rate: float,
    seed: int,
    **options: Any,
) -> Arm:
    """An arm of `ARMS`, before its first session. `learning_rate`: of those that learn."""
    if name == "nearest":
        return Nearest()
    if name in ("frozen", "in-context"):
        return Frozen(subject, settings, in_context=name == "in-context", **options)
    periods = {"continuum": settings.periods, "online-slow": settings.periods[-1:]}.get(
        name, settings.periods[:1]
    )
    replay = settings.replay if name == "replay" else 0.0
    return Learning(
        subject, settings, periods=periods, learning_rate=learning_rate, replay=replay, seed=seed, **options
    )


def overlap(first: str, second: str) -> float:
    """Words in common over all words of the two."""
    one, two = _words(first), _words(second)
    return len(one & two) / max(1, len(one | two))


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))
