"""Mixtures and prefetching: lanes stay with their source, ranks and resume are exact, errors come through."""

import gc
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nestor.data import Mixture, Prefetcher, TokenizedCorpus, TokenStream, rank_lanes
from nestor.data.mixture import deal_lanes
from nestor.data.tasks import MqarTask, TaskStream
from nestor.errors import ConfigError, StateMismatchError

TEXT = TokenizedCorpus.from_documents([range(100, 160), range(200, 230)])
TASK = MqarTask(60, 3, 20)


def mixture(batch_size=8, lanes=None, weights=(0.75, 0.25), length=7):
    def text(size, mine):
        return TokenStream(TEXT, size, length, seed=1, lanes=mine)

    def task(size, mine):
        return TaskStream(TASK, size, length, seed=2, lanes=mine)

    return Mixture([(weights[0], text), (weights[1], task)], batch_size, length, lanes=lanes)


def take(stream, count):
    return [next(stream) for _ in range(count)]


def assert_same(left, right):
    for one, other in zip(left, right, strict=True):
        for key in one:
            assert torch.equal(one[key], other[key]), key


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "nestor-prefetch"]


@given(st.lists(st.floats(0.05, 1.0), min_size=1, max_size=4), st.integers(1, 64))
def test_lanes_are_dealt_by_weight(weights, batch_size):
    try:
        owners = deal_lanes(weights, batch_size)
    except ConfigError:
        assert batch_size * min(weights) / sum(weights) < 2
        return
    for source, weight in enumerate(weights):
        assert abs(owners.count(source) - batch_size * weight / sum(weights)) < len(weights)
    assert set(owners) == set(range(len(weights)))


def test_a_lane_is_a_lane_of_its_source():
    mixed = mixture()
    assert mixed.owners.count(1) == 2
    text, task = TokenStream(TEXT, 6, 7, seed=1), TaskStream(TASK, 2, 7, seed=2)
    for _ in range(5):
        batch, parts = next(mixed), [next(text), next(task)]
        rows = [0, 0]
        for row, owner in enumerate(mixed.owners):
            for key in batch:
                assert torch.equal(batch[key][row], parts[owner][key][rows[owner]])
            rows[owner] += 1


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_together_are_one_rank(world):
    whole = mixture()
    ranks = [mixture(lanes=rank_lanes(8, rank, world)) for rank in range(world)]
    for _ in range(4):
        parts = [next(rank) for rank in ranks]
        assert_same([{key: torch.cat([part[key] for part in parts]) for key in parts[0]}], [next(whole)])
    assert all(rank.state_dict() == whole.state_dict() for rank in ranks)


@given(st.integers(0, 12))
def test_mixture_resumes_anywhere(before):
    whole = take(mixture(), before + 3)
    first, second = mixture(), mixture()
    take(first, before)
    take(second, 1)
    second.load_state_dict(first.state_dict())
    assert_same(take(second, 3), whole[before:])


def test_mixture_refuses_another_mixtures_state_and_bad_settings():
    with pytest.raises(StateMismatchError, match="weights was"):
        mixture(weights=(0.5, 0.5)).load_state_dict(mixture().state_dict())
    with pytest.raises(
        ConfigError, match=r"gives source 1 none of 4 lanes: raise the batch size to about 100"
    ):
        mixture(batch_size=4, weights=(0.99, 0.01))
    with pytest.raises(ConfigError, match="each must be positive"):
        mixture(weights=(1.0, 0.0))
    with pytest.raises(ConfigError, match="segments of 5 tokens, not 7"):
        Mixture([(1.0, lambda size, mine: TokenStream(TEXT, size, 5, lanes=mine))], 4, 7)


@given(st.integers(0, 6), st.integers(1, 4))
def test_prefetching_changes_nothing_and_resumes_from_what_was_consumed(before, depth):
    whole = take(mixture(), before + 3)
    with Prefetcher(mixture(), depth=depth) as ahead:
        assert_same(take(ahead, before), whole[:before])
        state = ahead.state_dict()
        assert state["position"] == 7 * before
        take(ahead, 2)
        ahead.load_state_dict(state)
        assert ahead.state_dict() == state
        assert_same(take(ahead, 3), whole[before:])
    assert ahead.stream.position == 7 * (before + 3)
    second = Prefetcher(mixture(), depth=depth)
    second.load_state_dict(state)
    assert_same(take(second, 3), whole[before:])
    second.close()
    assert threads() == []


class Failing(TokenStream):
    def __next__(self):
        if self.position >= 6:
            raise OSError("the disk is gone")
        return super().__next__()


def test_errors_of_the_thread_are_raised_where_their_batch_was_due():
    ahead = Prefetcher(Failing(TEXT, 2, 3))
    take(ahead, 2)
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            next(ahead)
    assert ahead.state_dict()["position"] == 6
    ahead.load_state_dict(TokenStream(TEXT, 2, 3).state_dict())
    assert_same(take(ahead, 2), take(TokenStream(TEXT, 2, 3), 2))
    ahead.close()
    ahead.close()
    with pytest.raises(ValueError, match="closed"):
        next(ahead)


def test_a_dropped_prefetcher_ends_its_thread():
    ahead = Prefetcher(mixture())
    next(ahead)
    (thread,) = threads()
    del ahead
    gc.collect()
    deadline = time.monotonic() + 5
    while thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not thread.is_alive()
