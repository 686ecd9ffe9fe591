"""A memory beside a trained layer: nothing at first, then all of it learns, and its state is float32."""

import pytest
import torch

from nestor.layers.memory_branch import MemoryBranch


@pytest.fixture
def branch():
    torch.manual_seed(0)
    return MemoryBranch(16, 2, chunk_size=4, expansion=2)


def test_it_adds_nothing_until_its_last_projection_has_moved(branch) -> None:
    x = torch.randn(2, 9, 16)
    assert not branch(x)[0].any()
    torch.nn.init.normal_(branch.memory.o_proj.weight)
    assert branch(x)[0].abs().min() > 0


def test_the_first_gradient_is_that_of_the_last_projection_and_later_ones_of_everything(branch) -> None:
    x, target = torch.randn(1, 12, 16), torch.randn(1, 12, 16)
    optimizer = torch.optim.SGD(branch.parameters(), lr=0.1)
    moved = []
    for _ in range(2):
        optimizer.zero_grad()
        ((branch(x)[0] - target) ** 2).sum().backward()
        moved.append({name for name, p in branch.named_parameters() if p.grad is not None and p.grad.any()})
        optimizer.step()
    assert moved[0] == {"memory.o_proj.weight"}
    assert moved[1] == {name for name, _ in branch.named_parameters()}


def test_half_precision_goes_in_and_out_and_the_memory_stays_float32(branch) -> None:
    torch.nn.init.normal_(branch.memory.o_proj.weight, std=0.2)
    x = torch.randn(1, 12, 16)
    exact, _ = branch(x)
    y, state = branch(x.bfloat16())
    assert y.dtype == torch.bfloat16 and (y - exact).abs().max() < 0.05 * exact.abs().max()
    kept = {name: tensor.dtype for name, tensor in state.items() if name.startswith(("weights", "momentum"))}
    assert kept and set(kept.values()) == {torch.float32}
    assert {p.dtype for p in branch.parameters()} == {torch.float32}


def test_a_fresh_state_is_what_no_state_means(branch) -> None:
    torch.nn.init.normal_(branch.memory.o_proj.weight)
    x = torch.randn(2, 7, 16)
    without, after = branch(x)
    with_one, same = branch(x, branch.fresh_state(2, x))
    torch.testing.assert_close(with_one, without)
    assert after.keys() == same.keys()


@pytest.mark.gpu
def test_on_a_gpu_half_precision_is_near_float32_and_gradients_cross_windows() -> None:
    torch.manual_seed(0)
    branch = MemoryBranch(128, 2)
    torch.nn.init.normal_(branch.memory.o_proj.weight, std=0.05)
    x = torch.randn(2, 256, 128)
    exact, _ = branch(x)
    branch.cuda()
    low = x.cuda().bfloat16()
    fresh = branch.fresh_state(2, low)
    first, state = branch(low[:, :128], fresh)
    second, _ = branch(low[:, 128:], state)
    y = torch.cat((first, second), 1)
    assert y.dtype == torch.bfloat16 and (y.float().cpu() - exact).abs().max() < 0.1 * exact.abs().max()
    assert {name: x.dtype for name, x in state.items()} == {name: x.dtype for name, x in fresh.items()}
    second.float().square().sum().backward()
    grads = {name: p.grad for name, p in branch.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() and grad.any() for grad in grads.values())
    # Without the first window's writes the second has another gradient of what writes.
    written = grads["memory.v_proj.weight"].clone()
    branch.zero_grad()
    branch(low[:, 128:], {name: x.detach() for name, x in state.items()})[0].float().square().sum().backward()
    assert not torch.allclose(branch.memory.v_proj.weight.grad, written, rtol=0.01)
