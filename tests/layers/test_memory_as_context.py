"""Memory as context, against a token loop that follows spec section 3.2 sentence by sentence."""

import pytest
import torch
from torch.nn import functional as F

from nestor.errors import ConfigError
from nestor.layers.memory_as_context import MemoryAsContext
from nestor.layers.neural_memory import NeuralMemory
from nestor.layers.span import Span

EXACT = {"rtol": 1e-9, "atol": 1e-10}
SEGMENT = 8


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotated(x, position, theta=10_000.0):
    """Rotary positions on `[H, p]`: pairs (i, i + p/2) turn by `position * theta^(-2i/p)`."""
    half = x.shape[-1] // 2
    angle = position * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def by_hand(layer, x):
    """One sequence `[T, d]`, a token at a time: retrieve, attend, write, gate."""
    heads, kv, width = layer.heads, layer.kv_heads, layer.head_dim
    memory = layer.memory
    # All queries of the retrieval at once: they depend on inputs alone.
    recall_queries, _ = memory.queries(x[None], None, Span.build(None, 1, len(x), "cpu"))
    state, outputs = None, []
    for t in range(len(x)):
        if t % SEGMENT == 0:
            entry = [w[None] for w in memory.initial]
            if state is not None:
                entry = [state[f"weights.{layer_index}"] for layer_index in range(memory.depth)]
            keys, values = [], []  # of the segment's tokens, and of what was recalled for each
        h = layer.retrieved_norm(memory.read(recall_queries[:, t : t + 1], entry).flatten(-2))[0, 0]
        for source in (h, x[t]):
            keys.append(rotated(layer.k_proj(source).reshape(kv, width), t))
            values.append(layer.v_proj(source).reshape(kv, width))
        seen_keys, seen_values = list(keys), list(values)
        if layer.persistent is not None:
            seen_keys += [layer.k_proj(p).reshape(kv, width) for p in layer.persistent]
            seen_values += [layer.v_proj(p).reshape(kv, width) for p in layer.persistent]
        query = rotated(layer.q_proj(x[t]).reshape(heads, width), t)
        mixed = []
        for head in range(heads):
            group = head * kv // heads
            score = torch.stack([k[group] for k in seen_keys]) @ query[head] / width**0.5
            mixed.append(score.softmax(0) @ torch.stack([v[group] for v in seen_values]))
        y = layer.o_proj(torch.cat(mixed))
        m, state = memory(y[None, None], state)
        outputs.append(y * torch.sigmoid(layer.gate_norm(m[0, 0])))
    return torch.stack(outputs)


@pytest.mark.parametrize("persistent", [0, 3])
@pytest.mark.parametrize(
    "choices", [{}, {"momentum": False, "depth": 3}, {"conv_kernel": 0, "chunk_size": 8}]
)
def test_the_layer_equals_the_token_loop(build_layer, choices, persistent):
    """Segments, retrieval at the segment's start, both masks, the gate, the borders: all of it."""
    layer = build_layer("memory_as_context", persistent=persistent, **choices)
    x = normal(2, 2 * SEGMENT + 5, 8)
    with torch.no_grad():
        y, _ = layer(x)
        for row in range(2):
            torch.testing.assert_close(y[row], by_hand(layer, x[row]), **EXACT)


def closed(layer):
    """The layer with a memory that is never written: the write gate is exactly 0."""
    with torch.no_grad():
        layer.memory.gate_proj.weight[: layer.memory.heads] = 0
        layer.memory.gate_proj.bias[: layer.memory.heads] = -float("inf")
    return layer


@torch.no_grad()
def test_a_memory_that_is_never_written_leaves_attention_in_blocks(build_layer):
    """Invariant 25: block-diagonal attention over [persistent, reads of the initial memory, segment]."""
    layer = closed(build_layer("memory_as_context", conv_kernel=0, output_gate=False))
    x = normal(1, 2 * SEGMENT, 8)
    y, state = layer(x)
    for index, initial in enumerate(layer.memory.initial):
        torch.testing.assert_close(state[f"memory.weights.{index}"][0], initial, **EXACT)
    span = Span.build(None, 1, 2 * SEGMENT, "cpu")
    fresh = [w[None] for w in layer.memory.initial]

    def heads(t):
        t = t.unflatten(-1, (-1, layer.head_dim)).transpose(0, 1)
        return t.repeat_interleave(layer.heads // len(t), 0)

    for start in (0, SEGMENT):
        segment = x[:, start : start + SEGMENT]
        place = Span.build(None, 1, SEGMENT, "cpu")
        queries, _ = layer.memory.queries(segment, None, place)
        h = layer.retrieved_norm(layer.memory.read(queries, fresh).flatten(-2))[0]
        turn = torch.stack

        def turned(t, offset=start):
            return turn([rotated(t[:, i], offset + i) for i in range(SEGMENT)], 1)

        key = [heads(layer.k_proj(layer.persistent)), turned(heads(layer.k_proj(h)))]
        key.append(turned(heads(layer.k_proj(segment[0]))))
        value = [heads(layer.v_proj(s)) for s in (layer.persistent, h, segment[0])]
        causal = torch.ones(SEGMENT, SEGMENT).tril().bool()
        mask = torch.cat([torch.ones(SEGMENT, 3).bool(), causal, causal], 1)
        query = turned(heads(layer.q_proj(segment[0])))
        attended = F.scaled_dot_product_attention(query, torch.cat(key, 1), torch.cat(value, 1), mask)
        attended = layer.o_proj(attended.transpose(0, 1).flatten(1))
        queries, _ = layer.memory.queries(attended[None], None, place)
        m = layer.memory.o_proj(layer.memory.out_norm(layer.memory.read(queries, fresh)).flatten(-2))
        expected = attended * torch.sigmoid(layer.gate_norm(m[0]))
        torch.testing.assert_close(y[0, start : start + SEGMENT], expected, **EXACT)
    assert span.clock_after().tolist() == state["clock"].tolist()


@torch.no_grad()
def test_only_the_memory_joins_segments(build_layer):
    """A token reaches a later segment through what was written of it, and through nothing else."""
    x = normal(1, 2 * SEGMENT, 8)
    changed = x.clone()
    changed[:, 2] += 1.0
    for layer, joined in (
        (build_layer("memory_as_context", conv_kernel=0), True),
        (closed(build_layer("memory_as_context", conv_kernel=0)), False),
    ):
        before, after = layer(x)[0], layer(changed)[0]
        assert torch.equal(after[:, SEGMENT:], before[:, SEGMENT:]) is not joined
        assert not torch.equal(after[:, 2:SEGMENT], before[:, 2:SEGMENT])


@torch.no_grad()
def test_what_is_recalled_for_a_token_is_hidden_from_the_tokens_before_it(build_layer):
    """Trap 1: h_j is made of token j. A change of what is recalled for j alone reaches no token before j."""
    layer, x = build_layer("memory_as_context"), normal(1, SEGMENT, 8)
    before = layer(x)[0]
    queries = layer.memory.queries
    layer.memory.queries = lambda *a, **k: (changed(queries(*a, **k)[0]), queries(*a, **k)[1])

    def changed(q):
        return torch.cat([q[:, :5], -q[:, 5:6], q[:, 6:]], 1)

    after = layer(x)[0]
    assert torch.equal(after[:, :5], before[:, :5])
    assert (after[:, 5:] - before[:, 5:]).abs().amax(2).min() > 1e-9


@torch.no_grad()
def test_the_gate_reads_the_memory_after_its_own_token_and_no_later_one(build_layer):
    """Trap 2: with the attention of a token fixed, later tokens of its segment do not reach its gate."""
    layer, x = build_layer("memory_as_context"), normal(1, SEGMENT, 8)
    gates = []
    layer.gate_norm.register_forward_hook(lambda module, arguments, output: gates.append(output))
    layer(x)
    shorter = layer(x[:, :5])
    changed = x.clone()
    changed[:, 5:] = 3.0
    layer(changed)
    assert torch.equal(gates[2][:, :5], gates[0][:, :5])
    torch.testing.assert_close(gates[1], gates[0][:, :5], **EXACT)
    assert not torch.allclose(gates[2][:, 5:], gates[0][:, 5:])
    assert shorter[0].shape == (1, 5, 8)


@torch.no_grad()
def test_a_write_reaches_the_gate_of_its_own_token(build_layer):
    layer, x = build_layer("memory_as_context", conv_kernel=0), normal(1, 1, 8)
    written = layer(x)[0]
    unwritten = closed(build_layer("memory_as_context", conv_kernel=0))(x)[0]
    assert not torch.allclose(written, unwritten, rtol=1e-6)


def test_sizes_that_do_not_fit_are_refused():
    memory = NeuralMemory(8, 2, chunk_size=4)
    with pytest.raises(
        ConfigError, match="segment_size is 6; it must be a multiple of the memory's chunk_size 4"
    ):
        MemoryAsContext(memory, 6, 2)
    with pytest.raises(ConfigError, match="segment_size is 0"):
        MemoryAsContext(memory, 0, 2)
    with pytest.raises(ConfigError, match="width 8, 3 heads, 3 key-value heads"):
        MemoryAsContext(memory, 8, 3)
    with pytest.raises(ConfigError, match="width 8, 4 heads, 3 key-value heads"):
        MemoryAsContext(memory, 8, 4, 3)
