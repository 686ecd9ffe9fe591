"""Bits per byte of held-out text, by position in the document and by how much context is given.

By position: every token of a long passage is predicted from all that came before it, the State carried
through the whole passage. A model that uses its memory goes on improving beyond what its attention
reaches.

By context length: the same scored tokens each time (blocks in the later part of the passages), read from
a fresh State that starts only L units before the block (`reset`), against the State carried from the
passage's beginning (`carried`). What separates the two is what the model kept.

A token of the passage is weighed by its UTF-8 bytes, so models with different tokenizers are comparable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestor.errors import ConfigError
from nestor.evaluation.passages import Encoded, Passage, encode_passage, resampled_units
from nestor.evaluation.scoring import PIECE, Progress, Row, score_rows
from nestor.evaluation.statistics import cluster_sums, paired_ratio_differences, ratio_intervals
from nestor.evaluation.subjects import Subject

SCALES = ("log", "linear")


@dataclass(frozen=True)
class Layout:
    """What is scored: bins of positions, and blocks read with different amounts of context. Lengths in
    units.
    """

    length: int
    edges: tuple[int, ...]
    contexts: tuple[int, ...]
    block: int
    blocks: tuple[int, ...]
    """Starts of the blocks."""
    unit: str = "tokens"
    scale: str = "log"


def make_layout(
    length: int,
    *,
    contexts: Sequence[int] | None = None,
    scale: str = "log",
    bins: int = 16,
    block: int | None = None,
    blocks: int = 2,
    unit: str = "tokens",
) -> Layout:
    """Bins and blocks for passages of `length` units.

    Args:
        contexts: context lengths; default powers of four from 16 to half of the length.
        scale: "log" doubles from 16 on; "linear" makes `bins` equal bins.
        block: units of a scored block; default at most 128, and an eighth of the length.
        blocks: blocks in each passage, between the greatest context and the end.

    Raises:
        ConfigError: something is not positive, or a context leaves no room for a block.
    """
    if length < 32:
        raise ConfigError(f"length is {length}; perplexity by position needs at least 32")
    if scale not in SCALES:
        raise ConfigError(f"scale is {scale!r}; it is one of {', '.join(SCALES)}")
    if bins < 1 or blocks < 1:
        raise ConfigError(f"bins is {bins} and blocks {blocks}; both must be at least 1")
    block = min(128, length // 8) if block is None else block
    given = sorted(set(contexts)) if contexts is not None else _growing(16, length // 2, 4)
    if block < 1 or any(context < 1 for context in given):
        raise ConfigError(f"block is {block} and contexts are {given}; all must be at least 1")
    widest = given[-1] if given else 0
    if widest + block > length:
        raise ConfigError(
            f"a context of {widest} and a scored block of {block} do not fit into a length of {length}; "
            f"ask for contexts of at most {length - block}"
        )
    if scale == "log":
        edges = [0, *_growing(16, length - 1, 2), length]
    else:
        edges = sorted({round(i * length / bins) for i in range(bins + 1)})
    starts = np.linspace(widest, length - block, blocks).tolist() if given else []
    return Layout(
        length=length,
        edges=tuple(edges),
        contexts=tuple(given),
        block=block,
        blocks=tuple(sorted({int(start) for start in starts})),
        unit=unit,
        scale=scale,
    )


def measure_perplexity(
    subject: Subject,
    passages: Sequence[Passage],
    layout: Layout,
    *,
    batch_size: int = 8,
    piece: int = PIECE,
    resample_seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure one model. The result is JSON; `sums` in it holds what a paired comparison needs."""
    encoded = [encode_passage(passage, subject.tokenizer, layout.length, layout.unit) for passage in passages]
    bits = _by_position(subject, encoded, batch_size, piece, progress)
    clusters, unit = resampled_units(passages)
    position_bits, position_bytes = _bin_sums(encoded, bits, layout.edges)
    position_bits, position_bytes = (cluster_sums(a, clusters) for a in (position_bits, position_bytes))
    carried, block_bytes = _block_sums(encoded, bits, layout)
    resets = [
        _with_context(subject, encoded, layout, context, batch_size, piece, progress)
        for context in layout.contexts
    ]
    context_sums = {
        "bytes": cluster_sums(block_bytes, clusters),
        "carried": cluster_sums(carried, clusters),
        "reset": [None if reset is None else cluster_sums(reset, clusters) for reset in resets],
    }
    tokens = sum(int(np.isfinite(row).sum()) for row in bits)
    overall = ratio_intervals(position_bits.sum(axis=1), position_bytes.sum(axis=1), seed=resample_seed)[0]
    result = {
        "unit": layout.unit,
        "length": layout.length,
        "passages": len(passages),
        "documents": len({passage.document for passage in passages}),
        "resampled": unit,
        "scored_tokens": tokens,
        "scored_bytes": int(position_bytes.sum()),
        "bits_per_byte": overall.as_dict(),
        "bits_per_token": float(position_bits.sum()) / max(1, tokens),
        "token_perplexity": float(2.0 ** (position_bits.sum() / max(1, tokens))),
        "by_seed": _by_seed(passages, encoded, bits),
        "by_position": {
            "edges": list(layout.edges),
            "scale": layout.scale,
            "bits_per_byte": [
                i.as_dict() for i in ratio_intervals(position_bits, position_bytes, seed=resample_seed)
            ],
        },
        "by_context": _context_table(layout, context_sums, resample_seed),
        "sums": {"bits": position_bits.tolist(), "bytes": position_bytes.tolist()},
        "notes": _notes(subject, layout, len(passages)),
    }
    return result


def compare_perplexity(
    names: Sequence[str], results: Sequence[dict[str, Any]], *, resample_seed: int = 0
) -> list[dict[str, Any]]:
    """Paired differences of every later model against the first, over all of the text and by position."""
    out = []
    base = results[0]["sums"]
    for name, result in zip(names[1:], results[1:], strict=True):
        pair = [np.asarray(base["bits"]), np.asarray(base["bytes"])]
        other = [np.asarray(result["sums"]["bits"]), np.asarray(result["sums"]["bytes"])]
        # A model with a context limit says nothing of later positions; those the other one answers alone.
        both = (pair[1].sum(axis=0) > 0) & (other[1].sum(axis=0) > 0)
        total = paired_ratio_differences(
            (other[0][:, both].sum(axis=1), other[1][:, both].sum(axis=1)),
            (pair[0][:, both].sum(axis=1), pair[1][:, both].sum(axis=1)),
            seed=resample_seed,
        )[0]
        bins = paired_ratio_differences((other[0], other[1]), (pair[0], pair[1]), seed=resample_seed)
        out.append(
            {
                "model": name,
                "baseline": names[0],
                "bits_per_byte": total.as_dict(),
                "by_position": [interval.as_dict() for interval in bins],
            }
        )
    return out


def _by_position(
    subject: Subject, encoded: Sequence[Encoded], batch_size: int, piece: int, progress: Progress | None
) -> list[NDArray]:
    """Bits of every token of each passage; nan for the first without a prefix, and beyond a context limit."""
    limit = None if subject.limit is None else max(1, subject.limit - len(subject.prefix) + 1)
    rows = [Row(e.ids[:limit].tolist(), 0, len(e.ids[:limit])) for e in encoded]
    scored = score_rows(
        subject.model, rows, batch_size=batch_size, prefix=subject.prefix, piece=piece, progress=progress
    )
    bits = []
    for e, (values, _) in zip(encoded, scored, strict=True):
        row = np.full(len(e.ids), np.nan)
        row[: len(values)] = values.numpy()
        bits.append(row)
    return bits


def _with_context(
    subject: Subject,
    encoded: Sequence[Encoded],
    layout: Layout,
    context: int,
    batch_size: int,
    piece: int,
    progress: Progress | None,
) -> NDArray | None:
    """Bits of all blocks of each passage [n], each block read from a fresh State `context` units before
    it.
    """
    if subject.limit is not None and len(subject.prefix) + context + layout.block > subject.limit:
        return None
    rows, owner = [], []
    for number, e in enumerate(encoded):
        for start in layout.blocks:
            first, end = np.searchsorted(e.place, [start, start + layout.block])
            # A token longer than the context is given whole: the first scored one needs something before it.
            begin = max(0, min(int(np.searchsorted(e.place, start - context)), int(first) - 1))
            rows.append(Row(e.ids[begin:end].tolist(), int(first) - begin, int(end) - begin))
            owner.append(number)
    scored = score_rows(
        subject.model, rows, batch_size=batch_size, prefix=subject.prefix, piece=piece, progress=progress
    )
    sums = np.zeros(len(encoded))
    for number, (values, _) in zip(owner, scored, strict=True):
        sums[number] += float(values.sum())
    return sums


def _block_sums(
    encoded: Sequence[Encoded], bits: Sequence[NDArray], layout: Layout
) -> tuple[NDArray, NDArray]:
    """Bits with the State carried, and bytes, of all blocks of each passage: [n], nan bits beyond a limit."""
    sums, counts = np.zeros(len(encoded)), np.zeros(len(encoded))
    for number, (e, row) in enumerate(zip(encoded, bits, strict=True)):
        for start in layout.blocks:
            first, end = np.searchsorted(e.place, [start, start + layout.block])
            sums[number] += row[first:end].sum()
            counts[number] += e.bytes[first:end].sum()
    return sums, counts


def _bin_sums(
    encoded: Sequence[Encoded], bits: Sequence[NDArray], edges: Sequence[int]
) -> tuple[NDArray, NDArray]:
    """Bits and bytes of the scored tokens of each passage by the bin of their place: [n, len(edges) - 1]."""
    sums, counts = (np.zeros((len(encoded), len(edges) - 1)) for _ in range(2))
    for number, (e, row) in enumerate(zip(encoded, bits, strict=True)):
        scored = np.isfinite(row)
        which = np.searchsorted(edges, e.place[scored], side="right") - 1
        np.add.at(sums[number], which, row[scored])
        np.add.at(counts[number], which, e.bytes[scored])
    return sums, counts


def _context_table(layout: Layout, sums: dict[str, Any], seed: int) -> dict[str, Any]:
    lengths = sums["bytes"]
    carried = sums["carried"] if np.isfinite(sums["carried"]).all() and len(layout.blocks) else None
    rows = []
    for context, reset in zip(layout.contexts, sums["reset"], strict=True):
        row: dict[str, Any] = {"context": context, "bits_per_byte": None, "minus_carried": None}
        if reset is not None:
            row["bits_per_byte"] = ratio_intervals(reset, lengths, seed=seed)[0].as_dict()
            if carried is not None:
                difference = paired_ratio_differences((reset, lengths), (carried, lengths), seed=seed)[0]
                row["minus_carried"] = difference.as_dict()
        rows.append(row)
    return {
        "block": layout.block,
        "blocks": list(layout.blocks),
        "contexts": rows,
        "carried": None if carried is None else ratio_intervals(carried, lengths, seed=seed)[0].as_dict(),
    }


def _by_seed(
    passages: Sequence[Passage], encoded: Sequence[Encoded], bits: Sequence[NDArray]
) -> dict[str, float]:
    sums: dict[int, list[float]] = {}
    for passage, e, row in zip(passages, encoded, bits, strict=True):
        scored = np.isfinite(row)
        total = sums.setdefault(passage.seed, [0.0, 0.0])
        total[0] += float(row[scored].sum())
        total[1] += float(e.bytes[scored].sum())
    return {str(seed): total / max(1.0, count) for seed, (total, count) in sums.items()}


def _notes(subject: Subject, layout: Layout, passages: int) -> list[str]:
    notes = []
    if subject.limit is not None and subject.limit < layout.length:
        notes.append(
            f"{subject.name} reads at most {subject.limit} tokens; later positions and longer contexts are "
            f"left out for it"
        )
    if passages < 2:
        notes.append("one passage only: there is no interval")
    return notes


def _growing(first: int, last: int, factor: int) -> list[int]:
    values = []
    while first <= last:
        values.append(first)
        first *= factor
    return values
