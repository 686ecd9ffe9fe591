"""The cache of token ids: what it holds, when it is used, what a failed or damaged write leaves behind."""

import json
import os
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestor.data import (
    ByteTokenizer,
    Corpus,
    TokenizedCorpus,
    default_cache_dir,
    open_corpus,
    tokenize,
    tokenized,
)
from nestor.data.corpora import reading
from nestor.errors import DataError


class CountingTokenizer(ByteTokenizer):
    """Counts how often text is encoded."""

    calls = 0

    def encode(self, text, add_special_tokens=False):
        CountingTokenizer.calls += 1
        return super().encode(text, add_special_tokens)


class WideTokenizer:
    """Ids above 16 bits, and none for a space."""

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [70_000 + byte for byte in text.encode() if byte != 32]

    def get_vocab(self):
        return {"a": 1}

    def __len__(self):
        return 80_000


@given(texts=st.lists(st.text(max_size=20), min_size=1, max_size=8))
def test_tokens_and_offsets_are_the_documents(tmp_path_factory, texts):
    cache = tmp_path_factory.mktemp("cache")
    corpus = Corpus.from_texts(texts)
    wanted = [list(text.encode()) for text in texts if text]
    if not wanted:
        with pytest.raises(DataError, match="is empty"):
            tokenize(corpus, ByteTokenizer(), cache_dir=cache)
        assert list(cache.iterdir()) == []
        return
    found = tokenize(corpus, ByteTokenizer(), cache_dir=cache)
    assert found.tokens.dtype == np.uint8 and isinstance(found.tokens, np.memmap)
    assert [found.document(i).tolist() for i in range(found.n_documents)] == wanted
    assert found.n_tokens == sum(map(len, wanted))


def test_long_files_in_pieces_are_one_document(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_BLOCK", 16)
    (tmp_path / "a.txt").write_text("line of text\n" * 20)
    (tmp_path / "b.txt").write_text("other")
    found = tokenize(open_corpus(tmp_path), ByteTokenizer(), cache_dir=tmp_path / "cache")
    assert found.offsets.tolist() == [0, 260, 265]


def test_ids_take_as_many_bytes_as_the_vocabulary_needs(tmp_path):
    found = tokenize(Corpus.from_texts(["ab", "  ", "c"]), WideTokenizer(), cache_dir=tmp_path)
    assert found.tokens.dtype == np.uint32
    assert [found.document(i).tolist() for i in range(2)] == [[70_097, 70_098], [70_099]]


def test_cache_is_used_until_the_file_or_the_split_changes(tmp_path):
    path, cache = tmp_path / "x.txt", tmp_path / "cache"
    path.write_text("some\ntext\n" * 9)
    tokenizer, before = CountingTokenizer(), CountingTokenizer.calls
    first = tokenize(open_corpus(path), tokenizer, cache_dir=cache)
    again = tokenize(open_corpus(path), tokenizer, cache_dir=cache)
    assert CountingTokenizer.calls == before + 1
    assert first.identity == again.identity
    valid = tokenize(open_corpus(path, split="valid"), tokenizer, cache_dir=cache)
    assert CountingTokenizer.calls == before + 2 and valid.n_tokens < first.n_tokens
    os.utime(path, ns=(1, 1))
    touched = tokenize(open_corpus(path), tokenizer, cache_dir=cache)
    assert CountingTokenizer.calls == before + 3
    # A run resumes on a copied file: its identity is the content's.
    assert touched.identity == first.identity
    path.write_text("some\ntexT\n" * 9)
    assert tokenize(open_corpus(path), tokenizer, cache_dir=cache).identity != first.identity


def test_identity_tells_where_documents_end():
    one, two = (TokenizedCorpus.from_documents(documents) for documents in ([[1, 2, 3]], [[1, 2], [3]]))
    assert one.identity != two.identity


@pytest.mark.parametrize("damage", ["tokens.bin", "offsets.npy", "meta.json"])
def test_damaged_entry_is_made_again(tmp_path, damage):
    corpus = Corpus.from_texts(["some text", "more"])
    whole = tokenize(corpus, ByteTokenizer(), cache_dir=tmp_path)
    tokens = whole.tokens.tolist()
    (entry,) = tmp_path.iterdir()
    data = (entry / damage).read_bytes()
    (entry / damage).write_bytes(data[: len(data) // 2])
    again = tokenize(corpus, ByteTokenizer(), cache_dir=tmp_path)
    assert again.tokens.tolist() == tokens and again.identity == whole.identity


def test_failure_in_the_middle_leaves_nothing(tmp_path):
    path, cache = tmp_path / "x.jsonl", tmp_path / "cache"
    path.write_text(json.dumps({"text": "a"}) + "\n{")
    with pytest.raises(DataError, match="line 2 is not JSON"):
        tokenize(open_corpus(path), ByteTokenizer(), cache_dir=cache)
    assert list(cache.iterdir()) == []


def test_many_at_once_agree(tmp_path):
    corpus, found = Corpus.from_texts(["text " * 1000]), []
    threads = [
        threading.Thread(target=lambda: found.append(tokenize(corpus, ByteTokenizer(), cache_dir=tmp_path)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.n_tokens for one in found] == [5000] * 8
    assert len(list(tmp_path.iterdir())) == 1


def test_progress_names_the_corpus(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tokenized, "_PROGRESS_AFTER", 0.0)
    # Rich draws nothing where there is no terminal, unless told that there is one.
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    tokenize(Corpus.from_texts(["a"], "my books"), ByteTokenizer(), cache_dir=tmp_path, progress=True)
    assert "tokenising my books" in capsys.readouterr().err


def test_cache_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be written to .*cache_dir"):
        tokenize(Corpus.from_texts(["a"]), ByteTokenizer(), cache_dir=tmp_path / "file" / "cache")


def test_default_cache_follows_the_platform(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "nestor"
    tokenize(Corpus.from_texts(["a"]), ByteTokenizer())
    assert len(list((tmp_path / "nestor" / "tokens").iterdir())) == 1


def test_documents_in_memory_need_a_token():
    with pytest.raises(DataError, match="no document has a token"):
        TokenizedCorpus.from_documents([[], []])
