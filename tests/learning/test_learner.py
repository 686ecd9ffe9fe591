"""Reading that learns, against plain loops: invariants of spec nested-learning, section h."""

import copy

import pytest
import torch
from torch.nn import functional as F

from nestor.errors import ConfigError, NonFiniteError, ShapeError, StateMismatchError
from nestor.learning import Learner, Level
from nestor.models import NestorConfig, NestorForCausalLM, State

VOCABULARY = 23
FAST, SLOW = "layers.0.feed_forward.down_proj.weight", "layers.1.feed_forward.up_proj.weight"


def in_pieces(learner, ids, cuts, state=None, weights=None):
    state = learner.start(len(ids)) if state is None else state
    logits, begin = [], 0
    for end in [*cuts, ids.shape[1]]:
        part = slice(begin, end)
        found, state = learner.read(ids[:, part], state, None if weights is None else weights[:, part])
        logits.append(found)
        begin = end
    return torch.cat(logits, 1), state


def flat(state):
    named = {"clock": state.clock}
    named |= {f"{i}.{n}": t for i, layer in state.layers.items() for n, t in layer.items()}
    return named | {f"{i}/{n}": t for i, part in state.learned.items() for n, t in part.items()}


def assert_close(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-9, atol=1e-11, msg=name)


def learned(model, state, name, level, row=0):
    return dict(model.named_parameters())[name].detach() + state.learned[level][f"delta/{name}"][row]


def test_invariant_1_frozen_levels_leave_the_model_as_it_is(model, stream) -> None:
    ids = stream(20)
    plain = model(ids).logits
    learner = Learner(model, [Level("never", (FAST,), None), Level("still", (SLOW,), 4, 0.0)])
    logits, state = learner.read(ids, learner.start())
    whole, _ = in_pieces(learner, ids, range(4, 20, 4))
    assert torch.equal(logits, whole)
    torch.testing.assert_close(logits, plain, rtol=1e-12, atol=1e-13)
    assert not state.learned["still"][f"delta/{SLOW}"].any() and "never" not in state.learned
    single = model.float()
    learner = Learner(single, [Level("still", (SLOW,), 32, 0.0)])
    with torch.no_grad():
        assert torch.equal(learner.read(ids, learner.start()).logits, single(ids, use_cache=True).logits)


def test_invariant_4_updates_fall_on_multiples_of_the_period(model, levels, stream) -> None:
    learner = Learner(model, levels())
    ids = stream(21)  # 20 tokens are followed by one
    _, state = learner.read(ids, learner.start())
    fast, slow = learner.report(state)[0]
    assert (fast.updates, fast.pending, slow.updates, slow.pending) == (6, 0, 3, 0)
    closed = learner.close(state)
    fast, slow = learner.report(closed)[0]
    assert (fast.updates, fast.pending, slow.updates, slow.pending) == (6, 2, 3, 2)
    assert float(closed.learned["fast"]["count"]) == 2 and closed.learned["fast"][f"gradient/{FAST}"].any()
    own = dict(model.named_parameters())[FAST].norm()
    assert fast.change == pytest.approx(float(state.learned["fast"][f"delta/{FAST}"].norm() / own))
    before = learner.read(ids[:, :18], learner.start()).state
    after = learner.read(ids[:, 18:19], before).state
    moved = after.learned["fast"][f"delta/{FAST}"] - before.learned["fast"][f"delta/{FAST}"]
    assert float(after.learned["fast"]["moved"]) == pytest.approx(float(moved.norm()))


def test_invariant_5_weights_stay_between_their_updates(model, levels, stream) -> None:
    learner = Learner(model, levels())
    ids, state = stream(20), None
    state = learner.start()
    for token in range(20):
        after = learner.read(ids[:, token : token + 1], state).state
        for level, name, period in (("fast", FAST, 3), ("slow", SLOW, 6)):
            same = torch.equal(after.learned[level][f"delta/{name}"], state.learned[level][f"delta/{name}"])
            # The token after a whole period brings the target of its last one.
            assert same == (token == 0 or token % period > 0), (token, level)
        state = after


def test_invariant_6_the_order_of_levels_is_of_no_account(model, levels, stream) -> None:
    ids = stream(20)
    one, other = Learner(model, levels()), Learner(model, levels()[::-1])
    first, second = one.read(ids, one.start()), other.read(ids, other.start())
    assert torch.equal(first.logits, second.logits)
    for name, tensor in flat(first.state).items():
        assert torch.equal(tensor, flat(second.state)[name]), name


def test_invariant_7_no_token_changes_what_was_predicted_before_it(model, levels, stream) -> None:
    learner = Learner(model, levels())
    ids = stream(20)
    logits = learner.read(ids, learner.start()).logits
    for changed in (1, 6, 7, 12, 19):
        other = ids.clone()
        other[0, changed] = (other[0, changed] + 1) % VOCABULARY
        found = learner.read(other, learner.start()).logits
        torch.testing.assert_close(found[:, :changed], logits[:, :changed], rtol=1e-12, atol=1e-13)
        assert not torch.allclose(found[:, changed], logits[:, changed])


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("cuts", [range(1, 20), [2, 3, 9, 10], [6, 12], [7]])
def test_invariant_8_calls_may_cut_a_stream_anywhere(model, cuts, optimizer, levels, stream) -> None:
    learner = Learner(model, levels(rate=0.05, optimizer=optimizer))
    ids = stream(20)
    weights = torch.rand(1, 20)
    logits, state = learner.read(ids, learner.start(), weights)
    found, after = in_pieces(learner, ids, cuts, weights=weights)
    torch.testing.assert_close(found, logits, rtol=1e-9, atol=1e-11)
    assert_close(flat(after), flat(state))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("length", [1, 2, 12, 13, 20])
def test_to_study_is_to_read_and_close_without_reading_twice(
    model, length, optimizer, monkeypatch, levels, stream
) -> None:
    ids, weights = stream(length, rows=2), torch.rand(2, length, dtype=torch.float64)
    learner = Learner(model, levels(reset="never", optimizer=optimizer, rate=0.1))
    # From a State with an open chunk, in the middle of a period.
    _, begun = learner.read(stream(7, rows=2, seed=3), learner.start(2))
    wanted = learner.close(learner.read(ids, begun, weights).state)
    before = copy.deepcopy(begun)
    runs, original = [], learner._learn
    monkeypatch.setattr(
        learner, "_learn", lambda stream, text: runs.append(len(text) - 1) or original(stream, text)
    )
    monkeypatch.setattr(learner, "_read", None)
    found = learner.study(ids, begun, weights)
    assert_close(flat(found), flat(wanted))
    assert_close(flat(begun), flat(before))
    # Each stream's open token and these, but the last, once.
    assert sum(runs) == 2 * length
    with pytest.raises(ShapeError, match="weights have shape"):
        learner.study(ids, begun, weights[:1])


def test_what_follows_a_chunk_is_taken_from_there_on(model, levels, stream) -> None:
    ids = stream(14)
    learner = Learner(model, levels())
    seen = []

    def undo(before, after):
        seen.append(int(after.learned["fast"]["updates"] - before.learned["fast"]["updates"]))
        return before if len(seen) == 2 else after

    # The second chunk of three tokens is as if it had not been there, its context included.
    found = learner.study(ids, learner.start(), after_chunk=undo)
    assert seen == [1, 1, 1, 1, 0] and found.learned["stream"]["clock"] == 10
    pulled = learner.study(ids[:, :4], learner.start(), after_chunk=lambda before, after: before)
    assert not any(bool(x.any()) for name, x in pulled.learned["fast"].items() if name.startswith("delta"))


def test_invariant_9_a_saved_stream_goes_on(model, tmp_path, levels, stream) -> None:
    learner = Learner(model, levels(optimizer="momentum"))
    ids = stream(20)
    _, state = learner.read(ids[:, :8], learner.start())
    state.save(tmp_path / "state.safetensors", model)
    loaded = State.load(tmp_path / "state.safetensors", model)
    one, other = learner.read(ids[:, 8:], state), learner.read(ids[:, 8:], loaded)
    assert torch.equal(one.logits, other.logits)
    for name, tensor in flat(one.state).items():
        assert torch.equal(tensor, flat(other.state)[name]), name


def test_invariant_10_streams_of_a_batch_learn_each_for_itself(model, levels, stream) -> None:
    learner = Learner(model, levels())
    ids = stream(20, rows=3)
    # At different places in their streams and chunks.
    ahead = learner.read(stream(4, seed=5), learner.start()).state
    begin = State.stack([learner.start(), ahead, learner.start()])
    logits, state = learner.read(ids, begin)
    for row in range(3):
        found, own = learner.read(ids[row : row + 1], begin.select([row]))
        torch.testing.assert_close(found, logits[row : row + 1], rtol=1e-10, atol=1e-12)
        for name, tensor in own.learned["fast"].items():
            torch.testing.assert_close(
                tensor, state.learned["fast"][name][row : row + 1], rtol=1e-9, atol=1e-12
            )
    order = [2, 0, 1]
    swapped = learner.read(ids[order], begin.select(order))
    torch.testing.assert_close(swapped.logits, logits[order], rtol=1e-10, atol=1e-12)


def test_invariant_11_gradients_are_those_of_the_summed_loss(model, stream) -> None:
    ids = stream(6)
    learner = Learner(model, [Level("fast", (FAST,), 5, 0.0, phase=0), Level("slow", (SLOW,), 10, 0.0)])
    _, state = learner.read(ids, learner.start())

    def loss(name, place, amount):
        other = copy.deepcopy(model)
        with torch.no_grad():
            dict(other.named_parameters())[name][place] += amount
            return F.cross_entropy(other(ids[:, :5]).logits[0], ids[0, 1:], reduction="sum")

    g = state.learned["slow"][f"gradient/{SLOW}"][0]
    for place in ((0, 0), (7, 3), (15, 11)):
        expected = (loss(SLOW, place, 1e-5) - loss(SLOW, place, -1e-5)) / 2e-5
        assert float(g[place]) == pytest.approx(float(expected), rel=1e-6, abs=1e-9)


def test_invariant_12_a_slow_level_sums_what_the_fast_one_saw(model, levels, stream) -> None:
    ids = stream(7)
    learner = Learner(model, levels(fast=3, slow=12))
    half = learner.read(ids[:, :4], learner.start()).state
    whole = learner.read(ids[:, 4:], half).state
    first = half.learned["slow"][f"gradient/{SLOW}"]
    # The second chunk's gradient, with the fast weights that it was read with and caches from the first.
    other = copy.deepcopy(model)
    start = model(ids[:, :3], use_cache=True).past_key_values.detach()
    with torch.no_grad():
        dict(other.named_parameters())[FAST].copy_(learned(model, half, FAST, "fast"))
    out = other(ids[:, 3:6], past_key_values=start, use_cache=True)
    loss = F.cross_entropy(out.logits[0], ids[0, 4:], reduction="sum")
    (second,) = torch.autograd.grad(loss, [dict(other.named_parameters())[SLOW]])
    assert half.learned["fast"][f"delta/{FAST}"].any()
    torch.testing.assert_close(whole.learned["slow"][f"gradient/{SLOW}"][0], first[0] + second)


def test_invariant_25_a_level_put_back_behaves_as_before(model, levels, stream) -> None:
    learner = Learner(model, levels())
    ids = stream(7)
    begin = learner.start()
    _, state = learner.read(ids, begin)
    untouched = learner.read(ids, begin)
    assert torch.equal(untouched.logits, learner.read(ids, learner.start()).logits)
    fresh = learner.close(state)
    assert not torch.equal(learner.read(ids, fresh).logits[:, :3], untouched.logits[:, :3])
    fresh.learned = {**begin.learned, "stream": fresh.learned["stream"]}
    torch.testing.assert_close(learner.read(ids, fresh).logits[:, 0], untouched.logits[:, 0])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_one_level_forgets_and_the_others_keep_what_they_learned(model, levels, stream, optimizer) -> None:
    learner = Learner(model, levels(optimizer=optimizer))
    state = learner.study(stream(14, rows=2), learner.start(2))
    before = state.clone()
    after = learner.forget(state, "fast")
    assert_close(flat(state), flat(before))
    gone = {name for name, tensor in flat(after).items() if not torch.equal(tensor, flat(state)[name])}
    moments = ("momentum", "second_momentum") if optimizer == "adam" else ()
    assert gone == {f"fast/{part}/{FAST}" for part in ("delta", *moments)}
    assert not any(flat(after)[name].any() for name in gone)
    for row in range(2):
        weights = learner.weights(after, row)
        assert torch.equal(weights[FAST], model.get_parameter(FAST))
        assert torch.equal(weights[SLOW], learner.weights(state, row)[SLOW])
        assert not torch.equal(weights[SLOW], model.get_parameter(SLOW))
    # It learns again from there.
    assert learner.study(stream(7, rows=2), after).learned["fast"][f"delta/{FAST}"].any()
    with pytest.raises(ConfigError, match="no level 'fats' learns.*Did you mean 'fast'"):
        learner.forget(state, "fats")


def test_adaptation_lowers_the_loss_on_a_stream_that_repeats(model, levels, stream) -> None:
    ids = stream(8).repeat(1, 40)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    learner = Learner(model, levels(fast=8, slow=16, rate=0.05, optimizer="adam"))
    frozen = F.cross_entropy(model(ids[:, :-1]).logits[0, -64:], ids[0, -64:])
    logits = learner.read(ids, learner.start()).logits
    assert float(F.cross_entropy(logits[0, -65:-1], ids[0, -64:])) < 0.8 * float(frozen)


def test_it_learns_under_inference_mode_and_leaves_the_model_alone(model, levels, stream) -> None:
    learner = Learner(model, levels())
    ids = stream(20)
    before = copy.deepcopy(model.state_dict())
    expected = learner.read(ids, learner.start())
    with torch.inference_mode():
        found, state = in_pieces(learner, ids, [8])
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(found, expected.logits, rtol=1e-9, atol=1e-11)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(tensor.requires_grad for tensor in flat(state).values())


def test_weights_that_nothing_depends_on_are_refused(model, stream) -> None:
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(3, dtype=torch.float64)))
    learner = Learner(model, [Level("all", ("unused", FAST), 2, 0.1)])
    with pytest.raises(ConfigError, match="does not depend on 'unused'"):
        learner.read(stream(4), learner.start())


def test_generation_goes_on_from_what_was_read_and_learned(model, levels, stream) -> None:
    learner = Learner(model, levels(rate=2.0))
    ids = stream(11)
    state = learner.read(ids[:, :9], learner.start()).state
    before = {name: tensor.clone() for name, tensor in flat(state).items()}
    found = learner.generate(ids[:, 9:], state, max_new_tokens=4, do_sample=False)
    expected = []
    with learner.applied(state) as changed:
        assert changed is model and torch.equal(model.get_parameter(FAST), learner.weights(state)[FAST])
        out = model(ids[:, 9:], past_key_values=State(state.layers, state.clock), use_cache=True)
        for _ in range(4):
            expected.append(int(out.logits[0, -1].argmax()))
            out = model(torch.tensor([expected[-1:]]), past_key_values=out.past_key_values, use_cache=True)
    assert found.tolist() == [expected]
    assert all(torch.equal(tensor, before[name]) for name, tensor in flat(state).items())
    assert not torch.equal(model.get_parameter(FAST), learner.weights(state)[FAST])
    with pytest.raises(ShapeError, match="2 rows"):
        learner.generate(ids[:, 9:], State.stack([state, state]))


def test_states_of_others_are_refused(model, levels, stream) -> None:
    learner = Learner(model, levels())
    state = learner.start()
    with pytest.raises(StateMismatchError, match="begin with Learner.start"):
        learner.read(stream(3), model.initial_state(1))
    with pytest.raises(StateMismatchError, match="other parameters or optimisers"):
        Learner(model, levels(optimizer="adam")).read(stream(3), state)
    with pytest.raises(StateMismatchError, match="has period 3"):
        Learner(model, levels(fast=2)).read(stream(3), state)
    with pytest.raises(StateMismatchError, match=r"nestor\.learning\.Learner"):
        model(stream(3), past_key_values=state)
    with pytest.raises(ShapeError, match=r"give \[1, length\]"):
        learner.read(stream(3, rows=2), state)
    with pytest.raises(ShapeError, match="weights have shape"):
        learner.read(stream(3), state, torch.ones(1, 2))


def test_a_state_of_an_older_version_says_what_to_do(model, levels, stream, tmp_path) -> None:
    learner = Learner(model, levels())
    state = learner.study(stream(7), learner.start())
    period = int(state.learned["fast"]["settings"][0, 0])
    state.learned["fast"]["settings"] = state.learned["fast"]["settings"][:, :3]
    state.save(tmp_path / "old.safetensors", model)
    older = State.load(tmp_path / "old.safetensors", model=model)
    for use in (learner.report, learner.close, learner.weights, lambda state: learner.read(stream(3), state)):
        with pytest.raises(StateMismatchError) as caught:
            use(older)
        said = str(caught.value)
        assert f"level 'fast' has the settings [{period}, 0, 0]" in said
        assert "wanted are 4 numbers or more: period, phase, reduction, reset" in said
        assert "another memory file, and read the texts again" in said


def test_weights_belong_to_the_tokens_that_are_predicted(model, stream) -> None:
    ids, weights = stream(8), torch.tensor([[9.0, 1.0, 0.0, 2.0, 0.5, 0.0, 3.0, 7.0]], dtype=torch.float64)
    learner = Learner(model, [Level("all", (FAST,), 3, 0.3)])
    for cuts in ([], [2], [4, 6]):
        _, state = in_pieces(learner, ids, cuts, weights=weights)
        other, cache = copy.deepcopy(model), State.empty(1)
        own = dict(other.named_parameters())[FAST]
        for begin in (0, 3):
            out = other(ids[:, begin : begin + 3], past_key_values=cache, use_cache=True)
            cache = out.past_key_values.detach()
            losses = F.cross_entropy(out.logits[0], ids[0, begin + 1 : begin + 4], reduction="none")
            counted = weights[0, begin + 1 : begin + 4]
            (g,) = torch.autograd.grad((losses * counted).sum() / counted.sum(), [own])
            with torch.no_grad():
                own.sub_(0.3 * g)
        torch.testing.assert_close(learned(model, state, FAST, "all"), own.detach(), rtol=1e-10, atol=1e-12)
    closed = learner.close(state)
    assert float(closed.learned["all"]["count"]) == 7.0
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ShapeError, match="finite and not below 0"):
            learner.read(ids, learner.start(), torch.full((1, 8), wrong))


@pytest.mark.parametrize("kind", ["titans-mag", "titans-mac", "lact", "hope"])
def test_models_with_memories_learn_under_inference_mode(kind, stream) -> None:
    torch.manual_seed(0)
    small = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    memory = {"memory_as_gate": "titans-mag", "memory_as_context": "titans-mac", "lact": "lact"}
    memory["self_modifying"] = "hope"
    mixer = next(name for name, preset in memory.items() if preset == kind)
    own = {"lact": {}, "hope": {"projection_chunk_size": 2}}.get(kind, {"heads": 2})
    config = NestorConfig(
        **small, layer_types=[mixer] * 2, sliding_window=6, segment_size=8,
        memory={"chunk_size": 4, **own},
    )  # fmt: skip
    model = NestorForCausalLM(config).double().eval()
    learner = Learner(model, [Level("all", ("layers.1.feed_forward.down_proj.weight",), 4, 0.1)])
    ids = stream(15)
    expected = learner.read(ids, learner.start())
    with torch.inference_mode():
        found, state = in_pieces(learner, ids, [3, 7, 8])
    torch.testing.assert_close(found, expected.logits, rtol=1e-8, atol=1e-10)
    assert int(state.learned["all"]["updates"]) == 3


def test_a_gradient_that_is_not_finite_is_not_kept(model, levels, stream) -> None:
    learner = Learner(model, levels(slow=12))
    state = learner.read(stream(3), learner.start()).state
    with torch.no_grad():
        model.get_parameter("layers.1.mixer_norm.weight").fill_(float("nan"))
    for step in (lambda: learner.read(stream(4), state), lambda: learner.close(state)):
        with pytest.raises(NonFiniteError, match="not finite"):
            step()
    assert not state.learned["slow"][f"gradient/{SLOW}"].any()
