"""The short convolution as a layer: what it computes, and the tail that makes a stream of it."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from nestor.errors import ConfigError
from nestor.layers.convolution import ShortConvolution
from nestor.layers.span import Span
from nestor.ops.short_convolution import short_convolution

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make(kernel):
    layer = ShortConvolution(3, kernel).double()
    torch.nn.init.normal_(layer.weight)
    return layer


def by_hand(weight, documents, start=None):
    """`y_t = sum_i w_i x_{t-i}` over the documents `[n, D]` of a row, each preceded by `start` or zeros."""
    kernel = weight.shape[1]
    rows = []
    for document in documents:
        before = document.new_zeros(kernel - 1, document.shape[1]) if start is None else start
        extended = torch.cat([before, document])
        for t in range(len(document)):
            rows.append((extended[t : t + kernel].T * weight).sum(1))
    return torch.stack(rows)


def test_it_is_a_causal_depthwise_convolution():
    layer, x = make(4), normal(2, 7, 3)
    y, tail = layer(x, None, Span.build(None, 2, 7, "cpu"))
    padded = F.pad(x.transpose(1, 2), (3, 0))
    expected = F.conv1d(padded, layer.weight[:, None], groups=3).transpose(1, 2)
    torch.testing.assert_close(y, expected, **EXACT)
    assert torch.equal(tail, x[:, -3:])


@given(
    kernel=st.integers(2, 5),
    length=st.integers(1, 9),
    cuts=st.sets(st.integers(1, 8), max_size=3),
    resets=st.sets(st.tuples(st.integers(0, 1), st.integers(0, 8)), max_size=3),
    lengths=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    with_start=st.booleans(),
)
@settings(max_examples=60)
def test_pieces_of_ragged_packed_rows_equal_a_loop_over_documents(
    kernel, length, cuts, resets, lengths, with_start
):
    layer, x = make(kernel), normal(2, length, 3, seed=length)
    start = normal(kernel - 1, 3, seed=1) if with_start else None
    valid = torch.tensor([min(n, length) for n in lengths])
    marks = torch.zeros(2, length, dtype=torch.bool)
    for row, place in resets:
        if place < length:
            marks[row, place] = True
    tail = clock = None
    outputs = []
    edges = [0, *sorted(c for c in cuts if c < length), length]
    for begin, stop in pairwise(edges):
        here = (valid - begin).clamp(0, stop - begin)
        span = Span.build(clock, 2, stop - begin, "cpu", here, marks[:, begin:stop])
        y, tail = layer(x[:, begin:stop], tail, span, start)
        clock = span.clock_after()
        outputs.append(y)
    y = torch.cat(outputs, 1)
    for row in range(2):
        count = int(valid[row])
        places = sorted({0, *(p for p in range(count) if marks[row, p])})
        documents = [x[row, a:b] for a, b in zip(places, [*places[1:], count], strict=True)]
        if count:
            torch.testing.assert_close(y[row, :count], by_hand(layer.weight, documents, start), **EXACT)
        last = documents[-1]
        before = torch.zeros(kernel - 1, 3).double() if start is None else start
        torch.testing.assert_close(tail[row], torch.cat([before, last])[-(kernel - 1) :], **EXACT)


@pytest.mark.parametrize("length", [1, 2, 6])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_equal_finite_differences(packed, length):
    layer = make(4)
    x, tail, start = normal(2, length, 3), normal(2, 3, 3, seed=1), normal(3, 3, seed=2)
    leaves = [t.requires_grad_() for t in (x, tail, start, layer.weight.data.clone())]
    resets = torch.tensor([[False] * 6, [False, True] + [False] * 4])[:, :length] if packed else None
    span = Span.build(torch.tensor([2, 5]), 2, length, "cpu", None, resets)

    def run(x, tail, start, weight):
        return torch.func.functional_call(layer, {"weight": weight}, (x, tail, span, start))

    assert torch.autograd.gradcheck(run, leaves)
    # And those of the gradients, which an outer gradient through updates asks for.
    assert torch.autograd.gradgradcheck(run, leaves)

    def gradients(differentiable):
        out, _ = run(*leaves)
        weights = torch.linspace(-1.0, 1.0, out.numel(), dtype=out.dtype).reshape(out.shape)
        return torch.autograd.grad(
            (out * weights).sum(), leaves, create_graph=differentiable, materialize_grads=True
        )

    for again, once in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(again.detach(), once)


def test_torch_compile_takes_it_whole_with_its_backward():
    x, tail, weight = normal(2, 6, 3), normal(2, 3, 3, seed=1), normal(3, 4, seed=2)
    compiled = torch.compile(short_convolution, fullgraph=True, backend="aot_eager")
    results = []
    for function in (short_convolution, compiled):
        leaves = [t.clone().requires_grad_() for t in (x, weight, tail)]
        y = function(*leaves)
        y.square().sum().backward()
        results.append([y, *(t.grad for t in leaves)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, **EXACT)


def test_it_starts_near_the_identity():
    layer = ShortConvolution(4096, 4)
    mean = layer.weight.mean(0)
    assert mean.tolist() == pytest.approx([0, 0, 0, 1], abs=0.03)
    assert layer.weight.std(0).tolist() == pytest.approx([0.25] * 4, rel=0.1)
    layer.initialize(0.02)
    assert layer.weight[:, -1].mean().item() == pytest.approx(1, abs=0.03)


def test_a_kernel_that_sees_one_token_is_refused():
    with pytest.raises(ConfigError, match="convolution kernel is 1; it must be at least 2"):
        ShortConvolution(4, 1)
