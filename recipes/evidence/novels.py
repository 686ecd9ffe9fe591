"""Novels as bytes: what models of language are trained on, and how their bits a byte are measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from nestor.data import Batch, ByteTokenizer, TokenStream, open_corpus, tokenize
from nestor.data.tokenized import TokenizedCorpus
from nestor.errors import DataError

TRAIN = ("novels-train-a.jsonl.xz", "novels-train-b.jsonl.xz")
VALID = "novels-valid.jsonl.xz"
LONG = "novels-heldout-long.jsonl.xz"


@dataclass(frozen=True)
class Novels:
    """Rows of the text of files, packed without gaps, in an order of documents that the seed draws.

    A row begins anywhere in a novel and no row is read twice before all have been. Where one novel ends and
    the next begins within a row, the model reads on, and the first token of the next is not asked for.
    """

    files: tuple[str, ...]

    def batches(self, seed: int, batch_size: int, length: int) -> Iterator[Batch]:
        """Without resets: rows are read from fresh States, and the few ends of novels within do not matter.

        Raises:
            DataError: no such file, or too little text.
        """
        for batch in TokenStream(corpus(self.files), batch_size, length, seed=seed):
            batch["resets"].fill_(False)
            yield batch

    def identity(self) -> dict[str, Any]:
        """The text by its content."""
        return {"kind": "novels", "text": corpus(self.files).identity}


def novels(folder: Path) -> Novels:
    """What models are trained on, of a folder with the files of that name."""
    return Novels(tuple(str(existing(folder, name)) for name in TRAIN))


def existing(folder: Path, name: str) -> Path:
    """The file of that name, with or without its compression. Raises DataError: there is none."""
    for path in (folder / name, folder / name.removesuffix(".xz")):
        if path.is_file():
            return path
    raise DataError(f"{folder} has no {name}; give the folder with the novels as --data")


@lru_cache(maxsize=8)
def corpus(files: tuple[str, ...]) -> TokenizedCorpus:
    """The bytes of files, from the cache if they have been read before. Raises as `open_corpus`."""
    return tokenize(open_corpus(files), ByteTokenizer())
