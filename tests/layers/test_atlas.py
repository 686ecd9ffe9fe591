"""OmegaNet, Atlas and Atlas++ as layers: features, windows, orthogonalised steps, and what they reduce to."""

import math
from types import SimpleNamespace

import pytest
import torch

from nestor.errors import ConfigError
from nestor.layers.attention import Attention
from nestor.layers.memory_as_gate import MemoryAsGate
from nestor.layers.neural_memory import NeuralMemory, memory_from_config
from nestor.layers.span import Span
from nestor.ops.neural_memory import neural_memory

EXACT = {"rtol": 1e-9, "atol": 1e-10}
DIM, HEADS, WIDTH = 8, 2, 4
MEMBERS = ("omega", "atlas", "atlas++")
CONFIG = SimpleNamespace(hidden_size=DIM, num_attention_heads=HEADS, rms_norm_eps=1e-6)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def draw(kind="atlas", **arguments):
    """A layer with large weights and open gates."""
    torch.manual_seed(2)
    own = {
        "chunk_size": 4,
        "expansion": 1.5,
        "key_width": 3,
        "window": 3,
        "max_step": 6.0,
        "forget_bias": -1.0,
    }
    layer = memory_from_config(CONFIG, {"kind": kind, **own, **arguments})
    for module in layer.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.5)
    return layer.double()


def by_hand(layer, x):
    """The block with the token loop as its memory."""
    q, k, v, *_ = layer.project(x, None, Span.build(None, *x.shape[:2], "cpu"), None)
    names = ["theta", *["eta"] * layer.momentum, *["alpha"] * layer.forget]
    names += ["omega"] * (layer.window > 1) + ["step"] * layer.muon
    raw = torch.sigmoid(layer.gate_proj(x)).split(HEADS, -1)
    gates = {"eta": None, "alpha": None, **dict(zip(names, raw, strict=True))}
    gates["theta"] = gates["theta"] * layer.max_theta
    if layer.momentum:
        gates["theta"] = gates["theta"] * (1 - gates["eta"])
    if layer.muon:
        gates["step"] = gates["step"] * layer.max_muon_step
    y, _ = neural_memory(q, k, v, initial=list(layer.initial), spec=layer.spec, backend="reference", **gates)
    y = (y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.out_norm.weight).flatten(-2)
    return layer.o_proj(y * torch.sigmoid(layer.output_gate(x)))


@pytest.mark.parametrize(
    ("kind", "choices"),
    [
        ("omega", {}),
        ("omega", {"degree": 1, "depth": 1, "momentum": True}),
        ("atlas", {}),
        ("atlas", {"window": 1, "forget": False, "max_muon_step": 0.5}),
        ("atlas++", {"read_mode": "chunk_start"}),
    ],
)
def test_the_layer_is_the_block_around_the_token_loop(kind, choices) -> None:
    layer, x = draw(kind, **choices), normal(2, 13, DIM)
    torch.testing.assert_close(layer(x)[0], by_hand(layer, x), **EXACT)


def test_each_member_is_what_the_paper_says() -> None:
    omega, atlas, gated = (draw(kind) for kind in MEMBERS)
    assert (omega.spec.optimizer, omega.momentum) == ("gd", False)
    assert (atlas.spec.optimizer, atlas.momentum, atlas.spec.network) == ("muon", True, "mlp")
    assert (gated.spec.optimizer, gated.spec.network, gated.depth) == ("muon", "gated", 3)
    assert [m.spec.window for m in (omega, atlas, gated)] == [3, 3, 3]
    assert not atlas.spec.muon_per_token and atlas.spec.granularity == "token"


def test_features_have_the_polynomial_of_the_keys_as_their_product() -> None:
    layer, x = draw(), normal(2, 9, DIM)
    span = Span.build(None, 2, 9, "cpu")
    with torch.no_grad():
        layer.log_coefficients.copy_(torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64))
    q, k, v, *_ = layer.project(x, None, span, None)
    plain = draw(degree=1)
    plain.load_state_dict(
        {n: p for n, p in layer.state_dict().items() if "initial" not in n and n != "log_coefficients"},
        strict=False,
    )
    small_q, small_k, small_v, *_ = plain.project(x, None, span, None)
    assert (q.shape[-1], small_q.shape[-1], v.shape[-1]) == (10, 3, WIDTH)
    dot = torch.einsum("bthi,bshi->bhts", small_q, small_k)
    wanted = math.exp(0.3) + math.exp(-0.2) * dot + math.exp(0.1) * dot**2
    torch.testing.assert_close(torch.einsum("bthi,bshi->bhts", q, k), wanted, **EXACT)
    assert torch.equal(v, small_v)


def test_a_window_of_one_without_muon_and_features_is_the_memory_of_titans() -> None:
    """Invariant 19."""
    layer = draw("omega", degree=1, key_width=WIDTH, window=1, momentum=True)
    titans = NeuralMemory(DIM, HEADS, chunk_size=4, expansion=1.5, norm="none", activation="gelu").double()
    titans.load_state_dict(layer.state_dict())
    titans.max_theta = layer.max_theta
    x = normal(2, 13, DIM)
    torch.testing.assert_close(layer(x)[0], titans(x)[0], **EXACT)


@torch.no_grad()
def test_a_chunk_moves_the_weights_by_an_orthogonal_matrix_of_the_learned_size() -> None:
    layer, x = draw("atlas", forget=False), normal(1, 4, DIM)
    _, state = layer(x)
    size = layer.gates(x).step.mean(1)[0]
    for index, learned in enumerate(layer.initial):
        moved = (state[f"weights.{index}"][0] - learned) / size[:, None, None]
        # Four tokens and a window give a rank of at most four; Newton-Schulz lifts what there is.
        found = torch.linalg.svdvals(moved)[:, :3]
        assert (found > 0.3).all() and (found < 1.25).all()


@torch.no_grad()
@pytest.mark.parametrize("kind", MEMBERS)
def test_equal_tokens_and_open_gates_do_not_overshoot(kind) -> None:
    """The bound of the write step: a chunk of equal keys writes no more than twice the error."""
    torch.manual_seed(0)
    config = SimpleNamespace(hidden_size=32, num_attention_heads=2, rms_norm_eps=1e-6)
    biases = {"step_bias": 4.0, "omega_bias": 4.0, "muon_bias": 4.0}
    layer = memory_from_config(config, {"kind": kind, "key_width": 6, "chunk_size": 16, **biases})
    for x in (torch.randn(1, 320, 32), torch.randn(1, 1, 32).expand(1, 320, 32)):
        y, state = layer(x)
        assert y.isfinite().all()
        assert all(state[f"weights.{i}"].norm() < 5 * w.norm() for i, w in enumerate(layer.initial))


def test_persistent_tokens_are_a_chunk_of_their_own() -> None:
    """As many as a chunk has, and no window: in one call on both, with Muon's step at their end."""
    layer = draw(window=1)
    gate = MemoryAsGate(Attention(DIM, HEADS, window=5), layer, 4).double()
    x, prefix = normal(2, 9, DIM), gate.persistent
    _, start = layer.read_prefix(prefix)
    whole, _ = layer(torch.cat([prefix.expand(2, -1, -1), x], 1))
    torch.testing.assert_close(layer(x, start=start)[0], whole[:, 4:], **EXACT)
    _, half = layer.read_prefix(prefix[:2])
    moved = [half[f"weights.{i}"][0] - w for i, w in enumerate(layer.initial)]
    assert all(m.abs().max() > 1e-3 for m in moved)


@pytest.mark.parametrize("kind", MEMBERS)
def test_a_gradient_reaches_every_parameter(kind) -> None:
    layer = draw(kind)
    (layer(normal(2, 13, DIM))[0] * normal(2, 13, DIM, seed=1)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-9, name


def test_weights_start_at_the_scale_of_values() -> None:
    for kind in MEMBERS:
        torch.manual_seed(0)
        layer = memory_from_config(
            SimpleNamespace(hidden_size=256, num_attention_heads=4, rms_norm_eps=1e-6),
            {"kind": kind, "conv_kernel": 0},
        )
        q, *_ = layer.project(torch.randn(1, 200, 256), None, Span.build(None, 1, 200, "cpu"), None)
        torch.testing.assert_close(q.square().sum(-1), torch.full(q.shape[:3], 2.5), rtol=1e-3, atol=0)
        y = layer.read(q, [w[None] for w in layer.initial])
        assert 0.25 < y.std() < 1.0, kind


def test_impossible_settings_are_refused() -> None:
    for choices, message in (
        ({"degree": 3}, "degree is 3"),
        ({"key_width": 0}, "key_width 0"),
        ({"momentum": False}, "Muon orthogonalises the momentum"),
        ({"network": "gated", "depth": 3}, "a gated network has depth 2"),
        ({"window": 0}, "window is 0"),
        ({"norm": "residual"}, "unknown memory setting 'norm'"),
    ):
        with pytest.raises(ConfigError, match=message):
            draw(**choices)
