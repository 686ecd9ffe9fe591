"""Formal languages: strings of them, and which symbols may come next at every place.

The task of Bhattamishra, Ahuja and Goyal 2020 (arXiv 2009.11264), which Irie, Csordas and Schmidhuber 2023
(arXiv 2310.16076) use for fast-weight models: after every prefix of a string of the language a model names
the set of all symbols that may follow, the end of the string among them (for regular languages that bit
says whether the prefix is a string itself). A string counts if the sets of all its prefixes are right, so a
constant answer scores nothing. Bin 0 has strings of the lengths of training, bin 1 longer ones; the published
program has lengths from 2 on, 52 to 100 in its first longer bin, 10,000 strings for training, and takes a
symbol as named where a sigmoid is at least 0.5.

A set and not a next token is what is learned here, by a binary loss on each symbol. Next-token
cross-entropy would need a threshold that depends on how strings were drawn: the end is legal at half of the
places of a parity string, but its probability there is one over the strings' mean length.

What differs from the published program: lengths are drawn uniformly and strings uniformly among those of a
length, where there lengths follow from random stops; strings are preceded by the end symbol, so that the set
of the empty prefix is asked too, and a decoder has a place from which to count; training strings are drawn
anew for every batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestor.errors import ConfigError, DataError, ShapeError, suggest

#: Stands before a string, and is legal where it may end; id 0.
END = "$"


class FormalLanguage(ABC):
    """Strings over `symbols`, as an automaton that may count.

    The id of a symbol is one more than its place in `symbols`; id 0 is `END`.
    """

    name: str
    symbols: str
    #: Whether there is at most one string of a length, as in (aa)*.
    single = False

    @property
    def vocab_size(self) -> int:
        return 1 + len(self.symbols)

    @abstractmethod
    def possible(self, length: int) -> bool:
        """Whether there are strings of this length."""

    @abstractmethod
    def draw(self, rng: np.random.Generator, length: int) -> str:
        """A string of a possible length, each as likely as the others."""

    @abstractmethod
    def start(self) -> Any:
        """The state before the first symbol."""

    @abstractmethod
    def step(self, state: Any, symbol: str) -> Any:
        """The state after a symbol that is legal."""

    @abstractmethod
    def legal(self, state: Any) -> str:
        """Symbols that may follow, with `END` if the string may end here."""

    def encode(self, text: str) -> list[int]:
        """Ids of `END` and then the symbols of a string."""
        return [0, *(1 + self.symbols.index(symbol) for symbol in text)]

    def legal_sets(self, text: str) -> NDArray[np.bool_]:
        """Row t of `[len(text) + 1, vocab_size]` says which symbols may follow the first t of `text`.

        Raises:
            DataError: `text` is no prefix of a string of the language.
        """
        sets = np.zeros((len(text) + 1, self.vocab_size), dtype=bool)
        state = self.start()
        for place in range(len(text) + 1):
            following = self.legal(state)
            ids = [0 if symbol == END else 1 + self.symbols.index(symbol) for symbol in following]
            sets[place, ids] = True
            if place < len(text):
                if text[place] not in following or text[place] == END:
                    raise DataError(
                        f"{text[: place + 1]!r} begins no string of {self.name}; after {text[:place]!r} "
                        f"there may be {', '.join(following)}"
                    )
                state = self.step(state, text[place])
        return sets

    def accepts(self, text: str) -> bool:
        """Whether `text` is a string of the language."""
        try:
            return bool(self.legal_sets(text)[-1, 0])
        except DataError:
            return False


class Parity(FormalLanguage):
    """Bits with an even number of ones. State: the parity so far."""

    name, symbols = "parity", "01"

    def possible(self, length: int) -> bool:
        return length >= 1

    def draw(self, rng: np.random.Generator, length: int) -> str:
        bits = rng.integers(2, size=length)
        # The last bit follows from the others, so each even string has one chance in 2^(length - 1).
        bits[-1] = bits[:-1].sum() % 2
        return "".join(map(str, bits))

    def start(self) -> int:
        return 0

    def step(self, state: int, symbol: str) -> int:
        return state ^ (symbol == "1")

    def legal(self, state: int) -> str:
        return "01" if state else "01" + END


class Repeated(FormalLanguage):
    """(w)* for a word w. State: the place in the word."""

    single = True

    def __init__(self, name: str, word: str) -> None:
        self.name, self.word, self.symbols = name, word, "".join(sorted(set(word)))

    def possible(self, length: int) -> bool:
        return length >= 1 and length % len(self.word) == 0

    def draw(self, rng: np.random.Generator, length: int) -> str:
        return self.word * (length // len(self.word))

    def start(self) -> int:
        return 0

    def step(self, state: int, symbol: str) -> int:
        return (state + 1) % len(self.word)

    def legal(self, state: int) -> str:
        return self.word[state] + (END if state == 0 else "")


class EqualBlocks(FormalLanguage):
    """a^n b^n, a^n b^n c^n ...: a block of each symbol, all of one length n >= 1.

    State: block, length n of the first one, symbols read of this one.
    """

    single = True

    def __init__(self, name: str, symbols: str) -> None:
        self.name, self.symbols = name, symbols

    def possible(self, length: int) -> bool:
        return length >= 1 and length % len(self.symbols) == 0

    def draw(self, rng: np.random.Generator, length: int) -> str:
        return "".join(symbol * (length // len(self.symbols)) for symbol in self.symbols)

    def start(self) -> tuple[int, int, int]:
        return (0, 0, 0)

    def step(self, state: tuple[int, int, int], symbol: str) -> tuple[int, int, int]:
        block, n, read = state
        if symbol != self.symbols[block]:
            return (block + 1, n, 1)
        return (0, n + 1, n + 1) if block == 0 else (block, n, read + 1)

    def legal(self, state: tuple[int, int, int]) -> str:
        block, n, read = state
        following = self.symbols[block + 1] if block + 1 < len(self.symbols) else END
        if block == 0:
            return self.symbols[0] + (following if n else "")
        return following if read == n else self.symbols[block]


class ShuffledDyck(FormalLanguage):
    """Brackets of several kinds in any order, each kind balanced by itself. State: open ones of each kind."""

    def __init__(self, name: str, pairs: Sequence[str]) -> None:
        self.name, self.pairs, self.symbols = name, tuple(pairs), "".join(pairs)

    def possible(self, length: int) -> bool:
        return length >= 2 and length % 2 == 0

    def draw(self, rng: np.random.Generator, length: int) -> str:
        kinds = self._kinds(rng, length // 2, len(self.pairs))
        places = rng.permutation(np.repeat(np.arange(len(kinds)), [2 * count for count in kinds]))
        words = [iter(_balanced(rng, count, pair)) for count, pair in zip(kinds, self.pairs, strict=True)]
        return "".join(next(words[kind]) for kind in places)

    def _kinds(self, rng: np.random.Generator, half: int, kinds: int) -> list[int]:
        """Pairs of each kind among `half`, in proportion to the number of strings that have so many."""
        counts, left = [], half
        for others in range(kinds - 1, 0, -1):
            ways = [
                comb(2 * left, 2 * here) * _catalan(here) * _shuffles(left - here, others)
                for here in range(left + 1)
            ]
            total = sum(ways)
            counts.append(int(rng.choice(left + 1, p=[way / total for way in ways])))
            left -= counts[-1]
        return [*counts, left]

    def start(self) -> tuple[int, ...]:
        return (0,) * len(self.pairs)

    def step(self, state: tuple[int, ...], symbol: str) -> tuple[int, ...]:
        kind, closing = divmod(self.symbols.index(symbol), 2)
        change = -1 if closing else 1
        return tuple(depth + change * (place == kind) for place, depth in enumerate(state))

    def legal(self, state: tuple[int, ...]) -> str:
        following = "".join(pair if depth else pair[0] for pair, depth in zip(self.pairs, state, strict=True))
        return following if any(state) else following + END


def _catalan(n: int) -> int:
    """Balanced strings of n pairs of one kind."""
    return comb(2 * n, n) // (n + 1)


def _shuffles(half: int, kinds: int) -> int:
    """Strings of `half` pairs of so many kinds, each kind balanced by itself."""
    if kinds == 1:
        return _catalan(half)
    return sum(
        comb(2 * half, 2 * here) * _catalan(here) * _shuffles(half - here, kinds - 1)
        for here in range(half + 1)
    )


def _balanced(rng: np.random.Generator, pairs: int, pair: str) -> str:
    """A balanced string of one kind, each as likely: of the 2 n + 1 turns of a word with n opening and n + 1
    closing brackets just one is a balanced word before a last closing bracket (cycle lemma)."""
    steps = rng.permutation(np.repeat([1, -1], [pairs, pairs + 1]))
    depth = np.cumsum(steps)
    first = int(np.argmin(depth)) + 1
    turned = np.roll(steps, -first)[:-1]
    return "".join(pair[0] if step > 0 else pair[1] for step in turned)


LANGUAGES: dict[str, FormalLanguage] = {
    language.name: language
    for language in (
        Parity(),
        Repeated("aa", "aa"),
        Repeated("abab", "abab"),
        EqualBlocks("anbn", "ab"),
        EqualBlocks("anbncn", "abc"),
        ShuffledDyck("shuffle-2", ("()", "[]")),
    )
}
#: How the languages are written.
NOTATION = {
    "parity": "parity", "aa": "(aa)*", "abab": "(abab)*", "anbn": "aⁿbⁿ", "anbncn": "aⁿbⁿcⁿ",
    "shuffle-2": "shuffle-2",
}  # fmt: skip


def formal_language(name: str) -> FormalLanguage:
    """A language by its key in `LANGUAGES`.

    Raises:
        ConfigError: there is none.
    """
    if name not in LANGUAGES:
        raise ConfigError(
            f"there is no formal language {name!r}; there are {', '.join(LANGUAGES)}. "
            f"{suggest(name, LANGUAGES)}".rstrip()
        )
    return LANGUAGES[name]


def draw_strings(
    language: FormalLanguage, rng: np.random.Generator, lengths: tuple[int, int], count: int
) -> list[str]:
    """`count` strings, their lengths uniform among the possible ones from `lengths[0]` to `lengths[1]`.

    Raises:
        ConfigError: no string has such a length.
    """
    possible = _possible(language, lengths)
    return [language.draw(rng, int(length)) for length in rng.choice(possible, count)]


def distinct_strings(
    language: FormalLanguage, rng: np.random.Generator, lengths: tuple[int, int], count: int
) -> list[str]:
    """Up to `count` strings of which no two are equal, drawn as by `draw_strings`; of a language with one
    string a length all there are, up to `count` of the shortest.

    Raises:
        ConfigError: no string has such a length.
    """
    possible = _possible(language, lengths)
    if language.single:
        return [language.draw(rng, length) for length in possible[:count]]
    found: dict[str, None] = {}
    # There may be fewer than `count`: stop when hardly anything new comes.
    for _ in range(20 * count):
        if len(found) == count:
            break
        found[language.draw(rng, int(rng.choice(possible)))] = None
    return list(found)


def _possible(language: FormalLanguage, lengths: tuple[int, int]) -> list[int]:
    low, high = lengths
    possible = [length for length in range(low, high + 1) if language.possible(length)]
    if not possible:
        raise ConfigError(f"no string of {language.name} has {low} to {high} symbols; widen the lengths")
    return possible


@dataclass(frozen=True)
class FormalBatch:
    """Strings as arrays. T is at least one more than the longest.

    ids: int64 `[B, T]`, each string behind an end symbol, filled up with 0. legal: bool `[B, T, V]`, what may
    follow token t. counted: bool `[B, T]`, whether there is a token t.
    """

    ids: NDArray[np.int64]
    legal: NDArray[np.bool_]
    counted: NDArray[np.bool_]

    def solved(self, named: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """`[B]`: the sets `named` `[B, T, V]` are the legal ones at every place of the string."""
        right = (named == self.legal).all(axis=-1)
        return (right | ~self.counted).all(axis=-1)


def formal_batch(language: FormalLanguage, strings: Sequence[str], width: int | None = None) -> FormalBatch:
    """Strings of a language as a batch.

    width: tokens of a row; None: as many as the longest string needs.

    Raises:
        DataError: one of them is no prefix of a string of the language. ShapeError: one is too long.
    """
    longest = 1 + max(map(len, strings))
    width = longest if width is None else width
    if width < longest:
        raise ShapeError(f"rows have {width} tokens, and the longest string needs {longest}")
    ids = np.zeros((len(strings), width), dtype=np.int64)
    legal = np.zeros((len(strings), width, language.vocab_size), dtype=bool)
    counted = np.zeros((len(strings), width), dtype=bool)
    for row, text in enumerate(strings):
        here = slice(0, len(text) + 1)
        ids[row, here], legal[row, here], counted[row, here] = (
            language.encode(text),
            language.legal_sets(text),
            1,
        )
    return FormalBatch(ids, legal, counted)
