"""Asking with the context closed: which answer is likeliest, and is it what greedy decoding gives?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from nestor.data.tasks.sessions import Question
from nestor.data.tokenizers import encode_text
from nestor.errors import ConfigError
from nestor.evaluation.scoring import Row, score_rows


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

    Raises:
        ConfigError: a question and an answer are longer than the limit.
    """
    rows: list[Row] = []
    for number, question in enumerate(questions):
        before = (materials[number] if materials is not None else "") + question.text
        asked, alone = encode_text(tokenizer, before), len(encode_text(tokenizer, question.text))
        for answer in question.answers:
            row = answer_row(tokenizer, asked, before + answer)
            rows.append(_cut(row, limit, len(prefix), max(0, len(asked) - alone), question))
    scored = score_rows(model, rows, batch_size=batch_size, prefix=prefix)
    answers, place = [], 0
    for question in questions:
        found = scored[place : place + len(question.answers)]
        place += len(question.answers)
        nats = [-float(bits.nansum()) * math.log(2) for bits, _ in found]
        greedy = [bool(correct.all()) for _, correct in found]
        margin = nats[0] - max(nats[1:])
        answers.append(Answer(margin > 0, greedy[0], any(greedy), margin))
    return answers


def answer_row(tokenizer: Any, asked: Sequence[int], text: str) -> Row:
    """Tokens of a text, of which those after the question count. asked: tokens of the question by itself."""
    ids = encode_text(tokenizer, text)
    # Where a tokenizer joins the question's last letters with the answer's first, those count too.
    start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(asked, ids, strict=False)))
    return Row(ids, start, len(ids))


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
    words = [set(_words(statement)) for statement in unique]
    asked = set(_words(question))
    shared = {w: sum(w in have for have in words) for w in asked}
    weight = {w: math.log((1 + len(unique)) / count) for w, count in shared.items() if count}
    scores = [sum(weight.get(w, 0.0) for w in have) for have in words]
    order = sorted(range(len(unique)), key=lambda i: -scores[i])
    return [unique[i] for i in order[:count] if scores[i] > 0]


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()
