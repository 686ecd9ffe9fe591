"""Classes that arrive in sessions: nothing that is tested is read, and all follows from the seed."""

import csv
import json
import lzma
import os
from collections import Counter
from pathlib import Path

import pytest

from nestor.data.tasks.intents import DATASETS, Labelled, LabelledTexts, class_sessions, plain, read_labelled
from nestor.errors import ConfigError, DataError

#: Folder of the real files, for those who have them.
BENCH = Path(os.environ.get("NESTOR_BENCH", "/nonexistent"))


def made(classes=7, train=12, test=5):
    """Classes whose texts say which they are; one text of each is in both parts, in other letters."""
    names = [f"kind {c}" for c in "abcdefghijklm"[:classes]]
    first = [Labelled(f"{name} number {i}", name) for name in names for i in range(train)]
    last = [Labelled(f"{name} question {i}", name) for name in names for i in range(test)]
    return LabelledTexts(
        "made", tuple(first + [Labelled(x.text.upper(), x.label) for x in last[::test]]), tuple(last)
    )


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_what_is_tested_is_never_read(seed, held_out) -> None:
    data = made()
    sizes = {"classes": 3, "examples": 6, "tests": 4}
    stream = class_sessions(data, seed=seed, held_out=held_out, **sizes)
    assert [len(session.labels) for session in stream] == [3, 3, 1]
    assert sorted(label for session in stream for label in session.labels) == list(data.labels)
    read = {plain(one.text) for session in stream for one in session.examples}
    asked = {plain(one.text) for session in stream for one in session.tests}
    assert not read & asked and not read & {plain(one.text) for one in data.test}
    assert asked <= {plain(one.text) for one in (data.train if held_out else data.test)}
    for session in stream:
        assert Counter(one.label for one in session.examples) == dict.fromkeys(session.labels, 6)
        assert Counter(one.label for one in session.tests) == dict.fromkeys(session.labels, 4)
    assert stream == class_sessions(data, seed=seed, held_out=held_out, **sizes)
    assert stream[0] != class_sessions(data, seed=seed + 1, held_out=held_out, **sizes)[0]
    assert stream[:2] == class_sessions(data, seed=seed, held_out=held_out, sessions=2, **sizes)
    # Examples of a session are mixed, not class by class.
    assert [one.label for one in stream[0].examples] != sorted(one.label for one in stream[0].examples)


def test_a_text_that_is_tested_is_left_out_of_training() -> None:
    data = made(classes=2)
    assert len(data.train) == 24 and all("QUESTION" not in one.text for one in data.train)


@pytest.fixture
def folder(tmp_path):
    """Small files in the layouts of the real ones."""
    parts = {
        part: [[f"{part} of {label} {i}", label] for label in ("book_flight", "pto_used") for i in range(4)]
        for part in ("train", "val", "test")
    }
    parts["oos_train"] = [["out of scope", "oos"]]
    with lzma.open(tmp_path / "clinc150_data_full.json.xz", "wt", encoding="utf-8") as file:
        json.dump(parts, file)
    for part in ("train", "test"):
        with open(tmp_path / f"{part}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "category"])
            writer.writerows([[f"{part}, my\ncard {i}?", "Refund_not_showing_up"] for i in range(3)])
    with open(tmp_path / "dbpedia14_14k.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([[i % 14, f"row\t{i} ."] for i in range(280)])
    return tmp_path


def test_the_three_layouts(folder) -> None:
    clinc = read_labelled("clinc150", folder)
    assert clinc.labels == ("book flight", "pto used") and (len(clinc.train), len(clinc.test)) == (8, 8)
    assert clinc.train[0] == ("train of book_flight 0", "book flight")
    banking = read_labelled("banking77", folder)
    assert banking.labels == ("refund not showing up",) and banking.test[2].text == "test, my card 2?"
    dbpedia = read_labelled("dbpedia14", folder)
    assert len(dbpedia.labels) == 14 and (len(dbpedia.train), len(dbpedia.test)) == (18 * 14, 2 * 14)
    assert (
        Labelled("row 3 .", "athlete") in dbpedia.train
        and Labelled("row 279 .", "written work") in dbpedia.test
    )


def test_refusals(folder, tmp_path_factory) -> None:
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(ConfigError, match=r"no data set 'clinc'.*Did you mean 'clinc150'"):
        read_labelled("clinc", folder)
    for name in DATASETS:
        with pytest.raises(DataError, match=r"has no .*\(CC BY.*github\.com.*put it there"):
            read_labelled(name, empty)
    (folder / "clinc150_data_full.json.xz").write_bytes(b"nothing")
    with pytest.raises(DataError, match="files of clinc150 in .* are not as they should be"):
        read_labelled("clinc150", folder)
    with pytest.raises(DataError, match="has 12 texts for training and 0 left for testing"):
        class_sessions(made(), seed=0, classes=2, examples=12, tests=1, held_out=True)
    with pytest.raises(ConfigError, match="classes is 0"):
        class_sessions(made(), seed=0, classes=0, examples=1, tests=1)


@pytest.mark.skipif(not BENCH.is_dir(), reason="NESTOR_BENCH names no folder with the real files")
@pytest.mark.parametrize(
    ("name", "labels", "train", "test"),
    [("clinc150", 150, 15_000, 4_500), ("banking77", 77, 10_003, 3_080), ("dbpedia14", 14, 12_600, 1_400)],
)
def test_the_real_files(name, labels, train, test) -> None:
    data = read_labelled(name, BENCH)
    assert len(data.labels) == labels and len(data.test) == test
    # A few training texts are test texts as well, and are left out.
    assert 0.99 * train < len(data.train) <= train
    assert len(class_sessions(data, seed=0, classes=10, examples=10, tests=10)) == -(-labels // 10)
