"""The decision rule of the protocol (spec i.5), fixed before a run.

The claim: weights on several time scales learn from a stream, keep it after the context is gone, and lose
less old knowledge than weights on one. Recall is the share of facts right among the candidates after the gap
of the endpoint. It is supported if all four hold:

(a) the continuum with the most levels beats the frozen model by at least 20 points, interval above 0, at no
    more loss of old knowledge than the limit;
(b) against each of the single-rate arms it forgets less at equal acquisition (not lower by more than 5
    points), or dominates it: better in recall or old knowledge with an interval that excludes 0, and no worse
    in the other. Who knows no more after the gap than the frozen model has nothing to forget and nothing to
    pay for, so that counts for neither (which i.5 does not say: without it, models too small to learn a fact
    passed);
(c) recall does not fall from one number of levels to the next, and rises with it, interval above 0; one level
    is the better of the single-rate arms;
(d) it beats the arm with equal periods and the same learning rates, interval above 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestor.evaluation.retention.measures import Record, old_loss, pooled, seeds_interval, trend
from nestor.evaluation.retention.settings import ENDPOINT
from nestor.evaluation.statistics import Interval

POINTS = 0.20
EQUAL = 0.05
#: Numbers that differ by less are the same: shares of few items are sums of rounded fractions.
_SAME = 1e-9

Records = Mapping[str, Sequence[Record]]


@dataclass(frozen=True)
class Verdict:
    """Of one condition. holds: None where an arm that it needs was not run."""

    condition: str
    claim: str
    holds: bool | None
    words: str


def decide(arms: Records, old_limit: float) -> dict[str, Any]:
    """The decision over arms by their base names ("continuum-3"), each with a record for each seed.

    Returns:
        JSON: `supported` (None: not decided), `words`, and `conditions`, a list of verdicts.
    """
    count = max((int(name.split("-")[1]) for name in arms if name.startswith("continuum-")), default=0)
    best = f"continuum-{count}"
    verdicts = [
        _against_frozen(arms, best, old_limit),
        _against_single(arms, best),
        _more_levels(arms),
        _against_equal(arms, best),
    ]
    holds = [verdict.holds for verdict in verdicts]
    supported = False if False in holds else None if None in holds else True
    failed = ", ".join(f"({v.condition})" for v in verdicts if v.holds is False)
    missing = ", ".join(f"({v.condition})" for v in verdicts if v.holds is None)
    if supported:
        words = "Supported: all four conditions hold in these runs."
    elif supported is None:
        words = f"Not decided: no condition fails, and arms are missing for {missing}."
    else:
        words = f"Not supported by these runs: {failed} did not hold" + (
            f"; arms are missing for {missing}." if missing else "."
        )
    return {"supported": supported, "words": words, "conditions": [asdict(v) for v in verdicts]}


def _against_frozen(arms: Records, best: str, old_limit: float) -> Verdict:
    claim = f"the continuum beats the frozen model by at least {100 * POINTS:.0f} points"
    if best not in arms or "frozen" not in arms:
        return _missing("a", claim, "frozen and continuum")
    gain = seeds_interval(_less(_recall(arms[best]), _recall(arms["frozen"])))
    loss = float(np.mean([old_loss(record).mean() for record in arms[best]]))
    within = loss <= old_limit + _SAME
    holds = _number(gain) >= POINTS - _SAME and _above(gain) and within
    words = (
        f"{best} minus frozen: {_points(gain)} after the gap, at a rise of old text's bits of "
        f"{100 * loss:.2f} % ({'within' if within else 'beyond'} the limit of {100 * old_limit:g} %)."
    )
    return Verdict("a", claim, holds, words)


def _against_single(arms: Records, best: str) -> Verdict:
    claim = "it forgets less than both single-rate arms at equal acquisition, or dominates them"
    singles = ("single-fast", "single-slow")
    if any(name not in arms for name in (best, "frozen", *singles)):
        return _missing("b", claim, "frozen, continuum, single-fast and single-slow")
    holds = _above(seeds_interval(_less(_recall(arms[best]), _recall(arms["frozen"]))))
    sentences = [] if holds else ["It knows no more after the gap than the frozen model."]
    for name in singles:
        acquired = seeds_interval(_less(_first(arms[best]), _first(arms[name])))
        forgot = seeds_interval(_less(_forgotten(arms[best]), _forgotten(arms[name])))
        recall = seeds_interval(_less(_recall(arms[best]), _recall(arms[name])))
        loss = seeds_interval(_less(_losses(arms[best]), _losses(arms[name])))
        less = _number(acquired) >= -EQUAL - _SAME and _below(forgot)
        dominates = (_above(recall) and _number(loss) <= _SAME) or (
            _below(loss) and _number(recall) >= -_SAME
        )
        holds = holds and (less or dominates)
        how = "forgets less" if less else "dominates" if dominates else "neither forgets less nor dominates"
        sentences.append(
            f"Against {name} it {how}: acquisition {_points(acquired)}, forgetting {_points(forgot)}, recall "
            f"after the gap {_points(recall)}, rise of old text's bits {_points(loss)}."
        )
    return Verdict("b", claim, holds, " ".join(sentences))


def _more_levels(arms: Records) -> Verdict:
    claim = "recall rises with the number of levels"
    singles = [name for name in ("single-fast", "single-slow") if name in arms]
    several = sorted((int(name.split("-")[1]), name) for name in arms if name.startswith("continuum-"))
    if not singles or not several:
        return _missing("c", claim, "a single-rate arm and continuum")
    single = max(singles, key=lambda name: _mean(_recall(arms[name])))
    order = [(1, single), *several]
    means = [_mean(_recall(arms[name])) for _, name in order]
    slope = trend([k for k, _ in order], [_recall(arms[name]) for _, name in order])
    monotone = all(b >= a - _SAME for a, b in pairwise(means))
    listed = ", ".join(f"{k}: {100 * mean:.1f} %" for (k, _), mean in zip(order, means, strict=True))
    words = (
        f"Recall by levels {listed} (one level is {single}); slope {_points(slope)} a level, "
        f"{'monotone' if monotone else 'not monotone'}."
    )
    return Verdict("c", claim, monotone and _above(slope), words)


def _against_equal(arms: Records, best: str) -> Verdict:
    claim = "learning rates alone do not explain it"
    if best not in arms or "equal-periods" not in arms:
        return _missing("d", claim, "continuum and equal-periods")
    gain = seeds_interval(_less(_recall(arms[best]), _recall(arms["equal-periods"])))
    words = f"{best} minus equal periods at the same learning rates: {_points(gain)} after the gap."
    return Verdict("d", claim, _above(gain), words)


def _missing(condition: str, claim: str, wanted: str) -> Verdict:
    return Verdict(condition, claim, None, f"Not measured: this needs the arms {wanted}.")


def _recall(records: Sequence[Record]) -> list[NDArray]:
    return pooled(records, "correct", gap=ENDPOINT)


def _first(records: Sequence[Record]) -> list[NDArray]:
    return pooled(records, "correct", gap=0)


def _forgotten(records: Sequence[Record]) -> list[NDArray]:
    """By item, right just after its session less right at the end: 1, 0 or -1."""
    return _less(_first(records), pooled(records, "correct", gap="end"))


def _losses(records: Sequence[Record]) -> list[NDArray]:
    return [old_loss(record) for record in records]


def _less(first: Sequence[NDArray], second: Sequence[NDArray]) -> list[NDArray]:
    return [a - b for a, b in zip(first, second, strict=True)]


def _mean(values: Sequence[NDArray]) -> float:
    return float(np.mean([v.mean() for v in values]))


def _number(interval: Interval) -> float:
    return float("nan") if interval.estimate is None else interval.estimate


def _above(interval: Interval) -> bool:
    return interval.low is not None and interval.low > 0


def _below(interval: Interval) -> bool:
    return interval.high is not None and interval.high < 0


def _points(interval: Interval) -> str:
    text = f"{100 * _number(interval):+.1f} points"
    if interval.low is None or interval.high is None:
        return f"{text} (no interval)"
    return f"{text} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"
