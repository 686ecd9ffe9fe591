"""Polynomial features: the products they are made for (invariant 19)."""

import pytest
import torch

from nestor.errors import ShapeError
from nestor.ops.polynomial import polynomial_features


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("per_head", [False, True])
def test_products_of_features_are_the_polynomial(width, per_head) -> None:
    q, k = draw(4, 3, width), draw(4, 3, width, seed=1)
    a = draw(3, 3, seed=2).abs() if per_head else torch.tensor([1.0, 1.0, 0.5]).double()
    product = (q * k).sum(-1)
    wanted = a[..., 0] + a[..., 1] * product + a[..., 2] * product**2
    features = polynomial_features(q, a)
    assert features.shape == (4, 3, (width + 1) * (width + 2) // 2)
    found = (features * polynomial_features(k, a)).sum(-1)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_one_sided_coefficients_may_be_negative() -> None:
    q, k = draw(4, 3, 5), draw(4, 3, 5, seed=1)
    a = torch.tensor([0.3, -1.0, -0.5], dtype=torch.float64, requires_grad=True)
    found = (polynomial_features(q, a, root=False) * polynomial_features(k)).sum(-1)
    product = (q * k).sum(-1)
    torch.testing.assert_close(found, 0.3 - product - 0.5 * product**2, rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(found.sum(), a)
    powers = torch.stack([torch.ones_like(product), product, product**2])
    torch.testing.assert_close(grad, powers.sum((1, 2)), rtol=1e-12, atol=1e-12)


def test_degree_one_alone_is_the_identity() -> None:
    x = draw(4, 3, 5)
    features = polynomial_features(x, torch.tensor([0.0, 1.0, 0.0]).double())
    assert torch.equal(features[..., 1:6], x)
    assert not features[..., :1].any() and not features[..., 6:].any()


def test_unit_vectors_have_the_documented_norm() -> None:
    x = torch.nn.functional.normalize(draw(7, 2, 4), dim=-1)
    square = polynomial_features(x, torch.tensor([1.0, 1.0, 0.5]).double()).square().sum(-1)
    torch.testing.assert_close(square, torch.full_like(square, 2.5))


def test_coefficients_of_another_degree_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"coefficients have shape \(4,\)"):
        polynomial_features(draw(2, 3), torch.ones(4))
