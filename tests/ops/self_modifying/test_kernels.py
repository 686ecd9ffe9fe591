"""The kernels of linear memories against the chunked form: on a GPU, and in Triton's interpreter on a CPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nestor.ops.self_modifying import fused

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and HAS_TRITON and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"

if INTERPRETED:
    import triton
    import triton.language as tl

    from nestor.ops.self_modifying.kernels.primitives import rounded

    @triton.jit
    def round_kernel(X, Y, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(Y + i, rounded(tl.load(X + i)))


# Error of outputs, states and gradients, as a share of their norm; or of that of the plain form.
TOLERANCE, WORSE = 2e-4, 5.0
# Of TF32, where a gradient is a sum of many terms of either sign. Memories that make their own keys and gates
# can let any error grow; problems of this seed change by less than a hundredth if products are rounded.
ROUNDED, TAME = 3e-2, 2

ALL = ("k", "v", "q", "eta", "alpha", "mem")
ALL_BUT_GATES = ("k", "v", "q", "mem")
CASES = {
    "plain": {},
    "paper's targets, dot product": {"targets": "self", "inner_loss": "dot_product"},
    "values as targets": {"targets": "value", "memories": ("k", "v", "mem")},
    "no delta rule": {"dgd": False},
    "anchor reads, no cap": {"read_mode": "anchor", "step_cap": "none"},
    "every memory": {"memories": ALL},
    "one memory": {"memories": ("mem",)},
    "no keys of their own": {"memories": ("v", "alpha", "mem")},
    "masked": {"masked": True},
    "documents": {"documents": True},
    "masked documents, in parts": {"masked": True, "documents": True, "parts": (3, 5)},
    "in parts at the ends of chunks": {"parts": (4, 8)},
    "in parts, not at the ends": {"parts": (5,), "memories": ALL},
    "tiles": {"length": 64, "chunk_size": 32, "projection_chunk_size": 16},
    "tiles that are not full": {"length": 45, "chunk_size": 40, "projection_chunk_size": 20},
    "chunks of one token": {"chunk_size": 1, "projection_chunk_size": 1},
    "segments": {"length": 11, "chunk_size": 1, "projection_chunk_size": 1, "documents": True},
    "rows of a whole tile": {"width": 16},
    "towards the start": {"decay": "initial", "memories": ALL, "horizon": 8.0},
    "towards the start, documents, in parts": {
        "decay": "initial", "horizon": 8.0, "masked": True, "documents": True, "parts": (3, 5),
        # Of the seed TAME, products that are rounded change a third of a gradient.
        "seed": 0,
    },
    "towards the start, tiles": {
        "decay": "initial", "horizon": 8.0, "length": 64, "chunk_size": 32, "projection_chunk_size": 16,
    },
    "towards the start, no delta rule": {
        "decay": "initial", "horizon": 8.0, "dgd": False, "inner_loss": "dot_product",
    },
    "towards the start, anchor reads": {"decay": "initial", "horizon": 8.0, "read_mode": "anchor"},
    "towards the start, segments": {
        "decay": "initial", "horizon": 8.0, "length": 11, "chunk_size": 1, "projection_chunk_size": 1,
        "documents": True,
    },
    "towards the start, tiles in parts": {
        "decay": "initial", "horizon": 8.0, "length": 45, "chunk_size": 40, "projection_chunk_size": 20,
        "parts": (23,),
    },
}  # fmt: skip
# The kernel in CUDA.
EMULATED = {
    **{
        name: choices
        for name, choices in CASES.items()
        if name != "rows of a whole tile" and "decay" not in choices
    },
    "masked documents": {"masked": True, "documents": True},
    "every memory, whole chunks": {"memories": ALL, "length": 12},
    "every memory, values as targets": {"memories": ALL_BUT_GATES, "length": 12, "targets": "value"},
    "segments of tiles": {
        "length": 176, "chunk_size": 64, "projection_chunk_size": 16, "horizon": 8.0, "seed": 3,
    },
    "anchors of tiles, no delta rule": {
        "length": 160, "chunk_size": 160, "projection_chunk_size": 32, "read_mode": "anchor", "dgd": False,
        "seed": 0,
    },
    "TF32": {"memories": ALL, "length": 12},
    "TF32, tiles": {"length": 64, "chunk_size": 32, "projection_chunk_size": 16, "horizon": 8.0},
    "bfloat16": {"memories": ALL, "length": 12, "dtype": torch.bfloat16},
    "bfloat16, no keys and values of their own": {"memories": ("alpha", "mem"), "dtype": torch.bfloat16},
}  # fmt: skip
# Of these, copies in the background are done as late as they may be.
LATE = ("every memory", "documents", "segments of tiles")
# The interpreter, which is slow, computes these in every run of the tests.
QUICK = (
    "masked documents, in parts", "anchor reads, no cap", "towards the start, documents, in parts",
)  # fmt: skip
QUICK_EMULATED = ("masked documents", "TF32, tiles")


@pytest.fixture
def covered(monkeypatch):
    """Calls of the kernels, which when "on" take tensors of the CPU as well, as in the interpreter."""
    calls = {"on": False, "count": 0}
    walk = fused._walk
    monkeypatch.setattr(fused, "covered", lambda *tensors: calls["on"])

    def counted(*arguments):
        calls["count"] += 1
        return walk(*arguments)

    monkeypatch.setattr(fused, "_walk", counted)
    return calls


def _to(problem, dtype, device):
    def move(x):
        x = x.detach().to(device)
        return x.to(dtype).requires_grad_() if x.is_floating_point() else x

    names = ("q", "k", "v", "g", "eta", "alpha", "mu", "mask", "resets")
    changes = {name: move(x) for name in names if (x := getattr(problem, name)) is not None}
    changes["initial"] = {name: tuple(map(move, ws)) for name, ws in problem.initial.items()}
    if problem.gates:
        changes["gates"] = {
            name: type(gate)(*(None if x is None else move(x) for x in gate))
            for name, gate in problem.gates.items()
        }
    return problem.replace(**changes)


def _with_inputs(problem, change):
    """With other inputs of projections."""
    inputs = {name: x for name in ("q", "k", "v", "g") if (x := getattr(problem, name)) is not None}
    return problem.replace(
        **{name: change(x.detach()).requires_grad_(x.requires_grad) for name, x in inputs.items()}
    )


def _results(problem, flatten, parts):
    """Outputs, state, strengths, and gradients of a fixed function of all but the strengths."""
    outputs, strengths, state, first = [], [], None, 0
    for last in (*parts, problem.q.shape[1]):
        y, state, strength = problem.part(slice(first, last), state).run()
        outputs.append(y)
        strengths.append(strength)
        first = last
    found = flatten((torch.cat(outputs, 1), state, torch.cat(strengths, 1)))
    total = 0.0
    for name, x in found.items():
        if name not in ("phase", "strength"):
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            total = total + (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)).sum()
    leaves = problem.leaves()
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    found |= {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return found


def _compare(
    draw_problem,
    flatten,
    covered,
    seed=None,
    parts=(),
    half=False,
    tolerance=None,
    dtype=torch.float32,
    **choices,
):
    """half: under autocast. dtype: of the inputs."""
    rounded = half or dtype != torch.float32
    tolerance = tolerance or (ROUNDED if rounded else TOLERANCE)
    seed = seed if seed is not None else TAME if rounded else 0
    problem = draw_problem(seed, **{"targets": "bounded", **choices})
    problem = _with_inputs(problem, lambda x: x.to(dtype).double())
    expected = _results(_to(problem, torch.float64, "cpu"), flatten, parts)
    plain = {} if rounded else _results(_to(problem, torch.float32, "cpu"), flatten, parts)
    assert covered["count"] == 0
    covered["on"] = True
    with torch.autocast(DEVICE, enabled=half):
        given = _with_inputs(_to(problem, torch.float32, DEVICE), lambda x: x.to(dtype))
        found = _results(given, flatten, parts)
    assert covered["count"] >= 1
    for name, wanted in expected.items():
        if wanted is None:
            assert found[name] is None or not bool(found[name].any()), name
            continue

        def error(x, wanted=wanted):
            return float(
                (x.detach().double().cpu() - wanted).norm() / wanted.detach().double().norm().clamp_min(1e-3)
            )

        # Single precision is held to what it makes of the plain form.
        limit = max(tolerance, WORSE * error(plain[name])) if plain else tolerance
        assert error(found[name]) < limit, f"{name}: relative error {error(found[name]):.1e}"


interpreted = pytest.mark.skipif(not INTERPRETED, reason="for Triton's interpreter, in a process of its own")


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_interpreted_walks_equal_the_chunked_form(draw_problem, flatten, covered, case) -> None:
    _compare(draw_problem, flatten, covered, **CASES[case])


@interpreted
@pytest.mark.parametrize("case", EMULATED)
def test_interpreted_walks_with_cuda_backward(
    draw_problem, flatten, covered, emulation, monkeypatch, case
) -> None:
    """The kernel in CUDA, compiled as C++, after the walk forward in Triton."""
    choices, tf32 = EMULATED[case], case.startswith("TF32")
    ran = emulation.install_walk(monkeypatch, case in LATE, tf32)
    tolerance = ROUNDED if tf32 or "dtype" in choices else TOLERANCE
    choices = {"width": 64, "batch": 1, **choices, **_tame(64)}
    _compare(draw_problem, flatten, covered, half=True, tolerance=tolerance, **choices)
    assert len(ran) >= len(choices.get("parts", ())) + 1


@interpreted
def test_interpreted_walks_have_no_second_derivative(draw_problem, covered) -> None:
    covered["on"] = True
    problem = _to(draw_problem(targets="bounded"), torch.float32, DEVICE)
    y, _, _ = problem.run()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), problem.v, create_graph=True)


@interpreted
def test_interpreted_walks_round_to_tf32_and_hide_no_failure() -> None:
    # The last numbers are what GPUs and CPUs make of inf - inf, and the former with its sign turned.
    bits = [0x3F800FFF, 0x3F801000, -0x40000000, 0, 0x7FFFFFFF, 0x7FC00000, -1, -0x400000]
    x = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    y = torch.full_like(x, 7.0)
    round_kernel[(1,)](x, y, len(bits))
    assert y[:4].tolist() == [1.0, 1.0 + 2**-10, -2.0, 0.0]
    assert y[4:].isnan().all()


@pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="needs Triton, and starts its interpreter itself")
@pytest.mark.parametrize(
    "some", [pytest.param(True, id="quick"), pytest.param(False, marks=pytest.mark.slow)]
)
def test_the_walks_in_tritons_interpreter(some) -> None:
    """The variable must be set before Triton is imported, so those tests run in a process of their own."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0"]
    name = f"{Path(__file__)}::test_interpreted_walks"
    chosen = [f"{name}_equal_the_chunked_form[{case}]" for case in CASES if not some or case in QUICK]
    chosen += [
        f"{name}_with_cuda_backward[{case}]" for case in EMULATED if not some or case in QUICK_EMULATED
    ]
    chosen += [f"{name}_have_no_second_derivative", f"{name}_round_to_tf32_and_hide_no_failure"]
    done = subprocess.run(
        [*command, *chosen],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert f"{len(chosen)} passed" in done.stdout, done.stdout[-500:]


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU and Triton")
@pytest.mark.parametrize("width", [3, 32, 48, 64])
@pytest.mark.parametrize("case", CASES)
def test_walks_on_a_gpu_equal_the_chunked_form(draw_problem, flatten, covered, case, width) -> None:
    _compare(draw_problem, flatten, covered, **{**CASES[case], "width": width, **_tame(width)})


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU and Triton")
@pytest.mark.parametrize(("width", "half"), [(32, False), (64, False), (64, True)])
@pytest.mark.parametrize("length", [768, 777])
@pytest.mark.parametrize("decay", ["zero", "initial"])
def test_long_walks_on_a_gpu_equal_the_chunked_form(
    draw_problem, flatten, covered, length, width, half, decay
) -> None:
    choices = {
        "length": length, "chunk_size": 64, "projection_chunk_size": 16, "horizon": 256.0, "decay": decay,
    }  # fmt: skip
    # Where memories make keys or gates, what is rounded does not stay small over so many tokens; nor, where
    # nothing fades, what single precision is off by.
    if half or decay == "initial":
        choices["memories"] = ("v", "mem")
    _compare(draw_problem, flatten, covered, width=width, heads=3, half=half, **choices, **_tame(width))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU and Triton")
@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize(
    "case",
    [
        "plain", "every memory", "in parts, not at the ends", "tiles", "towards the start",
        "towards the start, documents, in parts", "towards the start, tiles",
    ],
)  # fmt: skip
def test_walks_under_autocast_equal_the_chunked_form(
    draw_problem, flatten, covered, monkeypatch, case, width
) -> None:
    """With both walks in Triton, also where the one backward is otherwise in CUDA."""
    from nestor.ops.self_modifying.kernels import tiled

    monkeypatch.setattr(tiled, "ENABLED", False)
    _compare(draw_problem, flatten, covered, half=True, **{**CASES[case], "width": width, **_tame(width)})


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU and Triton")
@pytest.mark.parametrize("case", EMULATED)
def test_walks_with_cuda_backward_equal_the_chunked_form(
    draw_problem, flatten, covered, monkeypatch, case
) -> None:
    from nestor.ops.self_modifying.kernels import tiled

    ran, prepare = [], tiled.prepare
    monkeypatch.setattr(tiled, "prepare", lambda *given: ran.append(given) or prepare(*given))
    _compare(draw_problem, flatten, covered, half=True, **{**EMULATED[case], "width": 64, **_tame(64)})
    assert ran or tiled.cuda.obstacle(torch.device(DEVICE, 0))


def _tame(width):
    """Memories of wide rows that are no longer than those of narrow ones."""
    return {"scale": (3 / width) ** 0.5}
