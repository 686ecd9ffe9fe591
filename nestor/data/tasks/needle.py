"""A sentence hidden in a long text, perhaps among others of its kind, and a question for what it said."""

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
class Secret:
    """What a needle tells. `statement` ends with a line end; `question` is followed by `answer`, which begins
    with a space. `word` is what a value is kept for; a pass key is kept for none."""

    kind: str
    word: str
    value: str
    statement: str
    question: str
    answer: str


def draw_secrets(rng: np.random.Generator, kind: str, count: int = 1) -> list[Secret]:
    """`count` secrets of one kind, each kept for another noun.

    Raises:
        ConfigError: unknown kind, several pass keys, or more than there are nouns for.
    """
    if kind not in _WORDINGS:
        raise ConfigError(
            f"no needle kind {kind!r}; there are {', '.join(NEEDLE_KINDS)}. {suggest(kind, NEEDLE_KINDS)}"
        )
    most = 1 if kind == "passkey" else len(NOUNS) // 2
    if not 1 <= count <= most:
        raise ConfigError(f"{count} secrets of kind {kind!r} are wanted; there can be 1 to {most}")
    nouns = [NOUNS[i] for i in rng.choice(len(NOUNS), 2 * count, replace=False)]
    secrets = []
    for word, other in zip(nouns[:count], nouns[count:], strict=True):
        value = _value(kind, rng, other)
        statement = _WORDINGS[kind].statement.format(word=word, value=value)
        question = _WORDINGS[kind].question.format(word=word)
        secrets.append(Secret(kind, word, value, statement, question, f" {value}."))
    return secrets


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
    others: int = 0,
) -> Needle:
    """Hide one needle, and others that are not asked for.

    Args:
        haystack: text to hide it in.
        kind: one of `NEEDLE_KINDS`.
        length: greatest number of tokens of prompt and answer together (of the haystack's tokenizer); the
            prompt comes as near to it as the last break of a line or clause allows.
        depth: 0 puts the needle at the beginning, 1 right before the question; in between at the nearest
            break.
        others: needles of the same kind for other nouns, anywhere in the text.

    Raises:
        ConfigError: unknown kind, a depth outside 0..1, too many others, or no room for the needles.
    """
    if not 0.0 <= depth <= 1.0:
        raise ConfigError(f"depth is {depth}; it must lie in 0..1")
    asked, *rest = draw_secrets(rng, kind, 1 + others)
    count = _Counter(haystack)
    statements = sum(count(secret.statement) for secret in (asked, *rest))
    # Each other needle may end a line where the text has a space.
    room = length - statements - count(asked.question) - count(asked.answer) - others * count("\n")
    if room < 0:
        company = f" with {others} others" if others else ""
        raise ConfigError(
            f"length is {length}; the needle{company} and its question alone take {length - room} tokens"
        )
    text = _at_most(haystack, rng, room, count)
    allowed = np.append(breaks(text), len(text))
    cut = int(allowed[np.argmin(np.abs(allowed - depth * len(text)))])
    places = [cut, *(int(allowed[i]) for i in rng.integers(len(allowed), size=len(rest)))]
    parts, start, before = [], 0, 0
    for place, which in sorted(zip(places, range(1 + others), strict=True)):
        parts.append(as_lines(text[start:place]))
        parts.append((asked, *rest)[which].statement)
        start = place
        if which == 0:
            before = len(parts)
    parts.append(as_lines(text[start:]))
    prompt = "".join(parts) + asked.question
    meta = {
        "kind": kind,
        "word": asked.word,
        "value": asked.value,
        "depth": depth,
        "real_depth": cut / len(text) if text else depth,
        "tokens": count(prompt),
        "distance": count("".join(parts[before:])),
    }
    return Needle(prompt, asked.answer, meta)


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
