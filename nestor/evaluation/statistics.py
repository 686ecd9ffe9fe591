"""Intervals: Wilson and Newcombe for proportions, BCa bootstrap for ratios of sums, Student's t for seeds.

Most numbers of the suites are ratios of sums over documents: bits per byte is sum(bits) / sum(bytes), an
accuracy is sum(correct) / sum(asked). The unit that is resampled is the document (the row), never the
token: the tokens of one document are not independent. Intervals are bias-corrected and accelerated (Efron
1987, "Better bootstrap confidence intervals"): with the few documents of a typical evaluation the plain
percentile interval of a skewed ratio sits off its centre. Two models are compared on the same documents,
and the difference is bootstrapped with the same draw for both.

Every function takes a seed and is deterministic in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nestor.errors import DataError

RESAMPLES = 2000
LEVEL = 0.95

_NORMAL = NormalDist()
# Weights of one block of resamples: at most this many float64 numbers in memory at a time.
_BLOCK_NUMBERS = 4_000_000


@dataclass(frozen=True)
class Interval:
    """An estimate with its two-sided confidence interval.

    `low` and `high` are None where no interval can be given: one document, nothing measured, or a bootstrap
    over units that are all the same, which says nothing about how far others would differ.
    `estimate` is None where nothing was measured.
    """

    estimate: float | None
    low: float | None
    high: float | None
    level: float
    method: str
    n: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def excludes_zero(self) -> bool:
        """True when zero lies outside the interval; False when there is no interval."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def wilson_interval(successes: int, trials: int, level: float = LEVEL) -> Interval:
    """Wilson score interval of a proportion (Wilson 1927).

    centre = (p + z^2 / 2n) / (1 + z^2 / n),  half = z sqrt(p (1 - p) / n + z^2 / 4n^2) / (1 + z^2 / n)

    It stays inside [0, 1] and keeps a width at 0 and at 1, where the bootstrap's interval has none.

    Raises:
        DataError: successes outside 0..trials, or a level outside (0, 1).
    """
    _check_level(level)
    if trials < 0 or not 0 <= successes <= trials:
        raise DataError(f"successes must lie in 0..trials, got {successes} of {trials}")
    if trials == 0:
        return Interval(None, None, None, level, "wilson", 0)
    return Interval(*_wilson_limits(successes, trials, level), level, "wilson", trials)


def _wilson_limits(successes: int, trials: int, level: float) -> tuple[float, float, float]:
    """The proportion and Wilson's limits."""
    z = _NORMAL.inv_cdf(0.5 + level / 2)
    p = successes / trials
    scale = 1 + z * z / trials
    centre = (p + z * z / (2 * trials)) / scale
    half = z * ((p * (1 - p) / trials + z * z / (4 * trials * trials)) ** 0.5) / scale
    # At the two ends the algebra gives exactly 0 and 1; rounding must not put the estimate outside.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return p, low, high


def paired_proportion_difference(
    first: Sequence[bool], second: Sequence[bool], level: float = LEVEL
) -> Interval:
    """Interval of mean(first) - mean(second), right or wrong on the same items: Newcombe's (1998) method 10.

    Wilson's limits of the two proportions, combined by squaring and adding, with the correlation of the two:

        low = d - sqrt((p1 - l1)^2 - 2 phi (p1 - l1) (u2 - p2) + (u2 - p2)^2),  high the other way round

    Like Wilson's it has a width where the bootstrap has none: one is always right and the other never.

    Raises:
        DataError: different numbers of items, or a level outside (0, 1).
    """
    _check_level(level)
    if len(first) != len(second):
        raise DataError(f"a paired comparison needs the same items, got {len(first)} and {len(second)}")
    n = len(first)
    if n == 0:
        return Interval(None, None, None, level, "newcombe-paired", 0)
    one, two = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    both, only_one = int((one & two).sum()), int((one & ~two).sum())
    only_two, neither = int((~one & two).sum()), int((~one & ~two).sum())
    p1, l1, u1 = _wilson_limits(both + only_one, n, level)
    p2, l2, u2 = _wilson_limits(both + only_two, n, level)
    margins = (both + only_one) * (only_two + neither) * (both + only_two) * (only_one + neither)
    product: float = both * neither - only_one * only_two
    # A positive correlation is corrected for continuity: it narrows the interval.
    product = max(product - n / 2, 0) if product > 0 else product
    phi = product / margins**0.5 if margins else 0.0
    below = (p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2
    above = (u1 - p1) ** 2 - 2 * phi * (u1 - p1) * (p2 - l2) + (p2 - l2) ** 2
    return Interval(p1 - p2, p1 - p2 - below**0.5, p1 - p2 + above**0.5, level, "newcombe-paired", n)


def ratio_intervals(
    numerators: ArrayLike,
    denominators: ArrayLike,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Interval]:
    """BCa bootstrap intervals of sum(numerators) / sum(denominators), one for each column.

    Args:
        numerators, denominators: [n] or [n, k]; rows are the units that are resampled (documents), columns
            are independent quantities (bins of positions) that share each draw of documents. A row that
            says nothing of a column has denominator 0 there.

    Raises:
        DataError: shapes that differ, a value that is not finite, a negative denominator.
    """
    num, den = _columns(numerators, denominators)
    return _bca(_ratio, [num, den], level=level, resamples=resamples, seed=seed)


def paired_ratio_differences(
    first: tuple[ArrayLike, ArrayLike],
    second: tuple[ArrayLike, ArrayLike],
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Interval]:
    """BCa bootstrap intervals of ratio(first) - ratio(second) on the same units, one for each column.

    Each of `first` and `second` is (numerators, denominators) as in `ratio_intervals`; row i of both is
    the same document, and each draw takes the same documents for both, so what is common to them cancels.
    """
    num_a, den_a = _columns(*first)
    num_b, den_b = _columns(*second)
    if num_a.shape != num_b.shape:
        raise DataError(
            f"a paired comparison needs the same documents and bins for both, got {num_a.shape} and "
            f"{num_b.shape}"
        )

    def difference(a: NDArray, b: NDArray, c: NDArray, d: NDArray) -> NDArray:
        return _ratio(a, b) - _ratio(c, d)

    return _bca(difference, [num_a, den_a, num_b, den_b], level=level, resamples=resamples, seed=seed)


def mean_interval(
    values: ArrayLike, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """BCa bootstrap interval of the mean of `values` [n]."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise DataError(f"values must have one axis, got shape {array.shape}")
    return ratio_intervals(array, np.ones_like(array), level=level, resamples=resamples, seed=seed)[0]


def t_interval(values: ArrayLike, *, level: float = LEVEL) -> Interval:
    """Student's interval of the mean of a few independent `values` [n], such as those of training seeds.

    mean +- t s / sqrt(n), with t of n - 1 degrees of freedom: a bootstrap over three values, whose draws are
    but ten, is too narrow. Of two models with the same seeds, give the differences. Values that are all the
    same have no interval.

    Raises:
        DataError: values that are not one finite row, or a level outside (0, 1).
    """
    _check_level(level)
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not np.isfinite(array).all():
        raise DataError(f"values must be one row of finite numbers, got {array.tolist()}")
    n = len(array)
    if n < 2:
        return Interval(float(array[0]) if n else None, None, None, level, "t", n)
    mean = float(array.mean())
    if np.ptp(array) <= 1e-12 * np.abs(array).max():
        return Interval(mean, None, None, level, "t", n)
    half = t_quantile(0.5 + level / 2, n - 1) * float(array.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, level, "t", n)


def t_quantile(share: float, freedom: int) -> float:
    """The t below which lies `share` (at least 1/2) of Student's distribution of `freedom` degrees.

    Of whole degrees the share within -t .. t is a finite sum in theta = atan(t / sqrt(freedom)) (Abramowitz
    and Stegun 26.7.3 and 26.7.4), which is inverted by bisection.
    """

    def within(theta: float) -> float:
        sine, cosine = math.sin(theta), math.cos(theta)
        odd = freedom % 2
        term, total = (cosine if odd else 1.0), 0.0
        for power in range(1 + odd, freedom, 2):
            total += term
            term *= cosine**2 * power / (power + 1)
        return 2 / math.pi * (theta + sine * total) if odd else sine * total

    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < 2 * share - 1 else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def cluster_sums(values: ArrayLike, clusters: list[Any]) -> NDArray:
    """Sum the rows of `values` [n] or [n, k] that share a cluster name, in order of first appearance."""
    array = np.asarray(values, dtype=np.float64)
    order = {name: row for row, name in enumerate(dict.fromkeys(clusters))}
    out = np.zeros((len(order), *array.shape[1:]))
    np.add.at(out, [order[name] for name in clusters], array)
    return out


def _ratio(num: NDArray, den: NDArray) -> NDArray:
    """num / den with nan where den is 0: nothing was measured there."""
    return np.divide(num, den, out=np.full_like(num, np.nan), where=den > 0)


def _columns(numerators: ArrayLike, denominators: ArrayLike) -> tuple[NDArray, NDArray]:
    num = np.asarray(numerators, dtype=np.float64)
    den = np.asarray(denominators, dtype=np.float64)
    if num.shape != den.shape or num.ndim not in (1, 2):
        raise DataError(
            f"numerators and denominators must both be [n] or [n, k], got {num.shape}, {den.shape}"
        )
    if not (np.isfinite(num).all() and np.isfinite(den).all()):
        raise DataError("numerators and denominators must be finite; leave out what was not measured")
    if (den < 0).any():
        raise DataError(f"denominators must not be negative, got {den.min()}")
    return (num[:, None], den[:, None]) if num.ndim == 1 else (num, den)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise DataError(f"the confidence level must lie between 0 and 1, got {level}")


def _bca(
    statistic: Callable[..., NDArray], sums: list[NDArray], *, level: float, resamples: int, seed: int
) -> list[Interval]:
    """BCa intervals of a function of column sums; `sums` are [n, k] arrays whose rows are resampled
    together.
    """
    _check_level(level)
    if resamples < 1:
        raise DataError(f"resamples must be positive, got {resamples}")
    n, k = sums[0].shape
    estimate = statistic(*[s.sum(axis=0) for s in sums]) if n else np.full(k, np.nan)
    if n < 2:
        return [Interval(_number(e), None, None, level, "bootstrap-bca", n) for e in estimate]
    draws = _resample(statistic, sums, resamples, seed)
    jackknife = statistic(*[s.sum(axis=0) - s for s in sums])
    # How many documents speak of each column: those whose denominators are not all zero.
    speaks = np.logical_or.reduce([d > 0 for d in sums[1::2]]).sum(axis=0)
    return [
        _bca_column(float(estimate[j]), draws[:, j], jackknife[:, j], level, int(speaks[j])) for j in range(k)
    ]


def _resample(statistic: Callable[..., NDArray], sums: list[NDArray], resamples: int, seed: int) -> NDArray:
    """Statistics [resamples, k] of draws with replacement; a draw is a row of multinomial counts."""
    n = sums[0].shape[0]
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK_NUMBERS // n)
    out = []
    for start in range(0, resamples, block):
        counts = rng.multinomial(n, np.full(n, 1 / n), size=min(block, resamples - start)).astype(np.float64)
        out.append(statistic(*[counts @ s for s in sums]))
    return np.concatenate(out)


def _bca_column(estimate: float, draws: NDArray, jackknife: NDArray, level: float, n: int) -> Interval:
    """z0 and a of Efron (1987), eq. 6.6 and 6.7, then the percentiles they pick."""
    draws, jackknife = draws[np.isfinite(draws)], jackknife[np.isfinite(jackknife)]
    if n < 2 or not np.isfinite(estimate) or len(draws) == 0 or np.ptp(draws) <= 1e-12 * abs(estimate):
        return Interval(_number(estimate), None, None, level, "bootstrap-bca", n)
    # Ties count half: proportions and other coarse statistics have many, which rounding must not tell apart.
    tied = np.abs(draws - estimate) <= 1e-9 * np.ptp(draws)
    below = ((draws < estimate)[~tied].sum() + 0.5 * tied.sum()) / len(draws)
    if below <= 0 or below >= 1:
        z0 = 0.0
    else:
        z0 = _NORMAL.inv_cdf(float(below))
    deviation = jackknife.mean() - jackknife if len(jackknife) else np.zeros(1)
    spread = float((deviation**2).sum())
    acceleration = float((deviation**3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
    edges = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        z = z0 + _NORMAL.inv_cdf(tail)
        edges.append(_NORMAL.cdf(z0 + z / (1 - acceleration * z)))
    low, high = np.quantile(draws, edges)
    return Interval(estimate, float(low), float(high), level, "bootstrap-bca", n)


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
