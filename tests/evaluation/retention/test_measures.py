"""Measures of retention against matrices worked out by hand; the decision on tables that must go one way."""

import numpy as np
import pytest

from nestor.errors import ConfigError, DataError, NonFiniteError
from nestor.evaluation.retention import measures
from nestor.evaluation.retention.decision import decide
from nestor.evaluation.retention.settings import RetentionSettings
from nestor.evaluation.retention.tuning import Trial, choose, steps_of, try_step

GAPS = (0, 4)


def record(at_once, later, end=None, loss=0.0, old_bits=(100.0, 300.0), middle=None, before=()):
    """A record of a run: answers by session right after it, after the gap, and at the end; before: of the
    second session and those after it, just before they are read."""
    end = later if end is None else end

    def test(session, after, gap, correct):
        columns = {"correct": correct, "exact": correct, "recalled": correct, "margin": [0.0] * len(correct)}
        return {"session": session, "after": after, "gap": gap, "answers": {"seen": columns}}

    tests = []
    for i, (first, after, last) in enumerate(zip(at_once, later, end, strict=True)):
        tests += [test(i, i, 0, first), test(i, i, 4, after), test(i, len(end) - 1, "end", last)]
        for j in range(i + 1, len(end)):
            tests.append(test(i, j, 0, (middle or {}).get((i, j), last)))
    tests += [test(i, i - 1, "before", correct) for i, correct in enumerate(before, 1)]
    old = {"before": list(old_bits), "after": [b * (1 + loss) for b in old_bits], "bytes": [100, 100]}
    return {"tests": tests, "old": {**old, "items": [10, 30], "right": [10, 20]}}


def test_the_matrix_and_what_follows_from_it():
    made = record(
        at_once=[[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]],
        later=[[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]],
        end=[[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]],
        middle={(0, 1): [1, 1, 0, 0], (0, 2): [1, 1, 1, 0], (1, 2): [1, 1, 1, 0]},
    )
    matrix, end = measures.retention_matrix(made)
    assert matrix == [[1.0, 0.5, 0.75], [None, 0.5, 0.75], [None, None, 0.75]]
    assert end == [0.25, 0.5, 0.25]
    found = measures.transfer(matrix, end)
    assert found.acquisition == pytest.approx((1 + 0.5 + 0.75) / 3)
    assert found.accuracy == pytest.approx(1 / 3)
    # Backward transfer: -0.75, 0, -0.5; forgetting from the best: 0.75, 0.25, 0.5.
    assert found.backward == pytest.approx(-1.25 / 3)
    assert found.forgetting == pytest.approx(1.5 / 3)
    assert [v.tolist() for v in measures.answers(made, "correct", gap=4)][1] == [1, 0, 0, 0]
    with pytest.raises(DataError, match="session 1 was not asked"):
        measures.transfer([[1.0, 1.0], [None, None]], [1.0, 1.0])


def test_forward_transfer_is_what_is_known_before_it_is_read_less_chance():
    known = [record(right(0.5, 3), right(0.5, 3), before=right(share, 2)) for share in (0.2, 0.4)]
    found = measures.forward_transfer(known, 0.25)
    assert found.estimate == pytest.approx(0.05) and found.n == 2 * 2 * 20
    assert found.low < 0.05 < found.high and found.low > -0.25
    # The matrix is of what was read, and has none of it.
    assert measures.retention_matrix(known[0]) == measures.retention_matrix(
        record(right(0.5, 3), right(0.5, 3))
    )
    # Who is always right leaks beyond doubt, and who is right by chance does not.
    leak = measures.forward_transfer([record(right(1), right(1), before=right(1, 1))], 0.25)
    assert leak.estimate == 0.75 and leak.low > 0.3
    assert measures.forward_transfer([record(right(1), right(1), before=right(0.25, 1))], 0.25).low < 0
    wide = measures.forward_transfer(known, 0.25, level=0.99)
    assert wide.low < found.low and wide.high > found.high and wide.level == 0.99
    # Before one session alone nothing is read.
    assert measures.forward_transfer([record([[1]], [[1]])], 0.25).estimate is None


def test_old_knowledge_is_a_rise_of_bits_and_items_that_are_lost():
    made = record([[1]], [[1]], loss=0.1)
    assert measures.old_loss(made).tolist() == pytest.approx([10 / 200, 30 / 200])
    assert measures.old_loss(made).mean() == pytest.approx(0.1)
    assert measures.old_bits(made) == pytest.approx((2.0, 2.2))
    assert measures.old_items_lost(made) == pytest.approx(10 / 40)


@pytest.mark.parametrize("tokens", [100.0, 900.0])
def test_a_half_life_is_found_where_there_is_one(tokens):
    gaps = [0, 256, 1024, 4096]
    recall = [0.25 + 0.6 * 0.5 ** (gap / tokens) for gap in gaps]
    found = measures.half_life(gaps, recall, 0.25)
    assert found.tokens == pytest.approx(tokens, rel=0.01) and found.explained == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("recall", "learned", "reason"),
    [
        ([0.9, 0.9, 0.9, 0.9], True, "does not fall"),
        ([0.9, 0.8, 0.9, 1.0], True, "does not fall"),
        ([0.2, 0.2, 0.1, 0.1], True, "nothing was learned"),
        ([0.9, 0.5, 0.4, 0.3], False, "nothing was learned"),
        ([0.6, 0.2, 0.9, 0.5], True, "explains only"),
        ([0.9, 0.25, 0.25, 0.25], True, "shorter than"),
    ],
)
def test_a_half_life_is_refused_where_there_is_none(recall, learned, reason):
    found = measures.half_life([0, 256, 1024, 4096], recall, 0.25, learned=learned)
    assert found.tokens is None and reason in found.reason
    assert "too few" in measures.half_life([0, 4], [0.9, 0.3], 0.25).reason


def test_an_interval_covers_seeds_and_items():
    rng = np.random.default_rng(1)
    shares = rng.beta(30, 30, size=400)
    covered = 0
    for trial in range(40):
        chosen = rng.choice(shares, 6)
        values = [(rng.random(30) < p).astype(float) for p in chosen]
        interval = measures.seeds_interval(values, resamples=200, seed=trial)
        covered += interval.low <= shares.mean() <= interval.high
    assert 34 <= covered <= 40
    # Seeds that differ and have no spread inside still give a width; items alone would give none.
    spread = measures.seeds_interval([np.full(9, 0.2), np.full(9, 0.6)])
    assert spread.estimate == pytest.approx(0.4) and spread.low == 0.2 and spread.high == pytest.approx(0.6)
    assert measures.seeds_interval([np.zeros(9)]).low is None
    always = measures.seeds_interval([np.ones(20)])
    never = measures.seeds_interval([-np.ones(20)])
    assert 0.7 < always.low < always.high == 1 and never.high == -always.low
    with pytest.raises(DataError):
        measures.seeds_interval([np.array([])])


def test_the_trend_is_a_slope_on_the_number_of_levels():
    arms = [[np.array([0.0, 0, 0, 1] * 10)], [np.array([0.0, 0, 1, 1] * 10)], [np.array([0.0, 1, 1, 1] * 10)]]
    slope = measures.trend([1, 2, 3], arms)
    assert slope.estimate == pytest.approx(0.25) and slope.excludes_zero and slope.low > 0
    assert measures.trend([1, 2, 3], arms[::-1]).estimate == pytest.approx(-0.25)


def right(share, sessions=2, n=20):
    return [[1] * round(share * n) + [0] * (n - round(share * n))] * sessions


def runs(at_once, later, loss=0.0, seeds=3):
    return [record(right(at_once), right(later), loss=loss) for _ in range(seeds)]


def table(**changes):
    arms = {
        "frozen": runs(0.25, 0.25),
        "single-fast": runs(0.9, 0.4, 0.005),
        "single-slow": runs(0.9, 0.5, 0.005),
        "continuum-2": runs(0.9, 0.65, 0.005),
        "continuum-3": runs(0.9, 0.8, 0.005),
        "equal-periods": runs(0.9, 0.5, 0.005),
    }
    return arms | changes


def held(arms, limit=0.01):
    decision = decide(arms, limit)
    return decision, {c["condition"]: c["holds"] for c in decision["conditions"]}


def test_a_table_in_which_all_holds_is_supported():
    decision, conditions = held(table())
    assert decision["supported"] is True and set(conditions.values()) == {True}
    assert "Supported" in decision["words"]


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({"frozen": runs(0.7, 0.7)}, {"a"}),
        ({"continuum-3": runs(0.9, 0.8, 0.02)}, {"a"}),
        ({"single-slow": runs(0.9, 0.9, 0.004)}, {"b", "c"}),
        ({"continuum-2": runs(0.9, 0.3, 0.005)}, {"c"}),
        ({"equal-periods": runs(0.9, 0.8, 0.005)}, {"d"}),
        ({"equal-periods": runs(0.9, 0.95, 0.005)}, {"d"}),
        ({name: runs(0.25, 0.25) for name in table()}, {"a", "b", "c", "d"}),
    ],
)
def test_a_table_in_which_one_fails_is_not(changes, failed):
    decision, conditions = held(table(**changes))
    assert decision["supported"] is False and {c for c, h in conditions.items() if h is False} == failed
    assert all(f"({one})" in decision["words"] for one in failed)


def test_less_forgetting_counts_only_at_equal_acquisition():
    """Who learned less has less to forget: without equal acquisition, it has to dominate."""
    little = table(**{"continuum-3": runs(0.5, 0.48, 0.005), "single-fast": runs(0.9, 0.6, 0.005)})
    assert held(little)[1]["b"] is False
    # It costs less of old knowledge at the same recall, on both: that dominates.
    cheaper = table(**{"continuum-3": runs(0.5, 0.5, 0.002), "single-fast": runs(0.9, 0.5, 0.005)})
    assert held(cheaper)[1]["b"] is True
    dearer = table(**{"continuum-3": runs(0.5, 0.5, 0.008), "single-fast": runs(0.9, 0.5, 0.005)})
    assert held(dearer)[1]["b"] is False
    # Who learns nothing pays little: that is no victory.
    idle = {name: runs(0.25, 0.25, 0.005) for name in table()} | {"continuum-3": runs(0.25, 0.25, 0.001)}
    assert held(idle)[1]["b"] is False and "no more after the gap" in held(idle)[0]["conditions"][1]["words"]


def test_a_missing_arm_leaves_it_undecided_unless_another_condition_fails():
    arms = table()
    del arms["equal-periods"]
    decision, conditions = held(arms)
    assert decision["supported"] is None and conditions["d"] is None and "(d)" in decision["words"]
    arms["frozen"] = runs(0.8, 0.8)
    assert held(arms)[0]["supported"] is False
    assert held({"frozen": arms["frozen"]})[1] == dict.fromkeys("abcd")


def test_every_arm_gets_the_same_trials_and_the_rule_takes_the_best_within_the_limit():
    settings = RetentionSettings(trials=3, smallest_step=1e-4, largest_step=1e-2)
    assert steps_of(settings) == [1e-4, 1e-3, 1e-2]
    tried = []

    def run(step):
        tried.append(step)
        if step == 1e-2:
            raise NonFiniteError("too far")
        return record(right(0.5), right(step * 500), loss=step * 5)

    trials = [try_step(run, step) for step in steps_of(settings)]
    assert tried == [1e-4, 1e-3, 1e-2] and trials[2] == Trial(1e-2)
    assert [t.recall for t in trials[:2]] == [0.05, 0.5] and trials[1].old_loss == pytest.approx(0.005)
    assert choose(trials, 0.01).step == 1e-3 and choose(trials, 0.001).step == 1e-4
    # None is within: the one that lost least. A tie of recall goes to the margin.
    assert choose(trials, 0.0).step == 1e-4
    assert choose([Trial(1.0, 0.5, 0.1, 0.0), Trial(2.0, 0.5, 0.3, 0.0)], 0.01).step == 2.0
    with pytest.raises(NonFiniteError, match="none of the steps"):
        choose([Trial(1.0)], 0.01)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arms": ("frozen", "continum")}, "Did you mean 'continuum'"),
        ({"arms": ("frozen", "equal-periods")}, "name that as well"),
        ({"arms": ("frozen", "frozen")}, "none twice"),
        ({"optimizers": ("adm",)}, "Did you mean 'adam'"),
        ({"gaps": (0, 1)}, "and 4, where arms are compared"),
        ({"gaps": (1, 4)}, "with 0"),
        ({"periods": (64, 16)}, "rising"),
        ({"periods": (16,)}, "needs two periods"),
        ({"trials": 0}, "trials is 0"),
        ({"smallest_step": 0.0}, "above 0"),
        ({"replay": -1.0}, "replay is -1"),
        ({"old": ("self", "classics")}, 'give "self" or'),
        ({"old_length": 2}, "at least 8"),
        ({"context": 1}, "at least 2"),
        ({"facts": 3}, "more than the 3 distractors"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        RetentionSettings(**settings).check()
