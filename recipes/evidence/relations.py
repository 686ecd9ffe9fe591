"""Recall of values that are a function of their keys: of keys that were shown, and of keys that were not.

A key is a token of 8 bits and a value one of 4. Each document draws a function of its own (a relation), shows
it on some keys, `k v k v ...`, and then asks for keys, `k _ k _ ...`: for some that were shown, which takes a
memory of pairs, and for others, which takes one of the function. Where an answer is due the value itself is
never read, so no question helps with another. Relations, each a function for every bit of the value:

    linear   sign(W x): what one matrix can hold
    xor      x_i x_j for a pair of bits i, j: linear in the products of two bits, of which there are 28
    network  sign(W_2 tanh(W_1 x)), a network of 8 hidden units
    random   any value for every key: of keys that were not shown nothing is known, and none is asked for

Bits x are +1 or -1. Models may learn what to make of a key token, so a linear memory is not one that is
linear in bits: which features of keys it needs for a relation is for the training to find.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from gradients import precision
from numpy.typing import NDArray
from torch.nn import functional as F

from nestor.data import Batch
from nestor.data.streams import IGNORED, as_batch, empty_piece
from nestor.errors import ConfigError, NonFiniteError

KEY_BITS, VALUE_BITS, HIDDEN = 8, 4, 8
KEYS, VALUES = 2**KEY_BITS, 2**VALUE_BITS
#: Tokens: keys, then values, then what stands where an answer is due.
BLANK = KEYS + VALUES
VOCABULARY = BLANK + 1
RELATIONS = ("linear", "xor", "network", "random")
#: What random numbers are for, so that none are used twice; training has the seed of its run in front.
VALIDATION, TEST = 1, 2
#: Documents that are scored at the same time.
ROWS = 64

_BITS = 2.0 * ((np.arange(KEYS)[:, None] >> np.arange(KEY_BITS)) & 1) - 1.0


@dataclass(frozen=True)
class Relation:
    """A kind of document.

    Attributes:
        name: one of RELATIONS.
        pairs: numbers of keys that are shown, one of which each document draws.
        asked: keys that are asked for, of those that were shown (all if there are fewer) and of others.
    """

    name: str
    pairs: tuple[int, ...]
    asked: int = 32

    def __post_init__(self) -> None:
        if self.name not in RELATIONS:
            raise ConfigError(f"there is no relation {self.name!r}; there are {', '.join(RELATIONS)}")
        most = KEYS - (0 if self.name == "random" else self.asked)
        if not self.pairs or min(self.pairs) < 1 or max(self.pairs) > most or self.asked < 1:
            raise ConfigError(
                f"{list(self.pairs)} pairs are shown and {self.asked} keys of each sort asked for; there are "
                f"{KEYS} keys"
            )

    @property
    def length(self) -> int:
        """Tokens of a document: shorter ones are filled up with blanks."""
        others = 0 if self.name == "random" else self.asked
        return max(2 * (count + min(count, self.asked) + others) for count in self.pairs)

    def values(self, rng: np.random.Generator) -> NDArray:
        """The value of each key `[KEYS]`, 0 to VALUES - 1: a relation that is drawn."""
        if self.name == "random":
            return rng.integers(VALUES, size=KEYS)
        if self.name == "linear":
            signs = _BITS @ rng.standard_normal((KEY_BITS, VALUE_BITS))
        elif self.name == "xor":
            chosen = np.array([rng.choice(KEY_BITS, 2, replace=False) for _ in range(VALUE_BITS)])
            signs = _BITS[:, chosen[:, 0]] * _BITS[:, chosen[:, 1]]
        else:
            hidden = np.tanh(_BITS @ rng.standard_normal((KEY_BITS, HIDDEN)))
            signs = hidden @ rng.standard_normal((HIDDEN, VALUE_BITS))
        return (signs > 0) @ (1 << np.arange(VALUE_BITS))

    def document(self, rng: np.random.Generator, count: int) -> Document:
        """A document that shows `count` pairs."""
        values = self.values(rng)
        keys = rng.permutation(KEYS)
        shown = keys[:count]
        others = keys[count : count + (0 if self.name == "random" else self.asked)]
        again = rng.permutation(shown)[: self.asked]
        asked = np.concatenate([again, others])
        order = rng.permutation(len(asked))
        ids = np.full(self.length, BLANK)
        ids[: 2 * count : 2], ids[1 : 2 * count : 2] = shown, KEYS + values[shown]
        places = 2 * count + 2 * np.arange(len(asked))
        ids[places] = asked[order]
        labels = np.full(self.length, IGNORED)
        labels[places] = KEYS + values[asked[order]]
        return Document(ids, labels, places[order < len(again)], places[order >= len(again)])


@dataclass(frozen=True)
class Document:
    """`ids`, `labels` [n]: the label of a key that is asked is its value; `shown`, `others`: their places."""

    ids: NDArray
    labels: NDArray
    shown: NDArray
    others: NDArray


@dataclass(frozen=True)
class Relations:
    """Documents of a relation as a `runs.Reading`, one a row. Only answers are learned, and documents count
    the same."""

    relation: Relation

    def batches(self, seed: int, batch_size: int, length: int) -> Iterator[Batch]:
        """Raises ConfigError: rows have another length than the documents."""
        if length != self.relation.length:
            raise ConfigError(f"rows have {length} tokens, and the documents {self.relation.length}")
        number = 0
        while True:
            ids, labels, resets, weights = empty_piece(batch_size, length)
            for row in range(batch_size):
                rng = np.random.default_rng((seed, number))
                count = self.relation.pairs[int(rng.integers(len(self.relation.pairs)))]
                made = self.relation.document(rng, count)
                ids[row], labels[row] = made.ids, made.labels
                weights[row] = np.float32(1 / (len(made.shown) + len(made.others)))
                number += 1
            resets[:, 0] = True
            yield as_batch((ids, labels, resets, weights))

    def identity(self) -> dict[str, Any]:
        """The relation."""
        relation = self.relation
        return {
            "kind": "relation", "name": relation.name, "pairs": list(relation.pairs), "asked": relation.asked,
        }  # fmt: skip


@dataclass(frozen=True)
class Related:
    """A measure of `study.Maker`: for each number of pairs the share of right answers, for keys that were
    shown and for others.

    Attributes:
        count: documents of each number.
        purpose: VALIDATION or TEST. The first has `valid` in its result: the mean bits of an answer, every
            number of pairs counting the same. In the second numbers whose scores are none are left out.
    """

    relation: Relation
    count: int
    purpose: int

    def __call__(self, model: Any, device: str) -> dict[str, Any]:
        found = []
        for pairs in self.relation.pairs:
            try:
                found.append({"pairs": pairs, **self._scored(model, pairs, device)})
            except NonFiniteError:
                if self.purpose == VALIDATION:
                    raise
        result: dict[str, Any] = {"answers": found}
        if self.purpose == VALIDATION:
            result["valid"] = float(np.mean([one["bits"] for one in found]))
        return result

    @torch.inference_mode()
    def _scored(self, model: Any, pairs: int, device: str) -> dict[str, Any]:
        documents = drawn(self.relation, pairs, self.count, self.purpose)
        right: dict[str, list[float]] = {"shown": [], "others": []}
        bits = []
        for start in range(0, len(documents), ROWS):
            some = documents[start : start + ROWS]
            ids = torch.from_numpy(np.stack([one.ids for one in some])).to(device)
            with precision(device):
                logits = model(ids, use_cache=False).logits.float()
            likely = logits.argmax(-1).cpu().numpy()
            labels = torch.from_numpy(np.stack([one.labels for one in some])).to(device)
            losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            losses = losses.view(ids.shape).cpu().numpy()
            for row, one in enumerate(some):
                for sort in right:
                    places = getattr(one, sort)
                    if len(places):
                        right[sort].append(float((likely[row, places] == one.labels[places]).mean()))
                bits.append(float(losses[row, one.labels != IGNORED].mean() / np.log(2)))
        if not np.isfinite(bits).all():
            raise NonFiniteError("a model of relations gave a score that is not finite")
        found = {sort: float(np.mean(each)) for sort, each in right.items() if each}
        return {**found, "bits": float(np.mean(bits))}


@lru_cache(maxsize=64)
def drawn(relation: Relation, pairs: int, count: int, purpose: int) -> list[Document]:
    """The same documents for all models and seeds."""
    seed = (purpose, RELATIONS.index(relation.name), pairs)
    return [relation.document(np.random.default_rng((*seed, number)), pairs) for number in range(count)]
