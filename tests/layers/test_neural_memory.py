"""The neural memory as a layer: its formula, its gates, and a start from which it can be trained."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import nestor
from nestor.errors import ConfigError
from nestor.layers.neural_memory import NeuralMemory, memory_from_config
from nestor.layers.span import Span
from nestor.layers.writes import record_writes
from nestor.ops.neural_memory import neural_memory

EXACT = {"rtol": 1e-9, "atol": 1e-10}


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def convolved(x, weight):
    """`y_t = sum_i w_i x_{t-i}`, written out; the last column is for the token itself."""
    kernel = weight.shape[1]
    rows = []
    for t in range(x.shape[1]):
        terms = [weight[:, kernel - 1 - i] * x[:, t - i] for i in range(min(kernel, t + 1))]
        rows.append(torch.stack(terms).sum(0))
    return torch.stack(rows, 1)


def by_hand(layer, x):
    """The block of spec section 3.1 with the token loop as its memory."""
    heads, width = layer.heads, layer.head_dim
    streams = {}
    for name in "qkv":
        s = getattr(layer, f"{name}_proj")(x)
        if layer.convolutions is not None:
            s = convolved(s, layer.convolutions[name].weight)
        s = s * torch.sigmoid(s)
        streams[name] = s.unflatten(-1, (heads, width))
    for name in "qk":
        s = streams[name]
        streams[name] = s / (s.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    gates = torch.sigmoid(x @ layer.gate_proj.weight.T + layer.gate_proj.bias).split(heads, -1)
    eta = gates[1] if layer.momentum else None
    theta = layer.max_theta * gates[0] * (1 if eta is None else 1 - eta)
    alpha = gates[-1] if layer.forget else None
    y, _ = neural_memory(
        *streams.values(), theta, eta, alpha, list(layer.initial), spec=layer.spec,
        gamma=layer.memory_gamma, beta=layer.memory_beta, backend="reference",
    )  # fmt: skip
    y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.out_norm.weight
    y = y.flatten(-2)
    if layer.output_gate is not None:
        y = y * torch.sigmoid(layer.output_gate(x))
    return layer.o_proj(y)


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"momentum": False},
        {"forget": False, "conv_kernel": 0},
        {"momentum": False, "forget": False, "norm": "none", "depth": 1},
        {"norm": "residual", "output_gate": False, "activation": "gelu"},
        {"depth": 3, "conv_kernel": 2, "inner_loss": "dot_product", "read_mode": "exclusive"},
        {"depth": 4, "decay": "zero", "grad_at": "post_decay", "loss_scale": 2.0},
    ],
)
def test_the_layer_is_the_block_around_the_token_loop(build_layer, choices):
    layer = build_layer("neural_memory", **choices)
    x = normal(2, 13, 8)
    expected = by_hand(layer, x)
    torch.testing.assert_close(layer(x)[0], expected, **EXACT)
    with torch.no_grad():
        torch.testing.assert_close(by_hand(layer, x), expected, **EXACT)


@pytest.mark.parametrize("momentum", [True, False])
def test_no_input_makes_the_write_step_larger_than_its_bound(build_layer, momentum):
    layer = build_layer("neural_memory", momentum=momentum, max_step=0.7)
    bound = 0.7 / 4  # the curvature of a memory with a layer norm is 1 / 0.5^2
    gates = layer.gates(1e3 * normal(50, 20, 8))
    share = torch.ones(()).double() if gates.eta is None else 1 - gates.eta
    assert (gates.theta >= 0).all() and (gates.theta <= bound * share).all()
    assert torch.isclose((gates.theta / share.clamp(min=1e-300)).max(), torch.tensor(bound).double())


def test_the_largest_step_is_the_strength_over_curvature_and_loss_scale():
    for strength in (1.0, 0.25):
        layer = NeuralMemory(8, 2, max_step=strength, loss_scale=2.0)
        assert layer.max_theta == pytest.approx(strength / 4 / 2)


def write_once(layer, weights, k, v, theta):
    """f(k) before and after one step of `theta` on one token, `[H, p]` each."""
    heads = layer.heads
    shape = (1, 1, heads, layer.head_dim)
    k, v = k.reshape(shape), v.reshape(shape)
    gate = torch.full((1, 1, heads), theta, dtype=torch.float64)
    norm = {"gamma": layer.memory_gamma, "beta": layer.memory_beta}
    _, after = neural_memory(k, k, v, gate, None, None, weights, spec=layer.spec, **norm)
    fresh = [w[None] for w in weights]
    return layer.read(k, fresh)[0, 0], layer.read(k, list(after.weights))[0, 0]


def left_over(layer, weights, theta):
    """Mean over heads of the share of a token's small error that one step leaves, along the error."""
    heads, width = layer.heads, layer.head_dim
    k = F.normalize(normal(heads, width, seed=1), dim=-1)
    f, _ = write_once(layer, weights, k, torch.zeros(heads, width).double(), 0.0)
    error = normal(heads, width, seed=2)
    if layer.memory_gamma is not None:
        # What is read can only turn on the sphere of the layer norm: an error across it stays.
        out = f - k
        error = error - error.mean(-1, keepdim=True)
        error = error - out * (error * out).sum(-1, keepdim=True) / out.square().sum(-1, keepdim=True)
    error = 1e-4 * error
    _, after = write_once(layer, weights, k, f + error, theta)
    left = ((f + error - after) * error).sum(-1) / error.square().sum(-1)
    return float(left.mean())


def xavier(layer):
    """Initial weights as Xavier's times 0.5, the start that spec section 14 offers."""
    widths = [(w.shape[-2], w.shape[-1]) for w in layer.initial]
    return [
        0.5 * math.sqrt(2 / (a + b)) * normal(layer.heads, a, b, seed=7 + i)
        for i, (a, b) in enumerate(widths)
    ]


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("norm", ["none", "residual", "residual_layernorm"])
@torch.no_grad()
def test_a_step_of_strength_one_takes_a_token_s_error_away(norm, depth, activation):
    """That is what `max_step` promises of a fresh memory, to first order and on average over directions."""
    layer = NeuralMemory(
        512, 8, depth=depth, norm=norm, activation=activation, max_step=1.0, momentum=False
    ).double()
    left = left_over(layer, list(layer.initial), layer.max_theta)
    assert -1.0 < left < 0.45
    half = left_over(layer, list(layer.initial), layer.max_theta / 2)
    assert half == pytest.approx((1 + left) / 2, abs=0.02)


@torch.no_grad()
def test_small_initial_weights_behind_a_layer_norm_would_explode():
    """The norm divides by the small output, so that the same step overshoots the error by far."""
    layer = NeuralMemory(512, 8, depth=2, max_step=1.0, momentum=False).double()
    assert left_over(layer, xavier(layer), layer.max_theta) < -10


@pytest.mark.parametrize("size", ["quick", "5m"])
def test_a_fresh_model_has_an_outer_gradient_one_can_follow(size):
    """Through four memories and 512 tokens, also from the first token, which has nothing to look back at."""
    model = nestor.NestorForCausalLM(nestor.preset("titans-mag", size, num_hidden_layers=4))
    ids = torch.randint(0, 256, (1, 512))
    model(ids, labels=ids, use_cache=False).loss.backward()
    norms = {n: float(p.grad.norm()) for n, p in model.named_parameters() if p.grad is not None}
    assert math.hypot(*norms.values()) < 10
    assert norms["layers.0.mixer.memory.gate_proj.weight"] > 0


def test_biases_and_initial_weights_survive_the_initialisation_of_a_model():
    config = nestor.preset("titans-mag", "quick", memory={"depth": 3, "step_bias": -1.5})
    layers = [m for m in nestor.NestorForCausalLM(config).modules() if isinstance(m, NeuralMemory)]
    assert len(layers) == 2
    for layer in layers:
        heads = layer.heads
        assert layer.gate_proj.bias.tolist() == [-1.5] * heads + [0.0] * heads + [-8.0] * heads
        assert layer.gate_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
        first, second, last = (w.std().item() for w in layer.initial)
        hidden = layer.initial[1].shape[-2]
        assert first == pytest.approx(1.0, rel=0.05)
        assert second == pytest.approx(1 / math.sqrt(0.36 * hidden), rel=0.05)
        assert last == pytest.approx(0.5, rel=0.05)
        assert (layer.memory_gamma == 1).all() and (layer.memory_beta == 0).all()
        q, k, v = (layer.convolutions[name].weight for name in "qkv")
        assert torch.equal(layer.q_proj.weight, layer.k_proj.weight)
        assert torch.equal(q[:, 1:], k[:, :-1]) and not q[:, 0].any()
        assert (v[:, -1] == 1).all() and not v[:, :-1].any()


@torch.no_grad()
def test_a_fresh_memory_says_what_followed_the_same_tokens():
    """Queries equal keys one token later: when a few tokens return, what followed them comes back."""
    torch.manual_seed(0)
    layer = NeuralMemory(128, 4, expansion=2, momentum=False, chunk_size=16).double()
    symbols = normal(100, 128)
    symbols /= symbols.square().mean(-1, keepdim=True).sqrt()
    right = 0
    for trial in range(20):
        order = torch.randperm(100, generator=torch.Generator().manual_seed(trial))[:40]
        # The cue stands at 18..20, its successor at 21; the cue returns at the end.
        x = symbols[torch.cat([order, order[18:21]])][None]
        q, *_ = layer.project(x, None, Span.build(None, 1, 43, x.device), None)
        _, state = layer(x)
        weights = [state[f"weights.{i}"] for i in range(2)]
        fresh = [w[None] for w in layer.initial]
        learned = (layer.read(q[:, -1:], weights) - layer.read(q[:, -1:], fresh)).flatten()
        values = F.silu(layer.v_proj(symbols[order]))
        scores = (values - values.mean(0)) @ learned
        right += int(scores.argmax()) == 21
    assert right >= 8  # of 40 values each time: chance is half a hit


def sizes(state):
    return torch.tensor([float(t.norm()) for n, t in state.items() if "weights" in n or "momentum" in n])


@torch.no_grad()
def test_a_default_memory_stays_bounded_over_32k_random_tokens():
    """Invariant 24, on the layer with its own gates; and it is not boundedness for want of writing."""
    layer, state = NeuralMemory(64, 2, expansion=2), None
    fresh = sizes(layer.fresh_state(1, torch.zeros(1)))
    for piece in range(8):
        x = torch.randn(1, 4096, 64, generator=torch.Generator().manual_seed(piece))
        y, state = layer(x, state)
        assert torch.isfinite(y).all()
        assert (sizes(state) < 3 * fresh.max()).all()
    moved = (state["weights.1"][0] - layer.initial[1]).norm() / layer.initial[1].norm()
    assert 0.001 < float(moved) < 3


@pytest.mark.parametrize("strength", ["as it starts", "as it could be trained"])
@torch.no_grad()
def test_a_token_repeated_4k_times_does_not_make_a_memory_explode(strength):
    """The worst case for gradients that a chunk takes at one anchor: all of them point the same way."""
    layer = NeuralMemory(64, 2, expansion=2)
    if strength == "as it could be trained":
        layer.gate_proj.bias[:2] = 10.0  # the write gate all open: theta at its bound
    fresh = sizes(layer.fresh_state(1, torch.zeros(1))).max()
    x = torch.randn(1, 1, 64).expand(1, 1024, 64)
    state = None
    for _ in range(4):
        y, state = layer(x, state)
        assert torch.isfinite(y).all()
        assert (sizes(state) < 10 * fresh).all()


@torch.no_grad()
def test_what_is_recorded_is_the_write_step_times_the_gradient_s_norm(build_layer):
    """Against autograd of the inner loss, at the weights of the chunk's start."""
    layer, x = build_layer("neural_memory"), normal(1, 4, 8)  # one chunk: the anchor is the initial memory
    with record_writes() as writes:
        layer(x)
    layer(x)
    assert len(writes) == 1 and writes[0].dtype == torch.float32
    _, k, v, *_ = layer.project(x, None, Span.build(None, 1, 4, "cpu"), None)
    theta = layer.gates(x).theta
    for t in range(4):
        for head in range(2):
            weights = [w.detach().clone().requires_grad_() for w in layer.initial]
            with torch.enable_grad():
                f = layer.read(k[:, t : t + 1], [w[None] for w in weights])[0, 0, head]
                loss = 0.5 * (f - v[0, t, head]).square().sum()
            gradients = torch.autograd.grad(loss, weights)
            norm = torch.sqrt(sum(g[head].square().sum() for g in gradients))
            assert float(writes[0][0, t, head]) == pytest.approx(float(theta[0, t, head] * norm), rel=1e-5)


def test_the_persistent_tokens_are_read_once_and_start_a_chunk_of_their_own(build_layer):
    """With as many persistent tokens as a chunk has, that is what reading them in front would do."""
    layer, x, prefix = build_layer("neural_memory"), normal(2, 9, 8), normal(4, 8, seed=1)
    outputs, start = layer.read_prefix(prefix)
    y, state = layer(x, start=start)
    whole, after = layer(torch.cat([prefix.expand(2, -1, -1), x], 1))
    torch.testing.assert_close(outputs, whole[0, :4], **EXACT)
    torch.testing.assert_close(y, whole[:, 4:], **EXACT)
    for name, tensor in after.items():
        torch.testing.assert_close(state[name], tensor, **EXACT)


def test_after_an_uneven_number_of_persistent_tokens_the_first_chunk_is_whole(build_layer):
    layer, x = build_layer("neural_memory"), normal(1, 4, 8)
    _, start = layer.read_prefix(normal(3, 8, seed=1))
    assert start["phase"].tolist() == [0]
    for index in range(layer.depth):
        assert torch.equal(start[f"anchor.{index}"], start[f"weights.{index}"])
    _, state = layer(x, start=start)
    assert state["phase"].tolist() == [0]


def test_the_fresh_state_is_what_a_stream_begins_with(build_layer, read_pieces):
    layer, x = build_layer("neural_memory"), normal(3, 6, 8)
    state = layer.fresh_state(3, x)
    torch.testing.assert_close(layer(x, state)[0], layer(x)[0], **EXACT)
    assert {name: tuple(t.shape) for name, t in state.items()} == {
        name: tuple(t.shape) for name, t in layer(x)[1].items()
    }


def test_inside_autocast_gates_and_memory_stay_in_float32(build_layer):
    layer = build_layer("neural_memory").float()
    x = normal(1, 9, 8).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = layer(x)
        gates = layer.gates(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(gates.theta, layer.gates(x).theta)
    assert {t.dtype for n, t in state.items() if "weights" in n or "momentum" in n} == {torch.float32}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 3}, "memory width 8 does not divide into 3 heads"),
        ({"heads": 0}, "does not divide into 0 heads"),
        ({"depth": 5}, "memory depth is 5; it must be 1 .linear. to 4"),
        ({"expansion": 0}, "expansion is 0"),
        ({"max_step": -1.0}, "max_step -1.0; both must be positive"),
        ({"conv_kernel": 1}, "convolution kernel is 1; it must be at least 2"),
        ({"norm": "layernorm"}, "norm is 'layernorm'; it must be one of 'none'"),
    ],
)
def test_impossible_memories_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        NeuralMemory(8, **{"heads": 2, **arguments})


def test_settings_of_a_configuration_are_checked_by_name():
    config = SimpleNamespace(hidden_size=8, num_attention_heads=2, rms_norm_eps=1e-5)
    layer = memory_from_config(config, {"chunk_size": 3, "heads": 4})
    assert (layer.heads, layer.spec.chunk_size, layer.out_norm.eps) == (4, 3, 1e-5)
    with pytest.raises(ConfigError, match=r"unknown memory setting 'chunksize'. Did you mean 'chunk_size'\?"):
        memory_from_config(config, {"chunksize": 3})
