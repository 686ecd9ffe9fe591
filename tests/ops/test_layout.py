"""The chunk grid against a plain walk over the tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nestor.models import NestorConfig, NestorForCausalLM
from nestor.ops.neural_memory import layout
from nestor.ops.neural_memory.layout import chunk_grid, shared_grids

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


@pytest.fixture
def packed():
    """A grid of two sequences, masked tokens and documents that start; and its mask."""
    mask, resets = torch.ones(2, 11, dtype=torch.bool), torch.zeros(2, 11, dtype=torch.bool)
    mask[0, 3:5], mask[1, 8:], resets[0, 6], resets[1, 2] = False, False, True, True
    return chunk_grid(2, 11, 4, torch.device("cpu"), None, mask, resets), mask


def test_gradients_of_gather_and_scatter(packed) -> None:
    grid, mask = packed
    x = torch.randn(2, 11, 3, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, grid.rows, grid.width, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(grid.gather, x)
    assert torch.autograd.gradcheck(lambda y: grid.scatter(y, 11), y)
    assert torch.autograd.gradgradcheck(grid.gather, x)
    (g,) = torch.autograd.grad(grid.gather(x).sum(), x)
    assert torch.equal(g, mask[..., None, None].expand_as(g).double())


def test_a_token_that_is_not_there_leaves_nothing(packed) -> None:
    grid, mask = packed
    x = torch.where(mask, 1.0, torch.nan)[..., None]
    assert grid.gather(x).isfinite().all()
    rows = torch.where(grid.valid, 1.0, torch.nan)[..., None]
    assert torch.equal(grid.scatter(rows, 11)[..., 0], mask.float())


def test_rows_have_room_for_a_chunk_where_asked() -> None:
    mask = torch.tensor([[True, True, False]])
    grid = chunk_grid(1, 3, 8, torch.device("cpu"), None, mask, whole=True)
    assert (grid.rows, grid.width, grid.valid.sum()) == (1, 8, 2)
    assert grid.gather(torch.ones(1, 3, 1)).shape == (1, 1, 8, 1)


def test_layers_share_a_grid_within_a_call() -> None:
    resets = torch.zeros(1, 9, dtype=torch.bool)
    resets[0, 5] = True

    def made(**choices):
        return chunk_grid(1, 9, 4, torch.device("cpu"), resets=resets, **choices)

    assert made() is not made()
    with shared_grids():
        grid = made()
        assert made() is grid and made(whole=True) is not grid
        assert made(phase=torch.ones(1, dtype=torch.int64)) is not grid
        with shared_grids():
            assert made() is grid
        assert chunk_grid(1, 9, 4, torch.device("cpu"), resets=resets.clone()) is not grid
    resets.numpy()[0, 2] = True
    with shared_grids():
        assert int(made().row_resets.sum()) == 2


def test_a_model_counts_once_and_its_states_have_phases_of_their_own(monkeypatch) -> None:
    counted = []
    ragged = layout._ragged_grid
    monkeypatch.setattr(layout, "_ragged_grid", lambda *given: counted.append(1) or ragged(*given))
    config = NestorConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=3, num_attention_heads=2,
        layer_types=["neural_memory"] * 3, memory={"heads": 2, "chunk_size": 4},
    )  # fmt: skip
    model = NestorForCausalLM(config)
    ids, resets = torch.zeros(1, 9, dtype=torch.int64), torch.zeros(1, 9, dtype=torch.bool)
    resets[0, 5] = True
    with torch.inference_mode():
        state = model(ids, resets=resets, use_cache=True).past_key_values
    assert len(counted) == 1
    model(ids, labels=ids, resets=resets).loss.backward()
    phases = [tensor for layer in state.layers.values() for name, tensor in layer.items() if "phase" in name]
    assert len(phases) == 3 == len({phase.data_ptr() for phase in phases})
