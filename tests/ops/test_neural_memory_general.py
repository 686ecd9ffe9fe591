"""The general form against the token loop, for members of the whole family, and its streams.

The reference judges; closed forms of the papers' rules are in test_retention.py, test_muon.py, test_omega.py.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestor.errors import ConfigError, ShapeError
from nestor.ops.neural_memory import MemorySpec, MemoryState, apply_network, choose_backend, fast_weights
from nestor.ops.neural_memory.spec import DECAYS, GRADIENT_PLACES, READ_MODES

PLAIN = {"momentum": False}
CHANNELS = {"step_sizes": "channel", "forget_gates": "channel"}
START = {"read_mode": "chunk_start"}
LACT = {
    **START, "network": "gated", "activation": "silu", "norm": "none", "inner_loss": "dot_product",
    "granularity": "chunk", "renormalize": "rows", "step_sizes": "matrix", "forget": False,
}  # fmt: skip
FAMILY = {
    "gated": {"network": "gated", "step_sizes": "matrix"},
    "gated, post-decay": {"network": "gated", "grad_at": "post_decay", "norm": "residual", "step": 0.05},
    "moneta": {
        **PLAIN, **CHANNELS, "retention": "lq", "inner_loss": "lp", "loss_smooth": True, "decay": "zero",
    },
    "moneta, exclusive": {**PLAIN, "retention": "lq", "retention_power": 2.5, "read_mode": "exclusive"},
    "moneta, exact": {**START, "retention": "lq", "retention_dual": "exact", "norm": "residual"},
    "yaad": {**PLAIN, **CHANNELS, "inner_loss": "yaad", "loss_smooth": True, "delta": "channel"},
    "huber of the norm": {"inner_loss": "huber_norm", "delta": "token", "network": "gated", **CHANNELS},
    "memora": {**PLAIN, **CHANNELS, **START, "retention": "softmax", "decay": "zero", "simplex_sum": 2.0},
    "memora, sequential": {**PLAIN, "retention": "softmax", "chunk_size": 1},
    "elastic net": {"retention": "elastic_net", "retention_threshold": 0.05},
    "elastic net, ftrl": {**START, "retention": "elastic_net_ftrl", "network": "gated"},
    "logit": {**START, "retention": "bregman_logit", "depth": 1, "norm": "none"},
    "omega": {"window": 3, "omega": "token"},
    "omega, longer than a chunk": {**PLAIN, "window": 6, "omega": "offset", "read_mode": "exclusive"},
    "omega, thresholds": {"window": 2, "inner_loss": "huber", "delta": "channel", **CHANNELS},
    "atlas": {"window": 2, "omega": "token", "optimizer": "muon", "with_step": True, **START},
    "atlas, un-orthogonalised reads": {"optimizer": "muon", "depth": 1, "renormalize": "rows"},
    "atlas, per token": {"optimizer": "muon", "muon_per_token": True, "with_step": True, "window": 2},
    "atlas, per token, gated": {
        "optimizer": "muon", "muon_per_token": True, "network": "gated", "read_mode": "exclusive",
        "step_sizes": "channel", "newton_schulz": "scheduled",
    },
    "lact": {**LACT, "momentum": False},
    "lact, momentum": LACT,
    "lact, muon": {**LACT, "optimizer": "muon", "newton_schulz": "scheduled", "with_step": True},
    "chunk steps that forget": {**START, "granularity": "chunk", "window": 2, "retention": "lq"},
}  # fmt: skip
MEMBERS = pytest.mark.parametrize("member", FAMILY)


@pytest.fixture
def draw(draw_problem):
    def drawn(member, seed=0, **options):
        return draw_problem(seed, **{"chunk_size": 3, **FAMILY[member], **options})

    return drawn


def in_calls(p, cuts):
    """Run the problem in pieces that end at `cuts`, the state carried."""
    state, outputs, begin = p.state, [], 0
    for end in [*cuts, p.q.shape[1]]:
        if end > begin:
            y, state = p.tokens(slice(begin, end)).run("general", state=state)
            outputs.append(y)
        begin = end
    return torch.cat(outputs, 1), state


# --- the token loop ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ragged", [False, True])
@MEMBERS
def test_general_form_equals_the_token_loop(draw, assert_close, flat, gradients, member, ragged) -> None:
    """Invariants 1, 2, 3, 8 and 23: outputs, state and every gradient; masks, documents, different phases."""
    options = {"masked": 0.3, "reset": 0.2, "with_state": True, "with_start": True} if ragged else {}
    p = draw(member, length=14, **options)
    actual, expected = p.run("general"), p.run("reference")
    assert_close(flat(actual), flat(expected))
    assert torch.equal(actual[1].phase, expected[1].phase)
    found, wanted = (gradients(p, lambda p, name=name: p.run(name)) for name in ("general", "reference"))
    for name in wanted:
        assert_close(found[name], wanted[name], 1e-9, name)


@MEMBERS
def test_streams_of_any_length_equal_the_token_loop(draw, assert_close, flat, member) -> None:
    """Invariant 2: T = 1, T < C, T = C; and with no gradients asked for, or possible."""
    for length in (1, 2, 3):
        p = draw(member, length, length=length)
        with torch.inference_mode():
            actual = p.run("general")
        with torch.no_grad():
            expected = p.run("reference")
        assert_close(flat(actual), flat(expected))


@MEMBERS
def test_gates_of_exactly_zero_and_one_are_exact(draw, assert_close, flat, gradients, member) -> None:
    """Section 1.3: nothing divides by a gate, with gates per channel and in pooled gates too."""
    p = draw(member, length=8)
    generator = torch.Generator().manual_seed(0)
    for name in ("eta", "alpha"):
        gate = getattr(p, name)
        if gate is not None:
            corners = torch.randint(0, 2, gate.shape, generator=generator).double().requires_grad_()
            p = p.replace(**{name: corners})
    assert_close(flat(p.run("general")), flat(p.run("reference")))
    found, wanted = (gradients(p, lambda p, name=name: p.run(name)) for name in ("general", "reference"))
    for name in wanted:
        assert torch.isfinite(found[name]).all(), name
        assert_close(found[name], wanted[name], 1e-9, name)


ANY_MEMBER = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10_000),
        "length": st.sampled_from([1, 4, 8]),
        "depth": st.integers(1, 3),
        "momentum": st.booleans(),
        "forget": st.booleans(),
        "with_state": st.booleans(),
        "masked": st.sampled_from([0.0, 0.3]),
        "reset": st.sampled_from([0.0, 0.25]),
        "chunk_size": st.sampled_from([1, 3]),
        "norm": st.sampled_from(["none", "residual", "residual_layernorm"]),
        "inner_loss": st.sampled_from(["l2", "dot_product", "worst_case_shift"]),
        "decay": st.sampled_from(DECAYS),
        "network": st.sampled_from(["mlp", "gated"]),
        "retention": st.sampled_from(["l2", "softmax", "lq", "elastic_net"]),
        "optimizer": st.sampled_from(["gd", "muon"]),
        "granularity": st.sampled_from(["token", "chunk"]),
        "window": st.sampled_from([1, 3]),
        "omega": st.sampled_from(["none", "token", "offset"]),
        "step_sizes": st.sampled_from(["head", "matrix", "channel"]),
        "recompute": st.booleans(),
    }
)


@settings(max_examples=40)
@given(ANY_MEMBER)
def test_choices_compose(draw_problem, assert_close, flat, gradients, options) -> None:
    """Invariants 1 to 3: members that no paper names."""
    options["momentum"] |= options["optimizer"] == "muon"
    p = draw_problem(read_mode="chunk_start", **options)
    assert_close(flat(p.run("general")), flat(p.run("reference")))
    found, wanted = (gradients(p, lambda p, name=name: p.run(name)) for name in ("general", "reference"))
    for name in wanted:
        assert_close(found[name], wanted[name], 1e-9, name)


@settings(max_examples=40)
@given(
    st.fixed_dictionaries(
        {
            "seed": st.integers(0, 10_000),
            "length": st.sampled_from([1, 2, 5, 11]),
            "depth": st.integers(1, 4),
            "momentum": st.booleans(),
            "forget": st.booleans(),
            "with_state": st.booleans(),
            "with_start": st.booleans(),
            "masked": st.sampled_from([0.0, 0.3]),
            "reset": st.sampled_from([0.0, 0.25]),
            "chunk_size": st.sampled_from([1, 2, 7]),
            "activation": st.sampled_from(["gelu", "silu"]),
            "norm": st.sampled_from(["none", "residual", "residual_layernorm"]),
            "inner_loss": st.sampled_from(["l2", "dot_product", "lp", "huber", "huber_norm", "yaad"]),
            "read_mode": st.sampled_from(READ_MODES),
            "decay": st.sampled_from(DECAYS),
            "grad_at": st.sampled_from(GRADIENT_PLACES),
            "recompute": st.booleans(),
        }
    )
)
def test_general_form_equals_the_chunked_form(draw_problem, assert_close, flat, gradients, options) -> None:
    """Both cover MLPs that learn by gradient descent with momentum."""
    p = draw_problem(**options)
    assert_close(flat(p.run("general")), flat(p.run("chunked")))
    found, wanted = (gradients(p, lambda p, name=name: p.run(name)) for name in ("general", "chunked"))
    for name in wanted:
        assert_close(found[name], wanted[name], 1e-9, name)


@MEMBERS
def test_gradients_pass_finite_differences(draw, gradients, member) -> None:
    """Invariant 23, through three chunks and more, along one random direction of all inputs."""
    if "yaad" in member:
        pytest.skip("its error jumps")
    chunk = FAMILY[member].get("chunk_size", 2)
    p = draw(member, batch=1, heads=1, length=8, width=2, hidden=3, chunk_size=chunk, step=0.05)
    found = gradients(p, lambda p: p.run("general"))
    leaves = p.leaves()
    generator = torch.Generator().manual_seed(3)
    direction = {n: torch.randn(x.shape, generator=generator, dtype=x.dtype) for n, x in leaves.items()}
    slope = sum((found[n] * direction[n]).sum() for n in leaves)
    values = []
    for h in (1e-7, -1e-7):
        moved = {n: x.detach() + h * direction[n] for n, x in leaves.items()}
        initial = tuple(moved.pop(f"initial {i}") for i in range(len(p.initial)))
        y, after = p.run("general", initial=initial, **moved)
        source = torch.Generator().manual_seed(1)
        pooled = () if after.pooled is None else (after.pooled,)
        parts = (y, *after.weights, *after.momentum, *after.anchor, *after.pending, *pooled, *after.halo)
        values.append(sum((x * torch.randn(x.shape, generator=source, dtype=x.dtype)).sum() for x in parts))
    torch.testing.assert_close(slope, (values[0] - values[1]) / 2e-7, rtol=1e-5, atol=1e-5)


@MEMBERS
def test_recomputation_gives_the_same_gradients(draw, gradients, assert_close, member) -> None:
    """Invariant 23: groups of chunks are run again in the backward."""
    p = draw(member, length=14)
    stored, recomputed = (
        gradients(p.replace(recompute=again), lambda p: p.run("general")) for again in (False, True)
    )
    for name in stored:
        assert_close(recomputed[name], stored[name], 1e-12, name)


# --- streams ----------------------------------------------------------------------------------------------


@MEMBERS
def test_a_cut_anywhere_changes_nothing(draw, assert_close, flat, member) -> None:
    """Invariants 4 and 6: two calls cut at every place, and prefill then one token a call."""
    p = draw(member, length=11, with_state=True)
    with torch.no_grad():
        whole = p.run("general")
        for cuts in [[s] for s in range(1, 11)] + [list(range(s, 11)) for s in (1, 4)]:
            parts = in_calls(p, cuts)
            assert_close(flat(parts), flat(whole), what=f"cut at {cuts}")
            assert torch.equal(parts[1].phase, whole[1].phase)


@MEMBERS
def test_gradients_cross_a_cut(draw, gradients, assert_close, member) -> None:
    """Invariants 4 and 23: inside of a chunk and of a window."""
    p = draw(member, length=9, masked=0.2, reset=0.1)
    found, wanted = gradients(p, lambda p: in_calls(p, [2, 5])), gradients(p, lambda p: p.run("general"))
    for name in wanted:
        assert_close(found[name], wanted[name], 1e-9, name)


@MEMBERS
def test_earlier_outputs_do_not_depend_on_a_token(draw, assert_close, member) -> None:
    """Invariant 5: the halo, pooled gates and steps at the chunk's end look backwards only."""
    p = draw(member, length=8)
    with torch.no_grad():
        y, _ = p.run("general")
        for t in (1, 4, 7):
            changed = {}
            for name in ("q", "k", "v", "theta", "eta", "alpha", "omega", "delta", "step"):
                x = getattr(p, name)
                if x is not None:
                    changed[name] = x.clone()
                    changed[name][:, t] = torch.rand_like(x[:, t])
            assert torch.equal(p.run("general", **changed)[0][:, :t], y[:, :t])


@MEMBERS
def test_sequences_do_not_see_each_other(draw, map_state, assert_close, flat, member) -> None:
    """Invariant 7: three sequences at different phases, with masks and documents, equal each alone."""
    p = draw(member, batch=3, length=8, masked=0.3, reset=0.2, with_state=True)
    with torch.no_grad():
        together = flat(p.run("general"))
        alone = [flat(p.row(b).run("general")) for b in range(3)]
    assert_close(together, [torch.cat(parts) for parts in zip(*alone, strict=True)])


@MEMBERS
def test_masked_tokens_are_as_if_removed(draw, assert_close, flat, member) -> None:
    """Invariant 8, and a masked token takes no place in a window; whatever it holds."""
    p = draw(member, batch=1, length=11, masked=0.4, with_state=True)
    kept = p.mask[0].nonzero().squeeze(1)
    with torch.no_grad():
        expected = p.tokens(kept).run("general", mask=None)
        spoiled = p.k.clone()
        spoiled[~p.mask] = float("nan")
        y, after = p.run("general", k=spoiled)
    assert_close(flat((y[:, kept], after)), flat(expected))
    assert not y[:, ~p.mask[0]].any()


@MEMBERS
def test_a_sequence_without_tokens_keeps_its_state_bit_for_bit(draw, flat, member) -> None:
    """Invariant 8."""
    p = draw(member, length=4, with_state=True)
    _, after = p.run("general", mask=torch.tensor([[False] * 4, [True] * 4]))
    for new, old in zip(flat((p.q, after))[1:], flat((p.q, p.state))[1:], strict=True):
        assert torch.equal(new[0], old[0])


@MEMBERS
def test_a_reset_begins_a_fresh_sequence(draw, assert_close, flat, member) -> None:
    """Invariant 16: the halo, what is pending and pooled, and the phase go with the weights."""
    p = draw(member, length=10, with_state=True)
    resets = torch.zeros(2, 10, dtype=torch.bool)
    resets[:, 4] = True
    with torch.no_grad():
        y, after = p.run("general", resets=resets)
        fresh = p.tokens(slice(4, None)).run("general", state=None)
    assert_close(flat((y[:, 4:], after)), flat(fresh), 1e-13)


@MEMBERS
def test_the_state_returned_shares_no_memory(draw, flat, member) -> None:
    """A serving engine edits states in place."""
    p = draw(member, length=5, with_state=True)
    with torch.no_grad():
        tensors = flat(p.run("general"))
        others = [*p.leaves().values()]
        before = [x.clone() for x in (*tensors, *others)]
        for i, x in enumerate(tensors):
            x.add_(1.0)
            before[i] += 1.0
            assert all(torch.equal(a, b) for a, b in zip((*tensors, *others), before, strict=True)), i


# --- the call ---------------------------------------------------------------------------------------------


@MEMBERS
def test_the_general_form_is_chosen_where_the_others_stop(draw, member) -> None:
    p = draw(member, length=4)
    plain = MemorySpec(inner_loss=p.spec.inner_loss, loss_smooth=p.spec.loss_smooth)
    if p.delta is None:
        name, reason = choose_backend(p.spec, torch.device("cpu"))
        assert name == "general" and "only the general form covers" in reason
    assert choose_backend(plain, torch.device("cpu"))[0] != "general"
    assert torch.equal(p.run(None)[0], p.run("general")[0])
    with pytest.raises(ConfigError, match="backend is 'chunked'; only the general form covers"):
        p.run("chunked")


@MEMBERS
def test_the_fast_weights_are_what_a_read_applies(draw, assert_close, member) -> None:
    """A read without a write equals a read at the start of a chunk."""
    p = draw(member, length=1, read_mode="chunk_start")
    fresh = MemoryState.fresh(p.initial, 2, p.eta is not None, p.spec)
    y = apply_network(p.spec, p.q, fresh.weights, p.gamma, p.beta)
    assert_close(y, p.run("general")[0])
    if p.spec.retention != "softmax":
        for w, learned in zip(fast_weights(p.spec, fresh.weights), p.initial, strict=True):
            assert_close(w, learned.expand_as(w))


def test_surprise_is_the_norm_of_the_tokens_own_gradient(draw_problem) -> None:
    """As the chunked form reports it, and the halo's tokens are not reported again."""
    from nestor.ops.neural_memory import neural_memory

    p = draw_problem(length=9, read_mode="chunk_start", chunk_size=10)
    found = {}
    for window, backend in ((1, "chunked"), (1, "general"), (3, "general")):
        found[window, backend] = neural_memory(
            p.q, p.k, p.v, p.theta, p.eta, p.alpha, p.initial, spec=p.replace(window=window).spec,
            gamma=p.gamma, beta=p.beta, backend=backend, return_surprise=True,
        )[2]  # fmt: skip
    for x in found.values():
        torch.testing.assert_close(x, found[1, "chunked"])


@pytest.mark.parametrize("network", ["mlp", "gated"])
def test_values_may_have_another_width(draw_problem, assert_close, flat, gradients, network) -> None:
    """Section 5.3: polynomial features of the keys are wider than the values."""
    p = draw_problem(length=8, norm="none", network=network, window=2)
    v = p.v.detach()[..., :2].clone().requires_grad_()
    output = 1
    initial = list(p.initial)
    initial[output] = initial[output].detach()[..., :2].clone().requires_grad_()
    p = p.replace(v=v, initial=tuple(initial))
    assert p.run(None)[0].shape == (2, 8, 2, 2)
    assert_close(flat(p.run("general")), flat(p.run("reference")))
    found, wanted = (gradients(p, lambda p, name=name: p.run(name)) for name in ("general", "reference"))
    for name in wanted:
        assert_close(found[name], wanted[name], 1e-9, name)


def test_half_precision_inputs_leave_a_float32_state(draw_problem) -> None:
    p = draw_problem(length=5, network="gated", dtype=torch.float32)
    half = {n: getattr(p, n).detach().bfloat16() for n in ("q", "k", "v", "theta", "eta", "alpha")}
    y, after = p.run("general", **half)
    assert y.dtype == torch.bfloat16 and after.weights[0].dtype == torch.float32


REFUSED = {
    "window of none": ({"window": 0}, "window is 0"),
    "power of one": ({"retention": "lq", "retention_power": 1.0}, "retention_power is 1.0"),
    "power of three": ({"retention": "lq", "retention_power": 3.0}, "retention_power is 3"),
    "no simplex": ({"simplex_sum": 0.0}, "simplex_sum 0.0"),
    "negative threshold": ({"retention_threshold": -1.0}, "retention_threshold is -1.0"),
    "softmax inside": ({"retention": "softmax"}, "read_mode is 'inclusive' with chunk_size 64"),
    "exact dual inside": ({"retention": "lq", "retention_dual": "exact"}, "of dual 'exact'"),
    "chunk steps inside": ({"granularity": "chunk"}, "nothing changes inside of a chunk"),
    "post-decay windows": ({"grad_at": "post_decay", "window": 2}, "needs window=1; it is 2"),
    "post-decay maps": (
        {"grad_at": "post_decay", "retention": "elastic_net"},
        "needs retention='l2'; it is 'elastic_net'",
    ),
    "muon by channel": (
        {"optimizer": "muon", "forget_gates": "channel"},
        "optimizer='muon' needs forget_gates='head'",
    ),
    "norms of logits": (
        {"renormalize": "rows", "retention": "softmax", **START},
        "renormalize='rows' needs retention='l2'",
    ),
    "gd per token": ({"muon_per_token": True}, "muon_per_token=True needs optimizer='muon'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_choices_without_a_meaning_are_refused(case) -> None:
    choices, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        MemorySpec(**choices)


def calls(draw_problem):
    zeros = torch.zeros
    gated, muon = draw_problem(network="gated"), draw_problem(optimizer="muon")
    window, chunk = draw_problem(window=3), draw_problem(granularity="chunk", **START)
    plain = draw_problem()
    return {
        "two matrices of a gate": (gated, {"initial": gated.initial[:2]}, "a gated network has W0"),
        "omega of another window": (window, {"omega": zeros(2, 9, 2, 2)}, r"omega has shape \(2, 9, 2, 2\)"),
        "a threshold of l2": (plain, {"delta": zeros(2, 9, 2)}, "inner_loss 'l2' has no threshold"),
        "a step of gd": (plain, {"step": zeros(2, 9, 2)}, "with optimizer='gd' pass None"),
        "muon without momentum": (muon, {"eta": None}, "eta is None; optimizer='muon'"),
        "no halo": (window, {"state": plain.run("general")[1]}, r"the state's halo has shapes \[\]"),
        "nothing pending": (chunk, {"state": plain.run("general")[1]}, "the state's pending has shapes"),
        "theta of heads": (
            draw_problem(step_sizes="matrix"),
            {"theta": zeros(2, 9, 2)},
            r"theta has shape \(2, 9, 2\); with q .* it must be \(2, 9, 2, 2\)",
        ),
    }


CALLS = [
    "two matrices of a gate", "omega of another window", "a threshold of l2", "a step of gd",
    "muon without momentum", "no halo", "nothing pending", "theta of heads",
]  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_a_call_that_does_not_fit_is_refused(draw_problem, case) -> None:
    cases = calls(draw_problem)
    assert list(cases) == CALLS
    p, change, message = cases[case]
    with pytest.raises(ShapeError, match=message):
        p.run("general", **change)
