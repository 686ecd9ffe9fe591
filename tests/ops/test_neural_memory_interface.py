"""The call itself: dtypes, inputs left alone, backends, and errors that name what is wrong."""

import re

import pytest
import torch

from nestor.errors import ConfigError, ShapeError
from nestor.ops.neural_memory import BACKENDS, apply_network, choose_backend, neural_memory, self_check

CPU_BACKENDS = [b for b in BACKENDS if b != "kernels"]

# --- dtypes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("depth", [1, 2])
def test_half_precision_inputs_give_half_precision_outputs_and_a_float32_state(
    draw_problem, flat, dtype, depth
) -> None:
    """Section 9, row 10: the memory itself computes in float32; only the outputs are rounded."""
    p = draw_problem(depth=depth, length=9, with_state=True, dtype=torch.float32)
    half = {
        n: getattr(p, n).detach().to(dtype).requires_grad_() for n in ("q", "k", "v", "theta", "eta", "alpha")
    }
    y, after = p.run(**half)
    assert y.dtype == dtype
    for part in after[:3]:
        assert all(w.dtype == torch.float32 for w in part)
    wide, wide_after = p.run(**{n: t.detach().float() for n, t in half.items()})
    assert torch.equal(y, wide.to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(after.weights, wide_after.weights, strict=True))
    for grad in torch.autograd.grad(y.float().square().sum(), list(half.values())):
        assert grad.dtype == dtype and torch.isfinite(grad).all() and grad.any()


@pytest.mark.parametrize("depth", [1, 2])
def test_bfloat16_operands_are_within_two_percent(draw_problem, depth) -> None:
    """Section 13: tolerance 2e-2 for bf16 operands with fp32 state."""
    p = draw_problem(depth=depth, length=13, norm="residual", width=8, hidden=8, step=0.1)
    narrow = p.run(**{n: getattr(p, n).bfloat16() for n in ("q", "k", "v", "theta", "eta", "alpha")})
    wide = p.run()
    for actual, expected in ((narrow[0], wide[0]), (narrow[1].weights[0], wide[1].weights[0])):
        assert ((actual - expected).norm() / expected.norm()).item() < 2e-2


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_float32_is_within_rounding_of_float64(draw_problem, oracle, assert_close, flat, depth) -> None:
    """Section 13: tolerance 1e-5 in float32."""
    p = draw_problem(depth=depth, length=13, norm="residual", dtype=torch.float32, step=0.1)
    doubled = {n: getattr(p, n).double() for n in ("q", "k", "v", "theta", "eta", "alpha")}
    doubled["initial"] = tuple(w.double() for w in p.initial)
    assert_close(flat(p.run()), flat(oracle(p.replace(**doubled))), 1e-5)
    assert p.run()[0].dtype == torch.float32
    assert p.run(**doubled)[0].dtype == torch.float64


def test_autocast_does_not_reach_into_the_memory(draw_problem, flat) -> None:
    p = draw_problem(length=9, dtype=torch.float32)
    plain = p.run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = p.run()
    for a, b in zip(flat(inside), flat(plain), strict=True):
        assert torch.equal(a, b)


# --- inputs and outputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("length", [1, 3, 9])
def test_no_input_is_written_to(draw_problem, backend, length) -> None:
    p = draw_problem(length=length, with_state=True, with_start=True, masked=0.3, reset=0.3)
    given = [*p.leaves().values(), p.state.phase, p.start.phase, p.mask, p.resets]
    before = [t.detach().clone() for t in given]
    y, after = p.run(backend)
    (y.sum() + after.anchor[0].sum() + after.weights[0].sum()).backward()
    for old, new in zip(before, given, strict=True):
        assert torch.equal(old, new)


def test_the_state_returned_does_not_change_when_the_stream_goes_on(draw_problem) -> None:
    p = draw_problem(length=9)
    with torch.no_grad():
        _, state = p.tokens(slice(0, 5)).run()
        before = [w.clone() for part in state[:3] for w in part]
        p.tokens(slice(5, 9)).run(state=state)
        after = [w for part in state[:3] for w in part]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) and state.phase.tolist() == [
        1,
        1,
    ]


@pytest.mark.parametrize("backend", ["chunked", "general"])
@pytest.mark.parametrize("length", [3, 4, 9])
@pytest.mark.parametrize("with_state", [True, False])
def test_the_state_returned_shares_no_memory_with_anything(draw_problem, length, with_state, backend) -> None:
    """Editing it in place touches neither the learned weights, nor the state given, nor its other parts."""
    p = draw_problem(batch=1, length=length, with_state=with_state)
    with torch.no_grad():
        _, after = p.run(backend)
        tensors = [w for part in after[:3] for w in part]
        given = [*p.leaves().values()]
        before = [t.clone() for t in (*given, *tensors)]
        for i, tensor in enumerate(tensors):
            tensor.add_(1.0)
            before[len(given) + i] += 1.0
            assert all(torch.equal(a, b) for a, b in zip((*given, *tensors), before, strict=True))


def test_strided_and_expanded_inputs_are_read_as_they_look(draw_problem) -> None:
    p = draw_problem(length=9)
    strided = {
        n: getattr(p, n).detach().transpose(1, 2).contiguous().transpose(1, 2)
        for n in ("q", "k", "v", "theta")
    }
    assert not strided["q"].is_contiguous()
    torch.testing.assert_close(p.run(**strided)[0], p.run()[0], rtol=1e-12, atol=1e-12)
    constant = torch.full((1, 1, 1), 0.1, dtype=torch.float64)
    expected = p.run(theta=constant.repeat(2, 9, 2))[0]
    torch.testing.assert_close(p.run(theta=constant.expand(2, 9, 2))[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("momentum", [True, False])
def test_the_state_has_the_documented_shapes(draw_problem, momentum) -> None:
    y, after = draw_problem(batch=3, heads=2, width=3, hidden=5, length=6, momentum=momentum).run()
    assert y.shape == (3, 6, 2, 3)
    shapes = [(3, 2, 3, 5), (3, 2, 5, 3)]
    assert [w.shape for w in after.weights] == shapes and [w.shape for w in after.anchor] == shapes
    assert [w.shape for w in after.momentum] == (shapes if momentum else [])
    assert after.phase.shape == (3,) and after.phase.dtype == torch.int64


# --- backends -----------------------------------------------------------------------------------------------


def test_every_backend_by_name_and_the_chosen_one(draw_problem) -> None:
    p = draw_problem()
    name, why = choose_backend(p.spec, torch.device("cpu"))
    assert name in BACKENDS and "cpu" in why
    for backend in (None, *CPU_BACKENDS):
        torch.testing.assert_close(p.run(backend)[0], p.run(name)[0], rtol=1e-10, atol=1e-10)


def test_an_unknown_backend_is_refused_with_the_known_ones(draw_problem) -> None:
    with pytest.raises(ConfigError, match=r"backend is 'triton'; it must be one of kernels, native, chunked"):
        draw_problem().run("triton")


@pytest.mark.parametrize("norm", ["none", "residual", "residual_layernorm"])
@pytest.mark.parametrize("depth", [1, 3])
def test_a_read_without_a_write_applies_the_fast_weights(
    draw_problem, memory_function, assert_close, norm, depth
) -> None:
    """Section 2.1: y = M*(q), and it is what a chunk-start read returns after the state."""
    p = draw_problem(norm=norm, depth=depth, length=3, with_state=True, read_mode="chunk_start")
    y = apply_network(p.spec, p.q, p.state.anchor, p.gamma, p.beta)
    for t in range(3):
        assert_close(y[:, t], memory_function(p.spec, p.q[:, t], p.state.anchor, p.gamma, p.beta))
    closed = p.state._replace(phase=torch.zeros(2, dtype=torch.int64))
    assert_close(p.run(state=closed)[0], y)
    assert apply_network(p.spec, p.q.bfloat16(), p.state.anchor, p.gamma, p.beta).dtype == torch.bfloat16


def test_the_reference_refuses_to_report_surprise(draw_problem) -> None:
    p = draw_problem(norm="none")
    gates = (p.theta, p.eta, p.alpha)
    with pytest.raises(ConfigError, match="backend='chunked'"):
        neural_memory(
            p.q, p.k, p.v, *gates, p.initial, spec=p.spec, backend="reference", return_surprise=True
        )


def test_the_self_check_passes_and_reports_its_error() -> None:
    results = self_check("cpu")
    assert len(results) == 3
    for result in results:
        assert result.ok and 0 <= result.error < result.tolerance


# --- errors -------------------------------------------------------------------------------------------------


def changes(p) -> dict[str, tuple[dict, str]]:
    """Calls that do not fit together, and what the message must say (the shape seen, the shape wanted)."""
    zeros = torch.zeros
    state = p.run()[1]
    plain = p.run(eta=None)[1]
    q = "(2, 9, 2, 3)"
    return {
        "q without heads": ({"q": zeros(2, 9, 3)}, "q has shape (2, 9, 3)"),
        "no tokens": ({"q": zeros(2, 0, 2, 3)}, "q has no tokens"),
        "no sequences": ({"q": zeros(0, 9, 2, 3)}, "q has a batch of 0 sequences"),
        "short k": ({"k": zeros(2, 8, 2, 3)}, f"k has shape (2, 8, 2, 3); with q {q} it must be {q}"),
        "wide v": ({"v": zeros(2, 9, 2, 4)}, f"v has shape (2, 9, 2, 4); with q {q} it must be {q}"),
        "theta per channel": ({"theta": zeros(2, 9, 2, 3)}, "theta has shape (2, 9, 2, 3)"),
        "eta without heads": ({"eta": zeros(2, 9)}, f"eta has shape (2, 9); with q {q} it must be (2, 9, 2)"),
        "alpha of one head": (
            {"alpha": zeros(2, 9, 1)},
            f"alpha has shape (2, 9, 1); with q {q} it must be (2, 9, 2)",
        ),
        "mask per head": (
            {"mask": zeros(2, 9, 2).bool()},
            f"mask has shape (2, 9, 2); with q {q} it must be (2, 9)",
        ),
        "resets short": (
            {"resets": zeros(2, 8).bool()},
            f"resets has shape (2, 8); with q {q} it must be (2, 9)",
        ),
        "mask of numbers": (
            {"mask": torch.ones(2, 9)},
            "mask has dtype torch.float32; it must be torch.bool",
        ),
        "resets of numbers": (
            {"resets": zeros(2, 9).long()},
            "resets has dtype torch.int64; it must be torch.bool",
        ),
        "no gamma": ({"gamma": None}, "needs gamma and beta of shape (2, 3)"),
        "no beta": ({"beta": None}, "needs gamma and beta of shape (2, 3)"),
        "gamma of one head": ({"gamma": zeros(3)}, f"gamma has shape (3,); with q {q} it must be (2, 3)"),
        "unused gamma": ({"norm": "none"}, "norm 'none' takes no gamma and beta"),
        "no weights": ({"initial": ()}, "initial weights have shapes []"),
        "weights of another width": (
            {"initial": (zeros(2, 4, 4),)},
            "[(2, 4, 4)]; they must chain from (2, 3, ..)",
        ),
        "weights that end elsewhere": (
            {"initial": (zeros(2, 3, 5),)},
            "[(2, 3, 5)]; they must chain from (2, 3, ..)",
        ),
        "weights that do not chain": (
            {"initial": (zeros(2, 3, 5), zeros(2, 4, 3))},
            "[(2, 3, 5), (2, 4, 3)]",
        ),
        "weights of one head": (
            {"initial": (zeros(1, 3, 3),)},
            "[(1, 3, 3)]; they must chain from (2, 3, ..)",
        ),
        "state of one sequence": (
            {"state": p.row(0).run()[1]},
            "the state holds (1, 2) (batch, heads); q has (2, 2)",
        ),
        "state without momentum": ({"state": plain}, "the state and eta disagree about momentum"),
        "momentum without eta": ({"state": state, "eta": None}, "the state and eta disagree about momentum"),
    }


CASES = [
    "q without heads", "no tokens", "no sequences", "short k", "wide v", "theta per channel",
    "eta without heads", "alpha of one head", "mask per head", "resets short", "mask of numbers",
    "resets of numbers",
    "no gamma", "no beta", "gamma of one head", "unused gamma", "no weights", "weights of another width",
    "weights that end elsewhere", "weights that do not chain", "weights of one head",
    "state of one sequence", "state without momentum", "momentum without eta",
]  # fmt: skip


def test_every_wrong_call_of_this_file_is_tested(draw_problem) -> None:
    assert set(CASES) == set(changes(draw_problem()))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_call_that_does_not_fit_is_refused_with_the_numbers(draw_problem, case, backend) -> None:
    p = draw_problem(length=9)
    change, message = changes(p)[case]
    with pytest.raises(ShapeError, match=re.escape(message)):
        p.run(backend, **change)
