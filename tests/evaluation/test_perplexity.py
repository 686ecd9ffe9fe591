"""Bits per byte by position and by context are those of plain forward calls over the same text."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nestor.errors import ConfigError, DataError
from nestor.evaluation import Subject, compare_perplexity, cut_passages, make_layout, measure_perplexity
from nestor.evaluation.passages import encode_with_bytes

TEXT = "It was a dark and stormy night; the rain fell in torrents - except at 1,234 intervals.\n"


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"abcdefghij klmnop\n", dtype=np.uint8)
    return [bytes(rng.choice(letters, 3000)).decode() for _ in range(6)]


@pytest.fixture(scope="module")
def passages(documents, words):
    return cut_passages(documents, [words], 200, 6)


@pytest.fixture(scope="module")
def merged():
    """A byte-pair tokenizer, some of whose tokens are pieces of a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT * 20], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def forward_bits(model, ids):
    """Bits of each token of a text from one call; nan for the first."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
    nats = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
    return np.array([math.nan, *(nats / math.log(2)).tolist()])


@pytest.mark.parametrize("which", [0, 1])
def test_by_position_is_the_plain_forward_over_the_whole_text(models, passages, words, which):
    subject = models[which]
    layout = make_layout(200, contexts=[])
    result = measure_perplexity(subject, passages, layout, batch_size=4, piece=48)
    bits = np.stack([forward_bits(subject.model, words.encode(p.text)[:200]) for p in passages])
    edges = result["by_position"]["edges"]
    assert edges == [0, 16, 32, 64, 128, 200]
    for (low, high), found in zip(pairwise(edges), result["by_position"]["bits_per_byte"], strict=True):
        assert found["estimate"] == pytest.approx(np.nanmean(bits[:, low:high]), abs=1e-4)
        assert found["low"] < found["estimate"] < found["high"]
    assert result["bits_per_byte"]["estimate"] == pytest.approx(np.nanmean(bits), abs=1e-4)
    assert result["scored_tokens"] == result["scored_bytes"] == 6 * 199
    assert result["token_perplexity"] == pytest.approx(2 ** np.nanmean(bits), rel=1e-3)
    assert result["resampled"] == "document" and result["by_context"]["carried"] is None


def test_by_context_reads_the_same_blocks_from_a_fresh_state(models, passages, words):
    subject = models[1]
    layout = make_layout(200, contexts=[20, 100], block=10, blocks=3)
    assert layout.blocks == (100, 145, 190)
    result = measure_perplexity(subject, passages, layout, piece=48)["by_context"]
    texts = [words.encode(p.text)[:200] for p in passages]
    for row in result["contexts"]:
        bits = [
            forward_bits(subject.model, ids[start - row["context"] : start + 10])[-10:].mean()
            for ids in texts
            for start in layout.blocks
        ]
        assert row["bits_per_byte"]["estimate"] == pytest.approx(np.mean(bits), abs=1e-4)
    carried = [forward_bits(subject.model, ids)[s : s + 10].mean() for ids in texts for s in layout.blocks]
    assert result["carried"]["estimate"] == pytest.approx(np.mean(carried), abs=1e-4)
    assert result["contexts"][0]["minus_carried"]["estimate"] == pytest.approx(
        result["contexts"][0]["bits_per_byte"]["estimate"] - np.mean(carried), abs=1e-4
    )


def test_a_windowed_model_gains_nothing_beyond_its_reach(make_tiny, passages, words):
    model = make_tiny(sliding_window=16)
    result = measure_perplexity(
        Subject("w", model, words), passages, make_layout(200, contexts=[8, 40, 100], block=40)
    )["by_context"]
    near, far, farther = (row["minus_carried"]["estimate"] for row in result["contexts"])
    assert abs(far) < 1e-5 and abs(farther) < 1e-5 < abs(near)


def test_a_limited_context_is_measured_as_far_as_it_goes(models, foreign, documents, words):
    passages = cut_passages(documents, [words], 400, 6)
    layout = make_layout(400, contexts=[64, 300], block=20)
    results = [measure_perplexity(subject, passages, layout) for subject in (models[0], foreign)]
    limited = results[1]
    # 256 tokens read, the 257th predicted.
    assert limited["scored_tokens"] == 6 * 256 and "at most 256 tokens" in limited["notes"][0]
    assert [row["bits_per_byte"] is None for row in limited["by_context"]["contexts"]] == [False, True]
    assert limited["by_context"]["carried"] is None
    (difference,) = compare_perplexity(["a", "b"], results)
    # Only the five bins that both have scored are compared; the first token has a prediction where a
    # beginning-of-text token comes before it.
    first, second = (np.asarray(r["sums"]["bits"])[:, :5].sum() for r in results)
    assert difference["bits_per_byte"]["estimate"] == pytest.approx(second / (6 * 256) - first / (6 * 255))
    assert [d["estimate"] is None for d in difference["by_position"]] == [False] * 5 + [True]


def test_differences_are_paired_and_signed(models, passages):
    results = [measure_perplexity(s, passages, make_layout(200, contexts=[])) for s in models]
    (difference,) = compare_perplexity(["full", "titans"], results)
    values = [r["bits_per_byte"]["estimate"] for r in results]
    assert difference["baseline"] == "full" and difference["model"] == "titans"
    assert difference["bits_per_byte"]["estimate"] == pytest.approx(values[1] - values[0])


def test_bytes_of_tokens_sum_to_the_text_in_any_language(merged, words):
    for text in (TEXT, "naïve café - 日本語のテキスト 🙂 end", "🙂", ""):
        for tokenizer in (merged, words):
            ids, counts = encode_with_bytes(tokenizer, text)
            assert len(ids) == len(counts) and counts.sum() == len(text.encode()) and (counts >= 0).all()
    ids, counts = encode_with_bytes(merged, "night")
    assert "".join(merged.decode([i])[:] for i in ids) == "night" and counts.sum() == 5


def test_tokenizers_of_different_grain_are_measured_on_the_same_bytes(merged, words, make_tiny, models):
    documents = [TEXT * 30 for _ in range(3)]
    passages = cut_passages(documents, [words, merged], 256, 3, unit="bytes")
    layout = make_layout(256, contexts=[], unit="bytes")
    coarse = Subject("coarse", make_tiny(vocab_size=300), merged)
    results = [measure_perplexity(s, passages, layout) for s in (models[0], coarse)]
    first = [encode_with_bytes(merged, p.text)[1][0] for p in passages]
    assert results[0]["scored_bytes"] == 3 * 255
    # The coarse model's last token may end beyond the 256th byte; its first one is predicted by nothing.
    assert 3 * 256 - sum(first) <= results[1]["scored_bytes"] <= 3 * 256 - sum(first) + 3 * 20
    assert results[1]["scored_tokens"] < results[0]["scored_tokens"] / 2


def test_passages_never_overlap_and_are_spread_over_documents(documents, words):
    passages = cut_passages(documents, [words], 300, 6, seeds=(0, 1))
    assert len({p.text for p in passages}) == 12
    for number, text in enumerate(documents):
        spans = sorted((text.index(p.text), len(p.text)) for p in passages if p.document == number)
        assert all(a + n <= b for (a, n), (b, _) in pairwise(spans))
    assert len({p.document for p in passages if p.seed == 0}) == 6
    assert passages == cut_passages(documents, [words], 300, 6, seeds=(0, 1))
    with pytest.raises(DataError, match="no document of the corpus has 9000 tokens"):
        cut_passages(documents, [words], 9000, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 8}, "at least 32"),
        ({"length": 100, "scale": "cubic"}, "log, linear"),
        ({"length": 100, "contexts": [95]}, "do not fit"),
        ({"length": 100, "contexts": [0]}, "at least 1"),
        ({"length": 100, "blocks": 0}, "at least 1"),
    ],
)
def test_impossible_layouts_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_layout(**settings)


def test_layouts_cover_every_position_once():
    assert make_layout(100).edges == (0, 16, 32, 64, 100) and make_layout(64).edges == (0, 16, 32, 64)
    linear = make_layout(1000, scale="linear", bins=4)
    assert linear.edges == (0, 250, 500, 750, 1000) and linear.contexts == (16, 64, 256)
    assert linear.blocks == (256, 875) and linear.block == 125
