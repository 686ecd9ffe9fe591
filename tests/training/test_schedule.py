import math
from itertools import pairwise

import pytest

from nestor.training.config import ScheduleConfig
from nestor.training.schedule import lr_factor


def curve(total, **settings):
    return [lr_factor(step, total, ScheduleConfig(**settings)) for step in range(total)]


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
def test_warm_up_rises_linearly_to_the_peak(name):
    assert curve(100, name=name, warmup=4)[:4] == [0.25, 0.5, 0.75, 1.0]
    assert curve(100, name=name, warmup=0.04) == curve(100, name=name, warmup=4)


def test_constant_stays():
    assert set(curve(50, name="constant", warmup=0)) == {1.0}


def test_cosine_is_half_way_in_the_middle_and_ends_at_the_final_factor():
    values = curve(101, name="cosine", warmup=0, final=0.2)
    assert values[0] == 1.0 and math.isclose(values[50], 0.6) and math.isclose(values[100], 0.2)
    assert values == sorted(values, reverse=True)


def test_wsd_is_stable_and_then_falls_linearly():
    values = curve(100, name="wsd", warmup=10, decay=0.2, final=0.0)
    assert values[10:81] == [1.0] * 71
    steps = [a - b for a, b in pairwise(values[80:])]
    assert values[-1] == 0.0 and all(math.isclose(step, steps[0]) for step in steps)


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("total", [1, 2, 3])
def test_very_short_runs_have_a_positive_first_rate(name, total):
    values = curve(total, name=name)
    assert values[0] > 0 and all(0 <= value <= 1 for value in values)
