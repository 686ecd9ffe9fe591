"""The chunk grid against a plain walk over the tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nestor.ops.neural_memory.layout import chunk_grid

CPU = torch.device("cpu")


def walk(length: int, chunk: int, phase: int, mask: list[bool], resets: list[bool]) -> tuple[list[dict], int]:
    """Rows of one sequence (tokens, reset, closes) and the phase after it."""
    rows: list[dict] = []
    fresh_row = True
    for t in range(length):
        if not mask[t]:
            continue
        if resets[t]:
            phase, fresh_row = 0, True
        if fresh_row:
            rows.append({"tokens": [], "reset": resets[t], "closes": False})
        rows[-1]["tokens"].append(t)
        phase, fresh_row = phase + 1, False
        if phase == chunk:
            rows[-1]["closes"], phase, fresh_row = True, 0, True
    return rows, phase


@st.composite
def layouts(draw):
    length, chunk = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    flags = st.lists(st.booleans(), min_size=length, max_size=length)
    batch = draw(st.integers(1, 3))
    masks = draw(st.one_of(st.none(), st.lists(flags, min_size=batch, max_size=batch)))
    resets = draw(st.one_of(st.none(), st.lists(flags, min_size=batch, max_size=batch)))
    phases = st.lists(st.integers(0, chunk - 1), min_size=batch, max_size=batch)
    return batch, length, chunk, draw(st.one_of(st.none(), phases)), masks, resets


@settings(max_examples=200)
@given(layouts())
def test_every_token_stands_where_a_walk_puts_it(layout) -> None:
    """Invariants 4, 7 and 8: rows follow each sequence's own phase, documents and mask."""
    batch, length, chunk, phase, masks, resets = layout
    grid = chunk_grid(
        batch, length, chunk, CPU,
        None if phase is None else torch.tensor(phase),
        None if masks is None else torch.tensor(masks),
        None if resets is None else torch.tensor(resets),
    )  # fmt: skip
    tokens = grid.gather(torch.arange(length).expand(batch, length)[:, :, None])[..., 0]
    assert tokens.shape == (batch, grid.rows, grid.width)
    for b in range(batch):
        own_mask = [True] * length if masks is None else masks[b]
        own_resets = [False] * length if resets is None else resets[b]
        rows, after = walk(length, chunk, 0 if phase is None else phase[b], own_mask, own_resets)
        assert int(grid.phase[b]) == after
        for n in range(grid.rows):
            expected = rows[n] if n < len(rows) else {"tokens": [], "reset": False, "closes": False}
            valid = torch.ones(grid.width, dtype=torch.bool) if grid.valid is None else grid.valid[b, n]
            assert tokens[b, n][valid].tolist() == expected["tokens"]
            assert not valid[len(expected["tokens"]) :].any(), "valid cells come first"
            assert bool(grid.resets[n] is not None and grid.resets[n][b]) == expected["reset"]
            closes = grid.closes[n]
            assert (closes if isinstance(closes, bool) else bool(closes[b])) == expected["closes"]


@settings(max_examples=60)
@given(layouts())
def test_scatter_undoes_gather_and_zeroes_masked_tokens(layout) -> None:
    batch, length, chunk, phase, masks, resets = layout
    mask = None if masks is None else torch.tensor(masks)
    grid = chunk_grid(
        batch, length, chunk, CPU,
        None if phase is None else torch.tensor(phase), mask,
        None if resets is None else torch.tensor(resets),
    )  # fmt: skip
    x = torch.randn(batch, length, 2, 3)
    back = grid.scatter(grid.gather(x), length)
    expected = x if mask is None else x * mask[..., None, None]
    assert torch.equal(back, expected)


@pytest.mark.parametrize(
    ("length", "rows", "width", "after"), [(1, 1, 1, 1), (3, 1, 3, 3), (4, 1, 4, 0), (9, 3, 4, 1)]
)
def test_an_aligned_call_needs_no_index(length, rows, width, after) -> None:
    """The usual training call: whole chunks in order, only the last row short."""
    grid = chunk_grid(2, length, 4, CPU)
    assert (grid.rows, grid.width, grid.index) == (rows, width, None)
    assert grid.phase.tolist() == [after, after]
    assert grid.closes == [True] * (length // 4) + [False] * (length % 4 > 0)
    assert all(r is None for r in grid.resets)


def test_zero_phases_take_the_aligned_path() -> None:
    assert chunk_grid(2, 9, 4, CPU, torch.zeros(2, dtype=torch.int64)).index is None


def test_decode_closes_chunks_of_each_sequence_by_itself() -> None:
    """Invariant 7: one token for requests at phases 0 and 3 of a chunk of 4."""
    grid = chunk_grid(2, 1, 4, CPU, torch.tensor([0, 3]))
    assert (grid.rows, grid.width) == (1, 1)
    assert isinstance(grid.closes[0], Tensor) and grid.closes[0].tolist() == [False, True]
    assert grid.phase.tolist() == [1, 0]


def test_a_reset_on_a_masked_token_counts_for_nothing() -> None:
    mask, resets = torch.tensor([[True, False, True]]), torch.tensor([[False, True, False]])
    grid = chunk_grid(1, 3, 4, CPU, None, mask, resets)
    assert all(r is None for r in grid.resets)
    assert grid.phase.tolist() == [2]
