"""Every layer with a memory: streams may be cut, padded, packed and batched, and time flows forward."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nestor.layers.registry import MIXER_MODULES
from nestor.models.padding import Padding

EXACT = {"rtol": 1e-9, "atol": 1e-10}
LENGTH = 17  # two segments and a token; four chunks and a token; more than three windows


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@st.composite
def streams(draw):
    """A batch of ragged rows with documents, cut into pieces, and the sizes of a memory to read it."""
    chunk = draw(st.sampled_from([1, 2, 3, 4, 16]))
    length = draw(st.integers(1, 3 * chunk + 5))
    batch = draw(st.integers(1, 3))
    lengths = None
    if draw(st.booleans()):
        lengths = torch.tensor(draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch)))
    resets = torch.zeros(batch, length, dtype=torch.bool)
    for row, place in draw(
        st.sets(st.tuples(st.integers(0, batch - 1), st.integers(0, length - 1)), max_size=3)
    ):
        resets[row, place] = True
    cuts = draw(st.sets(st.integers(1, length - 1), max_size=4)) if length > 1 else set()
    memory = {
        "chunk_size": chunk,
        "depth": draw(st.integers(1, 3)),
        "momentum": draw(st.booleans()),
        "conv_kernel": draw(st.sampled_from([0, 2, 4])),
        "read_mode": draw(st.sampled_from(["inclusive", "exclusive", "chunk_start"])),
    }
    sizes = {
        "persistent": draw(st.sampled_from([0, 3])),
        "segment": chunk * draw(st.integers(1, 2)),
        "window": draw(st.integers(1, 6)),
    }
    return (
        normal(batch, length, 8, seed=length),
        lengths,
        resets if resets.any() else None,
        cuts,
        memory | sizes,
    )


@given(case=streams())
@settings(max_examples=16, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_cuts_anywhere_change_neither_outputs_nor_state(case, kind, build_layer, read_pieces, same_state):
    x, lengths, resets, cuts, sizes = case
    layer = build_layer(kind, **sizes)
    with torch.no_grad():
        whole, state, clock = read_pieces(layer, x, lengths=lengths, resets=resets)
        pieces, after, end = read_pieces(layer, x, cuts=cuts, lengths=lengths, resets=resets)
    valid = torch.ones(x.shape[:2]).bool() if lengths is None else torch.arange(x.shape[1]) < lengths[:, None]
    torch.testing.assert_close(pieces[valid], whole[valid], **EXACT)
    assert torch.equal(clock, end)
    same_state(after, state, clock)


@pytest.mark.parametrize("documents", [False, True])
def test_token_by_token_equals_one_call(layer, read_pieces, same_state, documents):
    x = normal(2, LENGTH, 8)
    resets = torch.zeros(2, LENGTH, dtype=torch.bool)
    resets[0, 6], resets[1, 8] = documents, documents
    resets = resets if documents else None
    with torch.no_grad():
        whole, state, clock = read_pieces(layer, x, resets=resets)
        steps, after, _ = read_pieces(layer, x, cuts=range(1, LENGTH), resets=resets)
    torch.testing.assert_close(steps, whole, **EXACT)
    same_state(after, state, clock)


def test_a_prompt_of_any_length_then_decoding_equals_one_call(layer, read_pieces, same_state):
    """Invariant 6: prompts of 1 to 2 C + 1 tokens."""
    x = normal(1, 12, 8)
    with torch.no_grad():
        whole, state, clock = read_pieces(layer, x)
        for prompt in (1, 3, 4, 5, 9):
            steps, after, _ = read_pieces(layer, x, cuts=range(prompt, 12))
            torch.testing.assert_close(steps, whole, **EXACT)
            same_state(after, state, clock)


def test_a_changed_token_leaves_earlier_outputs_bitwise_unchanged(layer, read_pieces):
    x = normal(2, LENGTH, 8)
    with torch.no_grad():
        before, _, _ = read_pieces(layer, x)
        for t in (0, 3, 4, 8, 11, 16):
            changed = x.clone()
            changed[:, t] += 1.0
            after, _, _ = read_pieces(layer, changed)
            assert torch.equal(after[:, :t], before[:, :t])
            assert (after[:, t:] - before[:, t:]).abs().amax((0, 2)).min() > 1e-9


def test_the_gradient_of_an_output_is_exactly_zero_at_later_tokens_and_at_no_earlier_one(layer, read_pieces):
    """Invariant 5: dy_i/dx_j is 0 for j > i. The memory makes it non-zero for every j <= i."""
    x = normal(1, LENGTH, 8).requires_grad_()
    y, _, _ = read_pieces(layer, x)
    direction = normal(8, seed=1)
    for t in range(LENGTH):
        (gradient,) = torch.autograd.grad((y[0, t] * direction).sum(), x, retain_graph=True)
        size = gradient[0].abs().amax(1)
        assert not size[t + 1 :].any()
        assert size[: t + 1].min() > 1e-9


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_a_padded_batch_equals_each_row_alone(layer, read_pieces, same_state, select_rows, side):
    lengths, total = [13, 5, 9], 13
    rows = [normal(length, 8, seed=length) for length in lengths]
    x, mask = torch.full((3, total, 8), 1e3, dtype=torch.float64), torch.zeros(3, total, dtype=torch.bool)
    for b, row in enumerate(rows):
        spare = total - len(row)
        start = {"left": spare, "right": 0, "both": spare // 2}[side]
        x[b, start : start + len(row)] = row
        mask[b, start : start + len(row)] = True
    padding = Padding.build(mask, 3, total)
    more = normal(3, 3, 8, seed=9)
    with torch.no_grad():
        y, state, clock = read_pieces(layer, padding.justify(x), lengths=padding.lengths)
        y = padding.restore(y)
        later, _, _ = read_pieces(layer, more, state=state, clock=clock)
        for b, row in enumerate(rows):
            alone, own, end = read_pieces(layer, row[None])
            torch.testing.assert_close(y[b][mask[b]], alone[0], **EXACT)
            same_state(select_rows(state, [b]), own, end)
            next_alone, _, _ = read_pieces(layer, more[b : b + 1], state=own, clock=end)
            torch.testing.assert_close(later[b], next_alone[0], **EXACT)


def test_packed_documents_equal_documents_alone_and_pass_no_gradient(
    layer, read_pieces, same_state, select_rows
):
    x = normal(2, LENGTH, 8).requires_grad_()
    starts = ([0, 3, 11], [0, 8])  # one in the middle of a chunk, one at the border of a segment
    resets = torch.zeros(2, LENGTH, dtype=torch.bool)
    for row, places in enumerate(starts):
        resets[row, places] = True
    y, state, clock = read_pieces(layer, x, resets=resets)
    for row, places in enumerate(starts):
        for start, stop in zip(places, [*places[1:], LENGTH], strict=True):
            alone, own, end = read_pieces(layer, x[row : row + 1, start:stop])
            torch.testing.assert_close(y[row, start:stop], alone[0], **EXACT)
            total = (y[row, start:stop] * normal(stop - start, 8, seed=1)).sum()
            (gradient,) = torch.autograd.grad(total, x, retain_graph=True)
            assert not gradient[row, :start].any()
        same_state(select_rows(state, [row]), own, end)


def test_after_a_reset_nothing_before_it_remains_bit_for_bit(layer, read_pieces):
    """Invariant 16: a document does not differ in one bit with what came before it."""
    x, other = normal(1, LENGTH, 8), normal(1, LENGTH, 8)
    other[:, :6] = 3 * normal(1, 6, 8, seed=5)
    resets = torch.zeros(1, LENGTH, dtype=torch.bool)
    resets[0, 6] = True
    with torch.no_grad():
        one, _, _ = read_pieces(layer, x, resets=resets)
        two, _, _ = read_pieces(layer, other, resets=resets)
    assert torch.equal(one[:, 6:], two[:, 6:])
    assert not torch.equal(one[:, :6], two[:, :6])


def test_a_state_copied_inside_a_chunk_is_continued_twice(layer, read_pieces):
    prompt, one, two = normal(2, 6, 8), normal(2, 7, 8, seed=1), normal(2, 7, 8, seed=2)
    with torch.no_grad():
        _, state, clock = read_pieces(layer, prompt)
        copy = {name: tensor.clone() for name, tensor in state.items()}
        first, _, _ = read_pieces(layer, one, state=state, clock=clock)
        second, _, _ = read_pieces(layer, two, state=copy, clock=clock)
        for name, tensor in state.items():
            assert torch.equal(tensor, copy[name])
        for more, got in ((one, first), (two, second)):
            whole, _, _ = read_pieces(layer, torch.cat([prompt, more], 1))
            torch.testing.assert_close(got, whole[:, 6:], **EXACT)


def test_rows_of_a_batch_do_not_see_each_other(layer, read_pieces):
    x = normal(3, LENGTH, 8)
    changed = x.clone()
    changed[1] = 2 * normal(LENGTH, 8, seed=5)
    order = [2, 0, 1]
    with torch.no_grad():
        before, _, _ = read_pieces(layer, x)
        after, _, _ = read_pieces(layer, changed)
        permuted, _, _ = read_pieces(layer, x[order])
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert not torch.equal(after[1], before[1])
    torch.testing.assert_close(permuted, before[order], **EXACT)


def test_a_row_that_is_all_padding_keeps_its_state_bit_for_bit(layer, read_pieces):
    with torch.no_grad():
        _, state, clock = read_pieces(layer, normal(2, 6, 8))
        lengths = torch.tensor([0, 5])
        _, after, end = read_pieces(layer, normal(2, 5, 8, seed=1), state=state, clock=clock, lengths=lengths)
    assert end.tolist() == [6, 11]
    for name, tensor in state.items():
        kept = after[name][:, -tensor.shape[1] :] if "cache" in name.split(".") else after[name]
        assert torch.equal(kept[0], tensor[0]), name
        counts = {"clock", "phase", "position"} & set(name.split("."))
        assert counts or not torch.equal(kept[1], tensor[1]), name


def test_outer_gradients_equal_finite_differences(layer, read_pieces):
    """Invariant 23: input and every parameter, through more than three chunks and a State handed on."""
    x = normal(1, 14, 8).requires_grad_()
    weight = normal(1, 14, 8, seed=1)
    leaves = {"x": x, **dict(layer.named_parameters())}

    def value():
        y, state, _ = read_pieces(layer, x, cuts=[6])
        memory = [t.sum() for name, t in state.items() if "weights" in name or "momentum" in name]
        return (y * weight).sum() + 0.1 * torch.stack(memory).sum()

    gradients = torch.autograd.grad(value(), list(leaves.values()))
    step = 1e-6
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        direction = normal(*leaf.shape, seed=3)
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                leaf.add_(sign * step * direction)
                values.append(value())
                leaf.sub_(sign * step * direction)
        expected = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close(
            (gradient * direction).sum(), expected, rtol=1e-5, atol=1e-6, msg=lambda m: f"{name}: {m}"
        )


def test_a_bfloat16_layer_keeps_its_memory_in_float32(kind, build_layer, read_pieces):
    layer = build_layer(kind, max_step=0.05).bfloat16()
    x = normal(2, LENGTH, 8).bfloat16()
    with torch.no_grad():
        y, state, _ = read_pieces(layer, x, cuts=[6])
        exact = build_layer(kind, max_step=0.05)
        exact.load_state_dict(layer.state_dict())  # the same rounded weights
        wanted, wanted_state, _ = read_pieces(exact, x.double(), cuts=[6])
    assert y.dtype == torch.bfloat16
    assert float((y.double() - wanted).norm() / wanted.norm()) < 0.1
    fast = [n for n in state if {"weights", "momentum", "anchor", "segment"} & set(n.split("."))]
    matrices = {"tnt": 12, "ttt": 4, "memory_as_context": 8, "memory_as_context_memora": 6}
    matrices |= {"atlas++": 9, "lact": 9, "self_modifying": 10}
    without_momentum = ("moneta", "yaad", "memora", "omega", "memory_as_layer_yaad")
    assert len(fast) == matrices.get(kind, 4 if kind in without_momentum else 6)
    for name in fast:
        assert state[name].dtype == torch.float32
        drift = (state[name].double() - wanted_state[name]).norm() / wanted_state[name].norm()
        assert float(drift) < 0.1, name


@pytest.mark.parametrize("kind", ["memory_as_context", "memory_as_gate", "memory_as_layer"])
def test_persistent_tokens_are_seen_from_every_position_of_every_document(kind, build_layer, read_pieces):
    """Invariant 25; each single one of them, also where windows and segments have moved on."""
    layer, x = build_layer(kind, persistent=3), normal(1, LENGTH, 8)
    resets = torch.zeros(1, LENGTH, dtype=torch.bool)
    resets[0, 10] = True
    for marks in (None, resets):
        y, _, _ = read_pieces(layer, x, cuts=[12], resets=marks)
        for t in (0, 4, 9, 10, 16):
            total = (y[0, t] * normal(8, seed=1)).sum()
            (gradient,) = torch.autograd.grad(total, layer.persistent, retain_graph=True)
            assert gradient.abs().amax(1).min() > 1e-9


@pytest.mark.parametrize("kind", ["memory_as_context", "memory_as_gate", "memory_as_layer"])
def test_a_layer_may_have_no_persistent_tokens(kind, build_layer, read_pieces):
    bare, x = build_layer(kind, persistent=0), normal(2, LENGTH, 8)
    assert bare.persistent is None
    with torch.no_grad():
        whole, _, _ = read_pieces(bare, x)
        given_some, _, _ = read_pieces(build_layer(kind, persistent=1), x)
    assert torch.isfinite(whole).all() and not torch.allclose(whole, given_some)


def test_every_mixer_with_a_memory_is_tested_here(build_layer):
    kinds = {name for name in MIXER_MODULES if "memory" in name}
    assert kinds == {"neural_memory", "memory_as_context", "memory_as_gate", "memory_as_layer"}
