"""Layers on a GPU, fused and in two queues, against themselves on a CPU in float64 and in one queue."""

import copy

import pytest
import torch

from nestor.layers.attention import Attention
from nestor.layers.memory_as_gate import MemoryAsGate
from nestor.layers.neural_memory import NeuralMemory
from nestor.layers.tnt import FIXED, TNT

pytestmark = pytest.mark.gpu
DIM, HEADS = 128, 2


def memory(**choices):
    return NeuralMemory(DIM, HEADS, chunk_size=64, **choices)


LAYERS = {
    "neural_memory": memory,
    "no forgetting": lambda: memory(forget=False, momentum=False),
    "tnt": lambda: TNT(memory(**FIXED), (32, 64), 128),
    "memory_as_gate": lambda: MemoryAsGate(Attention(DIM, HEADS, window=64), memory(output_gate=False), 4),
}


def build(kind):
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    for name, parameter in layer.named_parameters():
        if "initial" not in name:
            torch.nn.init.normal_(parameter, mean=parameter.detach().mean(), std=0.1)
    return layer


def results(layer, x, upstream, autocast=False):
    """Of a call, then of a step on one more token: outputs, state, and gradients, by name."""
    x = x.detach().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        y, state = layer(x)
        with torch.no_grad():
            step, after = layer(x[:, -1:], state)
    y.backward(upstream.to(y.dtype))
    found = {"y": y, "step": step, "x": x.grad}
    found |= {f"state {name}": tensor for name, tensor in after.items()}
    found |= {name: parameter.grad for name, parameter in layer.named_parameters()}
    layer.zero_grad(set_to_none=True)
    return {name: tensor.detach() for name, tensor in found.items() if tensor is not None}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 2e-3), ("bfloat16", 6e-2)])
def test_it_is_the_layer_in_float64(kind, dtype, allowed) -> None:
    x, upstream = torch.randn(2, 2, 301, DIM, dtype=torch.float64).unbind(0)
    layer = build(kind)
    expected = results(copy.deepcopy(layer).double(), x, upstream)
    autocast = dtype == "bfloat16"
    found = results(layer.cuda(), x.float().cuda(), upstream.float().cuda(), autocast)
    assert found.keys() == expected.keys()
    largest = max(float(tensor.double().norm()) for name, tensor in expected.items() if "." in name)
    for name, tensor in expected.items():
        if not tensor.is_floating_point():
            assert torch.equal(found[name].cpu(), tensor), name
            continue
        error = float((found[name].double().cpu() - tensor).norm())
        # Of sums that nearly cancel, the error is that of what they are made of.
        floor = 3e-3 * largest if autocast else 1e-5 * largest
        assert error < allowed * (float(tensor.norm()) + floor), f"{name}: {error / float(tensor.norm()):.2g}"


class OneQueue:
    def __init__(self, *inputs, worth=True) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error) -> None:
        pass

    def join(self, *outputs) -> None:
        pass


def test_two_queues_give_what_one_gives_every_time(monkeypatch) -> None:
    torch.manual_seed(0)
    layer = TNT(memory(**FIXED), (64,), 512).cuda()
    x = torch.randn(1, 8192, DIM, device="cuda", dtype=torch.bfloat16)
    upstream = torch.randn_like(x)
    found = [results(layer, x, upstream, autocast=True) for _ in range(4)]
    monkeypatch.setattr("nestor.layers.tnt.Beside", OneQueue)
    expected = results(layer, x, upstream, autocast=True)
    for name, tensor in expected.items():
        assert all(torch.equal(one[name], tensor) for one in found), name


def test_a_cuda_graph_takes_both_queues() -> None:
    torch.manual_seed(0)
    layer = TNT(memory(**FIXED), (64,), 512).cuda()
    x = torch.randn(1, 2048, DIM, device="cuda", requires_grad=True)

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            y, _ = layer(x)
        (gradient,) = torch.autograd.grad(y.float().square().sum(), x)
        return y, gradient

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = [tensor.clone() for tensor in step()]
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for tensor in found:
        tensor.detach().zero_()
    graph.replay()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
