"""Delta gradient descent and momenta: invariants 15 and 16 of spec nested-learning, section h."""

import math

import pytest
import torch

from nestor.errors import ShapeError
from nestor.ops.delta_gradient import (
    deep_momentum_step,
    delta_gradient_step,
    delta_momentum_step,
    dgd_coefficient,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(n, seed=0):
    return torch.nn.functional.normalize(draw(n, seed=seed), dim=0)


@pytest.mark.parametrize("eta", [0.1, 3.0])
@pytest.mark.parametrize("norm", [0.3, 1.0, 2.5])
def test_invariant_15_dgd_is_the_minimum_of_its_problem(norm, eta) -> None:
    w, x, grad_y = draw(4, 5), norm * unit(5, 1), draw(4, seed=2)
    u = -grad_y
    found = delta_gradient_step(w, x, grad_y, eta).requires_grad_()
    value = ((found @ x - u) ** 2).sum() / 2 + ((found - w) ** 2).sum() / (2 * eta)
    (slope,) = torch.autograd.grad(value, [found])
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-12)
    # And the same from the linear system of that minimum.
    system = torch.outer(x, x) + torch.eye(5, dtype=torch.float64) / eta
    solved = torch.linalg.solve(system, (torch.outer(u, x) + w / eta).mT).mT
    torch.testing.assert_close(found.detach(), solved, rtol=1e-11, atol=1e-12)
    coefficient = eta * norm**2 / (1 + eta * norm**2)
    torch.testing.assert_close(found.detach() @ x, (1 - coefficient) * w @ x + coefficient * u)
    eye = torch.eye(5, dtype=torch.float64)
    printed = w @ (eye - eta / (1 + eta) * torch.outer(x, x)) - eta / (1 + eta) * torch.outer(grad_y, x)
    assert torch.allclose(found, printed, rtol=1e-10) == (norm == 1.0)
    short = w @ (eye - torch.outer(x, x)) - eta * torch.outer(grad_y, x)
    torch.testing.assert_close(delta_gradient_step(w, x, grad_y, eta, form="short"), short)


def test_invariant_15_without_its_decay_dgd_is_gradient_descent() -> None:
    w, x, v = draw(4, 5), draw(5, seed=1), draw(4, seed=2)
    grad_y = w @ x - v
    c = dgd_coefficient(x, 0.5)
    restored = delta_gradient_step(w, x, grad_y, 0.5) + c * torch.outer(w @ x, x)
    torch.testing.assert_close(restored, w - c * torch.outer(grad_y, x))


@pytest.mark.parametrize("alpha", [1.0, 0.9])
@pytest.mark.parametrize("loss", ["dot", "l2"])
def test_invariant_16_fixed_points(alpha, loss) -> None:
    k, v = unit(5, 1), draw(4, seed=2)
    across = draw(5, seed=3)
    across = across - (across @ k) * k
    start = w = draw(4, 5)
    eta, steps = 0.7, 400
    for _ in range(steps):
        w = delta_gradient_step(w, k, -v if loss == "dot" else w @ k - v, eta, alpha=alpha)
    c = eta / (1 + eta)
    wanted = c * v / (1 - alpha + (c if loss == "dot" else 2 * c))
    torch.testing.assert_close(w @ k, wanted)
    if alpha == 1.0:
        torch.testing.assert_close(w @ k, v if loss == "dot" else v / 2)
    torch.testing.assert_close(w @ across, alpha**steps * start @ across, rtol=1e-9, atol=1e-12)


def test_on_the_dot_product_dgd_is_the_delta_rule() -> None:
    w, k, v = draw(4, 5), unit(5, 1), draw(4, seed=2)
    c = float(dgd_coefficient(k, 0.5))
    expected = w + c * torch.outer(v - w @ k, k)
    torch.testing.assert_close(delta_gradient_step(w, k, -v, 0.5), expected)


def test_a_batch_is_the_mean_of_its_tokens() -> None:
    w, x, grad_y = draw(4, 5), draw(3, 5, seed=1), draw(3, 4, seed=2)
    alone = [delta_gradient_step(w, x[b], grad_y[b], 0.4, alpha=0.9) for b in range(3)]
    torch.testing.assert_close(delta_gradient_step(w, x, grad_y, 0.4, alpha=0.9), torch.stack(alone).mean(0))
    # Of inputs of one norm, the form with one coefficient and mean products.
    x = torch.nn.functional.normalize(x, dim=-1)
    c = 0.4 / 1.4
    eye = torch.eye(5, dtype=torch.float64)
    expected = w @ (eye - c * x.mT @ x / 3) - c * grad_y.mT @ x / 3
    torch.testing.assert_close(delta_gradient_step(w, x, grad_y, 0.4), expected)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"\[4, 5\], \[4\] and \[5\]; give \[o, i\]"):
        delta_gradient_step(draw(4, 5), draw(4), draw(5), 0.1)
    with pytest.raises(ShapeError, match=r"\[3, 5\] and \[2, 4\]"):
        delta_gradient_step(draw(4, 5), draw(3, 5), draw(2, 4), 0.1)
    with pytest.raises(ShapeError, match="'long'"):
        delta_gradient_step(draw(4, 5), draw(5), draw(4), 0.1, form="long")


def test_delta_momentum_steps_down_its_objective() -> None:
    m, g, p = draw(4, 5), 0.3 * draw(4, 5, seed=1), draw(4, 4, seed=2)
    eta = 0.2
    found = delta_momentum_step(m, g, eta, alpha=0.8, kappa=0.1, value=p)
    eye = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(found, m @ (0.8 * eye - 0.1 * g.mT @ g) - eta * p @ g)
    leaf = m.clone().requires_grad_()
    (slope,) = torch.autograd.grad(((leaf @ g.mT + p) ** 2).sum() / 2, [leaf])
    torch.testing.assert_close(delta_momentum_step(m, g, eta, alpha=1.0, value=p), m - eta * slope)
    # Without the delta rule, momentum; element by element, of numbers.
    torch.testing.assert_close(delta_momentum_step(m, g, eta, kappa=0.0), 0.9 * m - eta * g)
    by_number = (0.8 - 0.1 * g**2) * m - eta * g
    torch.testing.assert_close(
        delta_momentum_step(m, g, eta, alpha=0.8, kappa=0.1, elementwise=True), by_number
    )


@pytest.mark.parametrize("elementwise", [True, False])
def test_pitfall_delta_momentum_stays_bounded_for_large_gradients(elementwise) -> None:
    """Unguarded, a gradient with kappa |g|^2 = 9 multiplies what m holds along it by alpha - 9 each step."""
    g = 3.0 * torch.nn.functional.normalize(draw(1, 5, seed=1), dim=-1)
    m, free = (torch.zeros(1, 5, dtype=torch.float64) for _ in range(2))
    for _ in range(50):
        m = delta_momentum_step(m, g, 1.0, elementwise=elementwise)
        free = free @ (0.9 * torch.eye(5, dtype=torch.float64) - g.mT @ g) - g
    assert m.norm() < 60 and free.norm() > 1e30
    if not elementwise:
        # kappa |g|^2 = 1: along g, m' = -0.1 m - g.
        torch.testing.assert_close(m, -g / 1.1)
    assert not delta_momentum_step(m * 0, g * 0, 1.0, elementwise=elementwise).any()


def test_deep_momentum_of_a_constant_is_momentum() -> None:
    phi, m = {"m": torch.zeros(4, 5, dtype=torch.float64)}, torch.zeros(4, 5, dtype=torch.float64)
    for seed in range(5):
        g = draw(4, 5, seed=seed)
        update, phi = deep_momentum_step(phi, g, 0.1, lambda phi, g: phi["m"], alpha=0.7)
        m = 0.7 * m - 0.1 * g
        torch.testing.assert_close(update, m)


def mlp(phi, g):
    """A network of two layers on the rows of a gradient, `[o, i]` to `[o, i]`."""
    return torch.tanh(g @ phi["in"].mT) @ phi["out"].mT


def test_deep_momentum_by_explicit_gradients_and_downhill() -> None:
    g, phi = draw(4, 5), {"in": draw(6, 5, seed=1), "out": draw(5, 6, seed=2)}
    update, after = deep_momentum_step(phi, g, 0.01, mlp, alpha=0.9)
    hidden = torch.tanh(g @ phi["in"].mT)
    torch.testing.assert_close(after["out"], 0.9 * phi["out"] - 0.01 * g.mT @ hidden)
    back = (g @ phi["out"]) * (1 - hidden**2)
    torch.testing.assert_close(after["in"], 0.9 * phi["in"] - 0.01 * back.mT @ g)
    torch.testing.assert_close(update, mlp(after, g))
    ones = deep_momentum_step(phi, g, 0.01, mlp, objective=lambda written, g: written.sum())[1]
    torch.testing.assert_close(
        ones["out"], 0.9 * phi["out"] - 0.01 * torch.ones(5, 4, dtype=torch.float64) @ hidden
    )
    for _ in range(100):
        update, phi = deep_momentum_step(phi, g, 0.05, mlp)
    assert (update * g).sum() < -0.5 * update.norm() * g.norm()
    assert math.isfinite(float(update.norm()))
