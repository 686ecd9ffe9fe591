"""Text to hide things in: real text from a tokenised corpus, or a few sentences over and over."""

from __future__ import annotations

import re
from typing import Any, Protocol

import numpy as np

from nestor.data.tokenized import TokenizedCorpus
from nestor.data.tokenizers import encode_text
from nestor.errors import DataError

_REPEATED = (
    "Rain fell on the roof. The clock ticked on. A door closed far away. Nothing else moved in the house.\n"
)
#: Where a line may be broken: after a line end, or after a space that follows punctuation.
_BREAK = re.compile(r"\n+|(?<=[.!?;:,]) ")


class Haystack(Protocol):
    """Gives text of a wanted length, drawn by `rng`."""

    tokenizer: Any

    def text(self, rng: np.random.Generator, n_tokens: int) -> str:
        """Text of at least `n_tokens` tokens (and not much more) that begins at the beginning of a line or
        sentence."""
        ...


class CorpusHaystack:
    """Real text: passages of a corpus from random places, joined by line ends where one does not suffice."""

    def __init__(self, corpus: TokenizedCorpus, tokenizer: Any) -> None:
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.identity = corpus.identity

    def text(self, rng: np.random.Generator, n_tokens: int) -> str:
        parts: list[str] = []
        have = tries = 0
        while have < n_tokens:
            part = self._passage(rng, n_tokens - have)
            tries += 1
            if tries > 100 and not parts:
                raise DataError(f"corpus {self.corpus.label} has no passage of words to use as a haystack")
            if not part:
                continue
            if parts and not parts[-1].endswith("\n"):
                part = "\n" + part
            parts.append(part)
            have += len(encode_text(self.tokenizer, part))
        return "".join(parts)

    def _passage(self, rng: np.random.Generator, n_tokens: int) -> str:
        start = int(rng.integers(self.corpus.n_tokens))
        document = int(np.searchsorted(self.corpus.offsets, start, side="right")) - 1
        first, end = int(self.corpus.offsets[document]), int(self.corpus.offsets[document + 1])
        # Some tokens before the drawn place are read so that the cut to a beginning leaves enough.
        begin = max(first, start - 128)
        text = self.tokenizer.decode(self.corpus.tokens[begin : min(end, start + n_tokens + 256)].tolist())
        text = text.rstrip("\ufffd")
        if begin == first:
            return text
        cut = _BREAK.search(text, 1) or re.compile(r"\s").search(text, 1)
        return text[cut.end() :] if cut else ""


class RepeatedHaystack:
    """The same four sentences over and over: the easiest haystack, in which the needle is the only news."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.identity = "repeated"
        self._tokens = len(encode_text(tokenizer, _REPEATED))

    def text(self, rng: np.random.Generator, n_tokens: int) -> str:
        del rng
        return _REPEATED * -(-n_tokens // self._tokens)


def breaks(text: str) -> np.ndarray:
    """Character positions at which `text` may be divided into lines, in order, [n] int64; 0 is always one."""
    return np.asarray([0, *(match.end() for match in _BREAK.finditer(text))], dtype=np.int64)


def as_lines(text: str) -> str:
    """`text` ending with a line end: a space at its end gives way to it."""
    return text if not text or text.endswith("\n") else text.removesuffix(" ") + "\n"


def exact_tokens(haystack: Haystack, rng: np.random.Generator, count: int) -> list[int]:
    """Exactly `count` tokens of haystack that end with a line end.

    The last word may be cut; it is never cut inside a character: spaces stand for the tokens lost.

    Raises:
        DataError: `count` is positive and smaller than the line end.
    """
    if count == 0:
        return []
    tokenizer = haystack.tokenizer
    line_end = encode_text(tokenizer, "\n")
    if count < len(line_end):
        raise DataError(
            f"{count} tokens of haystack are wanted; the least is a line end of {len(line_end)} tokens"
        )
    body = whole_characters(
        tokenizer, encode_text(tokenizer, haystack.text(rng, count)), count - len(line_end)
    )
    return body + line_end


def whole_characters(tokenizer: Any, ids: list[int], count: int) -> list[int]:
    """The first `count` of `ids`; a character cut by the end is replaced by spaces.

    Raises:
        DataError: there are fewer than `count`.
    """
    if len(ids) < count:
        raise DataError(f"{count} tokens are wanted and the text has {len(ids)}")
    space = encode_text(tokenizer, " ")[-1:]
    kept = ids[:count]
    for lost in range(min(4, count + 1)):
        end = count - lost
        # A whole character at the end leaves the last tokens' text without a replacement character.
        if not tokenizer.decode(kept[max(0, end - 8) : end]).endswith("\ufffd"):
            return kept[:end] + space * lost
    return kept
