"""What a memory may be: the choices of `MemorySpec`, and that none of them is silently another."""

import itertools

import pytest
import torch

from nestor.errors import ConfigError
from nestor.ops.neural_memory import MemorySpec, MemoryState
from nestor.ops.neural_memory.functions import ACTIVATIONS, INNER_LOSSES, NORMS
from nestor.ops.neural_memory.spec import DECAYS, GRADIENT_PLACES, READ_MODES

CHOICES = {
    "norm": NORMS,
    "inner_loss": tuple(INNER_LOSSES),
    "decay": DECAYS,
    "read_mode": READ_MODES,
    "grad_at": GRADIENT_PLACES,
}


def outputs_of_every_variant(draw_problem, depth: int) -> dict[tuple[str, ...], torch.Tensor]:
    """Outputs of one stream (three chunks, gates inside (0, 1)) under every combination of the choices, with
    two of the losses."""
    p = draw_problem(depth=depth, length=11, norm="residual_layernorm")
    found = {}
    for variant in itertools.product(*{**CHOICES, "inner_loss": ("l2", "dot_product")}.values()):
        choices = dict(zip(CHOICES, variant, strict=True))
        slow = {} if choices["norm"] == "residual_layernorm" else {"gamma": None, "beta": None}
        with torch.no_grad():
            found[variant] = p.run(**choices, **slow)[0]
    return found


def test_no_two_variants_are_the_same_memory(draw_problem) -> None:
    """Norm x loss x decay x read x gradient place: all 72 two-layer memories answer differently."""
    found = outputs_of_every_variant(draw_problem, depth=2)
    assert len(found) == 72
    for (a, first), (b, second) in itertools.combinations(found.items(), 2):
        assert (first - second).abs().max() > 1e-4, (a, b)


def test_linear_variants_coincide_only_where_the_gradient_ignores_the_weights(draw_problem) -> None:
    """Invariant 11: -k^T v is free of W, so the place of the gradient cannot matter; all else still does."""
    found = outputs_of_every_variant(draw_problem, depth=1)
    for (a, first), (b, second) in itertools.combinations(found.items(), 2):
        free = a[0] != "residual_layernorm" and a[1] == "dot_product" and a[:4] == b[:4]
        if free:
            torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)
        else:
            assert (first - second).abs().max() > 1e-4, (a, b)


@pytest.mark.parametrize(
    "change", [{"activation": "silu"}, {"loss_scale": 2.0}, {"norm_eps": 0.1}, {"chunk_size": 3}]
)
def test_every_other_choice_changes_the_memory(draw_problem, change) -> None:
    p = draw_problem(length=11)
    assert (p.run()[0] - p.run(**change)[0]).abs().max() > 1e-4


def test_dropping_a_gate_changes_the_memory(draw_problem) -> None:
    p = draw_problem(length=11)
    for change in ({"eta": None}, {"alpha": None}, {"eta": None, "alpha": None}):
        assert (p.run()[0] - p.run(**change)[0]).abs().max() > 1e-4


@pytest.mark.parametrize("name", [*CHOICES, "activation"])
def test_an_unknown_choice_is_refused_with_the_known_ones(name) -> None:
    known = tuple(ACTIVATIONS) if name == "activation" else CHOICES[name]
    typo = known[-1][:-1]
    with pytest.raises(ConfigError, match=f"{name} is '{typo}'") as caught:
        MemorySpec(**{name: typo})
    for word in known:
        assert repr(word) in str(caught.value)
    assert f"Did you mean {known[-1]!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0"),
        ({"loss_scale": -1.0}, "loss_scale -1.0"),
    ],
)
def test_numbers_out_of_range_are_refused(choices, message) -> None:
    with pytest.raises(ConfigError, match=message):
        MemorySpec(**choices)


def test_a_fresh_state_is_the_initial_weights_without_momentum() -> None:
    initial = (torch.randn(2, 3, 5), torch.randn(2, 5, 3))
    state = MemoryState.fresh(initial, 4, momentum=True)
    for w, m, s, a in zip(initial, state.weights, state.momentum, state.anchor, strict=True):
        assert torch.equal(m, w.expand(4, *w.shape)) and torch.equal(a, m)
        assert s.shape == m.shape and not s.any()
    assert state.phase.tolist() == [0] * 4 and state.phase.dtype == torch.int64
    assert MemoryState.fresh(initial, 4, momentum=False).momentum == ()
