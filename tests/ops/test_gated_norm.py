"""Norm of heads times the output gate: the kernels against the PyTorch form in float64, and what picks them.

Run as a program, with TRITON_INTERPRET=1, this file checks the kernels on a CPU.
"""

from contextlib import contextmanager

import pytest
import torch

from nestor.layers.norm import RMSNorm
from nestor.ops.gated_norm import gated_norm

# p, heads, tokens, gated.
CASES = [
    (p, heads, tokens, gated)
    for p, heads in ((16, 4), (64, 2), (128, 1), (24, 3))
    for tokens, gated in ((1, True), (3, False), (17, True), (130, True))
]
EPS = 1e-5


@contextmanager
def poisoned():
    """Memory that is not written holds NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def normal(*shape, seed=0, dtype=torch.float32, device="cpu"):
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.to(device, dtype)


def draw(p, heads, tokens, gated, dtype=torch.float32, g_dtype=None, device="cpu"):
    """y with heads outside of tokens, weight in float32, g as a slice of a wider projection."""
    y = normal(2, heads, tokens, p, dtype=dtype, device=device).transpose(1, 2)
    g = normal(2, tokens, 2 * heads * p, seed=2, dtype=g_dtype or dtype, device=device)[..., heads * p :]
    return y, normal(p, seed=1, device=device), g if gated else None


def written_out(y, weight, g=None):
    out = (y / (y.square().mean(-1, keepdim=True) + EPS).sqrt() * weight).flatten(-2)
    return out if g is None else out * torch.sigmoid(g)


def results(function, inputs, cotangent):
    """The output and the gradients of all inputs."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, [x for x in leaves if x is not None], cotangent.to(out.dtype))]


def check(device, dtype, g_dtype, p, heads, tokens, gated):
    from nestor.ops.kernels import gated_norm as kernels

    inputs = draw(p, heads, tokens, gated, dtype, g_dtype, device)
    out_dtype = g_dtype if gated else dtype
    cotangent = normal(2, tokens, heads * p, seed=3, dtype=out_dtype, device=device)
    doubles = [None if x is None else x.double() for x in inputs]
    expected = results(written_out, doubles, cotangent)
    with poisoned():
        found = results(lambda *x: kernels.gated_norm(*x, EPS), inputs, cotangent)
    tolerance = 1e-5 if dtype == g_dtype == torch.float32 else 1e-2
    for name, a, b in zip(("out", "y", "weight", "g"), found, expected, strict=False):
        error = float((a - b).detach().abs().max() / b.detach().abs().max())
        assert error < tolerance, f"{name} of {(p, heads, tokens, gated)}: {error:.3g}"
    wanted = [out_dtype, dtype, torch.float32, g_dtype]
    assert [x.dtype for x in found] == wanted[: len(found)] and found[0].is_contiguous()


def check_compilation(device):
    from nestor.ops.kernels import gated_norm as kernels

    def run(y, weight, g):
        return kernels.gated_norm(y * 2, weight, g, EPS) * 3

    inputs, cotangent = draw(16, 4, 5, True, device=device), torch.ones((), device=device).expand(2, 5, 64)
    found = results(torch.compile(run, fullgraph=True, backend="aot_eager"), inputs, cotangent)
    for a, b in zip(found, results(run, inputs, cotangent), strict=True):
        torch.testing.assert_close(a, b)
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    torch.library.opcheck(kernels.gated_norm.overload, (*leaves, EPS))


# --- on a CPU -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
def test_on_a_cpu_it_is_the_norm_times_the_gate(gated):
    inputs = [None if x is None else x.double() for x in draw(5, 3, 7, gated)]
    cotangent = normal(2, 7, 15, seed=3, dtype=torch.float64)
    expected = results(written_out, inputs, cotangent)
    found = results(lambda *x: gated_norm(*x, eps=EPS), inputs, cotangent)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    norm = RMSNorm(5, EPS)
    out = norm(inputs[0].contiguous()).flatten(-2)
    out = out * torch.sigmoid(inputs[2]) if gated else out
    assert torch.equal(gated_norm(inputs[0], norm.weight, inputs[2], eps=EPS), out)


def test_the_kernels_compute_the_pytorch_form_under_the_interpreter(run_interpreted):
    run_interpreted(__file__)


# --- on a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "g_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)],
)
def test_the_kernels_compute_the_pytorch_form(dtype, g_dtype, case):
    pytest.importorskip("triton")
    check("cuda", dtype, g_dtype, *case)


@pytest.mark.gpu
def test_many_tokens_and_sequences():
    pytest.importorskip("triton")
    check("cuda", torch.float32, torch.float32, 64, 12, 3001, True)


@pytest.mark.gpu
def test_a_gpu_takes_the_kernels_and_torch_compile_them():
    pytest.importorskip("triton")
    check_compilation("cuda")
    y, weight, g = draw(64, 2, 9, True, torch.float32, torch.bfloat16, "cuda")
    out = gated_norm(y, weight.requires_grad_(), g, eps=EPS)
    assert "gated_norm" in type(out.grad_fn).__name__ and out.dtype == torch.bfloat16


if __name__ == "__main__":
    for case in CASES:
        check("cpu", torch.float32, torch.float32, *case)
    check_compilation("cpu")
