"""TNT: its formula, its shards, and what it is when parts of it are taken away (invariant 21)."""

import pytest
import torch
from torch.nn import functional as F

from nestor import NestorForCausalLM, preset
from nestor.errors import ConfigError
from nestor.layers.neural_memory import NeuralMemory
from nestor.layers.registry import build_mixer
from nestor.layers.span import Span
from nestor.layers.tnt import FIXED, TNT
from nestor.layers.writes import record_writes
from nestor.ops.neural_memory import neural_memory

EXACT = {"rtol": 1e-9, "atol": 1e-10}
DIM, HEADS, WIDTH = 8, 2, 4


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def draw(local=(1, 3), shard=8, projection="unit", chunk=4, **memory):
    torch.manual_seed(2)
    arguments = {"expansion": 1.5, "max_step": 0.6, "step_bias": 1.0, "conv_kernel": 0, **memory, **FIXED}
    layer = TNT(NeuralMemory(DIM, HEADS, chunk_size=chunk, **arguments), local, shard, projection)
    for module in layer.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.5)
    return layer.double()


def streams(layer, x):
    return layer.memory.project(x, None, Span.build(None, *x.shape[:2], "cpu"), None)[:3]


def token_loop(owner, spec, q, k, v, theta):
    return neural_memory(
        q, k, v, theta, None, None, list(owner.initial), spec=spec, gamma=owner.memory_gamma,
        beta=owner.memory_beta, backend="reference",
    )[0]  # fmt: skip


def answers(layer, x):
    """What the global memory and each local one answer, by token loops; spec section 6, equations of 6.1."""
    q, k, v = streams(layer, x)
    theta = layer.memory.gates(x).theta * layer.global_share
    found = [token_loop(layer.memory, layer.memory.spec, q, k, v, theta)]
    for local in layer.locals:
        shards = []
        for start in range(0, x.shape[1], layer.shard_size):
            s = slice(start, start + layer.shard_size)
            rows = []
            Pi = torch.zeros(x.shape[0], HEADS, WIDTH, WIDTH, dtype=torch.float64)
            for t in range(*s.indices(x.shape[1])):
                Pi = Pi + k[:, t].unsqueeze(-1) * k[:, t].unsqueeze(-2)
                y = torch.einsum("bhi,bhij->bhj", q[:, t], Pi)
                if layer.projection == "unit":
                    y = y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()
                elif layer.projection == "trace":
                    y = y / Pi.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
                rows.append(q[:, t] if layer.projection == "none" else y)
            read = torch.stack(rows, 1)
            shards.append(token_loop(local, local.spec, read, k[:, s], v[:, s], local.theta(x)[:, s]))
        found.append(torch.cat(shards, 1))
    return found


def finished(layer, y, x):
    """The norm, gate and projection around the memories."""
    y = (F.rms_norm(y, (WIDTH,), eps=1e-6) * layer.memory.out_norm.weight).flatten(-2)
    return layer.memory.o_proj(y * torch.sigmoid(layer.memory.output_gate(x)))


@pytest.mark.parametrize("projection", ["raw", "unit", "trace", "none"])
@pytest.mark.parametrize("length", [1, 7, 8, 21, 24])
def test_the_layer_is_the_sum_of_its_memories(length, projection) -> None:
    layer, x = draw(projection=projection), normal(2, length, DIM)
    expected = finished(layer, sum(answers(layer, x)), x)
    torch.testing.assert_close(layer(x)[0], expected, **EXACT)


@pytest.mark.parametrize("length", [8, 17, 24, 29])
def test_shards_side_by_side_equal_shards_one_after_the_other(length) -> None:
    """Folding shards into the batch changes neither outputs nor state nor gradients."""
    layer, x = draw(), normal(2, length, DIM).requires_grad_()
    leaves = [x, *layer.parameters()]
    results = []
    for lengths in (None, torch.full((2,), length)):
        y, state = layer(x, None, Span.build(None, 2, length, "cpu", lengths))
        total = (y * normal(2, length, DIM, seed=1)).sum() + state["local.1.weights.0"].sum()
        results.append((y, state, torch.autograd.grad(total, leaves)))
    (y, state, gradients), (other, other_state, other_gradients) = results
    torch.testing.assert_close(y, other, **EXACT)
    assert state.keys() == other_state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, other_state[name], **EXACT)
    for a, b in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_a_state_at_the_end_of_a_shard_goes_on_with_whole_shards() -> None:
    layer, x = draw(), normal(2, 40, DIM)
    with torch.no_grad():
        whole, _ = layer(x)
        _, state = layer(x[:, :16])
        assert state["position"].tolist() == [0, 0]
        more, after = layer(x[:, 16:], state)
        torch.testing.assert_close(more, whole[:, 16:], **EXACT)
        assert after["position"].tolist() == [0, 0]


# --- invariant 21 -------------------------------------------------------------------------------------------


def test_without_local_memories_it_is_a_memory_read_at_chunk_starts() -> None:
    layer, x = draw(local=()), normal(2, 21, DIM)
    plain = NeuralMemory(
        DIM, HEADS, chunk_size=4, expansion=1.5, max_step=0.6, step_bias=1.0, conv_kernel=0, **FIXED
    ).double()
    plain.load_state_dict(layer.memory.state_dict())
    torch.testing.assert_close(layer(x)[0], plain(x)[0], **EXACT)


def test_one_shard_of_one_local_memory_is_a_plain_chunked_memory() -> None:
    layer, x = draw(local=(3,), shard=32, projection="none"), normal(2, 21, DIM)
    q, k, v = streams(layer, x)
    local = layer.locals[0]
    (found,), _ = layer._shards((q, k, v, local.theta(x)), None, Span.build(None, 2, 21, "cpu"))
    torch.testing.assert_close(found, token_loop(local, local.spec, q, k, v, local.theta(x)), **EXACT)
    assert local.spec.chunk_size == 3 and local.spec.read_mode == "inclusive"


def test_a_changed_token_leaves_local_answers_of_other_shards_alone() -> None:
    layer, x = draw(), normal(1, 24, DIM)
    changed = x.clone()
    changed[:, 10] += 1.0
    found = []
    for text in (x, changed):
        thetas = [local.theta(text) for local in layer.locals]
        span = Span.build(None, 1, 24, "cpu")
        found.append(layer._shards((*streams(layer, text), *thetas), None, span)[0][0])
    assert torch.equal(found[0][:, :10], found[1][:, :10])
    assert torch.equal(found[0][:, 16:], found[1][:, 16:])
    assert not torch.isclose(found[0][:, 10:16], found[1][:, 10:16]).all(-1).any()


def test_the_first_token_of_a_shard_sees_the_initial_weights_and_its_own_write() -> None:
    layer, x = draw(local=(3,)), normal(1, 24, DIM)
    q, k, v = streams(layer, x)
    local = layer.locals[0]
    theta = local.theta(x)
    (found,), _ = layer._shards((q, k, v, theta), None, Span.build(None, 1, 24, "cpu"))
    for t in (0, 8, 16):
        at = slice(t, t + 1)
        read = k[:, at] * (q[:, at] * k[:, at]).sum(-1, keepdim=True)
        read = read / (read.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        alone = token_loop(local, local.spec, read, k[:, at], v[:, at], theta[:, at])
        torch.testing.assert_close(found[:, at], alone, **EXACT)


def test_chunks_of_one_token_are_online_gradient_descent_with_resets() -> None:
    layer, x = draw(local=(1,), depth=1, norm="none", projection="none"), normal(1, 20, DIM)
    q, k, v = streams(layer, x)
    local = layer.locals[0]
    theta = local.theta(x)
    (found,), _ = layer._shards((q, k, v, theta), None, Span.build(None, 1, 20, "cpu"))
    for t in range(20):
        if t % 8 == 0:
            W = local.initial[0]
        error = torch.einsum("hi,hio->ho", k[0, t], W) - v[0, t]
        W = W - theta[0, t, :, None, None] * k[0, t].unsqueeze(-1) * error.unsqueeze(-2)
        torch.testing.assert_close(found[0, t], torch.einsum("hi,hio->ho", q[0, t], W), **EXACT)


def test_every_shard_adds_to_the_gradient_of_the_initial_weights() -> None:
    layer, x = draw(), normal(1, 24, DIM)
    q, k, v = streams(layer, x)
    thetas = [local.theta(x) for local in layer.locals]
    (found,), _ = layer._shards((q, k, v, *thetas), None, Span.build(None, 1, 24, "cpu"))
    weight = normal(*found.shape, seed=1)
    leaf = layer.locals[1].initial[0]
    parts = []
    for start in (0, 8, 16):
        s = slice(start, start + 8)
        (part,) = torch.autograd.grad((found[:, s] * weight[:, s]).sum(), leaf, retain_graph=True)
        assert part.abs().max() > 1e-6
        parts.append(part)
    (whole,) = torch.autograd.grad((found * weight).sum(), leaf)
    torch.testing.assert_close(whole, sum(parts), **EXACT)


# --- as a part of a model -----------------------------------------------------------------------------------


def test_long_global_chunks_write_smaller_steps() -> None:
    assert draw(chunk=4).global_share == 1.0 and draw(chunk=64).global_share == WIDTH / 64


def test_each_memory_reports_its_writes() -> None:
    layer, x = draw(), normal(2, 21, DIM)
    with torch.no_grad(), record_writes() as writes:
        layer(x)
        other = len(writes)
        layer(x, None, Span.build(None, 2, 21, "cpu", torch.tensor([21, 21])))
    assert other == 3 and len(writes) == 6
    for folded, walked in zip(writes[:3], writes[3:], strict=True):
        assert folded.shape == (2, 21, HEADS) and (folded > 0).all()
        torch.testing.assert_close(folded, walked)


def test_a_model_generates_as_it_reads() -> None:
    torch.manual_seed(0)
    model = NestorForCausalLM(preset("tnt", "quick", memory={"chunk_size": 8, "shard_size": 8})).double()
    tokens = torch.randint(0, 250, (2, 21))
    with torch.no_grad():
        whole = model(tokens).logits
        output = model(tokens[:, :6])
        for t in range(6, 21):
            output = model(tokens[:, t : t + 1], past_key_values=output.past_key_values)
            torch.testing.assert_close(output.logits[:, 0], whole[:, t], rtol=1e-7, atol=1e-8)
    assert model.generate(tokens[:, :5], max_new_tokens=4, do_sample=False, eos_token_id=None).shape == (2, 9)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="momentum of the global memory is True; TNT needs False"):
        TNT(NeuralMemory(DIM, HEADS))
    with pytest.raises(ConfigError, match="shard_size is 0"):
        draw(shard=0)
    with pytest.raises(ConfigError, match=r"projection is 'units'.*Did you mean 'unit'"):
        draw(projection="units")
    config = preset("tnt", "quick", memory={"forget": True}, intermediate_size=64)
    with pytest.raises(ConfigError, match="forget cannot be set in TNT"):
        build_mixer("tnt", config, 0)
