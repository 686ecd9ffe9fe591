"""Intervals against closed forms, published examples and another library's bootstrap."""

import math

import numpy as np
import pytest

from nestor.errors import DataError
from nestor.evaluation.statistics import (
    cluster_sums,
    mean_interval,
    paired_proportion_difference,
    paired_ratio_differences,
    ratio_intervals,
    t_interval,
    t_quantile,
    wilson_interval,
)

NUM = np.array([3.1, 0.2, 5.5, 1.9, 2.4, 8.8, 0.7, 1.1, 4.0, 2.2])
DEN = np.array([1.0, 0.5, 2.0, 1.5, 1.0, 2.5, 0.5, 1.0, 2.0, 1.0])
OTHER = np.array([2.9, 0.3, 5.0, 2.1, 2.0, 8.1, 0.9, 0.8, 3.9, 2.0])


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 10), (10, 10), (81, 263), (1, 1)])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_wilson_limits_are_where_the_score_test_turns(successes, trials, level):
    """At both ends the distance to the estimate is z standard errors of the end itself."""
    interval = wilson_interval(successes, trials, level)
    z = {0.8: 1.2815515655446004, 0.95: 1.959963984540054}[level]
    p = successes / trials
    assert interval.estimate == p and interval.low <= p <= interval.high and interval.n == trials
    for end, at_limit in ((interval.low, p == 0), (interval.high, p == 1)):
        if at_limit:
            assert end == p
        else:
            assert abs(end - p) == pytest.approx(z * math.sqrt(end * (1 - end) / trials))


def test_wilson_of_a_published_example():
    """Newcombe (1998), Statistics in Medicine 17:857, table I: 81 of 263."""
    interval = wilson_interval(81, 263)
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.2553, 0.3662)


def test_paired_proportions_of_a_published_example():
    """Newcombe (1998), Statistics in Medicine 17:2635, method 10: 36 both, 12 and 2 one only."""
    first, second = [1] * 48 + [0] * 2, [1] * 36 + [0] * 12 + [1] * 2
    interval = paired_proportion_difference(first, second)
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.0569, 0.3404)
    assert interval.estimate == pytest.approx(0.2) and interval.excludes_zero
    back = paired_proportion_difference(second, first)
    assert (back.low, back.high) == (pytest.approx(-interval.high), pytest.approx(-interval.low))


def test_paired_proportions_have_a_width_where_every_pair_says_the_same():
    always = paired_proportion_difference([True] * 64, [False] * 64)
    assert always.estimate == always.high == 1.0 and 0.9 < always.low < 0.95
    never = paired_proportion_difference([False] * 64, [False] * 64)
    assert never.low == -never.high < 0 and not never.excludes_zero


def test_paired_proportions_are_narrower_when_the_pairs_agree():
    rng = np.random.default_rng(0)
    first = rng.random(400) < 0.5
    agree, shuffled = first.copy(), rng.permutation(first)
    agree[:20] = ~agree[:20]
    paired, loose = paired_proportion_difference(first, agree), paired_proportion_difference(first, shuffled)
    assert paired.high - paired.low < 0.5 * (loose.high - loose.low)


@pytest.mark.parametrize(
    ("interval", "low", "high"),
    [
        # scipy.stats.bootstrap(method="BCa", n_resamples=400_000) on the same numbers (scipy 1.17).
        (lambda **k: ratio_intervals(NUM, DEN, **k)[0], 1.7524, 2.9548),
        (lambda **k: mean_interval(NUM, **k), 1.81, 5.02),
        (lambda **k: paired_ratio_differences((NUM, DEN), (OTHER, DEN), **k)[0], 0.0091, 0.2438),
    ],
    ids=["ratio", "mean", "difference"],
)
def test_the_bootstrap_is_that_of_scipy(interval, low, high):
    found = interval(resamples=100_000)
    width = high - low
    assert found.low == pytest.approx(low, abs=0.012 * width)
    assert found.high == pytest.approx(high, abs=0.012 * width)
    assert interval() == interval() != interval(seed=1)


def test_the_bootstrap_of_many_like_units_is_the_normal_interval():
    values = np.random.default_rng(3).normal(2.0, 1.0, 2000)
    found = mean_interval(values, resamples=20_000)
    half = 1.959964 * values.std() / math.sqrt(2000)
    assert found.low == pytest.approx(values.mean() - half, abs=0.03 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.03 * half)


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Skewed ratios of 20 documents: where the true ratio is 1, about 19 of 20 intervals contain it."""
    rng = np.random.default_rng(7)
    weights = rng.uniform(1, 3, (300, 20))
    sums = weights * rng.exponential(1.0, (300, 20))
    inside = 0
    for numerator, denominator in zip(sums, weights, strict=True):
        found = ratio_intervals(numerator, denominator, resamples=500)[0]
        inside += found.low <= 1.0 <= found.high
    assert 0.88 < inside / 300 < 0.98


def test_a_paired_difference_is_free_of_what_is_common():
    rng = np.random.default_rng(1)
    common = rng.normal(5, 2, 50)
    first, second = common + 0.1 + rng.normal(0, 0.01, 50), common
    ones = np.ones(50)
    difference = paired_ratio_differences((first, ones), (second, ones))[0]
    assert 0.09 < difference.low < 0.1 < difference.high < 0.11
    assert ratio_intervals(first, ones)[0].high - ratio_intervals(first, ones)[0].low > 0.8


def test_columns_are_independent_and_rows_without_weight_say_nothing():
    num = np.stack([NUM, np.zeros(10)], axis=1)
    den = np.stack([DEN, np.zeros(10)], axis=1)
    both = ratio_intervals(num, den)
    alone = ratio_intervals(NUM, DEN)[0]
    assert (both[0].low, both[0].high) == (pytest.approx(alone.low), pytest.approx(alone.high))
    assert both[1].estimate is None and both[1].low is None and both[1].n == 0


def test_no_interval_where_none_can_be_given():
    for values in ([3.0], [2.0, 2.0, 2.0], []):
        interval = mean_interval(values)
        assert interval.low is None and not interval.excludes_zero
    assert wilson_interval(0, 0).estimate is None and paired_proportion_difference([], []).estimate is None


def test_clusters_are_summed_in_order_of_appearance():
    assert cluster_sums([[1, 10], [2, 20], [4, 40]], ["b", "a", "b"]).tolist() == [[5, 50], [2, 20]]


def test_bad_input_is_refused():
    with pytest.raises(DataError, match="successes"):
        wilson_interval(3, 2)
    with pytest.raises(DataError, match="level"):
        wilson_interval(1, 2, level=1.0)
    with pytest.raises(DataError, match="finite"):
        ratio_intervals([math.nan, 1.0], [1.0, 1.0])
    with pytest.raises(DataError, match="negative"):
        ratio_intervals([1.0, 1.0], [1.0, -1.0])
    with pytest.raises(DataError, match="must both be"):
        ratio_intervals([1.0, 1.0], [1.0])
    with pytest.raises(DataError, match="same items"):
        paired_proportion_difference([True], [])


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216)]
)
def test_student_s_quantiles_are_those_of_the_tables(freedom, quantile) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(quantile, abs=1e-4)


def test_student_s_interval_covers_the_mean_of_three_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(2.0, 0.3, (4000, 3))
    hits = [one.low < 2.0 < one.high for one in map(t_interval, draws)]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.012)
    # Seeds that all agree say nothing of how far others would not.
    same = t_interval([0.1, 0.1, 0.1])
    assert same.low is None and same.high is None and not same.excludes_zero
    alone = t_interval([1.5])
    assert (alone.estimate, alone.low, alone.n) == (1.5, None, 1)
    with pytest.raises(DataError, match="one row of finite numbers"):
        t_interval([1.0, np.nan])
