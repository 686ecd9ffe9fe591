"""What must not leak through a skipped token or a reset, and states that do not fit the call."""

import re

import pytest
import torch

from nestor.errors import ShapeError
from nestor.ops.neural_memory import BACKENDS, MemoryState

CPU_BACKENDS = [b for b in BACKENDS if b != "kernels"]


@pytest.mark.parametrize("name", ["q", "k", "v", "theta", "eta", "alpha"])
def test_non_finite_values_at_masked_tokens_reach_nothing(draw_problem, name) -> None:
    """Invariant 8: a masked token is as if it were not there, whatever it holds."""
    p = draw_problem(length=9)
    late = torch.arange(9).expand(2, 9) >= torch.tensor([[0], [4]])
    for mask in (late, torch.arange(9).expand(2, 9) != 4):
        values = getattr(p, name).detach().clone()
        values[~mask] = float("nan")
        values.requires_grad_()
        y, _ = p.run(mask=mask, **{name: values})
        assert torch.equal(y, p.run(mask=mask)[0])
        (grad,) = torch.autograd.grad(y.square().sum(), values)
        assert torch.isfinite(grad).all() and not grad[~mask].any()


def test_a_non_finite_document_does_not_reach_the_next(draw_problem) -> None:
    """Invariant 16: the reset is structural."""
    p = draw_problem(length=9)
    resets = torch.zeros(2, 9, dtype=torch.bool)
    resets[:, 4] = True
    k = p.k.detach().clone()
    k[:, :4] = float("nan")
    y, after = p.run(k=k, resets=resets)
    assert torch.isfinite(y[:, 4:]).all() and all(torch.isfinite(w).all() for w in after.weights)


def test_a_second_derivative_is_refused(draw_problem) -> None:
    p = draw_problem()
    (g,) = torch.autograd.grad(p.run()[0].square().sum(), p.k, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.square().sum().backward()


def refused(p) -> dict[str, tuple[dict, str]]:
    """Calls that do not fit together, and what the message must say (the value seen, the value wanted)."""

    def first(tensors) -> tuple:
        return tuple(w[:1] for w in tensors)

    state = p.run()[1]
    one = MemoryState(first(state.weights), first(state.momentum), first(state.anchor), torch.zeros(1).long())
    narrow = tuple(torch.zeros(2, 2, a, b) for a, b in ((3, 7), (7, 3)))
    wanted = "they must be [(2, 2, 3, 5), (2, 2, 5, 3)]"
    return {
        "integer q": ({"q": p.q.long()}, "q has dtype torch.int64; it must be a floating-point dtype"),
        "no theta": ({"theta": None}, "theta is None; it must have shape (2, 9, 2)"),
        "phase": (
            {"state": state._replace(phase=torch.tensor([3, 7]))},
            "the state has phase [3, 7]; it must be 0 to 3",
        ),
        "negative phase": ({"state": state._replace(phase=torch.tensor([0, -1]))}, "phase [0, -1]"),
        "state depth": (
            {"state": MemoryState(state.weights[:1], state.momentum[:1], state.anchor[:1], state.phase)},
            f"the state's weights have shapes [(2, 2, 3, 5)]; {wanted}",
        ),
        "state width": (
            {"state": state._replace(weights=narrow)},
            f"the state's weights have shapes [(2, 2, 3, 7), (2, 2, 7, 3)]; {wanted}",
        ),
        "state's momentum": (
            {"state": state._replace(momentum=narrow)},
            "the state's momentum have shapes [(2, 2, 3, 7)",
        ),
        "empty state": ({"state": MemoryState((), (), (), state.phase)}, "the state holds () (batch, heads)"),
        "start batch": ({"start": state}, "the start holds (2, 2) (batch, heads); it must be (1, 2)"),
        "start phase": (
            {"start": one._replace(phase=torch.ones(1).long())},
            "the start has phase [1]; it must be 0",
        ),
        "start depth": (
            {"start": MemoryState(one.weights[:1], one.momentum[:1], one.anchor[:1], one.phase)},
            "the start's weights have shapes [(1, 2, 3, 5)]; they must be [(1, 2, 3, 5), (1, 2, 5, 3)]",
        ),
        "start without momentum": ({"start": one._replace(momentum=())}, "the start and eta disagree"),
        "start with momentum": ({"start": one, "eta": None}, "the start and eta disagree about momentum"),
        "initial rank": (
            {"initial": (torch.zeros(2, 1, 3, 3),)},
            "initial weights have shapes [(2, 1, 3, 3)]",
        ),
        "depth 5": ({"initial": (torch.zeros(2, 3, 3),) * 5}, "initial has 5 layers; a memory has 1 to 4"),
    }


CASES = [
    "integer q", "no theta", "phase", "negative phase", "state depth", "state width", "state's momentum",
    "empty state", "start batch", "start phase", "start depth", "start without momentum",
    "start with momentum", "initial rank", "depth 5",
]  # fmt: skip


def test_every_refused_call_of_this_file_is_tested(draw_problem) -> None:
    assert set(CASES) == set(refused(draw_problem()))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_what_does_not_fit_is_refused_with_what_would(draw_problem, case, backend) -> None:
    p = draw_problem(length=9)
    change, message = refused(p)[case]
    with pytest.raises(ShapeError, match=re.escape(message)):
        p.run(backend, **change)
