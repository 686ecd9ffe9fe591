"""Linear cross-entropy: Liger's kernel is chosen where it can be, and gives what float64 gives."""

import pytest
import torch
from torch.nn import functional as F

from nestor.ops import linear_cross_entropy as operation
from nestor.ops.linear_cross_entropy import choose_backend, linear_cross_entropy

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def case(device="cpu", dtype=torch.float64, rows=300, width=64, vocabulary=9000):
    """Hidden states, head weight and targets, of which some do not count."""
    x = torch.randn(rows, width, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, dtype=torch.float64) / width**0.5
    targets = torch.randint(vocabulary, (rows,))
    targets[::7] = -100
    x, weight = (tensor.to(device, dtype).requires_grad_() for tensor in (x, weight))
    return x, weight, targets.to(device)


def loss_and_gradients(x, weight, targets, backend=None):
    """The mean loss in `backend`, and what it sends to x and weight."""
    loss = linear_cross_entropy(x, weight, targets, backend) / (targets != -100).sum()
    return loss, *torch.autograd.grad(loss, (x, weight))


@pytest.fixture
def liger_here(monkeypatch):
    monkeypatch.setattr(operation, "has_liger", lambda: True)


def test_the_kernel_is_chosen_on_a_gpu_for_large_vocabularies(liger_here):
    for dtype in (torch.bfloat16, torch.float32):
        assert choose_backend(GPU, dtype, 32_000)[0] == "liger"
    for device, dtype, vocabulary, reason in (
        (CPU, torch.float32, 32_000, "not on cpu"),
        (GPU, torch.float64, 32_000, "float64"),
        (GPU, torch.bfloat16, 260, "vocabulary of 260"),
    ):
        backend, why = choose_backend(device, dtype, vocabulary)
        assert backend == "torch" and reason in why


def test_it_is_not_chosen_where_it_is_missing_or_switched_off(monkeypatch, liger_here):
    monkeypatch.setattr(operation, "PREFER_LIGER", False)
    assert "switched off" in choose_backend(GPU, torch.bfloat16, 32_000)[1]
    monkeypatch.setattr(operation, "has_liger", lambda: False)
    assert "nestor[gpu]" in choose_backend(GPU, torch.bfloat16, 32_000)[1]


def test_the_pytorch_form_is_the_cross_entropy_of_the_logits():
    x, weight, targets = case()
    want = F.cross_entropy(x @ weight.t(), targets, reduction="sum")
    torch.testing.assert_close(linear_cross_entropy(x, weight, targets), want)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, autocast", [("bfloat16", False), ("float32", False), ("float32", True)])
@pytest.mark.parametrize("vocabulary", [9000, 32_000])
def test_the_kernel_gives_the_loss_and_gradients_of_float64(dtype, autocast, vocabulary):
    pytest.importorskip("liger_kernel", reason="needs liger-kernel: pip install 'nestor[gpu]'")
    x, weight, targets = case("cuda", getattr(torch, dtype), vocabulary=vocabulary)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        got = loss_and_gradients(x, weight, targets, "liger")
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    want = loss_and_gradients(*exact, targets, "torch")
    allowed = 1e-4 if dtype == "float32" and not autocast else 1e-2
    assert got[0].dtype == torch.float32 and [g.dtype for g in got[1:]] == [x.dtype, weight.dtype]
    for one, other in zip(got, want, strict=True):
        assert float((one.double() - other).norm() / other.norm()) < allowed
