"""Projections of one input, together and one by one."""

import pytest
import torch
from torch import nn

from nestor.layers.projections import plain, project_together, stacked


def _projections(device):
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(32, width, bias=False) for width in (16, 32, 48)).to(device)


def test_what_is_not_plain_is_called() -> None:
    class Adapted(nn.Linear):
        pass

    class Quantised(torch.Tensor):
        pass

    quantised = nn.Linear(4, 4, bias=False)
    quantised.weight = nn.Parameter(torch.randn(4, 4).as_subclass(Quantised))
    hooked = nn.Linear(4, 4, bias=False)
    hooked.register_forward_hook(lambda *arguments: None)
    assert plain(nn.Linear(4, 4)) and plain(nn.Linear(4, 4, bias=False))
    patched = nn.Linear(4, 4)
    patched.forward = lambda x: x
    others = (Adapted(4, 4), nn.Identity(), quantised, hooked, patched)
    assert not any(map(plain, others))
    assert all(stacked([nn.Linear(4, 4), other]) is None for other in others)
    assert stacked([nn.Linear(4, 4), nn.Linear(4, 4).bfloat16()]) is None
    assert stacked([nn.Linear(4, 4), nn.Linear(4, 3)]).shape == (7, 4)


def test_on_a_cpu_each_is_called() -> None:
    projections = _projections("cpu")
    x = torch.randn(2, 5, 32)
    for found, projection in zip(project_together(x, projections), projections, strict=True):
        assert torch.equal(found, projection(x))


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_together_as_one_by_one(autocast) -> None:
    projections = _projections("cuda")
    x = torch.randn(2, 70, 32, device="cuda", requires_grad=True)
    leaves = [x, *projections.parameters()]
    upstream = [torch.randn(2, 70, width, device="cuda") for width in (16, 32, 48)]

    def run(project):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            found = project(x)
        grads = torch.autograd.grad(
            found, leaves, [g.to(y.dtype) for g, y in zip(upstream, found, strict=True)]
        )
        return *found, *grads

    together = run(lambda x: project_together(x, projections))
    apart = run(lambda x: [projection(x) for projection in projections])
    for one, other in zip(together, apart, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(
            one, other, rtol=2e-2 if autocast else 1e-4, atol=5e-2 if autocast else 1e-4
        )
