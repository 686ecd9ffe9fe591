"""M3 as the optimiser of a level, against a loop over its gradients (spec nested-learning, b.6 and h)."""

import pytest
import torch
from torch.nn import functional as F

from nestor.errors import ConfigError, StateMismatchError
from nestor.learning import Learner, Level, assign_levels
from nestor.models import State
from nestor.ops.neural_memory.muon import newton_schulz

NAME = "layers.1.feed_forward.up_proj.weight"
PERIOD, SLOW = 2, 3


def level(**choices):
    options = {"optimizer": "m3", "slow_period": SLOW, "slow_weight": 0.5, "momentum": 0.8}
    return Level("all", (NAME,), PERIOD, 0.05, second_momentum=0.9, **{**options, **choices})


def test_invariant_22_a_level_steps_as_m3_and_its_slow_momentum_is_a_block_late(model, stream) -> None:
    ids = stream(17)
    learner = Learner(model, [level()])
    state = learner.start()
    own = dict(model.named_parameters())[NAME]
    begin = own.detach().clone()
    cache, given = State.empty(1), []
    for chunk in range(8):
        tokens = slice(chunk * PERIOD, (chunk + 1) * PERIOD)
        out = model(ids[:, tokens], past_key_values=cache, use_cache=True)
        cache = out.past_key_values.detach()
        targets = ids[0, tokens.start + 1 : tokens.stop + 1]
        given.append(torch.autograd.grad(F.cross_entropy(out.logits[0], targets), [own])[0])
        t = len(given)
        fast = sum(0.8 ** (t - 1 - i) * g for i, g in enumerate(given))
        blocks = [sum(given[k * SLOW : (k + 1) * SLOW]) for k in range((t - 1) // SLOW)]
        slow = sum((0.8 ** (len(blocks) - 1 - k) * b for k, b in enumerate(blocks)), torch.zeros_like(own))
        weights = [0.9 ** (t - 1 - i) for i in range(t)]
        spread = sum(w * g**2 for w, g in zip(weights, given, strict=True)) / sum(weights)
        step = (newton_schulz(fast) + 0.5 * newton_schulz(slow)) / (spread.sqrt() + 1e-8)
        with torch.no_grad():
            own.sub_(0.05 * 0.2 * step / step.square().mean().sqrt())
    learned = own.detach() - begin
    with torch.no_grad():
        own.copy_(begin)
    state = learner.read(ids, state).state
    torch.testing.assert_close(state.learned["all"][f"delta/{NAME}"][0], learned, rtol=1e-8, atol=1e-10)
    assert int(state.learned["all"]["updates"]) == 8 and state.learned["all"][f"slow_direction/{NAME}"].any()


def test_invariants_8_and_9_slow_buffers_survive_cuts_and_files(model, tmp_path, stream) -> None:
    learner, ids = Learner(model, [level()]), stream(20)
    logits, whole = learner.read(ids, learner.start())
    state, found = learner.start(), []
    for begin, end in ((0, 7), (7, 11), (11, 20)):
        part, state = learner.read(ids[:, begin:end], state)
        state.save(tmp_path / "state.safetensors", model)
        state = State.load(tmp_path / "state.safetensors", model)
        found.append(part)
    torch.testing.assert_close(torch.cat(found, 1), logits, rtol=1e-8, atol=1e-10)
    for name, tensor in whole.learned["all"].items():
        torch.testing.assert_close(state.learned["all"][name], tensor, rtol=1e-7, atol=1e-9, msg=name)


def test_a_state_of_another_slow_period_is_refused(model, stream) -> None:
    learner = Learner(model, [level()])
    state = learner.read(stream(9), learner.start()).state
    with pytest.raises(StateMismatchError, match="slow period of 3 updates; .* slow period of 4"):
        Learner(model, [level(slow_period=4)]).read(stream(3), state)
    with pytest.raises(StateMismatchError, match="other parameters or optimisers"):
        Learner(model, [level(optimizer="adam")]).read(stream(3), state)
    # How much the slow branch counts changes nothing that is kept.
    Learner(model, [level(slow_weight=0.1)]).read(stream(3), state)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"slow_period": 0}, "slow_period=0"),
        ({"slow_weight": -0.1}, "slow_weight=-0.1"),
        ({"slow_weight": float("nan")}, "slow_weight=nan"),
    ],
)
def test_impossible_settings(choices, message) -> None:
    with pytest.raises(ConfigError, match=message):
        level(**choices)


def test_only_matrices_and_a_whole_model_by_groups(model, stream) -> None:
    with pytest.raises(
        ConfigError, match=r"'m3', which is for matrices, and 'layers\.0\.mixer_norm\.weight'"
    ):
        Learner(model, [Level("norms", ("layers.0.mixer_norm.weight",), 2, 0.1, optimizer="m3")])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    levels = assign_levels(model, (2, 4), (0.3, 0.3), fixed=0.0, optimizer="m3", slow_period=2)
    learner = Learner(model, levels)
    ids = stream(6).repeat(1, 12)
    logits = learner.read(ids, learner.start()).logits
    plain = F.cross_entropy(model.requires_grad_(False)(ids[:, :-1]).logits[0, -24:], ids[0, -24:])
    assert float(F.cross_entropy(logits[0, -25:-1], ids[0, -24:])) < 0.9 * float(plain)
