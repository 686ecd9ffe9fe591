"""The whole suite: every arm is measured, a stopped run goes on, given rates are used."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from nestor.errors import ConfigError, NonFiniteError
from nestor.evaluation.keeping import Kept
from nestor.evaluation.report import Section
from nestor.evaluation.retention import pieces as pieces_module
from nestor.evaluation.retention.arms import Rate, arms_of, make_student
from nestor.evaluation.retention.drawing import retention_tables
from nestor.evaluation.retention.old import OldKnowledge, old_passages
from nestor.evaluation.retention.run import make_stream, run_arm
from nestor.evaluation.retention.suite import measure_retention


@pytest.fixture(scope="module")
def few(small):
    return replace(small, arms=("frozen", "single-fast", "continuum", "equal-periods"))


@pytest.fixture(scope="module")
def measured(subject, filler, few, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    return measure_retention(subject, filler, few, seeds=(0, 1), folder=folder), folder


def test_the_suite_measures_every_arm_and_decides(measured):
    result, _ = measured
    assert list(result["arms"]) == ["frozen", "single-fast", "continuum-2", "equal-periods"]
    trials = {name: [t["step"] for t in arm["tuning"]["trials"]] for name, arm in result["arms"].items()}
    # Equal trials for all that are tuned; equal periods take the learning rates of the continuum.
    assert trials["single-fast"] == trials["continuum-2"] == [1e-4, 1e-2]
    assert trials["frozen"] == trials["equal-periods"] == []
    assert (
        result["arms"]["equal-periods"]["tuning"]["rates"] == result["arms"]["continuum-2"]["tuning"]["rates"]
    )
    frozen, several = result["arms"]["frozen"], result["arms"]["continuum-2"]
    assert frozen["old_loss"]["estimate"] == 0 == frozen["forgetting"] and frozen["time_over_frozen"] is None
    assert frozen["tokens"] == several["tokens"] and several["state_bytes"] > 0
    assert several["recall"]["n"] == 2 * 2 * 2 and len(several["recall_by_seed"]) == 2
    assert [row["repeats"] for row in several["by_repeats"]] == [1, 2]
    assert np.array(several["matrix"], dtype=float).shape == (2, 3) and several["matrix"][1][0] is None
    assert set(several["localisation"]) == {"every 32", "every 64"}
    assert several["forward_transfer"]["n"] == 2 * 2 and frozen["loop_back"] == {}
    back = several["loop_back"]
    lost = several["localisation"]["every 32"]["all"]
    assert back["before"]["estimate"] - back["restored"]["estimate"] == pytest.approx(lost)
    assert back["before"]["estimate"] == pytest.approx(several["accuracy"])
    assert back["recovered"]["estimate"] == pytest.approx(
        back["after"]["estimate"] - back["restored"]["estimate"]
    )
    page = write_words(result)
    assert (
        "FWT" in page
        and "after related text" in page
        and "read 64 tokens of sentences of the same kinds" in page
    )
    held = {c["condition"]: c["holds"] for c in result["decisions"]["sgd"]["conditions"]}
    assert list(held) == list("abcd") and held["b"] is None and held["a"] is not None
    assert any("2 seeds" in note for note in result["notes"])
    assert any(re.search(r"period 64 made \d+ updates", note) for note in result["notes"])


def test_a_stopped_run_goes_on_with_what_is_finished(subject, filler, few, measured, monkeypatch, tmp_path):
    result, folder = measured
    done = []
    run = pieces_module.run_arm

    def stop(*given, **choices):
        if len(done) == limit:
            raise KeyboardInterrupt
        done.append(1)
        return run(*given, **choices)

    monkeypatch.setattr(pieces_module, "run_arm", stop)
    limit = 0
    again = measure_retention(subject, filler, few, seeds=(0, 1), folder=folder)
    assert json.dumps(again) == json.dumps(result)
    two = replace(few, arms=("frozen", "single-fast"))
    # The frozen run and two trials are done when it is stopped; they are not done again.
    limit = 3
    with pytest.raises(KeyboardInterrupt):
        measure_retention(subject, filler, two, seeds=(1,), folder=tmp_path)
    done.clear()
    limit = 99
    whole = measure_retention(subject, filler, two, seeds=(1,), folder=tmp_path)
    assert len(done) == 1
    for name, arm in whole["arms"].items():
        assert arm["recall_by_seed"] == result["arms"][name]["recall_by_seed"][1:]
        assert arm["tuning"] == result["arms"][name]["tuning"]
    # Under other settings nothing counts as finished.
    done.clear()
    measure_retention(subject, filler, replace(two, sessions=1, trials=1), seeds=(0,), folder=tmp_path)
    assert len(done) == 3


def test_a_piece_is_kept_for_its_settings_alone(tmp_path):
    kept = Kept(tmp_path, {"a": 1})
    assert kept.get("x y", lambda: {"v": (1, 2)}) == {"v": [1, 2]}
    assert kept.get("x y", lambda: pytest.fail("made twice")) == {"v": [1, 2]}
    assert Kept(tmp_path, {"a": 2}).get("x y", lambda: 5) == 5
    (tmp_path / "x-y.json").write_text("{ broken")
    assert kept.get("x y", lambda: 6) == 6 and Kept(None, {}).get("x y", lambda: 7) == 7


def test_other_models_learn_too(foreign, filler, small):
    two = replace(small, arms=("frozen", "continuum"), trials=1, sessions=1)
    result = measure_retention(foreign, filler, two)
    assert result["arms"]["continuum-2"]["levels"][1]["updates"] > 0 and result["context"] == 129
    several = replace(two, optimizers=("sgd", "adam"))
    names = [arm.name for arm in arms_of(several)]
    assert names == ["frozen", "continuum-2 sgd", "continuum-2 adam"]


def test_given_rates_take_the_place_of_trials(subject, words, old, filler, small):
    settings = replace(
        small, arms=("single-fast", "single-slow", "continuum", "equal-periods", "low-rank"), trials=1,
        sessions=1, learning_rates=(0.02, 0.05), largest_update=0.003,
    )  # fmt: skip
    result = measure_retention(subject, filler, settings)
    rates = {name: arm["tuning"]["rates"] for name, arm in result["arms"].items()}
    fast, slow = ({"learning_rate": rate, "largest_update": 0.003} for rate in (0.02, 0.05))
    low = rates.pop("low-rank")
    assert rates == {
        "single-fast": [fast], "single-slow": [slow], "continuum-2": [fast, slow],
        "equal-periods": [fast, slow],
    }  # fmt: skip
    tuned = [name for name, arm in result["arms"].items() if arm["tuning"]["trials"]]
    assert tuned == ["low-rank"] and low[0] not in (fast, slow)
    # They are what the arms learn with.
    arm = next(arm for arm in arms_of(settings) if arm.base == "continuum-2")
    student = make_student(arm, subject.model, [Rate(0.02, 0.003), Rate(0.05, 0.003)], settings, 129)
    knowledge = OldKnowledge(subject, old_passages(subject, ("self",), 3, 24))
    record = run_arm(subject, student, make_stream(settings, filler, words, 0), settings, knowledge)
    assert result["arms"]["continuum-2"]["levels"] == record["levels"] and record["levels"][0]["change"] > 0
    text = write_words(result)
    assert "Learning rates of single-fast, single-slow, continuum-2, equal-periods were given." in text
    assert "Of the other arms the step was chosen" in text and "rates 0.02, 0.05" in text
    for wrong, message in (
        ({"learning_rates": (0.1,)}, "give one for each"),
        ({"learning_rates": (), "largest_update": 0.1}, "only with learning_rates"),
        ({"optimizers": ("sgd", "adam")}, "one inner step"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(settings, **wrong).check()


def write_words(result):
    """All that the report says of a model."""
    section = Section("retention", "retention")
    retention_tables(section, {"models": {"tiny": result}})
    return json.dumps(section.blocks)


def test_trials_that_all_fail_say_so(subject, filler, monkeypatch, small):
    def fail(*_given, **_choices):
        raise NonFiniteError("no number")

    monkeypatch.setattr(pieces_module, "run_arm", fail)
    with pytest.raises(NonFiniteError, match="none of the steps"):
        measure_retention(subject, filler, replace(small, arms=("single-fast",)))
