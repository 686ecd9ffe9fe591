"""Tokenizers: byte identity, Hugging Face compatibility, streaming decode, loading and its errors."""

import lzma

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from nestor.data import (
    ByteTokenizer,
    StreamDecoder,
    check_vocabulary,
    encode_text,
    load_tokenizer,
    tokenizer_identity,
)
from nestor.errors import DataError, FileFormatError, NestorError

SAMPLE = "Café — naïve 日本 \U0001f600\nThe key of Marlow is 4821.\n"


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SAMPLE * 3, "the cat sat on the mat " * 20], trainer)
    return tokenizer


@given(st.text())
def test_bytes_round_trip_any_text(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids == list(text.encode("utf-8"))
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(torch.tensor(ids, dtype=torch.int64)) == text


def test_bytes_text_of_a_special_token_is_text():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("<eos>") == [60, 101, 111, 115, 62]
    assert tokenizer.decode([65, 257, 66]) == "AB"
    assert tokenizer.decode([65, 257, 66], skip_special_tokens=False) == "A<eos>B"


def test_bytes_decode_replaces_broken_characters_and_refuses_foreign_ids():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([0xC3, 65]) == "\ufffdA"
    assert tokenizer.decode([0xC3, 257, 0xA9]) == "\ufffd\ufffd"
    with pytest.raises(DataError, match=r"token id 260 .* 0\.\.259"):
        tokenizer.decode([260])


def test_bytes_call_pads_on_the_wanted_side():
    tokenizer = ByteTokenizer()
    batch = tokenizer(["ab", "c"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[97, 98], [258, 99]]
    assert batch["attention_mask"].tolist() == [[1, 1], [0, 1]]
    right = ByteTokenizer(padding_side="right")(["ab", "c"], padding=True, return_tensors="pt")
    assert right["input_ids"].tolist() == [[97, 98], [99, 258]]
    assert tokenizer("ab")["input_ids"] == [97, 98]
    assert tokenizer("ab", return_tensors="pt")["input_ids"].shape == (1, 2)
    with pytest.raises(DataError, match="padding=True"):
        tokenizer(["ab", "c"], return_tensors="pt")


def test_bytes_saved_folder_opens_with_nestor_and_with_hugging_face(tmp_path):
    ByteTokenizer(padding_side="right").save_pretrained(tmp_path)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(ours, ByteTokenizer) and ours.padding_side == "right"
    assert len(theirs) == len(ours) == 260
    assert theirs.encode(SAMPLE, add_special_tokens=False) == ours.encode(SAMPLE)
    assert theirs.decode(ours.encode(SAMPLE)) == SAMPLE
    for role in ("bos", "eos", "pad", "sep"):
        assert getattr(theirs, f"{role}_token_id") == getattr(ours, f"{role}_token_id")
    assert theirs.convert_tokens_to_ids("<eos>") == 257


def test_bytes_token_names_invert():
    tokenizer = ByteTokenizer()
    names = tokenizer.convert_ids_to_tokens(list(range(260)))
    assert len(set(names)) == 260
    assert tokenizer.convert_tokens_to_ids(names) == list(range(260))


@given(st.text(max_size=30), st.binary(max_size=6))
def test_stream_decoder_pieces_concatenate_to_the_whole_for_bytes(text, tail):
    tokenizer = ByteTokenizer()
    ids = [*text.encode("utf-8"), *tail]
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(token) for token in ids]
    assert "".join(pieces) + decoder.finish() == tokenizer.decode(ids)
    if not tail:
        assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


@settings(deadline=None, max_examples=50)
@given(text=st.text(max_size=40))
def test_stream_decoder_pieces_concatenate_to_the_whole_for_bpe(bpe, text):
    if "\ufffd" in text:
        return
    wrapped = _wrapped(bpe)
    ids = encode_text(wrapped, text)
    decoder = StreamDecoder(wrapped)
    pieces = [decoder.push(token) for token in ids]
    assert "".join(pieces) + decoder.finish() == wrapped.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_stream_decoder_holds_back_half_a_character():
    decoder = StreamDecoder(ByteTokenizer())
    assert [decoder.push(0xC3), decoder.push(0xA9)] == ["", "é"]
    assert decoder.push(0xE6) == ""
    assert decoder.push(257) == "\ufffd"
    decoder.push(0xE6)
    assert decoder.finish() == "\ufffd"


def test_tokenizer_files_folders_and_compressed_files_give_the_same_ids(tmp_path, bpe):
    plain, packed = tmp_path / "tokenizer.json", tmp_path / "other.json.xz"
    bpe.save(str(plain))
    with lzma.open(packed, "wt", encoding="utf-8") as handle:
        handle.write(bpe.to_str())
    _wrapped(bpe).save_pretrained(tmp_path / "folder")
    want = bpe.encode(SAMPLE, add_special_tokens=False).ids
    for place in (plain, packed, tmp_path, tmp_path / "folder"):
        tokenizer = load_tokenizer(place)
        assert encode_text(tokenizer, SAMPLE) == want
        assert tokenizer.eos_token_id == bpe.token_to_id("<|endoftext|>")


def test_identity_tells_tokenizers_apart(bpe):
    wrapped = _wrapped(bpe)
    assert tokenizer_identity(wrapped) == tokenizer_identity(_wrapped(bpe))
    assert tokenizer_identity(wrapped) != tokenizer_identity(ByteTokenizer()) == "bytes"


def test_model_folder_that_names_bytes(tmp_path):
    (tmp_path / "config.json").write_text('{"tokenizer_name": "bytes"}')
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)


def test_loading_errors_say_what_is_wrong(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        load_tokenizer(tmp_path / "absent.json")
    with pytest.raises(DataError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    bad = tmp_path / "tokenizer.json"
    bad.write_text('{"version": ')
    with pytest.raises(FileFormatError, match="not a tokenizer definition"):
        load_tokenizer(bad)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(FileFormatError, match="not valid JSON"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileFormatError, match="no byte tokenizer"):
        (tmp_path / "tokenizer_config.json").write_text("{}")
        ByteTokenizer.from_pretrained(tmp_path)
    with pytest.raises(DataError, match="padding_side is 'middle'"):
        ByteTokenizer(padding_side="middle")


def test_unknown_hub_name_is_one_clear_error(monkeypatch):
    def refuse(name, **settings):
        assert settings["trust_remote_code"] is False
        raise OSError(f"{name} is not a local folder\nlong advice")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(NestorError, match=r"no tokenizer 'somebody/something'.*not a local folder") as caught:
        load_tokenizer("somebody/something")
    assert "long advice" not in str(caught.value)


def test_vocabulary_larger_than_the_models_is_refused():
    check_vocabulary(ByteTokenizer(), 260)
    check_vocabulary(ByteTokenizer(), 512)
    with pytest.raises(DataError, match=r"260 entries .* vocab_size is 256.*vocab_size=260"):
        check_vocabulary(ByteTokenizer(), 256)


def _wrapped(bpe):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")
