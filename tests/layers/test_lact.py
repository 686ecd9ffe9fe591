"""LaCT: the layer against its equations in a plain loop, and what a step of a whole chunk implies."""

from itertools import product

import pytest
import torch
from torch.nn import functional as F

import nestor
from nestor.errors import ConfigError
from nestor.layers.attention import Attention
from nestor.layers.lact import LaCT
from nestor.layers.registry import build_mixer
from nestor.layers.writes import record_writes
from nestor.ops.neural_memory.muon import NEWTON_SCHULZ

EXACT = {"rtol": 1e-9, "atol": 1e-10}
DIM, HEADS, CHUNK = 8, 2, 4


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def draw(window=5, chunk=CHUNK, heads=HEADS, **arguments):
    torch.manual_seed(2)
    arguments = {"expansion": 1.5, "base_step": 0.5, **arguments}
    layer = LaCT(Attention(DIM, 4, window=window), heads, chunk_size=chunk, **arguments)
    for name, parameter in layer.named_parameters():
        if "proj.weight" in name or "scale" in name or "shift" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return layer.double()


def orthogonal(x):
    """Newton-Schulz with LaCT's coefficients, rows <= columns."""
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for a, b, c in NEWTON_SCHULZ["scheduled"]:
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x.T if tall else x


def fast_weights_by_hand(layer, x):
    """What the fast weights add, before W_O: spec section 7.1 in its own convention, W out x in."""
    width, out = DIM // layer.heads, torch.zeros_like(x)

    def streams(name, scale, shift):
        s = F.silu(getattr(layer.attention, name)(x) * scale + shift).unflatten(-1, (layer.heads, width))
        return s

    q, k = streams("q_proj", layer.q_scale, layer.q_shift), streams("k_proj", layer.k_scale, layer.k_shift)
    q, k = (s / (s.square().sum(-1, keepdim=True) + 1e-6).sqrt() for s in (q, k))
    v = streams("v_proj", 1.0, 0.0)
    rates = F.softplus(layer.step_proj(x)).unflatten(-1, (layer.heads, 3))
    keeps = None if layer.momentum_proj is None else torch.sigmoid(layer.momentum_proj(x))
    gain = F.silu(layer.scale_proj(x))
    for b, h in product(range(len(x)), range(layer.heads)):
        W0, W1, W2 = (w[h].T for w in layer.initial)
        norms = [w.norm(dim=1, keepdim=True) for w in (W0, W1, W2)]
        buffers = [torch.zeros_like(w) for w in (W0, W1, W2)]
        for start in range(0, x.shape[1], layer.spec.chunk_size):
            tokens = range(start, min(start + layer.spec.chunk_size, x.shape[1]))
            sums = [torch.zeros_like(w) for w in (W0, W1, W2)]
            for t in tokens:
                y = W1 @ (F.silu(W0 @ q[b, t, h]) * (W2 @ q[b, t, h]))
                y = y / (y.square().mean() + 1e-6).sqrt() * layer.out_norm.weight
                out[b, t, h * width : (h + 1) * width] = y * gain[b, t, h]
                g, u, dh = W0 @ k[b, t, h], W2 @ k[b, t, h], W1.T @ v[b, t, h]
                s = torch.sigmoid(g)
                back = dh * u * s * (1 + g * (1 - s))
                lr = rates[b, t, h]
                sums[0] = sums[0] + lr[0] * torch.outer(back, k[b, t, h])
                sums[1] = sums[1] + lr[1] * torch.outer(v[b, t, h], F.silu(g) * u)
                sums[2] = sums[2] + lr[2] * torch.outer(dh * F.silu(g), k[b, t, h])
            if len(tokens) < layer.spec.chunk_size:
                break
            mean = 0.0 if keeps is None else keeps[b, list(tokens), h].mean()
            buffers = [d + mean * s for d, s in zip(sums, buffers, strict=True)]
            steps = [orthogonal(s) if layer.spec.optimizer == "muon" else s for s in buffers]
            W0, W1, W2 = (
                (w + s) / ((w + s).norm(dim=1, keepdim=True) + 1e-5) * n
                for w, s, n in zip((W0, W1, W2), steps, norms, strict=True)
            )
    return out


@pytest.mark.parametrize(
    "choices", [{}, {"momentum": False}, {"muon": False}, {"heads": 1, "expansion": 2.0}]
)
@pytest.mark.parametrize("length", [3, 4, 15])
def test_the_layer_is_the_sum_of_attention_and_fast_weights(choices, length) -> None:
    layer, x = draw(**choices), normal(2, length, DIM)
    a = layer.attention
    near, _ = a.mix(a.q_proj(x), a.k_proj(x), a.v_proj(x))
    expected = a.o_proj(near + fast_weights_by_hand(layer, x))
    torch.testing.assert_close(layer(x)[0], expected, **EXACT)


# --- invariants 22 and 14 -----------------------------------------------------------------------------------


def far(layer, x):
    """What the fast weights add, and the state."""
    a = layer.attention
    span = nestor.layers.span.Span.build(None, *x.shape[:2], "cpu")
    return layer.remember(x, a.q_proj(x), a.k_proj(x), a.v_proj(x), None, span)


@torch.no_grad()
def test_output_units_keep_the_norms_that_they_begin_with() -> None:
    layer = draw()
    _, state = far(layer, normal(2, 40, DIM))
    for index, learned in enumerate(layer.initial):
        w = state[f"weights.{index}"]
        torch.testing.assert_close(w.norm(dim=-2), learned.norm(dim=-2).expand(2, -1, -1), rtol=1e-4, atol=0)
        assert (w - learned).abs().max() > 0.1


@torch.no_grad()
def test_a_chunk_is_read_with_the_weights_of_its_start() -> None:
    layer, x = draw(), normal(1, 12, DIM)
    before, _ = far(layer, x)
    a = layer.attention.k_proj.weight.clone()
    for t in (0, 5, 11):
        changed = x.clone()
        changed[:, t] += 1.0
        after, _ = far(layer, changed)
        same = (after == before)[0].all(-1)
        first_after = (t // CHUNK + 1) * CHUNK
        assert same[[i for i in range(first_after) if i != t]].all()
        assert not same[first_after:].any()
    layer.attention.k_proj.weight.zero_()
    without, _ = far(layer, x)
    assert torch.equal(without[:, :CHUNK], before[:, :CHUNK]) and not torch.equal(without, before)
    layer.attention.k_proj.weight.copy_(a)


@torch.no_grad()
def test_with_muon_and_no_momentum_the_common_size_of_steps_is_lost() -> None:
    x = normal(2, 12, DIM)
    for muon in (True, False):
        layer = draw(momentum=False, muon=muon)
        before, _ = far(layer, x)
        gates = layer.gates
        layer.gates = lambda x, gates=gates: (gates(x)[0] * 7.0, None)
        # Newton-Schulz divides by ||S|| + 1e-7.
        assert torch.allclose(far(layer, x)[0], before, rtol=1e-5, atol=1e-5) is muon


@torch.no_grad()
def test_the_order_of_a_chunk_s_tokens_does_not_matter_to_its_step() -> None:
    layer, x = draw(), normal(2, 8, DIM)
    shuffled = x[:, [2, 0, 3, 1, 7, 4, 6, 5]]
    for name, tensor in far(layer, x)[1].items():
        torch.testing.assert_close(far(layer, shuffled)[1][name], tensor, **EXACT)


# --- as a part of a model -----------------------------------------------------------------------------------


def tiny(**overrides):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 16}
    memory = {"heads": 2, "base_step": 0.1}
    return nestor.NestorForCausalLM(
        nestor.preset("lact", "quick", sliding_window=6, memory=memory, **sizes, **overrides)
    ).double()


@torch.no_grad()
def test_decoding_goes_on_learning() -> None:
    """The published code decodes with the initial weights."""
    model, ids = tiny(), torch.randint(0, 256, (1, 20))
    state = model(ids[:, :3]).past_key_values
    first = state.layers[0]["memory.weights.0"]
    for t in range(3, 20):
        out = model(ids[:, t : t + 1], past_key_values=state)
        state = out.past_key_values
    assert not torch.equal(state.layers[0]["memory.weights.0"], first)
    torch.testing.assert_close(out.logits[:, 0], model(ids).logits[:, -1], **EXACT)


@torch.no_grad()
def test_the_window_ends_and_the_fast_weights_do_not() -> None:
    layer, x = draw(), normal(1, 16, DIM)
    changed = x.clone()
    changed[:, 0] += 1.0
    assert (layer(x)[0] - layer(changed)[0])[0, 5:].abs().amax(1).min() > 1e-9


def test_a_gradient_reaches_every_parameter() -> None:
    layer = draw()
    (layer(normal(2, 13, DIM))[0] * normal(2, 13, DIM, seed=1)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-9, name


def test_steps_start_at_a_thousandth_in_float32_and_writes_are_reported() -> None:
    torch.manual_seed(0)
    layer = LaCT(Attention(32, 4, window=8), 2, chunk_size=8).bfloat16()
    x = torch.randn(2, 9, 32).bfloat16()
    theta, eta = layer.gates(torch.zeros(2, 9, 32).bfloat16())
    assert theta.shape == (2, 9, 2, 3) and eta.shape == (2, 9, 2) and theta.dtype == torch.float32
    torch.testing.assert_close(theta, torch.full_like(theta, 0.001), rtol=0.05, atol=0)
    with torch.no_grad(), record_writes() as writes:
        y, _ = layer(x)
    assert y.dtype == torch.bfloat16 and [w.shape for w in writes] == [(2, 9, 2)]


def test_the_preset_has_few_wide_heads_and_a_chunk_of_one_window() -> None:
    config = nestor.preset("lact", "170m")
    layer = build_mixer("lact", config, 0)
    assert layer.initial[0].shape == (4, 192, 192) and layer.spec.chunk_size == config.sliding_window == 1024
    assert nestor.preset("lact", "quick", sliding_window=32).memory["chunk_size"] == 32


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="chunk_size is 6 and the attention window 5"):
        draw(chunk=6)
    with pytest.raises(ConfigError, match="2 key-value heads for 4 query heads"):
        LaCT(Attention(DIM, 4, 2, window=8), 2, chunk_size=4)
    with pytest.raises(ConfigError, match="does not divide into 3 heads"):
        draw(heads=3)
    with pytest.raises(ConfigError, match="base_step 0"):
        draw(base_step=0.0)
    with pytest.raises(ConfigError, match=r"unknown memory setting 'chunksize'. Did you mean 'chunk_size'"):
        build_mixer("lact", nestor.preset("lact", "quick", memory={"chunksize": 4}, intermediate_size=16), 0)
