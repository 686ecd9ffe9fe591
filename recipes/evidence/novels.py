"""Novels as bytes: what models of language are trained on, and how their bits a byte are measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gradients import precision

from nestor.data import Batch, ByteTokenizer, TokenStream, open_corpus, tokenize
from nestor.data.tokenized import TokenizedCorpus
from nestor.data.windows import windows
from nestor.errors import DataError, NonFiniteError
from nestor.evaluation.passages import Passage, cut_passages
from nestor.evaluation.perplexity import make_layout, measure_perplexity
from nestor.evaluation.scoring import Row, score_rows
from nestor.evaluation.subjects import Subject

TRAIN = ("novels-train-a.jsonl.xz", "novels-train-b.jsonl.xz")
VALID = "novels-valid.jsonl.xz"
LONG = "novels-heldout-long.jsonl.xz"
#: Rows that are scored at the same time.
ROWS = 32


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


@dataclass(frozen=True)
class Valid:
    """Novels by authors that no model was trained on.

    A measure of `study.Maker`: bits a byte, each row of `context` bytes read from a fresh State.

    Attributes:
        first, last: which novels of the file are read, by number; None: all that follow.
        key: what the number is called in the result.
    """

    file: str
    context: int
    first: int
    last: int | None
    key: str

    def __call__(self, model: Any, device: str) -> dict[str, Any]:
        text = corpus((self.file,))
        # A row begins with the last byte of the one before, of which it is not asked.
        rows = [
            Row(piece, 1, len(piece))
            for number in range(text.n_documents)[self.first : self.last]
            for piece in windows(text.document(number).tolist(), self.context + 1)
        ]
        with precision(device):
            scored = score_rows(model, rows, batch_size=ROWS, piece=self.context)
        bits = torch.cat([bits for bits, _ in scored])
        return {self.key: float(bits.mean())}


def valid(folder: Path, context: int) -> tuple[Valid, Valid]:
    """What learning rates are chosen by, the first two novels, which are of one author, and what is reported:
    the others, which are of others."""
    file = str(existing(folder, VALID))
    return Valid(file, context, 0, 2, "valid"), Valid(file, context, 2, None, "bits_per_byte")


@dataclass(frozen=True)
class LongDocuments:
    """A measure of `study.Maker`: bits a byte by position in long documents, read as one stream each.

    `long` in the result has the edges of the bins, and bits and bytes in each; None: some score was no
    number.
    """

    file: str
    length: int
    count: int
    piece: int

    def __call__(self, model: Any, device: str) -> dict[str, Any]:
        layout = make_layout(self.length, contexts=())
        with precision(device):
            try:
                found = measure_perplexity(
                    Subject("", model, ByteTokenizer()), passages(self.file, self.length, self.count),
                    layout, batch_size=self.count, piece=self.piece,
                )  # fmt: skip
            except NonFiniteError:
                return {"long": None}
        bits, sizes = (np.sum(found["sums"][name], axis=0).tolist() for name in ("bits", "bytes"))
        return {"long": {"edges": list(layout.edges), "bits": bits, "bytes": sizes}}


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


@lru_cache(maxsize=1)
def passages(file: str, length: int, count: int) -> list[Passage]:
    """Stretches of so many bytes, of as many documents as there are. Raises as `cut_passages`."""
    return cut_passages(open_corpus(file), [ByteTokenizer()], length, count, label=file)
