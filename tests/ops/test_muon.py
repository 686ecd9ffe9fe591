"""Orthogonalised steps, and LaCT's rule by its release (spec/neural-memory.md sections 5.2 and 7)."""

import pytest
import torch

from nestor.ops.neural_memory.muon import newton_schulz, restore_norms

SCHEDULES = pytest.mark.parametrize("schedule", ["constant", "scheduled"])
LACT = {
    "network": "gated", "activation": "silu", "norm": "none", "inner_loss": "dot_product", "forget": False,
    "granularity": "chunk", "read_mode": "chunk_start", "renormalize": "rows", "step_sizes": "matrix",
    "chunk_size": 4,
}  # fmt: skip


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(n, seed):
    return torch.linalg.qr(draw(n, n, seed=seed)).Q


# --- Newton-Schulz: invariant 20 ----------------------------------------------------------------------------


@SCHEDULES
def test_singular_values_come_near_to_one(schedule) -> None:
    values = torch.linalg.svdvals(newton_schulz(draw(5, 64, 256), schedule))
    low, high = (0.65, 1.2) if schedule == "constant" else (0.95, 1.05)
    assert values.min() > low and values.max() < high


@SCHEDULES
def test_rank_is_kept_and_scale_is_not(schedule) -> None:
    x = draw(6, 2) @ draw(2, 9, seed=1)
    values = torch.linalg.svdvals(newton_schulz(x, schedule))
    assert (values[2:] < 1e-10).all() and (values[:2] > 0.6).all()
    for s in (1e-2, 7.0):
        torch.testing.assert_close(
            newton_schulz(s * x, schedule), newton_schulz(x, schedule), atol=1e-5, rtol=0
        )
    assert not newton_schulz(torch.zeros(2, 3, 4), schedule).any()


@SCHEDULES
@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (5, 5)])
def test_rotations_and_transposition_commute(schedule, shape) -> None:
    x, u, v = draw(*shape), rotation(shape[0], 1), rotation(shape[1], 2)
    ns = newton_schulz(x, schedule)
    torch.testing.assert_close(newton_schulz(u @ x @ v, schedule), u @ ns @ v, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(newton_schulz(x.mT, schedule), ns.mT, rtol=1e-9, atol=1e-9)


@SCHEDULES
def test_zero_surprise_has_a_finite_gradient(schedule) -> None:
    x = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(newton_schulz(x, schedule).sum(), x)
    assert torch.isfinite(grad).all()


# --- Muon: section 5.2 --------------------------------------------------------------------------------------


def test_a_chunk_ends_with_one_orthogonalised_step(draw_problem, assert_close) -> None:
    """W' = A_C (W_0 - M) + M + mean(step) NS(S_C), with S the surprise of the same memory without Muon."""
    p = draw_problem(optimizer="muon", length=4, with_state=True, with_step=True)
    p = p.replace(
        state=p.state._replace(
            phase=torch.zeros(2, dtype=torch.int64),
            pooled=torch.tensor([1.0, 0, 0, 0], dtype=torch.float64).expand(2, 2, 4),
        )
    )
    _, after = p.run("general")
    plain = p.replace(optimizer="gd", step=None, state=p.state._replace(pooled=None))
    _, expected = plain.run("chunked")
    assert_close(after.momentum, expected.momentum)
    kept = (1 - p.alpha).prod(1)[..., None, None]
    step = p.step.mean(1)[..., None, None]
    for w, a, m, s in zip(after.weights, p.state.anchor, p.initial, expected.momentum, strict=True):
        assert_close(w, kept * (a - m) + m + step * newton_schulz(s))


def test_reads_inside_of_a_chunk_are_not_orthogonalised(draw_problem, assert_close) -> None:
    """Section 5.2, REC: up to the end of the first chunk they are those of gradient descent."""
    p = draw_problem(optimizer="muon", length=9)
    y, expected = p.run("general")[0], p.run("chunked", optimizer="gd")[0]
    assert_close(y[:, :4], expected[:, :4])
    assert (y[:, 4:] - expected[:, 4:]).abs().max() > 1e-3


@pytest.mark.parametrize("per_token", [False, True])
def test_orthogonalised_steps_descend(draw_problem, per_token) -> None:
    """Section 5.1: of the sign errors of the paper, (-grad, +NS) is one of the two that descend."""
    p = draw_problem(
        depth=1, norm="none", batch=1, heads=1, length=16, chunk_size=4, optimizer="muon", with_step=True,
        muon_per_token=per_token, forget=False,
    )  # fmt: skip
    p = p.replace(step=torch.full_like(p.step, 0.01), eta=torch.zeros_like(p.eta) + 0.9)
    k, v = p.k[0, :4, 0], p.v[0, :4, 0]
    repeated = {n: getattr(p, n)[:, :4].repeat(1, 4, 1, 1) for n in ("q", "k", "v")}
    _, after = p.run("general", **repeated)

    def loss(w):
        return (k @ w - v).square().sum()

    assert loss(after.weights[0][0, 0]) < loss(p.initial[0][0])


def test_per_token_muon_is_the_rule_that_the_paper_prints(draw_problem, assert_close) -> None:
    """Section 5.1, with C = 1: S_t = eta_t S - theta_t grad, W_t = a_t W_{t-1} + step_t NS(S_t)."""
    p = draw_problem(
        depth=1, norm="none", batch=1, heads=1, length=6, chunk_size=1, optimizer="muon", with_step=True,
        decay="zero",
    )  # fmt: skip
    w, s = p.initial[0][0], torch.zeros(3, 3, dtype=torch.float64)
    found = [p.run("general", muon_per_token=per_token)[0] for per_token in (True, False)]
    for t in range(6):
        k, v = p.k[0, t, 0], p.v[0, t, 0]
        s = p.eta[0, t, 0] * s - p.theta[0, t, 0] * torch.outer(k, k @ w - v)
        w = (1 - p.alpha[0, t, 0]) * w + p.step[0, t, 0] * newton_schulz(s)
        for y in found:
            assert_close(y[0, t, 0], p.q[0, t, 0] @ w)


# --- LaCT: section 7.1, invariants 14 and 22 ----------------------------------------------------------------


def release_(p, schedule):
    """The rule as the release writes it: columns convention, one sequence and head, whole chunks."""
    w0, w1, w2 = (w[0].T for w in p.initial)
    norms = [w.norm(dim=1, keepdim=True) for w in (w0, w1, w2)]
    buffers, outputs = [0.0, 0.0, 0.0], []
    silu = torch.nn.functional.silu
    for first in range(0, p.q.shape[1], 4):
        part = slice(first, first + 4)
        q, k, v = (x[0, part, 0].T for x in (p.q, p.k, p.v))
        lr0, lr1, lr2 = p.theta[0, part, 0].T
        outputs.append((w1 @ (silu(w0 @ q) * (w2 @ q))).T)
        g, u = w0 @ k, w2 @ k
        hid, dh = silu(g) * u, w1.T @ v
        s = torch.sigmoid(g)
        d1 = (lr1 * v) @ hid.T
        d0 = (lr0 * (dh * u * (s * (1 + g * (1 - s))))) @ k.T
        d2 = (lr2 * (dh * silu(g))) @ k.T
        mu = 0.0 if p.eta is None else p.eta[0, part, 0].mean()
        buffers = [d + mu * b for d, b in zip((d0, d1, d2), buffers, strict=True)]
        steps = [newton_schulz(b, schedule) if p.spec.optimizer == "muon" else b for b in buffers]
        w0, w1, w2 = (
            (w + s) / ((w + s).norm(dim=1, keepdim=True) + 1e-5) * n
            for w, s, n in zip((w0, w1, w2), steps, norms, strict=True)
        )
    return torch.cat(outputs), [w.T for w in (w0, w1, w2)], [b.T for b in buffers]


@pytest.mark.parametrize("optimizer", ["gd", "muon"])
@pytest.mark.parametrize("momentum", [True, False])
def test_lact_is_the_rule_of_its_release(draw_problem, assert_close, optimizer, momentum) -> None:
    p = draw_problem(
        **LACT, batch=1, heads=1, length=12, optimizer=optimizer, momentum=momentum, newton_schulz="scheduled"
    )
    y, after = p.run("general")
    outputs, weights, buffers = release_(p, "scheduled")
    assert_close(y[0, :, 0], outputs)
    assert_close([w[0, 0] for w in after.weights], weights)
    if momentum:
        assert_close([s[0, 0] for s in after.momentum], buffers)


@pytest.mark.parametrize("optimizer", ["gd", "muon"])
def test_rows_keep_their_norms(draw_problem, optimizer) -> None:
    """Invariant 22: out x in rows, which are columns here; after every update."""
    p = draw_problem(**LACT, optimizer=optimizer, length=13)
    _, after = p.run("general")
    for w, learned in zip(after.weights, p.initial, strict=True):
        wanted = learned.norm(dim=-2).expand_as(w[..., 0, :])
        torch.testing.assert_close(w.norm(dim=-2), wanted, rtol=1e-4, atol=0)


def test_restored_norms_are_those_of_each_output_unit() -> None:
    w, initial = draw(2, 3, 4), draw(2, 3, 4, seed=1)
    found = restore_norms(w, initial)
    torch.testing.assert_close(found.norm(dim=-2), initial.norm(dim=-2), rtol=1e-4, atol=0)
    torch.testing.assert_close(found / found.norm(dim=-2, keepdim=True), w / w.norm(dim=-2, keepdim=True))


def test_the_first_chunk_reads_the_learned_weights_and_tokens_act_in_later_chunks(draw_problem) -> None:
    """Invariant 22."""
    p = draw_problem(**LACT, optimizer="muon", length=12)
    with torch.no_grad():
        y, _ = p.run("general")
        fresh = p.run("general", k=torch.randn_like(p.k), v=torch.randn_like(p.v))[0]
        assert torch.equal(fresh[:, :4], y[:, :4]) and (fresh[:, 4:] - y[:, 4:]).abs().amax() > 1e-3
        k = p.k.clone()
        k[:, 5] += 1.0
        moved = p.run("general", k=k)[0]
    assert torch.equal(moved[:, :8], y[:, :8])
    assert (moved[:, 8:] - y[:, 8:]).abs().amax((0, 2, 3)).min() > 1e-5


def test_muon_ignores_the_scale_of_all_steps(draw_problem, assert_close) -> None:
    """Invariant 22: without momentum."""
    p = draw_problem(**LACT, optimizer="muon", momentum=False, length=9)
    assert_close(p.run("general", theta=p.theta * 7.0)[0], p.run("general")[0], 1e-5)
    other = p.replace(optimizer="gd")
    assert (other.run("general", theta=p.theta * 7.0)[0] - other.run("general")[0]).abs().max() > 1e-3


@pytest.mark.parametrize("optimizer", ["gd", "muon"])
def test_the_order_inside_of_a_chunk_is_invisible_to_lact(draw_problem, assert_close, optimizer) -> None:
    """Invariant 14: always, with any step sizes and momentum, as the chunk is one step."""
    p = draw_problem(**LACT, optimizer=optimizer, length=8)
    permuted = p.tokens(torch.tensor([2, 0, 3, 1, 5, 7, 6, 4]))
    assert_close(permuted.run("general")[1].weights, p.run("general")[1].weights)
    across = p.tokens(torch.tensor([4, 1, 2, 3, 0, 5, 6, 7])).run("general")[1]
    assert (across.weights[0] - p.run("general")[1].weights[0]).abs().max() > 1e-4


def test_an_open_chunk_is_applied_but_not_written(draw_problem) -> None:
    """Section 7.1: until it closes, what it learned is pending."""
    p = draw_problem(**LACT, length=3)
    _, after = p.run("general")
    for w, learned, pending in zip(after.weights, p.initial, after.pending, strict=True):
        assert torch.equal(w, learned.expand_as(w)) and pending.any()


def test_semantics_a_and_b_differ_by_how_often_they_decay(draw_problem, assert_close) -> None:
    """Section 1.2: with equal gates, token granularity decays C times a chunk; without decay both agree."""
    p = draw_problem(depth=1, length=8, momentum=False, read_mode="chunk_start")
    a, b = (p.run("general", granularity=g)[1].weights[0] for g in ("token", "chunk"))
    assert (a - b).abs().max() > 1e-3
    p = p.replace(alpha=None)
    a, b = (p.run("general", granularity=g)[1].weights[0] for g in ("token", "chunk"))
    assert_close(a, b)
