"""One stream is one function of its tokens: however it is cut, batched, padded, packed or masked."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestor.ops.neural_memory import MemoryState

READ_MODES = ("inclusive", "exclusive", "chunk_start")
DEPTHS = pytest.mark.parametrize("depth", [1, 2])
READS = pytest.mark.parametrize("read_mode", READ_MODES)


def in_calls(p, cuts: list[int]):
    """Run the problem in pieces that end at `cuts`, the state carried."""
    state, outputs, begin = p.state, [], 0
    for end in [*cuts, p.q.shape[1]]:
        if end > begin:
            y, state = p.tokens(slice(begin, end)).run(state=state)
            outputs.append(y)
        begin = end
    return torch.cat(outputs, 1), state


def pool(states: list[MemoryState]) -> MemoryState:
    parts = (tuple(torch.cat(w) for w in zip(*(s[i] for s in states), strict=True)) for i in range(3))
    return MemoryState(*parts, torch.cat([s.phase for s in states]))


# --- invariant 4: cuts --------------------------------------------------------------------------------------


@DEPTHS
@READS
@pytest.mark.parametrize("momentum", [True, False])
def test_a_cut_anywhere_changes_nothing(draw_problem, assert_close, flat, depth, read_mode, momentum) -> None:
    """Invariant 4: [0:s] then [s:T] equals one call, for every s."""
    p = draw_problem(depth=depth, read_mode=read_mode, momentum=momentum, length=13)
    whole = p.run()
    for s in range(1, 13):
        parts = in_calls(p, [s])
        assert_close(flat(parts), flat(whole), what=f"cut at {s}")
        assert torch.equal(parts[1].phase, whole[1].phase)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 1000),
    cuts=st.lists(st.integers(0, 14), min_size=2, max_size=5),
    masked=st.sampled_from([0.0, 0.4]),
    reset=st.sampled_from([0.0, 0.2]),
    with_state=st.booleans(),
    grad_at=st.sampled_from(["pre_decay", "post_decay"]),
    depth=st.integers(1, 3),
)
def test_many_cuts_with_masks_and_resets_change_nothing(
    draw_problem, assert_close, flat, gradients, seed, cuts, masked, reset, with_state, grad_at, depth
) -> None:
    """Invariant 4: three and more pieces, with masks, documents and ragged phases, in the gradients too."""
    p = draw_problem(
        seed, length=14, masked=masked, reset=reset, with_state=with_state, grad_at=grad_at, depth=depth
    )
    assert_close(flat(in_calls(p, sorted(cuts))), flat(p.run()))
    found, wanted = gradients(p, lambda p: in_calls(p, sorted(cuts))), gradients(p, lambda p: p.run())
    for name in wanted:
        assert_close(found[name], wanted[name], 1e-9, name)


# --- invariant 5: causality ---------------------------------------------------------------------------------


@DEPTHS
@READS
@pytest.mark.parametrize("norm", ["none", "residual_layernorm"])
def test_a_changed_token_leaves_earlier_outputs_bitwise_unchanged(
    draw_problem, depth, read_mode, norm
) -> None:
    """Invariant 5: every input of token t, its mask and its document flag."""
    p = draw_problem(depth=depth, read_mode=read_mode, norm=norm, length=11, dtype=torch.float32)
    p = p.replace(mask=torch.ones(2, 11, dtype=torch.bool), resets=torch.zeros(2, 11, dtype=torch.bool))
    y, _ = p.run()
    for t in (0, 3, 4, 6, 10):
        for name in ("q", "k", "v", "theta", "eta", "alpha"):
            changed = getattr(p, name).detach().clone()
            changed[:, t] = torch.rand_like(changed[:, t])
            other, _ = p.run(**{name: changed})
            assert torch.equal(other[:, :t], y[:, :t]), name
    for t in (1, 4, 6, 10):
        mask, resets = p.mask.clone(), p.resets.clone()
        mask[:, t], resets[:, t] = False, True
        # These lay the chunks out differently, so the products may be rounded differently.
        for other in (p.run(mask=mask)[0], p.run(resets=resets)[0]):
            torch.testing.assert_close(other[:, :t], y[:, :t], rtol=1e-5, atol=1e-5)


@READS
@pytest.mark.parametrize("grad_at", ["pre_decay", "post_decay"])
def test_the_jacobian_is_causal(draw_problem, read_mode, grad_at) -> None:
    """Invariant 5: dy_i/dx_j = 0 for j > i; for j = i too in exclusive reads; by chunks at chunk start."""
    p = draw_problem(batch=1, heads=1, length=7, chunk_size=3, read_mode=read_mode, grad_at=grad_at)
    names = ("q", "k", "v", "theta", "eta", "alpha")

    def outputs(*tensors):
        return p.run(**dict(zip(names, tensors, strict=True)))[0][0, :, 0].sum(-1)

    jacobians = torch.autograd.functional.jacobian(outputs, tuple(getattr(p, n).detach() for n in names))
    for name, jacobian in zip(names, jacobians, strict=True):
        reach = jacobian.abs().flatten(3).sum((1, 3))
        for i in range(7):
            own = {"inclusive": i + 1, "exclusive": i, "chunk_start": i // 3 * 3}[read_mode]
            if name == "q":
                assert not reach[i, :i].any() and not reach[i, i + 1 :].any() and reach[i, i] > 0
            else:
                assert not reach[i, own:].any(), name
                # The first token has no momentum to keep and, at the initial weights, nothing to forget.
                assert (reach[i, 1:own] > 1e-12).all(), name


# --- invariant 6: prefill and decode ------------------------------------------------------------------------


@DEPTHS
@READS
@pytest.mark.parametrize("chunk", [1, 4])
def test_prefill_then_decode_equals_one_prefill(
    draw_problem, assert_close, flat, depth, read_mode, chunk
) -> None:
    """Invariant 6: prompts of 0 to 2C + 1 tokens, then one token a call; outputs and states agree."""
    total = 2 * chunk + 3
    p = draw_problem(depth=depth, read_mode=read_mode, chunk_size=chunk, length=total)
    whole = p.run()
    for prompt in range(2 * chunk + 2):
        parts = in_calls(p, list(range(prompt, total)))
        assert_close(flat(parts), flat(whole), what=f"prompt of {prompt}")
        assert torch.equal(parts[1].phase, whole[1].phase)


def test_decode_of_sequences_at_different_places_equals_each_alone(draw_problem, assert_close, flat) -> None:
    """Invariants 6 and 7: requests at every phase share a batch and close their chunks at different steps."""
    p = draw_problem(batch=4, length=9, with_state=True)
    p = p.replace(state=p.state._replace(phase=torch.arange(4)))
    together = in_calls(p, list(range(1, 9)))
    alone = [in_calls(p.row(b), list(range(1, 9))) for b in range(4)]
    assert_close(together[0], torch.cat([y for y, _ in alone]))
    assert_close(flat(together), flat((torch.cat([y for y, _ in alone]), pool([s for _, s in alone]))))
    assert together[1].phase.tolist() == [(b + 9) % 4 for b in range(4)]
    assert_close(flat(together), flat(p.run()))


# --- invariant 7: batches -----------------------------------------------------------------------------------


@DEPTHS
def test_sequences_of_a_batch_do_not_see_each_other(draw_problem, assert_close, flat, depth) -> None:
    """Invariant 7: changing the other sequences changes nothing, permuting the batch permutes the results."""
    p = draw_problem(batch=3, depth=depth, length=10, masked=0.3, reset=0.2, with_state=True)
    y, after = p.run()
    other = p.replace(
        **{n: torch.cat([getattr(p, n)[:1], getattr(p, n)[1:].flip(1)]) for n in ("q", "k", "v", "alpha")}
    )
    assert torch.equal(other.run()[0][0], y[0])
    rows = [p.row(b) for b in range(3)]
    alone = [row.run() for row in rows]
    assert_close(flat((y, after)), flat((torch.cat([a for a, _ in alone]), pool([s for _, s in alone]))))
    order = [2, 0, 1]
    names = ("q", "k", "v", "theta", "eta", "alpha", "mask", "resets")
    permuted = p.replace(
        **{n: getattr(p, n)[order] for n in names}, state=pool([rows[b].state for b in order])
    )
    assert_close(permuted.run()[0], y[order])


def test_heads_do_not_see_each_other(draw_problem, assert_close) -> None:
    p = draw_problem(heads=3, depth=2)
    y, _ = p.run()
    one = {n: getattr(p, n)[:, :, 1:2] for n in ("q", "k", "v", "theta", "eta", "alpha")}
    alone = p.replace(**one, initial=tuple(w[1:2] for w in p.initial), gamma=p.gamma[1:2], beta=p.beta[1:2])
    assert_close(alone.run()[0], y[:, :, 1:2])


@DEPTHS
def test_padding_on_any_side_equals_each_length_alone(draw_problem, assert_close, flat, depth) -> None:
    """Invariant 7: right, left and scattered padding, whatever stands in the padding."""
    lengths = [11, 3, 8]
    p = draw_problem(batch=3, depth=depth, length=11)
    count = torch.arange(11)
    wanted = torch.tensor(lengths)[:, None]
    for mask in (
        count < wanted,
        count >= 11 - wanted,
        torch.stack([count >= 0, count % 4 == 1, (count * 8) % 11 < 8]),
    ):
        y, after = p.run(mask=mask)
        for b, kept in enumerate(mask):
            alone = p.row(b).tokens(kept.nonzero().squeeze(1)).run()
            assert alone[0].shape[1] == lengths[b]
            assert_close(y[b, kept], alone[0][0])
            assert not y[b, ~kept].any()
            own = tuple(tuple(w[b : b + 1] for w in part) for part in after[:3])
            assert_close(own, tuple(alone[1][:3]))
            assert int(after.phase[b]) == int(alone[1].phase)


@DEPTHS
def test_packed_documents_equal_documents_alone(draw_problem, assert_close, depth) -> None:
    """Invariant 7: documents of any length share a row, separated by resets."""
    p = draw_problem(batch=1, depth=depth, length=17)
    starts = [0, 1, 6, 14]
    resets = torch.zeros(1, 17, dtype=torch.bool)
    resets[0, starts] = True
    y, after = p.run(resets=resets)
    for begin, end in zip(starts, [*starts[1:], 17], strict=True):
        alone = p.tokens(slice(begin, end)).run()
        assert_close(y[:, begin:end], alone[0])
    assert_close(tuple(after[:3]), tuple(alone[1][:3]))
    assert int(after.phase) == 3


# --- invariant 8: masks -------------------------------------------------------------------------------------


@DEPTHS
@pytest.mark.parametrize("with_state", [True, False])
def test_masked_tokens_are_as_if_removed(
    draw_problem, assert_close, flat, gradients, depth, with_state
) -> None:
    """Invariant 8: W, S, anchor, phase and later outputs; and masked tokens receive no gradient."""
    p = draw_problem(batch=1, depth=depth, length=13, masked=0.4, with_state=with_state)
    kept = p.mask[0].nonzero().squeeze(1)
    y, after = p.run()
    expected, expected_after = p.tokens(kept).run(mask=None)
    assert_close(flat((y[:, kept], after)), flat((expected, expected_after)))
    assert torch.equal(after.phase, expected_after.phase)
    found = gradients(p, lambda p: p.run())
    for name in ("q", "k", "v", "theta", "eta", "alpha"):
        assert not found[name][0, ~p.mask[0]].any()
        assert found[name][0, kept[1:]].any()


@DEPTHS
def test_a_step_of_zero_is_not_a_mask(draw_problem, depth) -> None:
    """Invariant 8: momentum and decay still act on a token with theta = 0, so it is not skipped."""
    p = draw_problem(depth=depth, length=6)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[:, 3] = False
    theta = torch.where(mask[..., None], p.theta, 0.0)
    masked, shortcut = p.run(mask=mask)[1], p.run(theta=theta)[1]
    for part in ("weights", "momentum"):
        for a, b in zip(getattr(masked, part), getattr(shortcut, part), strict=True):
            assert (a - b).abs().amax((-1, -2)).min() > 1e-4
    # Momentum alone is enough: the weights go on by eta S.
    without = p.replace(alpha=None)
    assert (without.run(mask=mask)[1].weights[0] - without.run(theta=theta)[1].weights[0]).abs().max() > 1e-4


@DEPTHS
def test_a_fully_masked_sequence_keeps_its_state_bit_for_bit(draw_problem, depth) -> None:
    """Invariant 8: even if its flags ask for a reset."""
    p = draw_problem(depth=depth, with_state=True, length=5)
    y, after = p.run(mask=torch.tensor([[False] * 5, [True] * 5]), resets=torch.ones(2, 5, dtype=torch.bool))
    assert not y[0].any() and y[1].any()
    for part, before in zip(after[:3], p.state[:3], strict=True):
        for new, old in zip(part, before, strict=True):
            assert torch.equal(new[0], old[0])
    assert after.phase[0] == p.state.phase[0]


# --- invariant 16: resets -----------------------------------------------------------------------------------


@DEPTHS
@pytest.mark.parametrize("before", [4, 6])
def test_after_a_reset_nothing_before_it_remains_bit_for_bit(draw_problem, depth, before) -> None:
    """Invariant 16: equal to a fresh sequence, in float32, wherever in a chunk the reset falls."""
    p = draw_problem(depth=depth, with_state=True, length=before + 10, dtype=torch.float32)
    resets = torch.zeros(2, before + 10, dtype=torch.bool)
    resets[:, before] = True
    y, after = p.run(resets=resets)
    fresh, fresh_after = p.tokens(slice(before, None)).run(state=None)
    assert torch.equal(y[:, before:], fresh)
    for part, expected in zip(after[:3], fresh_after[:3], strict=True):
        for a, b in zip(part, expected, strict=True):
            assert torch.equal(a, b)
    assert torch.equal(after.phase, fresh_after.phase)


@DEPTHS
def test_resets_and_fresh_sequences_begin_at_the_start_state(draw_problem, assert_close, flat, depth) -> None:
    """`start` replaces (initial, S = 0); the decay target stays the learned initial weights."""
    p = draw_problem(depth=depth, with_start=True, length=9)
    begin = MemoryState(
        *(tuple(w.expand(2, *w.shape[1:]) for w in part) for part in p.start[:3]), torch.zeros(2).long()
    )
    assert_close(flat(p.run()), flat(p.run(start=None, state=begin)))
    resets = torch.zeros(2, 9, dtype=torch.bool)
    resets[:, 5] = True
    y, after = p.run(resets=resets)
    second = p.tokens(slice(5, None)).run(start=None, state=begin)
    assert_close(y[:, 5:], second[0])
    assert_close(after.momentum, second[1].momentum)
