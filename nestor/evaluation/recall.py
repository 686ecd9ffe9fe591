"""Recall against distance: a fact is stated once in real text, and asked for at growing distances after it.

A document is read once. Where a question is due, the State is kept, the question is read from it, and the
document goes on from the kept State: no question or answer is ever part of what later questions come after,
and every answer is what the same text with the question at its end would give.

An answer counts if greedy decoding would give it. Decoding is deterministic, so that is the case exactly
if every token of the answer is the likeliest one after the question and the answer's earlier tokens: one
forward pass with the answer in place tells, and no text is generated.

Distances are in tokens between the end of the statement and the beginning of the question. At each of them
a second question asks for a name of which the document says nothing: what is answered right there is luck
or a leak.

Bits of the answer move before exact match does. Values are drawn uniformly, so a model that does not know the
fact needs at least log2(values) bits on average, however it guesses: what is below that, it has kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nestor.data.tasks.facts import Fact, FactSpec, guess_bits
from nestor.data.tasks.haystack import Haystack, exact_tokens
from nestor.data.tokenizers import encode_text
from nestor.errors import ConfigError
from nestor.evaluation.passages import encode_with_bytes
from nestor.evaluation.scoring import PIECE, Branch, Progress, Stream, greedy, score_branches
from nestor.evaluation.statistics import mean_interval, paired_proportion_difference, wilson_interval
from nestor.evaluation.subjects import Subject

# Tokens of text before the facts, at least.
_BEFORE = 64


@dataclass(frozen=True)
class RecallDocument:
    """Text that states a fact, and where it is asked for.

    `ids` [n] int64 is the text without questions. The statement of `fact` ends before token `stated`; the
    question at distance d comes after token `stated + d - 1`, and `distances` is in order. `unstated` is
    a fact about a name that no statement of the document has.
    """

    ids: NDArray
    stated: int
    fact: Fact
    unstated: Fact
    distances: tuple[int, ...]


def doubling_distances(longest: int, shortest: int = 16) -> list[int]:
    """Powers of two times `shortest` up to `longest`, which is the last."""
    if shortest < 1 or longest < shortest:
        raise ConfigError(
            f"distances from {shortest} to {longest} are asked for; they must be positive and in order"
        )
    values = []
    while shortest < longest:
        values.append(shortest)
        shortest *= 2
    return [*values, longest]


def draw_documents(
    haystack: Haystack,
    distances: Sequence[int],
    count: int,
    *,
    seeds: Sequence[int] = (0,),
    n_facts: int = 1,
    held_out: bool = True,
    spec: FactSpec | None = None,
) -> list[RecallDocument]:
    """`count` documents for each seed; the same arguments give the same documents.

    Args:
        distances: where each document's fact is asked for.
        n_facts: facts stated one after the other, of which a random one is asked; those after it lie
            between it and the question, as far as they fit.
        held_out: ask for names that no training text of the task has.

    Raises:
        ConfigError: a distance or count that is not positive, or more facts than names.
        DataError: a distance, or the difference of two, is less than a line end.
    """
    if count < 1 or not distances or min(distances) < 1:
        raise ConfigError(f"distances are {list(distances)} and repeats {count}; all must be at least 1")
    chosen = spec or FactSpec()
    chosen = FactSpec(chosen.templates, chosen.digits, held_out or chosen.held_out)
    # Room for the longest, so that all documents state their fact before the same place.
    longest = chosen.longest(lambda statement: len(encode_text(haystack.tokenizer, statement)))
    stated = _BEFORE + n_facts * longest
    return [
        _document(haystack, rng, chosen, n_facts, stated, sorted(set(distances)))
        for seed in seeds
        for rng in [np.random.default_rng((seed, 0xFAC7))]
        for _ in range(count)
    ]


def measure_recall(
    subject: Subject,
    documents: Sequence[RecallDocument],
    *,
    batch_size: int = 8,
    piece: int = PIECE,
    resample_seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Exact-match accuracy, accuracy by answer byte and answer bits against distance. The result is JSON.

    All documents have the same distances. Documents are independent, so at each distance the intervals are
    those of independent questions. A distance beyond what a model of limited context reads has `n` 0.
    """
    distances = documents[0].distances
    fitting = [d for d in distances if all(_fits(subject, document, d) for document in documents)]
    scored = score_branches(
        subject.model,
        [document.ids.tolist() for document in documents],
        [_questions(subject, document, fitting) for document in documents],
        batch_size=batch_size,
        prefix=subject.prefix,
        piece=piece,
        progress=progress,
    )
    weights = [_answer_bytes(subject, document.fact) for document in documents]
    table: list[dict[str, Any]] = []
    exact: dict[str, list[Any]] = {}
    answer_bits: dict[str, list[Any]] = {}
    leaks = 0
    for number, distance in enumerate(distances):
        if distance not in fitting:
            exact[str(distance)] = [None] * len(documents)
            answer_bits[str(distance)] = [None] * len(documents)
            table.append({"distance": distance, **_NOTHING})
            continue
        asked = [answers[2 * number] for answers in scored]
        unstated = [answers[2 * number + 1] for answers in scored]
        right = [bool(correct.all()) for _, correct in asked]
        bits = np.array([float(b.sum()) for b, _ in asked])
        guess = [float(b.sum()) for b, _ in unstated]
        share = [float((w * c.numpy()).sum() / w.sum()) for w, (_, c) in zip(weights, asked, strict=True)]
        leaks += sum(bool(correct.all()) for _, correct in unstated)
        exact[str(distance)], answer_bits[str(distance)] = right, [round(float(b), 4) for b in bits]
        table.append(
            {
                "distance": distance,
                "n": len(documents),
                "exact_match": wilson_interval(sum(right), len(right)).as_dict(),
                "byte_accuracy": mean_interval(share, seed=resample_seed).as_dict(),
                "answer_bits": mean_interval(bits, seed=resample_seed).as_dict(),
                "unstated_bits": mean_interval(guess, seed=resample_seed).as_dict(),
            }
        )
    left_out = len(distances) - len(fitting)
    return {
        "task": "facts",
        "distances": table,
        "guess_bits": float(np.mean([guess_bits(document.fact.value) for document in documents])),
        "control": {"asked": len(fitting) * len(documents), "right": leaks},
        "samples": _samples(subject, documents[0], fitting, piece),
        "exact": exact,
        "bits": answer_bits,
        "notes": [
            f"{subject.name} reads at most {subject.limit} tokens; {left_out} greater distances are left out "
            f"for it"
        ]
        if left_out
        else [],
    }


def compare_recall(
    names: Sequence[str], results: Sequence[dict[str, Any]], *, resample_seed: int = 0
) -> list[dict[str, Any]]:
    """Paired differences of every later model against the first, by distance, on the same questions."""
    out = []
    base = results[0]
    for name, result in zip(names[1:], results[1:], strict=True):
        table = []
        for distance in base["exact"]:
            first, second = base["exact"][distance], result["exact"][distance]
            if None in first or None in second:
                continue
            bits = np.subtract(result["bits"][distance], base["bits"][distance])
            table.append(
                {
                    "distance": int(distance),
                    "exact_match": paired_proportion_difference(second, first).as_dict(),
                    "answer_bits": mean_interval(bits, seed=resample_seed).as_dict(),
                }
            )
        out.append({"model": name, "baseline": names[0], "distances": table})
    return out


_NOTHING: dict[str, Any] = {"n": 0} | dict.fromkeys(
    ("exact_match", "byte_accuracy", "answer_bits", "unstated_bits")
)


def _document(
    haystack: Haystack,
    rng: np.random.Generator,
    spec: FactSpec,
    n_facts: int,
    stated: int,
    distances: Sequence[int],
) -> RecallDocument:
    tokenizer = haystack.tokenizer
    *facts, unstated = spec.draw(rng, n_facts + 1)
    target = int(rng.integers(n_facts))
    statements = [encode_text(tokenizer, fact.statement) for fact in facts]
    told = [token for statement in statements[: target + 1] for token in statement]
    ids = exact_tokens(haystack, rng, stated - len(told)) + told
    waiting = statements[target + 1 :]
    line_end = len(encode_text(tokenizer, "\n"))
    for before, distance in pairwise([0, *distances]):
        room = distance - before
        # The other facts follow as soon as they fit; what is left must be nothing or hold a line end.
        while waiting and (room == len(waiting[0]) or room >= len(waiting[0]) + line_end):
            room -= len(waiting[0])
            ids += waiting.pop(0)
        ids += exact_tokens(haystack, rng, room)
    return RecallDocument(np.asarray(ids, dtype=np.int64), stated, facts[target], unstated, tuple(distances))


def _questions(subject: Subject, document: RecallDocument, distances: Sequence[int]) -> list[Branch]:
    """At each distance the question about the stated fact and the one about the fact never stated."""
    out = []
    for distance in distances:
        for fact in (document.fact, document.unstated):
            question, answer = (encode_text(subject.tokenizer, t) for t in (fact.question, fact.answer))
            out.append(Branch(document.stated + distance, [*question, *answer], len(question)))
    return out


def _fits(subject: Subject, document: RecallDocument, distance: int) -> bool:
    if subject.limit is None:
        return True
    longest = max(len(branch.ids) for branch in _questions(subject, document, [distance]))
    return len(subject.prefix) + document.stated + distance + longest <= subject.limit


def _answer_bytes(subject: Subject, fact: Fact) -> NDArray:
    return np.asarray(encode_with_bytes(subject.tokenizer, fact.answer)[1])


@torch.inference_mode()
def _samples(
    subject: Subject, document: RecallDocument, distances: Sequence[int], piece: int
) -> list[dict[str, Any]]:
    """The answers of one document decoded greedily, for the report."""
    stream = Stream(subject.model, piece)
    ids = [*subject.prefix, *document.ids.tolist()]
    out, read = [], 0
    for distance, branch in zip(distances, _questions(subject, document, distances)[::2], strict=True):
        place = len(subject.prefix) + branch.after
        stream.read(torch.as_tensor([ids[read:place]]))
        read = place
        question, wanted = list(branch.ids[: branch.start]), list(branch.ids[branch.start :])
        answer = greedy(stream.fork(), question, len(wanted))
        out.append(
            {
                "distance": distance,
                "statement": document.fact.statement.strip(),
                "question": document.fact.question,
                "wanted": document.fact.answer,
                "given": subject.tokenizer.decode(answer),
                "right": answer == wanted,
            }
        )
    return out
