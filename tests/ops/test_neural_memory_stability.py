"""Long streams: bounded and accurate with the default gates, and the exact border of stable step sizes."""

from itertools import pairwise

import pytest
import torch

from nestor.ops.neural_memory import MemorySpec, neural_memory

TOKENS, PIECE = 32_768, 4096


def unit(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def long_run(dtype: torch.dtype, depth: int, norm: str):
    """32k random tokens in pieces, gates around the defaults of section 14; yields outputs and states."""
    width, chunk = 16, 64
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    widths = [width] + [2 * width] * (depth - 1) + [width]
    initial = [(draw(1, a, b) * 0.5 / a**0.5).to(dtype) for a, b in pairwise(widths)]
    slow = {}
    if norm == "residual_layernorm":
        slow = {"gamma": torch.ones(1, width, dtype=dtype), "beta": torch.zeros(1, width, dtype=dtype)}
    spec, state = MemorySpec(chunk_size=chunk, norm=norm), None
    for _ in range(TOKENS // PIECE):
        q, k = (unit(draw(1, PIECE, 1, width)).to(dtype) for _ in range(2))
        v = draw(1, PIECE, 1, width).to(dtype)
        eta = torch.sigmoid(draw(1, PIECE, 1))
        alpha = torch.sigmoid(draw(1, PIECE, 1) * 0.5 - 4.0)
        theta = min(1.0, 4.0 / chunk) * (1 - eta) * torch.sigmoid(draw(1, PIECE, 1) - 2.0)
        gates = (gate.to(dtype) for gate in (theta, eta, alpha))
        y, state = neural_memory(q, k, v, *gates, initial, spec=spec, state=state, **slow)
        yield y, state


@pytest.mark.parametrize(("depth", "norm"), [(1, "none"), (2, "residual"), (2, "residual_layernorm")])
def test_a_long_stream_stays_bounded_and_close_to_float64(depth, norm) -> None:
    """Invariant 24: 32k tokens, ||W||, ||S|| bounded in float32, drift against float64 below 1 %."""
    with torch.no_grad():
        narrow, wide = long_run(torch.float32, depth, norm), long_run(torch.float64, depth, norm)
        for (y32, state32), (y64, state64) in zip(narrow, wide, strict=True):
            assert torch.isfinite(y32).all()
            assert float((y32 - y64).norm() / y64.norm()) < 0.01
            for part in ("weights", "momentum"):
                for a, b in zip(getattr(state32, part), getattr(state64, part), strict=True):
                    assert float(a.norm()) < 100.0
                    assert float((a - b).norm() / b.norm()) < 0.01


def size_after(step: float, *, chunk: int, eta: float | None, alpha: float | None, chunks: int) -> float:
    """||W|| of a linear memory that reads one unit key again and again."""
    length, dtype = chunk * chunks, torch.float64
    k = unit(torch.ones(1, length, 1, 4, dtype=dtype))
    gate = torch.ones(1, length, 1, dtype=dtype)
    _, state = neural_memory(
        k, k, torch.zeros_like(k), step * gate,
        None if eta is None else eta * gate, None if alpha is None else alpha * gate,
        [torch.eye(4, dtype=dtype)[None]], spec=MemorySpec(chunk_size=chunk, norm="none", decay="zero"),
    )  # fmt: skip
    return float((k[:, 0] @ state.weights[0][0, 0]).norm())


@pytest.mark.parametrize("eta", [None, 0.5, 0.9])
@pytest.mark.parametrize("alpha", [None, 0.1, 0.5])
def test_the_sequential_step_bound_is_exact(eta, alpha) -> None:
    """Invariant 24, section 9 row 2: unit keys and C = 1 are stable iff c theta < (2 - alpha)(1 + eta)."""
    bound = (2 - (alpha or 0.0)) * (1 + (eta or 0.0))
    assert size_after(1.1 * bound, chunk=1, eta=eta, alpha=alpha, chunks=400) > 1e6
    assert size_after(0.9 * bound, chunk=1, eta=eta, alpha=alpha, chunks=400) < 1.0


@pytest.mark.parametrize(
    ("chunk", "eta", "bound"),
    [
        (4, None, 0.5),
        (16, None, 0.125),
        (16, 0.5, 0.071),
        (16, 0.9, 0.019),
        (64, 0.5, 0.016),
        (64, 0.9, 0.0043),
    ],
)
def test_the_frozen_anchor_step_bound_is_exact(chunk, eta, bound) -> None:
    """Invariant 24, section 9 row 2: C identical keys need c theta < 2/C, and less with momentum."""
    assert size_after(1.1 * bound, chunk=chunk, eta=eta, alpha=None, chunks=300) > 1e4
    assert size_after(0.9 * bound, chunk=chunk, eta=eta, alpha=None, chunks=300) < 1.0


def test_the_loss_scale_counts_as_step_size() -> None:
    """The bound holds for c theta: doubling c and halving theta is the same memory."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 12, 1, 4, dtype=torch.float64)
    theta, eta, alpha = torch.rand(3, 1, 12, 1, dtype=torch.float64)
    initial = [torch.randn(1, 4, 4, dtype=torch.float64)]
    outputs = [
        neural_memory(
            q, k, v, theta / c, eta, alpha, initial, spec=MemorySpec(chunk_size=4, norm="none", loss_scale=c)
        )[0]
        for c in (1.0, 2.0)
    ]
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
