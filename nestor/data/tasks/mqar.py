"""Multi-query associative recall over plain tokens (Arora et al. 2023, arXiv:2312.04927)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nestor.data.tasks.stream import Answer, TaskDocument, check_loss_on, loss_weights
from nestor.errors import ConfigError


class MqarTask:
    """Key-value pairs, then every key again, in random gaps, each followed by its value.

    The first `vocab_size // 3` ids are keys, the next third values, the rest filler. A document is `k1 v1
    k2 v2 ... kn vn` followed by filler tokens among which each key occurs once more, then its value: the
    prediction of that value is the answer. The gap between a pair and its query is drawn log-uniformly from
    `distances` and moved to the nearest free place. No key or value occurs twice among the pairs.

    Args:
        vocab_size: ids used are 0 .. vocab_size - 1 (256 for a byte model).
        n_pairs: pairs of a document.
        document_length: tokens of a document.
        distances: least and greatest number of tokens between pair and query; the greatest defaults to the
            document.
        loss_on: `"answers"` counts only the values after queries, `"all"` every token.

    Raises:
        ConfigError: the vocabulary or the document is too small for the pairs.
    """

    def __init__(
        self,
        vocab_size: int,
        n_pairs: int,
        document_length: int,
        *,
        distances: tuple[int, int | None] = (1, None),
        loss_on: str = "answers",
    ) -> None:
        third = vocab_size // 3
        if n_pairs < 1 or n_pairs > third:
            raise ConfigError(
                f"n_pairs is {n_pairs}; a vocabulary of {vocab_size} has {third} keys and as many values, "
                f"so 1 to {third} pairs are possible"
            )
        if document_length < 4 * n_pairs:
            raise ConfigError(
                f"document_length is {document_length}; {n_pairs} pairs and their queries "
                f"take {4 * n_pairs} tokens"
            )
        low, high = distances
        if low < 1 or (high is not None and high < low):
            raise ConfigError(f"distances are {distances}; they must be at least 1 and in order")
        self.vocab_size, self.n_pairs, self.document_length = vocab_size, n_pairs, document_length
        self.distances = (low, high)
        self.loss_on = check_loss_on(loss_on)

    def identity(self) -> dict[str, Any]:
        return {
            "name": "mqar",
            "vocab_size": self.vocab_size,
            "n_pairs": self.n_pairs,
            "document_length": self.document_length,
            "distances": list(self.distances),
            "loss_on": self.loss_on,
        }

    def document(self, rng: np.random.Generator) -> TaskDocument:
        """Draw one document. An answer's `distance` counts the tokens between its pair and its query."""
        third, n = self.vocab_size // 3, self.n_pairs
        keys = rng.choice(third, n, replace=False)
        values = third + rng.choice(third, n, replace=False)
        ids = rng.integers(2 * third, self.vocab_size, self.document_length)
        ids[0 : 2 * n : 2], ids[1 : 2 * n : 2] = keys, values
        low, high = self.distances
        high = min(high or self.document_length, self.document_length)
        order = rng.permutation(n)
        gaps = np.exp(rng.uniform(np.log(low), np.log(max(high, low + 1)), n))
        free = _FreeSlots((self.document_length - 2 * n) // 2)
        slots = np.array([free.take(wanted) for wanted in ((2 * order + 2 + gaps - 2 * n) / 2).tolist()])
        queries = 2 * n + 2 * slots
        ids[queries], ids[queries + 1] = keys[order], values[order]
        answers = [
            Answer(query + 1, query + 2, query - (2 * pair + 2))
            for query, pair in zip(queries.tolist(), order.tolist(), strict=True)
        ]
        answers.sort(key=lambda answer: answer.start)
        weights = loss_weights(self.document_length, answers, self.loss_on, 1.0)
        return TaskDocument(ids, weights, tuple(answers))


class _FreeSlots:
    """Places 0 .. count - 1 that are taken one after another.

    `_before[i]` leads to the last free place below i, and `_after[i]` to the first from i on; paths are
    shortened when they are walked, so that a full document costs little more than an empty one."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._before, self._after = list(range(count + 1)), list(range(count + 1))

    def take(self, wanted: float) -> int:
        """The free place nearest to `wanted`, the lower one of two; it is free no more."""
        middle = min(max(math.floor(wanted) + 1, 0), self._count)
        before, after = _walk(self._before, middle) - 1, _walk(self._after, middle)
        slot = before
        if before < 0 or (after < self._count and after - wanted < wanted - before):
            slot = after
        self._before[slot + 1] = slot
        self._after[slot] = slot + 1
        return slot


def _walk(links: list[int], start: int) -> int:
    end = start
    while links[end] != end:
        end = links[end]
    while links[start] != end:
        links[start], start = end, links[start]
    return end
