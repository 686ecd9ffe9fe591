"""Measures of retention, from right and wrong answers (spec i.3), and their intervals (i.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nestor.errors import DataError
from nestor.evaluation.statistics import LEVEL, RESAMPLES, Interval, wilson_interval

Record = Mapping[str, Any]


class Transfer(NamedTuple):
    """Of a retention matrix: means over sessions.

    acquisition: right after the session; accuracy (ACC): at the end; backward (BWT): at the end less right
    after the session; forgetting (F): the best that was found while reading less the end.
    """

    acquisition: float
    accuracy: float
    backward: float
    forgetting: float


class HalfLife(NamedTuple):
    """tokens: in which what is above chance halves; None: `reason` says why no number fits."""

    tokens: float | None
    reason: str
    explained: float | None


def answers(record: Record, what: str, *, gap: int | str, kind: str = "seen") -> list[NDArray]:
    """By session, a column ("correct", "exact", "margin", "recalled") of the answers at a gap: right after
    the session (0) or so long after it, of the session's own questions; "before" it was read; or at the
    "end"."""
    found: dict[int, NDArray] = {}
    for test in record["tests"]:
        if test["gap"] == gap and (gap in ("before", "end") or test["after"] == test["session"]):
            found[test["session"]] = np.asarray(test["answers"][kind][what], dtype=np.float64)
    return [found[i] for i in sorted(found)]


def retention_matrix(record: Record) -> tuple[list[list[float | None]], list[float]]:
    """`R[i][j]`, share of session i's facts that are right just after session j (None before it was read),
    and the shares at the end of the stream, after the last gap."""
    count = 1 + max(test["session"] for test in record["tests"])
    matrix: list[list[float | None]] = [[None] * count for _ in range(count)]
    end = [0.0] * count
    for test in record["tests"]:
        share = float(np.mean(test["answers"]["seen"]["correct"])) if "seen" in test["answers"] else None
        if test["gap"] == 0:
            matrix[test["session"]][test["after"]] = share
        elif test["gap"] == "end" and share is not None:
            end[test["session"]] = share
    return matrix, end


def transfer(matrix: Sequence[Sequence[float | None]], end: Sequence[float]) -> Transfer:
    """Measures of `retention_matrix`.

    Raises:
        DataError: a session that was not asked right after it was read.
    """
    first, best = [], []
    for i, row in enumerate(matrix):
        known = [value for value in row if value is not None]
        if row[i] is None or not known:
            raise DataError(f"session {i} was not asked right after it was read")
        first.append(float(row[i]))  # type: ignore[arg-type]
        best.append(max(known))
    return Transfer(
        float(np.mean(first)),
        float(np.mean(end)),
        float(np.mean([e - f for e, f in zip(end, first, strict=True)])),
        float(np.mean([b - e for b, e in zip(best, end, strict=True)])),
    )


def forward_transfer(records: Sequence[Record], chance: float, level: float = LEVEL) -> Interval:
    """Recall of a session's facts just before it is read less chance (FWT), over all sessions but the first,
    before which nothing was read; no estimate of one session.

    Facts are drawn by chance alone, so no earlier session helps: above 0, answers leak.
    """
    if any(not answers(record, "correct", gap="before") for record in records):
        return Interval(None, None, None, level, "bootstrap-seeds-items", 0)
    found = seeds_interval(pooled(records, "correct", gap="before"), level=level)
    estimate, low, high = (None if x is None else x - chance for x in (found.estimate, found.low, found.high))
    return Interval(estimate, low, high, level, found.method, found.n)


def half_life(
    gaps: Sequence[float], recall: Sequence[float], chance: float, *, learned: bool = True
) -> HalfLife:
    """Fit `chance + a 2^(-gap / h)` to recall by least squares; a refusal where that says nothing.

    Args:
        gaps: tokens. learned: whether recall at the first gap is above chance beyond doubt.
    """
    x, y = np.asarray(gaps, dtype=np.float64), np.asarray(recall, dtype=np.float64) - chance
    if len(x) < 3:
        return HalfLife(None, f"{len(x)} gaps are too few for a fit", None)
    if not learned or y[0] <= 0:
        return HalfLife(None, "nothing was learned beyond chance", None)
    if y[-1] >= y[0]:
        return HalfLife(None, "recall does not fall", None)
    tried = np.geomspace(x[x > 0].min() / 64, x.max() * 64, 4001)
    curves = np.exp2(-x[None, :] / tried[:, None])
    heights = curves @ y / (curves * curves).sum(1)
    errors = ((heights[:, None] * curves - y) ** 2).sum(1)
    best = int(errors.argmin())
    explained = float(1 - errors[best] / ((y - y.mean()) ** 2).sum())
    if explained < 0.5:
        return HalfLife(
            None, f"an exponential explains only {100 * explained:.0f} % of the variance", explained
        )
    if best in (0, len(tried) - 1):
        side = "shorter than the gaps can show" if best == 0 else "longer than the gaps can show"
        return HalfLife(None, f"the half-life is {side}", explained)
    return HalfLife(float(tried[best]), "", explained)


def seeds_interval(
    values: Sequence[NDArray], *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Interval of the mean over seeds of the mean over items, by the bootstrap: seeds are drawn with
    replacement, and within each drawn seed its items. Of one seed, its items alone, which says nothing of
    other seeds.

    Args:
        values: for each seed `[n]`; differences of two arms on the same items for a paired comparison.

    Raises:
        DataError: no seed, or one without items.
    """
    if not values or any(len(v) == 0 for v in values):
        raise DataError("an interval over seeds needs at least one seed, and items in each")
    rng = np.random.default_rng(seed)
    items = [np.asarray(v, dtype=np.float64) for v in values]
    estimate = float(np.mean([v.mean() for v in items]))
    count = sum(len(v) for v in items)
    if all(bool((v == 1).all()) for v in items) or all(bool((v == -1).all()) for v in items):
        # One always and the other never: no resample differs. Newcombe's margin (1998, method 10) for it.
        margin = 2**0.5 * (1 - (wilson_interval(count, count, level).low or 0.0))
        low, high = sorted((estimate, estimate * (1 - margin)))
        return Interval(estimate, low, high, level, "newcombe-paired", count)
    if count < 2 or all(np.ptp(v) == 0 and v[0] == items[0][0] for v in items):
        return Interval(estimate, None, None, level, "bootstrap-seeds-items", count)
    total = np.zeros(resamples)
    for _ in items:
        drawn = rng.integers(len(items), size=resamples)
        for number, v in enumerate(items):
            here = drawn == number
            weights = rng.multinomial(len(v), np.full(len(v), 1 / len(v)), size=int(here.sum()))
            total[here] += weights @ v / len(v)
    low, high = np.quantile(total / len(items), [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high), level, "bootstrap-seeds-items", count)


def pooled(records: Sequence[Record], what: str, *, gap: int | str, kind: str = "seen") -> list[NDArray]:
    """For each seed `answers` of all sessions in a row."""
    return [np.concatenate(answers(record, what, gap=gap, kind=kind)) for record in records]


def old_loss(record: Record) -> NDArray:
    """By passage of old text, the rise of its bits over the mean bits of a passage before: their mean is the
    relative rise of bits per byte."""
    before, after = (np.asarray(record["old"][key], dtype=np.float64) for key in ("before", "after"))
    loss: NDArray = (after - before) / before.mean()
    return loss


def old_bits(record: Record) -> tuple[float, float]:
    """Bits per byte of old text before and after."""
    size = sum(record["old"]["bytes"])
    return sum(record["old"]["before"]) / size, sum(record["old"]["after"]) / size


def old_items_lost(record: Record) -> float:
    """Share of the tokens of old text that the model had right before and has no more."""
    items = sum(record["old"]["items"])
    return 1 - sum(record["old"]["right"]) / items if items else 0.0


def trend(levels: Sequence[int], recall: Sequence[Sequence[NDArray]], *, seed: int = 0) -> Interval:
    """Slope of recall on the number of levels, by least squares, with its interval.

    Args:
        levels: of each arm. recall: for each arm, for each seed, `[n]` of the same items.
    """
    x = np.asarray(levels, dtype=np.float64)
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    slopes = [
        sum(
            (w * arm[number] for w, arm in zip(weights, recall, strict=True)),
            np.zeros(len(recall[0][number])),
        )
        for number in range(len(recall[0]))
    ]
    return seeds_interval(slopes, seed=seed)
