import pytest
import torch

from nestor.models import NestorForCausalLM, preset
from nestor.training.carrying import next_start


def small_model(name):
    changes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if name == "transformer":
        changes["sliding_window"] = 8
    elif name == "titans-mac":
        changes |= {"segment_size": 16, "memory": {"chunk_size": 8}}
    else:
        changes["memory"] = {"chunk_size": 8}
    return NestorForCausalLM(preset(name, "quick", **changes)).double()


def tensors(state):
    return [state.clock, *(tensor for layer in state.layers.values() for tensor in layer.values())]


@pytest.mark.parametrize("mode", ["carry", "pass"])
def test_no_gradient_flows_into_the_next_batch(mode):
    model = small_model("titans-mag")
    state = model(input_ids=torch.randint(0, 256, (2, 16)), use_cache=True).past_key_values
    assert any(tensor.requires_grad for tensor in tensors(state))
    assert not any(tensor.requires_grad for tensor in tensors(next_start(state, mode)))
    assert next_start(state, "reset") is None and next_start(None, mode) is None


@pytest.mark.parametrize("name", ["transformer", "titans-lmm", "titans-mac", "titans-mag", "titans-mal"])
def test_carried_segments_read_as_one_text(name):
    model = small_model(name)
    tokens = torch.randint(0, 256, (3, 40))
    whole = model(input_ids=tokens).logits
    first = model(input_ids=tokens[:, :20], use_cache=True)
    second = model(input_ids=tokens[:, 20:], past_key_values=next_start(first.past_key_values, "carry"))
    assert torch.allclose(torch.cat([first.logits, second.logits], 1), whole, rtol=0, atol=1e-10)


def test_passing_hands_on_nothing_where_there_is_no_memory():
    model = small_model("transformer")
    first, second = torch.randint(0, 256, (2, 3, 20))
    state = next_start(model(input_ids=first, use_cache=True).past_key_values, "pass")
    passed = model(input_ids=second, past_key_values=state).logits
    assert torch.allclose(passed, model(input_ids=second).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["titans-lmm", "titans-mac", "titans-mag", "titans-mal"])
def test_passing_starts_a_lane_from_the_memory_of_its_neighbour_alone(name):
    """Lane b reads as if lane b - 1 had been read in its place, and what its own lane read has no effect."""
    model = small_model(name)
    first, second = torch.randint(0, 256, (2, 3, 20))

    def passed(text):
        state = model(input_ids=text, use_cache=True).past_key_values
        return model(input_ids=second, past_key_values=next_start(state, "pass")).logits

    logits = passed(first)
    changed = first.clone()
    changed[0] = torch.randint(0, 256, (20,))
    differing = (passed(changed) - logits).abs().amax((1, 2))
    assert differing[1] > 1e-6 and differing[0] == 0 and differing[2] == 0
    assert (logits - model(input_ids=second).logits).abs().max() > 1e-6


def test_memory_as_context_retrieves_from_the_passed_memory_in_the_middle_of_a_segment():
    """After 20 tokens a segment of 16 is open; what it retrieves from must not be the older weights."""
    model = small_model("titans-mac")
    state = model(input_ids=torch.randint(0, 256, (2, 20)), use_cache=True).past_key_values
    layer = next_start(state, "pass").layers[0]
    assert torch.equal(layer["segment.0"], layer["memory.weights.0"])
    assert not torch.equal(state.layers[0]["segment.0"], state.layers[0]["memory.weights.0"])
