"""Activations and heads: hand-written derivatives against autograd and central differences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestor.ops.neural_memory.functions import ACTIVATIONS, INNER_LOSSES, make_head

FORMULAS = {
    "gelu": lambda z: z * torch.special.ndtr(z),
    "silu": lambda z: z * torch.sigmoid(z),
}


def points() -> torch.Tensor:
    return torch.linspace(-12, 12, 481, dtype=torch.float64)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activation_value_slope_and_curvature_are_derivatives_of_one_function(name) -> None:
    """Section 2.3: phi, phi' and phi'' of GELU (erf) and SiLU."""
    z = points().requires_grad_()
    phi = FORMULAS[name](z)
    (slope,) = torch.autograd.grad(phi.sum(), z, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), z)
    z = z.detach()
    value, own_slope = ACTIVATIONS[name].with_slope(z)
    for actual, expected in [
        (ACTIVATIONS[name].value(z), phi),
        (value, phi),
        (own_slope, slope),
        (ACTIVATIONS[name].with_curvature(z)[2], curvature),
    ]:
        torch.testing.assert_close(actual, expected.detach(), rtol=1e-10, atol=1e-12)
    h = 1e-5
    difference = (ACTIVATIONS[name].with_slope(z + h)[1] - ACTIVATIONS[name].with_slope(z - h)[1]) / (2 * h)
    torch.testing.assert_close(ACTIVATIONS[name].with_curvature(z)[2], difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_leave_their_input_alone_and_stay_finite_far_out(name) -> None:
    z = torch.tensor([-1e4, -50.0, 0.0, 50.0, 1e4])
    before = z.clone()
    value, slope = ACTIVATIONS[name].with_slope(z)
    curvature = ACTIVATIONS[name].with_curvature(z)[2]
    assert torch.equal(z, before)
    for x in (value, slope, curvature):
        assert torch.isfinite(x).all()
    assert value[2] == 0 and slope[2] == 0.5
    torch.testing.assert_close(slope[[0, -1]], torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(curvature[[0, -1]], torch.zeros(2))


def gradients_of(y: torch.Tensor, leaves: dict[str, torch.Tensor], upstream: torch.Tensor) -> dict:
    found = torch.autograd.grad(y, list(leaves.values()), upstream, allow_unused=True, retain_graph=True)
    return dict(zip(leaves, found, strict=True))


@settings(max_examples=40)
@given(
    seed=st.integers(0, 1000),
    norm=st.sampled_from(["none", "residual", "residual_layernorm"]),
    loss=st.sampled_from(["l2", "dot_product"]),
    scale=st.sampled_from([1.0, 2.5]),
    eps=st.sampled_from([1e-3, 1e-1]),
)
def test_head_and_loss_derivatives_equal_autograd(seed, norm, loss, scale, eps) -> None:
    """Invariants 3 and 23, section 2.4: delta = d loss / d z, and the products of its own derivative."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, z, v, upstream = (draw(2, 5, 4) for _ in range(4))
    gamma, beta = (draw(2, 1, 4), draw(2, 1, 4)) if norm == "residual_layernorm" else (None, None)
    leaves = {"x": x, "z": z, "v": v, "gamma": gamma, "beta": beta}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}

    # The definitions, differentiated by autograd.
    f = z if norm == "none" else x + z
    if norm == "residual_layernorm":
        f = x + gamma * torch.nn.functional.layer_norm(z, (4,), eps=eps) + beta
    value = scale / 2 * (f - v).square().sum(-1) if loss == "l2" else -scale * (f * v).sum(-1)
    (delta,) = torch.autograd.grad(value.sum(), z, create_graph=True)
    second = {}
    if delta.requires_grad:
        second = gradients_of(delta, leaves, upstream)
    first = gradients_of(f, leaves, upstream)

    with torch.no_grad():
        head, inner = make_head(norm, eps), INNER_LOSSES[loss](scale)
        own_f, cache = head.value(x, z, gamma, beta)
        assert torch.allclose(own_f, f, rtol=1e-12, atol=1e-12)
        assert torch.allclose(inner.value(own_f, v), value, rtol=1e-12, atol=1e-12)
        e = inner.error(own_f, v)
        own_delta, key_cache = head.pull_back(e, cache)
        assert torch.allclose(own_delta, delta, rtol=1e-10, atol=1e-12)

        grad_z, grad_gamma, grad_beta = head.value_vjp(upstream, cache)
        assert torch.allclose(grad_z, first["z"], rtol=1e-10, atol=1e-12)
        if gamma is not None:
            assert torch.allclose(grad_gamma, first["gamma"], rtol=1e-10, atol=1e-12)
            assert torch.allclose(grad_beta, first["beta"], rtol=1e-10, atol=1e-12)

        grad_e, through_z, grad_gamma = head.pull_back_vjp(upstream, e, key_cache)
        grad_f, grad_v = inner.error_vjp(grad_e, own_f, v)
        total_z, total_gamma = torch.zeros_like(z), None if gamma is None else grad_gamma.clone()
        if through_z is not None:
            total_z = total_z + through_z
        if grad_f is not None:
            more_z, more_gamma, more_beta = head.value_vjp(grad_f, key_cache)
            total_z = total_z + more_z
            if gamma is not None:
                total_gamma += more_gamma
                assert torch.allclose(more_beta, second["beta"], rtol=1e-9, atol=1e-11)
            if head.residual:
                assert torch.allclose(grad_f, second["x"], rtol=1e-9, atol=1e-11)
        assert torch.allclose(grad_v, second["v"], rtol=1e-9, atol=1e-11)
        wanted = torch.zeros_like(z) if second.get("z") is None else second["z"]
        assert torch.allclose(total_z, wanted, rtol=1e-9, atol=1e-11)
        if gamma is not None:
            assert torch.allclose(total_gamma, second["gamma"], rtol=1e-9, atol=1e-11)


def test_the_layer_norm_backward_of_the_specification_term_by_term() -> None:
    """Section 2.4: dL/du = P g / s; dL/dz = -zh (g . delta)/(p s) - P[mm g + u (g . zh)/p] / s^2."""
    z, u, g = (torch.randn(6, dtype=torch.float64) for _ in range(3))
    s = torch.sqrt(z.var(unbiased=False) + 1e-3)
    zh = (z - z.mean()) / s

    def project(w: torch.Tensor) -> torch.Tensor:
        return w - w.mean() - zh * (zh * w).mean()

    delta, mm = project(u) / s, (u * zh).mean()
    grad_u = project(g) / s
    grad_z = -zh * (g @ delta) / (6 * s) - project(mm * g + u * (g @ zh) / 6) / s**2

    head = make_head("residual_layernorm", 1e-3)
    gamma, error = torch.ones(1, 6, dtype=torch.float64), u[None]
    _, cache = head.value(torch.zeros_like(z)[None], z[None], gamma, torch.zeros_like(gamma))
    own_delta, cache = head.pull_back(error, cache)
    own_u, own_z, _ = head.pull_back_vjp(g[None], error, cache)
    for actual, expected in ((own_delta, delta), (own_u, grad_u), (own_z, grad_z)):
        torch.testing.assert_close(actual[0], expected, rtol=1e-10, atol=1e-12)


def test_a_norm_at_a_zero_output_is_finite() -> None:
    """Section 9, row 6: an MLP that outputs zero has finite gradients, bounded by 1/sqrt(eps)."""
    head = make_head("residual_layernorm", 1e-3)
    zeros, ones = torch.zeros(1, 4), torch.ones(1, 4)
    f, cache = head.value(ones, zeros, ones, zeros)
    e = torch.tensor([[1.0, -1.0, 2.0, 0.0]])
    delta, cache = head.pull_back(e, cache)
    torch.testing.assert_close(f, ones)
    assert float(delta.norm()) <= float(e.norm()) / 1e-3**0.5
    for x in head.pull_back_vjp(ones, e, cache):
        assert torch.isfinite(x).all()
