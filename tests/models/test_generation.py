"""Generation through Hugging Face's `generate`, for every preset."""

import pytest
import torch

from nestor import State
from nestor.errors import ConfigError, ShapeError

GREEDY = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None, "pad_token_id": 258}


def greedy(model, ids, steps=7):
    """Arg-max of a full forward call, one token after the other."""
    for _ in range(steps):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


def beams(model, prompt, width, steps):
    """The best continuation by brute force over beams, a full forward call for each."""
    running = [(0.0, prompt)]
    for _ in range(steps):
        candidates = []
        for score, ids in running:
            log_probs = model(ids[None], use_cache=False).logits[0, -1].float().log_softmax(-1)
            best = log_probs.topk(2 * width)
            candidates += [
                (score + p, torch.cat([ids, t[None]]))
                for p, t in zip(best.values.tolist(), best.indices, strict=True)
            ]
        running = sorted(candidates, key=lambda pair: -pair[0])[:width]
    return running[0][1]


def test_greedy_generation_is_the_argmax_of_full_calls(model, tokens):
    ids = tokens(2, 9)
    expected = greedy(model, ids)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert torch.equal(model.generate(ids, use_cache=False, **GREEDY), expected)


def test_sampling_draws_what_full_calls_would_draw(model, tokens):
    ids = tokens(2, 5)
    torch.manual_seed(4)
    drawn = model.generate(ids, max_new_tokens=5, do_sample=True, temperature=0.9, top_k=0, eos_token_id=None)
    torch.manual_seed(4)
    expected = ids
    for _ in range(5):
        logits = model(expected, use_cache=False).logits[:, -1].float() / 0.9
        expected = torch.cat([expected, torch.multinomial(logits.softmax(-1), 1)], 1)
    assert torch.equal(drawn, expected)


def test_beam_search_equals_brute_force(model, tokens):
    ids = tokens(2, 6)
    found = model.generate(ids, num_beams=3, length_penalty=0.0, **{**GREEDY, "max_new_tokens": 4})
    for row in range(2):
        assert torch.equal(found[row], beams(model, ids[row], 3, 4))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"num_beams": 2}])
def test_padded_prompts_go_on_as_each_would_alone(model, tokens, side, settings):
    prompts = [tokens(1, 12), tokens(1, 5), tokens(1, 1)]
    ids = torch.full((3, 12), 258)
    mask = torch.zeros(3, 12, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        length = prompt.shape[1]
        place = slice(12 - length, 12) if side == "left" else slice(0, length)
        ids[row, place], mask[row, place] = prompt[0], 1
    out = model.generate(ids, attention_mask=mask, **settings, **GREEDY)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt, **settings, **GREEDY)
        assert torch.equal(out[row, 12:], alone[0, prompt.shape[1] :])


@pytest.mark.parametrize(
    "settings", [{}, {"use_cache": False}, {"num_beams": 2}, {"num_return_sequences": 1}]
)
def test_a_state_handed_in_continues_the_text(model, tokens, settings):
    before, new = tokens(2, 11), tokens(2, 4)
    whole = model.generate(torch.cat([before, new], 1), **settings, **GREEDY)
    state = model(before).past_key_values
    copy = state.clone()
    continued = model.generate(new, past_key_values=state, **settings, **GREEDY)
    assert torch.equal(continued, whole[:, 11:])
    grown = torch.ones(2, 15, dtype=torch.int64)
    continued = model.generate(new, past_key_values=state, attention_mask=grown, **settings, **GREEDY)
    assert torch.equal(continued, whole[:, 11:])
    assert torch.equal(state.clock, copy.clock)
    for index, layer in copy.layers.items():
        assert all(torch.equal(state.layers[index][name], tensor) for name, tensor in layer.items())


def test_a_conversation_over_several_turns_equals_one_text(model, tokens):
    state, text = None, torch.zeros(1, 0, dtype=torch.int64)
    pending = text
    for turn in (tokens(1, 5), tokens(1, 1), tokens(1, 8)):
        text = torch.cat([text, turn], 1)
        fed = torch.cat([pending, turn], 1)
        out = model.generate(fed, past_key_values=state, return_dict_in_generate=True, **GREEDY)
        text = torch.cat([text, out.sequences[:, fed.shape[1] :]], 1)
        # The last token generated has not been read.
        state, pending = out.past_key_values, out.sequences[:, -1:]
        assert state.clock.tolist() == [text.shape[1] - 1]
        assert torch.equal(text, greedy(model, text[:, :-7]))


def test_ragged_states_continue_in_one_batch(model, tokens):
    texts = [tokens(1, 10), tokens(1, 3)]
    new = tokens(2, 4)
    state = State.stack([model(text).past_key_values for text in texts])
    out = model.generate(new, past_key_values=state, **GREEDY)
    for row, text in enumerate(texts):
        whole = model.generate(torch.cat([text, new[row : row + 1]], 1), **GREEDY)
        assert torch.equal(out[row], whole[0, text.shape[1] :])


def test_several_samples_from_one_state(model, tokens):
    state = model(tokens(1, 9)).past_key_values
    out = model.generate(
        tokens(1, 3),
        past_key_values=state,
        do_sample=True,
        num_return_sequences=3,
        max_new_tokens=4,
        eos_token_id=None,
    )
    assert out.shape == (3, 7)


def test_chunked_prefill_and_embeddings_as_prompts(model, tokens):
    ids = tokens(2, 11)
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[0, :6] = 0
    plain = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(model.generate(ids, attention_mask=mask, prefill_chunk_size=4, **GREEDY), plain)
    embeds = model.embed_tokens(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY), plain[:, 11:])


def test_resets_inside_a_prompt_are_kept(model, tokens):
    ids = tokens(1, 11)
    resets = torch.zeros(1, 11, dtype=torch.bool)
    resets[0, 6] = True
    expected = greedy(model, ids[:, 6:])[:, 5:]
    for use_cache in (True, False):
        assert torch.equal(
            model.generate(ids, resets=resets, use_cache=use_cache, **GREEDY)[:, 11:], expected
        )


def test_what_cannot_be_done_is_refused(tiny, tokens):
    model = tiny("transformer")
    ids = tokens(2, 6)
    with pytest.raises(ValueError, match="only supports"):
        model.generate(ids[:1], prompt_lookup_num_tokens=2, max_new_tokens=2)
    with pytest.raises(ConfigError, match="cache_implementation is 'static'"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ShapeError, match="all padding"):
        model.generate(ids, attention_mask=torch.tensor([[1] * 6, [0] * 6]), max_new_tokens=2)
    right = torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0]])
    with pytest.raises(ConfigError, match="on the left"):
        model.generate(ids, attention_mask=right, prefill_chunk_size=2, max_new_tokens=2)
