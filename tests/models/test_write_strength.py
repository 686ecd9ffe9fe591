"""`write_strength`: how hard the memories write each token of a caller."""

import pytest
import torch

from nestor.errors import NestorError
from nestor.layers.span import Span
from nestor.layers.writes import record_writes
from nestor.ops.neural_memory import neural_memory

TITANS = ("titans-lmm", "titans-mac", "titans-mag", "titans-mal")
# What is recorded is float32, whatever the model computes in.
CLOSE = {"rtol": 1e-5, "atol": 1e-7}


@pytest.fixture(params=TITANS)
def model(request, tiny):
    """A model of each kind with a memory in turn."""
    return tiny(request.param)


def strength_by_hand(memory, x):
    """`theta |gradient|` `[B, T]`, mean over heads: autograd of the inner loss at each chunk's start."""
    batch, length, _ = x.shape
    chunk = memory.spec.chunk_size
    q, k, v, *_ = memory.project(x, None, Span.build(None, batch, length, "cpu"), None)
    gates = memory.gates(x)
    streams = (q, k, v, gates.theta, gates.eta, gates.alpha)
    norm = {"gamma": memory.memory_gamma, "beta": memory.memory_beta}
    out = torch.empty(batch, length, memory.heads)
    for t in range(length):
        weights = [w.expand(batch, *w.shape) for w in memory.initial]
        if t >= chunk:
            before = [s[:, : t - t % chunk] for s in streams]
            _, state = neural_memory(
                *before, list(memory.initial), spec=memory.spec, backend="reference", **norm
            )
            weights = state.weights
        weights = [w.detach().clone().requires_grad_() for w in weights]
        with torch.enable_grad():
            f = memory.read(k[:, t : t + 1], weights)[:, 0]
            loss = memory.spec.loss_scale / 2 * (f - v[:, t]).square().sum()
        gradients = torch.autograd.grad(loss, weights)
        out[:, t] = gates.theta[:, t] * sum(g.square().sum((2, 3)) for g in gradients).sqrt()
    return out.mean(2)


@torch.no_grad()
def test_it_is_the_write_step_times_the_norm_of_the_inner_gradient(tiny, tokens):
    model, ids = tiny("titans-lmm", num_hidden_layers=1), tokens(2, 11)
    block = model.layers[0]
    expected = strength_by_hand(block.mixer, block.mixer_norm(model.embed_tokens(ids)))
    strength = model.write_strength(ids)
    assert strength.dtype == torch.float32 and strength.shape == (2, 11)
    torch.testing.assert_close(strength, expected, **CLOSE)


@torch.no_grad()
def test_segments_of_memory_as_context_come_back_as_the_caller_s_tokens(tiny, tokens):
    """The memory reads what attention puts out, a segment at a time; chunks go on from one to the next."""
    model, ids = tiny("titans-mac", num_hidden_layers=1), tokens(2, 21)
    read = []
    memory = model.layers[0].mixer.memory
    memory.register_forward_pre_hook(lambda module, arguments: read.append(arguments[0]))
    strength = model.write_strength(ids)
    assert [part.shape[1] for part in read] == [8, 8, 8]
    expected = strength_by_hand(memory, torch.cat(read, 1)[:, :21])
    torch.testing.assert_close(strength, expected, **CLOSE)


def test_a_call_that_goes_on_from_a_state_gives_what_one_call_on_the_whole_gives(model, tokens):
    ids = tokens(2, 21)
    whole = model.write_strength(ids)
    for cut in (1, 7, 8, 13, 20):
        state = model(ids[:, :cut]).past_key_values
        torch.testing.assert_close(
            model.write_strength(ids[:, cut:], past_key_values=state), whole[:, cut:], **CLOSE
        )
    assert not torch.allclose(model.write_strength(ids[:, 8:]), whole[:, 8:], rtol=1e-3)


@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_padding_has_strength_zero_and_changes_no_other(model, tokens, side):
    ids, mask = tokens(3, 14), torch.ones(3, 14, dtype=torch.int64)
    for row, count in enumerate((0, 5, 9)):
        start = {"left": 0, "right": 14 - count, "inside": 2}[side]
        mask[row, start : start + count] = 0
    strength = model.write_strength(ids, attention_mask=mask)
    for row in range(3):
        kept = mask[row].bool()
        assert not strength[row, ~kept].any()
        assert (strength[row, kept] > 0).all()
        alone = model.write_strength(ids[row : row + 1, kept])
        torch.testing.assert_close(strength[row, kept], alone[0], **CLOSE)


def test_rows_at_different_places_of_their_streams_equal_each_alone(model, tokens):
    ids, more = tokens(2, 11), tokens(2, 6)
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[1, :6] = 0
    state = model(ids, attention_mask=mask).past_key_values
    strength = model.write_strength(more, past_key_values=state)
    for row, first in enumerate((0, 6)):
        whole = model.write_strength(torch.cat([ids[row : row + 1, first:], more[row : row + 1]], 1))
        torch.testing.assert_close(strength[row], whole[0, 11 - first :], **CLOSE)


def test_neither_the_state_given_nor_a_parameter_changes(model, tokens):
    state = model(tokens(2, 7)).past_key_values
    before = {i: {name: t.clone() for name, t in layer.items()} for i, layer in state.layers.items()}
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.write_strength(tokens(2, 5), past_key_values=state)
    assert state.clock.tolist() == [7, 7]
    for index, layer in before.items():
        for name, tensor in layer.items():
            assert torch.equal(state.layers[index][name], tensor)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, parameters[name]) and parameter.grad is None


def test_persistent_tokens_are_not_counted_and_each_memory_reports_once(model, tokens):
    with record_writes() as writes:
        model(tokens(3, 13))
    assert [tuple(write.shape) for write in writes] == [(3, 13, 2)] * 2


def test_it_is_the_mean_over_heads_and_over_the_layers_that_have_a_memory(tiny, tokens):
    kinds = ["full_attention", "neural_memory", "memory_as_gate", "sliding_attention"]
    model, ids = tiny("titans-mag", num_hidden_layers=4, layer_types=kinds), tokens(2, 9)
    with record_writes() as writes:
        model(ids)
    assert len(writes) == 2
    expected = (writes[0].mean(2) + writes[1].mean(2)) / 2
    torch.testing.assert_close(model.write_strength(ids), expected, **CLOSE)


def test_what_was_just_read_is_written_less_hard(tiny):
    """The same token again and again: from chunk to chunk the memory knows it better."""
    settings = {"chunk_size": 4, "conv_kernel": 0, "max_step": 0.3, "step_bias": 0.0}
    model = tiny("titans-lmm", num_hidden_layers=1, memory=settings)
    strength = model.write_strength(torch.full((1, 16), 65))[0]
    chunks = strength.view(4, 4)
    torch.testing.assert_close(chunks, chunks[:, :1].expand(4, 4), **CLOSE)
    assert (chunks[1:, 0] < 0.95 * chunks[:-1, 0]).all()


def test_a_model_without_a_memory_is_refused(tiny, tokens):
    with pytest.raises(NestorError, match="no layer of this model has a memory"):
        tiny("transformer").write_strength(tokens(1, 4))


@pytest.mark.slow  # a minute of tracing
def test_compiled_blocks_report_their_writes_to_those_who_watch(tiny, tokens):
    # One layer and two chunks: tracing takes its time for each.
    model, ids = tiny("titans-mag", num_hidden_layers=1), tokens(2, 5)
    expected = model.write_strength(ids)
    for block in model.layers:
        block.compile(backend="eager")
    with torch.no_grad():
        logits = model(ids).logits
    torch.testing.assert_close(model.write_strength(ids), expected, **CLOSE)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)
