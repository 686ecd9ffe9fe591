"""Recall in real text: facts planted in a text at line boundaries, and questions about them further on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from nestor.data.tasks.facts import Fact, FactSpec
from nestor.data.tasks.haystack import Haystack, as_lines, breaks, exact_tokens, whole_characters
from nestor.data.tasks.stream import (
    Answer,
    TaskDocument,
    check_answer_weight,
    check_loss_on,
    loss_weights,
)
from nestor.data.tokenizers import encode_text, encode_texts, tokenizer_identity
from nestor.errors import ConfigError


@dataclass(frozen=True)
class RecallProbe:
    """One question for evaluation.

    `ids` [n] int64 is the text with the question and its answer; `ids[:start]` is the prompt and
    `ids[start:end]` the answer. `fact` is what was asked and `distance` the number of tokens between the
    end of its statement and the beginning of the question, exactly as ordered."""

    ids: np.ndarray
    start: int
    end: int
    distance: int
    fact: Fact


@dataclass(frozen=True)
class _Event:
    """A statement (`answer` empty) or a question, wanted after `place` tokens of haystack."""

    place: float
    fact: int
    head: list[int]
    answer: list[int]
    tail: list[int]


class RecallTask:
    """Documents of real text with planted facts and questions.

    Each of `n_facts` facts is stated once, in a line of its own; `n_questions` questions are dealt evenly
    over the facts. The distance of a question from its fact is drawn log-uniformly from `distances`, so
    short distances (which teach what a question is) and long ones (which need a memory) both occur. Lengths
    and distances are in tokens of the haystack's tokenizer: bytes for the byte tokenizer. In a document for
    training a distance is met to within the nearest break of a line or clause, other planted lines in
    between add to it, and the answer's `distance` says what it became; a probe meets it exactly.

    Args:
        haystack: source of the text.
        document_length: tokens of a document, exactly.
        distances: least and greatest distance; the greatest defaults to what the document allows.
        loss_on: `"all"` counts every token, `"answers"` only those of the answers to questions.
        answer_weight: how many times a token of an answer counts in the loss. While answers are a small part
            of the loss, a small model can stay at chance on them.

    Raises:
        ConfigError: the document is too short for its facts and questions, or the range is impossible.
    """

    def __init__(
        self,
        haystack: Haystack,
        document_length: int,
        *,
        n_facts: int = 4,
        n_questions: int = 8,
        distances: tuple[int, int | None] = (16, None),
        spec: FactSpec | None = None,
        loss_on: str = "all",
        answer_weight: float = 1.0,
    ) -> None:
        if n_facts < 1 or n_questions < 1:
            raise ConfigError(
                f"n_facts is {n_facts} and n_questions is {n_questions}; both must be at least 1"
            )
        low, high = distances
        if low < 1 or (high is not None and high < low):
            raise ConfigError(f"distances are {distances}; they must be at least 1 and in order")
        self.haystack = haystack
        self.tokenizer = haystack.tokenizer
        self.document_length = document_length
        self.n_facts, self.n_questions = n_facts, n_questions
        self.distances = (low, high)
        self.spec = spec or FactSpec()
        self.loss_on, self.answer_weight = check_loss_on(loss_on), check_answer_weight(answer_weight)
        self._line_end = encode_text(self.tokenizer, "\n")
        self.document(np.random.default_rng(0))

    def identity(self) -> dict[str, Any]:
        spec = asdict(self.spec) | {"templates": list(self.spec.templates)}
        return {
            "name": "recall",
            "haystack": getattr(self.haystack, "identity", type(self.haystack).__name__),
            "tokenizer": tokenizer_identity(self.tokenizer),
            "document_length": self.document_length,
            "n_facts": self.n_facts,
            "n_questions": self.n_questions,
            "distances": list(self.distances),
            "spec": spec,
            "loss_on": self.loss_on,
            "answer_weight": self.answer_weight,
        }

    def document(self, rng: np.random.Generator) -> TaskDocument:
        """Draw one document of `document_length` tokens."""
        facts = self.spec.draw(rng, self.n_facts)
        wordings = [(fact.statement, fact.question, fact.answer) for fact in facts]
        encoded = encode_texts(
            self.tokenizer, [part for wording in zip(*wordings, strict=True) for part in wording]
        )
        n = self.n_facts
        statements, questions, replies = encoded[:n], encoded[n : 2 * n], encoded[2 * n :]
        asked = np.resize(rng.permutation(self.n_facts), self.n_questions)
        planted = sum(map(len, statements)) + sum(
            len(questions[f]) + len(replies[f]) + len(self._line_end) for f in asked
        )
        room = self.document_length - planted
        low, high = self.distances
        if room <= low:
            raise ConfigError(
                f"document_length is {self.document_length}; {self.n_facts} facts and "
                f"{self.n_questions} questions take {planted} tokens and distances begin at {low}: make it "
                f"greater than {planted + low}, or plant less"
            )
        reach = min(high or room, room)
        gaps = np.exp(rng.uniform(np.log(low), np.log(max(reach, low + 1)), self.n_questions))
        longest = np.zeros(self.n_facts)
        np.maximum.at(longest, asked, gaps)
        places = rng.uniform(0, np.maximum(room - longest, 0))
        events = [_Event(places[f], f, statements[f], [], []) for f in range(self.n_facts)]
        events += [
            _Event(places[f] + gap, f, questions[f], replies[f], self._line_end)
            for f, gap in zip(asked.tolist(), gaps, strict=True)
        ]
        return self._lay_out(rng, sorted(events, key=lambda event: event.place), room)

    def _lay_out(self, rng: np.random.Generator, events: list[_Event], room: int) -> TaskDocument:
        """Put the events, in order, into text at the breaks nearest to their places."""
        text = self.haystack.text(rng, room + room // 8 + 64)
        allowed = breaks(text)
        clauses = [text[start:end] for start, end in pairwise(allowed.tolist())]
        tokens_before = np.cumsum([0, *map(len, encode_texts(self.tokenizer, clauses))])
        # A break beyond the room would push the last lines off the document's end.
        tokens_before = tokens_before[tokens_before <= room]
        cuts = [int(allowed[_nearest(tokens_before, event.place)]) for event in events]
        # Places are in order, and so are the cuts.
        pieces = [as_lines(text[start:end]) for start, end in pairwise([0, *cuts])] + [text[cuts[-1] :]]
        *between, rest = encode_texts(self.tokenizer, pieces)
        ids: list[int] = []
        answers: list[Answer] = []
        last_said: dict[int, int] = {}
        for event, piece in zip(events, between, strict=True):
            ids += piece
            question_start = len(ids)
            ids += event.head
            start = len(ids)
            ids += event.answer
            if event.answer:
                answers.append(Answer(start, len(ids), question_start - last_said[event.fact]))
            ids += event.tail
            last_said[event.fact] = len(ids)
        ids += rest
        whole = whole_characters(self.tokenizer, ids, self.document_length)
        # Clauses may take more tokens together than alone and so move the last answer off the end.
        inside = tuple(answer for answer in answers if answer.end <= self.document_length)
        weights = loss_weights(self.document_length, inside, self.loss_on, self.answer_weight)
        return TaskDocument(np.asarray(whole, dtype=np.int64), weights, inside)

    def probe(
        self,
        rng: np.random.Generator,
        distance: int,
        *,
        before: int = 64,
        n_facts: int = 1,
        held_out: bool = False,
    ) -> RecallProbe:
        """One question whose fact ends exactly `distance` tokens before it.

        Args:
            before: tokens of text in front of the facts.
            n_facts: facts stated together, of which a random one is asked; those after it lie within the
                distance, as far as they fit.
            held_out: use names that training never sees.

        Raises:
            DataError: the distance is less than a line end.
        """
        spec = FactSpec(self.spec.templates, self.spec.digits, held_out or self.spec.held_out)
        facts = spec.draw(rng, n_facts)
        target = int(rng.integers(n_facts))
        statements = [encode_text(self.tokenizer, fact.statement) for fact in facts]
        after: list[int] = []
        for statement in statements[target + 1 :]:
            rest = distance - len(after) - len(statement)
            if rest == 0 or rest >= len(self._line_end):
                after += statement
        fact = facts[target]
        prompt = exact_tokens(self.haystack, rng, before)
        prompt += [token for statement in statements[: target + 1] for token in statement] + after
        prompt += exact_tokens(self.haystack, rng, distance - len(after))
        prompt += encode_text(self.tokenizer, fact.question)
        answer = encode_text(self.tokenizer, fact.answer)
        ids = np.asarray(prompt + answer, dtype=np.int64)
        return RecallProbe(ids, len(prompt), len(ids), distance, fact)


def _nearest(sorted_positions: np.ndarray, wanted: float) -> int:
    """Index of the position nearest to `wanted`."""
    index = int(np.searchsorted(sorted_positions, wanted))
    candidates = range(max(0, index - 1), min(index + 1, len(sorted_positions)))
    return min(candidates, key=lambda i: abs(sorted_positions[i] - wanted))
