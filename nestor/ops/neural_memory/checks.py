"""A quick comparison of every backend with the reference, for `nestor doctor` and for tests."""

import time
from dataclasses import dataclass
from itertools import pairwise

import torch

from nestor.ops.neural_memory.spec import MemorySpec


@dataclass(frozen=True)
class CheckResult:
    """One backend of one operation against its reference; error is relative to the largest output."""

    name: str
    backend: str
    reason: str
    error: float
    tolerance: float
    seconds: float
    ok: bool


def self_check(device: torch.device | str = "cpu") -> list[CheckResult]:
    """Compare outputs, final state and gradients of the chosen backend with the token loop, in float64."""
    from nestor.ops.neural_memory import choose_backend, neural_memory

    device = torch.device(device)
    results = []
    for label, widths, spec in (
        ("linear network", [4, 4], MemorySpec(chunk_size=4)),
        ("2-layer network", [4, 6, 4], MemorySpec(chunk_size=4)),
        ("general form", [4, 6, 4], MemorySpec(chunk_size=4, window=2, renormalize="rows")),
    ):
        started = time.perf_counter()
        backend, reason = choose_backend(spec, device)
        values = []
        for name in (backend, "reference"):
            generator = torch.Generator().manual_seed(0)

            def draw(*shape: int, source: torch.Generator = generator) -> torch.Tensor:
                values = torch.randn(*shape, generator=source, dtype=torch.float64)
                return values.to(device).requires_grad_()

            q, k, v = (draw(2, 11, 2, 4) for _ in range(3))
            theta, eta, alpha = (torch.sigmoid(draw(2, 11, 2)) for _ in range(3))
            initial = [draw(2, a, b) for a, b in pairwise(widths)]
            gamma, beta = draw(2, 4), draw(2, 4)
            y, state, *_ = neural_memory(
                q, k, v, theta, eta, alpha, initial, spec=spec, gamma=gamma, beta=beta, backend=name
            )
            outputs = [y, *state.weights, *state.momentum]
            torch.stack([(o * o).sum() for o in outputs]).sum().backward()
            leaves = (q, k, v, *initial, gamma, beta)
            values.append([o.detach() for o in outputs] + [t.grad for t in leaves if t.grad is not None])
        error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*values, strict=True))
        seconds = time.perf_counter() - started
        results.append(
            CheckResult(f"neural_memory, {label}", backend, reason, error, 1e-10, seconds, error < 1e-10)
        )
    return results
