"""Outer gradients: finite differences through several chunks, recomputation, repeated backward passes."""

import pytest
import torch

from nestor.ops.neural_memory import MemoryState


def checked(p, fast: bool = False) -> None:
    """gradcheck of output and final state in every input; `fast` checks a random projection of it."""
    names, tensors = zip(*p.leaves().items(), strict=True)

    def outputs(*values):
        given = dict(zip(names, values, strict=True))
        changes = {
            n: given[n] for n in ("q", "k", "v", "theta", "eta", "alpha", "gamma", "beta") if n in given
        }
        changes["initial"] = tuple(given[f"initial {i}"] for i in range(len(p.initial)))
        for name in ("state", "start"):
            old = getattr(p, name)
            if old is not None:
                parts = (
                    tuple(given[f"{name} {part} {i}"] for i in range(len(getattr(old, part))))
                    for part in ("weights", "momentum", "anchor")
                )
                changes[name] = MemoryState(*parts, old.phase)
        y, after = p.run(**changes)
        return (y, *after.weights, *after.momentum, *after.anchor)

    inputs = tuple(t.detach().clone().requires_grad_() for t in tensors)
    assert torch.autograd.gradcheck(outputs, inputs, eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=fast)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("norm", ["none", "residual", "residual_layernorm"])
def test_gradients_through_three_chunks_pass_finite_differences(draw_problem, depth, norm) -> None:
    """Invariant 23: q, k, v, gates, M_0, S_0, W_0, the anchor, gamma and beta; a chunk is open on entry."""
    p = draw_problem(
        batch=1, heads=1, length=7, width=2, hidden=3, chunk_size=2, depth=depth, norm=norm, with_state=True
    )
    checked(p.replace(state=p.state._replace(phase=torch.tensor([1]))), fast=depth > 2)


@pytest.mark.parametrize("grad_at", ["pre_decay", "post_decay"])
@pytest.mark.parametrize("decay", ["initial", "zero"])
@pytest.mark.parametrize("read_mode", ["inclusive", "exclusive", "chunk_start"])
@pytest.mark.parametrize("inner_loss", ["l2", "dot_product"])
def test_gradients_of_every_choice_pass_finite_differences(
    draw_problem, grad_at, decay, read_mode, inner_loss
) -> None:
    """Invariant 23 over the switches of the spec."""
    checked(
        draw_problem(
            batch=1, heads=1, length=5, width=2, hidden=3, chunk_size=2, activation="silu",
            grad_at=grad_at, decay=decay, read_mode=read_mode, inner_loss=inner_loss,
        ),
        fast=True,
    )  # fmt: skip


def test_gradients_with_masks_documents_and_a_start_state_pass_finite_differences(draw_problem) -> None:
    """Invariant 23 in ragged batches."""
    p = draw_problem(
        batch=2, heads=1, length=7, width=2, hidden=2, chunk_size=2, with_state=True, with_start=True
    )
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 1], [1, 0, 1, 1, 1, 0, 0]]).bool()
    resets = torch.tensor([[0, 0, 0, 0, 1, 0, 0], [1, 0, 0, 1, 0, 0, 0]]).bool()
    checked(p.replace(mask=mask, resets=resets))


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("masked", [0.0, 0.3])
def test_recomputation_gives_bitwise_the_same_gradients(draw_problem, gradients, depth, masked) -> None:
    """Invariant 23: recompute stores chunk-start states only."""
    p = draw_problem(
        depth=depth, length=13, masked=masked, reset=masked, with_state=True, dtype=torch.float32
    )
    stored, recomputed = (gradients(p.replace(recompute=r), lambda p: p.run()) for r in (False, True))
    for name in stored:
        assert torch.equal(stored[name], recomputed[name]), name


@pytest.mark.parametrize("norm", ["none", "residual", "residual_layernorm"])
def test_a_second_backward_through_one_graph_gives_the_same_gradients(draw_problem, norm) -> None:
    """The backward consumes its tapes; with retain_graph it must not have changed what it saved."""
    p = draw_problem(length=9, norm=norm, with_state=True)
    y, after = p.run()
    total = y.square().sum() + sum(w.square().sum() for w in after.weights)
    leaves = list(p.leaves().values())
    first = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(total, leaves, allow_unused=True)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_cross_calls_through_the_state(draw_problem) -> None:
    """Invariant 23: a loss on the second call reaches the keys of the first; a detached state stops it."""
    p = draw_problem(length=8)
    _, after = p.tokens(slice(0, 4)).run()
    y, _ = p.tokens(slice(4, 8)).run(state=after)
    (grad,) = torch.autograd.grad(y.sum(), p.k)
    assert (grad[:, :4].abs().amax(-1) > 0).all()
    detached = MemoryState(*(tuple(w.detach() for w in part) for part in after[:3]), after.phase)
    y, _ = p.tokens(slice(4, 8)).run(state=detached)
    (grad,) = torch.autograd.grad(y.sum(), p.k)
    assert not grad[:, :4].any()


def test_gradients_sum_over_the_batch_for_slow_parameters(draw_problem, gradients, assert_close) -> None:
    """Section 2.4: M_0, gamma and beta are shared by the sequences and by every reset."""
    p = draw_problem(batch=2, length=9)

    def loss(p):
        y, after = p.run()
        return y.square().sum() + after.weights[0].square().sum()

    slow = [*p.initial, p.gamma, p.beta]
    together = torch.autograd.grad(loss(p), slow)
    alone = [torch.autograd.grad(loss(p.row(b)), slow) for b in range(2)]
    for whole, a, b in zip(together, *alone, strict=True):
        assert_close(whole, a + b)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "theta", "eta", "alpha", "gamma", "beta", "initial"])
def test_one_input_alone_gets_the_gradient_it_gets_among_all(
    draw_problem, gradients, assert_close, wanted
) -> None:
    """Fine-tuning a single projection: other inputs do not require gradients."""
    p = draw_problem(length=9)
    everything = gradients(p, lambda p: p.run())
    frozen = {n: getattr(p, n).detach() for n in ("q", "k", "v", "theta", "eta", "alpha", "gamma", "beta")}
    frozen["initial"] = tuple(w.detach() for w in p.initial)
    if wanted == "initial":
        frozen["initial"] = tuple(w.requires_grad_() for w in frozen["initial"])
    else:
        frozen[wanted].requires_grad_()
    q = p.replace(**frozen)
    y, after = q.run()
    generator = torch.Generator().manual_seed(1)
    outputs = [y, *after.weights, *after.momentum, *after.anchor]
    total = sum((x * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum() for x in outputs)
    names = ["initial 0", "initial 1"] if wanted == "initial" else [wanted]
    leaves = q.leaves()
    for name, grad in zip(names, torch.autograd.grad(total, [leaves[n] for n in names]), strict=True):
        assert_close(grad, everything[name])


def test_without_gradients_nothing_is_recorded(draw_problem) -> None:
    p = draw_problem(length=9)
    with torch.no_grad():
        y, after = p.run()
    assert not y.requires_grad and not any(w.requires_grad for w in after.weights)
