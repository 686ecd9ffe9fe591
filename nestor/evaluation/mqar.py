"""Multi-query associative recall over plain tokens, by distance (Arora et al. 2023, arXiv:2312.04927).

The task is one of plain token ids: it says something only of a model that was trained on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nestor.data.tasks.mqar import MqarTask
from nestor.errors import ConfigError
from nestor.evaluation.recall import doubling_distances
from nestor.evaluation.scoring import PIECE, Progress, Row, score_rows
from nestor.evaluation.statistics import paired_ratio_differences, ratio_intervals
from nestor.evaluation.subjects import Subject


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

    Answers of one document share a context, so the resampled unit is the document.

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
        "sums": {"right": right.sum(axis=1).tolist(), "asked": asked.sum(axis=1).tolist()},
        "notes": [],
    }


def compare_mqar(
    names: Sequence[str], results: Sequence[dict[str, Any]], *, resample_seed: int = 0
) -> list[dict[str, Any]]:
    """Paired differences in accuracy of every later model against the first, where both read the same
    documents.
    """
    base = results[0]
    out = []
    for name, result in zip(names[1:], results[1:], strict=True):
        if any(result[key] != base[key] for key in ("vocab_size", "document_length")):
            continue
        first, second = ((r["sums"]["right"], r["sums"]["asked"]) for r in (base, result))
        interval = paired_ratio_differences(second, first, seed=resample_seed)[0]
        out.append({"model": name, "baseline": names[0], "exact_match": interval.as_dict()})
    return out
