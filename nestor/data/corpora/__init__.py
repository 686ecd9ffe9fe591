"""Corpora: real text, shipped or named by the user, as a stream of documents in a fixed order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nestor.data.corpora.reading import Piece
from nestor.data.corpora.sources import SHIPPED, Source, TextSource, find_sources
from nestor.errors import ConfigError, DataError, suggest

SPLITS = ("all", "train", "valid")
#: Fixes which documents are held out; a change would move documents between train and valid.
_HELD_OUT_SEED = 20_251_231


class Corpus:
    """Documents of some sources, or of one split of them. Iterating yields each document as a string.

    Nothing is read before iteration, and `pieces` never holds more than one line or mebibyte of text. The
    split is by whole documents, a fixed pseudo-random `valid_fraction` of them (at least one); a corpus of
    a single document is cut after the first line end that follows its first `1 - valid_fraction`."""

    def __init__(
        self, sources: Iterable[Source], label: str, split: str = "all", valid_fraction: float = 0.05
    ):
        if split not in SPLITS:
            raise ConfigError(
                f"split is {split!r}; it is one of {', '.join(SPLITS)}. {suggest(split, SPLITS)}"
            )
        if not 0.0 < valid_fraction < 1.0:
            raise ConfigError(
                f"valid_fraction is {valid_fraction}; it must lie between 0 and 1, both excluded"
            )
        self.sources = tuple(sources)
        self.label = label
        self.split = split
        self.valid_fraction = valid_fraction

    @classmethod
    def from_texts(cls, texts: Iterable[str], label: str = "texts in memory") -> Corpus:
        """A corpus of strings, each one document."""
        return cls([TextSource(tuple(texts))], label)

    def with_split(self, split: str) -> Corpus:
        """The same documents, another split of them."""
        return Corpus(self.sources, self.label, split, self.valid_fraction)

    def identity(self) -> dict[str, Any]:
        """What the content depends on (paths, sizes, times of change, split), JSON-able."""
        chosen = [self.split, self.valid_fraction] if self.split != "all" else ["all"]
        return {"sources": [source.identity() for source in self.sources], "split": chosen}

    def __iter__(self) -> Iterator[str]:
        parts: list[str] = []
        for starts, text in self.pieces():
            if starts and parts:
                yield "".join(parts)
                parts = []
            parts.append(text)
        if parts:
            yield "".join(parts)

    def pieces(self) -> Iterator[Piece]:
        """The documents as `(starts, text)` pieces.

        Raises:
            DataError: there is no text, or too few documents to hold some out, or a file is bad.
        """
        empty = True
        for piece in self._chosen():
            empty = False
            yield piece
        if empty:
            raise DataError(
                f"corpus {self.label} is empty: {len(self.sources)} sources without a character of text"
            )

    def _all(self) -> Iterator[Piece]:
        for source in self.sources:
            yield from source.pieces()

    def _chosen(self) -> Iterator[Piece]:
        if self.split == "all":
            yield from self._all()
            return
        documents = characters = 0
        for starts, text in self._all():
            documents += starts
            characters += len(text)
        if documents == 1:
            yield from self._cut(int(characters * (1 - self.valid_fraction)), characters)
        elif documents > 1:
            held_out = _held_out(documents, self.valid_fraction)
            index = -1
            for starts, text in self._all():
                index += starts
                if (index in held_out) == (self.split == "valid"):
                    yield starts, text

    def _cut(self, target: int, total: int) -> Iterator[Piece]:
        """The single document's part before (train) or after (valid) the line end that follows `target`."""
        position, cut, starts = 0, -1, True
        for _, text in self._all():
            end = position + len(text)
            if cut < 0 and target < end:
                newline = text.find("\n", target - position)
                cut = position + newline + 1 if newline >= 0 and position + newline + 1 < total else target
            here = len(text) if cut < 0 else min(max(cut - position, 0), len(text))
            part = text[:here] if self.split == "train" else text[here:] if cut >= 0 else ""
            if part:
                yield starts, part
                starts = False
            position = end


def open_corpus(
    spec: str | Path | Iterable[str | Path],
    *,
    field: str = "text",
    split: str = "all",
    valid_fraction: float = 0.05,
) -> Corpus:
    """Open a corpus by name, path, or a list of these (read in the order given).

    Args:
        spec: a shipped name (`"shakespeare"`, `"classics"`); a file (.txt, .md, .jsonl, each also as .xz or
            .gz); a folder (its corpus files at any depth, sorted; hidden ones left out) or a dataset saved
            with `save_to_disk`; a glob (`"books/**/*.txt"`); or `hf:NAME[@CONFIG][:SPLIT[:FIELD]]`, a
            dataset of the Hugging Face hub or in a folder. A local path that has a shipped name is written
            `./classics`.
        field: field of a JSON line or dataset row that holds the text.
        split: `"all"`, `"train"` or `"valid"` (the held-out part).
        valid_fraction: share of the documents, or of a single document, that is held out.

    Raises:
        DataError: nothing there. Errors inside the files are raised when they are read.
        ConfigError: unknown split or impossible fraction.
    """
    specs = [str(spec)] if isinstance(spec, (str, Path)) else [str(one) for one in spec]
    if not specs or not all(specs):
        raise DataError(
            f"no corpus named (got {spec!r}): give a file, folder or glob, or one of {', '.join(SHIPPED)}"
        )
    sources = [source for one in specs for source in find_sources(one, field)]
    return Corpus(sources, ", ".join(specs), split, valid_fraction)


def shipped_corpora() -> tuple[str, ...]:
    """Names of the corpora inside the package."""
    return tuple(SHIPPED)


def _held_out(documents: int, fraction: float) -> frozenset[int]:
    count = min(max(1, round(documents * fraction)), documents - 1)
    order = np.random.default_rng(_HELD_OUT_SEED).permutation(documents)
    return frozenset(order[:count].tolist())


__all__ = ["SHIPPED", "SPLITS", "Corpus", "open_corpus", "shipped_corpora"]
