"""A decoder of limited context that reads without end: windows, sliding windows, and memory across them."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from nestor.cli.loading import load_model
from nestor.errors import ConfigError, ShapeError, StateMismatchError
from nestor.evaluation import Subject
from nestor.evaluation.subjects import Reach
from nestor.learning import Branches, Learner, Level, WindowedDecoder
from nestor.models.state import State

STORIES = str(Path(__file__).parents[2] / "checkpoints" / "stories260K")


def llama(vocab: int, width: int, layers: int, heads: int, positions: int) -> LlamaForCausalLM:
    """Of random weights, large enough for attention to be none of a mean."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=width, max_position_embeddings=positions, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def model():
    """In float64, with branches that are open."""
    found = load_model(STORIES, "cpu", "float64")[0].requires_grad_(False)
    attached = Branches(layers=(1, 3), memory={"chunk_size": 8}).attach(found)
    for index, module in attached.modules.items():
        torch.manual_seed(index)
        torch.nn.init.normal_(module.memory.o_proj.weight, std=0.2)
    return found


@pytest.fixture
def plain():
    return load_model(STORIES, "cpu", "float64")[0].requires_grad_(False)


def tokens(length, rows=2, seed=0):
    return torch.randint(3, 500, (rows, length), generator=torch.Generator().manual_seed(seed))


def read(decoder, ids, cuts):
    state, logits = None, []
    for part in ids.split(cuts, 1):
        output = decoder(part, past_key_values=state)
        state = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, 1), state


def same(x, y, atol=1e-9):
    torch.testing.assert_close(x, y, rtol=0, atol=atol)


def test_windows_without_a_memory_are_texts_of_their_own(plain) -> None:
    ids = tokens(100)
    found = WindowedDecoder(plain, 40)(ids).logits
    same(found, torch.cat([plain(part).logits for part in ids.split(40, 1)], 1))


def test_a_sliding_window_is_what_a_mask_of_its_keys_gives(plain) -> None:
    ids, window, stride = tokens(70, 1), 24, 8
    found = WindowedDecoder(plain, window, stride, sinks=0)(ids).logits
    place = torch.arange(70)
    # The first token that is still there: nothing goes before the window is full.
    first = ((place - window) // stride + 1).clamp(min=0) * stride
    seen = (place[None] <= place[:, None]) & (place[None] >= first[:, None])
    mask = torch.where(seen, 0.0, float("-inf")).double()[None, None]
    # Hugging Face's rotary angles are of float32.
    same(found, plain(ids, attention_mask=mask).logits, 1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_first_tokens_stay_in_a_sliding_window_and_positions_close_up(family) -> None:
    """Keys of one layer depend on token and position alone, so what is left can be read anew."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 500, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 24, "max_position_embeddings": 64, "initializer_range": 0.5,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    if family == "gpt_neox":
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes))
    model, ids = model.double().eval().requires_grad_(False), tokens(56)
    found = WindowedDecoder(model, 24, 8, sinks=3)(ids).logits
    for end in (32, 40, 56):
        left = torch.cat((ids[:, :3], ids[:, end - 8 - 13 : end]), 1)
        same(found[:, end - 8 : end], model(left).logits[:, -8:], 1e-5)


@pytest.mark.parametrize("cuts", [700, [100, 1, 1, 500, 98]])
def test_many_cuts_of_half_precision_lose_no_more_than_one(cuts) -> None:
    """What a key loses when it is turned must not add up."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500, hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64,
        max_position_embeddings=512, initializer_range=0.3,
    )  # fmt: skip
    model, ids = LlamaForCausalLM(config).eval().bfloat16().requires_grad_(False), tokens(700)
    decoder = WindowedDecoder(model, 200, 1, sinks=2)
    found, _ = read(decoder, ids, cuts)
    left = torch.cat((ids[:, :2], ids[:, -198:]), 1)
    expected = model(left).logits[:, -1]
    same(found[:, -1], expected, 0.05 * float(expected.abs().max()))


@pytest.mark.parametrize("stride", [None, 8])
def test_where_a_stream_is_cut_does_not_matter(model, stride) -> None:
    decoder, ids = WindowedDecoder(model, 32, stride), tokens(110)
    whole, last = read(decoder, ids, 110)
    cut, state = read(decoder, ids, [1, 30, 1, 33, 45])
    same(cut, whole)
    same(state.layers[1]["memory.weights.0"], last.layers[1]["memory.weights.0"])
    same(decoder(ids, logits_to_keep=7).logits, whole[:, -7:])


@pytest.mark.parametrize("stride", [None, 8])
def test_rows_do_not_touch_each_other(model, stride) -> None:
    decoder, ids = WindowedDecoder(model, 32, stride), tokens(70, 3)
    together, state = read(decoder, ids, [40, 30])
    for row in range(3):
        alone, _ = read(decoder, ids[row : row + 1], [40, 30])
        same(together[row : row + 1], alone)
    other = ids.clone()
    other[0, 3] = 7
    changed, _ = read(decoder, other, [40, 30])
    assert torch.equal(changed[1:], together[1:]) and not torch.allclose(changed[0, 40:], together[0, 40:])
    if stride:
        # Rows that have not slid yet go with rows that have.
        parts = [decoder(ids[row : row + 1, :length]).past_key_values for row, length in ((0, 25), (1, 41))]
        mixed = decoder(ids[:2, 41:], past_key_values=State.stack(parts)).logits
        for row, part in enumerate(parts):
            same(mixed[row : row + 1], decoder(ids[row : row + 1, 41:], past_key_values=part).logits)
    # Rows of several States make one.
    parts = [decoder(ids[row : row + 1, :40]).past_key_values for row in range(3)]
    same(decoder(ids[:, 40:], past_key_values=State.stack(parts)).logits, together[:, 40:])


def test_the_memory_alone_goes_on_into_the_next_window(model, plain) -> None:
    ids, other = tokens(60, 1), tokens(60, 1)
    other[0, 5:15] = tokens(10, 1, seed=9)
    for decoder, differs in ((WindowedDecoder(plain, 30), False), (WindowedDecoder(model, 30), True)):
        first, second = decoder(ids).logits[:, 30:], decoder(other).logits[:, 30:]
        assert torch.equal(first, second) != differs
    decoder = WindowedDecoder(model, 30)
    state = decoder(ids[:, :30]).past_key_values
    fresh = decoder.initial_state(1)
    assert state.layers.keys() == fresh.layers.keys() and int(state.clock) == 30
    forgotten = {i: layer | fresh.layers[i] for i, layer in state.layers.items()}
    same(
        decoder(ids[:, 30:], past_key_values=State(forgotten, state.clock)).logits,
        decoder(ids[:, 30:]).logits,
    )


def test_memories_that_are_to_forget_begin_anew_with_each_window(model) -> None:
    ids = tokens(70)
    alone = torch.cat([WindowedDecoder(model, 30)(part).logits for part in ids.split(30, 1)], 1)
    found, _ = read(WindowedDecoder(model, 30, forget=True), ids, [20, 25, 25])
    same(found, alone)
    with pytest.raises(ConfigError, match="forget goes with windows read one by one"):
        WindowedDecoder(model, 30, 10, forget=True)


def test_training_teaches_a_memory_what_the_window_before_said() -> None:
    """Which of two words a text has, 16 times, is asked for in the next window: attention cannot know."""
    model = llama(vocab=8, width=16, layers=2, heads=2, positions=16)
    attached = Branches(layers=(0, 1), memory={"chunk_size": 8, "expansion": 1}).attach(model)
    decoder = WindowedDecoder(model, 16)
    words = torch.tensor([2, 5]).repeat(4)
    ids = torch.cat((words[:, None].expand(-1, 16), torch.ones(8, 4, dtype=torch.int64)), 1)
    targets = torch.full((8, 20), -100)
    targets[:, 16:] = words[:, None]
    optimizer = torch.optim.AdamW(attached.parameters().values(), lr=0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = decoder(ids, shift_labels=targets).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    state = decoder(ids[:, :16]).past_key_values
    said = decoder(ids[:, 16:], past_key_values=state).logits[:, -1]
    assert said.argmax(-1).tolist() == words.tolist() and losses[-1] < 0.2 < losses[0]
    # Without what was carried the answer is one and the same for all.
    assert len(set(decoder(ids[:, 16:]).logits[:, -1].argmax(-1).tolist())) == 1


def test_the_loss_is_that_of_the_logits(model) -> None:
    decoder, ids = WindowedDecoder(model, 32), tokens(71)
    targets = ids[:, 1:].clone()
    targets[:, 5:9] = -100
    expected = F.cross_entropy(decoder(ids[:, :-1]).logits.flatten(0, 1), targets.flatten())
    same(decoder(ids[:, :-1], shift_labels=targets).loss, expected)


def test_without_a_target_the_loss_is_nothing(model) -> None:
    decoder, ids = WindowedDecoder(model, 32), tokens(40)
    assert decoder(ids, shift_labels=torch.full_like(ids, -100)).loss.item() == 0


def test_rows_that_begin_a_window_go_with_rows_that_begin_a_text(model) -> None:
    decoder, ids = WindowedDecoder(model, 32), tokens(72)
    parts = [decoder.initial_state(1), decoder(ids[1:, :32]).past_key_values]
    found = decoder(ids[:, 32:], past_key_values=State.stack(parts)).logits
    for row, part in enumerate(parts):
        same(found[row : row + 1], decoder(ids[row : row + 1, 32:], past_key_values=part).logits)


def test_a_first_state_is_of_the_dtype_that_the_model_has_now(plain) -> None:
    decoder = WindowedDecoder(plain, 32)
    for dtype in (torch.float64, torch.float32):
        decoder.to(dtype)
        assert decoder.initial_state(1).layers[0]["keys.cache"].dtype == dtype


@pytest.mark.gpu
def test_on_a_gpu_a_sliding_window_of_half_precision_is_what_is_left_of_the_text() -> None:
    model = llama(vocab=500, width=64, layers=1, heads=1, positions=512).bfloat16().cuda()
    ids = tokens(400).cuda()
    found = WindowedDecoder(model, 200, 8, sinks=2)(ids).logits[:, -8:]
    expected = model(torch.cat((ids[:, :2], ids[:, -198:]), 1)).logits[:, -8:]
    same(found, expected, 0.05 * float(expected.abs().max()))


def test_generation_goes_on_from_a_state_across_windows(model) -> None:
    decoder, ids = WindowedDecoder(model, 32), tokens(50, 1)
    state = decoder(ids[:, :29]).past_key_values
    made = decoder.generate(ids[:, 29:], past_key_values=state, max_new_tokens=20, do_sample=False)
    whole = torch.cat((ids[:, :29], made), 1)
    expected = decoder(whole).logits[:, 49:-1].argmax(-1)
    assert made[:, 21:].tolist() == expected.tolist()


def test_a_prompt_with_the_padding_token_is_a_prompt_like_any(plain) -> None:
    decoder, ids = WindowedDecoder(plain, 32), tokens(10)
    ids[:, 4] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    made = decoder.generate(ids, **options)
    assert torch.equal(made, decoder.generate(ids, attention_mask=torch.ones_like(ids), **options))
    with pytest.raises(ShapeError, match="without padding"):
        decoder.generate(ids, attention_mask=(ids != 0).long(), **options)


def test_levels_learn_from_a_windowed_stream_with_memories(model) -> None:
    decoder, ids = WindowedDecoder(model, 32), tokens(80, 1)
    name = "model.model.layers.4.mlp.down_proj.weight"
    still = Learner(decoder, [Level("still", (name,), 16, 0.0)])
    logits, state = still.read(ids, still.start())
    same(logits, decoder(ids).logits)
    assert int(state.clock) == 80
    learner = Learner(decoder, [Level("fast", (name,), 16, 0.3)])
    logits, state = learner.read(ids, learner.start())
    same(logits[:, :16], decoder(ids).logits[:, :16])
    assert learner.report(state)[0][0].updates == 4
    assert not torch.allclose(logits[:, 16:], decoder(ids).logits[:, 16:], atol=1e-6)
    closed = learner.close(state)
    assert not closed.layers[0]["keys.cache"].shape[1]


def test_the_suites_read_it_beyond_the_context(plain) -> None:
    assert Subject("own", plain, None).limit == 512
    assert Subject("windowed", WindowedDecoder(plain, 64), None).limit is None


def test_a_model_that_keeps_nothing_of_what_it_reads_is_refused() -> None:
    """Hugging Face's gradient checkpointing takes the cache away from every layer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    model, ids = LlamaForCausalLM(config), tokens(40) % 31
    Branches(layers=(1,), memory={"chunk_size": 8}).attach(model)
    decoder = WindowedDecoder(model, 16)
    model.gradient_checkpointing_enable()
    decoder.train()
    for targets in (None, ids):
        with pytest.raises(ConfigError, match="kept keys of 0 layers of 2, and 0 memories of 1"):
            decoder(ids, shift_labels=targets)
    decoder.eval()
    assert int(decoder(ids).past_key_values.clock[0]) == 40
    nothing = State.empty(2)
    nothing.clock += 32
    with pytest.raises(StateMismatchError, match="holds nothing of them"):
        decoder(ids, past_key_values=nothing)


def test_a_state_of_another_window_is_refused(plain, tmp_path) -> None:
    ids = tokens(70)
    for first, read_before, second in (
        ((64,), 40, (32,)),
        ((64,), 64, (32,)),
        ((32,), 64, (64,)),
        ((32, 16), 40, (32, 8)),
        ((32, 8), 40, (32,)),
    ):
        state = WindowedDecoder(plain, *first)(ids[:, :read_before]).past_key_values
        with pytest.raises(StateMismatchError, match="keys where .* wanted; it is of another window"):
            WindowedDecoder(plain, *second)(ids[:, read_before:], past_key_values=state)
    # Both have 32 keys, and as many are wanted: the file knows.
    decoder, path = WindowedDecoder(plain, 32, 16), tmp_path / "state.safetensors"
    state = decoder(ids[:, :48]).past_key_values
    state.save(path, decoder)
    again = State.load(path, decoder)
    same(
        decoder(ids[:, 48:], past_key_values=again).logits, decoder(ids[:, 48:], past_key_values=state).logits
    )
    with pytest.raises(StateMismatchError, match="stride is 16 in the file and 8 in the model"):
        State.load(path, WindowedDecoder(plain, 32, 8))
    # Shorter rows of a stack have zeros in front, which are no keys.
    decoder = WindowedDecoder(plain, 32)
    parts = [decoder(ids[:1, :length]).past_key_values for length in (5, 20)]
    alone = State.stack(parts).select([0])
    assert alone.layers[0]["keys.cache"].shape[1] == 20
    found = decoder(ids[:1, 5:], past_key_values=alone).logits
    same(found, decoder(ids[:1, 5:], past_key_values=parts[0]).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_that_a_rotation_does_not_turn_are_refused_when_they_slide(dtype) -> None:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 31, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "intermediate_size": 24, "head_dim": 16, "max_position_embeddings": 64,
        "pad_token_id": 0,
    }  # fmt: skip
    yarn = {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32,
    }  # fmt: skip
    scaled = {**yarn, "attention_factor": 1.01}
    ids = tokens(40) % 31
    for model in (
        SmolLM3ForCausalLM(SmolLM3Config(**sizes, no_rope_layers=[1, 0])),
        Gemma3ForCausalLM(Gemma3TextConfig(**sizes)),
        LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=scaled)),
    ):
        with pytest.raises(ConfigError, match="cannot be turned to other positions"):
            WindowedDecoder(model.to(dtype), 32, 8)(ids)
    for model in (
        SmolLM3ForCausalLM(SmolLM3Config(**sizes, no_rope_layers=[1, 1])),
        LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters={**yarn, "attention_factor": 1.0})),
    ):
        assert WindowedDecoder(model.to(dtype), 32, 8)(ids).logits.isfinite().all()


def test_its_reach_is_what_a_token_depends_on(plain) -> None:
    ids = tokens(60, 1)
    for stride, reach in ((None, Reach(6, 6)), (1, Reach(6, 5 * 5 + 1))):
        decoder = WindowedDecoder(plain, 6, stride, sinks=0)
        assert Subject("windowed", decoder, None).reach == reach
        last = decoder(ids).logits[0, -1]
        for back, changes in ((reach.tokens - 1, True), (reach.tokens, False)):
            other = ids.clone()
            other[0, -1 - back] += 1
            assert bool((decoder(other).logits[0, -1] != last).any()) == changes


def test_what_cannot_be_read_is_refused(plain, model) -> None:
    for window, stride in ((513, None), (64, 65)):
        with pytest.raises(ConfigError, match="give a window within the context"):
            WindowedDecoder(plain, window, stride)
    decoder, ids = WindowedDecoder(plain, 32), tokens(40)
    with pytest.raises(ShapeError, match="without padding"):
        decoder(ids, attention_mask=torch.zeros_like(ids))
    state = decoder(ids).past_key_values
    with pytest.raises(StateMismatchError, match="has 2 rows, the tokens 1"):
        decoder(ids[:1], past_key_values=state)
    mixed = State.stack([state.select([0]), decoder(ids[:1, :5]).past_key_values])
    with pytest.raises(ShapeError, match="different places of their windows"):
        decoder(ids, past_key_values=mixed)
    # Two rows that see as many keys, of which those of one have just lost some.
    sliding = WindowedDecoder(plain, 32, 8)
    mixed = State.stack([state.select([0]), sliding(ids[:1, :24]).past_key_values])
    mixed.clock[0] = 32
    with pytest.raises(ShapeError, match="different places"):
        sliding(ids, past_key_values=mixed)
    with pytest.raises(ConfigError, match="24 tokens stay at most"):
        WindowedDecoder(plain, 32, 8, sinks=25)
    # A model that counts every position double.
    attention = plain.model.layers[0].self_attn
    plain_forward = attention.forward

    def double(*arguments, position_embeddings, **options):
        cos, sin = position_embeddings
        twice = cos * cos - sin * sin, 2 * sin * cos
        return plain_forward(*arguments, position_embeddings=twice, **options)

    attention.forward = double
    with pytest.raises(ConfigError, match="cannot be turned to other positions"):
        WindowedDecoder(plain, 32, 8)(ids)
