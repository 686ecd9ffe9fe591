"""Asking with the context closed: which answer is likeliest, and is it what greedy decoding gives?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor

from nestor.data.tasks.sessions import Question
from nestor.data.tokenizers import encode_text, encode_texts
from nestor.errors import ConfigError
from nestor.evaluation.scoring import Row, score_after, score_rows

# Tokens of a text of ordinary length, and of a beginning that is worth to be read by itself.
_ORDINARY, _WORTH_SHARING = 512, 64


class Answer(NamedTuple):
    """Of one question.

    correct: the right answer is likelier than each other; exact: greedy decoding gives it; recalled: greedy
    decoding gives one of the candidates; margin: nats by which the right one is likelier than the best other.
    """

    correct: bool
    exact: bool
    recalled: bool
    margin: float


def ask(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    materials: Sequence[str] | None = None,
    prefix: Sequence[int] = (),
    limit: int | None = None,
    batch_size: int = 16,
) -> list[Answer]:
    """Answers of a model that reads nothing but each question, and its material before it.

    Args:
        model: a causal language model; it is not changed.
        materials: text in front of each question; none: nothing.
        prefix: tokens in front of all. limit: the most tokens of a text; material is cut from its beginning.
        batch_size: texts of ordinary length that are read at the same time; of shorter ones more are.

    Raises:
        ConfigError: a question and an answer are longer than the limit.
    """
    given = list(materials) if materials is not None else [""] * len(questions)
    rows, behind = [], []
    for question, material in zip(questions, given, strict=True):
        mine = _rows(tokenizer, question, material, limit, len(prefix))
        rows += mine
        behind += [material] * len(mine)
    scored = _score(model, rows, behind, prefix, batch_size)
    answers, place = [], 0
    for question in questions:
        found = scored[place : place + len(question.answers)]
        place += len(question.answers)
        nats = [-float(bits.nansum()) * math.log(2) for bits, _ in found]
        greedy = [bool(correct.all()) for _, correct in found]
        margin = nats[0] - max(nats[1:])
        answers.append(Answer(margin > 0, greedy[0], any(greedy), margin))
    return answers


def _rows(tokenizer: Any, question: Question, material: str, limit: int | None, prefix: int) -> list[Row]:
    """A question behind its material with each of its answers, of which the answer counts."""
    before = material + question.text
    asked, *whole = encode_texts(tokenizer, [before, *(before + answer for answer in question.answers)])
    alone = len(encode_text(tokenizer, question.text))
    found = []
    for ids in whole:
        row = _answer_row(asked, ids)
        found.append(_cut(row, limit, prefix, max(0, len(asked) - alone), question))
    return found


def answer_row(tokenizer: Any, asked: Sequence[int], text: str) -> Row:
    """Tokens of a text, of which those after the question count. asked: tokens of the question by itself."""
    return _answer_row(asked, encode_text(tokenizer, text))


def _answer_row(asked: Sequence[int], ids: list[int]) -> Row:
    # Where a tokenizer joins the question's last letters with the answer's first, those count too.
    return Row(ids, _common([asked, ids]), len(ids))


def _score(
    model: Any, rows: Sequence[Row], behind: Sequence[str], prefix: Sequence[int], batch_size: int
) -> list[tuple[Tensor, Tensor]]:
    """Bits and hits of all rows. Long material that several have in front is read once for all of them."""
    groups: dict[str, list[int]] = {}
    for number, material in enumerate(behind):
        groups.setdefault(material, []).append(number)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for numbers in groups.values():
        mine = [rows[n] for n in numbers]
        shared = min(_common([row.ids for row in mine]), *(row.start for row in mine))
        if shared >= _WORTH_SHARING:
            read = [*prefix, *mine[0].ids[:shared]]
            rest = [Row(row.ids[shared:], row.start - shared, row.end - shared) for row in mine]
            size = _together(batch_size, len(read), rest)
            found |= zip(numbers, score_after(model, read, rest, batch_size=size), strict=True)
    others = [n for n in range(len(rows)) if n not in found]
    if others:
        mine = [rows[n] for n in others]
        size = _together(batch_size, len(prefix), mine)
        found |= zip(others, score_rows(model, mine, batch_size=size, prefix=prefix), strict=True)
    return [found[n] for n in range(len(rows))]


def _together(batch_size: int, before: int, rows: Sequence[Row]) -> int:
    """How many rows have no more tokens than `batch_size` ordinary texts: one call takes a GPU as long for a
    few short rows as for many."""
    return batch_size * max(1, _ORDINARY // (before + max(len(row.ids) for row in rows)))


def _common(texts: Sequence[Sequence[int]]) -> int:
    """How many tokens all begin with."""
    # In alphabetical order the first and the last differ the earliest.
    first, last = min(map(list, texts)), max(map(list, texts))
    count = min(len(first), len(last))
    # What differs is near the end, so that is where to look.
    while first[:count] != last[:count]:
        count -= 1
    return count


def _cut(row: Row, limit: int | None, prefix: int, material: int, question: Question) -> Row:
    """The row without the first tokens of its material, so that it fits."""
    over = 0 if limit is None else max(0, prefix + len(row.ids) - limit)
    if over > material:
        raise ConfigError(
            f"the question {question.text!r} with an answer has {len(row.ids) - material} tokens, more "
            f"tokens than the {limit} that the model takes"
        )
    return Row(row.ids[over:], row.start - over, row.end - over)


def statements_for(question: str, statements: Sequence[str], count: int = 2) -> list[str]:
    """The statements that share the rarest words with a question: lexical retrieval.

    A shared word counts as the logarithm of one in how many statements has it; earlier ones win ties.
    """
    unique = list(dict.fromkeys(statements))
    words = [_words(statement) for statement in unique]
    asked = _words(question)
    shared = {w: sum(w in have for have in words) for w in asked}
    weight = {w: math.log((1 + len(unique)) / count) for w, count in shared.items() if count}
    # Exact, since a set has its words in another order in every process.
    scores = [math.fsum(weight[w] for w in asked & have) for have in words]
    order = sorted(range(len(unique)), key=lambda i: -scores[i])
    return [unique[i] for i in order[:count] if scores[i] > 0]


# A statement is compared with every question.
@lru_cache(maxsize=1 << 14)
def _words(text: str) -> frozenset[str]:
    return frozenset("".join(c if c.isalnum() else " " for c in text.lower()).split())
