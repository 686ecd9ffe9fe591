"""Old knowledge: text that a model knew before, and how much of it is still known.

By default the text is what the model itself writes: for any model it is text of its own pre-training domain,
and the rise of its bits is an estimate of the divergence of the new model from the old one, which a lucky
change of domain cannot make negative in expectation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nestor.data import open_corpus
from nestor.data.tasks import FillerText
from nestor.data.tokenizers import encode_text
from nestor.errors import DataError
from nestor.evaluation.scoring import Row, Stream, score_rows
from nestor.evaluation.subjects import Subject

#: What passages are for; each use draws its own.
_USES = ("test", "fisher")


@dataclass(frozen=True)
class OldScores:
    """By passage: bits, and how many of the tokens that the model had right before are right. [n] both."""

    bits: NDArray
    right: NDArray


class OldKnowledge:
    """Passages of old text with what the unchanged model made of them.

    Attributes:
        ids: token ids of each; bytes: `[n]`; items: `[n]`, tokens that the unchanged model predicted as the
            likeliest; before: its scores.
    """

    def __init__(self, subject: Subject, ids: Sequence[Sequence[int]], batch_size: int = 16) -> None:
        self._prefix, self._batch_size = subject.prefix, batch_size
        self.ids = [list(one) for one in ids]
        decoded = [subject.tokenizer.decode(one) for one in self.ids]
        self.bytes = np.array([max(1, len(text.encode())) for text in decoded], dtype=np.float64)
        scored = self._score(subject.model)
        self._known = [correct for _, correct in scored]
        self.items = np.array([int(known.sum()) for known in self._known], dtype=np.float64)
        self.before = self._scores(scored)

    def measure(self, model: Any) -> OldScores:
        """What a model makes of them now."""
        return self._scores(self._score(model))

    def _score(self, model: Any) -> list[Any]:
        rows = [Row(one, 0 if self._prefix else 1, len(one)) for one in self.ids]
        return score_rows(model, rows, batch_size=self._batch_size, prefix=self._prefix)

    def _scores(self, scored: Sequence[Any]) -> OldScores:
        bits = np.array([float(b.nansum()) for b, _ in scored])
        right = [int((now & known).sum()) for (_, now), known in zip(scored, self._known, strict=True)]
        return OldScores(bits, np.array(right, dtype=np.float64))


def old_passages(
    subject: Subject, sources: Sequence[str], count: int, length: int, use: str = "test"
) -> list[list[int]]:
    """Token ids of passages of old text; those for "test" and for "fisher" are drawn apart.

    Args:
        sources: ("self",), what the model writes, or names of corpora, of which the held-out part is read.

    Raises:
        DataError: a corpus with too little text.
    """
    if subject.limit is not None:
        length = min(length, subject.limit - len(subject.prefix))
    if tuple(sources) == ("self",):
        return written_by(subject, count, length, seed=_USES.index(use))
    text = FillerText(open_corpus(list(sources), split="valid"))
    rng = np.random.default_rng([2, _USES.index(use)])
    passages = []
    for _ in range(count):
        ids = encode_text(subject.tokenizer, text.text(rng, 12 * length))[:length]
        if len(ids) < length:
            raise DataError(f"a passage of old text has {len(ids)} tokens of {length}; give shorter ones")
        passages.append(ids)
    return passages


@torch.inference_mode()
def written_by(subject: Subject, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Texts of `length` tokens that a model writes, each token drawn by its probability."""
    begin = subject.prefix or encode_text(subject.tokenizer, "\n")[-1:]
    generator = torch.Generator().manual_seed(1_000_003 + seed)
    stream = Stream(subject.model, max(2, length))
    logits = stream.read(torch.tensor([begin] * count))
    written: list[torch.Tensor] = []
    for _ in range(length):
        chances = logits[:, -1].float().softmax(-1).cpu()
        drawn = torch.multinomial(chances, 1, generator=generator)
        written.append(drawn)
        if len(written) < length:
            logits = stream.read(drawn)
    rows: list[list[int]] = torch.cat(written, 1).tolist()
    return rows
