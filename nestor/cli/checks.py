"""Every operation on this machine against its definition, for `nestor doctor`."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from nestor.layers.attention import attend
from nestor.ops.linear_cross_entropy import LEAST_VOCABULARY, choose_backend, linear_cross_entropy
from nestor.ops.neural_memory import self_check
from nestor.ops.neural_memory.checks import CheckResult
from nestor.ops.short_convolution import short_convolution

TOLERANCE = 1e-10


def check_operations(device: torch.device) -> list[CheckResult]:
    """The self-checks of all operations on `device`, in float64."""
    loss = choose_backend(device, torch.float32, LEAST_VOCABULARY)
    # Liger's kernel computes in float32, PyTorch in what it is given.
    precision, allowed = (torch.float32, 1e-5) if loss[0] == "liger" else (torch.float64, TOLERANCE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [
            *self_check(device),
            _check(
                "attention, sliding window",
                "sdpa",
                "PyTorch's scaled_dot_product_attention, which chooses its own kernel",
                lambda: _attention(device),
            ),
            _check(
                "short convolution",
                "torch",
                "shifted multiply-adds need no kernel of their own",
                lambda: _convolution(device),
            ),
            _check("linear cross-entropy", *loss, lambda: _linear_cross_entropy(device, precision), allowed),
        ]


def _check(
    name: str,
    backend: str,
    reason: str,
    values: Callable[[], tuple[Tensor, Tensor]],
    tolerance: float = TOLERANCE,
) -> CheckResult:
    started = time.perf_counter()
    got, want = values()
    error = float((got - want).abs().max() / want.abs().max())
    seconds = time.perf_counter() - started
    return CheckResult(name, backend, reason, error, tolerance, seconds, error < tolerance)


def _attention(device: torch.device) -> tuple[Tensor, Tensor]:
    """13 queries on 20 keys with a window of 5, against a softmax for each query."""
    q = torch.randn(2, 13, 4, 8, dtype=torch.float64).to(device)
    k, v = torch.randn(2, 2, 20, 2, 8, dtype=torch.float64).to(device)
    rows = []
    for i in range(13):
        seen = slice(7 + i - 4, 7 + i + 1)
        keys, values = (x[:, seen].repeat_interleave(2, dim=2) for x in (k, v))
        weights = torch.einsum("bhp,bshp->bhs", q[:, i], keys).div(8**0.5).softmax(-1)
        rows.append(torch.einsum("bhs,bshp->bhp", weights, values))
    return attend(q, k, v, window=5), torch.stack(rows, 1)


def _convolution(device: torch.device) -> tuple[Tensor, Tensor]:
    """Nine tokens after a tail of three, against the sum that defines the convolution."""
    x = torch.randn(2, 9, 5, dtype=torch.float64).to(device)
    weight = torch.randn(5, 4, dtype=torch.float64).to(device)
    tail = torch.randn(2, 3, 5, dtype=torch.float64).to(device)
    past = torch.cat((tail, x), dim=1)
    rows = [sum(weight[:, 3 - i] * past[:, 3 + t - i] for i in range(4)) for t in range(9)]
    return short_convolution(x, weight, tail), torch.stack(rows, 1)  # type: ignore[arg-type]


def _linear_cross_entropy(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Nine rows, one of which does not count, in `dtype`, against their sums of exponentials in float64."""
    x, weight = (torch.randn(n, 16, dtype=torch.float64) for n in (9, LEAST_VOCABULARY))
    targets = torch.randint(LEAST_VOCABULARY, (9,))
    nats = (x @ weight.t()).logsumexp(1) - (x * weight[targets]).sum(1)
    targets[4] = -100
    got = linear_cross_entropy(x.to(device, dtype), weight.to(device, dtype), targets.to(device))
    return got.cpu().double(), nats.sum() - nats[4]
