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
    """Compare outputs, final state and gradients of the chosen backend with the token loop, in float64; on a
    GPU its kernels too, in bfloat16."""
    from nestor.ops.neural_memory import choose_backend

    device = torch.device(device)
    checks = [
        ("linear network", [4, 4], MemorySpec(chunk_size=4), torch.float64),
        ("2-layer network", [4, 6, 4], MemorySpec(chunk_size=4), torch.float64),
        ("general form", [4, 6, 4], MemorySpec(chunk_size=4, window=2, renormalize="rows"), torch.float64),
    ]
    if device.type == "cuda":
        checks.append(("2-layer network", [64, 128, 64], MemorySpec(chunk_size=16), torch.bfloat16))
    results = []
    for label, widths, spec, dtype in checks:
        started = time.perf_counter()
        backend, reason = choose_backend(spec, device, dtype)
        found, expected = (_values(widths, spec, device, dtype, name) for name in (backend, "reference"))
        tolerance = 1e-10 if dtype == torch.float64 else 3e-2
        error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))
        seconds = time.perf_counter() - started
        name = f"neural_memory, {label}" + ("" if dtype == torch.float64 else f", {str(dtype)[6:]}")
        results.append(CheckResult(name, backend, reason, error, tolerance, seconds, error < tolerance))
    return results


def _values(
    widths: list[int], spec: MemorySpec, device: torch.device, dtype: torch.dtype, backend: str
) -> list[torch.Tensor]:
    """Outputs, final state and gradients of one problem, in float64. dtype is that of q, k, v as the backend
    takes them; the reference takes the same numbers in float64."""
    from nestor.ops.neural_memory import neural_memory

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        return values.to(dtype).to(device, torch.float64 if backend == "reference" else dtype)

    width, exact = widths[0], dtype == torch.float64
    q, k, v = (draw(2, 11 if exact else 41, 2, width).requires_grad_() for _ in range(3))
    theta, eta, alpha = (torch.sigmoid(draw(*q.shape[:3])) for _ in range(3))
    theta = theta * (1.0 if exact else 0.02)
    initial = [draw(2, a, b, scale=1.0 if exact else a**-0.5).requires_grad_() for a, b in pairwise(widths)]
    gamma, beta = draw(2, width).requires_grad_(), draw(2, width).requires_grad_()
    y, state, *_ = neural_memory(
        q, k, v, theta, eta, alpha, initial, spec=spec, gamma=gamma, beta=beta, backend=backend
    )
    outputs = [o.double() for o in (y, *state.weights, *state.momentum)]
    torch.stack([(o * o).sum() for o in outputs]).sum().backward()
    leaves = (q, k, v, *initial, gamma, beta)
    return [o.detach() for o in outputs] + [t.grad.double() for t in leaves if t.grad is not None]
