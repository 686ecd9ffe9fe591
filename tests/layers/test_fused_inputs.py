"""What a GPU's fused projections make of a memory layer, against the same layer without them.

Run as a program, with TRITON_INTERPRET=1, this file compares them on a CPU.
"""

import sys
from unittest import mock

import pytest
import torch

from nestor.layers import neural_memory
from nestor.layers.neural_memory import NeuralMemory
from nestor.layers.span import Span
from nestor.layers.tnt import FIXED, TNT

DIM, HEADS = 24, 3  # rows that are padded, and a number of heads that is no power of two
LAYERS = {
    "all gates": lambda: memory(),
    "tnt": lambda: TNT(memory(**FIXED), (2, 3), 4),
    "no momentum": lambda: memory(momentum=False),
    "one gate": lambda: memory(momentum=False, forget=False),
    "kernel of 2, no output gate": lambda: memory(conv_kernel=2, output_gate=False),
}
QUICK = ("all gates", "tnt")


def memory(**choices):
    return NeuralMemory(DIM, HEADS, chunk_size=4, expansion=2, **choices)


# Where documents begin, of two sequences: inside of a call, with one, and with its last token.
STARTS = ((3, 6, 10), (1, 8))


def results(layer, x, fused, starts):
    """Outputs of three calls in a row, the state after them, and gradients."""
    state, outputs, clock = None, [], None
    resets = torch.zeros(2, 11, dtype=torch.bool)
    for row, places in zip(resets, STARTS, strict=True):
        row[list(places)] = True
    with mock.patch.object(neural_memory, "fuses", lambda *_: fused):
        for piece, begin in zip(x.split([6, 1, 4], 1), resets.split([6, 1, 4], 1), strict=True):
            span = Span.build(clock, *piece.shape[:2], x.device, resets=begin if starts else None)
            clock = span.clock_after()
            y, state = layer(piece, state, span)
            outputs.append(y)
    y = torch.cat(outputs, 1)
    tails = [tensor.square().sum() for name, tensor in state.items() if "tail" in name]
    loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() + sum(tails)
    gradients = torch.autograd.grad(loss, [x, *layer.parameters()], allow_unused=True)
    return y, state, gradients


def compare(kind, starts=False):
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.2)
    x = torch.randn(2, 11, DIM, requires_grad=True)
    (y, state, gradients), (y2, state2, gradients2) = (
        results(layer, x, fused, starts) for fused in (True, False)
    )
    torch.testing.assert_close(y, y2, rtol=1e-4, atol=1e-5)
    assert state.keys() == state2.keys()
    for name, tensor in state2.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    for one, other in zip(gradients, gradients2, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert float((one - other).norm()) < 1e-4 * float(other.norm()), kind


@pytest.mark.parametrize("which", ["quick", pytest.param("others", marks=pytest.mark.slow)])
def test_fused_projections_are_the_same_layer_under_the_interpreter(run_interpreted, which):
    run_interpreted(__file__, which)


@pytest.mark.gpu
def test_what_is_not_whole_or_usual_is_not_fused():
    layer, x = memory().cuda(), torch.randn(2, 5, DIM, device="cuda")
    whole = Span.build(None, 2, 5, "cuda")
    assert layer._fused_weights(x, whole, None, ()) is not None
    resets = torch.zeros(2, 5, dtype=torch.bool, device="cuda")
    lengths = torch.tensor([5, 3], device="cuda")
    packed = Span.build(None, 2, 5, "cuda", resets=resets)
    assert layer._fused_weights(x, packed, None, ()) is not None
    assert layer._fused_weights(x, packed, {"tail.q": x}, ()) is None
    assert layer._fused_weights(x, Span.build(None, 2, 5, "cuda", lengths=lengths), None, ()) is None
    assert layer._fused_weights(x.half(), whole, None, ()) is None
    layer.gate_proj.register_forward_hook(lambda *_: None)
    assert layer._fused_weights(x, whole, None, ()) is None


if __name__ == "__main__":
    for kind in QUICK if sys.argv[1] == "quick" else LAYERS:
        compare(kind, starts=sys.argv[1] == "quick")
