"""benchmarks/optimizers.py on a run of a few steps: equal trials, results that are gone on from, tasks."""

import json
import math

import pytest


@pytest.fixture
def settings(benchmark_modules, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    import optimizers

    book = tmp_path / "book.txt"
    book.write_text("It was a dark and stormy night, and nobody was about.\n" * 60, encoding="utf-8")
    return optimizers, optimizers.Settings(
        sections=("language",), subjects=("adamw", "m3"), rates=(1e-3, 4e-3), seeds=(1,), text=str(book),
        steps=4, batch=2, tokens=16, warmup=1, points=2, eval_batches=1, rounds=1,
        output=tmp_path / "result.json",
    )  # fmt: skip


def test_every_optimiser_gets_the_same_trials_and_none_is_run_twice(settings, monkeypatch) -> None:
    optimizers, s = settings
    optimizers.main(s)
    result = json.loads(s.output.read_text())
    for subject in s.subjects:
        trials = [one for one in result["trials"].values() if one["subject"] == subject]
        assert [(one["rate"], one["seed"]) for one in trials[:2]] == [(1e-3, 0), (4e-3, 0)]
        best = min(trials[:2], key=lambda one: one["final"])["rate"]
        assert [(one["rate"], one["seed"]) for one in trials[2:]] == [(best, 1)]
        row = result["summary"][subject]
        assert row["rate"] == best and row["finals"] == [one["final"] for one in trials[2:]]
        assert row["mean"] == pytest.approx(row["finals"][0]) and row["seconds"] > 0
        assert all(one["curve"][-1] == [4, one["final"]] for one in trials)
        assert 0 < row["mean"] < 1.05 * math.log(260)
    assert s.output.with_suffix(".png").stat().st_size > 10_000

    def refuse(*_):
        raise AssertionError("a trial that is in the file was run again")

    missing = next(key for key in result["trials"] if key.endswith("seed 1"))
    gone = result["trials"].pop(missing)
    s.output.write_text(json.dumps(result))
    run = []
    monkeypatch.setattr(optimizers, "trial", lambda _, *which: run.append(which) or gone)
    monkeypatch.setattr(optimizers, "time_steps", refuse)
    optimizers.main(s)
    assert len(run) == 1 and json.loads(s.output.read_text())["trials"].keys() == {*result["trials"], missing}
    s.steps = 5
    with pytest.raises(SystemExit, match="holds trials of"):
        optimizers.main(s)
    s.subjects = ("m4",)
    with pytest.raises(SystemExit, match="unknown subject m4; known are adamw"):
        optimizers.main(s)


def test_gradient_descent_forgets_no_orthogonal_task(benchmark_modules, monkeypatch) -> None:
    import orthogonal_tasks

    monkeypatch.setattr(orthogonal_tasks, "STEPS", 40)
    losses = orthogonal_tasks.learn(orthogonal_tasks.SUBJECTS["sgd"][0], 8.0, 1)
    for task in range(orthogonal_tasks.TASKS):
        assert all(losses[earlier][task] == pytest.approx(1.0, abs=1e-5) for earlier in range(task))
        assert all(later[task] < 0.01 for later in losses[task:])
        assert all(later[task] == pytest.approx(losses[task][task], abs=1e-5) for later in losses[task:])
    found = orthogonal_tasks.measures(losses)
    assert found["final"] == pytest.approx(sum(losses[-1]) / 4) and abs(found["forgotten"]) < 1e-5
    adam = orthogonal_tasks.measures(orthogonal_tasks.learn(orthogonal_tasks.SUBJECTS["adamw"][0], 0.125, 1))
    assert adam["forgotten"] > 0.005
