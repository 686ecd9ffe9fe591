"""Moneta, Yaad and Memora as layers: the block, its gates per channel, and what they reduce to."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import nestor
from nestor.errors import ConfigError
from nestor.layers.memory_as_gate import MemoryAsGate
from nestor.layers.miras import Miras
from nestor.layers.neural_memory import KINDS, memory_from_config
from nestor.layers.registry import build_mixer
from nestor.layers.span import Span
from nestor.layers.writes import record_writes
from nestor.ops.neural_memory import fast_weights, neural_memory

EXACT = {"rtol": 1e-9, "atol": 1e-10}
DIM, HEADS, WIDTH = 8, 2, 4
MEMBERS = ("moneta", "yaad", "memora")
CONFIG = SimpleNamespace(hidden_size=DIM, num_attention_heads=HEADS, rms_norm_eps=1e-6)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def draw(kind="yaad", **arguments):
    """A layer with large weights and open gates."""
    torch.manual_seed(2)
    arguments = {
        "chunk_size": 4,
        "expansion": 1.5,
        "rank": 3,
        "step_bias": 1.0,
        "forget_bias": -1.0,
    } | arguments
    layer = memory_from_config(CONFIG, {"kind": kind, **arguments})
    for module in layer.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.5)
    return layer.double()


def low_rank(gate, x):
    return (x @ gate.down.weight.T @ gate.up.weight.T + gate.up.bias).unflatten(-1, (HEADS, -1))


def by_hand(layer, x):
    """The block with the token loop as its memory."""
    q, k, v, *_ = layer.project(x, None, Span.build(None, *x.shape[:2], "cpu"), None)
    theta = torch.sigmoid(low_rank(layer.theta_gate, x)) * layer.max_theta
    alpha = None if layer.alpha_gate is None else torch.sigmoid(low_rank(layer.alpha_gate, x))
    delta = None
    if layer.delta_gate is not None:
        delta = F.softplus(low_rank(layer.delta_gate, x)) * WIDTH**0.5
        delta = delta[..., 0] if layer.inner_loss == "huber_norm" else delta
    initial = list(layer.initial)
    if layer.retention == "softmax":
        initial = [layer.spec.simplex_sum * w.exp() / w.exp().sum(-2, keepdim=True) for w in initial]
    y, _ = neural_memory(
        q, k, v, theta, None, alpha, initial, spec=layer.spec, gamma=layer.memory_gamma,
        beta=layer.memory_beta, delta=delta, backend="reference",
    )  # fmt: skip
    y = (y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.out_norm.weight).flatten(-2)
    return layer.o_proj(y * torch.sigmoid(layer.output_gate(x)))


@pytest.mark.parametrize(
    ("kind", "choices"),
    [
        ("moneta", {}),
        ("moneta", {"loss_smooth": True, "retention_dual": "exact"}),
        ("yaad", {}),
        ("yaad", {"inner_loss": "yaad"}),
        ("yaad", {"inner_loss": "huber", "depth": 3, "forget": False}),
        ("memora", {}),
        ("memora", {"chunk_size": 1, "read_mode": "inclusive"}),
    ],
)
def test_the_layer_is_the_block_around_the_token_loop(kind, choices) -> None:
    layer, x = draw(kind, **choices), normal(2, 13, DIM)
    torch.testing.assert_close(layer(x)[0], by_hand(layer, x), **EXACT)


def test_each_member_is_what_the_papers_say() -> None:
    moneta, yaad, memora = (draw(kind) for kind in MEMBERS)
    assert (moneta.spec.inner_loss, moneta.spec.loss_exponent) == ("lp", 3.0)
    assert (moneta.spec.retention, moneta.spec.retention_power) == ("lq", 4.0)
    assert (yaad.spec.inner_loss, yaad.spec.retention) == ("huber_norm", "l2")
    assert (memora.spec.inner_loss, memora.spec.retention) == ("l2", "softmax")
    assert [m.spec.read_mode for m in (moneta, yaad, memora)] == ["inclusive", "inclusive", "chunk_start"]
    for layer in (moneta, yaad, memora):
        assert not layer.momentum and layer.spec.activation == "gelu"
        assert layer.spec.step_sizes == layer.spec.forget_gates == "channel"


@torch.no_grad()
def test_gates_start_where_they_are_told_and_differ_by_channel() -> None:
    layer, x = Miras(DIM, HEADS, inner_loss="yaad", rank=3), torch.randn(2, 5, DIM)
    gates = layer.gates(x)
    assert gates.theta.shape == gates.alpha.shape == gates.delta.shape == (2, 5, HEADS, WIDTH)
    assert gates.theta.mean() / layer.max_theta == pytest.approx(1 / (1 + math.exp(3)), rel=0.1)
    assert gates.alpha.mean() == pytest.approx(1 / (1 + math.exp(8)), rel=0.1)
    assert gates.delta.mean() == pytest.approx(WIDTH**0.5, rel=0.1)
    assert (gates.theta.std(-1) > 0).all()
    assert draw().gates(normal(2, 5, DIM)).delta.shape == (2, 5, HEADS)
    assert draw(forget=False).gates(normal(2, 5, DIM)).alpha is None
    assert layer.bfloat16().gates(x.bfloat16()).theta.dtype == torch.float32


# --- reductions (invariants 17 and 18) ----------------------------------------------------------------------


def twin(layer, **arguments):
    """The same parameters, as far as they go, in a layer of other choices."""
    other = draw(**arguments)
    other.load_state_dict({k: v for k, v in layer.state_dict().items() if "delta" not in k})
    return other


def test_moneta_with_squares_is_the_plain_memory() -> None:
    layer = draw("moneta", loss_exponent=2.0, retention_power=2.0)
    plain = twin(layer, kind="moneta", inner_loss="l2", loss_scale=2.0, retention="l2")
    x = normal(2, 13, DIM)
    torch.testing.assert_close(layer(x)[0], plain(x)[0], **EXACT)
    assert not torch.allclose(layer(x)[0], twin(layer, kind="moneta", inner_loss="l2")(x)[0])


def test_yaad_with_an_endless_threshold_is_the_plain_memory_and_with_none_it_stands_still() -> None:
    layer, x = draw("yaad"), normal(2, 13, DIM)
    plain = twin(layer, kind="yaad", inner_loss="l2")
    assert not torch.allclose(layer(x)[0], plain(x)[0])
    with torch.no_grad():
        layer.delta_gate.up.bias.fill_(1e3)
        torch.testing.assert_close(layer(x)[0], plain(x)[0], **EXACT)
        layer.delta_gate.up.bias.fill_(-1e3)
        _, state = layer(x)
    for index, weight in enumerate(layer.initial):
        torch.testing.assert_close(state[f"weights.{index}"], weight.expand(2, -1, -1, -1), **EXACT)


@torch.no_grad()
def test_memora_s_weights_stay_on_their_simplices() -> None:
    layer = draw("memora")
    _, state = layer(3 * normal(2, 200, DIM))
    for w, start in zip(
        fast_weights(layer.spec, [state["weights.0"], state["weights.1"]]),
        layer.initial_weights(),
        strict=True,
    ):
        assert (w >= 0).all() and (start > 0).all()
        total = torch.full_like(w[:, :, 0], layer.spec.simplex_sum)
        torch.testing.assert_close(w.sum(-2), total, **EXACT)
        torch.testing.assert_close(start.sum(-2), total[0], **EXACT)


@torch.no_grad()
def test_a_constant_on_memora_s_logits_changes_nothing() -> None:
    layer, x = draw("memora"), normal(2, 13, DIM)
    before = layer(x)[0]
    for logits in layer.initial:
        logits.add_(5.0)
    torch.testing.assert_close(layer(x)[0], before, **EXACT)


@torch.no_grad()
def test_moneta_starts_from_its_learned_weights() -> None:
    layer = draw("moneta")
    state = layer.fresh_state(1, normal(1, 1, DIM))
    for w, learned in zip(
        fast_weights(layer.spec, [state["weights.0"], state["weights.1"]]), layer.initial, strict=True
    ):
        torch.testing.assert_close(w[0], learned, **EXACT)


@torch.no_grad()
def test_memora_starts_with_pre_activations_of_about_unit_variance() -> None:
    layer = Miras(256, 4, retention="softmax")
    key = F.normalize(torch.randn(100, 4, 64), dim=-1)
    z = torch.einsum("nhi,hio->nho", key, layer.initial_weights()[0])
    assert 0.5 < z.std() < 2.0


# --- training, long runs, hybrids ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MEMBERS)
def test_a_gradient_reaches_every_parameter(kind) -> None:
    layer = draw(kind)
    (layer(normal(2, 13, DIM))[0] * normal(2, 13, DIM, seed=1)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-9, name


@torch.no_grad()
@pytest.mark.parametrize("kind", MEMBERS)
def test_open_gates_and_many_tokens_leave_it_finite(kind) -> None:
    """Random tokens, and one token again and again, in the float32 of a model."""
    torch.manual_seed(0)
    layer = memory_from_config(
        SimpleNamespace(hidden_size=32, num_attention_heads=2, rms_norm_eps=1e-6),
        {"kind": kind, "step_bias": 4.0},
    )
    for x in (torch.randn(1, 256, 32), torch.randn(1, 1, 32).expand(1, 256, 32)):
        y, state = layer(x)
        assert y.isfinite().all()
        assert all(state[f"weights.{i}"].norm() < 20 * w.norm() + 100 for i, w in enumerate(layer.initial))


def test_writes_are_reported_by_token_and_head() -> None:
    layer, x = draw("yaad"), normal(2, 13, DIM)
    with torch.no_grad(), record_writes() as writes:
        layer(x)
    assert [w.shape for w in writes] == [(2, 13, HEADS)] and (writes[0] > 0).all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "titans"])
def test_every_member_of_the_family_works_in_every_hybrid(kind) -> None:
    small = {"key_width": 4} if KINDS[kind][1] == "Atlas" else {}
    for name in ("titans-mag", "titans-mal", "titans-mac", "titans-lmm"):
        sizes = {"titans-mac": {"segment_size": 8}, "titans-lmm": {}}.get(name, {"sliding_window": 6})
        config = nestor.preset(
            name, "quick", hidden_size=16, num_attention_heads=2, intermediate_size=16, num_hidden_layers=1,
            memory={"kind": kind, "chunk_size": 4, **small}, **sizes,
        )  # fmt: skip
        model = nestor.NestorForCausalLM(config)
        assert model.config.memory["kind"] == kind
        ids = torch.randint(0, 256, (1, 11))
        assert model(ids, labels=ids).loss.isfinite()


def test_a_hybrid_has_the_member_that_its_configuration_names() -> None:
    config = nestor.preset("titans-mag", "quick", memory={"kind": "memora"})
    layer = build_mixer("memory_as_gate", config, 0)
    assert isinstance(layer, MemoryAsGate) and layer.memory.spec.retention == "softmax"
    assert layer.memory.output_gate is None


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="rank is 0"):
        draw(rank=0)
    with pytest.raises(ConfigError, match=r"memory kind is 'yad'.*Did you mean 'yaad'"):
        draw("yad")
    with pytest.raises(ConfigError, match="unknown memory setting 'momentum'"):
        draw(momentum=True)
    with pytest.raises(ConfigError, match="read_mode is 'inclusive' with chunk_size 4"):
        draw("memora", read_mode="inclusive")
    config = nestor.preset("tnt", "quick", memory={"kind": "yaad"}, intermediate_size=64)
    with pytest.raises(ConfigError, match="kind cannot be set in TNT"):
        build_mixer("tnt", config, 0)
