"""Recall against distance: facts planted in real text, and associative recall over plain tokens.

An answer counts if greedy decoding would give it. Decoding is deterministic, so that is the case exactly
if every token of the answer is the likeliest one after the prompt and the answer's earlier tokens: one
forward pass with the answer in place tells, and no text is generated.

Distances are in tokens between the end of the statement and the beginning of the question.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestor.data.tasks.facts import FactSpec
from nestor.data.tasks.haystack import Haystack, exact_tokens
from nestor.data.tasks.mqar import MqarTask
from nestor.data.tasks.recall import RecallProbe, RecallTask
from nestor.data.tokenizers import encode_text
from nestor.errors import ConfigError
from nestor.evaluation.passages import encode_with_bytes
from nestor.evaluation.scoring import PIECE, Progress, Row, greedy, score_rows
from nestor.evaluation.statistics import paired_ratio_differences, ratio_intervals, wilson_interval
from nestor.evaluation.subjects import Subject

# Samples that the report shows of each distance.
_SHOWN = 1


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


def draw_probes(
    haystack: Haystack,
    distances: Sequence[int],
    count: int,
    *,
    seeds: Sequence[int] = (0,),
    n_facts: int = 1,
    before: int = 64,
    held_out: bool = True,
    spec: FactSpec | None = None,
) -> list[RecallProbe]:
    """`count` probes for each distance and seed; the same arguments give the same probes.

    Args:
        n_facts: facts stated together, of which one is asked.
        before: tokens of text before the facts.
        held_out: ask for names that no training text of the task has.

    Raises:
        ConfigError: a distance or count that is not positive.
    """
    if count < 1 or not distances or min(distances) < 1:
        raise ConfigError(f"distances are {list(distances)} and repeats {count}; all must be at least 1")
    task = _task(haystack, spec)
    return [
        task.probe(rng, distance, before=before, n_facts=n_facts, held_out=held_out)
        for seed in seeds
        for distance in distances
        # The distance is part of the seed: a distance's probes do not depend on which others are measured.
        for rng in [np.random.default_rng((seed, distance))]
        for _ in range(count)
    ]


def draw_controls(
    haystack: Haystack,
    count: int,
    *,
    length: int = 256,
    seeds: Sequence[int] = (0,),
    held_out: bool = True,
    spec: FactSpec | None = None,
) -> list[RecallProbe]:
    """Questions about facts that the text before them never states; what is answered right here is luck or
    a leak.
    """
    chosen = spec or FactSpec()
    chosen = FactSpec(chosen.templates, chosen.digits, held_out or chosen.held_out)
    out = []
    for seed in seeds:
        rng = np.random.default_rng((seed, 0xC0))
        for _ in range(count):
            fact = chosen.draw(rng, 1)[0]
            prompt = exact_tokens(haystack, rng, length) + encode_text(haystack.tokenizer, fact.question)
            answer = encode_text(haystack.tokenizer, fact.answer)
            ids = np.asarray(prompt + answer, dtype=np.int64)
            out.append(RecallProbe(ids, len(prompt), len(ids), -1, fact))
    return out


def measure_recall(
    subject: Subject,
    probes: Sequence[RecallProbe],
    *,
    controls: Sequence[RecallProbe] = (),
    batch_size: int = 8,
    piece: int = PIECE,
    resample_seed: int = 0,
    samples: int = _SHOWN,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Exact-match accuracy, accuracy by answer byte and answer bits against distance. The result is JSON.

    A probe longer than a model of limited context reads is left out, and its distance has `n` 0.

    Args:
        samples: answers of each distance that are decoded and kept for the report.
    """
    scored = _answers(subject, [*probes, *controls], batch_size, piece, progress)
    table, raw = [], {}
    for distance in sorted({probe.distance for probe in probes}):
        here = [i for i, probe in enumerate(probes) if probe.distance == distance]
        rows = [scored[i] for i in here]
        raw[str(distance)] = [None if row is None else row[0] == 1.0 for row in rows]
        table.append({"distance": distance, **_summary(rows, resample_seed)})
    control = [scored[len(probes) + i] for i in range(len(controls))]
    return {
        "task": "facts",
        "distances": table,
        "control": _summary(control, resample_seed) if controls else None,
        "samples": [_sample(subject, probe, piece) for probe in _shown(subject, probes, samples)],
        "exact": raw,
        "notes": _limit_notes(subject, scored),
    }


def measure_mqar(
    subject: Subject,
    *,
    document_length: int,
    count: int,
    n_pairs: int = 8,
    vocab_size: int | None = None,
    seeds: Sequence[int] = (0,),
    batch_size: int = 8,
    piece: int = PIECE,
    resample_seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Multi-query associative recall by distance, in bins that double. The result is JSON.

    The task is one of plain token ids: it says something only of a model that was trained on it. Answers
    of one document share a context, so the resampled unit is the document.

    Args:
        count: documents for each seed.
        vocab_size: ids of the task; default 256, or all the model has if it has fewer.

    Raises:
        ConfigError: the model has fewer ids than the task, or the document is too short for the pairs.
    """
    known = int(subject.model.config.vocab_size)
    ids_used = min(256, known) if vocab_size is None else vocab_size
    if ids_used > known:
        raise ConfigError(f"the task has {ids_used} token ids, {subject.name} knows {known}; ask for fewer")
    if subject.limit is not None and document_length > subject.limit:
        raise ConfigError(
            f"{subject.name} reads at most {subject.limit} tokens; {document_length} are asked for"
        )
    task = MqarTask(ids_used, n_pairs, document_length)
    documents = [
        task.document(rng)
        for seed in seeds
        for rng in [np.random.default_rng((seed, 1))]
        for _ in range(count)
    ]
    rows = [Row(document.ids.tolist(), 1, document_length) for document in documents]
    scored = score_rows(subject.model, rows, batch_size=batch_size, piece=piece, progress=progress)
    edges = [0, *list(doubling_distances(max(document_length, 16), 8))]
    right, asked, bits = (np.zeros((len(documents), len(edges) - 1)) for _ in range(3))
    for row, (document, (row_bits, row_correct)) in enumerate(zip(documents, scored, strict=True)):
        for answer in document.answers:
            which = int(np.searchsorted(edges, answer.distance, side="right")) - 1
            which = min(which, len(edges) - 2)
            # Row.start is 1, so token t of the document is element t - 1.
            right[row, which] += float(row_correct[answer.start - 1])
            bits[row, which] += float(row_bits[answer.start - 1])
            asked[row, which] += 1
    accuracy = ratio_intervals(right, asked, seed=resample_seed)
    answer_bits = ratio_intervals(bits, asked, seed=resample_seed)
    return {
        "task": "mqar",
        "document_length": document_length,
        "pairs": n_pairs,
        "vocab_size": ids_used,
        "chance": 1 / (ids_used // 3),
        "edges": edges,
        "n": asked.sum(axis=0).astype(int).tolist(),
        "accuracy": [interval.as_dict() for interval in accuracy],
        "answer_bits": [interval.as_dict() for interval in answer_bits],
        "overall": ratio_intervals(right.sum(axis=1), asked.sum(axis=1), seed=resample_seed)[0].as_dict(),
        "notes": [],
    }


def compare_recall(
    names: Sequence[str], results: Sequence[dict[str, Any]], *, resample_seed: int = 0
) -> list[dict[str, Any]]:
    """Paired differences in exact match of every later model against the first, by distance; same probes."""
    out = []
    base = results[0]["exact"]
    for name, result in zip(names[1:], results[1:], strict=True):
        table = []
        for distance in base:
            pairs = [
                (float(a), float(b))
                for a, b in zip(base[distance], result["exact"][distance], strict=True)
                if a is not None and b is not None
            ]
            if pairs:
                first, second = np.asarray(pairs).T
                ones = np.ones(len(pairs))
                interval = paired_ratio_differences((second, ones), (first, ones), seed=resample_seed)[0]
                table.append({"distance": int(distance), "exact_match": interval.as_dict()})
        out.append({"model": name, "baseline": names[0], "distances": table})
    return out


def _task(haystack: Haystack, spec: FactSpec | None) -> RecallTask:
    # Of the task only `probe` is used; the document it could make for training is one of the smallest.
    return RecallTask(haystack, 512, n_facts=1, n_questions=1, spec=spec)


def _answers(
    subject: Subject,
    probes: Sequence[RecallProbe],
    batch_size: int,
    piece: int,
    progress: Progress | None,
) -> list[tuple[float, float, float] | None]:
    """(exact 0 or 1, share of answer bytes right, bits of the answer) of each probe; None if it is too
    long.
    """
    fits = [subject.limit is None or len(subject.prefix) + probe.end <= subject.limit for probe in probes]
    rows = [Row(p.ids.tolist(), p.start, p.end) for p, good in zip(probes, fits, strict=True) if good]
    scored = iter(
        score_rows(
            subject.model, rows, batch_size=batch_size, prefix=subject.prefix, piece=piece, progress=progress
        )
    )
    out: list[tuple[float, float, float] | None] = []
    for probe, good in zip(probes, fits, strict=True):
        if not good:
            out.append(None)
            continue
        bits, correct = next(scored)
        weights = _answer_bytes(subject, probe)
        share = float((weights * correct.numpy()).sum() / weights.sum())
        out.append((float(correct.all()), share, float(bits.sum())))
    return out


def _answer_bytes(subject: Subject, probe: RecallProbe) -> NDArray:
    ids, counts = encode_with_bytes(subject.tokenizer, probe.fact.answer)
    length = probe.end - probe.start
    return counts if len(ids) == length else np.ones(length)


def _summary(answers: Sequence[tuple[float, float, float] | None], seed: int) -> dict[str, Any]:
    rows = [answer for answer in answers if answer is not None]
    if not rows:
        return {"n": 0, "exact_match": None, "byte_accuracy": None, "answer_bits": None}
    exact, share, bits = (np.asarray(column) for column in zip(*rows, strict=True))
    ones = np.ones(len(rows))
    return {
        "n": len(rows),
        "exact_match": wilson_interval(int(exact.sum()), len(rows)).as_dict(),
        "byte_accuracy": ratio_intervals(share, ones, seed=seed)[0].as_dict(),
        "answer_bits": ratio_intervals(bits, ones, seed=seed)[0].as_dict(),
    }


def _shown(subject: Subject, probes: Sequence[RecallProbe], count: int) -> list[RecallProbe]:
    seen: dict[int, int] = {}
    out = []
    for probe in sorted(probes, key=lambda p: p.distance):
        fits = subject.limit is None or len(subject.prefix) + probe.end <= subject.limit
        if fits and seen.get(probe.distance, 0) < count:
            seen[probe.distance] = seen.get(probe.distance, 0) + 1
            out.append(probe)
    return out


def _sample(subject: Subject, probe: RecallProbe, piece: int) -> dict[str, Any]:
    """One probe decoded greedily, for the report."""
    prompt = [*subject.prefix, *probe.ids[: probe.start].tolist()]
    answer = greedy(subject.model, prompt, probe.end - probe.start, piece=piece)
    given = subject.tokenizer.decode(answer)
    return {
        "distance": probe.distance,
        "statement": probe.fact.statement.strip(),
        "question": probe.fact.question,
        "wanted": probe.fact.answer,
        "given": given,
        "right": answer == probe.ids[probe.start : probe.end].tolist(),
    }


def _limit_notes(subject: Subject, scored: Sequence[Any]) -> list[str]:
    left_out = sum(row is None for row in scored)
    if not left_out:
        return []
    return [
        f"{subject.name} reads at most {subject.limit} tokens; {left_out} longer probes are left out for it"
    ]
