"""A decoder whose layers are of all kinds: each keeps its own state under its own index."""

import pytest
import torch

EXACT = {"rtol": 1e-9, "atol": 1e-10}
KINDS = (
    "full_attention",
    "memory_as_gate",
    "neural_memory",
    "memory_as_context",
    "sliding_attention",
    "memory_as_layer",
)


@pytest.fixture
def mixed(tiny):
    settings = {
        "segment_size": 8,
        "attention_conv_kernel": 3,
        "num_hidden_layers": len(KINDS),
        "layer_types": list(KINDS),
    }
    return tiny("titans-mag", **settings)


@torch.no_grad()
def test_every_layer_keeps_the_state_of_its_kind(mixed, tokens):
    state = mixed(tokens(1, 9)).past_key_values
    assert sorted(state.layers) == list(range(len(KINDS)))
    for index, kind in enumerate(KINDS):
        names = set(state.layers[index])
        assert any("cache" in name for name in names) == (kind != "neural_memory")
        assert any("weights.1" in name for name in names) == ("memory" in kind)


@torch.no_grad()
def test_a_mixed_decoder_may_be_cut_anywhere(mixed, tokens):
    ids = tokens(2, 19)
    whole = mixed(ids).logits
    for cuts in ([7], [8, 9], range(1, 19)):
        state, parts = None, []
        for start, stop in zip([0, *cuts], [*cuts, 19], strict=True):
            out = mixed(ids[:, start:stop], past_key_values=state)
            state = out.past_key_values
            parts.append(out.logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, **EXACT)


@torch.no_grad()
def test_a_padded_packed_batch_of_a_mixed_decoder_equals_rows_alone(mixed, tokens):
    ids, mask = tokens(2, 15), torch.ones(2, 15, dtype=torch.int64)
    mask[0, :4] = 0
    resets = torch.zeros(2, 15, dtype=torch.bool)
    resets[0, 9], resets[1, 6] = True, True
    logits = mixed(ids, attention_mask=mask, resets=resets).logits
    for row, start, stop in ((0, 4, 9), (0, 9, 15), (1, 0, 6), (1, 6, 15)):
        alone = mixed(ids[row : row + 1, start:stop]).logits
        torch.testing.assert_close(logits[row, start:stop], alone[0], **EXACT)


@torch.no_grad()
def test_memories_in_layers_one_and_three_only(tiny, tokens):
    """Invariant 25: layers without a memory leave no gap in the State, and generation goes on from it."""
    kinds = ["full_attention", "neural_memory"] * 2
    model = tiny("titans-lmm", num_hidden_layers=4, layer_types=kinds)
    ids = tokens(1, 6)
    out = model(ids)
    state = out.past_key_values
    assert [i for i, layer in state.layers.items() if "weights.0" in layer] == [1, 3]
    assert [i for i, layer in state.layers.items() if "cache.key" in layer] == [0, 2]
    grown = ids
    for _ in range(5):
        grown = torch.cat([grown, model(grown).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None), grown)
