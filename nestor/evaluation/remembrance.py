"""Effective remembrance: how much the first tokens of a text still steer what a model predicts after it.

    EffRem_T(t) = 1/2 sum_v |q(v | x[0:T]) - q(v | x[t:T])|   (Ruiz & Gu 2025, arXiv 2507.02782)

the total variation between the prediction after T tokens and that of the same model which never read the
first t of them, averaged over sequences: 0 where they make no difference, 1 where they make all of it. In
a text of many times the training length the first tokens should hardly count. A model for which dropping
even a few of them changes much has come to a state that only its very beginning explains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nestor.errors import ConfigError, NonFiniteError
from nestor.evaluation.passages import Passage, encode_passage, resampled_units
from nestor.evaluation.scoring import PIECE, Progress, Stream
from nestor.evaluation.statistics import cluster_sums, paired_ratio_differences, ratio_intervals
from nestor.evaluation.subjects import Subject


def dropped_counts(length: int) -> list[int]:
    """Numbers t of first tokens to drop from `length`: 1, 2, 4 ... up to half, and from there all but half,
    a quarter ... down to 1, so that both ends are looked at closely.

    Raises:
        ConfigError: the length is below 2.
    """
    if length < 2:
        raise ConfigError(f"length is {length}; effective remembrance needs at least 2 tokens")
    powers = [1 << power for power in range(length.bit_length()) if 2 << power <= length]
    return sorted({*powers, length // 2, *(length - power for power in powers)})


def total_variation(first: Tensor, second: Tensor) -> Tensor:
    """Half of the summed differences of two distributions over the last axis: in [0, 1].

    first, second: logits `[..., V]`; computed in float64.
    """
    one, other = (torch.softmax(logits.double(), dim=-1) for logits in (first, second))
    # Rounding may put two disjoint distributions a last place above 1.
    return (0.5 * (one - other).abs().sum(dim=-1)).clamp(max=1.0)


def measure_remembrance(
    subject: Subject,
    passages: Sequence[Passage],
    length: int,
    *,
    dropped: Sequence[int] | None = None,
    batch_size: int = 8,
    piece: int = PIECE,
    resample_seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure one model on the first `length` tokens of each passage, or as many as it can read.

    dropped: numbers t of tokens; default `dropped_counts`. The result is JSON; `sums` in it holds what a
    paired comparison needs.

    Raises:
        ConfigError: a number of dropped tokens that is negative or leaves nothing to read.
        NonFiniteError: the model gives a score that is not finite.
    """
    limit = subject.limit
    reads = length if limit is None else min(length, limit - len(subject.prefix))
    counts = dropped_counts(reads) if dropped is None else sorted(set(dropped))
    if not counts or counts[0] < 0 or counts[-1] >= reads:
        raise ConfigError(f"dropped tokens are {counts}; give numbers from 0 to {reads - 1}")
    texts = [encode_passage(passage, subject.tokenizer, reads, "tokens").ids for passage in passages]
    ids = torch.from_numpy(np.stack(texts))
    found = np.concatenate(
        [_distances(subject, rows, counts, piece, progress) for rows in ids.split(batch_size)]
    )
    clusters, unit = resampled_units(passages)
    sums = cluster_sums(found, clusters)
    sizes = cluster_sums(np.ones_like(found), clusters)
    notes = []
    if reads < length:
        notes.append(
            f"{subject.name} reads at most {limit} tokens, so its remembrance is of {reads:,} tokens"
        )
    if len(sums) < 2:
        notes.append("one passage only: there is no interval")
    return {
        "length": reads,
        "passages": len(passages),
        "documents": len({passage.document for passage in passages}),
        "resampled": unit,
        "read_tokens": len(passages) * (reads + sum(reads - count for count in counts if count)),
        "dropped": counts,
        "remembrance": [one.as_dict() for one in ratio_intervals(sums, sizes, seed=resample_seed)],
        "sums": {"distances": sums.tolist(), "passages": sizes.tolist()},
        "notes": notes,
    }


def compare_remembrance(
    names: Sequence[str], results: Sequence[dict[str, Any]], *, resample_seed: int = 0
) -> list[dict[str, Any]]:
    """Paired differences of every later model against the first, of those that read as many tokens."""
    out = []
    base = results[0]
    for name, result in zip(names[1:], results[1:], strict=True):
        if result["dropped"] != base["dropped"] or result["length"] != base["length"]:
            continue
        pairs = [(one["sums"]["distances"], one["sums"]["passages"]) for one in (result, base)]
        differences = paired_ratio_differences(*pairs, seed=resample_seed)
        out.append(
            {
                "model": name,
                "baseline": names[0],
                "dropped": result["dropped"],
                "remembrance": [interval.as_dict() for interval in differences],
            }
        )
    return out


@torch.inference_mode()
def _distances(
    subject: Subject, ids: Tensor, counts: Sequence[int], piece: int, progress: Progress | None
) -> NDArray:
    """Total variation for each row of ids `[B, T]` and each number of dropped tokens: `[B, len(counts)]`."""
    whole = _last_logits(subject, ids, piece, progress)
    columns = [
        # Nothing dropped is the same text, which is not read twice.
        total_variation(
            whole, whole if count == 0 else _last_logits(subject, ids[:, count:], piece, progress)
        )
        for count in counts
    ]
    return torch.stack(columns, dim=1).cpu().numpy()


def _last_logits(subject: Subject, ids: Tensor, piece: int, progress: Progress | None) -> Tensor:
    """Logits `[B, V]` behind rows that are read from a fresh State, the subject's prefix in front."""
    prefix = torch.tensor([subject.prefix], dtype=torch.int64).expand(len(ids), -1)
    logits = Stream(subject.model, piece, progress).read(torch.cat([prefix, ids], dim=1))[:, -1]
    if not bool(torch.isfinite(logits).all()):
        raise NonFiniteError(
            f"{subject.name} gave a score that is not finite; try --dtype float32, or check the weights"
        )
    return logits
