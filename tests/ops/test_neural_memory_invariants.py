"""Memories whose answer is known: special settings of the gates reduce the operation to named models.

Numbers in the docstrings are those of spec section 13. Expected values are computed here from closed forms.
"""

import pytest
import torch
from torch import Tensor

LINEAR = {"depth": 1, "norm": "none", "decay": "zero"}


def products(gate: Tensor) -> Tensor:
    """Lower-triangular matrix of prod_{s=j+1..t} gate_s, one product at a time."""
    found = gate.new_zeros(len(gate), len(gate))
    for t in range(len(gate)):
        for j in range(t + 1):
            found[t, j] = gate[j + 1 : t + 1].prod()
    return found


# --- delta rules --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_without_gates_a_linear_memory_is_the_delta_rule(draw_problem, assert_close, scale) -> None:
    """Invariant 9 and section 2.6: W <- W + beta k^T (v - k W) with beta = c theta."""
    p = draw_problem(**LINEAR, chunk_size=1, momentum=False, forget=False, loss_scale=scale)
    y, after = p.run()
    for b in range(2):
        for h in range(2):
            W = p.initial[0][h]
            for t in range(9):
                k, v, beta = p.k[b, t, h], p.v[b, t, h], scale * p.theta[b, t, h]
                W = W + beta * torch.outer(k, v - k @ W)
                assert_close(y[b, t, h], p.q[b, t, h] @ W)
            assert_close(after.weights[0][b, h], W)


def test_orthonormal_keys_recall_every_stored_pair_exactly(draw_problem, assert_close) -> None:
    """Invariant 9: beta = 1, W0 = 0 and orthonormal keys give k_i W = v_i for every i."""
    p = draw_problem(**LINEAR, chunk_size=1, momentum=False, forget=False, width=8, length=8)
    keys = torch.linalg.qr(torch.randn(2, 2, 8, 8, dtype=torch.float64)).Q.transpose(1, 2)
    p = p.replace(
        k=keys, theta=torch.ones_like(p.theta), initial=(torch.zeros(2, 8, 8, dtype=torch.float64),)
    )
    _, after = p.run()
    assert_close(torch.einsum("bthi,bhio->btho", keys, after.weights[0]), p.v, 1e-13)
    asked = p.replace(q=p.k[:, :1].expand_as(p.k))
    assert_close(asked.run()[0], p.v[:, :1].expand_as(p.v), 1e-13)


def gated_delta_net(p, b: int, h: int) -> Tensor:
    W, outputs = p.initial[0][h], []
    for t in range(p.q.shape[1]):
        k, v, beta, a = p.k[b, t, h], p.v[b, t, h], p.theta[b, t, h], 1 - p.alpha[b, t, h]
        W = a * (W - beta * torch.outer(k, k @ W)) + beta * torch.outer(k, v)
        outputs.append(p.q[b, t, h] @ W)
    return torch.stack(outputs)


def test_gradients_after_the_decay_give_gated_delta_net(draw_problem, assert_close) -> None:
    """Invariant 10: W <- a (W - beta k^T (k W)) + beta k^T v."""
    p = draw_problem(**LINEAR, chunk_size=1, momentum=False, grad_at="post_decay")
    y, _ = p.run()
    for b in range(2):
        for h in range(2):
            assert_close(y[b, :, h], gated_delta_net(p, b, h))


def test_gradients_before_the_decay_are_not_gated_delta_net(draw_problem, assert_close) -> None:
    """Invariant 10: Titans' pre-decay gradient differs, unless nothing is forgotten."""
    p = draw_problem(**LINEAR, chunk_size=1, momentum=False, grad_at="pre_decay")
    y, _ = p.run()
    assert (y[0, 1:, 0] - gated_delta_net(p, 0, 0)[1:]).abs().min() > 1e-6
    p = p.replace(alpha=torch.zeros_like(p.alpha))
    assert_close(p.run()[0][0, :, 0], gated_delta_net(p, 0, 0))


# --- linear attention ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 4, 9, 64])
@pytest.mark.parametrize("forget", [True, False])
def test_dot_product_loss_is_gated_linear_attention_for_any_chunk(
    draw_problem, assert_close, chunk, forget
) -> None:
    """Invariant 11: Y = ((Q K^T) . D) diag(theta) V + diag(A) Q W0; without decay plain linear attention."""
    p = draw_problem(**LINEAR, chunk_size=chunk, momentum=False, forget=forget, inner_loss="dot_product")
    y, _ = p.run()
    for b in range(2):
        for h in range(2):
            Q, K, V, theta = p.q[b, :, h], p.k[b, :, h], p.v[b, :, h], p.theta[b, :, h]
            a = 1 - p.alpha[b, :, h] if forget else torch.ones_like(theta)
            A = torch.stack([a[: t + 1].prod() for t in range(9)])
            attention = (Q @ K.T) * (products(a) if forget else torch.ones(9, 9).tril().double())
            assert_close(y[b, :, h], (attention * theta) @ V + A[:, None] * (Q @ p.initial[0][h]))


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_dot_product_loss_with_momentum_is_chunk_size_independent(draw_problem, assert_close, chunk) -> None:
    """Invariant 12: G = D Em diag(theta), the whole sequence in one matrix whatever the chunk size is."""
    p = draw_problem(**LINEAR, chunk_size=chunk, inner_loss="dot_product")
    y, _ = p.run()
    for b in range(2):
        for h in range(2):
            Q, K, V, theta = p.q[b, :, h], p.k[b, :, h], p.v[b, :, h], p.theta[b, :, h]
            a = 1 - p.alpha[b, :, h]
            G = products(a) @ products(p.eta[b, :, h]) * theta
            A = torch.stack([a[: t + 1].prod() for t in range(9)])
            assert_close(y[b, :, h], (G * (Q @ K.T)) @ V + A[:, None] * (Q @ p.initial[0][h]))


def test_constant_gates_match_the_geometric_closed_form(draw_problem, assert_close) -> None:
    """Invariant 12 and section 1.3: G_tj = theta (a^{n+1} - eta^{n+1}) / (a - eta), n = t - j."""
    p = draw_problem(**LINEAR, chunk_size=4, inner_loss="dot_product", batch=1, heads=1)
    theta, eta, alpha = 0.2, 0.6, 0.1
    p = p.replace(
        theta=torch.full_like(p.theta, theta),
        eta=torch.full_like(p.eta, eta),
        alpha=torch.full_like(p.alpha, alpha),
    )
    a = 1 - alpha
    n = torch.arange(9, dtype=torch.float64)[:, None] - torch.arange(9)
    G = (theta * (a ** (n + 1) - eta ** (n + 1)) / (a - eta)).tril()
    A = a ** torch.arange(1, 10, dtype=torch.float64)
    Q, K, V = p.q[0, :, 0], p.k[0, :, 0], p.v[0, :, 0]
    expected = (G * (Q @ K.T)) @ V + A[:, None] * (Q @ p.initial[0][0])
    assert_close(p.run()[0][0, :, 0], expected)


# --- TTT ----------------------------------------------------------------------------------------------------


def ttt_layer_norm_gradient(z: Tensor, target: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """d/dz of 1/2 ||gamma LN(z) + beta - target||^2 as ttt-lm-pytorch writes it."""
    D = z.shape[-1]
    std = torch.sqrt(z.var(-1, keepdim=True, unbiased=False) + eps)
    x_hat = (z - z.mean(-1, keepdim=True)) / std
    g = (gamma * x_hat + beta - target) * gamma
    return (D * g - g.sum(-1, keepdim=True) - x_hat * (g * x_hat).sum(-1, keepdim=True)) / (D * std)


@pytest.mark.parametrize("depth", [1, 2])
def test_without_gates_chunks_are_ttt_mini_batches(draw_problem, assert_close, depth) -> None:
    """Invariant 13: a TTT-Linear or TTT-MLP step on the target v - k, its learning rate in place of theta."""
    p = draw_problem(depth=depth, chunk_size=4, length=8, width=4, momentum=False, forget=False)
    y, after = p.run()
    for b in range(2):
        for h in range(2):
            W, gamma, beta = [w[h] for w in p.initial], p.gamma[h], p.beta[h]
            for part in (slice(0, 4), slice(4, 8)):
                Q, K, V, rate = p.q[b, part, h], p.k[b, part, h], p.v[b, part, h], p.theta[b, part, h]
                Z1 = K @ W[0]
                X2 = torch.nn.functional.gelu(Z1)
                last = Z1 if depth == 1 else X2 @ W[1]
                deltas = [ttt_layer_norm_gradient(last, V - K, gamma, beta, p.spec.norm_eps)]
                if depth == 2:
                    density = torch.exp(-0.5 * Z1.square()) / (2 * torch.pi) ** 0.5
                    deltas.insert(0, deltas[0] @ W[1].T * (torch.special.ndtr(Z1) + Z1 * density))
                lower = rate * torch.ones(4, 4, dtype=torch.float64).tril()
                z = Q
                for layer, (w, keys, delta) in enumerate(zip(W, (K, X2), deltas, strict=False)):
                    z = torch.nn.functional.gelu(z) if layer else z
                    z = z @ w - (lower * (z @ keys.T)) @ delta
                normed = torch.nn.functional.layer_norm(z, (4,), eps=p.spec.norm_eps)
                assert_close(y[b, part, h], Q + gamma * normed + beta)
                W = [w - (rate[:, None] * x).T @ d for w, x, d in zip(W, (K, X2), deltas, strict=False)]
            for layer, w in enumerate(W):
                assert_close(after.weights[layer][b, h], w)


# --- symmetries ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_order_inside_a_chunk_is_invisible_without_gates(draw_problem, assert_close, depth) -> None:
    """Invariant 14: frozen gradients commute, so the chunk-end state ignores the order of the tokens."""
    p = draw_problem(depth=depth, chunk_size=4, length=8, momentum=False, forget=False)
    p = p.replace(theta=torch.full_like(p.theta, 0.2))
    permuted = p.tokens(torch.tensor([2, 0, 3, 1, 5, 7, 6, 4]))
    assert_close(permuted.run()[1].weights, p.run()[1].weights)
    across = p.tokens(torch.tensor([4, 1, 2, 3, 0, 5, 6, 7]))
    assert (across.run()[1].weights[0] - p.run()[1].weights[0]).abs().max() > 1e-4


@pytest.mark.parametrize("change", ["single-token chunks", "decay"])
def test_order_matters_with_small_chunks_or_decay(draw_problem, change) -> None:
    """Invariant 14: with C = 1 or alpha > 0 the order is visible."""
    p = draw_problem(chunk_size=4, length=4, momentum=False, forget=change == "decay")
    p = p.replace(theta=torch.full_like(p.theta, 0.2))
    if change == "decay":
        p = p.replace(alpha=torch.full_like(p.alpha, 0.3))
    else:
        p = p.replace(chunk_size=1)
    permuted = p.tokens(torch.tensor([2, 0, 3, 1]))
    assert (permuted.run()[1].weights[0] - p.run()[1].weights[0]).abs().max() > 1e-4


def rotation(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q


@pytest.mark.parametrize("decay", ["zero", "initial"])
@pytest.mark.parametrize("inner_loss", ["l2", "dot_product"])
def test_rotated_keys_and_rotated_values_rotate_the_memory(
    draw_problem, assert_close, decay, inner_loss
) -> None:
    """Invariant 15: (kR, qR, R^T W) changes nothing; (vR', W R') rotates the outputs."""
    p = draw_problem(depth=1, norm="none", decay=decay, inner_loss=inner_loss, with_state=True)
    y, after = p.run()
    R = rotation(3, 0)

    def moved(change) -> dict:
        parts = (tuple(change(w) for w in part) for part in p.state[:3])
        return {"initial": (change(p.initial[0]),), "state": type(p.state)(*parts, p.state.phase)}

    turned, turned_after = p.replace(q=p.q @ R, k=p.k @ R, **moved(lambda w: R.T @ w)).run()
    assert_close(turned, y)
    assert_close(turned_after.momentum[0], R.T @ after.momentum[0])
    turned, turned_after = p.replace(v=p.v @ R, **moved(lambda w: w @ R)).run()
    assert_close(turned, y @ R)
    assert_close(turned_after.weights[0], after.weights[0] @ R)


# --- limits of the gates ------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("norm", ["none", "residual_layernorm"])
def test_forgetting_everything_leaves_the_momentum(draw_problem, assert_close, depth, norm) -> None:
    """Invariant 16: alpha_t = 1 gives W_t = S_t with decay to zero, and M + S_t with decay to M."""
    p = draw_problem(depth=depth, norm=norm, decay="zero", with_state=True)
    p = p.replace(alpha=torch.ones_like(p.alpha))
    _, after = p.run()
    assert_close(after.weights, after.momentum)
    _, after = p.replace(decay="initial").run()
    assert_close(after.weights, tuple(m + s for m, s in zip(p.initial, after.momentum, strict=True)))


def test_forgetting_everything_still_depends_on_the_past(draw_problem, assert_close) -> None:
    """Invariant 16: alpha = 1, eta = 0, C = 1 gives W_t = -theta_t g_t, in which g_t is taken at W_{t-1}."""
    p = draw_problem(**LINEAR, chunk_size=1, length=1, with_state=True)
    p = p.replace(alpha=torch.ones_like(p.alpha), eta=torch.zeros_like(p.eta))
    _, after = p.run()
    k, v, theta = p.k[0, 0, 0], p.v[0, 0, 0], p.theta[0, 0, 0]
    anchor = p.state.anchor[0][0, 0]
    assert_close(after.weights[0][0, 0], -theta * torch.outer(k, k @ anchor - v))
    other = p.state._replace(anchor=(p.state.anchor[0] + 1.0,))
    assert (p.run(state=other)[1].weights[0] - after.weights[0]).abs().max() > 1e-3


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("momentum", [True, False])
def test_closed_gates_keep_the_state_constant(draw_problem, depth, momentum) -> None:
    """Invariant 8: with alpha = 0, eta = 0, theta = 0 every query reads the initial weights, exactly."""
    p = draw_problem(depth=depth, momentum=momentum, decay="zero")
    p = p.replace(theta=torch.zeros_like(p.theta), alpha=torch.zeros_like(p.alpha))
    if momentum:
        p = p.replace(eta=torch.zeros_like(p.eta))
    _, after = p.run()
    for w, new in zip(p.initial, after.weights, strict=True):
        assert torch.equal(new, w.expand_as(new))
    for s in after.momentum:
        assert not s.any()


@pytest.mark.parametrize("decay", ["zero", "initial"])
@pytest.mark.parametrize("depth", [1, 2])
def test_gates_of_exactly_zero_and_one_are_exact(
    draw_problem, oracle, assert_close, flat, gradients, decay, depth
) -> None:
    """Section 1.3: nothing divides or takes a logarithm, so values and gradients stay finite and right."""
    for seed in range(6):
        p = draw_problem(seed, depth=depth, decay=decay, length=11)
        generator = torch.Generator().manual_seed(seed)

        def corner(gate: Tensor, scale: float = 1.0) -> Tensor:
            return (torch.randint(0, 2, gate.shape, generator=generator).double() * scale).requires_grad_()

        p = p.replace(theta=corner(p.theta, 0.2), eta=corner(p.eta), alpha=corner(p.alpha))
        assert_close(flat(p.run()), flat(oracle(p)))
        found, wanted = gradients(p, lambda p: p.run()), gradients(p, oracle)
        for name in wanted:
            assert torch.isfinite(found[name]).all(), name
            assert_close(found[name], wanted[name], 1e-9, name)


def test_eta_of_zero_equals_a_memory_without_momentum(draw_problem, assert_close) -> None:
    """Section 1.3: no momentum is eta = 0."""
    p = draw_problem(length=11)
    gated, after = p.run(eta=torch.zeros_like(p.eta))
    plain, expected = p.run(eta=None)
    assert_close(gated, plain)
    assert_close(after.weights, expected.weights)


def test_alpha_of_zero_equals_a_memory_that_never_forgets(draw_problem, assert_close, flat) -> None:
    for decay in ("zero", "initial"):
        p = draw_problem(length=11, decay=decay)
        assert_close(flat(p.run(alpha=torch.zeros_like(p.alpha))), flat(p.run(alpha=None)))


def test_chunk_sizes_are_different_functions(draw_problem) -> None:
    """Section 1.2: the anchor changes the function; with the L2 loss chunk sizes do not agree."""
    p = draw_problem(length=8)
    outputs = [p.run(chunk_size=c)[0] for c in (1, 2, 4, 8)]
    for i, first in enumerate(outputs):
        for other in outputs[i + 1 :]:
            assert (first - other).abs().max() > 1e-3
