"""The step in fixed shapes against one operation after another, and on a GPU as a CUDA graph."""

import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nestor.errors import ConfigError, NonFiniteError
from nestor.learning import Learner, Level, Retrofit, assign_levels, graphed
from nestor.learning.chunks import Chunk, EagerStep
from nestor.learning.graphed import GraphedStep, obstacle, step_of
from nestor.learning.readers import reader_of
from nestor.models import State

STORIES = Path(__file__).parents[2] / "checkpoints" / "stories260K"
SIZES = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 4,
    "num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 0,
}  # fmt: skip
KINDS = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "qwen2-windows": {
        "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2,
    },
    "qwen3": {"num_key_value_heads": 2, "head_dim": 4},
    "gpt_neox": {},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 5},
}  # fmt: skip
CHUNK = 4


def build(kind, attention="sdpa", dtype=torch.float64, device="cpu", **choices):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind.partition("-")[0], **{**SIZES, **KINDS.get(kind, {}), **choices})
    config._attn_implementation = attention
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model.to(device, dtype).eval()


def tokens(length, rows=1, seed=2):
    return torch.randint(0, 31, (rows, length), generator=torch.Generator().manual_seed(seed))


def learners(model, **choices):
    """One that learns in fixed shapes, and one that does not."""
    levels = assign_levels(model, [CHUNK, 2 * CHUNK], [0.05, 0.05], **choices)
    return Learner(model, levels, capture=True), Learner(model, levels, capture=False)


def assert_same(found, expected, rtol=1e-9, atol=1e-11):
    assert found.clock.tolist() == expected.clock.tolist()
    assert_close(found.layers, expected.layers, rtol, atol)
    assert_close(found.learned, expected.learned, rtol, atol)


def assert_close(found, expected, rtol=1e-9, atol=1e-11):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@pytest.fixture
def few_places(monkeypatch):
    """So that a short stream outgrows them."""
    monkeypatch.setattr(graphed, "PLACES", 2)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_fixed_shapes_give_what_the_shapes_of_each_chunk_give(kind, attention, few_places) -> None:
    model, ids, weights = build(kind, attention), tokens(40)[0], torch.rand(40, dtype=torch.float64)
    reader = reader_of(model)
    assert obstacle(reader) is None
    fixed, eager = GraphedStep(reader, CHUNK), EagerStep(reader)
    own = {name: parameter.detach() for name, parameter in model.named_parameters()}
    names = [name for name in own if "mlp" in name and "weight" in name]
    one = other = reader.initial_state(1)
    # Hugging Face's eager attention takes its softmax in float32.
    tolerance = {"sdpa": (1e-9, 1e-11), "eager": (1e-4, 1e-5)}[attention]
    places = []
    # The last chunk is not whole.
    for begin, end in [*((at, at + CHUNK) for at in range(0, 36, CHUNK)), (36, 39)]:
        deltas = {name: 0.1 * torch.randn_like(own[name]) for name in names}
        chunk = Chunk(ids[begin:end], ids[begin + 1 : end + 1], weights[begin:end])
        found, expected = fixed(own, deltas, chunk, one), eager(own, deltas, chunk, other)
        assert list(found.gradients) == names and all(g.any() for g in expected.gradients.values())
        assert_close(found[:-1], expected[:-1], *tolerance)
        assert_same(found.after, expected.after, *tolerance)
        one, other = found.after, expected.after
        places.append(fixed._program.places)
    assert places == [2, 4, 8, 16, 16, 32, 32, 32, 32, 64]


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_learner_of_either_step_becomes_the_same(kind, few_places, tmp_path) -> None:
    model, ids = build(kind), tokens(30, rows=2)
    fixed, eager = learners(model, optimizer="momentum")
    assert isinstance(fixed._step, GraphedStep) and isinstance(eager._step, EagerStep)
    ended = []
    for learner in (fixed, eager):
        with torch.inference_mode(learner is fixed):
            # Rows at different places: the caches of one are longer than what it has read.
            _, ahead = learner.read(ids[:1, :11], learner.start())
            ahead.save(tmp_path / "state.safetensors", model)
            ahead = State.load(tmp_path / "state.safetensors", model)
            logits, state = learner.read(ids[:, 11:], State.stack([ahead, learner.start()]))
            # Contexts that follow one another, each ending within a chunk.
            closed = learner.close(state)
            after = learner.read(ids[:, :7], closed)
            ended.append((logits, state, closed, after.logits, learner.close(after.state)))
    found, expected = ended
    for one, other in zip(found, expected, strict=True):
        if isinstance(other, State):
            assert_same(one, other)
        else:
            assert_close(one, other)


@pytest.mark.parametrize("reading", ["copies", "added"])
def test_networks_that_were_added_learn_in_fixed_shapes(reading) -> None:
    model, ids = build("llama"), tokens(21)
    levels = Retrofit(reading, (4, 8), (0.5, 0.25), largest_update=0.01).apply(model)
    fixed, eager = Learner(model, levels, capture=True), Learner(model, levels, capture=False)
    found, expected = fixed.read(ids, fixed.start()), eager.read(ids, eager.start())
    assert_close(found.logits, expected.logits)
    assert_same(found.state, expected.state)


def test_what_one_stream_left_behind_does_not_reach_the_next() -> None:
    model, ids = build("llama"), tokens(30)
    fixed, eager = learners(model)
    long = fixed.read(ids, fixed.start()).state
    for layer in long.learned["stream"], *long.layers.values():
        for name, tensor in layer.items():
            if "cache" in name:
                tensor.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="not finite"):
        fixed.read(ids, long)
    found, expected = fixed.read(ids[:, :9], fixed.start()), eager.read(ids[:, :9], eager.start())
    assert_close(found.logits, expected.logits)
    assert_same(found.state, expected.state)


def test_the_model_may_change_between_chunks() -> None:
    """In place, by other tensors, and for the time of a block: what is read is what a Learner reads anew."""
    model, ids = build("llama"), tokens(22)
    fixed, eager = learners(model)
    other = fixed.read(ids, fixed.start()).state
    program = fixed._step._program

    def same():
        found, expected = fixed.read(ids, fixed.start()), eager.read(ids, eager.start())
        assert_close(found.logits, expected.logits)
        assert_same(found.state, expected.state)
        return found.logits

    before = same()
    with fixed.applied(other):
        # A Learner reads with the model's own weights and what the State has learned, here as elsewhere.
        assert torch.equal(fixed.read(ids, fixed.start()).logits, before)
        assert not torch.allclose(model(ids).logits, before)
    assert torch.equal(same(), before)
    fixed.write(other, model)
    written = same()
    assert not torch.allclose(written, before) and fixed._step._program is program
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = 0.5 * parameter
    assert not torch.allclose(same(), written) and fixed._step._program is not program


def test_a_real_model_reads_on_as_before(few_places) -> None:
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
    ids = torch.cat((torch.tensor([[1]]), torch.randint(3, 512, (1, 70))), 1)
    levels = assign_levels(model, [16, 32], [0.1, 0.1])
    fixed, eager = Learner(model, levels, capture=True), Learner(model, levels, capture=False)
    found, expected = fixed.read(ids, fixed.start()), eager.read(ids, eager.start())
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert_same(found.state, expected.state, rtol=1e-3, atol=1e-5)
    assert [report.updates for report in fixed.report(found.state)[0]] == [4, 2]


def test_the_step_is_chosen_by_the_device_and_the_model(model, levels) -> None:
    llama = build("llama")
    level = assign_levels(llama, [4], [0.1])
    assert isinstance(Learner(llama, level)._step, EagerStep)
    scaled = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    flex = build("llama")
    refused = {
        "'dynamic' depend on the length": reader_of(build("llama", rope_parameters=scaled)),
        "the model is a 'olmo'": reader_of(build("olmo")),
        "'flex_attention' takes no mask": reader_of(flex),
    }
    flex.config._attn_implementation = "flex_attention"
    for message, reader in refused.items():
        with pytest.raises(ConfigError, match=message):
            step_of(reader, 4, True)
        assert isinstance(step_of(reader, 4, None), EagerStep)
    with pytest.raises(ConfigError, match="Nestor's own models have no step in fixed shapes"):
        Learner(model, levels(), capture=True)


def test_a_weight_that_nothing_depends_on_is_refused() -> None:
    model = build("llama")
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(3, dtype=torch.float64)))
    name = "model.layers.3.mlp.down_proj.weight"
    learner = Learner(model, [Level("all", ("unused", name), 2, 0.1)], capture=True)
    with pytest.raises(ConfigError, match="does not depend on 'unused'"):
        learner.read(tokens(4), learner.start())


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_step_gives_what_launches_give(kind, attention, few_places) -> None:
    model, ids = build(kind, attention, device="cuda"), tokens(45).cuda()
    levels = assign_levels(model, [CHUNK, 2 * CHUNK], [0.05, 0.05], optimizer="momentum")
    fixed, eager = Learner(model, levels), Learner(model, levels, capture=False)
    assert isinstance(fixed._step, GraphedStep) and isinstance(eager._step, EagerStep)
    tolerance = {"sdpa": (1e-7, 1e-9), "eager": (1e-3, 1e-3)}[attention]
    one, other = fixed.start(), eager.start()
    for part in ids.split([9, 6, 20, 10], dim=1):
        found, one = fixed.read(part, one)
        expected, other = eager.read(part, other)
        assert_close(found, expected, *tolerance)
    assert_same(one, other, *tolerance)
    assert fixed._step._program._graph is not None and fixed._step._program.places == 64
    assert_same(fixed.close(one), eager.close(other), *tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_captured_and_launched_differ_by_rounding(dtype) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "head_dim": 64}
    model, ids = build("llama", dtype=dtype, device="cuda", **sizes), tokens(700).cuda()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    levels = assign_levels(model, [64, 128], [0.1, 0.1], largest_update=0.01)
    fixed, eager = Learner(model, levels), Learner(model, levels, capture=False)
    found, expected = (one.read(ids, one.start()).logits.double() for one in (fixed, eager))
    limit = 1e-3 if dtype == torch.float32 else 0.05
    assert float((found - expected).norm()) < limit * float(expected.norm())


@pytest.mark.gpu
def test_captured_weights_may_change_and_streams_stay_apart() -> None:
    model, ids = build("llama", device="cuda"), tokens(22).cuda()
    levels = assign_levels(model, [CHUNK], [0.05])
    fixed, eager = Learner(model, levels), Learner(model, levels, capture=False)
    begin = fixed.start()
    first, second = fixed.read(ids, begin), fixed.read(ids.flip(1), begin)
    kept = first.logits.clone(), first.state.clone()
    graph = fixed._step._program._graph

    def same():
        expected = eager.read(ids, eager.start())
        found = fixed.read(ids, fixed.start())
        assert_close(found.logits, expected.logits, 1e-8, 1e-10)
        assert_same(found.state, expected.state, rtol=1e-8, atol=1e-10)

    same()
    with fixed.applied(second.state):
        torch.testing.assert_close(fixed.read(ids, fixed.start()).logits, first.logits, rtol=1e-8, atol=1e-10)
    same()
    fixed.write(second.state, model)
    same()
    assert fixed._step._program._graph is graph
    for parameter in model.parameters():
        parameter.data = 0.5 * parameter.data
    same()
    assert fixed._step._program._graph is not graph
    # What was given out before is as it was.
    assert torch.equal(first.logits, kept[0])
    assert_same(first.state, kept[1], rtol=0, atol=0)


@pytest.mark.gpu
def test_what_is_not_finite_on_a_gpu_is_refused_at_the_end_of_a_call() -> None:
    model, ids = build("llama", device="cuda"), tokens(40).cuda()
    for capture in (True, False):
        learner = Learner(model, assign_levels(model, [CHUNK], [1e300]), capture=capture)
        state = learner.start()
        with pytest.raises(NonFiniteError, match="not finite; go on from the State before"):
            learner.read(ids, state)
        assert not any(tensor.any() for name, tensor in state.learned["every 4"].items() if "delta" in name)


@pytest.mark.gpu
def test_no_chunk_waits_for_the_gpu() -> None:
    model, ids = build("llama", device="cuda"), tokens(60).cuda()
    learner = Learner(model, assign_levels(model, [CHUNK, 2 * CHUNK], [0.05, 0.05], largest_update=0.01))
    learner.read(ids, learner.start())

    def waits(length):
        state = learner.start()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                learner.read(ids[:, :length], state)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(one.message) for one in caught)

    few = waits(2 * CHUNK + 1)
    assert 0 < waits(12 * CHUNK + 1) <= few < 20
