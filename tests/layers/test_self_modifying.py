"""The self-modifying memory as a layer: its formula, its start, and what it is in a decoder."""

import math

import pytest
import torch
from torch.nn import functional as F

from nestor import NestorForCausalLM, State, preset
from nestor.errors import ConfigError
from nestor.layers.registry import build_mixer
from nestor.layers.self_modifying import SelfModifyingMemory
from nestor.layers.writes import record_writes
from nestor.models.configuration import NestorConfig
from nestor.ops.self_modifying import Gate, self_modifying_memory

EXACT = {"rtol": 1e-9, "atol": 1e-10}
DIM, HEADS = 8, 2
CHUNKS = {"chunk_size": 4, "projection_chunk_size": 2}

VARIANTS = {
    "usual": {},
    "paper": {"targets": "self", "step_cap": "none"},
    "anchor": {"read_mode": "anchor"},
    "adaptive_queries": {"adaptive": ["k", "v", "q", "eta", "alpha"]},
    "static": {"adaptive": []},
    "some": {"adaptive": ["v", "alpha"], "momentum": "gated", "inner_loss": "dot_product"},
    "fixed_momentum": {"momentum": "fixed", "momentum_keep": 0.5},
    "input": {"convolution": "input"},
    "bare": {"conv_kernel": 0, "output_gate": False},
    "deep": {"depth": 2},
    "deep_soft": {"depth": 2, "step_cap": "soft", "recompute": True, "horizon": 20.0},
}


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def draw(**choices):
    torch.manual_seed(1)
    return SelfModifyingMemory(DIM, HEADS, expansion=1.5, **CHUNKS, **choices).double()


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_layer_is_its_formula(variant) -> None:
    """Projections, convolutions and gates by hand, the token loop for the memories."""
    choices = {"horizon": 20.0, **VARIANTS[variant]}
    layer, x = draw(**choices), normal(2, 9, DIM)

    def convolved(name, y):
        if name not in layer.convolutions:
            return y
        weight = layer.convolutions[name].weight
        return F.conv1d(F.pad(y.mT, (weight.shape[1] - 1, 0)), weight[:, None], groups=DIM).mT

    def heads(name):
        y = getattr(layer, f"{name}_proj")(convolved("x", x))
        y = convolved(name, y).unflatten(-1, (HEADS, -1))
        return y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()

    static = [n for n in ("eta", "alpha") if n not in layer.initial]
    static += ["mu"] * (layer.momentum == "gated")
    given = {}
    if static:
        parts = layer.gate_proj(x).unflatten(-1, (len(static), HEADS)).unbind(-2)
        given = dict(zip(static, parts, strict=True))
    if "eta" in given:
        given["eta"] = layer.spec.max_step * torch.sigmoid(given["eta"])
    if "alpha" in given:
        given["alpha"] = torch.exp(-torch.log1p(torch.exp(given["alpha"])) / 20.0)
    if "mu" in given:
        given["mu"] = torch.sigmoid(given["mu"])
    if layer.momentum == "fixed":
        given["mu"] = torch.full((2, 9, HEADS), 0.5).double()
    reads = dict(layer.gate_read.items())
    q, k, v = map(heads, "qkv")
    y, state = self_modifying_memory(
        q, k, v, {n: tuple(ws) for n, ws in layer.initial.items()}, spec=layer.spec, g=v,
        gates={n: Gate(b, reads.get(n)) for n, b in layer.gate_bias.items()}, backend="reference", **given,
    )  # fmt: skip
    y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.out_norm.weight
    y = y.flatten(-2)
    y = y if layer.output_gate is None else y * torch.sigmoid(layer.output_gate(x))
    found, after = layer(x)
    torch.testing.assert_close(found, layer.o_proj(y), **EXACT)
    for name, matrices in state.weights.items():
        for index, w in enumerate(matrices):
            torch.testing.assert_close(after[f"weights.{name}.{index}"], w, **EXACT)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gradient_reaches_every_parameter_at_the_start(variant) -> None:
    """No branch begins at zero: every learned initial state, gate and projection has a gradient."""
    layer = draw(**VARIANTS[variant])
    (layer(normal(2, 13, DIM))[0] * normal(2, 13, DIM, seed=1)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-8, name


@torch.no_grad()
def test_training_and_evaluation_are_one_function() -> None:
    layer, x = draw(), normal(2, 9, DIM)
    for one, other in zip(layer.train()(x), layer.eval()(x), strict=True):
        if isinstance(one, dict):
            assert all(torch.equal(one[name], other[name]) for name in one)
        else:
            assert torch.equal(one, other)


@torch.no_grad()
def test_retention_starts_at_the_horizon() -> None:
    """Not at sigmoid(0), of which 1.5e-5 is left after 16 tokens."""
    layer = draw(adaptive=[], horizon=1000.0)
    torch.nn.init.zeros_(layer.gate_proj.weight)
    gates = layer.gates(normal(1, 3, DIM))
    torch.testing.assert_close(gates["alpha"], torch.full_like(gates["alpha"], math.exp(-1 / 4000)), **EXACT)


@torch.no_grad()
@pytest.mark.parametrize(("period", "max_step"), [(1, 1.0), (3, 1.0), (16, 1.0), (16, 0.2), (16, 0.05)])
def test_a_period_of_one_key_leaves_half_of_the_answer_at_first(period, max_step) -> None:
    layer = SelfModifyingMemory(
        DIM, 2, adaptive=[], chunk_size=48, projection_chunk_size=period, max_step=max_step
    ).double()
    torch.nn.init.zeros_(layer.gate_proj.weight)
    eta = layer.gates(normal(1, 3, DIM))["eta"]
    expected = min(1 - 0.5 ** (1 / period), max_step / 2)
    torch.testing.assert_close(eta, torch.full_like(eta, expected), rtol=1e-6, atol=0.0)


@torch.no_grad()
@pytest.mark.parametrize("decay", ["zero", "initial"])
def test_what_is_forgotten_of_the_start_comes_back_only_from_it(decay) -> None:
    """Targets that memories make for themselves restore nothing: towards zero keys fade to nothing."""
    torch.manual_seed(0)
    layer = SelfModifyingMemory(32, 2, horizon=64.0, decay=decay)
    x = torch.randn(8, 32)[torch.randint(0, 8, (1, 4096))]
    _, state = layer(x)
    left = state["weights.k.0"].norm() / layer.initial["k"][0].norm()
    assert left > 0.3 if decay == "initial" else left < 1e-3


@torch.no_grad()
def test_queries_are_static_and_all_other_memories_change() -> None:
    """Invariant 21: W_q is read and learned from outside, and never changes inside of a sequence."""
    layer = draw()
    _, state = layer(normal(1, 9, DIM))
    assert {n.split(".")[1] for n in state if n.startswith("weights")} == {"k", "v", "eta", "alpha", "mem"}
    for name, matrices in layer.initial.items():
        assert (state[f"weights.{name}.0"] - matrices[0]).abs().max() > 1e-4, name


@torch.no_grad()
def test_memories_stay_bounded_in_long_streams_of_anything_and_of_one_token() -> None:
    torch.manual_seed(0)
    layer = SelfModifyingMemory(32, 2)
    x = torch.randn(1, 1536, 32)
    x[:, 768:] = x[:, :1]
    state = layer(x)[1]
    for name, matrices in layer.initial.items():
        first = torch.linalg.matrix_norm(matrices[0]).max()
        assert torch.linalg.matrix_norm(state[f"weights.{name}.0"]).max() < 10 * max(1.0, first), name


@torch.no_grad()
def test_writes_are_reported_and_precision_is_kept() -> None:
    layer, x = draw().bfloat16(), normal(2, 9, DIM).bfloat16()
    with record_writes() as writes:
        y, state = layer(x)
    assert y.dtype == torch.bfloat16 and state["weights.k.0"].dtype == torch.float32
    assert [w.shape for w in writes] == [(2, 9, HEADS)] and (writes[0] > 0).all()


# --- in a decoder ------------------------------------------------------------------------------------------


def tiny(**memory):
    torch.manual_seed(0)
    config = NestorConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        layer_types=["self_modifying"] * 2, memory={**CHUNKS, **memory}, bos_token_id=None,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return NestorForCausalLM(config)


@pytest.mark.parametrize("memory", [{}, {"depth": 2, "momentum": "gated", "max_step": 0.1}])
@torch.no_grad()
def test_a_model_reads_in_pieces_and_in_batches_as_it_reads_at_once(memory) -> None:
    """Invariants 8 and 10: cuts inside of chunks, rows alone, a State that joins them."""
    model = tiny(**memory).double()
    ids = torch.randint(0, 32, (3, 13))
    whole = model(ids).logits
    states = [model(ids[b : b + 1, :5]).past_key_values for b in range(3)]
    output = model(ids[:, 5:6], past_key_values=State.stack(states))
    torch.testing.assert_close(output.logits[:, 0], whole[:, 5], **EXACT)
    for t in range(6, 13):
        output = model(ids[:, t : t + 1], past_key_values=output.past_key_values)
        torch.testing.assert_close(output.logits[:, 0], whole[:, t], **EXACT)
    torch.testing.assert_close(model(ids[[2, 0, 1]]).logits, whole[[2, 0, 1]], **EXACT)


@torch.no_grad()
def test_a_saved_model_and_its_state_go_on_as_if_never_saved(tmp_path) -> None:
    model, ids = tiny(), torch.randint(0, 32, (1, 11))
    model.save_pretrained(tmp_path)
    again = NestorForCausalLM.from_pretrained(tmp_path)
    state = model(ids[:, :6]).past_key_values
    state.save(tmp_path / "state.safetensors", model)
    loaded = State.load(tmp_path / "state.safetensors", again)
    wanted = model(ids[:, 6:], past_key_values=state).logits
    assert torch.equal(again(ids[:, 6:], past_key_values=loaded).logits, wanted)


def recall_batch(generator, rows=32, pairs=3, keys=8):
    """`k v k v k v`, then every pair again in another order: ids, and the places of the keys of the second
    half."""
    chosen = torch.stack([torch.randperm(keys, generator=generator)[:pairs] for _ in range(rows)])
    values = torch.randint(keys, 2 * keys, (rows, pairs), generator=generator)
    order = torch.stack([torch.randperm(pairs, generator=generator) for _ in range(rows)])
    told = torch.stack([chosen, values], -1).flatten(1)
    asked = torch.stack([chosen.gather(1, order), values.gather(1, order)], -1).flatten(1)
    return torch.cat([told, asked], 1), torch.arange(2 * pairs, 4 * pairs - 1, 2)


def test_a_small_model_learns_to_recall_what_it_reads_once() -> None:
    """Chance is 1/3: the value of one of three pairs."""
    torch.manual_seed(0)
    config = NestorConfig(
        vocab_size=16, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        layer_types=["self_modifying"], bos_token_id=None, eos_token_id=None, pad_token_id=None,
        memory={"chunk_size": 6, "projection_chunk_size": 6, "read_mode": "anchor", "step_bias": 1.0},
    )  # fmt: skip
    model, generator = NestorForCausalLM(config), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(60):
        ids, places = recall_batch(generator)
        logits = model(ids).logits[:, places]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, places + 1].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        ids, places = recall_batch(generator, rows=256)
        answers = model(ids).logits[:, places].argmax(-1)
    assert (answers == ids[:, places + 1]).float().mean() > 0.5


@pytest.mark.parametrize("adaptive", [["eta"], []])
def test_heads_may_start_with_steps_of_their_own(adaptive) -> None:
    steps = []
    for bias in ([0.0, -5.0], -5.0):
        torch.manual_seed(0)
        layer = SelfModifyingMemory(8, 2, adaptive=adaptive, step_bias=bias)
        found = layer.gate_bias["eta"] if adaptive else layer.gate_proj.bias[: layer.heads]
        steps.append(found.tolist())
    assert steps == [[0.0, -5.0], [-5.0, -5.0]]


def test_steps_of_heads_are_saved_with_a_model(tmp_path) -> None:
    model = NestorForCausalLM(preset("hope", "quick", memory={"step_bias": [0, -1, -2, -3]}))
    model.config.save_pretrained(tmp_path)
    loaded = NestorForCausalLM(NestorConfig.from_pretrained(tmp_path))
    for layer in loaded.layers:
        assert layer.mixer.gate_bias["eta"].tolist() == [0.0, -1.0, -2.0, -3.0]


def test_impossible_settings_are_refused() -> None:
    biases = ([0.0, -1.0, -2.0], [], "-5", math.nan, True, [0.0, None], [[0.0, 1.0]] * 2, {0: 1, 1: 2})
    cases = [
        ({"heads": 3}, "does not divide into 3 heads"),
        *(
            ({"heads": 2, "step_bias": bias}, r"step_bias is .*; give one finite number, or .* of 2 heads")
            for bias in biases
        ),
        ({"depth": 3}, "depth is 3"),
        ({"max_step": 0}, "max_step 0"),
        ({"momentum": "fix"}, "momentum is 'fix'; .* Did you mean 'fixed'"),
        ({"momentum_keep": 1.0}, "momentum_keep is 1.0"),
        ({"convolution": "output"}, "convolution is 'output'"),
        ({"adaptive": ["mem"]}, "adaptive has 'mem'; it may have k, v, q, eta, alpha"),
        ({"targets": "value"}, "a gate is a linear memory"),
        ({"chunk_size": 6, "projection_chunk_size": 4}, "one must divide the other"),
    ]
    for choices, message in cases:
        with pytest.raises(ConfigError, match=message):
            SelfModifyingMemory(**{"dim": DIM, "heads": HEADS, **choices})
    config = tiny().config
    config.memory = {"chunksize": 4}
    with pytest.raises(ConfigError, match="unknown memory setting 'chunksize'. Did you mean 'chunk_size'"):
        build_mixer("self_modifying", config, 0)
