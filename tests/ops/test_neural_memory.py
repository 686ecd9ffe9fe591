"""The operation against its definition: outputs, state and every gradient, for every choice of the spec."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestor.ops.neural_memory import MemorySpec, neural_memory
from nestor.ops.neural_memory.spec import DECAYS, GRADIENT_PLACES, READ_MODES

NORMS = ("none", "residual", "residual_layernorm")
ANY_PROBLEM = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10_000),
        "length": st.sampled_from([1, 2, 5, 11]),
        "depth": st.integers(1, 4),
        "momentum": st.booleans(),
        "forget": st.booleans(),
        "with_state": st.booleans(),
        "with_start": st.booleans(),
        "masked": st.sampled_from([0.0, 0.3]),
        "reset": st.sampled_from([0.0, 0.25]),
        "chunk_size": st.sampled_from([1, 2, 3, 4, 7]),
        "activation": st.sampled_from(["gelu", "silu"]),
        "norm": st.sampled_from(NORMS),
        "inner_loss": st.sampled_from(["l2", "dot_product"]),
        "loss_scale": st.sampled_from([1.0, 2.0]),
        "read_mode": st.sampled_from(READ_MODES),
        "decay": st.sampled_from(DECAYS),
        "grad_at": st.sampled_from(GRADIENT_PLACES),
        "recompute": st.booleans(),
    }
)


@settings(max_examples=150)
@given(ANY_PROBLEM)
def test_chunked_form_equals_the_token_loop(
    draw_problem, oracle, assert_close, flat, gradients, options
) -> None:
    """Invariants 1, 2, 3, 8 and 23: outputs, W, S, anchor, phase and all gradients, in float64."""
    p = draw_problem(**options)
    actual, expected = p.run(), oracle(p)
    assert_close(flat(actual), flat(expected))
    assert torch.equal(actual[1].phase, expected[1].phase)
    found, wanted = gradients(p, lambda p: p.run()), gradients(p, oracle)
    for name in wanted:
        assert_close(found[name], wanted[name], 1e-9, name)


@settings(max_examples=60)
@given(ANY_PROBLEM)
def test_chunked_form_equals_the_reference_backend(
    draw_problem, assert_close, flat, gradients, options
) -> None:
    """Invariants 1, 2 and 23 between the two backends of the package."""
    p = draw_problem(**options)
    actual, expected = p.run(), p.run("reference")
    assert_close(flat(actual), flat(expected))
    assert torch.equal(actual[1].phase, expected[1].phase)
    found, wanted = gradients(p, lambda p: p.run()), gradients(p, lambda p: p.run("reference"))
    for name in wanted:
        assert_close(found[name], wanted[name], 1e-9, name)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("inner_loss", ["l2", "dot_product"])
def test_chunks_of_one_token_are_sequential_titans(
    draw_problem, memory_function, assert_close, depth, norm, inner_loss
):
    """Invariant 1: C = 1 is the paper's recurrence (section 2.1), with the previous state as anchor."""
    p = draw_problem(chunk_size=1, length=7, depth=depth, norm=norm, inner_loss=inner_loss, decay="zero")
    y, after = p.run()
    M = [w.expand(2, *w.shape) for w in p.initial]
    S = [torch.zeros_like(w) for w in M]
    for t in range(7):
        f = memory_function(p.spec, p.k[:, t], M, p.gamma, p.beta)
        difference = f - p.v[:, t]
        loss = (0.5 * difference.square() if inner_loss == "l2" else -f * p.v[:, t]).sum()
        g = torch.autograd.grad(loss, M, create_graph=True)
        theta, eta, alpha = (gate[:, t, :, None, None] for gate in (p.theta, p.eta, p.alpha))
        S = [eta * s - theta * x for s, x in zip(S, g, strict=True)]
        M = [(1 - alpha) * m + s for m, s in zip(M, S, strict=True)]
        assert_close(y[:, t], memory_function(p.spec, p.q[:, t], M, p.gamma, p.beta))
    assert_close(after.weights, M)
    assert_close(after.momentum, S)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("chunk", [2, 7, 16, 64])
@pytest.mark.parametrize("length", ["1", "C-1", "C", "3C+5"])
def test_every_length_equals_the_loop_with_a_frozen_anchor(
    draw_problem, oracle, assert_close, flat, depth, chunk, length
) -> None:
    """Invariant 2: C in {2, 7, 16, 64}; T = 1, T < C, T = C, T = 3C + 5."""
    tokens = {"1": 1, "C-1": chunk - 1, "C": chunk, "3C+5": 3 * chunk + 5}[length]
    p = draw_problem(chunk_size=chunk, length=tokens, depth=depth, width=4, hidden=6, step=1.0 / chunk)
    with torch.no_grad():
        assert_close(flat(p.run()), flat(oracle(p)))


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("inner_loss", ["l2", "dot_product"])
def test_explicit_inner_gradients_equal_autograd_and_differences(
    draw_problem, memory_function, loss_value, assert_close, depth, norm, inner_loss
) -> None:
    """Invariant 3: one write with theta = 1 and no other gate moves W by minus the gradient of the loss."""
    p = draw_problem(
        length=1, depth=depth, norm=norm, inner_loss=inner_loss, momentum=False, forget=False, loss_scale=1.5
    )
    p = p.replace(theta=torch.ones_like(p.theta))
    written = p.run()[1].weights
    W = [w.detach().expand(2, *w.shape).clone().requires_grad_() for w in p.initial]

    def loss(weights) -> torch.Tensor:
        return loss_value(p.spec, memory_function(p.spec, p.k[:, 0], weights, p.gamma, p.beta), p.v[:, 0])

    autograd = torch.autograd.grad(loss(W), W)
    for layer, (w, new, g) in enumerate(zip(W, written, autograd, strict=True)):
        assert_close(w - new, g)
        step = 1e-5
        for place in [(0, 0, 0, 0), (1, 1, -1, -1), (1, 0, 1, 2)]:
            bump = torch.zeros_like(w)
            bump[place] = step
            high, low = ([x + bump * sign if i == layer else x for i, x in enumerate(W)] for sign in (1, -1))
            difference = (loss(high) - loss(low)).item() / (2 * step)
            assert difference == pytest.approx(g[place].item(), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("norm", NORMS)
def test_two_and_more_layer_gradients_follow_the_explicit_formula(
    draw_problem, assert_close, depth, norm
) -> None:
    """Invariant 3, section 2.3: delta_l = (delta_{l+1} W^T) phi'(z), dW = a^T delta."""
    p = draw_problem(length=1, depth=depth, norm=norm, momentum=False, forget=False)
    p = p.replace(theta=torch.ones_like(p.theta))
    written = p.run()[1].weights
    for b in range(2):
        for h in range(2):
            W, x, v = [w[h] for w in p.initial], p.k[b, 0, h], p.v[b, 0, h]
            inputs, before = [x], []
            for layer in range(depth):
                before.append(inputs[-1] @ W[layer])
                inputs.append(before[-1] * torch.special.ndtr(before[-1]))
            z = before[-1]
            if norm == "residual_layernorm":
                s = torch.sqrt(z.var(unbiased=False) + p.spec.norm_eps)
                zh = (z - z.mean()) / s
                u = p.gamma[h] * (x + p.gamma[h] * zh + p.beta[h] - v)
                delta = (u - u.mean() - zh * (u * zh).mean()) / s
            else:
                delta = z - v + (x if norm == "residual" else 0.0)
            for layer in range(depth - 1, -1, -1):
                assert_close(W[layer] - written[layer][b, h], torch.outer(inputs[layer], delta))
                if layer:
                    z = before[layer - 1]
                    density = torch.exp(-z * z / 2) / (2 * torch.pi) ** 0.5
                    delta = (W[layer] @ delta) * (torch.special.ndtr(z) + z * density)


@pytest.mark.parametrize("read_mode", ["inclusive", "exclusive"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_linear_chunk_equals_the_masked_matmuls_of_the_paper(
    draw_problem, assert_close, read_mode, scale
) -> None:
    """Section 2.2 (invariant 2): U = c (K W0 - V), Y = A Q W0 + F Q S0 - (G . tril(Q K^T)) U, and W', S'."""
    p = draw_problem(
        depth=1,
        norm="none",
        decay="zero",
        chunk_size=6,
        length=6,
        with_state=True,
        read_mode=read_mode,
        loss_scale=scale,
    )
    p = p.replace(state=p.state._replace(anchor=p.state.weights, phase=torch.zeros(2, dtype=torch.int64)))
    y, after = p.run()
    for b in range(2):
        for h in range(2):
            Q, K, V = p.q[b, :, h], p.k[b, :, h], p.v[b, :, h]
            W0, S0 = p.state.weights[0][b, h], p.state.momentum[0][b, h]
            A, F, m = torch.ones(()), torch.zeros(()), torch.ones(())
            e = g = torch.zeros(6, dtype=torch.float64)
            stored = [(A, F, g)]
            for t in range(6):
                m = m * p.eta[b, t, h]
                e = p.eta[b, t, h] * e + p.theta[b, t, h] * torch.eye(6, dtype=torch.float64)[t]
                A = A * (1 - p.alpha[b, t, h])
                F = F * (1 - p.alpha[b, t, h]) + m
                g = g * (1 - p.alpha[b, t, h]) + e
                stored.append((A, F, g))
            A_C, F_C, G_C = stored[-1]
            used = stored[1:] if read_mode == "inclusive" else stored[:-1]
            A_t, F_t, G = (torch.stack([row[i].double() for row in used]) for i in range(3))
            U = scale * (K @ W0 - V)
            assert_close(y[b, :, h], A_t[:, None] * (Q @ W0) + F_t[:, None] * (Q @ S0) - (G * (Q @ K.T)) @ U)
            assert_close(after.weights[0][b, h], A_C * W0 + F_C * S0 - (G_C[:, None] * K).T @ U)
            assert_close(after.momentum[0][b, h], m * S0 - (e[:, None] * K).T @ U)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_surprise_is_the_norm_of_each_inner_gradient(draw_problem, assert_close, depth) -> None:
    """The third output is ||g_t|| over all layers, here read off a memory that only takes unit steps."""
    p = draw_problem(depth=depth, length=6, chunk_size=1, momentum=False, forget=False)
    arguments = (p.q, p.k, p.v, p.theta, None, None, p.initial)
    *_, surprise = neural_memory(*arguments, spec=p.spec, gamma=p.gamma, beta=p.beta, return_surprise=True)
    assert surprise.shape == (2, 6, 2) and not surprise.requires_grad
    state = None
    for t in range(6):
        before = [w.expand(2, *w.shape) for w in p.initial] if state is None else state.weights
        _, state = p.tokens(slice(t, t + 1)).run(state=state)
        squares = [((b - a) ** 2).sum((-1, -2)) for b, a in zip(before, state.weights, strict=True)]
        assert_close(surprise[:, t], torch.stack(squares).sum(0).sqrt() / p.theta[:, t])


def test_the_spec_defaults_are_the_recommended_titans() -> None:
    """Section 14: C = 64, N1 with eps 1e-3, GELU, L2 with c = 1, R1 reads; decay to the initial weights."""
    spec = MemorySpec()
    assert (spec.chunk_size, spec.norm, spec.norm_eps) == (64, "residual_layernorm", 1e-3)
    assert (spec.activation, spec.inner_loss, spec.loss_scale) == ("gelu", "l2", 1.0)
    assert (spec.read_mode, spec.decay, spec.grad_at) == ("inclusive", "initial", "pre_decay")
