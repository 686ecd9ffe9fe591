"""Span: positions, document starts and clocks of a call."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestor.errors import ShapeError
from nestor.layers.span import Span


def counted(clock, valid, resets):
    """Position of each valid token and the clock after, by counting."""
    positions = []
    for keep, reset in zip(valid, resets, strict=True):
        if not keep:
            break
        clock = 0 if reset else clock
        positions.append(clock)
        clock += 1
    return positions, clock


@given(
    st.integers(1, 9).flatmap(
        lambda length: st.tuples(
            st.lists(st.integers(0, 5), min_size=1, max_size=3),
            st.just(length),
            st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=3, max_size=3),
            st.lists(st.integers(0, length), min_size=3, max_size=3),
        )
    )
)
@settings(max_examples=60)
def test_positions_and_clock_equal_a_token_count(case):
    clocks, length, resets, lengths = case
    batch = len(clocks)
    span = Span.build(
        torch.tensor(clocks),
        batch,
        length,
        "cpu",
        torch.tensor(lengths[:batch]),
        torch.tensor(resets[:batch]),
    )
    after = span.clock_after().tolist()
    for row in range(batch):
        valid = [t < lengths[row] for t in range(length)]
        positions, clock = counted(clocks[row], valid, resets[row])
        assert span.position[row, : lengths[row]].tolist() == positions
        assert after[row] == clock
        starts = span.document_start[row, : lengths[row]].tolist()
        assert starts == [t - position for t, position in enumerate(positions)]


def test_a_fresh_span_has_one_shared_row_of_positions():
    span = Span.build(None, 3, 4, "cpu")
    assert span.position.stride(0) == 0
    assert span.clock_after().tolist() == [4, 4, 4]
    assert span.valid is None
    assert span.document.tolist() == [[0, 0, 0, 0]] * 3


def test_document_counts_resets_and_valid_marks_the_left():
    resets = torch.tensor([[False, True, False, True]])
    span = Span.build(None, 1, 4, "cpu", torch.tensor([3]), resets)
    assert span.document.tolist() == [[0, 1, 1, 2]]
    assert span.valid.tolist() == [[True, True, True, False]]


def test_wrong_shapes_are_refused_with_both_shapes():
    with pytest.raises(ShapeError, match=r"resets has shape \[2, 3\]; these tokens need \[2, 4\]"):
        Span.build(None, 2, 4, "cpu", resets=torch.zeros(2, 3, dtype=torch.bool))
