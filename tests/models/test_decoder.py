"""The decoder as a function of parameters, State and tokens, for every preset."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from nestor import NestorForCausalLM, State
from nestor.errors import ConfigError, ShapeError, StateMismatchError

EXACT = {"rtol": 1e-9, "atol": 1e-10}


def assert_same_state(state, expected):
    """Equal up to empty places on the left of caches."""
    assert torch.equal(state.clock, expected.clock)
    assert state.layers.keys() == expected.layers.keys()
    for index, layer in expected.layers.items():
        for name, tensor in layer.items():
            other = state.layers[index][name]
            if "cache" in name.split("."):
                kept = min(other.shape[1], tensor.shape[1])
                assert not other[:, : other.shape[1] - kept].any()
                other, tensor = other[:, other.shape[1] - kept :], tensor[:, tensor.shape[1] - kept :]
            torch.testing.assert_close(other, tensor, **EXACT)


def test_changing_a_token_leaves_earlier_logits_bitwise_equal(model, tokens):
    model = model.float()
    ids = tokens(2, 21)
    before = model(ids).logits
    for t in (0, 3, 9, 20):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] + 1) % 256
        after = model(changed).logits
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t], before[:, t])


def test_every_position_reaches_a_later_logit_unless_a_window_hides_it(model, variant, tokens):
    if variant == "transformer-window":
        pytest.skip("two windowed layers see 11 tokens")
    embeds = model.embed_tokens(tokens(1, 19)).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model(inputs_embeds=embeds).logits[0, -1].sum(), embeds)
    assert (gradient[0].abs().sum(-1) > 0).all()


@given(cuts=st.sets(st.integers(1, 22), max_size=4), resets=st.sets(st.integers(0, 22), max_size=2))
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_cutting_a_stream_anywhere_changes_neither_logits_nor_state(variant, tiny, cuts, resets):
    model = tiny(variant)
    ids = torch.randint(0, 256, (2, 23), generator=torch.Generator().manual_seed(3))
    marks = torch.zeros(2, 23, dtype=torch.bool)
    for place in resets:
        marks[place % 2, place] = True
    with torch.no_grad():
        whole = model(ids, resets=marks)
        state, parts = None, []
        for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), 23], strict=True):
            out = model(ids[:, start:stop], past_key_values=state, resets=marks[:, start:stop])
            state = out.past_key_values
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole.logits, **EXACT)
    assert_same_state(state, whole.past_key_values)


def test_reading_token_by_token_equals_reading_at_once(model, tokens):
    ids = tokens(2, 19)
    state, parts = None, []
    with torch.no_grad():
        for t in range(19):
            out = model(ids[:, t : t + 1], past_key_values=state)
            state = out.past_key_values
            parts.append(out.logits)
        torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, **EXACT)


def test_a_reset_makes_the_rest_equal_a_fresh_sequence(model, tokens):
    ids = tokens(2, 20)
    resets = torch.zeros(2, 20, dtype=torch.bool)
    resets[0, 5], resets[1, 13] = True, True
    out = model(ids, resets=resets)
    assert out.past_key_values.clock.tolist() == [15, 7]
    for row, cut in ((0, 5), (1, 13)):
        fresh = model(ids[row : row + 1, cut:])
        torch.testing.assert_close(out.logits[row, cut:], fresh.logits[0], **EXACT)
        torch.testing.assert_close(out.logits[row, :cut], model(ids[row : row + 1, :cut]).logits[0], **EXACT)
        assert_same_state(out.past_key_values.select([row]), fresh.past_key_values)


@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_a_padded_batch_equals_each_row_alone(model, tokens, side):
    rows = [tokens(1, 17), tokens(1, 6), tokens(1, 11)]
    ids = torch.full((3, 17), 258)
    mask = torch.zeros(3, 17, dtype=torch.int64)
    for b, row in enumerate(rows):
        length = row.shape[1]
        columns = {
            "left": range(17 - length, 17),
            "right": range(length),
            "inside": [*range(3), *range(20 - length, 17)],
        }[side]
        ids[b, list(columns)] = row[0]
        mask[b, list(columns)] = 1
    out = model(ids, attention_mask=mask, labels=ids)
    losses = []
    for b, row in enumerate(rows):
        alone = model(row, labels=row)
        torch.testing.assert_close(out.logits[b][mask[b].bool()], alone.logits[0], **EXACT)
        assert_same_state(out.past_key_values.select([b]), alone.past_key_values)
        losses.append(alone.loss * (row.shape[1] - 1))
    assert not out.logits[~mask.bool()].any()
    torch.testing.assert_close(out.loss, sum(losses) / (17 + 6 + 11 - 3), **EXACT)


def test_rows_at_different_positions_share_a_batch(model, tokens):
    first, second = tokens(1, 9), tokens(1, 4)
    stacked = State.stack(
        [model(first).past_key_values, model(second).past_key_values, model.initial_state(1)]
    )
    assert stacked.clock.tolist() == [9, 4, 0]
    new = tokens(3, 8)
    mask = torch.ones(3, 8, dtype=torch.int64)
    mask[1, 5:] = 0
    out = model(new, past_key_values=stacked, attention_mask=mask)
    expected = [
        model(torch.cat([first, new[:1]], 1)),
        model(torch.cat([second, new[1:2, :5]], 1)),
        model(new[2:]),
    ]
    for b, whole in enumerate(expected):
        count = int(mask[b].sum())
        torch.testing.assert_close(out.logits[b, :count], whole.logits[0, -count:], **EXACT)
        assert_same_state(out.past_key_values.select([b]), whole.past_key_values)


def test_a_row_is_not_touched_by_the_others(model, tokens):
    ids = tokens(3, 14)
    out = model(ids).logits
    changed = ids.clone()
    changed[0] = (changed[0] + 7) % 256
    torch.testing.assert_close(model(changed).logits[1:], out[1:], **EXACT)
    torch.testing.assert_close(model(ids[[2, 0, 1]]).logits, out[[2, 0, 1]], **EXACT)


def test_neither_the_state_given_nor_a_parameter_changes_in_a_call(model, tokens):
    state = model(tokens(2, 7)).past_key_values
    before, weights = state.clone(), copy.deepcopy(model.state_dict())
    model(tokens(2, 7), past_key_values=state)
    for index, layer in before.layers.items():
        assert all(torch.equal(state.layers[index][name], tensor) for name, tensor in layer.items())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_training_mode_computes_what_evaluation_mode_computes(model, tokens):
    ids = tokens(1, 12)
    assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)


def test_loss_is_the_shifted_cross_entropy_and_ignores_minus_100(tiny, tokens):
    model = tiny("transformer")
    ids = tokens(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    out = model(ids, labels=labels)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(out.loss, expected)
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(ids, shift_labels=shifted).loss, expected)
    total = model(ids, labels=labels, num_items_in_batch=5).loss
    torch.testing.assert_close(total * 5, expected * (shifted != -100).sum())
    assert model.bfloat16()(ids, labels=labels).loss.dtype == torch.float32


def test_loss_weights_weigh_each_target(tiny, tokens):
    model, ids = tiny("transformer"), tokens(2, 9)
    targets = F.pad(ids[:, 1:], (0, 1), value=-100)
    weights = torch.ones(2, 9)
    weights[0, 3], weights[1, 5] = 10.0, 0.0
    out = model(ids, shift_labels=targets, loss_weights=weights)
    losses = F.cross_entropy(out.logits[:, :-1].mT, ids[:, 1:], reduction="none")
    expected = (losses.sum() + 9 * losses[0, 3] - losses[1, 5]) / (16 + 9 - 1)
    torch.testing.assert_close(out.loss, expected)
    total = model(ids, shift_labels=targets, loss_weights=weights, num_items_in_batch=8).loss
    torch.testing.assert_close(total * 8, expected * 24)
    with pytest.raises(ShapeError, match="loss_weights has shape"):
        model(ids, shift_labels=targets, loss_weights=weights[:, :4])


def test_the_first_token_of_a_new_document_is_no_target(tiny, tokens):
    model = tiny("transformer")
    ids = tokens(1, 9)
    resets = torch.zeros(1, 9, dtype=torch.bool)
    resets[0, 4] = True
    loss = model(ids, labels=ids, resets=resets).loss
    parts = [model(part, labels=part).loss * (part.shape[1] - 1) for part in (ids[:, :4], ids[:, 4:])]
    torch.testing.assert_close(loss, sum(parts) / 7)


def test_logits_to_keep_selects_positions(tiny, tokens):
    model = tiny("transformer")
    ids = tokens(2, 9)
    full = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, full[:, -3:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([1, 5])).logits, full[:, [1, 5]])
    with pytest.raises(ShapeError, match="a loss needs all logits"):
        model(ids, labels=ids, logits_to_keep=1)


def test_inputs_embeds_hidden_states_and_tuples(tiny, tokens):
    model = tiny("transformer")
    ids = tokens(2, 9)
    out = model(ids, output_hidden_states=True, use_cache=False)
    assert out.past_key_values is None
    assert len(out.hidden_states) == 3
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    torch.testing.assert_close(model(inputs_embeds=model.embed_tokens(ids)).logits, out.logits)
    assert torch.equal(model(ids, return_dict=False, use_cache=False)[0], out.logits)


def test_activation_checkpointing_gives_the_same_gradients(model, tokens, monkeypatch):
    ids = tokens(2, 13)

    def gradients():
        model.zero_grad()
        first = model(ids, labels=ids)
        second = model(ids, labels=ids, past_key_values=first.past_key_values)
        (first.loss + second.loss).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.train()
    stored = gradients()
    assert stored.keys() == {name for name, _ in model.named_parameters()}
    model.gradient_checkpointing_enable()
    calls = []
    function = type(model.layers[0].mixer).forward
    monkeypatch.setattr(
        type(model.layers[0].mixer), "forward", lambda *a, **k: calls.append(1) or function(*a, **k)
    )
    recomputed = gradients()
    assert len(calls) == 2 * 2 * len(model.layers)
    for name, gradient in stored.items():
        torch.testing.assert_close(recomputed[name], gradient, **EXACT)


def test_peft_adapters_train_and_generate(tiny, tokens):
    peft = pytest.importorskip("peft")
    model = tiny("transformer").float()
    ids = tokens(1, 8)
    before = model(ids).logits.detach()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, r=2))
    torch.testing.assert_close(adapted(input_ids=ids).logits, before)
    adapted(input_ids=ids, labels=ids).loss.backward()
    trained = [name for name, p in adapted.named_parameters() if p.grad is not None]
    assert trained and all("lora" in name for name in trained)
    assert adapted.generate(input_ids=ids, max_new_tokens=2, eos_token_id=None).shape == (1, 10)


@pytest.mark.parametrize("preset", ["titans-mag", "lact"])
def test_peft_adapters_reach_the_gates_of_a_memory(tiny, tokens, preset):
    peft = pytest.importorskip("peft")
    model, ids = tiny(preset).float(), tokens(1, 40)
    ends = ("memory.gate_proj", "step_proj")
    targets = [name for name, _ in model.named_modules() if name.endswith(ends)]
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, r=2))
    adapted(input_ids=ids, labels=ids).loss.backward()
    moved = {n.split(".lora_B")[0]: p.grad for n, p in adapted.named_parameters() if "lora_B" in n}
    assert len(moved) == len(targets) > 0
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in moved.values())


def test_embedding_and_output_weights_are_tied_by_default(tiny):
    tied = tiny("transformer")
    assert tied.lm_head.weight is tied.embed_tokens.weight
    apart = tiny("transformer", tie_word_embeddings=False)
    assert apart.lm_head.weight is not apart.embed_tokens.weight


def test_saved_models_load_with_equal_logits(model, tokens, tmp_path):
    from transformers import AutoModelForCausalLM

    ids = tokens(1, 11)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert isinstance(loaded, NestorForCausalLM)
    assert loaded.config.layer_types == model.config.layer_types
    assert loaded.config.memory == model.config.memory
    weights = dict(model.named_parameters())
    assert all(torch.equal(weight, weights[name]) for name, weight in loaded.named_parameters())
    # Weights mapped from a file are aligned differently, which may change the last bit of a product.
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 6])
def test_a_compiled_model_computes_the_same_without_graph_breaks(tiny, tokens, window):
    model = tiny("transformer", sliding_window=window).float()
    compiled = torch.compile(model, fullgraph=True)
    ids = tokens(2, 16)
    mask = torch.ones(2, 16, dtype=torch.int64)
    mask[0, :3] = 0
    close = {"rtol": 1e-4, "atol": 1e-5}
    out = compiled(ids, labels=ids)
    torch.testing.assert_close(out.logits, model(ids).logits, **close)
    state = model(ids).past_key_values
    torch.testing.assert_close(
        compiled(ids, past_key_values=state).logits, model(ids, past_key_values=state).logits, **close
    )
    masked = compiled(ids, attention_mask=mask, use_cache=False)
    torch.testing.assert_close(masked.logits, model(ids, attention_mask=mask).logits, **close)


def test_inputs_that_do_not_fit_are_refused(tiny, tokens):
    model = tiny("transformer")
    ids = tokens(2, 5)
    state = model(ids).past_key_values
    with pytest.raises(ShapeError, match=r"0 to 300, but the vocabulary has ids 0 to 259"):
        model(torch.tensor([[0, 300]]))
    with pytest.raises(ShapeError, match="at least one token"):
        model(ids[:, :0])
    with pytest.raises(ShapeError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ShapeError, match=r"attention_mask has shape \[2, 4\]; \[2, 5\] is wanted"):
        model(ids, attention_mask=torch.ones(2, 4))
    with pytest.raises(ShapeError, match=r"labels has shape \[2, 4\]"):
        model(ids, labels=ids[:, 1:])
    with pytest.raises(ShapeError, match="resets has shape"):
        model(ids, resets=torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(StateMismatchError, match="the State has 2 rows, the tokens 1"):
        model(ids[:1], past_key_values=state)
    with pytest.raises(StateMismatchError, match="takes a nestor.State"):
        model(ids, past_key_values=())
    with pytest.raises(StateMismatchError, match=r"layers \[0\], the model 0 to 1"):
        model(ids, past_key_values=State({0: state.layers[0]}, state.clock))
    with pytest.raises(ConfigError, match="never formed"):
        model(ids, output_attentions=True)
