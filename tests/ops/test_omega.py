"""The Omega rule: losses over a window of tokens (spec/neural-memory.md sections 5.1 and 5.2)."""

import pytest
import torch

LINEAR = {"depth": 1, "norm": "none", "batch": 1, "heads": 1}


@pytest.mark.parametrize("network", ["mlp", "gated"])
@pytest.mark.parametrize("omega", ["none", "token", "offset"])
def test_a_window_of_one_is_titans(draw_problem, assert_close, flat, network, omega) -> None:
    """Invariant 19: with gamma = 1; and gamma is then a factor of the step."""
    p = draw_problem(length=9, network=network, omega=omega, window=1)
    expected = p.replace(omega=None)
    if omega != "none":
        expected = expected.replace(theta=p.theta * p.omega.reshape(p.theta.shape))
    assert_close(flat(p.run("general")), flat(expected.run("general")))
    if network == "mlp":
        assert_close(flat(p.run(None)), flat(expected.run("chunked")))


def test_gates_of_a_window_that_select_the_token_alone_are_titans(draw_problem, assert_close) -> None:
    """Invariant 19: the banded matrix is the identity."""
    p = draw_problem(length=9, window=3, omega="offset")
    alone = torch.zeros_like(p.omega)
    alone[..., 0] = 1.0
    assert_close(p.run("general", omega=alone)[0], p.run("chunked", omega=None, window=1)[0])


@pytest.mark.parametrize("by_offset", [False, True])
def test_linear_omega_net_is_the_rule_that_the_paper_prints(draw_problem, assert_close, by_offset) -> None:
    """Section 5.1, c = 3, C = 1: W_t = a_t W_{t-1} - theta_t sum_i gamma k_i^T (k_i W_{t-1} - v_i)."""
    p = draw_problem(
        **LINEAR, length=8, chunk_size=1, momentum=False, decay="zero", window=3,
        omega="offset" if by_offset else "token",
    )  # fmt: skip
    w, (y, _) = p.initial[0][0], p.run("general")
    for t in range(8):
        g = torch.zeros_like(w)
        for i in range(max(0, t - 2), t + 1):
            k, v = p.k[0, i, 0], p.v[0, i, 0]
            gate = p.omega[0, t, 0, t - i] if by_offset else p.omega[0, i, 0]
            g = g + gate * torch.outer(k, k @ w - v)
        w = (1 - p.alpha[0, t, 0]) * w - p.theta[0, t, 0] * g
        assert_close(y[0, t, 0], p.q[0, t, 0] @ w)


@pytest.mark.parametrize("chunk", [4, 9])
def test_a_window_of_everything_sums_every_past_gradient_at_the_anchor(
    draw_problem, assert_close, chunk
) -> None:
    """Invariant 19: c >= T without decay and momentum; the halo is recomputed at the new anchor."""
    p = draw_problem(**LINEAR, length=8, chunk_size=chunk, momentum=False, forget=False, window=10)
    w = anchor = p.initial[0][0]
    y, _ = p.run("general")
    for t in range(8):
        anchor = w if t % chunk == 0 else anchor
        k, v = p.k[0, : t + 1, 0], p.v[0, : t + 1, 0]
        w = w - p.theta[0, t, 0] * k.T @ (k @ anchor - v)
        assert_close(y[0, t, 0], p.q[0, t, 0] @ w)


def test_atlas_orthogonalises_the_surprise_of_the_window(draw_problem, assert_close) -> None:
    """Section 5.1: S_t = eta_t S_{t-1} - theta_t grad loss_t, of the window's loss."""
    from nestor.ops.neural_memory.muon import newton_schulz

    p = draw_problem(
        **LINEAR, length=4, chunk_size=4, window=2, omega="token", optimizer="muon", decay="zero",
        read_mode="chunk_start",
    )  # fmt: skip
    w, s, kept = p.initial[0][0], torch.zeros(3, 3, dtype=torch.float64), 1.0
    for t in range(4):
        s = p.eta[0, t, 0] * s
        for i in range(max(0, t - 1), t + 1):
            k, v = p.k[0, i, 0], p.v[0, i, 0]
            s = s - p.theta[0, t, 0] * p.omega[0, i, 0] * torch.outer(k, k @ w - v)
        kept = kept * (1 - p.alpha[0, t, 0])
    _, after = p.run("general")
    assert_close(after.momentum[0][0, 0], s)
    assert_close(after.weights[0][0, 0], kept * w + newton_schulz(s))


def test_the_halo_is_the_last_tokens(draw_problem) -> None:
    p = draw_problem(length=9, window=4, omega="token")
    _, after = p.run("general")
    k, v, gate = after.halo
    assert torch.equal(k, p.k[:, -3:].transpose(1, 2)) and torch.equal(v, p.v[:, -3:].transpose(1, 2))
    assert torch.equal(gate, p.omega[:, -3:].transpose(1, 2))
    _, after = p.tokens(slice(0, 2)).run("general")
    assert after.halo[2].ne(0).sum(-1).tolist() == [[2, 2], [2, 2]]
    assert torch.equal(after.halo[0][:, :, 1:], p.k[:, :2].transpose(1, 2))


@pytest.mark.parametrize("what", ["reset", "mask"])
def test_resets_empty_the_halo_and_masked_tokens_are_not_in_it(draw_problem, what) -> None:
    p = draw_problem(length=6, window=4)
    flags = torch.zeros(2, 6, dtype=torch.bool)
    flags[:, 4] = True
    _, after = p.run("general", **({"resets": flags} if what == "reset" else {"mask": ~flags}))
    gate = after.halo[2]
    kept = [0.0, 1.0, 1.0] if what == "reset" else [1.0, 1.0, 1.0]
    assert gate[0, 0].tolist() == kept
    index = [4, 5] if what == "reset" else [2, 3, 5]
    assert torch.equal(after.halo[0][:, :, -len(index) :], p.k[:, index].transpose(1, 2))
