"""The Triton kernels against the chunked form in float64: on a GPU, and in Triton's interpreter on a CPU."""

import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and HAS_TRITON and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"

# Relative error, in norm, of outputs, states and gradients.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-4}

SMALL = {"batch": 2, "heads": 1, "width": 16, "hidden": 32, "chunk_size": 16, "length": 37}
CASES = {
    "plain": {},
    "whole chunks": {"length": 32},
    "shorter than a chunk": {"length": 5},
    "no momentum": {"momentum": False},
    "no forgetting": {"forget": False},
    "N0": {"norm": "residual"},
    "N2, dot product, silu": {"norm": "none", "inner_loss": "dot_product", "activation": "silu"},
    "huber": {"inner_loss": "huber", "loss_threshold": 0.3},
    "chunk-start reads": {"read_mode": "chunk_start"},
    "decay to zero": {"decay": "zero", "activation": "silu"},
    "masks and resets": {"masked": 0.3, "reset": 0.1},
    "resets to a start": {"reset": 0.1, "with_start": True, "momentum": False},
    "chunks of 128": {"batch": 1, "chunk_size": 128, "length": 150, "masked": 0.2},
}
# Of these the interpreter, which is slow, computes some in every run of the tests.
QUICK = ("N2, dot product, silu", "chunk-start reads", "masks and resets")


def _draw(draw_problem, seed=0, **choices):
    """A problem whose chunks reach each other: gates uniform in (0, 1) forget all within sixteen tokens. Keys
    and queries have length 1, as the layer's; of longer ones a memory without a norm runs away."""
    p = draw_problem(seed, **choices)
    q, k = (torch.nn.functional.normalize(x.detach(), dim=-1).requires_grad_() for x in (p.q, p.k))
    p = p.replace(q=q, k=k)

    def mild(gate, low, high):
        return None if gate is None else (low + (high - low) * gate.detach()).requires_grad_()

    return p.replace(
        theta=mild(p.theta, 0.0, 0.02), eta=mild(p.eta, 0.7, 0.9), alpha=mild(p.alpha, 0.0, 0.02)
    )


def _run(p, dtype):
    from nestor.ops.neural_memory import MemoryState
    from nestor.ops.neural_memory.kernels import neural_memory_kernels

    def move(x):
        if x is None or not x.is_floating_point():
            return None if x is None else x.to(DEVICE)
        return x.to(DEVICE).float()

    def moved(state):
        if state is None:
            return None
        parts = (tuple(move(w) for w in part) for part in state[:3])
        return MemoryState(*parts, state.phase.to(DEVICE))

    q, k, v = (x.to(DEVICE).to(dtype) for x in (p.q, p.k, p.v))
    y, after = neural_memory_kernels(
        q, k, v, move(p.theta), move(p.eta), move(p.alpha), [move(w) for w in p.initial],
        move(p.gamma), move(p.beta), moved(p.state), moved(p.start), p.spec, move(p.mask), move(p.resets),
    )  # fmt: skip
    parts = (tuple(w.double().cpu() for w in part) for part in after[:3])
    return y.double().cpu(), MemoryState(*parts, after.phase.cpu())


def _rounded(p, dtype):
    """Tokens rounded once for both, so that the error is that of the kernels' own arithmetic."""
    if dtype != torch.bfloat16:
        return p
    return p.replace(**{n: getattr(p, n).detach().bfloat16().double().requires_grad_() for n in "qkv"})


def _compare(draw_problem, flat, gradients, dtype, seed=0, **choices) -> None:
    p = _rounded(_draw(draw_problem, seed, **choices), dtype)
    expected, found = p.run("chunked"), _run(p, dtype)
    assert torch.equal(found[1].phase, expected[1].phase)
    pairs = {f"output {i}": pair for i, pair in enumerate(zip(flat(found), flat(expected), strict=True))}
    theirs = gradients(p, lambda p: p.run("chunked"))
    ours = gradients(p, lambda p: _run(p, dtype))
    pairs |= {f"gradient of {name}": (ours[name], theirs[name]) for name in theirs}
    for name, (a, b) in pairs.items():
        assert torch.isfinite(a).all(), name
        error = float((a - b).norm() / (b.norm() + 1e-6))
        assert error < _tolerance(name, dtype, p), f"{name}: relative error {error:.2e}"


def _tolerance(name, dtype, p) -> float:
    if dtype == torch.bfloat16:
        # Tokens that rounding takes across the threshold, where the derivative jumps.
        if p.spec.inner_loss == "huber" and name in ("gradient of k", "gradient of v"):
            return 0.2
        # In a first chunk W - M is only what its few tokens wrote, and the sum of a few rounded numbers.
        if name == "gradient of alpha" and p.q.shape[1] <= p.spec.chunk_size:
            return 2e-2
        # A sum of dW * W, large of either sign, where the state is not kept as the way from its target.
        if p.spec.decay == "zero" and name == "gradient of alpha":
            return 3e-2
    return TOLERANCE[dtype]


@pytest.mark.skipif(HAS_TRITON and not INTERPRETED, reason="runs in a process of its own, see below")
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_interpreted_kernels_equal_the_chunked_form(draw_problem, flat, gradients, case) -> None:
    _compare(draw_problem, flat, gradients, torch.float32, **{**SMALL, **CASES[case]})


@pytest.mark.skipif(HAS_TRITON and not INTERPRETED, reason="runs in a process of its own, see below")
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_interpreted_kernels_are_an_operator_that_torch_compile_takes(draw_problem) -> None:
    p = draw_problem(**{**SMALL, "length": 21, "dtype": torch.float32})

    def output(*tokens):
        return _run(p.replace(**dict(zip("qkv", tokens, strict=True))), torch.float32)[0]

    compiled = torch.compile(output, backend="aot_eager", fullgraph=True)
    results = []
    for function in (output, compiled):
        y = function(p.q, p.k, p.v)
        results.append([y, *torch.autograd.grad((y * y).sum(), (p.q, p.k, p.v))])
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)


def _decode(draw_problem, flat, dtype, **choices) -> None:
    """Token after token, sequences at different places of their chunks."""
    from nestor.ops.neural_memory import MemoryState
    from nestor.ops.neural_memory.kernels import decode_token

    p = _rounded(_draw(draw_problem, **{"with_state": True, **choices}), dtype)
    expected = p.run("chunked")

    def move(x):
        return None if x is None else x.detach().to(DEVICE).float()

    parts = (tuple(move(w) for w in part) for part in p.state[:3])
    # As in a larger tensor, which a state's part may be a view of.
    phase = torch.stack((p.state.phase, p.state.phase + 1), 1).to(DEVICE)[:, 0]
    state, outputs = MemoryState(*parts, phase), []
    for t in range(p.q.shape[1]):
        one = p.tokens(slice(t, t + 1))
        tokens = (move(x).to(dtype) for x in (one.q, one.k, one.v))
        y, state = decode_token(
            *tokens, move(one.theta), move(one.eta), move(one.alpha), [move(w) for w in p.initial],
            move(p.gamma), move(p.beta), state, p.spec,
        )  # fmt: skip
        outputs.append(y)
    assert torch.equal(state.phase.cpu(), expected[1].phase)
    for a, b in zip(flat((torch.cat(outputs, 1), state)), flat(expected), strict=True):
        error = float((a.double().cpu() - b).norm() / (b.norm() + 1e-6))
        assert error < TOLERANCE[dtype], f"relative error {error:.2e}"


DECODE_CASES = {
    "plain": {},
    "no momentum, no forgetting": {"momentum": False, "forget": False},
    "exclusive reads": {"read_mode": "exclusive", "norm": "residual"},
    "chunk-start reads": {"read_mode": "chunk_start", "activation": "silu"},
    "decay to zero, dot product": {"decay": "zero", "norm": "none", "inner_loss": "dot_product"},
}


@pytest.mark.skipif(HAS_TRITON and not INTERPRETED, reason="runs in a process of its own, see below")
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("case", DECODE_CASES)
def test_interpreted_kernels_decode(draw_problem, flat, case) -> None:
    _decode(
        draw_problem, flat, torch.float32, **{**SMALL, "chunk_size": 4, "length": 7, **DECODE_CASES[case]}
    )


@pytest.mark.gpu
@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("case", DECODE_CASES)
def test_kernels_decode(draw_problem, flat, monkeypatch, case, tiled) -> None:
    monkeypatch.setattr("nestor.ops.neural_memory.kernels.tiled.ENABLED", tiled)
    _decode(draw_problem, flat, torch.float32, **{**LARGE, "length": 70, **DECODE_CASES[case]})


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [64, 128, 256])
def test_kernels_decode_half_precision(draw_problem, flat, hidden) -> None:
    """Of queries, keys, values and outputs; chunks end on the way."""
    choices = {**LARGE, "hidden": hidden, "chunk_size": 16, "length": 40, "batch": 5}
    _decode(draw_problem, flat, torch.bfloat16, **choices)


@pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="needs Triton, and starts its interpreter itself")
@pytest.mark.parametrize(
    ("chosen", "count"),
    [
        ("not slow", len(QUICK) + len(DECODE_CASES) + 1),
        pytest.param("slow", len(CASES) - len(QUICK), marks=pytest.mark.slow),
    ],
)
def test_the_kernels_in_tritons_interpreter(chosen, count) -> None:
    """The variable must be set before Triton is imported, so those tests run in a process of their own."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", str(Path(__file__))]
    done = subprocess.run(
        [*command, "-k", "interpreted_kernels", "-m", chosen],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert f"{count} passed" in done.stdout, done.stdout[-500:]


# Slices to a program of a walk, and the problem.
EMULATED = {
    "cluster": (1, {"length": 150}),
    "cluster, masks, resets": (1, {"batch": 2, "length": 130, "masked": 0.3, "reset": 0.05}),
    "two slices": (2, {"length": 150, "inner_loss": "huber", "loss_threshold": 0.3}),
    "without momentum": (1, {"hidden": 256, "length": 70, "momentum": False, "norm": "residual"}),
    "chunk-start reads": (1, {"length": 70, "read_mode": "chunk_start", "forget": False}),
}


@pytest.mark.skipif(not HAS_TRITON or INTERPRETED or ON_GPU, reason="is for a CPU with Triton's modules")
@pytest.mark.parametrize(
    "case",
    [
        # Each compiles its kernels, for ten seconds and more.
        pytest.param(
            case, marks=() if case in ("cluster, masks, resets", "without momentum") else pytest.mark.slow
        )
        for case in EMULATED
    ],
)
def test_emulated_cuda_kernels(draw_problem, flat, gradients, emulation, monkeypatch, case) -> None:
    slices, choices = EMULATED[case]
    ran = emulation.install(monkeypatch, slices)
    base = {"batch": 1, "heads": 1, "width": 64, "hidden": 128, "chunk_size": 64, "step": 0.02}
    _compare(draw_problem, flat, gradients, torch.bfloat16, **{**base, **choices})
    assert set(ran) == {"write", "read", "read_backward", "write_backward", "write_gradients"}


@pytest.mark.skipif(not HAS_TRITON or INTERPRETED or ON_GPU, reason="is for a CPU with Triton's modules")
def test_emulated_walks_in_lanes(draw_problem, flat, gradients, emulation, monkeypatch) -> None:
    """Two walks, then a third one, in three spans; what they leave lies in two places in turn."""
    emulation.install(monkeypatch, lanes=2)
    for span in ("FORWARD_SPAN", "BACKWARD_SPAN"):
        monkeypatch.setattr(f"nestor.ops.neural_memory.kernels.walk.{span}", (8, 8))
    choices = {"batch": 3, "heads": 1, "width": 64, "hidden": 64, "chunk_size": 64, "step": 0.02}
    _compare(draw_problem, flat, gradients, torch.bfloat16, **choices, length=64 * 16 + 5, reset=0.002)


@pytest.mark.skipif(not HAS_TRITON or INTERPRETED or ON_GPU, reason="is for a CPU with Triton's modules")
@pytest.mark.parametrize("case", DECODE_CASES)
def test_emulated_cuda_kernels_decode(draw_problem, flat, emulation, monkeypatch, case) -> None:
    ran = emulation.install(monkeypatch)
    choices = {"batch": 2, "heads": 1, "width": 64, "hidden": 128, "chunk_size": 4, "length": 6, "step": 0.02}
    _decode(draw_problem, flat, torch.float32, **{**choices, **DECODE_CASES[case]})
    assert set(ran) == {"decode"}


LARGE = {"batch": 2, "heads": 2, "width": 64, "hidden": 256, "chunk_size": 64, "length": 201, "step": 0.02}
GPU_CASES = {
    **CASES,
    "linear in four intervals": {"length": 64 * 40 + 9, "batch": 1, "heads": 1},
    "expansion 1": {"hidden": 64},
    "expansion 2, silu": {"hidden": 128, "activation": "silu"},
    "expansion 3": {"hidden": 192},
    "wide heads": {"width": 128, "hidden": 256},
    "chunks of 16": {"chunk_size": 16},
    "chunks of 32": {"chunk_size": 32},
    "chunks of 128": {"chunk_size": 128, "length": 301, "masked": 0.2},
    "chunks of 128, chunk-start reads": {"chunk_size": 128, "length": 301, "read_mode": "chunk_start"},
    "chunks of 128, wide heads": {"chunk_size": 128, "length": 301, "width": 128},
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("case", GPU_CASES)
def test_kernels_equal_the_chunked_form(draw_problem, flat, gradients, case, dtype) -> None:
    if dtype == torch.float32 and ("wide heads" in case or "128" in case):
        pytest.skip("has no room in shared memory")
    _compare(draw_problem, flat, gradients, dtype, **{**LARGE, **GPU_CASES[case]})


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["plain", "N0", "huber", "masks and resets", "expansion 1"])
def test_triton_where_cuda_would_do(draw_problem, flat, gradients, monkeypatch, case) -> None:
    """The shapes that the CUDA kernels take from Triton's on most GPUs, but not on all."""
    monkeypatch.setattr("nestor.ops.neural_memory.kernels.tiled.ENABLED", False)
    _compare(draw_problem, flat, gradients, torch.bfloat16, **{**LARGE, **GPU_CASES[case]})


@pytest.mark.gpu
@pytest.mark.parametrize("momentum", [True, False])
def test_many_walks(draw_problem, flat, gradients, momentum) -> None:
    """So many that a program takes two slices of the hidden width."""
    choices = {**LARGE, "batch": 10, "heads": 4, "momentum": momentum, "reset": 0.02}
    _compare(draw_problem, flat, gradients, torch.bfloat16, **choices)


@pytest.mark.gpu
@pytest.mark.parametrize("tiled", [True, False])
def test_several_spans(draw_problem, flat, gradients, monkeypatch, tiled) -> None:
    """The last of them shorter."""
    monkeypatch.setattr("nestor.ops.neural_memory.kernels.tiled.ENABLED", tiled)
    for span in ("FORWARD_SPAN", "BACKWARD_SPAN"):
        monkeypatch.setattr(f"nestor.ops.neural_memory.kernels.walk.{span}", (8, 8))
    choices = {**LARGE, "batch": 1, "heads": 1, "length": 64 * 12 + 5}
    _compare(draw_problem, flat, gradients, torch.bfloat16, **choices)


@pytest.mark.gpu
@pytest.mark.parametrize(("lanes", "batch"), [(1, 1), (2, 2), (4, 4)])
def test_spans_side_by_side(draw_problem, flat, gradients, monkeypatch, lanes, batch) -> None:
    """Walks of some spans beside other kernels of others; the same bits again and again."""
    monkeypatch.setattr("nestor.ops.neural_memory.kernels.tiled.lanes", lambda *about: lanes)
    for span in ("FORWARD_SPAN", "BACKWARD_SPAN"):
        monkeypatch.setattr(f"nestor.ops.neural_memory.kernels.walk.{span}", (8, 8))
    choices = {**LARGE, "batch": batch, "heads": 4, "length": 64 * 60 + 5, "reset": 0.001}
    _compare(draw_problem, flat, gradients, torch.bfloat16, **choices)
    p = _rounded(_draw(draw_problem, 0, **choices), torch.bfloat16)

    def once():
        found = gradients(p, lambda p: _run(p, torch.bfloat16))
        return [_run(p, torch.bfloat16)[0], *found.values()]

    first = once()
    for _ in range(5):
        assert all(map(torch.equal, once(), first))


@pytest.mark.gpu
@pytest.mark.parametrize("chunk_size", [32, 64])
@pytest.mark.parametrize("seed", range(100))
def test_kernels_on_random_shapes(draw_problem, flat, gradients, seed, chunk_size) -> None:
    """Few configurations to compile, every length, batch and layout of documents."""
    rng = random.Random(seed)
    choices = {
        "batch": rng.randint(1, 3), "heads": rng.randint(1, 3), "width": 64, "hidden": 128,
        "chunk_size": chunk_size, "length": rng.randint(1, 5 * chunk_size), "step": 0.02,
        "masked": rng.choice([0.0, 0.3]), "reset": rng.choice([0.0, 0.05]),
    }  # fmt: skip
    _compare(draw_problem, flat, gradients, torch.bfloat16, seed=seed, **choices)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_sizes_that_the_kernels_cover() -> None:
    from nestor.ops.neural_memory import MemorySpec
    from nestor.ops.neural_memory.kernels import obstacle

    def weights(width, hidden=256):
        return [torch.zeros(1, width, hidden), torch.zeros(1, hidden, width)]

    spec = MemorySpec(chunk_size=64)
    assert obstacle(spec, weights(128), torch.bfloat16) is None
    assert "float32" in obstacle(spec, weights(128), torch.float32)
    long = MemorySpec(chunk_size=128)
    assert obstacle(long, weights(64), torch.bfloat16) is None
    assert "chunks of 128" in obstacle(long, weights(64), torch.float32)
    assert "hidden width of 40" in obstacle(spec, weights(64, 40), torch.bfloat16)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_targets_go_into_tiles_and_come_back() -> None:
    from nestor.ops.neural_memory.kernels import tiled

    targets = torch.randn(3, 2, 64 * 128).bfloat16().float()
    tiles = tiled.targets_as_tiles(targets)
    assert tiles.shape == (3, 2, 2, 64 * 64)
    # As tiles.cuh writes it: pieces of 8 numbers, swizzled by the row.
    w1, row, column = targets[1, 0].view(64, 128), 13, 64 + 21
    assert tiles[1, 0, 1, row * 64 + ((21 // 8) ^ (row % 8)) * 8 + 21 % 8] == w1[row, column]
    # A fragment, thread after thread: thread 0 has columns 0 and 1 of rows 0 and 8, then columns 8 and 9.
    fragments = torch.zeros(3, 2 * 64 * 128)
    fragments[0, :8] = torch.arange(1.0, 9.0)
    rows = tiled.targets_from_fragments(fragments)[0].view(2, -1)[0].view(64, 128)
    assert rows[0, [0, 1, 8, 9]].tolist() == [1, 2, 5, 6] and rows[8, [0, 1, 8, 9]].tolist() == [3, 4, 7, 8]
