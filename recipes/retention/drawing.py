"""Streams to learn from: a session of facts, a gap of other text, and questions for when both are gone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nestor.data.tasks import FillerText, Session, SessionSpec
from nestor.data.tasks.sessions import STREAMS
from nestor.data.tokenizers import encode_text
from nestor.data.windows import windows
from nestor.errors import ConfigError
from nestor.evaluation.retention.questions import answer_row


@dataclass(frozen=True)
class Streams:
    """B streams in step.

    Attributes:
        session, gap: documents, int64 `[B, T]` each, of whole chunks and a token to begin; they are read one
            after another, and the context is closed after each.
        questions: int64 `[B, N, T]`, each a text of its own, with the right answer; filled up at the end.
        answers: bool `[B, N, T]`, the answer's tokens.
        asked: of each stream, the session that is asked about.
    """

    session: list[Tensor]
    gap: list[Tensor]
    questions: Tensor
    answers: Tensor
    asked: list[Session]

    def split(self, size: int) -> Iterator[Streams]:
        """`size` streams at a time."""
        for begin in range(0, len(self.asked), size):
            rows = slice(begin, begin + size)
            yield Streams(
                [one[rows] for one in self.session],
                [one[rows] for one in self.gap],
                self.questions[rows],
                self.answers[rows],
                self.asked[rows],
            )

    def to(self, device: torch.device) -> Streams:
        return Streams(
            [one.to(device) for one in self.session],
            [one.to(device) for one in self.gap],
            self.questions.to(device),
            self.answers.to(device),
            self.asked,
        )


@dataclass(frozen=True)
class Drawer:
    """Draws streams in a model's tokens.

    Attributes:
        base: tokens of the shortest period. context: the most tokens of a document.
        prefix: tokens in front of every question. kinds: of questions, as the suite has them.
    """

    spec: SessionSpec
    filler: FillerText
    tokenizer: Any
    prefix: Sequence[int]
    base: int
    context: int
    kinds: Sequence[str] = ("seen",)

    def __post_init__(self) -> None:
        if self.context <= self.base:
            raise ConfigError(
                f"the model reads {self.context} tokens together, and the shortest period has {self.base}; "
                f"give a shorter one"
            )

    def draw(self, seeds: Sequence[int], gap: int, stream: str = "training") -> Streams:
        """A stream for each seed: its session, filled up with other text to the length of the longest, and a
        gap of so many base chunks. stream: as for `SessionSpec.draw`."""
        asked = [self.spec.draw(self.filler, seed, stream)[0] for seed in seeds]
        texts = [encode_text(self.tokenizer, session.text) for session in asked]
        chunks = max(-(-(len(ids) - 1) // self.base) for ids in texts)
        sessions, gaps = [], []
        for seed, ids in zip(seeds, texts, strict=True):
            rng = np.random.default_rng([STREAMS.index(stream), 2, seed])
            sessions.append(ids + self._other(rng, chunks * self.base + 1 - len(ids)))
            gaps.append(self._other(rng, gap * self.base + 1))
        return Streams(self._documents(sessions), self._documents(gaps), *self._questions(asked), asked)

    def _documents(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Rows of one length, cut into what the model reads together."""
        room = (self.context - 1) // self.base * self.base + 1
        cut = zip(*(windows(row, room) for row in rows), strict=True)
        return [torch.tensor(parts) for parts in cut]

    def _other(self, rng: np.random.Generator, tokens: int) -> list[int]:
        ids: list[int] = []
        while len(ids) < tokens:
            ids += encode_text(self.tokenizer, self.filler.text(rng, 4 * (tokens - len(ids))))
        return ids[:tokens]

    def _questions(self, asked: Sequence[Session]) -> tuple[Tensor, Tensor]:
        found = []
        for session in asked:
            questions = [q for kind in self.kinds for q in session.questions(kind)]
            found.append(
                [
                    answer_row(self.tokenizer, encode_text(self.tokenizer, q.text), q.text + q.answers[0])
                    for q in questions
                ]
            )
        lead = len(self.prefix)
        width = lead + max(len(row.ids) for rows in found for row in rows)
        ids = torch.zeros(len(found), len(found[0]), width, dtype=torch.int64)
        answers = torch.zeros(ids.shape, dtype=torch.bool)
        for stream, rows in enumerate(found):
            for number, row in enumerate(rows):
                ids[stream, number, : lead + len(row.ids)] = torch.tensor([*self.prefix, *row.ids])
                answers[stream, number, max(1, lead + row.start) : lead + row.end] = True
        return ids, answers
