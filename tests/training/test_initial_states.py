"""What training sequences start from: the invariants of arXiv 2507.02782's interventions, by number.

The numbers are those of the list in the specification of length generalisation.
"""

import json
from types import SimpleNamespace

import pytest
import torch

from nestor.errors import ConfigError
from nestor.models import NestorForCausalLM, preset
from nestor.training import TrainConfig, noise, train
from nestor.training.carrying import next_start
from nestor.training.loop import Run

MEMORIES = (
    "titans-lmm", "titans-mac", "titans-mag", "titans-mal", "tnt", "moneta", "memora", "atlas++", "lact",
    "ttt-linear", "hope",
)  # fmt: skip


def small_model(name, **changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= changes
    if name == "lact":
        # Momentum tells after the end of a chunk.
        sizes["memory"] = {"chunk_size": 8}
    return NestorForCausalLM(preset(name, "quick", **sizes)).double()


def losses(model, tokens, state=None, resets=None):
    """Sum of next-token losses within and behind `tokens` [B, T + 1], and the State after T of them."""
    output = model(
        input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:], num_items_in_batch=1, resets=resets,
        past_key_values=state, use_cache=True,
    )  # fmt: skip
    return output.loss, output.past_key_values


def rows(result):
    return [m["loss"] for m in map(json.loads, (result.folder / "metrics.jsonl").open()) if "loss" in m]


def test_invariant_1_truncated_backpropagation_over_chunks_is_one_pass_over_their_concatenation():
    model = small_model("titans-mag", sliding_window=8, memory={"chunk_size": 8})
    tokens = torch.randint(0, 256, (3, 49))
    with torch.no_grad():
        whole, end = losses(model, tokens)
        state, total = None, 0.0
        for start in (0, 16, 32):
            loss, state = losses(model, tokens[:, start : start + 17], next_start(state, "carry"))
            total += loss
    torch.testing.assert_close(total, whole, rtol=0, atol=1e-9)
    assert torch.equal(state.clock, end.clock)
    for index, layer in end.layers.items():
        for name, tensor in layer.items():
            torch.testing.assert_close(state.layers[index][name], tensor, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", ["carry", "pass", "fitted-noise", "random-noise"])
def test_invariant_2_without_an_intervention_training_is_the_ordinary_one_bit_for_bit(
    tiny, tmp_path, weights, mode
):
    def trained(mode, share):
        changes = {"run__state_mode": mode, "run__fresh_share": share, "run__steps": 4, "run__eval_every": 0}
        return weights(train(tiny(run__out=str(tmp_path / f"{mode}-{share}"), **changes), quiet=True).final)

    ordinary, found, other = trained("reset", 0.0), trained(mode, 1.0), trained(mode, 0.5)
    assert all(torch.equal(found[name], tensor) for name, tensor in ordinary.items())
    assert not all(torch.equal(other[name], tensor) for name, tensor in ordinary.items())


@pytest.mark.parametrize("mode", ["carry", "pass"])
def test_invariant_3_no_gradient_reaches_the_sequence_that_made_the_start(mode):
    model = small_model("titans-mag", sliding_window=8, memory={"chunk_size": 8})
    first = torch.randn(2, 16, 32, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, 256, (2, 17))
    state = model(inputs_embeds=first, use_cache=True).past_key_values
    (reached,) = torch.autograd.grad(losses(model, tokens, state)[0], first)
    assert reached.abs().max() > 0
    state = next_start(model(inputs_embeds=first, use_cache=True).past_key_values, mode)
    (none,) = torch.autograd.grad(losses(model, tokens, state)[0], first, allow_unused=True)
    assert none is None


def test_invariant_4_a_lane_is_passed_the_final_memory_that_its_neighbour_had_a_step_before(
    tiny, monkeypatch
):
    """Lanes are streams, so an unrelated sequence is another lane's: each memory goes on in exactly one."""
    starts, ends = [], []
    original = Run.forward

    def watched(run, part, state, fresh, targets):
        loss, after = original(run, part, state, fresh, targets)
        starts.append(None if state is None else noise.memories(state.clone()))
        ends.append(noise.memories(after.detach().clone()))
        return loss, after

    monkeypatch.setattr(Run, "forward", watched)
    train(tiny(run__state_mode="pass", run__steps=3, run__eval_every=0, run__save_every=0), quiet=True)
    assert starts[0] is None
    for before, after in zip(ends, starts[1:], strict=False):
        assert all(torch.equal(after[name][b], before[name][b - 1]) for name in before for b in range(4))


def test_invariant_5_noise_is_fitted_to_final_states_and_drawn_as_fitted():
    model = small_model("titans-lmm", memory={"chunk_size": 8})
    fresh = model.initial_state(1)
    start = noise.memories(fresh)
    generator = torch.Generator().manual_seed(1)
    wanted = {
        name: torch.stack([torch.tensor([0.3, -1.0]) * (i + 1), torch.tensor([0.5, 2.0]) / (i + 1)])
        for i, name in enumerate(start)
    }

    def final():
        state = fresh.select([0] * 50)
        for name, tensor in noise.memories(state).items():
            index, _, key = name.partition(".")
            mean, deviation = wanted[name].double().reshape(2, 1, 2, 1, 1)
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            state.layers[int(index)][key] = tensor + mean + deviation * drawn
        return state

    found = noise.fit_noise(fresh, (final() for _ in range(4)), lambda tensor: tensor)
    assert found.keys() == wanted.keys() and len(found) == 2 * 4
    drawn = noise.memories(noise.noised_start(fresh, found, 0, 0, range(200)))
    for name, statistics in found.items():
        torch.testing.assert_close(statistics, wanted[name], rtol=0.02, atol=0.02)
        change = (drawn[name] - start[name]).transpose(0, 1).flatten(1)
        again = torch.stack([change.mean(1), change.std(1)]).float()
        torch.testing.assert_close(again, statistics, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", MEMORIES)
def test_invariant_5_random_noise_of_size_0_is_the_ordinary_start_and_of_another_is_not(name):
    model = small_model(name)
    tokens = torch.randint(0, 256, (2, 25))

    def gradients(state):
        model.zero_grad()
        loss, _ = losses(model, tokens, state)
        loss.backward()
        return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    loss, ordinary = gradients(None)
    one = noise.fresh_state(model)
    still, found = gradients(noise.noised_start(one, noise.even_noise(one, 0.0), 0, 3, range(2)))
    torch.testing.assert_close(still, loss, rtol=0, atol=1e-9)
    assert found.keys() == ordinary.keys()
    for parameter, gradient in ordinary.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=0, atol=1e-8)
    with torch.no_grad():
        moved, _ = losses(model, tokens, noise.noised_start(one, noise.even_noise(one, 0.1), 0, 3, range(2)))
    assert abs(moved - loss) > 1e-5


def test_invariant_7_nothing_of_an_earlier_document_is_left_in_a_carried_state():
    model = small_model("titans-mag", sliding_window=8, memory={"chunk_size": 8})
    first, second = torch.randint(0, 256, (2, 2, 21))
    resets = torch.zeros(2, 20, dtype=torch.bool)
    resets[0, 7] = True
    other = first.clone()
    other[:, :5] = torch.randint(0, 256, (2, 5))

    def read_on(tokens):
        state = model(input_ids=tokens[:, :20], resets=resets, use_cache=True).past_key_values
        return model(input_ids=second, past_key_values=next_start(state, "carry")).logits

    differing = (read_on(first) - read_on(other)).abs().amax((1, 2))
    assert differing[0] == 0 and differing[1] > 1e-6


NOISED = {
    "titans-lmm": ["weights.0", "weights.1", "momentum.0", "momentum.1"],
    "titans-mac": [f"memory.{part}.{i}" for part in ("weights", "momentum") for i in (0, 1)],
    "titans-mag": [f"memory.{part}.{i}" for part in ("weights", "momentum") for i in (0, 1)],
    "tnt": ["memory.weights.0", "memory.weights.1"],
    "lact": [f"memory.{part}.{i}" for part in ("weights", "momentum") for i in (0, 1, 2)],
    "ttt-linear": ["weights.0"],
    "hope": [f"weights.{name}.0" for name in ("k", "v", "eta", "alpha", "mem")],
}


def test_random_noise_has_one_size_for_all_matrices_and_none_for_momentum():
    fresh = small_model("titans-mag").initial_state(1)
    for name, statistics in noise.even_noise(fresh, 0.25).items():
        size = 0.0 if "momentum" in name else 0.25
        assert statistics.tolist() == [[0.0, 0.0], [size, size]]


@pytest.mark.parametrize("name", NOISED)
def test_noise_is_on_memory_matrices_and_momentum_and_on_nothing_else(name):
    model = small_model(name)
    fresh = model.initial_state(1)
    everywhere = {
        key: zeros + torch.tensor([[0.0], [0.5]]) for key, zeros in noise.even_noise(fresh, 0.0).items()
    }
    state = noise.noised_start(fresh, everywhere, 0, 0, range(3))
    assert state.clock.tolist() == [0, 0, 0]
    for index, layer in state.layers.items():
        before = fresh.layers[index]
        changed = {
            key for key, tensor in layer.items() if not torch.equal(tensor, before[key].expand_as(tensor))
        }
        anchors = {key for key in layer if "anchor" in key or key.startswith("segment")}
        if name == "tnt":
            anchors = {key for key in anchors if not key.startswith("local")}
        assert changed - anchors == set(NOISED[name]) and anchors <= changed
        for key in anchors:
            weights = key.replace("anchor", "weights").replace("segment", "memory.weights")
            assert torch.equal(layer[key], layer[weights])
        # No two lanes start with the same.
        assert all(not torch.equal(layer[key][0], layer[key][1]) for key in NOISED[name])


def test_every_noised_matrix_tells_on_the_predictions():
    """A tensor that a layer replaces before it reads it would be noised in vain."""
    for name in ("titans-mac", "titans-mag", "tnt", "atlas++", "lact", "hope"):
        model = small_model(name, num_hidden_layers=1)
        tokens = torch.randint(0, 256, (1, 20))
        fresh = model.initial_state(1)
        with torch.no_grad():
            ordinary = model(input_ids=tokens, past_key_values=fresh).logits
            for key in noise.even_noise(fresh, 0.0):
                alone = noise.even_noise(fresh, 0.0)
                alone[key] = alone[key] + torch.tensor([[0.0], [0.5]])
                state = noise.noised_start(fresh, alone, 0, 0, range(1))
                noised = model(input_ids=tokens, past_key_values=state).logits
                assert (noised - ordinary).abs().max() > 1e-9, (name, key)


def test_recurrences_of_other_libraries_are_memories_and_what_counts_tokens_is_none():
    assert noise.is_memory("recurrent")
    others = (
        "attention.cache.key", "memory.tail.q", "query_tail", "memory.phase", "clock", "halo.0", "pooled",
        "memory.pending.1", "projection", "memory.anchor.0", "local.0.weights.1",
    )  # fmt: skip
    assert not any(noise.is_memory(name) for name in others)


@pytest.mark.parametrize("mode", ["fitted-noise", "random-noise"])
@pytest.mark.parametrize("name", ["transformer", "hope-attention"])
def test_models_without_a_memory_are_refused(tiny, mode, name):
    changes = {"model__preset": name, "model__overrides__memory": None, "run__state_mode": mode}
    if name != "transformer":
        changes["model__overrides__sliding_window"] = None
    with pytest.raises(ConfigError, match="no layer of this model has one.*'reset' or 'carry'"):
        train(tiny(**changes), quiet=True)


def test_noise_does_not_depend_on_the_parts_of_a_step(tiny, tmp_path):
    changes = {
        "run__state_mode": "fitted-noise",
        "run__fresh_share": 0.3,
        "run__eval_every": 0,
        "run__steps": 4,
    }
    whole, parts = (
        train(
            tiny(run__out=str(tmp_path / str(n)), run__accumulation=n, run__log_every=1, **changes),
            quiet=True,
        )
        for n in (1, 2)
    )
    assert rows(whole) == pytest.approx(rows(parts), rel=1e-5)


def test_the_fitted_noise_is_that_of_the_first_batches_and_kept_with_the_run(tiny, monkeypatch):
    from safetensors.torch import load_file

    from nestor.training import loop

    monkeypatch.setattr(loop, "FIT_BATCHES", 3)
    kept = []
    original = noise.fit_noise
    monkeypatch.setattr(loop, "fit_noise", lambda *given: kept.append(original(*given)) or kept[-1])
    config = tiny(run__state_mode="fitted-noise", run__eval_every=0, run__accumulation=2)
    folder = train(config, quiet=True).folder / "checkpoints" / "step-000010"
    saved = load_file(folder / "noise.safetensors")
    assert len(kept) == 1 and all(torch.equal(saved[name], tensor) for name, tensor in kept[0].items())
    # By hand, from the model and the text as they are before the first step.
    from nestor.data import ByteTokenizer
    from nestor.training.inputs import train_stream
    from nestor.training.loop import seed_everything
    from nestor.training.model import build_model

    seed_everything(config.run.seed)
    model = build_model(config, ByteTokenizer(), None)
    stream = train_stream(config.data, ByteTokenizer(), config.run.seed, range(4))
    start, ends = model.initial_state(1).layers[1]["memory.momentum.0"], []
    for _ in range(3):
        batch = next(stream)
        with torch.no_grad():
            state = model(batch["input_ids"], resets=batch["resets"], use_cache=True).past_key_values
        # Persistent tokens are read before any text, so the start has a momentum already.
        ends.append((state.layers[1]["memory.momentum.0"] - start).double())
    heads = torch.cat(ends).transpose(0, 1).flatten(1)
    wanted = torch.stack([heads.mean(1), heads.std(1)]).float()
    torch.testing.assert_close(saved["1.memory.momentum.0"], wanted, rtol=1e-3, atol=1e-7)


def test_what_is_passed_or_drawn_starts_documents_too_and_what_is_carried_does_not():
    resets = torch.tensor([[True, False], [False, True], [False, False]])
    part = {name: torch.zeros(3, 2, dtype=torch.int64) for name in ("input_ids", "labels")}
    part |= {"resets": resets, "weights": torch.ones(3, 2)}
    seen = []

    def model(**inputs):
        seen.append(inputs.get("resets"))
        return SimpleNamespace(loss=torch.tensor(0.0), past_key_values=None)

    fresh = torch.tensor([False, False, True])
    for mode in ("carry", "pass"):
        run = SimpleNamespace(
            config=SimpleNamespace(run=SimpleNamespace(state_mode=mode, precision="fp32")),
            processes=SimpleNamespace(device=torch.device("cpu")), model=model,
        )  # fmt: skip
        run.autocast = lambda run=run: Run.autocast(run)
        Run.forward(run, part, object(), fresh, torch.tensor(1))
    assert seen[0].tolist() == [[True, False], [False, True], [True, False]]
    assert seen[1].tolist() == [[False, False], [False, True], [True, False]]
    assert resets.tolist() == [[True, False], [False, True], [False, False]]


def test_carried_memories_stay_in_single_precision_under_autocast(tiny):
    config = tiny(run__precision="bf16", run__steps=2, run__eval_every=0)
    folder = train(config, quiet=True).folder / "checkpoints" / "step-000002"
    from safetensors.torch import load_file

    memories = {k: t for k, t in load_file(folder / "state.safetensors").items() if "memory.weights" in k}
    assert memories and all(tensor.dtype == torch.float32 for tensor in memories.values())


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("fresh_share", 1.5, "between 0 and 1"),
        ("noise", -0.1, "at least 0"),
        ("state_mode", "noise", "one of"),
    ],
)
def test_impossible_settings_are_refused(setting, value, message):
    with pytest.raises(ConfigError, match=f"run.{setting} is .*{message}"):
        TrainConfig.from_dict({"run": {"steps": 1, setting: value}})
