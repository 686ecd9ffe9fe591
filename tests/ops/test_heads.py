"""SiLU, heads and unit length in one function."""

import pytest
import torch
from torch.nn import functional as F

from nestor.ops.heads import silu_heads


@pytest.fixture
def x():
    return torch.randn(2, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("unit", [True, False])
def test_it_is_silu_by_head_of_unit_length(x, heads, unit):
    expected = F.silu(x).unflatten(-1, (heads, -1))
    if unit:
        expected = expected / (expected.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    before = x.clone()
    torch.testing.assert_close(silu_heads(x, heads, unit=unit), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(x, before)
    assert torch.autograd.gradcheck(lambda x: silu_heads(x, heads, unit=unit), x.requires_grad_())


def test_half_precision_becomes_float32(x):
    y = silu_heads(x.bfloat16().requires_grad_(), 3, unit=True)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, silu_heads(x.bfloat16().float(), 3, unit=True))


def test_torch_compile_and_export_take_it_whole(x):
    compiled = torch.compile(silu_heads, fullgraph=True, backend="aot_eager")
    results = []
    for function in (silu_heads, compiled):
        leaf = x.clone().requires_grad_()
        y = function(leaf, 3, unit=True)
        y.pow(3).sum().backward()
        results.append((y, leaf.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

    class Heads(torch.nn.Module):
        def forward(self, x):
            return silu_heads(x, 3, unit=True)

    exported = torch.export.export(Heads(), (x.clone().requires_grad_(),), strict=False)
    torch.testing.assert_close(exported.module()(x), results[0][0], rtol=1e-12, atol=1e-12)
