"""From a task that makes documents to a stream of batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from nestor.data.streams import IGNORED, LaneStream, Piece, empty_piece
from nestor.errors import ConfigError, suggest

LOSS_ON = ("all", "answers")


@dataclass(frozen=True)
class Answer:
    """Where an answer stands: tokens `start .. end` of the document; `distance` tokens lie between the end
    of the last statement (or earlier answer) of what is asked and the beginning of the question."""

    start: int
    end: int
    distance: int


@dataclass(frozen=True)
class TaskDocument:
    """`ids` [n] int64 tokens; `weights` [n] float32, how much predicting the token counts in the loss (0: not
    at all); the answers in it."""

    ids: np.ndarray
    weights: np.ndarray
    answers: tuple[Answer, ...]


class Task(Protocol):
    """Makes documents of exactly `document_length` tokens, each determined by `rng`."""

    document_length: int

    def document(self, rng: np.random.Generator) -> TaskDocument: ...

    def identity(self) -> dict[str, Any]:
        """What the documents depend on, JSON-able."""
        ...


class TaskStream(LaneStream):
    """Endless documents of a task as contiguous lanes; document i is a function of `seed` and i alone.

    Lane b holds documents b, b + B, b + 2B ... (B is `batch_size`) one after the other, each with a reset
    at its first token, so documents are longer or shorter than a segment as they like. The last token of a
    document has the label `eos` if its other tokens all count, else -100."""

    def __init__(
        self,
        task: Task,
        batch_size: int,
        length: int,
        *,
        eos: int | None = None,
        seed: int = 0,
        lanes: Sequence[int] | None = None,
    ) -> None:
        super().__init__(batch_size, length, lanes)
        self.task = task
        self.eos = eos
        self.seed = seed
        self._current: dict[int, tuple[int, TaskDocument]] = {}

    def document(self, index: int) -> TaskDocument:
        """Document number `index` of the stream."""
        return self.task.document(np.random.default_rng((self.seed, index)))

    def identity(self) -> dict[str, Any]:
        return {
            "kind": "task",
            "task": self.task.identity(),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "eos": self.eos,
        }

    def _read(self, lane: int, start: int, length: int) -> Piece:
        ids, labels, resets, weights = empty_piece(length)
        done = 0
        while done < length:
            turn, inside = divmod(start + done, self.task.document_length)
            document = self._document_of(lane, turn)
            count = min(length - done, self.task.document_length - inside)
            here = slice(done, done + count)
            ids[here] = document.ids[inside : inside + count]
            labels[here] = self._labels(document)[inside : inside + count]
            weights[here] = np.append(document.weights[1:], np.float32(1.0))[inside : inside + count]
            resets[done] |= inside == 0
            done += count
        return ids, labels, resets, weights

    def _document_of(self, lane: int, turn: int) -> TaskDocument:
        if self._current.get(lane, (-1, None))[0] != turn:
            self._current[lane] = (turn, self.document(turn * self.batch_size + lane))
        return self._current[lane][1]

    def _labels(self, document: TaskDocument) -> np.ndarray:
        counted = document.weights[1:] > 0
        everything = bool(counted.all())
        last = self.eos if everything and self.eos is not None else IGNORED
        labels = np.append(document.ids[1:], last)
        labels[:-1][~counted] = IGNORED
        return labels


def check_loss_on(loss_on: str) -> str:
    """`loss_on` if it is a known choice.

    Raises:
        ConfigError: it is not.
    """
    if loss_on not in LOSS_ON:
        raise ConfigError(
            f"loss_on is {loss_on!r}; it is one of {', '.join(LOSS_ON)}. {suggest(loss_on, LOSS_ON)}"
        )
    return loss_on


def loss_weights(length: int, answers: Sequence[Answer], loss_on: str, answer_weight: float) -> np.ndarray:
    """`TaskDocument.weights` [length]: `answer_weight` in answers; else 1, or 0 if only answers count."""
    weights = np.full(length, float(loss_on == "all"), np.float32)
    for answer in answers:
        weights[answer.start : answer.end] = answer_weight
    return weights


def check_answer_weight(answer_weight: float) -> float:
    """`answer_weight` if it is above 0.

    Raises:
        ConfigError: it is not.
    """
    if not answer_weight > 0:
        raise ConfigError(f"answer_weight is {answer_weight}; it must be above 0")
    return float(answer_weight)
