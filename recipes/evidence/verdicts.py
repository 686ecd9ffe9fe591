"""Which of two families of memories is ahead, in words that follow from intervals alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

DEEP, LINEAR, UNDECIDED = "deep", "linear", "undecided"


def judged(gain: Mapping[str, Any]) -> str:
    """The family that is ahead, where `gain` is the interval of what the deep memory has more of something
    good. Without an interval, or with 0 in it, that is undecided."""
    if gain["low"] is None or gain["high"] is None:
        return UNDECIDED
    if gain["low"] > 0:
        return DEEP
    return LINEAR if gain["high"] < 0 else UNDECIDED


def compared(
    question: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    gain: Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]],
) -> dict[str, Any] | None:
    """The best memory of each family and which is ahead; None where a family is missing.

    The best has most `tuning`, which comes from runs, or sequences, that `gain(deep, linear)` does
    not look at.
    """
    best = {}
    for family in (DEEP, LINEAR):
        mine = [row for row in rows if row["family"] == family and row["tuning"] is not None]
        if not mine:
            return None
        best[family] = max(mine, key=lambda row: row["tuning"])
    found = gain(best[DEEP], best[LINEAR])
    return {
        **question, "deep": best[DEEP]["arm"], "linear": best[LINEAR]["arm"],
        "gain": dict(found), "ahead": judged(found),
    }  # fmt: skip


def wanted(comparisons: int) -> int:
    """Of so many comparisons, the number in which one must be ahead that has less than 5 % chance where none
    is: of 95 % intervals each is above 0 in 2.5 %. Comparisons count as independent."""
    chance = [
        math.comb(comparisons, k) * 0.025**k * 0.975 ** (comparisons - k) for k in range(comparisons + 1)
    ]
    return next(k for k in range(1, comparisons + 2) if sum(chance[k:]) < 0.05)


def verdict(what: str, comparisons: Sequence[Mapping[str, Any]]) -> str:
    """A sentence on all questions of a kind."""
    counts = {word: sum(one["ahead"] == word for one in comparisons) for word in (DEEP, LINEAR, UNDECIDED)}
    if not comparisons:
        return f"{what}: nothing was compared."
    deep, linear = (counts[family] >= wanted(len(comparisons)) for family in (DEEP, LINEAR))
    if deep and linear:
        end = "each does something that the other of its bytes does not do as well"
    elif deep:
        end = "the deep memory does what a linear one of its bytes does not do as well"
    elif linear:
        end = "the deep memory does nothing clear of chance that a linear one of its bytes does not as well"
    else:
        end = "no difference is clear of chance"
    return (
        f"{what}: of {len(comparisons)} comparisons the deep memory is ahead in {counts[DEEP]} and the "
        f"linear one in {counts[LINEAR]}, with {counts[UNDECIDED]} undecided; {end}."
    )
