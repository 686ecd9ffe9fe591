"""Retention maps in closed form, and MIRAS's models by the updates that the paper prints (section 4)."""

import pytest
import torch

from nestor.errors import ConfigError
from nestor.ops.neural_memory import MemorySpec, MemoryState, fast_weights
from nestor.ops.neural_memory.retention import make_retention, soft_threshold

MAPS = {
    "softmax": {"retention": "softmax", "simplex_sum": 3.0},
    "moneta, q = 4": {"retention": "lq", "retention_power": 4.0},
    "moneta, q = 2.5": {"retention": "lq", "retention_power": 2.5},
    "exact, q = 4": {"retention": "lq", "retention_power": 4.0, "retention_dual": "exact"},
    "exact, q = 1.5": {"retention": "lq", "retention_power": 1.5, "retention_dual": "exact"},
    "elastic net": {"retention": "elastic_net"},
    "elastic net, ftrl": {"retention": "elastic_net_ftrl", "retention_threshold": 0.2},
    "logit": {"retention": "bregman_logit"},
}


def retention(name):
    return make_retention(MemorySpec(read_mode="chunk_start", **MAPS[name]))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", MAPS)
def test_the_map_of_the_first_accumulator_is_the_learned_weights(name) -> None:
    """Section 4.4: A_0 is chosen so that the map gives W_0."""
    w = draw(2, 4, 3)
    if name == "softmax":
        w = 3.0 * torch.softmax(w, -2)
    elif name == "logit":
        w = torch.sigmoid(w)
    found = retention(name)
    torch.testing.assert_close(found.weights(found.accumulator(w)), w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("power", [1.5, 2.0, 3.0, 4.0])
def test_the_exact_dual_is_the_gradient_of_half_the_squared_norm(power) -> None:
    """Section 4.3: and of degree 1, where the printed map is of degree 3 - q."""
    a = draw(2, 4, 3).requires_grad_()
    exact = make_retention(
        MemorySpec(read_mode="chunk_start", retention="lq", retention_power=power, retention_dual="exact")
    )
    norm = a.abs().pow(power).sum((-2, -1)).pow(1 / power)
    (grad,) = torch.autograd.grad(norm.square().sum() / 2, a)
    torch.testing.assert_close(exact.weights(a), grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(exact.weights(5 * a), 5 * grad, rtol=1e-12, atol=1e-12)


def test_the_printed_map_is_what_the_paper_prints() -> None:
    a = draw(2, 4, 3)
    norm = a.pow(4).sum((-2, -1), keepdim=True).pow(0.25)
    torch.testing.assert_close(retention("moneta, q = 4").weights(a), a / norm**2)
    torch.testing.assert_close(retention("moneta, q = 4").weights(2 * a), a / norm**2 / 2)


def test_both_duals_of_power_two_are_l2() -> None:
    a = draw(2, 4, 3)
    for dual in ("paper", "exact"):
        spec = MemorySpec(read_mode="chunk_start", retention="lq", retention_power=2.0, retention_dual=dual)
        torch.testing.assert_close(make_retention(spec).weights(a), a, rtol=1e-14, atol=0)


def test_soft_threshold_is_the_proximal_map_of_the_l1_norm() -> None:
    """Section 4.3: argmin_w (w - z)^2 / 2 + gamma |w|."""
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    grid = torch.linspace(-3, 3, 60_001, dtype=torch.float64)
    cost = (grid - z[:, None]).square() / 2 + 0.7 * grid.abs()
    torch.testing.assert_close(soft_threshold(z, 0.7), grid[cost.argmin(1)], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "wanted"), [("softmax", "all must be positive"), ("bregman_logit", "between 0 and 1")]
)
def test_weights_outside_of_a_map_are_refused(kind, wanted) -> None:
    spec = MemorySpec(read_mode="chunk_start", retention=kind)
    with pytest.raises(ConfigError, match=wanted):
        MemoryState.fresh((torch.tensor([[[0.5, -0.1]]]),), 1, False, spec)


# --- the updates as printed, a token at a time ------------------------------------------------------------


def linear(draw_problem, **choices):
    return draw_problem(
        batch=1,
        heads=1,
        length=7,
        depth=1,
        momentum=False,
        norm="none",
        chunk_size=1,
        decay="zero",
        **choices,
    )


def gradients(p, t, w):
    """d/dW of the loss of token t for a linear memory."""
    k, v = p.k[0, t, 0], p.v[0, t, 0]
    return torch.outer(k, p.spec.loss().error(k @ w, v))


def test_memora_is_the_update_that_the_paper_prints(draw_problem, assert_close) -> None:
    """Invariant 18: W_t = c softmax(a_t log W_{t-1} - theta_t g_t)."""
    p = linear(draw_problem, retention="softmax", simplex_sum=2.0)
    w = 2.0 * torch.softmax(torch.log(p.initial[0][0]), 0)
    y, after = p.run("general")
    for t in range(7):
        a, theta = 1 - p.alpha[0, t, 0], p.theta[0, t, 0]
        w = 2.0 * torch.softmax(a * torch.log(w) - theta * gradients(p, t, w), 0)
        assert_close(y[0, t, 0], p.q[0, t, 0] @ w)
    assert_close(fast_weights(p.spec, after.weights)[0][0, 0], w)


def test_memora_stays_on_its_simplex_over_ten_thousand_steps(draw_problem) -> None:
    """Invariant 18: entries >= 0 and slices that sum to c, in float32."""
    p = draw_problem(
        length=10_000, heads=1, depth=1, momentum=False, norm="none", chunk_size=50, read_mode="chunk_start",
        decay="zero", retention="softmax", simplex_sum=2.0, dtype=torch.float32,
    )  # fmt: skip
    with torch.no_grad():
        _, after = p.run("general")
    (w,) = fast_weights(p.spec, after.weights)
    assert (w >= 0).all() and torch.isfinite(after.weights[0]).all()
    torch.testing.assert_close(w.sum(-2), torch.full((2, 1, 3), 2.0), rtol=1e-5, atol=1e-5)


def test_memora_without_writes_is_the_identity(draw_problem, assert_close) -> None:
    """Invariant 18: keep 1 and step 0."""
    p = draw_problem(retention="softmax", momentum=False, forget=False, read_mode="chunk_start")
    _, after = p.run("general", theta=torch.zeros_like(p.theta))
    for new, old in zip(after.weights, MemoryState.fresh(p.initial, 2, False, p.spec).weights, strict=True):
        assert torch.equal(new, old)


def test_memora_ignores_constants_of_its_logits(draw_problem, assert_close) -> None:
    """Invariant 18: one constant for each slice."""
    p = draw_problem(retention="softmax", momentum=False, read_mode="chunk_start", with_state=True)

    def moved(parts):
        return tuple(x + draw(*x.shape[:2], 1, x.shape[3], seed=i) for i, x in enumerate(parts))

    state = p.state._replace(weights=moved(p.state.weights), anchor=moved(p.state.anchor))
    y, after = p.run("general", state=state)
    expected, expected_after = p.run("general")
    assert_close(y, expected)
    assert_close(fast_weights(p.spec, after.weights), fast_weights(p.spec, expected_after.weights))


@pytest.mark.parametrize("dual", ["paper", "exact"])
def test_moneta_is_the_update_that_the_paper_prints(draw_problem, assert_close, dual) -> None:
    """Section 4.4: A_t = a_t A_{t-1} - theta_t grad l_3(W_{t-1}), W_t = A_t / ||A_t||_4^2."""
    p = linear(draw_problem, retention="lq", retention_dual=dual, inner_loss="lp")

    def of(a):
        norm = a.abs().pow(4).sum().pow(0.25)
        return (a if dual == "paper" else a**3) / norm**2

    w = p.initial[0][0]
    if dual == "paper":
        a = w / w.abs().pow(4).sum().pow(0.25) ** 2
    else:
        size = w.abs().pow(4 / 3).sum().pow(3 / 4)
        a = torch.sign(w) * w.abs() ** (1 / 3) * size ** (2 / 3)
    assert_close(of(a), w)
    y, _ = p.run("general")
    for t in range(7):
        a = (1 - p.alpha[0, t, 0]) * a - p.theta[0, t, 0] * gradients(p, t, of(a))
        assert_close(y[0, t, 0], p.q[0, t, 0] @ of(a))


def test_elastic_net_is_the_update_that_the_paper_prints(draw_problem, assert_close) -> None:
    """Section 4.3: W_t = Soft(lambda W_{t-1} - zeta g), and A_t = A_{t-1} - theta g with W_t = Soft(A_t)."""
    p = linear(draw_problem, retention="elastic_net", retention_threshold=0.1)
    w, (y, _) = p.initial[0][0], p.run("general")
    for t in range(7):
        w = soft_threshold((1 - p.alpha[0, t, 0]) * w - p.theta[0, t, 0] * gradients(p, t, w), 0.1)
        assert_close(y[0, t, 0], p.q[0, t, 0] @ w)
    assert (w == 0).any()
    p = p.replace(retention="elastic_net_ftrl", alpha=None)
    a, (y, _) = p.initial[0][0] + 0.1 * p.initial[0][0].sign(), p.run("general")
    for t in range(7):
        a = a - p.theta[0, t, 0] * gradients(p, t, soft_threshold(a, 0.1))
        assert_close(y[0, t, 0], p.q[0, t, 0] @ soft_threshold(a, 0.1))


def test_bregman_is_the_update_that_the_paper_prints(draw_problem, assert_close) -> None:
    """Section 4.3: W_t = (F')^-1(F'(W_{t-1}) - theta g) with F' = logit."""
    p = linear(draw_problem, retention="bregman_logit").replace(alpha=None)
    w, (y, _) = p.initial[0][0], p.run("general")
    for t in range(7):
        w = torch.sigmoid(torch.logit(w) - p.theta[0, t, 0] * gradients(p, t, w))
        assert_close(y[0, t, 0], p.q[0, t, 0] @ w)


def test_moneta_reads_with_the_scale_of_the_chunks_start(draw_problem, assert_close) -> None:
    """Section 4.4: the dual form on A, divided by the norm of A at the chunk's start."""
    p = draw_problem(
        batch=1, heads=1, length=3, depth=1, momentum=False, forget=False, norm="none", chunk_size=3,
        retention="lq", inner_loss="dot_product",
    )  # fmt: skip
    a = w = p.initial[0][0]
    norm = w.abs().pow(4).sum().pow(0.25)
    a, y = w / norm**2, p.run("general")[0]
    scale = 1 / a.abs().pow(4).sum().pow(0.25) ** 2
    for t in range(3):
        a = a + p.theta[0, t, 0] * torch.outer(p.k[0, t, 0], p.v[0, t, 0])
        assert_close(y[0, t, 0], p.q[0, t, 0] @ (a * scale))


# --- reductions -------------------------------------------------------------------------------------------


def test_moneta_of_two_and_two_is_titans_without_momentum(draw_problem, assert_close) -> None:
    """Invariant 17: c_l = 2."""
    p = draw_problem(momentum=False, length=9)
    expected = p.run("chunked", loss_scale=2.0)
    actual = p.run("general", retention="lq", retention_power=2.0, inner_loss="lp", loss_exponent=2.0)
    assert_close(actual[0], expected[0])
    assert_close(actual[1].weights, expected[1].weights)


@pytest.mark.parametrize("loss", ["yaad", "huber", "huber_norm"])
def test_an_unbounded_threshold_is_titans_and_none_freezes(draw_problem, assert_close, loss) -> None:
    """Invariant 17: delta -> inf, and delta -> 0."""
    p = draw_problem(momentum=False, forget=False, length=9, inner_loss=loss)
    expected = p.run("chunked", inner_loss="l2")
    far = torch.full((2, 9, 2), 1e9, dtype=torch.float64)
    assert_close(p.run("general", delta=far)[0], expected[0])
    _, after = p.run("general", delta=far * 1e-24)
    for w, learned in zip(after.weights, p.initial, strict=True):
        torch.testing.assert_close(w, learned.expand_as(w), rtol=0, atol=1e-12)


def test_the_huber_norm_bounds_each_gradient(draw_problem) -> None:
    """Invariant 17: its norm is at most delta ||k|| in a linear memory, with a delta of each token."""
    from nestor.ops.neural_memory import neural_memory

    p = draw_problem(depth=1, norm="none", inner_loss="huber_norm", delta="token", length=9)
    *_, surprise = neural_memory(
        p.q, p.k, p.v, p.theta, p.eta, p.alpha, p.initial, spec=p.spec, delta=p.delta, return_surprise=True
    )
    bound = p.delta * p.k.norm(dim=-1)
    assert (surprise <= bound * (1 + 1e-12)).all() and (surprise > 0.99 * bound).any()


# --- gates per channel and per matrix -----------------------------------------------------------------------


@pytest.mark.parametrize("network", ["mlp", "gated"])
def test_equal_gates_of_all_channels_are_gates_of_the_head(draw_problem, assert_close, network) -> None:
    """Section 4.4."""
    p = draw_problem(network=network, length=9, window=2)
    expected = p.run("general")[0]
    wide = {
        "theta": p.theta.unsqueeze(-1).expand(-1, -1, -1, 3),
        "alpha": p.alpha.unsqueeze(-1).expand(-1, -1, -1, 3),
    }
    assert_close(p.run("general", step_sizes="channel", forget_gates="channel", **wide)[0], expected)
    theta = p.theta.unsqueeze(-1).expand(-1, -1, -1, len(p.initial))
    assert_close(p.run("general", step_sizes="matrix", theta=theta)[0], expected)


def test_channels_of_a_linear_memory_are_memories_of_their_own(draw_problem, assert_close) -> None:
    """Section 4.4: without a norm, channel c with its gates is a memory with one output."""
    p = draw_problem(
        depth=1, norm="none", step_sizes="channel", forget_gates="channel", length=9, inner_loss="huber"
    )
    y, after = p.run("general")
    for c in range(3):
        one = p.replace(
            v=p.v[..., c : c + 1], theta=p.theta[..., c], alpha=p.alpha[..., c],
            initial=(p.initial[0][..., c : c + 1],), step_sizes="head", forget_gates="head",
        )  # fmt: skip
        expected, expected_after = one.run("general")
        assert_close(y[..., c : c + 1], expected)
        assert_close(after.weights[0][..., c : c + 1], expected_after.weights[0])


def test_a_step_of_zero_for_a_matrix_freezes_it(draw_problem) -> None:
    p = draw_problem(network="gated", step_sizes="matrix", forget=False, length=9)
    for frozen in range(3):
        theta = p.theta.detach().clone()
        theta[..., frozen] = 0.0
        _, after = p.run("general", theta=theta)
        for i, (w, learned) in enumerate(zip(after.weights, p.initial, strict=True)):
            assert torch.equal(w, learned.expand_as(w)) == (i == frozen)
