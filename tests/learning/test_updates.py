"""When levels are updated and by how much, against plain loops (spec nested-learning, section h)."""

import copy

import pytest
import torch
from torch.nn import functional as F

from nestor.errors import ConfigError, NonFiniteError, StateMismatchError
from nestor.learning import Learner, Level
from nestor.learning.updates import level_step
from nestor.models import State

FAST, SLOW = "layers.0.feed_forward.down_proj.weight", "layers.1.feed_forward.up_proj.weight"


def assert_close(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-9, atol=1e-11, msg=name)


def by_hand(model, ids, period, names, rate, reduce="mean"):
    """Gradient descent on a copy of the model, on chunks of a stream that it reads with detached caches."""
    model = copy.deepcopy(model)
    own = dict(model.named_parameters())
    logits, state = [], State.empty(1)
    for begin in range(0, ids.shape[1], period):
        chunk, targets = ids[:, begin : begin + period], ids[:, begin + 1 : begin + 1 + period]
        out = model(chunk, past_key_values=state, use_cache=True)
        logits.append(out.logits.detach())
        state = out.past_key_values.detach()
        if targets.shape[1] < period:
            break
        loss = F.cross_entropy(out.logits[0], targets[0], reduction=reduce)
        gradients = torch.autograd.grad(loss, [own[name] for name in names])
        with torch.no_grad():
            for name, g in zip(names, gradients, strict=True):
                own[name].sub_(rate * g)
    return torch.cat(logits, 1), {name: own[name].detach() for name in names}


def learned(model, state, name, level, row=0):
    return dict(model.named_parameters())[name].detach() + state.learned[level][f"delta/{name}"][row]


@pytest.mark.parametrize("period", [1, 4])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_invariants_2_and_3_one_level_is_gradient_descent_on_its_chunks(
    model, period, reduce, stream
) -> None:
    ids = stream(14)
    names = (FAST, SLOW)
    rate = 0.3
    expected, weights = by_hand(model, ids, period, names, rate, reduce)
    learner = Learner(model, [Level("all", names, period, rate, reduce=reduce)])
    logits, state = learner.read(ids, learner.start())
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-12)
    for name in names:
        torch.testing.assert_close(learned(model, state, name, "all"), weights[name], rtol=1e-10, atol=1e-12)
    # The sum with a rate of 1 / C is the mean.
    same = Learner(model, [Level("all", names, period, rate / period, reduce="sum")])
    mean = Learner(model, [Level("all", names, period, rate)])
    torch.testing.assert_close(same.read(ids, same.start()).logits, mean.read(ids, mean.start()).logits)


def test_tokens_without_weight_teach_nothing(model, levels, stream) -> None:
    learner = Learner(model, levels())
    ids = stream(20)
    _, state = learner.read(ids, learner.start(), torch.zeros(1, 20))
    assert not state.learned["fast"][f"delta/{FAST}"].any()
    with pytest.warns(UserWarning, match="'fast' was never updated in 18 tokens"):
        learner.report(state)


def test_invariant_14_a_nested_level_starts_again_where_the_slower_one_says(model, stream) -> None:
    fast = Level("fast", (FAST,), 2, 0.3, "sum", "momentum", reset=3)
    learner = Learner(model, [fast, Level("slow", (FAST,), 6, 0.1, "sum")])
    ids, cache, gradients = stream(17), State.empty(1), []
    start = dict(model.named_parameters())[FAST].detach().clone()
    weight, momentum = start.clone(), torch.zeros_like(start)
    for begin in range(0, 16, 2):
        other = copy.deepcopy(model)
        leaf = dict(other.named_parameters())[FAST]
        leaf.data = weight
        out = other(ids[:, begin : begin + 2], past_key_values=cache, use_cache=True)
        cache = out.past_key_values.detach()
        loss = F.cross_entropy(out.logits[0], ids[0, begin + 1 : begin + 3], reduction="sum")
        gradients.extend(torch.autograd.grad(loss, [leaf]))
        momentum = 0.9 * momentum + gradients[-1]
        weight = weight - 0.3 * momentum
        if len(gradients) % 3 == 0:
            start = start - 0.1 * sum(gradients[-3:])
            weight, momentum = start.clone(), torch.zeros_like(start)
        state = learner.read(ids[:, : begin + 3], learner.start()).state
        torch.testing.assert_close(learner.weights(state)[FAST], weight, rtol=1e-9, atol=1e-12)
        assert state.learned["fast"][f"delta/{FAST}"].any() == (len(gradients) % 3 > 0)
    assert learner.report(state)[0][0].updates == 8


def test_what_belongs_to_a_context_ends_with_it(model, stream) -> None:
    learner = Learner(
        model, [Level("fast", (FAST,), 2, 0.3, reset="context"), Level("slow", (SLOW,), 4, 0.3)]
    )
    state = learner.close(learner.read(stream(9), learner.start()).state)
    assert not state.learned["fast"][f"delta/{FAST}"].any() and state.learned["slow"][f"delta/{SLOW}"].any()
    assert int(state.learned["fast"]["updates"]) == 4


def test_updates_are_no_larger_than_asked(model, stream) -> None:
    learner = Learner(model, [Level("fast", (FAST,), 3, 100.0, largest_update=1e-3)])
    _, state = learner.read(stream(5), learner.start())
    own = dict(model.named_parameters())[FAST].norm()
    assert float(state.learned["fast"][f"delta/{FAST}"].norm() / own) == pytest.approx(1e-3)


def test_the_limit_is_that_of_all_weights_of_a_level(model, stream) -> None:
    names = (FAST, SLOW)
    learner = Learner(model, [Level("all", names, 3, 100.0, largest_update=1e-3)])
    free = Learner(model, [Level("all", names, 3, 100.0)])
    kept, unbound = (one.read(stream(5), one.start()).state.learned["all"] for one in (learner, free))
    own = torch.cat([dict(model.named_parameters())[name].detach().flatten() for name in names])
    limited, without = (torch.cat([k[f"delta/{n}"].flatten() for n in names]) for k in (kept, unbound))
    assert float(limited.norm() / own.norm()) == pytest.approx(1e-3)
    torch.testing.assert_close(limited / limited.norm(), without / without.norm())
    assert float(kept["moved"]) == pytest.approx(float(limited.norm()))


def test_small_updates_add_up_beside_weights_in_bfloat16(model, stream) -> None:
    low = model.to(torch.bfloat16)
    learner = Learner(low, [Level("all", (FAST,), 2, 1e-6)])
    own = dict(low.named_parameters())[FAST]
    first = learner.read(stream(4), learner.start()).state
    assert torch.equal(learner.weights(first)[FAST], own) and first.learned["all"][f"delta/{FAST}"].any()
    assert first.learned["all"][f"delta/{FAST}"].dtype == torch.float32
    repeated = stream(1).repeat(1, 4001)
    state = learner.read(repeated[:, :201], learner.start()).state
    one = learner.read(repeated[:, :3], learner.start()).state.learned["all"][f"delta/{FAST}"]
    assert float(state.learned["all"][f"delta/{FAST}"].norm()) > 50 * float(one.norm())


def test_what_is_not_finite_is_refused_and_the_state_stays(model, stream) -> None:
    learner = Learner(model, [Level("fast", (FAST,), 3, 1e308, optimizer="momentum")])
    state = learner.start()
    with pytest.raises(NonFiniteError, match="level 'fast' at token"):
        learner.read(stream(20), state)
    assert not state.learned["fast"][f"delta/{FAST}"].any()


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: [Level("a", (FAST,), 4), Level("a", (SLOW,), 4)], "own name"),
        (lambda: [Level("a", (FAST,), 4), Level("b", (FAST,), 8)], "choose one"),
        (lambda: [Level("a", (FAST,), 4, reset=0)], "reset=0"),
        (lambda: [Level("a", (FAST,), 4, reset="contexts")], "Did you mean 'context'"),
        (lambda: [Level("a", (FAST,), 4), Level("b", (SLOW,), 6)], "no multiple of the shortest period, 4"),
        (lambda: [Level("a", ("layers.0.feed_forward.down.weight",), 4)], "Did you mean"),
        (lambda: [Level("a", (FAST,), None)], "no level has a period"),
        (lambda: [Level("a", (FAST,), 4, phase=4)], "phase 4"),
        (lambda: [Level("a", (FAST,), 4, optimizer="adamw")], "Did you mean 'adam'"),
        (lambda: [Level("a", (FAST,), 0)], "period of 0"),
        (lambda: [Level("stream", (FAST,), 4)], "not 'stream'"),
        (lambda: [Level("a", (), 4)], "no parameters"),
        (lambda: [Level("a", (FAST,), 4, float("nan"))], "learning rate nan"),
    ],
)
def test_levels_that_cannot_be(model, made, message) -> None:
    with pytest.raises(ConfigError, match=message):
        Learner(model, made())


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_optimisers_are_those_of_pytorch(model, optimizer, stream) -> None:
    ids = stream(13)
    learner = Learner(model, [Level("all", (FAST,), 3, 0.02, optimizer=optimizer)])
    _, state = learner.read(ids, learner.start())
    other, cache = copy.deepcopy(model), State.empty(1)
    own = dict(other.named_parameters())[FAST]
    theirs = {
        "momentum": lambda: torch.optim.SGD([own], lr=0.02, momentum=0.9),
        "adam": lambda: torch.optim.Adam([own], lr=0.02, betas=(0.9, 0.999)),
    }[optimizer]()
    for begin in range(0, 12, 3):
        out = other(ids[:, begin : begin + 3], past_key_values=cache, use_cache=True)
        cache = out.past_key_values.detach()
        loss = F.cross_entropy(out.logits[0], ids[0, begin + 1 : begin + 4])
        (own.grad,) = torch.autograd.grad(loss, [own])
        theirs.step()
    torch.testing.assert_close(learned(model, state, FAST, "all"), own.detach(), rtol=1e-8, atol=1e-10)


def test_a_phase_moves_the_updates(model, stream) -> None:
    learner = Learner(
        model, [Level("fast", (FAST,), 2, 0.1), Level("slow", (SLOW,), 6, 0.1, phase=4, reduce="sum")]
    )
    state, counts = learner.start(), []
    for token in stream(18)[0]:
        state = learner.read(token.view(1, 1), state).state
        counts.append(int(state.learned["slow"]["updates"]))
    # Updates after 4, 10 and 16 tokens, when the one after them is there.
    assert counts == [0] * 4 + [1] * 6 + [2] * 6 + [3] * 2
    assert learner.report(state)[0][1].pending == 0
    with pytest.raises(StateMismatchError, match="'slow' has period 6, phase 4, reduces by sum"):
        Learner(model, [Level("fast", (FAST,), 2, 0.1), Level("slow", (SLOW,), 6, 0.1)]).report(state)


def test_levels_that_never_change_are_reported(model, stream) -> None:
    learner = Learner(model, [Level("never", (FAST,), None), Level("slow", (SLOW,), 4, 0.1)])
    never, slow = learner.report(learner.read(stream(9), learner.start()).state)[0]
    assert (never.updates, never.change, slow.updates) == (0, 0.0, 2)


@pytest.mark.parametrize("limited", [False, True])
def test_a_step_of_nothing_has_a_gradient(limited) -> None:
    level = Level("all", ("weight",), 1, 0.1, largest_update=0.1 if limited else None)
    gradient, scale = torch.zeros(3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    step = level_step(level, [gradient], 1, {}, 0, torch.tensor(4.0), scale)
    (step.changes[0] * step.factor).sum().backward()
    assert scale.grad == 0
    torch.testing.assert_close(gradient.grad, torch.full((3,), -0.1 * 2.0))
