"""The coefficient matrices of a chunk against the recurrences, the printed formulas and the closed forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nestor.ops.neural_memory.coefficients import chunk_coefficients, gate_products
from nestor.ops.neural_memory.mixing import suffix_products

GATE = st.one_of(st.just(0.0), st.just(1.0), st.floats(0.0, 1.0))


def by_recurrence(theta: Tensor, eta: Tensor, alpha: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Section 1.3's loop, which runs a line only where the token is valid."""
    n = len(theta)
    A, F, m = theta.new_ones(()), theta.new_zeros(()), theta.new_ones(())
    e = g = theta.new_zeros(n)
    rows = []
    for t in range(n):
        if valid[t]:
            m = m * eta[t]
            e = eta[t] * e + theta[t] * torch.eye(n, dtype=theta.dtype)[t]
            A = A * (1 - alpha[t])
            F = (1 - alpha[t]) * F + m
            g = (1 - alpha[t]) * g + e
        rows.append((A, F, m, g, e))
    A, F, m, G, E = (torch.stack(column) for column in zip(*rows, strict=True))
    ends = {"A_end": A[-1:], "F_end": F[-1:], "m_end": m[-1:], "G_end": G[-1], "E_end": E[-1]}
    return {"A": A, "F": F, "G": G, **ends}


@settings(max_examples=100)
@given(st.lists(st.tuples(GATE, GATE, GATE, st.booleans()), min_size=1, max_size=9))
def test_coefficients_equal_the_recurrence(rows) -> None:
    """Section 1.3, for any gates in [0, 1] exact zeros and ones too, and for skipped tokens (invariant 8)."""
    theta, eta, alpha = (torch.tensor([row[i] for row in rows], dtype=torch.float64) for i in range(3))
    valid = torch.tensor([row[3] for row in rows])
    actual = chunk_coefficients(theta, eta, alpha, valid)
    expected = by_recurrence(theta, eta, alpha, valid)
    for name, value in expected.items():
        if name in ("A", "F", "G"):  # rows of skipped tokens are not read
            torch.testing.assert_close(getattr(actual, name)[valid], value[valid], rtol=1e-12, atol=1e-14)
        else:
            torch.testing.assert_close(getattr(actual, name), value, rtol=1e-12, atol=1e-14)


def test_coefficients_equal_the_sums_of_products() -> None:
    """Section 1.3: A_t, m_t, E_tj, F_t = sum (A_t/A_i) m_i, G_tj = sum (A_t/A_i) E_ij, written out."""
    n = 6
    theta, eta, alpha = torch.rand(3, n, dtype=torch.float64)
    a = 1 - alpha
    c = chunk_coefficients(theta, eta, alpha, None)
    for t in range(n):
        assert float(c.A[t]) == pytest.approx(float(a[: t + 1].prod()), rel=1e-12)
        F = sum(a[i + 1 : t + 1].prod() * eta[: i + 1].prod() for i in range(t + 1))
        assert float(c.F[t]) == pytest.approx(float(F), rel=1e-12)
        for j in range(n):
            G = sum(a[i + 1 : t + 1].prod() * theta[j] * eta[j + 1 : i + 1].prod() for i in range(j, t + 1))
            assert float(c.G[t, j]) == pytest.approx(float(G), rel=1e-12)
    assert float(c.m_end) == pytest.approx(float(eta.prod()), rel=1e-12)
    for j in range(n):
        assert float(c.E_end[j]) == pytest.approx(float(theta[j] * eta[j + 1 :].prod()), rel=1e-12)


@pytest.mark.parametrize(("a", "eta"), [(0.9, 0.5), (0.3, 0.95), (1.0, 0.6)])
def test_constant_gates_give_the_geometric_closed_form(a, eta) -> None:
    """Invariant 12: G_tj = theta (a^{n+1} - eta^{n+1}) / (a - eta), n = t - j."""
    gate = torch.ones(8, dtype=torch.float64)
    c = chunk_coefficients(0.3 * gate, eta * gate, (1 - a) * gate, None)
    for t in range(8):
        for j in range(8):
            n = t - j
            expected = 0.3 * (a ** (n + 1) - eta ** (n + 1)) / (a - eta) if n >= 0 else 0.0
            assert float(c.G[t, j]) == pytest.approx(expected, rel=1e-10, abs=1e-15)


def test_without_momentum_g_is_decay_times_step() -> None:
    """Section 1.3: eta = 0 gives G = D diag(theta) and F = 0; what belongs to the momentum is absent."""
    theta, alpha = torch.rand(2, 5, dtype=torch.float64)
    plain = chunk_coefficients(theta, None, alpha, None)
    gated = chunk_coefficients(theta, torch.zeros_like(theta), alpha, None)
    torch.testing.assert_close(plain.G, gated.G)
    torch.testing.assert_close(plain.A, gated.A)
    assert not gated.F.any() and not gated.m_end.any()
    assert plain.F is None and plain.F_end is None and plain.m_end is None and plain.E_end is None


def test_without_forgetting_nothing_decays() -> None:
    theta, eta = torch.rand(2, 5, dtype=torch.float64)
    c = chunk_coefficients(theta, eta, None, None)
    torch.testing.assert_close(c.A, torch.ones_like(theta))
    torch.testing.assert_close(c.G, chunk_coefficients(theta, eta, torch.zeros_like(theta), None).G)


def test_exclusive_rows_stand_one_token_earlier() -> None:
    """Section 2.2: the exclusive read uses A_{t-1}, F_{t-1}, G_{t-1,.}; the end of the chunk stays."""
    c = chunk_coefficients(*torch.rand(3, 5, dtype=torch.float64), None)
    shifted = c.exclusive()
    assert shifted.A[0] == 1 and shifted.F[0] == 0 and not shifted.G[0].any()
    for name in ("A", "F", "G"):
        assert torch.equal(getattr(shifted, name)[1:], getattr(c, name)[:-1])
    for name in ("A_end", "F_end", "m_end", "G_end", "E_end"):
        assert torch.equal(getattr(shifted, name), getattr(c, name))


@pytest.mark.parametrize("zeros", [0, 1, 3])
def test_gate_products_have_exact_gradients_at_zero_gates(zeros) -> None:
    """A product with zero factors has finite gradients, which dividing by the gate would not give."""
    gate = torch.rand(2, 6, dtype=torch.float64)
    gate[:, 1 : 1 + zeros] = 0.0
    gate.requires_grad_()

    def slow(g: Tensor) -> Tensor:
        def product(t: int, j: int) -> Tensor:
            return g[:, j + 1 : t + 1].prod(-1) if j <= t else 0 * g[:, 0]

        tokens = range(g.shape[-1])
        return torch.stack([torch.stack([product(t, j) for j in tokens], -1) for t in tokens], -2)

    weight = torch.randn(2, 6, 6, dtype=torch.float64)
    assert torch.equal(gate_products(gate), slow(gate))
    (actual,) = torch.autograd.grad((gate_products(gate) * weight).sum(), gate)
    (expected,) = torch.autograd.grad((slow(gate) * weight).sum(), gate)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(gate_products, gate)


@pytest.mark.parametrize("length", [0, 1, 2, 5, 8])
def test_suffix_products_have_exact_gradients_at_zeros(length) -> None:
    x = torch.rand(3, length, dtype=torch.float64)
    x[1, : length // 2], x[2] = 0.0, 0.0
    x.requires_grad_()
    found, expected = suffix_products(x), x.flip(-1).cumprod(-1).flip(-1)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(found)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, upstream) for y in (found, expected)))


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_all_coefficients_pass_finite_differences(masked) -> None:
    """Invariant 23, for theta, eta, alpha; the gates of skipped tokens receive none."""
    gates = torch.rand(3, 5, dtype=torch.float64).mul(0.8).add(0.1).requires_grad_()
    valid = torch.tensor([True, False, True, True, False]) if masked else None

    def outputs(gates: Tensor) -> tuple[Tensor, ...]:
        c = chunk_coefficients(*gates, valid)
        if valid is None:
            return c.A, c.F, c.G, c.m_end, c.E_end
        return c.A_end, c.F_end, c.G_end, c.m_end, c.E_end

    assert torch.autograd.gradcheck(outputs, gates)
    if masked:
        (grad,) = torch.autograd.grad(sum(x.sum() for x in outputs(gates)), gates)
        assert not grad[:, ~valid].any() and grad[:, 0].all()


def test_long_products_underflow_to_zero_without_harm() -> None:
    """Section 9, row 15: alpha = 0.5 for 512 tokens underflows in float32; nothing becomes NaN."""
    gate = torch.full((512,), 0.5, requires_grad=True)
    c = chunk_coefficients(gate, gate, gate, None)
    (grad,) = torch.autograd.grad(c.G.sum() + c.F.sum() + c.A.sum(), gate)
    assert c.A[-1] == 0 and torch.isfinite(c.G).all() and torch.isfinite(grad).all()
    assert c.G[-1, -1].item() == 0.5
