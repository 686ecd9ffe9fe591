"""The C++ form against the token loop and the PyTorch form; what it leaves to them."""

import importlib.util
import shutil
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from nestor.errors import ConfigError
from nestor.ops.neural_memory import choose_backend, neural_memory
from nestor.ops.neural_memory.spec import MemorySpec

CPU = torch.device("cpu")
NORMS = ("none", "residual", "residual_layernorm")

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not any(map(shutil.which, ("c++", "g++", "clang++"))),
    reason="needs Linux and a C++ compiler",
)

COVERED = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10_000),
        "length": st.sampled_from([1, 2, 5, 11, 16]),
        "heads": st.integers(1, 3),
        "width": st.sampled_from([1, 3, 5, 16]),
        "hidden": st.sampled_from([1, 5, 17, 33]),
        "depth": st.integers(1, 4),
        "momentum": st.booleans(),
        "forget": st.booleans(),
        "with_state": st.booleans(),
        "with_start": st.booleans(),
        "masked": st.sampled_from([0.0, 0.3]),
        "reset": st.sampled_from([0.0, 0.25]),
        "chunk_size": st.sampled_from([1, 2, 3, 7, 13]),
        "activation": st.sampled_from(["gelu", "silu"]),
        "norm": st.sampled_from(NORMS),
        "inner_loss": st.sampled_from(["l2", "dot_product"]),
        "loss_scale": st.sampled_from([1.0, 2.0]),
        "read_mode": st.sampled_from(["inclusive", "exclusive"]),
        "decay": st.sampled_from(["initial", "zero"]),
        "recompute": st.booleans(),
        "step": st.just(0.02),
    }
)


@settings(max_examples=150)
@given(COVERED)
def test_it_equals_the_token_loop(draw_problem, oracle, assert_close, flat, gradients, options) -> None:
    """Invariants 1, 2, 3, 8 and 23: outputs, W, S, anchor, phase and all gradients, in float64."""
    p = draw_problem(**options)
    actual, expected = p.run("native"), oracle(p)
    assert_close(flat(actual), flat(expected))
    assert torch.equal(actual[1].phase, expected[1].phase)
    found, wanted = gradients(p, lambda p: p.run("native")), gradients(p, oracle)
    for name in wanted:
        assert_close(found[name], wanted[name], 1e-9, name)


@pytest.mark.parametrize("width, hidden, chunk", [(64, 128, 64), (48, 48, 16), (20, 50, 32)])
def test_float32_is_as_exact_as_the_pytorch_form(draw_problem, flat, gradients, width, hidden, chunk) -> None:
    shape = {
        "width": width,
        "hidden": hidden,
        "chunk_size": chunk,
        "length": 3 * chunk + 5,
        "step": 1 / chunk,
    }
    exact, single = (
        draw_problem(**shape, activation="silu", dtype=d) for d in (torch.float64, torch.float32)
    )

    def values(p, backend):
        found = gradients(p, lambda p: p.run(backend))
        return [*flat(p.run(backend)), *(found[name] for name in sorted(found))]

    wanted = values(exact, "chunked")
    for native, chunked, want in zip(
        values(single, "native"), values(single, "chunked"), wanted, strict=True
    ):
        scale = want.abs().max()
        error, error_of_chunked = ((x.double() - want).abs().max() / scale for x in (native, chunked))
        assert native.dtype == torch.float32
        assert error < 4 * error_of_chunked + 1e-5


def test_the_number_of_threads_changes_no_bit(draw_problem, gradients) -> None:
    p = draw_problem(batch=3, heads=2, length=23, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(gradients(p, lambda p: p.run("native")))
    finally:
        torch.set_num_threads(before)
    for name, value in results[0].items():
        assert all(torch.equal(value, other[name]) for other in results[1:])


def test_large_and_missing_numbers_come_out_as_in_the_pytorch_form(draw_problem) -> None:
    p = draw_problem(activation="silu", dtype=torch.float32, norm="none")
    with torch.no_grad():
        p.k[0, 0] = 1e4
        p.q[1, 0] = float("nan")
        native, chunked = p.run("native")[0], p.run("chunked")[0]
    assert torch.equal(native.isfinite(), chunked.isfinite())
    assert not native[1, 0].isfinite().any() and native[1, 1:].isfinite().all()


def test_it_reports_the_same_surprise(draw_problem) -> None:
    p = draw_problem(length=11, masked=0.3)
    gates = (p.theta, p.eta, p.alpha)
    call = {"spec": p.spec, "gamma": p.gamma, "beta": p.beta, "mask": p.mask, "return_surprise": True}
    native, chunked = (
        neural_memory(p.q, p.k, p.v, *gates, p.initial, **call, backend=backend)[2]
        for backend in ("native", "chunked")
    )
    assert native.max() > 0
    torch.testing.assert_close(native, chunked, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("choice", [{"grad_at": "post_decay"}, {"read_mode": "chunk_start"}])
def test_what_it_does_not_cover_goes_to_the_pytorch_form(draw_problem, choice) -> None:
    p = draw_problem(**choice)
    name, value = next(iter(choice.items()))
    backend, why = choose_backend(p.spec, CPU)
    assert backend == "chunked" and f"{name}={value!r}" in why
    assert torch.equal(p.run(None)[0], p.run("chunked")[0])
    with pytest.raises(ConfigError, match=f"{name}={value!r}.*backend='chunked'"):
        p.run("native")


def test_torch_compile_gets_the_form_that_it_can_trace() -> None:
    @torch.compile(backend="eager", fullgraph=True)
    def chosen(x):
        return x + ["native", "chunked"].index(choose_backend(MemorySpec(), CPU)[0])

    assert chosen(torch.zeros(1)) == 1
    assert choose_backend(MemorySpec(), CPU)[0] == "native"


def test_a_gpu_gets_the_kernels_where_triton_is() -> None:
    expected = "kernels" if importlib.util.find_spec("triton") else "chunked"
    assert choose_backend(MemorySpec(), torch.device("cuda"))[0] == expected
    for uncovered in ({"read_mode": "exclusive"}, {"grad_at": "post_decay"}, {"chunk_size": 48}):
        backend, why = choose_backend(MemorySpec(**uncovered), torch.device("cuda"))
        assert backend == "chunked" and (expected == "chunked" or next(iter(uncovered)) in why)


@pytest.mark.parametrize("part", ["weights", "momentum", "anchor"])
def test_a_tensor_on_another_device_is_refused(draw_problem, part) -> None:
    p = draw_problem(with_state=True)
    moved = p.state._replace(**{part: tuple(w.to("meta") for w in getattr(p.state, part))})
    with pytest.raises((ConfigError, RuntimeError), match="meta"):
        p.run("native", state=moved)
    with pytest.raises((ConfigError, RuntimeError), match="meta"):
        p.run("native", initial=tuple(w.to("meta") for w in p.initial))


def test_the_default_device_does_not_matter(draw_problem) -> None:
    p = draw_problem()
    expected = p.run("native")[0]
    with torch.device("meta"):
        assert torch.equal(p.run("native")[0], expected)


def test_fake_tensors_get_their_shapes(draw_problem) -> None:
    p = draw_problem()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y, _ = neural_memory(
            *(mode.from_tensor(x.detach()) for x in (p.q, p.k, p.v, p.theta, p.eta, p.alpha)),
            [mode.from_tensor(w.detach()) for w in p.initial],
            spec=MemorySpec(norm="none"),
        )
    assert y.shape == p.q.shape
