"""Token streams: each token once an epoch in order, labels, resets, exact resume, ranks equal to one."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nestor.data import IGNORED, TokenizedCorpus, TokenStream, rank_lanes
from nestor.errors import ConfigError, DataError, StateMismatchError

EOS = 9999


def corpus_of(lengths):
    """Documents whose tokens are all different, numbered through."""
    ends = np.cumsum(lengths)
    return TokenizedCorpus.from_documents([range(end - n, end) for n, end in zip(lengths, ends, strict=True)])


@st.composite
def streams(draw):
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=8))
    total = sum(lengths)
    batch_size = draw(st.integers(1, min(total, 6)))
    length = draw(st.integers(1, min(total, 7)))
    settings = {"seed": draw(st.integers(0, 3)), "shuffle": draw(st.booleans()), "eos": EOS}
    return lengths, lambda lanes=None: TokenStream(
        corpus_of(lengths), batch_size, length, lanes=lanes, **settings
    )


def take(stream, count):
    return [next(stream) for _ in range(count)]


def joined(batches, key):
    return torch.cat([batch[key] for batch in batches], dim=1)


def assert_same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert torch.equal(one[key], other[key]), key


@given(streams())
def test_every_token_is_fed_once_an_epoch_in_order_with_true_labels_and_resets(drawn):
    lengths, make = drawn
    stream = make()
    total = sum(lengths)
    firsts = {int(end - n) for n, end in zip(lengths, np.cumsum(lengths), strict=True)}
    lasts = {int(end) - 1 for end in np.cumsum(lengths)}
    batches = take(stream, 3 * total // stream.batch_size // stream.length + 2)
    ids, labels, resets = (joined(batches, key) for key in ("input_ids", "labels", "resets"))
    assert ids.dtype == labels.dtype == torch.int64 and resets.dtype == torch.bool
    seen = [[], []]
    for lane in range(stream.batch_size):
        span = (lane + 1) * total // stream.batch_size - lane * total // stream.batch_size
        row, label, reset = ids[lane].tolist(), labels[lane].tolist(), resets[lane].tolist()
        for epoch in (0, 1):
            seen[epoch] += row[epoch * span : (epoch + 1) * span]
        for t, token in enumerate(row):
            assert label[t] == (EOS if token in lasts else token + 1)
            assert reset[t] == (token in firsts or t % span == 0)
            if not reset[t]:
                assert row[t - 1] == token - 1
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(total))


@given(streams(), st.integers(0, 9), st.integers(1, 4))
def test_resume_anywhere_equals_uninterrupted(drawn, before, after):
    _, make = drawn
    whole = take(make(), before + after)
    first = make()
    assert_same(take(first, before), whole[:before])
    state = json.loads(json.dumps(first.state_dict()))
    second = make()
    next(second)
    second.load_state_dict(state)
    assert_same(take(second, after), whole[before:])


@given(streams(), st.data())
def test_lanes_do_not_depend_on_who_makes_them(drawn, data):
    _, make = drawn
    whole = make()
    worlds = [n for n in range(1, whole.batch_size + 1) if whole.batch_size % n == 0]
    world = data.draw(st.sampled_from(worlds))
    ranks = [make(rank_lanes(whole.batch_size, rank, world)) for rank in range(world)]
    for _ in range(4):
        parts = [next(rank) for rank in ranks]
        assert_same([{key: torch.cat([part[key] for part in parts]) for key in parts[0]}], [next(whole)])
    states = [rank.state_dict() for rank in ranks]
    assert all(state == whole.state_dict() for state in states)


@given(st.integers(1, 7), st.integers(1, 7))
def test_segment_length_may_change_at_a_resume(one, other):
    corpus = corpus_of([5, 9, 3])
    long = joined(take(TokenStream(corpus, 2, 1), 60), "input_ids")
    first = TokenStream(corpus, 2, one)
    take(first, 3)
    second = TokenStream(corpus, 2, other)
    second.load_state_dict(first.state_dict())
    assert torch.equal(next(second)["input_ids"], long[:, 3 * one : 3 * one + other])


def test_unshuffled_stream_is_the_text_itself():
    batch = next(TokenStream(corpus_of([3, 2]), 1, 5, eos=EOS, shuffle=False))
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3, 4]]
    assert batch["labels"].tolist() == [[1, 2, EOS, 4, EOS]]
    assert batch["resets"].tolist() == [[True, False, False, True, False]]


def test_without_eos_the_last_token_has_no_label():
    batch = next(TokenStream(corpus_of([3, 2]), 1, 5, shuffle=False))
    assert batch["labels"].tolist() == [[1, 2, IGNORED, 4, IGNORED]]


def test_shuffling_depends_on_seed_and_epoch():
    corpus = corpus_of([3] * 30)
    rows = {}
    for seed in (0, 1):
        batches = take(TokenStream(corpus, 1, 90, seed=seed), 2)
        rows[seed] = [batch["input_ids"][0].tolist() for batch in batches]
    assert rows[0][0] != rows[0][1] and rows[0][0] != rows[1][0]
    again = next(TokenStream(corpus, 1, 90, seed=1))
    assert again["input_ids"][0].tolist() == rows[1][0]


def test_epoch_counts_a_lanes_readings():
    stream = TokenStream(corpus_of([10, 10]), 2, 5)
    take(stream, 3)
    assert stream.epoch() == 1.5


def test_a_state_of_other_content_is_refused_and_says_why():
    state = TokenStream(corpus_of([5, 9]), 2, 3, seed=1).state_dict()
    stream = TokenStream(corpus_of([5, 9]), 2, 3, seed=2)
    with pytest.raises(StateMismatchError, match="seed was 1 and is 2"):
        stream.load_state_dict(state)
    with pytest.raises(StateMismatchError, match=r"batch_size was 2 and is 4.*corpus was"):
        TokenStream(corpus_of([5, 8]), 4, 3, seed=1).load_state_dict(state)
    assert stream.position == 0


def test_too_short_a_corpus_and_impossible_sizes():
    with pytest.raises(DataError, match="has 14 tokens, fewer than one segment of 15"):
        TokenStream(corpus_of([5, 9]), 2, 15)
    with pytest.raises(DataError, match="or than its 15 lanes"):
        TokenStream(corpus_of([5, 9]), 15, 2)
    with pytest.raises(ConfigError, match="length is 0"):
        TokenStream(corpus_of([5, 9]), 2, 0)
    with pytest.raises(ConfigError, match=r"lanes are \[2\]"):
        TokenStream(corpus_of([5, 9]), 2, 2, lanes=[2])
    with pytest.raises(ConfigError, match="batch_size is 3; it must be a multiple of the 2 processes"):
        rank_lanes(3, 0, 2)
    with pytest.raises(ConfigError, match=r"rank is 2; it must lie in 0\.\.1"):
        rank_lanes(4, 2, 2)
