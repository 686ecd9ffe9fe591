"""Long passages of held-out documents, cut once for all models, and the UTF-8 bytes of each token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestor.data.tokenizers import ByteTokenizer, encode_text
from nestor.errors import ConfigError, DataError

UNITS = ("tokens", "bytes")
# From this many documents on the resampled unit is the document, below it the passage.
_FEW_DOCUMENTS = 5


@dataclass(frozen=True)
class Passage:
    """Text from a document, from the beginning of a line on; it has at least the wanted length and some
    more.
    """

    document: int
    seed: int
    text: str


@dataclass(frozen=True)
class Encoded:
    """A passage as one tokenizer cuts it, ended at the wanted length.

    `ids`, `bytes` (UTF-8 bytes of each token) and `place` (units, tokens or bytes, before each token): [n]
    int64.
    """

    ids: NDArray
    bytes: NDArray
    place: NDArray


def encode_with_bytes(tokenizer: Any, text: str) -> tuple[list[int], NDArray]:
    """Ids of `text` and how many of its UTF-8 bytes each token stands for; the counts sum to the text's
    bytes.

    Tokens that share a character (byte-level BPE cuts inside of it) give its bytes to the first of them,
    and bytes that no token covers (a tokenizer that drops spaces) belong to the next token: each byte is
    counted once.

    Raises:
        ConfigError: the tokenizer tells no offsets.
    """
    if isinstance(tokenizer, ByteTokenizer):
        ids = encode_text(tokenizer, text)
        return ids, np.ones(len(ids), dtype=np.int64)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(
            f"{type(tokenizer).__name__} tells no character offsets, which bits per byte need; "
            f"use a tokenizer that has a tokenizer.json"
        )
    encoding = backend.encode(text, add_special_tokens=False)
    if not encoding.ids:
        return [], np.zeros(0, dtype=np.int64)
    # Bytes before each character; offsets of the encoding are in characters.
    before = np.zeros(len(text) + 1, dtype=np.int64)
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    np.cumsum(1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF), out=before[1:])
    ends = before[np.asarray([end for _, end in encoding.offsets], dtype=np.int64)]
    ends[-1] = before[-1]
    return list(encoding.ids), np.diff(np.maximum.accumulate(ends), prepend=0)


def encode_passage(passage: Passage, tokenizer: Any, length: int, unit: str) -> Encoded:
    """The tokens of a passage that begin within its first `length` units."""
    ids, counts = encode_with_bytes(tokenizer, passage.text)
    starts = np.cumsum(counts) - counts
    place = np.arange(len(ids)) if unit == "tokens" else starts
    keep = int(np.searchsorted(place, length, side="left"))
    return Encoded(np.asarray(ids[:keep], dtype=np.int64), counts[:keep], place[:keep])


def cut_passages(
    documents: Iterable[str],
    tokenizers: Sequence[Any],
    length: int,
    count: int,
    *,
    seeds: Sequence[int] = (0,),
    unit: str = "tokens",
    label: str = "the corpus",
) -> list[Passage]:
    """At most `count` passages a seed, spread over as many documents as there are, never overlapping.

    Args:
        length: units that every passage has at least, by every tokenizer.
        unit: "tokens" or "bytes".
        seeds: each seed draws other passages; passages of all seeds are disjoint as long as there is text.

    Raises:
        ConfigError: a length or count that is not positive, an unknown unit.
        DataError: no document is that long.
    """
    if length < 2 or count < 1:
        raise ConfigError(f"length is {length} and repeats {count}; they must be at least 2 and 1")
    if unit not in UNITS:
        raise ConfigError(f"unit is {unit!r}; it is one of {', '.join(UNITS)}")
    # Disjoint stretches of each document; whether one is long enough is counted when it is drawn.
    slots: list[list[Passage]] = []
    longest = 0
    for number, text in enumerate(documents):
        stretches, units = _stretches(text, tokenizers, length, unit)
        longest = max(longest, units)
        slots.append([Passage(number, 0, stretch) for stretch in stretches])
    passages: list[Passage] = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        taken = 0
        while taken < count and any(slots):
            # One passage from each document in turn, so that few documents are not all of the sample.
            for which in rng.permutation(len(slots)):
                passage = _draw(rng, slots[which], tokenizers, length, unit) if taken < count else None
                if passage is not None:
                    passages.append(replace(passage, seed=seed))
                    taken += 1
    if not passages:
        raise DataError(
            f"no document of {label} has {length} {unit}; the longest has about {longest}. "
            f"Ask for shorter --lengths or name a corpus of longer documents with --corpus"
        )
    return passages


def resampled_units(passages: Sequence[Passage]) -> tuple[list[int], str]:
    """For each passage the unit that intervals resample it with, and what that is: "document", "passage"."""
    documents = [passage.document for passage in passages]
    if len(set(documents)) >= _FEW_DOCUMENTS:
        return documents, "document"
    return list(range(len(passages))), "passage"


def _draw(
    rng: np.random.Generator, slots: list[Passage], tokenizers: Sequence[Any], length: int, unit: str
) -> Passage | None:
    """Take passages out of `slots` until one is long enough."""
    while slots:
        passage = slots.pop(int(rng.integers(len(slots))))
        if min(_units(passage.text, tokenizer, unit) for tokenizer in tokenizers) >= length:
            return passage
    return None


def _stretches(text: str, tokenizers: Sequence[Any], length: int, unit: str) -> tuple[list[str], int]:
    """Disjoint stretches of about `length` units, and about how many units all of `text` has."""
    sample = text[:20_000]
    per_character = min(_units(sample, tokenizer, unit) for tokenizer in tokenizers) / max(1, len(sample))
    estimate = int(per_character * len(text))
    if per_character == 0 or estimate < length // 2:
        return [], estimate
    # A tenth more than expected, for stretches of longer words than the sample has.
    characters = int(length / per_character * 1.1) + 64
    found, start = [], 0
    while start < len(text):
        found.append(text[start : start + characters])
        line = text.find("\n", start + characters)
        start = len(text) if line < 0 else line + 1
    return found, estimate


def _units(text: str, tokenizer: Any, unit: str) -> int:
    return len(text.encode("utf-8")) if unit == "bytes" else len(encode_text(tokenizer, text))
