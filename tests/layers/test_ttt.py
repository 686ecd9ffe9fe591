"""TTT-Linear and TTT-MLP: the layer against mini-batch steps written out."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from nestor import NestorForCausalLM, preset
from nestor.errors import ConfigError
from nestor.layers.registry import build_mixer
from nestor.layers.span import Span
from nestor.layers.ttt import TTT
from nestor.ops.neural_memory import MemorySpec, neural_memory

EXACT = {"rtol": 1e-9, "atol": 1e-10}


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def network(x, weights, gamma, beta, eps):
    """x + LN(f_res(x)) for x `[H, C, p]`."""
    z = x
    for layer, w in enumerate(weights):
        z = z @ w
        if layer + 1 < len(weights):
            z = F.gelu(z)
    return x + gamma[:, None] * F.layer_norm(z, z.shape[-1:], eps=eps) + beta[:, None]


def mini_batches(q, k, v, step, weights, gamma, beta, eps, size):
    """Section 8 with position factors of 1, a sequence at a time: q, k, v `[T, H, p]`, step `[T, H]`.

    W_t = W - sum_{j <= t} eta_j grad_j with all gradients at the weights W of the mini-batch's start.
    """
    outputs = []
    for start in range(0, len(q), size):
        anchor = [w.detach().requires_grad_() for w in weights]
        moved = list(weights)
        for t in range(start, min(start + size, len(q))):
            f = network(k[t].unsqueeze(1), anchor, gamma, beta, eps)
            loss = 0.5 * (f - v[t].unsqueeze(1)).square().sum()
            gradients = torch.autograd.grad(loss, anchor)
            moved = [w - step[t, :, None, None] * g for w, g in zip(moved, gradients, strict=True)]
            outputs.append(network(q[t].unsqueeze(1), moved, gamma, beta, eps).squeeze(1))
        weights = moved
    return torch.stack(outputs), weights


@pytest.mark.parametrize("depth", [1, 2])
def test_a_memory_without_gates_is_a_mini_batch_step_of_ttt(depth) -> None:
    """Invariant 13: alpha = 0, eta = 0, LN with slow gamma and b, theta as TTT's eta, position factors 1."""
    heads, width, size = 2, 4, 5
    q, k, v = normal(3, 13, heads, width)
    step, gamma, beta = normal(13, heads, seed=1).abs(), normal(heads, width, seed=2), normal(heads, width)
    widths = [width, 6, width] if depth == 2 else [width, width]
    weights = [normal(heads, a, b, seed=3) for a, b in pairwise(widths)]
    wanted, final = mini_batches(q, k, v, step, weights, gamma, beta, 1e-6, size)
    y, after = neural_memory(
        q[None], k[None], v[None], step[None], None, None, weights,
        spec=MemorySpec(size, "gelu", norm_eps=1e-6), gamma=gamma, beta=beta,
    )  # fmt: skip
    torch.testing.assert_close(y[0], wanted, **EXACT)
    for w, expected in zip(after.weights, final, strict=True):
        torch.testing.assert_close(w[0], expected, **EXACT)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
def test_the_layer_is_its_formula(depth, gate) -> None:
    torch.manual_seed(1)
    layer = TTT(8, 2, depth=depth, chunk_size=5, base_step=3.0, output_gate=gate).double()
    torch.nn.init.normal_(layer.memory_gamma)
    x = normal(2, 13, 8)
    turned = []
    for projection in (layer.q_proj, layer.k_proj):
        s = projection(x).unflatten(-1, (2, 4))
        a, b = s[..., :2], s[..., 2:]
        angle = (torch.arange(13) % 5)[:, None, None] * 1e4 ** -(torch.arange(2).double() / 2)
        turned.append(torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1))
    v = layer.v_proj(x).unflatten(-1, (2, 4))
    step = 3.0 * torch.sigmoid(layer.step_proj(x)) / 4 / 5
    rows = []
    for b in range(2):
        y, _ = mini_batches(
            turned[0][b], turned[1][b], v[b], step[b], list(layer.initial), layer.memory_gamma,
            layer.memory_beta, 1e-6, 5,
        )  # fmt: skip
        y = F.layer_norm(y.flatten(-2), (8,), layer.post_norm_weight, layer.post_norm_bias, 1e-6)
        rows.append(layer.o_proj(y * F.gelu(layer.output_gate(x[b])) if gate else y))
    torch.testing.assert_close(layer(x)[0], torch.stack(rows), **EXACT)


def test_a_mini_batch_ends_where_the_published_code_ends_it() -> None:
    """The published code divides the sum of a mini-batch by C at its end, as the factor 1/C does here."""
    torch.manual_seed(1)
    layer = TTT(8, 2, chunk_size=4, base_step=3.0).double()
    x = normal(1, 4, 8)
    q, k, v = layer.project(x, None, Span.build(None, 1, 4, "cpu"))
    step = 3.0 * torch.sigmoid(layer.step_proj(x)) / 4
    anchor = [w.detach().requires_grad_() for w in layer.initial]
    f = network(k[0].transpose(0, 1), anchor, layer.memory_gamma, layer.memory_beta, 1e-6)
    errors = 0.5 * (f - v[0].transpose(0, 1)).square().sum(-1)
    (mean,) = torch.autograd.grad((errors * step[0].T).sum() / 4, anchor)
    _, state = layer(x)
    torch.testing.assert_close(state["weights.0"][0], anchor[0] - mean, **EXACT)


@pytest.mark.parametrize("name", ["ttt-linear", "ttt-mlp"])
def test_a_model_generates_as_it_reads(name) -> None:
    torch.manual_seed(0)
    model = NestorForCausalLM(preset(name, "quick", memory={"chunk_size": 4})).double()
    tokens = torch.randint(0, 250, (2, 14))
    with torch.no_grad():
        whole = model(tokens).logits
        output = model(tokens[:, :6])
        for t in range(6, 14):
            output = model(tokens[:, t : t + 1], past_key_values=output.past_key_values)
            torch.testing.assert_close(output.logits[:, 0], whole[:, t], rtol=1e-7, atol=1e-8)
    depth = {"ttt-linear": 1, "ttt-mlp": 2}[name]
    assert len(model.layers[0].mixer.initial) == depth
    base = model.layers[0].mixer.largest_step * 32 * 4
    assert base == pytest.approx({1: 1.0, 2: 0.1}[depth])


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="width 8 in 3 heads"):
        TTT(8, 3)
    with pytest.raises(ConfigError, match="base_step 0"):
        TTT(8, 2, base_step=0)
    config = preset("ttt-mlp", "quick", memory={"base_stp": 1.0}, intermediate_size=64)
    with pytest.raises(ConfigError, match="unknown memory setting 'base_stp'. Did you mean 'base_step'"):
        build_mixer("ttt_mlp", config, 0)
