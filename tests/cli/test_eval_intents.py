"""`nestor eval --suite class-incremental` from the command line."""

import json
import re

import pytest

from nestor.cli.eval import Args


@pytest.fixture
def intents(tmp_path):
    """Four intents in the layout of CLINC150."""
    labels = ("pay_bill", "order", "time", "weather")
    parts = {
        part: [[f"{label[:3]} {part}{i}", label] for label in labels for i in range(8)]
        for part in ("train", "test")
    }
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data_full.json").write_text(json.dumps(parts))
    return folder


def test_it_measures_and_writes(model_folder, intents, nestor_command, tmp_path):
    out = tmp_path / "out"
    stream = ("--intents.classes", 2, "--intents.examples", 3, "--intents.tests", 2, "--intents.periods", 16)
    arms = ("--intents.arms", "nearest", "frozen", "in-context", "online", "--intents.learning-rates", 0.1)
    status, printed, err = nestor_command(
        "eval", model_folder, "--suite", "class-incremental", "--data", intents, "--out", out, "--quiet",
        "--seeds", 0, 1, *stream, *arms,
    )  # fmt: skip
    assert status == 0, err
    result = json.loads((out / "class-incremental.json").read_text())
    arms = result["models"]["tiny"]["arms"]
    assert list(arms) == ["nearest", "frozen", "in-context", "online"] and result["seeds"] == [0, 1]
    for arm in arms.values():
        assert [run["asked"] for run in arm["runs"]] == [[4, 4], [4, 4]] and arm["seen"] == [2, 4]
    assert arms["nearest"]["final"]["estimate"] == 1.0 and arms["online"]["learning_rate"] == 0.1
    assert arms["online"]["runs"][0]["learning"]["levels"][0]["updates"] > 5
    assert (out / "class-incremental.md").read_text().count("\n| ") == 5
    assert (out / "plots" / "class-incremental-tiny.png").is_file()
    assert re.search(r"nearest +- +100 % +100 % +100 % +0 %", printed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), r"needs --data, a folder\. CLINC150 \(CC BY 3\.0\) is"),
        (("--data", "/nowhere"), r"the folder /nowhere has no clinc150_data_full\.json or data_full\.json"),
        (("--intents.arms", "onlin"), "Did you mean 'online'"),
        (("--suite", "class-incremental", "recall"), "runs alone"),
    ],
)
def test_a_wrong_setting_is_one_line(model_folder, nestor_command, tmp_path, arguments, message):
    call = ("eval", model_folder, "--suite", "class-incremental", "--out", tmp_path / "out", "--quiet")
    status, _, err = nestor_command(*call, *arguments)
    assert (
        status == 2 and re.search(message, err) and err.count("\n") == 1 and not (tmp_path / "out").exists()
    )


def test_all_suites_are_without_it():
    from nestor.evaluation.suites import SUITES

    assert "class-incremental" not in SUITES and Args(("a",)).intents.data is None
