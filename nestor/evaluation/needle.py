"""A needle in a haystack of real text: one sentence hidden at a depth of a text of some length, then asked
for.

Exact match of the answer as greedy decoding gives it (see `recall`), on a grid of lengths and depths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestor.data.tasks.haystack import Haystack
from nestor.data.tasks.needle import NEEDLE_KINDS, needle
from nestor.data.tokenizers import encode_text
from nestor.errors import ConfigError, suggest
from nestor.evaluation.scoring import PIECE, Progress, Row, Stream, greedy, score_rows
from nestor.evaluation.statistics import paired_proportion_difference, wilson_interval
from nestor.evaluation.subjects import Subject

VARIANTS = ("passkey", "number", "word")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class NeedleProbe:
    """`ids[:start]` is the prompt, `ids[start:]` the answer. `real_depth` is where the needle came to lie, at
    the break of a line or clause that is nearest to `depth`."""

    ids: NDArray
    start: int
    variant: str
    length: int
    depth: float
    real_depth: float
    value: str
    question: str
    answer: str


def draw_needles(
    haystack: Haystack,
    lengths: Sequence[int],
    count: int,
    *,
    depths: Sequence[float] = DEPTHS,
    variants: Sequence[str] = VARIANTS,
    seeds: Sequence[int] = (0,),
    others: int = 0,
) -> list[NeedleProbe]:
    """`count` needles for each variant, length, depth and seed; the same arguments give the same needles.

    others: needles in the same text that are not asked for (see `needle`).

    Raises:
        ConfigError: an unknown variant, a depth outside 0..1, a length without room for the needles, others
            beside a pass key.
    """
    for variant in variants:
        if variant not in NEEDLE_KINDS:
            raise ConfigError(
                f"no needle variant {variant!r}; there are {', '.join(NEEDLE_KINDS)}. "
                f"{suggest(variant, NEEDLE_KINDS)}".rstrip()
            )
    if count < 1 or not lengths or min(lengths) < 1:
        raise ConfigError(f"lengths are {list(lengths)} and repeats {count}; all must be at least 1")
    probes = []
    for seed in seeds:
        for variant in variants:
            for length in lengths:
                for depth in depths:
                    rng = np.random.default_rng(
                        (seed, NEEDLE_KINDS.index(variant), length, round(1000 * depth))
                    )
                    probes += [_probe(haystack, rng, variant, length, depth, others) for _ in range(count)]
    return probes


def measure_needle(
    subject: Subject,
    probes: Sequence[NeedleProbe],
    *,
    batch_size: int = 8,
    piece: int = PIECE,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Accuracy on the grid for each variant. The result is JSON; a length beyond a model's context has `n`
    0.
    """
    fits = [subject.limit is None or len(subject.prefix) + len(p.ids) <= subject.limit for p in probes]
    rows = [Row(p.ids.tolist(), p.start, len(p.ids)) for p, good in zip(probes, fits, strict=True) if good]
    scored = iter(
        score_rows(
            subject.model, rows, batch_size=batch_size, prefix=subject.prefix, piece=piece, progress=progress
        )
    )
    right = [bool(next(scored)[1].all()) if good else None for good in fits]
    lengths = sorted({probe.length for probe in probes})
    depths = sorted({probe.depth for probe in probes})
    variants = list(dict.fromkeys(probe.variant for probe in probes))
    grids: dict[str, list[list[Any]]] = {}
    for variant in variants:
        grids[variant] = [
            [
                _cell([r for p, r in zip(probes, right, strict=True) if _is_in(p, variant, length, depth)])
                for length in lengths
            ]
            for depth in depths
        ]
    left_out = sum(not good for good in fits)
    return {
        "lengths": lengths,
        "depths": depths,
        "variants": variants,
        "grid": grids,
        "overall": {
            variant: _cell([r for p, r in zip(probes, right, strict=True) if p.variant == variant])
            for variant in variants
        },
        "samples": [_sample(subject, p, piece) for p in _shown(probes, fits, variants)],
        "exact": right,
        "notes": [
            f"{subject.name} reads at most {subject.limit} tokens; {left_out} longer texts are left out "
            f"for it"
        ]
        if left_out
        else [],
    }


def compare_needle(names: Sequence[str], results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Paired difference in exact match of every later model against the first, over all needles both could
    read.
    """
    out = []
    for name, result in zip(names[1:], results[1:], strict=True):
        pairs = [
            (a, b)
            for a, b in zip(results[0]["exact"], result["exact"], strict=True)
            if a is not None and b is not None
        ]
        if pairs:
            first, second = zip(*pairs, strict=True)
            interval = paired_proportion_difference(second, first)
            out.append({"model": name, "baseline": names[0], "exact_match": interval.as_dict()})
    return out


def _probe(
    haystack: Haystack, rng: np.random.Generator, variant: str, length: int, depth: float, others: int
) -> NeedleProbe:
    hidden = needle(haystack, rng, kind=variant, length=length, depth=depth, others=others)
    prompt = encode_text(haystack.tokenizer, hidden.prompt)
    answer = encode_text(haystack.tokenizer, hidden.answer)
    return NeedleProbe(
        ids=np.asarray(prompt + answer, dtype=np.int64),
        start=len(prompt),
        variant=variant,
        length=length,
        depth=depth,
        real_depth=hidden.meta["real_depth"],
        value=hidden.meta["value"],
        question=hidden.prompt[hidden.prompt.rfind("\n") + 1 :],
        answer=hidden.answer,
    )


def _is_in(probe: NeedleProbe, variant: str, length: int, depth: float) -> bool:
    return (probe.variant, probe.length, probe.depth) == (variant, length, depth)


def _cell(right: Sequence[bool | None]) -> dict[str, Any]:
    known = [value for value in right if value is not None]
    return {
        "n": len(known),
        "exact_match": wilson_interval(sum(known), len(known)).as_dict() if known else None,
    }


def _shown(probes: Sequence[NeedleProbe], fits: Sequence[bool], variants: Sequence[str]) -> list[NeedleProbe]:
    """The longest needle of each variant that the model can read, in the middle of the depths."""
    out = []
    for variant in variants:
        mine = [p for p, good in zip(probes, fits, strict=True) if good and p.variant == variant]
        if mine:
            out.append(min(mine, key=lambda p: (-p.length, abs(p.depth - 0.5))))
    return out


def _sample(subject: Subject, probe: NeedleProbe, piece: int) -> dict[str, Any]:
    prompt = [*subject.prefix, *probe.ids[: probe.start].tolist()]
    answer = greedy(Stream(subject.model, piece), prompt, len(probe.ids) - probe.start)
    return {
        "variant": probe.variant,
        "length": probe.length,
        "depth": probe.depth,
        "question": probe.question,
        "wanted": probe.answer,
        "given": subject.tokenizer.decode(answer),
        "right": answer == probe.ids[probe.start :].tolist(),
    }
