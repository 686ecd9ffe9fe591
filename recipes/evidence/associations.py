"""Multi-query associative recall of several numbers of pairs: what models are trained on, and scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, islice
from typing import Any

import numpy as np
from gradients import precision

from nestor.data import Batch
from nestor.data.tasks import MqarTask, TaskDocument, TaskStream
from nestor.errors import ConfigError, NonFiniteError
from nestor.evaluation.scoring import PIECE, Row, score_rows
from nestor.evaluation.statistics import ratio_intervals

#: What random numbers are for, so that none are used twice; training has the seed of its run in front.
VALIDATION, TEST = 1, 2
#: Tokens that are read in one call when models are scored, about.
AT_ONCE = 1 << 16
#: Short rows of a batch for one long one.
SHORT_ROWS = 4
#: The first seed of short documents.
SHORT_SEEDS = 1 << 32


@dataclass(frozen=True)
class Mixture:
    """Documents of one length with one of several numbers of pairs each, drawn evenly.

    Only answers are learned. Documents count the same, whatever the number of their answers: else a document
    of 256 pairs would count as much as 64 of 4.
    """

    pairs: tuple[int, ...]
    vocabulary: int
    document_length: int

    def document(self, rng: np.random.Generator) -> TaskDocument:
        count = self.pairs[int(rng.integers(len(self.pairs)))]
        made = MqarTask(self.vocabulary, count, self.document_length).document(rng)
        return replace(made, weights=made.weights / np.float32(count))

    def identity(self) -> dict[str, Any]:
        return {
            "name": "mqar", "pairs": list(self.pairs), "vocabulary": self.vocabulary,
            "length": self.document_length,
        }  # fmt: skip


@dataclass(frozen=True)
class Associations:
    """The mixture as a `runs.Reading`: a document a row.

    The first `short_steps` batches have `SHORT_ROWS` times as many rows of `short_length` tokens, with those
    numbers of pairs that these have room for: what recall is, is learned much sooner where pairs are near.
    """

    pairs: tuple[int, ...]
    vocabulary: int
    short_steps: int = 0
    short_length: int = 64

    def batches(self, seed: int, batch_size: int, length: int) -> Iterator[Batch]:
        """Raises ConfigError: rows are too short for the pairs."""
        long = TaskStream(Mixture(self.pairs, self.vocabulary, length), batch_size, length, seed=seed)
        if not self.short_steps:
            return long
        pairs = tuple(count for count in self.pairs if 4 * count <= self.short_length)
        if not pairs:
            raise ConfigError(
                f"documents of {self.short_length} tokens have room for {self.short_length // 4} pairs, and "
                f"there are {list(self.pairs)}; give longer ones, or none"
            )
        mixture = Mixture(pairs, self.vocabulary, self.short_length)
        # Beside the seeds of long documents, so that these are the same after any number of short ones.
        short = TaskStream(mixture, SHORT_ROWS * batch_size, self.short_length, seed=SHORT_SEEDS + seed)
        return chain(islice(short, self.short_steps), long)

    def identity(self) -> dict[str, Any]:
        """The rows' length is a setting of the run."""
        short = {"short_steps": self.short_steps, "short_length": self.short_length}
        return {"kind": "mqar", "pairs": list(self.pairs), "vocabulary": self.vocabulary} | (
            short if self.short_steps else {}
        )


@dataclass(frozen=True)
class Question:
    """Documents that are alike. far: keys are asked in the second half only, as far from their pairs as the
    length allows; otherwise as in training."""

    pairs: int
    length: int
    far: bool = False


@dataclass(frozen=True)
class Answers:
    """A measure of `study.Maker`: for each question the share of right answers and their bits.

    Attributes:
        count: documents of a question.
        purpose: VALIDATION or TEST. The first has `valid` in its result: the mean bits of an answer, every
            question counting the same. In the second a question whose scores are no numbers has None.
        key: what the scores are called in the result.
    """

    questions: tuple[Question, ...]
    vocabulary: int
    count: int
    purpose: int
    key: str = "answers"

    def __call__(self, model: Any, device: str) -> dict[str, Any]:
        found = []
        for question in self.questions:
            documents = drawn(question, self.vocabulary, self.count, self.purpose)
            try:
                scores = scored(model, documents, device)
            except NonFiniteError:
                if self.purpose == VALIDATION:
                    raise
                scores = {"accuracy": None, "bits": None, "asked": 0}
            found.append({"pairs": question.pairs, "length": question.length, **scores})
        result: dict[str, Any] = {self.key: found}
        if self.purpose == VALIDATION:
            result["valid"] = float(np.mean([one["bits"] for one in found]))
        return result


@lru_cache(maxsize=64)
def drawn(question: Question, vocabulary: int, count: int, purpose: int) -> list[TaskDocument]:
    """The same documents for all models and seeds."""
    nearest = question.length // 2 if question.far else 1
    task = MqarTask(vocabulary, question.pairs, question.length, distances=(nearest, None))
    seed = (purpose, question.pairs, question.length)
    return [task.document(np.random.default_rng((*seed, number))) for number in range(count)]


def scored(model: Any, documents: Sequence[TaskDocument], device: str) -> dict[str, Any]:
    """Accuracy with an interval over documents (answers of one document share a context), and bits."""
    length = len(documents[0].ids)
    rows = [Row(one.ids.tolist(), 1, length) for one in documents]
    with precision(device):
        read = score_rows(model, rows, batch_size=max(1, AT_ONCE // min(length, PIECE)), piece=PIECE)
    right, asked, bits = [], [], []
    for document, (row_bits, row_right) in zip(documents, read, strict=True):
        # Scores begin at token 1.
        places = [answer.start - 1 for answer in document.answers]
        right.append(int(row_right[places].sum()))
        bits.append(float(row_bits[places].sum()))
        asked.append(len(places))
    accuracy = ratio_intervals(right, asked)[0].as_dict()
    return {"accuracy": accuracy, "bits": sum(bits) / sum(asked), "asked": sum(asked)}
