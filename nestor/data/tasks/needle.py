"""One sentence hidden in a long text, and a question for what it said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

import numpy as np

from nestor.data.tasks.haystack import Haystack, as_lines, breaks
from nestor.data.tasks.words import NOUNS
from nestor.data.tokenizers import encode_text
from nestor.errors import ConfigError, suggest


@dataclass(frozen=True)
class _Wording:
    statement: str
    question: str


_WORDINGS = {
    "passkey": _Wording("The pass key is {value}. Remember it.\n", "What is the pass key? The pass key is"),
    "number": _Wording("The secret number for {word} is {value}.\n", "The secret number for {word} is"),
    "word": _Wording("The secret word for {word} is {value}.\n", "The secret word for {word} is"),
    "uuid": _Wording("The secret code for {word} is {value}.\n", "The secret code for {word} is"),
}
#: Kinds of needle: a 5-digit pass key; a 7-digit number, a noun, or a UUID, each kept for another noun.
NEEDLE_KINDS = tuple(_WORDINGS)


@dataclass(frozen=True)
class Needle:
    """`prompt` ends with the question; `answer` begins with a space. `meta` holds kind, word, value, wanted
    and real depth, number of tokens of the prompt, and `distance`, the tokens between statement and
    question."""

    prompt: str
    answer: str
    meta: dict[str, Any]


def needle(
    haystack: Haystack,
    rng: np.random.Generator,
    *,
    kind: str = "number",
    length: int = 1024,
    depth: float = 0.5,
) -> Needle:
    """Hide one needle.

    Args:
        haystack: text to hide it in.
        kind: one of `NEEDLE_KINDS`.
        length: greatest number of tokens of prompt and answer together (of the haystack's tokenizer); the
            prompt comes as near to it as the last break of a line or clause allows.
        depth: 0 puts the needle at the beginning, 1 right before the question; in between at the nearest
            break.

    Raises:
        ConfigError: unknown kind, a depth outside 0..1, or no room for the needle.
    """
    if kind not in _WORDINGS:
        raise ConfigError(
            f"no needle kind {kind!r}; there are {', '.join(NEEDLE_KINDS)}. {suggest(kind, NEEDLE_KINDS)}"
        )
    if not 0.0 <= depth <= 1.0:
        raise ConfigError(f"depth is {depth}; it must lie in 0..1")
    word, other = (NOUNS[i] for i in rng.choice(len(NOUNS), 2, replace=False))
    value = _value(kind, rng, other)
    statement = _WORDINGS[kind].statement.format(word=word, value=value)
    question = _WORDINGS[kind].question.format(word=word)
    answer = f" {value}."
    count = _Counter(haystack)
    room = length - count(statement) - count(question) - count(answer)
    if room < 0:
        raise ConfigError(
            f"length is {length}; the needle and its question alone take {length - room} tokens"
        )
    text = _at_most(haystack, rng, room, count)
    allowed = np.append(breaks(text), len(text))
    cut = int(allowed[np.argmin(np.abs(allowed - depth * len(text)))])
    front, back = as_lines(text[:cut]), as_lines(text[cut:])
    prompt = front + statement + back + question
    meta = {
        "kind": kind,
        "word": word,
        "value": value,
        "depth": depth,
        "real_depth": cut / len(text) if text else depth,
        "tokens": count(prompt),
        "distance": count(back),
    }
    return Needle(prompt, answer, meta)


class _Counter:
    def __init__(self, haystack: Haystack) -> None:
        self._tokenizer = haystack.tokenizer

    def __call__(self, text: str) -> int:
        return len(encode_text(self._tokenizer, text))


def _value(kind: str, rng: np.random.Generator, noun: str) -> str:
    if kind == "word":
        return noun
    if kind == "uuid":
        return str(UUID(bytes=rng.bytes(16), version=4))
    digits = 5 if kind == "passkey" else 7
    return str(rng.integers(10 ** (digits - 1), 10**digits))


def _at_most(haystack: Haystack, rng: np.random.Generator, room: int, count: _Counter) -> str:
    """Haystack of at most `room` tokens, ended at a break. Line ends at the needle and question are allowed
    for."""
    text = haystack.text(rng, room)
    spare = 2 * count("\n")
    allowed = breaks(text)
    low, high = 0, len(allowed) - 1
    # Tokens grow with the text, so the longest prefix that fits is found by halving.
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count(text[: allowed[middle]]) + spare <= room else (low, middle - 1)
    return text[: allowed[low]]
