"""What `self_modifying_memory` refuses, and what it returns."""

import pytest
import torch

from nestor.errors import ConfigError, ShapeError
from nestor.ops.self_modifying import Gate, SelfModifyingSpec


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"chunk_size": 6, "projection_chunk_size": 4}, "one must divide the other"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"inner_loss": "l3"}, "inner_loss is 'l3'; .* Did you mean 'l2'"),
        ({"read_mode": "exclusive"}, "read_mode is 'exclusive'; it must be one of 'running', 'anchor'"),
        ({"targets": "none"}, "targets is 'none'"),
        ({"step_cap": "hard"}, "step_cap is 'hard'"),
        ({"max_step": 0.0}, "max_step is 0.0"),
        ({"horizon": -1.0}, "horizon is -1.0"),
    ],
)
def test_impossible_choices_are_refused(choices, message) -> None:
    with pytest.raises(ConfigError, match=message):
        SelfModifyingSpec(**choices)


def test_arguments_that_do_not_fit_are_refused(draw_problem) -> None:
    p = draw_problem()
    square = torch.ones(2, 3, 3).double()
    row = torch.ones(2, 3, 1).double()
    cases = [
        ({"backend": "fast"}, ConfigError, "backend is 'fast'"),
        ({"q": p.q[0]}, ShapeError, r"q has shape \(11, 2, 3\)"),
        ({"k": p.k[:, :3]}, ShapeError, r"k has shape \(2, 3, 2, 3\); with q"),
        ({"mu": p.q}, ShapeError, "mu has shape"),
        ({"mask": torch.ones(2, 11)}, ShapeError, "mask has dtype torch.float32"),
        ({"initial": {"k": p.initial["k"]}}, ShapeError, "no 'mem'"),
        ({"initial": {**p.initial, "kk": (square,)}}, ShapeError, "initial has 'kk'; memories are k, v, q"),
        ({"initial": {**p.initial, "v": (row,)}}, ShapeError, r"initial 'v' has shapes \[\(2, 3, 1\)\]"),
        ({"targets": "value"}, ShapeError, r"initial 'eta' .* targets='value' they must be \[\(2, 3, 3\)\]"),
        ({"g": None}, ShapeError, "eta is a memory; it needs g"),
        ({"gates": {"eta": p.gates["eta"]}}, ShapeError, r"alpha is a memory; it needs g.*gates\['alpha'\]"),
        ({"gates": {**p.gates, "mem": p.gates["eta"]}}, ShapeError, "gates has 'mem'"),
        ({"eta": p.q[..., 0]}, ShapeError, "eta is given and a memory as well"),
        (
            {"gates": {**p.gates, "eta": Gate(p.gates["eta"].bias, square[0])}},
            ShapeError,
            r"'eta' has a bias of shape \(2,\) and is read by \(3, 3\); .* \(2,\) and \(2, 1\) or None",
        ),
    ]
    for changes, error, message in cases:
        backend = changes.pop("backend", "chunked")
        with pytest.raises(error, match=message):
            p.run(backend, **changes)
    given = draw_problem(memories=("mem",))
    with pytest.raises(ShapeError, match="alpha is None and no memory"):
        given.run(alpha=None)


def test_states_that_do_not_fit_are_refused(draw_problem) -> None:
    p = draw_problem()
    state = p.run()[1]
    cases = [
        (draw_problem(memories=("k", "mem")).run()[1], r"memories \['k', 'mem'\]; they must be"),
        (draw_problem(momentum=True).run()[1], "disagree about momentum"),
        (draw_problem(batch=3).run()[1], r"phase has shape \(3,\), q has 2"),
        (draw_problem(width=4).run()[1], "weights of 'k' have shapes"),
        (state._replace(phase=torch.tensor([0, 4])), r"phase \[0, 4\]; it must be 0 to 3"),
    ]
    for other, message in cases:
        with pytest.raises(ShapeError, match=message):
            p.run(state=other)


@torch.no_grad()
def test_a_call_changes_neither_its_state_nor_its_initial_weights(draw_problem, flatten) -> None:
    p = draw_problem(momentum=True)
    first = p.run()
    kept = {name: x.clone() for name, x in flatten(first).items()}
    weights = {n: w.clone() for n, w in p.leaves().items()}
    p.run(state=first[1])
    for name, x in flatten(first).items():
        assert torch.equal(x, kept[name])
    for name, x in p.leaves().items():
        assert torch.equal(x, weights[name])


@torch.no_grad()
def test_half_precision_is_computed_in_float32(draw_problem) -> None:
    p = draw_problem(length=9)
    low = {name: x.bfloat16() for name, x in p.leaves().items() if " " not in name}
    y, state, strength = p.replace(**low).run()
    same = p.replace(**{name: x.float() for name, x in low.items()}).run()
    assert y.dtype == torch.bfloat16 and state.weights["k"][0].dtype == torch.float32
    assert torch.equal(y, same[0].bfloat16()) and torch.equal(strength, same[2])
