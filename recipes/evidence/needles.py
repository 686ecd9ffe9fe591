"""Needles in novels: what models are trained on, and how often they give back what was hidden.

A text of training has one to eight secrets (a pass key, or numbers or words kept for nouns), each stated in
one place and asked for in a later one, both anywhere. Answers are learned, and the rest of the text a little:
what models of bytes have to know of text is learned from it, and the answers are few. In a test one secret is
stated, alone or among others, and the question is the end of the text.

Nouns are the same in training and test, but novels are not, nor what is kept for what: what is tested is
recall, and not whether words can be spelt that were never seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from gradients import precision
from novels import corpus

from nestor.data import Batch, ByteTokenizer
from nestor.data.tasks import (
    Answer,
    CorpusHaystack,
    Haystack,
    Secret,
    TaskDocument,
    TaskStream,
    draw_secrets,
)
from nestor.data.tasks.haystack import as_lines, breaks
from nestor.data.tasks.stream import loss_weights
from nestor.errors import ConfigError, NonFiniteError
from nestor.evaluation.needle import DEPTHS, NeedleProbe, draw_needles
from nestor.evaluation.scoring import PIECE, Row, score_rows
from nestor.evaluation.statistics import wilson_interval

#: Kinds of needle, and how many are in a text of training.
KINDS, COUNTS = ("passkey", "number", "word"), (1, 2, 4, 8)
#: How much a byte of text counts in the loss, where one of an answer counts 1.
TEXT_WEIGHT = 0.01
#: Tests: the kind that is asked for, and how many others there are.
VARIANTS = {
    "pass key": ("passkey", 0), "number": ("number", 0), "word": ("word", 0),
    "number of 4": ("number", 3), "word of 4": ("word", 3),
}  # fmt: skip
#: Bytes that are read in one call when models are scored, and rows at most, whose caches are kept.
AT_ONCE, ROWS = 1 << 16, 32
#: Seeds of the needles that learning rates are chosen by, and of those that are reported.
VALIDATION, TEST = 1, 2


@dataclass(frozen=True)
class Secrets:
    """A task of `nestor.data.tasks.TaskStream`."""

    haystack: Haystack
    document_length: int

    def identity(self) -> dict[str, Any]:
        return {"name": "needles", "length": self.document_length}

    def document(self, rng: np.random.Generator) -> TaskDocument:
        """Raises ConfigError: there is no room for the secrets."""
        kind = KINDS[int(rng.integers(len(KINDS)))]
        count = 1 if kind == "passkey" else COUNTS[int(rng.integers(len(COUNTS)))]
        secrets = draw_secrets(rng, kind, count)
        pieces = self._pieces(rng, secrets)
        ids, answers = bytearray(), []
        stated: dict[str, int] = {}
        for text, answered in pieces:
            start = len(ids)
            ids += text.encode()
            if answered is None:
                continue
            if answered.word not in stated:
                stated[answered.word] = len(ids)
            else:
                first = start + len(answered.question.encode())
                answers.append(Answer(first, first + len(answered.answer), start - stated[answered.word]))
        tokens = np.frombuffer(bytes(ids[: self.document_length]), np.uint8).astype(np.int64)
        weights = loss_weights(self.document_length, answers, "answers", 1.0)
        return TaskDocument(tokens, np.maximum(weights, np.float32(TEXT_WEIGHT)), tuple(answers))

    def _pieces(self, rng: np.random.Generator, secrets: list[Secret]) -> list[tuple[str, Secret | None]]:
        """Text in its order, with the secret that a statement or a question is about."""
        added = sum(len(one.statement) + len(one.question) + len(one.answer) + 1 for one in secrets)
        # Every place may gain a line end.
        room = self.document_length - added - 4 * len(secrets)
        if room < 0:
            raise ConfigError(
                f"rows have {self.document_length} bytes; {len(secrets)} secrets and their questions alone "
                f"take {self.document_length - room}"
            )
        text = self.haystack.text(rng, self.document_length)
        allowed = breaks(text)
        ends = np.cumsum([len(part.encode()) for part in _between(text, allowed)])
        allowed = allowed[: 1 + int(np.searchsorted(ends, room, side="right"))]
        inserted = []
        for secret in secrets:
            stated, asked = sorted(int(allowed[i]) for i in rng.integers(len(allowed), size=2))
            tie = float(rng.random())
            # Of what comes to the same place statements are before questions.
            inserted += [(stated, 0, tie, secret.statement, secret)]
            inserted += [(asked, 1, tie, f"{secret.question}{secret.answer}\n", secret)]
        pieces: list[tuple[str, Secret | None]] = []
        start = 0
        for place, _, _, addition, secret in sorted(inserted, key=lambda one: one[:3]):
            pieces += [(as_lines(text[start:place]), None), (addition, secret)]
            start = place
        return [*pieces, (text[start:], None)]


def _between(text: str, places: np.ndarray) -> list[str]:
    """The parts of the text between places that follow each other."""
    return [text[first:last] for first, last in pairwise(places.tolist())]


@dataclass(frozen=True)
class Needles:
    """The task in the text of files, as a `runs.Reading`: a document a row."""

    files: tuple[str, ...]

    def batches(self, seed: int, batch_size: int, length: int) -> Iterator[Batch]:
        """Raises ConfigError: rows are too short. DataError: no such file."""
        haystack = CorpusHaystack(corpus(self.files), ByteTokenizer())
        return TaskStream(Secrets(haystack, length), batch_size, length, seed=seed)

    def identity(self) -> dict[str, Any]:
        """The text by its content, and what is hidden in it."""
        return {
            "kind": "needles", "text": corpus(self.files).identity, "kinds": list(KINDS),
            "counts": list(COUNTS), "text_weight": TEXT_WEIGHT,
        }  # fmt: skip


@dataclass(frozen=True)
class Found:
    """A measure of `study.Maker`: the share of needles of which every byte is the likeliest one.

    Attributes:
        file: with the novels that they are hidden in.
        count: needles of a variant, length and depth.
        seed: VALIDATION or TEST. The first has `valid` in its result: the mean bits of an answer's byte. In
            the second lengths whose scores are no numbers have None.
    """

    file: str
    lengths: tuple[int, ...]
    count: int
    seed: int

    def __call__(self, model: Any, device: str) -> dict[str, Any]:
        found, bits = [], []
        for variant in VARIANTS:
            for length in self.lengths:
                probes = hidden(self.file, variant, length, self.count, self.seed)
                rows = [Row(one.ids.tolist(), one.start, len(one.ids)) for one in probes]
                batch_size = max(1, min(ROWS, AT_ONCE // min(length, PIECE)))
                try:
                    with precision(device):
                        scored = score_rows(model, rows, batch_size=batch_size, piece=PIECE)
                except NonFiniteError:
                    if self.seed == VALIDATION:
                        raise
                    found.append({"variant": variant, "length": length, "exact": None, "by_depth": None})
                    continue
                right = [bool(correct.all()) for _, correct in scored]
                depths = [probe.depth for probe in probes]
                bits += [float(row.mean()) for row, _ in scored]
                found.append(
                    {
                        "variant": variant, "length": length,
                        "exact": wilson_interval(sum(right), len(right)).as_dict(),
                        "by_depth": [
                            sum(r for r, d in zip(right, depths, strict=True) if d == depth) / self.count
                            for depth in DEPTHS
                        ],
                    }
                )  # fmt: skip
        result: dict[str, Any] = {"needles": found}
        if self.seed == VALIDATION:
            result["valid"] = float(np.mean(bits))
        return result


@lru_cache(maxsize=64)
def hidden(file: str, variant: str, length: int, count: int, seed: int) -> list[NeedleProbe]:
    """The same needles for all models and seeds, `count` at each of `DEPTHS`."""
    kind, others = VARIANTS[variant]
    haystack = CorpusHaystack(corpus((file,)), ByteTokenizer())
    return draw_needles(haystack, (length,), count, variants=(kind,), seeds=(seed,), others=others)
