"""RMSNorm against its equation."""

import torch

from nestor.layers.norm import RMSNorm


def test_output_is_the_equation_in_float64():
    norm = RMSNorm(6, eps=1e-3).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)


def test_bfloat16_stays_bfloat16_and_is_averaged_in_float32():
    x = (torch.randn(4, 4096) * 100).bfloat16()
    y = RMSNorm(4096)(x)
    assert y.dtype == torch.bfloat16
    exact = x.double() / x.double().pow(2).mean(-1, keepdim=True).sqrt()
    assert (y.double() - exact).abs().max() < 2**-7 * exact.abs().max()
