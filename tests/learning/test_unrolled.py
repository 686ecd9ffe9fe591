"""The outer gradient through updates, against finite differences (spec nested-learning, h.21 and d.3)."""

import copy

import pytest
import torch
from torch.nn import functional as F

from nestor import preset
from nestor.errors import ConfigError, ShapeError
from nestor.learning import Learner, Level, Unrolled, unrolled_loss
from nestor.models import NestorConfig, NestorForCausalLM

FAST, SLOW = "layers.0.feed_forward.down_proj.weight", "layers.1.feed_forward.up_proj.weight"


@pytest.fixture(scope="module", params=[0, 3], ids="convolutions of {}".format)
def model(request):
    torch.manual_seed(0)
    config = NestorConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
        initializer_range=0.4, attention_conv_kernel=request.param,
    )  # fmt: skip
    return NestorForCausalLM(config).double().eval()


def levels(rate=0.4, **choices):
    return [Level("fast", (FAST,), 2, rate, **choices), Level("slow", (SLOW,), 4, rate, **choices)]


def stream(length):
    return torch.randint(0, 11, (1, length), generator=torch.Generator().manual_seed(3))


def moved(model, name, place, amount):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter(name)[place] += amount
    return other


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"reduce": "sum", "optimizer": "momentum"},
        {"optimizer": "adam", "rate": 0.05},
        {"largest_update": 0.05},
        {"reset": 2},
    ],
    ids=str,
)
def test_it_is_the_loss_of_a_learner(model, choices) -> None:
    ids = stream(12)
    learner = Learner(model, levels(**choices))
    logits = learner.read(ids, learner.start()).logits
    expected = F.cross_entropy(logits[0, :-1], ids[0, 1:])
    for reach in (None, 0, 1):
        found = unrolled_loss(model, levels(**choices), ids, reach=reach)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "choices",
    [{}, {"optimizer": "momentum"}, {"optimizer": "adam", "rate": 0.05}, {"largest_update": 0.05}],
    ids=str,
)
def test_invariant_21_the_outer_gradient_is_that_of_finite_differences(model, choices) -> None:
    ids, score = stream(12), torch.zeros(1, 12, dtype=torch.float64)
    score[:, 9:] = 1  # a later recall
    fixed = levels(**choices)
    names = (FAST, SLOW, "layers.1.mixer.q_proj.weight", "embed_tokens.weight")
    loss = unrolled_loss(model, fixed, ids, score=score)
    gradients = torch.autograd.grad(loss, [model.get_parameter(name) for name in names])
    for name, g in zip(names, gradients, strict=True):
        place = divmod(int(g.abs().argmax()), g.shape[1])
        up, down = (
            unrolled_loss(moved(model, name, place, amount), fixed, ids, score=score)
            for amount in (1e-5, -1e-5)
        )
        # The norm of the weights, which limits an update, counts as given.
        tolerance = 0.05 if "largest_update" in choices else 1e-5
        assert float(g[place]) == pytest.approx(float((up - down).detach()) / 2e-5, rel=tolerance), name
        assert abs(float(g[place])) > 1e-3


def test_memories_have_gradients_once_and_are_refused(model) -> None:
    memory = preset("titans-lmm", "quick", vocab_size=11, hidden_size=8, num_attention_heads=2)
    memory = NestorForCausalLM(memory)
    with pytest.raises(ConfigError, match="reach is None and the model has layers neural_memory"):
        Unrolled(memory, levels())
    with pytest.raises(ConfigError, match="reach is 2 and"):
        Unrolled(memory, levels(), reach=2)
    unrolled_loss(memory, levels(), stream(6), reach=0)


def test_invariant_21_without_reach_updates_count_as_given(model) -> None:
    ids, own = stream(9), model.get_parameter(FAST)
    score = torch.zeros(1, 9, dtype=torch.float64)
    score[:, 5:] = 1
    spec = [Level("fast", (FAST,), 4, 0.4)]
    (first,) = torch.autograd.grad(unrolled_loss(model, spec, ids, score=score, reach=0), [own])
    learner = Learner(model, spec)
    delta = learner.read(ids[:, :5], learner.start()).state.learned["fast"][f"delta/{FAST}"][0]

    def loss(weight, caches_learn):
        start = torch.func.functional_call(
            model, {FAST: weight if caches_learn else own}, (ids[:, :4],), {"use_cache": True}
        )
        out = torch.func.functional_call(
            model, {FAST: weight + delta}, (ids[:, 4:8],), {"past_key_values": start.past_key_values}
        )
        return F.cross_entropy(out.logits[0], ids[0, 5:])

    leaf = own.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, True), [leaf])
    torch.testing.assert_close(first, expected, rtol=1e-9, atol=1e-12)
    (all_of_it,) = torch.autograd.grad(unrolled_loss(model, spec, ids, score=score), [own])
    assert not torch.allclose(all_of_it, first, rtol=1e-2)
    # Two updates before the last chunk: one of them is crossed, or both.
    ids = stream(13)
    near, far, whole = (
        torch.autograd.grad(unrolled_loss(model, spec, ids, reach=reach), [own])[0] for reach in (1, 2, None)
    )
    assert not torch.allclose(near, far, rtol=1e-3)
    torch.testing.assert_close(far, whole, rtol=1e-9, atol=1e-12)


def test_learning_rates_can_be_learned(model) -> None:
    ids = stream(12)

    def loss(log_rate):
        return unrolled_loss(model, levels(), ids, scales={"fast": log_rate.exp()})

    log_rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(loss(log_rate), [log_rate])
    up, down = (loss(torch.tensor(0.1 + step, dtype=torch.float64)) for step in (1e-5, -1e-5))
    assert float(g) == pytest.approx(float((up - down).detach()) / 2e-5, rel=1e-5)


def test_a_few_outer_steps_make_a_stream_easier_to_learn(model) -> None:
    ids = stream(6).repeat(1, 3)
    score = torch.zeros(ids.shape, dtype=torch.float64)
    score[:, 12:] = 1
    reached = []
    for reach in (0, None):
        other = copy.deepcopy(model)
        own = [other.get_parameter(name) for name in (FAST, SLOW)]
        for _ in range(15):
            loss = unrolled_loss(other, levels(), ids, score=score, reach=reach)
            for parameter, g in zip(own, torch.autograd.grad(loss, own), strict=True):
                parameter.data -= 0.3 * g
        reached.append(float(unrolled_loss(other, levels(), ids, score=score, reach=0).detach()))
    begin = float(unrolled_loss(model, levels(), ids, score=score, reach=0).detach())
    assert reached[0] < begin - 0.1 and reached[1] < begin - 0.1


LLAMA_FAST, LLAMA_SLOW = "model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=8, initializer_range=0.4, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def llama_levels(rate=0.4, **choices):
    return [
        Level("fast", (LLAMA_FAST,), 2, rate, **choices),
        Level("slow", (LLAMA_SLOW,), 4, rate, reset="context", **choices),
    ]


def tokens(*shape):
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(5))


def test_documents_leave_what_they_leave_in_a_learner(llama) -> None:
    """Documents that end inside a chunk, and a level that ends with them."""
    learner = Learner(llama, llama_levels())
    streams, state = Unrolled(llama, llama_levels()), learner.start()
    for ids in (tokens(1, 8), tokens(1, 12), tokens(1, 6)):
        logits, state = learner.read(ids, state)
        state = learner.close(state)
        expected = F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
        torch.testing.assert_close(streams.read(ids)[0], expected, rtol=1e-10, atol=1e-12)
    learned, questions = learner.weights(state), tokens(1, 3, 5)
    for name, weight in streams.weights().items():
        torch.testing.assert_close(weight, learned[name], rtol=1e-10, atol=1e-12)
    assert not torch.equal(learned[LLAMA_FAST], llama.get_parameter(LLAMA_FAST))
    answers = torch.func.functional_call(llama, learned, (questions[0],)).logits
    torch.testing.assert_close(streams.logits(questions)[0], answers, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "choices",
    [{}, {"optimizer": "momentum"}, {"optimizer": "adam", "rate": 0.05}, {"optimizer": "m3", "rate": 0.1},
     {"largest_update": 0.05}],
    ids=str,
)  # fmt: skip
def test_streams_in_step_learn_each_for_itself(llama, choices) -> None:
    documents, questions = [tokens(3, 9), tokens(3, 6).flip(1)], tokens(3, 2, 5)
    log_rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    own = [log_rate, llama.get_parameter(LLAMA_FAST), llama.get_parameter(LLAMA_SLOW)]

    def asked(rows):
        streams = Unrolled(
            llama, llama_levels(**choices), streams=len(rows), scales={"fast": log_rate.exp()}, reach=3
        )
        for document in documents:
            streams.read(document[rows])
        logits = streams.logits(questions[rows])
        return logits, torch.autograd.grad(logits.square().sum(), own)

    together, gradients = asked([0, 1, 2])
    alone = [asked([row]) for row in range(3)]
    torch.testing.assert_close(together, torch.cat([one for one, _ in alone]), rtol=1e-8, atol=1e-10)
    assert not torch.allclose(together[0], together[1], rtol=1e-2)
    for number, g in enumerate(gradients):
        total = sum(one[number] for _, one in alone)
        torch.testing.assert_close(g, total, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("choices", [{}, {"optimizer": "adam", "rate": 0.05}], ids=str)
def test_invariant_21_a_recall_with_the_context_gone_reaches_where_levels_began(model, choices) -> None:
    """Initial weights and the logarithm of a rate, by finite differences of the answers' loss."""
    document, gap, question = tokens(1, 9), tokens(1, 5), tokens(1, 3, 6)

    def loss(log_rate, initial=None, **options):
        scales = {"fast": log_rate.exp()}
        streams = Unrolled(model, levels(**choices), initial=initial, scales=scales, **options)
        streams.read(document)
        streams.read(gap)
        logits = streams.logits(question)[:, :, :-1]
        return F.cross_entropy(logits.flatten(0, 2), question[:, :, 1:].flatten())

    log_rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    weight = model.get_parameter(FAST).detach().clone().requires_grad_()
    by_rate, by_weight = torch.autograd.grad(loss(log_rate, {FAST: weight}), [log_rate, weight])
    up, down = (loss(log_rate.detach() + step).detach() for step in (1e-5, -1e-5))
    assert float(by_rate) == pytest.approx(float(up - down) / 2e-5, rel=1e-5)
    place = divmod(int(by_weight.abs().argmax()), 8)
    ends = []
    for step in (1e-5, -1e-5):
        other = weight.detach().clone()
        other[place] += step
        ends.append(float(loss(log_rate.detach(), {FAST: other}).detach()))
    assert float(by_weight[place]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5)
    # What is cached counts as given: the same loss, and a part of the gradient.
    cut = loss(log_rate, {FAST: weight}, caches=False)
    torch.testing.assert_close(cut, loss(log_rate), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(torch.autograd.grad(cut, weight)[0], by_weight, rtol=1e-3)


def test_what_counts_as_given_is_learned_from_all_the_same(model) -> None:
    """A document whose gradients are given, and a stream that goes on after its graph was cut."""
    first, second, question = tokens(1, 9), tokens(1, 7).flip(1), tokens(1, 3, 6)
    log_rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    own = model.get_parameter(FAST)

    def left(log_rate, **options):
        streams = Unrolled(model, levels(), scales={name: log_rate.exp() for name in ("fast", "slow")})
        streams.read(first[:, :5], **options)
        return streams

    def asked(streams):
        return streams.logits(question).square().sum()

    whole, given, cut = left(log_rate), left(log_rate, through=False), left(log_rate)
    cut.detach({name: log_rate.exp() for name in ("fast", "slow")})
    losses = [asked(one) for one in (whole, given, cut)]
    for loss in losses[1:]:
        torch.testing.assert_close(losses[0], loss, rtol=1e-12, atol=0)
    by_weight = [torch.autograd.grad(loss, own, retain_graph=True)[0] for loss in losses]
    learned = {name: x.detach() - model.get_parameter(name).detach() for name, x in cut.weights().items()}
    moved_model = {name: p + learned[name] for name, p in model.named_parameters()}
    expected = torch.func.functional_call(model, moved_model, (question[0],)).logits.square().sum()
    (first_order,) = torch.autograd.grad(expected, own)
    for g in by_weight[1:]:
        torch.testing.assert_close(g, first_order, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(by_weight[0], first_order, rtol=1e-2)
    # Rates get the part of the gradient that is not by way of the weights; after the cut none at all.
    (by_rate,) = torch.autograd.grad(losses[1], log_rate)
    single = [Level("fast", (FAST,), 4, 0.4)]

    def once(log_rate):
        streams = Unrolled(model, single, scales={"fast": log_rate.exp()})
        streams.read(first[:, :5], through=False)
        return asked(streams)

    (alone,) = torch.autograd.grad(once(log_rate), log_rate)
    up, down = (once(log_rate.detach() + step).detach() for step in (1e-5, -1e-5))
    assert float(alone) == pytest.approx(float(up - down) / 2e-5, rel=1e-5) and float(by_rate) != 0
    assert torch.autograd.grad(losses[2], log_rate, allow_unused=True)[0] is None
    # All three go on as one.
    nats = [
        streams.read(second, through=through)
        for streams, through in zip((whole, given, cut), (True, False, True), strict=True)
    ]
    assert nats[0].requires_grad and not nats[1].requires_grad
    torch.testing.assert_close(nats[0], nats[1], rtol=1e-10, atol=0)
    torch.testing.assert_close(asked(whole), asked(given), rtol=1e-10, atol=0)
    torch.testing.assert_close(asked(whole), asked(cut), rtol=1e-10, atol=0)
    assert float(torch.autograd.grad(asked(cut), log_rate)[0]) != 0


def test_a_scale_is_one_of_the_learning_rate(llama) -> None:
    """Also where the largest update limits it, so that the product can be given to a Learner."""
    ids = tokens(1, 12)
    found = unrolled_loss(
        llama,
        llama_levels(0.1, largest_update=0.05),
        ids,
        scales={n: torch.tensor(5.0) for n in ("fast", "slow")},
    )
    expected = unrolled_loss(llama, llama_levels(0.5, largest_update=0.05), ids)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    free = unrolled_loss(llama, llama_levels(0.5), ids)
    assert not torch.isclose(free, expected, rtol=1e-4)


def test_what_cannot_be_unrolled(model) -> None:
    with pytest.raises(ConfigError, match="3 streams of a model of Nestor's"):
        Unrolled(model, levels(), streams=3)
    with pytest.raises(ShapeError, match="the texts have shape"):
        Unrolled(model, levels()).logits(stream(4))
    with pytest.raises(ShapeError, match="at least two"):
        unrolled_loss(model, levels(), stream(1))
    with pytest.raises(ShapeError, match="score has shape"):
        unrolled_loss(model, levels(), stream(4), score=torch.ones(1, 3))
    with pytest.raises(ConfigError, match="reach is -1"):
        unrolled_loss(model, levels(), stream(4), reach=-1)
