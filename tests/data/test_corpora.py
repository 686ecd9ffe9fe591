"""Corpora: what a name opens, in which order, the split, and every error of bad input."""

import gzip
import json
import lzma

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestor.data import Corpus, open_corpus, shipped_corpora
from nestor.data.corpora import reading
from nestor.errors import ConfigError, DataError


def test_shipped_corpora_open_and_have_their_licence_beside_them():
    assert shipped_corpora() == ("shakespeare", "classics")
    plays = list(open_corpus("shakespeare"))
    assert len(plays) == 1 and len(plays[0]) == 1_115_394 and plays[0].startswith("First Citizen:")
    books = list(open_corpus("classics"))
    assert len(books) == 8 and sum(len(book.encode()) for book in books) == 2_335_459
    from pathlib import Path

    notes = (Path(reading.__file__).parent / "README.md").read_text()
    assert "CC0" in notes and "public domain" in notes and "Standard Ebooks" in notes


def test_every_file_kind_gives_the_same_documents(tmp_path):
    text = "one é\ntwo\n"
    line = json.dumps({"text": text}).encode() + b"\n\n"
    data = text.encode()
    for name, content in {
        "a.txt": data,
        "b.md": data,
        "c.txt.xz": lzma.compress(data),
        "d.txt.gz": gzip.compress(data),
        "e.jsonl": line,
        "f.json": line,
        "g.jsonl.xz": lzma.compress(line),
        "h.jsonl.gz": gzip.compress(line),
        "i": data,
        "bom.txt": b"\xef\xbb\xbf" + data,
    }.items():
        (tmp_path / name).write_bytes(content)
        assert list(open_corpus(tmp_path / name)) == [text], name


def test_folders_globs_and_lists_have_a_fixed_order(tmp_path):
    for name in ("b/2.txt", "b/1.md", "a.txt", ".hidden/x.txt", "b/.x.txt", "b/picture.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert list(open_corpus(tmp_path)) == ["a.txt", "b/1.md", "b/2.txt"]
    assert list(open_corpus(f"{tmp_path}/**/*.txt")) == ["a.txt", "b/2.txt"]
    assert list(open_corpus([tmp_path / "b", str(tmp_path / "a.txt")])) == ["b/1.md", "b/2.txt", "a.txt"]


def test_documents_of_long_files_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_BLOCK", 7)
    for text in ("äöü" * 50, "a\nbb\n\nccc äü\n" * 9, "no line end at all " * 5 + "é"):
        (tmp_path / "x.txt").write_text(text, encoding="utf-8")
        corpus = open_corpus(tmp_path / "x.txt")
        assert list(corpus) == [text]
        assert len(list(corpus.pieces())) > 3


@given(st.binary(max_size=40))
def test_undecodable_byte_is_found_at_its_offset_wherever_blocks_end(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("bytes") / "x.txt"
    path.write_bytes(b"ok " + data)
    original, reading._BLOCK = reading._BLOCK, 5
    try:
        text = (b"ok " + data).decode("utf-8")
    except UnicodeDecodeError as error:
        with pytest.raises(DataError, match=f"offset {error.start} "):
            list(open_corpus(path))
    else:
        assert list(open_corpus(path)) == [text]
    finally:
        reading._BLOCK = original


def test_split_by_documents_is_a_partition(tmp_path):
    texts = [f"document {i}" for i in range(40)]
    corpus = Corpus.from_texts(texts)
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for split in ("train", "valid"):
        assert list(corpus.with_split(split)) == list(open_corpus(path, split=split))
    train, valid = list(corpus.with_split("train")), list(corpus.with_split("valid"))
    assert len(valid) == 2 and sorted(train + valid) == sorted(texts)
    assert train == [text for text in texts if text not in valid]
    two = Corpus.from_texts(["a", "b"])
    assert len(list(two.with_split("train"))) == len(list(two.with_split("valid"))) == 1


@given(st.text(alphabet="ab\n", min_size=10, max_size=60), st.floats(0.1, 0.5))
def test_split_of_a_single_document_is_its_beginning_and_end(text, fraction):
    corpus = Corpus([*Corpus.from_texts([text]).sources], "x", "train", fraction)
    train, valid = "".join(corpus), "".join(corpus.with_split("valid"))
    assert train + valid == text
    cut = int(len(text) * (1 - fraction))
    assert len(train) >= cut and valid
    if len(train) > cut:
        assert text.find("\n", cut) == len(train) - 1


def test_split_of_shakespeare_is_at_a_line_end():
    train, valid = (next(iter(open_corpus("shakespeare", split=split))) for split in ("train", "valid"))
    assert train.endswith("\n") and len(train) + len(valid) == 1_115_394
    assert 0.049 < len(valid) / 1_115_394 < 0.0501


def test_missing_path_suggests(tmp_path):
    (tmp_path / "moby.txt").write_text("x")
    with pytest.raises(DataError, match=r"no such file or folder. Did you mean 'moby.txt'"):
        open_corpus(tmp_path / "mobi.txt")
    with pytest.raises(DataError, match=r"Did you mean 'shakespeare'"):
        open_corpus("shakespear")
    with pytest.raises(DataError, match=r"the folder .*absent does not exist"):
        open_corpus(tmp_path / "absent" / "x.txt")
    with pytest.raises(DataError, match="no file matches"):
        open_corpus(f"{tmp_path}/*.nothing")
    with pytest.raises(DataError, match="no corpus named"):
        open_corpus([])


def test_empty_corpora(tmp_path):
    with pytest.raises(DataError, match="it is empty"):
        open_corpus(tmp_path)
    (tmp_path / "x.png").write_bytes(b"1")
    with pytest.raises(DataError, match=r"1 other files, such as x.png"):
        open_corpus(tmp_path)
    (tmp_path / "x.txt").write_text("")
    (tmp_path / "y.jsonl").write_text('{"text": ""}\n\n')
    for split in ("all", "train", "valid"):
        with pytest.raises(DataError, match="is empty: 2 sources"):
            list(open_corpus(tmp_path, split=split))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"text": "a"}\n{"txt": "b", "id": 1}',
            r"line 2 has no field 'text'; it has 'txt', 'id'.*Did you mean 'txt'",
        ),
        ('{"text": 5}', r"line 1: field 'text' is int; a string"),
        ('{"text": "a"}\n{"text": ', r"line 2 is not JSON"),
        ('{\n "text": "a"\n}', r"line 1 is not JSON.*one object a line"),
        ('[{"text": "a"}]', r"line 1 is a JSON array.*jq"),
        ('"text"', r"line 1 is a JSON str"),
    ],
)
def test_bad_json_lines(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        list(open_corpus(tmp_path / "x.jsonl"))


def test_another_field_can_be_named(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"body": "a"}\n')
    assert list(open_corpus(tmp_path / "x.jsonl", field="body")) == ["a"]


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "latin.txt").write_bytes("Zeile\ncafé".encode("latin-1"))
    with pytest.raises(
        DataError, match=r"latin.txt is not UTF-8: byte 0xe9 at offset 9 .*iconv -f WINDOWS-1252"
    ):
        list(open_corpus(tmp_path / "latin.txt"))
    (tmp_path / "wide.txt").write_bytes("text".encode("utf-16"))
    with pytest.raises(DataError, match=r"is UTF-16.*iconv -f UTF-16"):
        list(open_corpus(tmp_path / "wide.txt"))
    for name, data in (("cut.txt.xz", lzma.compress(b"a" * 99)[:-9]), ("not.txt.gz", b"abc")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match="is damaged"):
            list(open_corpus(tmp_path / name))
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"hf:FOLDER"):
        list(open_corpus(tmp_path / "x.parquet"))


def test_impossible_settings():
    with pytest.raises(ConfigError, match=r"split is 'vaild'.*Did you mean 'valid'"):
        open_corpus("classics", split="vaild")
    with pytest.raises(ConfigError, match=r"valid_fraction is 1\.5"):
        open_corpus("classics", valid_fraction=1.5)


def test_saved_datasets_open_by_folder_and_by_name(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": ["a", "", "b"], "title": ["x", "y", "z"]})
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table.select([2])}).save_to_disk(tmp_path / "both")
    assert list(open_corpus(tmp_path / "one")) == ["a", "b"]
    assert list(open_corpus(tmp_path / "both")) == ["a", "b"]
    assert list(open_corpus(f"hf:{tmp_path}/both:test")) == ["b"]
    assert list(open_corpus(f"hf:{tmp_path}/both:train:title")) == ["x", "y", "z"]
    with pytest.raises(DataError, match=r"no split 'dev'; it has train, test"):
        open_corpus(f"hf:{tmp_path}/both:dev")
    with pytest.raises(DataError, match=r"no field 'titel'; it has text, title. Did you mean 'title'"):
        open_corpus(f"hf:{tmp_path}/both:test:titel")
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "data.csv").write_text("text\nhello\n")
    assert list(open_corpus(f"hf:{tmp_path}/csv")) == ["hello"]
    with pytest.raises(DataError, match="cannot be opened"):
        open_corpus(f"hf:{tmp_path}/absent")
