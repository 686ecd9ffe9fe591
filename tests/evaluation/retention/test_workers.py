"""The retention suite in several processes: the same results, from pieces that a stopped run goes on with."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from nestor.cli.loading import Opener
from nestor.data import open_corpus
from nestor.data.tasks import FillerText
from nestor.errors import ConfigError
from nestor.evaluation.retention import pieces as pieces_module
from nestor.evaluation.retention.parallel import jobs_of
from nestor.evaluation.retention.pieces import Pieces
from nestor.evaluation.retention.settings import RetentionSettings
from nestor.evaluation.retention.suite import measure_retention
from nestor.jobs import Workers

STORIES = Path(__file__).parents[3] / "checkpoints" / "stories260K"
SMALL = RetentionSettings(
    sessions=1, facts=2, repeats=(1, 2), relations=1, distractors=1, filler=0, gaps=(0, 4), periods=(16, 32),
    trials=2, old_passages=2, old_length=16, context=65, arms=("frozen", "continuum", "equal-periods", "ewc"),
)  # fmt: skip
TWO = Workers(2, "cpu", quiet=True)


@pytest.fixture(scope="module")
def subject():
    return Opener("stories", str(STORIES))("cpu")


@pytest.fixture(scope="module")
def filler():
    return FillerText(["Rain fell on the roof, and nothing moved. A door closed.\n" * 60])


def untimed(found):
    """Results without what a clock said."""
    if isinstance(found, dict):
        return {k: untimed(v) for k, v in found.items() if k not in ("seconds", "time_over_frozen")}
    return [untimed(one) for one in found] if isinstance(found, list) else found


@pytest.mark.slow
def test_workers_find_what_one_process_finds(subject, filler, tmp_path, monkeypatch):
    alone = measure_retention(subject, filler, SMALL, folder=tmp_path)

    def here(*_given, **_choices):
        pytest.fail("a run was made in this process")

    monkeypatch.setattr(pieces_module, "run_arm", here)
    monkeypatch.setattr(pieces_module, "unit_steps", here)
    # Without a folder in one that does not last.
    together = measure_retention(subject, filler, SMALL, workers=TWO)
    assert json.dumps(untimed(together)) == json.dumps(untimed(alone))
    # Pieces that one process has made are those of the others.
    assert jobs_of(Pieces(subject, filler, SMALL, folder=tmp_path), (0,)) == []


def test_what_is_missing_is_what_is_run(subject, filler, tmp_path):
    two = replace(SMALL, arms=("frozen", "continuum", "equal-periods"))
    measure_retention(subject, filler, two, folder=tmp_path)

    def missing(settings=two, seeds=(0,)):
        return [job.name for job in jobs_of(Pieces(subject, filler, settings, folder=tmp_path), seeds)]

    assert missing() == [] and missing(seeds=(0, 1)) == [
        "frozen: seed 1", "continuum-2: seed 1", "equal-periods: seed 1",
    ]  # fmt: skip
    # A trial more: the others stay, and whether the same step is chosen is known after it.
    folder = tmp_path / "stories"
    (folder / "continuum-2-16x32-sgd-tuning-step-0.01.json").unlink()
    assert missing() == ["continuum-2: trying 0.01", "continuum-2: seed 0", "equal-periods: seed 0"]
    assert missing(replace(two, trials=3))[:2] == ["continuum-2: trying 0.001", "continuum-2: trying 0.01"]
    (folder / "continuum-2-16x32-sgd-units.json").unlink()
    jobs = {job.name: job.after for job in jobs_of(Pieces(subject, filler, two, folder=tmp_path), (0,))}
    assert next(iter(jobs)) == "continuum-2: sizes of steps"
    assert set(jobs["equal-periods: seed 0"]) == {
        "continuum-2: sizes of steps", "continuum-2: trying 0.0001", "continuum-2: trying 0.01",
    }  # fmt: skip


def test_a_copied_corpus_is_the_same_text(subject, tmp_path):
    one, copy, other = (tmp_path / name for name in ("one.txt", "copy.txt", "other.txt"))
    one.write_text("Rain fell on the roof, and nothing moved. A door closed.\n" * 60)
    shutil.copy(one, copy)
    os.utime(copy, (1, 1))
    other.write_text(one.read_text().replace("door", "gate"))
    frozen = replace(SMALL, arms=("frozen",), old=(str(one),))

    def piece(text, old=one):
        filler = FillerText(open_corpus(str(text)))
        return Pieces(subject, filler, replace(frozen, old=(str(old),)), folder=tmp_path / "kept").kept.digest

    assert piece(one) == piece(copy) == piece(copy, old=copy) != piece(other)
    assert piece(one, old=other) != piece(one)


def test_a_subject_that_cannot_be_opened_again_is_refused(subject, filler):
    with pytest.raises(ConfigError, match="workers open the model 'stories' themselves"):
        measure_retention(replace(subject, reopen=None), filler, SMALL, workers=TWO)
