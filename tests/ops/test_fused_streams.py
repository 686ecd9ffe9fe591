"""From a stream to unit heads: the kernels against the PyTorch form in float64, and what picks them.

Run as a program, with TRITON_INTERPRET=1, this file checks the kernels on a CPU.
"""

from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional as F

from nestor.errors import ShapeError
from nestor.layers.span import Span
from nestor.ops.fused_streams import convolved_heads, memory_inputs
from nestor.ops.heads import EPSILON, silu_heads, to_unit
from nestor.ops.kernels import covered
from nestor.ops.short_convolution import next_tail, short_convolution

# p, heads, tokens, kernel, unit, tail. Widths of one and of several heads to a program, and none of them.
CASES = [
    (p, heads, tokens, kernel, unit, tail)
    for p, heads, kernel in ((16, 4, 4), (64, 2, 4), (128, 1, 3), (24, 3, 2))
    for tokens, unit, tail in ((1, True, True), (3, False, True), (17, True, False), (130, True, True))
]
# Those of which documents start inside the call as well: one segment and several, a start on the last tokens.
STARTING = [(16, 4, 1, 4, True, True), (24, 3, 3, 2, False, True), (64, 2, 17, 4, True, False)]
STARTING += [(128, 1, 130, 3, True, True), (16, 4, 130, 4, True, True)]


@contextmanager
def poisoned():
    """Memory that is not written holds NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def normal(*shape, seed=0, dtype=torch.float32, device="cpu"):
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.to(device, dtype)


def draw(p, heads, tokens, kernel, tail, dtype=torch.float32, device="cpu"):
    """x, a slice of a wider projection, weight in float32, tail."""
    d, kind = p * heads, {"dtype": dtype, "device": device}
    x = normal(2, tokens, 3 * d, **kind)[..., d : 2 * d]
    before = normal(2, kernel - 1, d, seed=2, **kind) if tail else None
    return x, normal(d, kernel, seed=1, device=device), before


def positions(tokens, device):
    """Of two sequences: one goes on for two tokens, one begins; more documents start, one at the end."""
    resets = normal(2, tokens, seed=20) > 1.0
    resets[0, :2], resets[1, 0], resets[1, -1] = False, True, True
    clock = torch.tensor([2, 7])
    return Span.build(clock, 2, tokens, "cpu", None, resets).position.to(device)


def results(function, inputs, cotangents):
    """Outputs and the gradients of all inputs."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    weighed = [g.to(y.dtype) for y, g in zip(outputs, cotangents, strict=True)]
    return [*outputs, *torch.autograd.grad(outputs, [x for x in leaves if x is not None], weighed)]


def check(device, dtype, out_dtype, p, heads, tokens, kernel, unit, tail, starts=False, silu=True):
    from nestor.ops.kernels import streams

    position = positions(tokens, device) if starts else None
    clock = position[:, -1] + 1 if starts else None
    inputs = draw(p, heads, tokens, kernel, tail, dtype, device)
    # The gradient of heads arrives with heads outside of tokens, as the memory's kernels lay them out.
    g = normal(2, heads, tokens, p, seed=3, dtype=out_dtype, device=device).transpose(1, 2)
    g_after = normal(2, kernel - 1, p * heads, seed=4, dtype=dtype, device=device)

    def exact(x, weight, before=None):
        y = short_convolution(x, weight, before, position=position)
        if silu:
            y = silu_heads(y, heads, unit=unit)
        else:
            y = to_unit(y.unflatten(-1, (heads, -1))) if unit else y.unflatten(-1, (heads, -1))
        return y, next_tail(x, kernel, before, clock=clock)

    doubles = [None if x is None else x.double() for x in inputs]
    expected = results(exact, doubles, (g, g_after))
    with poisoned():
        found = results(
            lambda *x: streams.convolved_heads(*x, position, heads, unit, EPSILON, out_dtype, silu),
            inputs,
            (g, g_after),
        )
    assert found[0].dtype == out_dtype and found[0].is_contiguous()
    assert torch.equal(found[1].double(), expected[1])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for name, a, b in zip(("y", "after", "x", "weight", "tail"), found, expected, strict=False):
        error = float((a - b).detach().abs().max() / b.detach().abs().max())
        assert error < tolerance, f"{name} of {(p, heads, tokens, kernel, unit, tail)}: {error:.3g}"
    assert [g.dtype for g in found[2:4]] == [dtype, torch.float32]


INPUTS = [
    (p, heads, tokens, scales, coupled, tail)
    for p, heads, scales, coupled in (
        (16, 4, (0.5, 1.0, 1.0), True), (64, 3, (0.25,), False), (32, 2, (0.5, 1.0), True),
        (16, 2, (0.5, 2.0), False), (16, 1, (0.5, 1.0), True), (16, 3, (0.5, 1.0, 2.0), True),
    )
    for tokens, tail in ((1, True), (5, False), (150, True))
]  # fmt: skip


def exact_inputs(x, weight, bias, *tails, heads, scales, coupled, position=None):
    """q, k, v, gates and next tails, of PyTorch."""
    streams = x[..., : len(weight)].chunk(3, -1)
    tails = tails or (None,) * 3
    outputs = [
        silu_heads(short_convolution(stream, taps, tail, position=position), heads, unit=index < 2)
        for index, (stream, taps, tail) in enumerate(zip(streams, weight.chunk(3), tails, strict=True))
    ]
    gates = (
        torch.sigmoid(x[..., len(weight) :][..., : len(bias)] + bias)
        .unflatten(-1, (len(scales), heads))
        .movedim(-2, 0)
    )
    first = gates[0] * (1 - gates[1]) if coupled else gates[0]
    gates = torch.stack([scale * y for scale, y in zip(scales, (first, *gates[1:]), strict=True)])
    clock = None if position is None else position[:, -1] + 1
    after = [
        next_tail(stream, weight.shape[1], tail, clock=clock)
        for stream, tail in zip(streams, tails, strict=True)
    ]
    return *outputs, gates, *after


def draw_inputs(p, heads, tokens, scales, tail, dtype, device):
    """x, weight, bias, tails, and a cotangent of each output."""
    d, kind = p * heads, {"dtype": dtype, "device": device}
    # Wider than it has to be: what is behind the gates is not read, and has no gradient.
    x = normal(2, tokens, 3 * d + len(scales) * heads + heads % 2, **kind)
    weight, bias = normal(3 * d, 4, seed=1, device=device), normal(len(scales) * heads, seed=2, device=device)
    tails = [normal(2, 3, d, seed=3 + i, **kind) for i in range(3)] if tail else [None] * 3
    # Two of the three lie inside of tokens.
    g = [normal(2, tokens, heads, p, seed=6 + i, **kind) for i in range(2)]
    g += [normal(2, heads, tokens, p, seed=8, **kind).transpose(1, 2)]
    g += [normal(len(scales), 2, tokens, heads, seed=9, device=device)]
    return [x, weight, bias, *tails], g + [normal(2, 3, d, seed=10 + i, **kind) for i in range(3)]


def check_inputs(device, dtype, p, heads, tokens, scales, coupled, tail, starts=False):
    from nestor.ops.kernels import streams

    position = positions(tokens, device) if starts else None
    inputs, cotangents = draw_inputs(p, heads, tokens, scales, tail, dtype, device)
    doubles = [x.double() for x in inputs if x is not None]
    expected = results(
        lambda *x: exact_inputs(*x, heads=heads, scales=scales, coupled=coupled, position=position),
        doubles,
        cotangents,
    )
    with poisoned():
        found = results(
            lambda *x: streams.memory_inputs(*x, position, heads, EPSILON, list(scales), coupled),
            inputs,
            cotangents,
        )
    assert len(found) == len(expected) == 7 + 3 + 3 * tail
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        error = float((a - b).detach().abs().max() / b.detach().abs().max())
        assert error < tolerance, (
            f"output {index} of {(p, heads, tokens, scales, coupled, tail)}: {error:.3g}"
        )


def check_inputs_compilation(device):
    from nestor.ops.kernels import streams

    inputs, cotangents = draw_inputs(16, 4, 5, (0.5, 1.0), True, torch.float32, device)
    rest = (positions(5, device), 4, EPSILON, [0.5, 1.0], True)

    def run(*x):
        q, k, v, gates, *after = streams.memory_inputs(*x, *rest)
        return q * 2, k, v, gates, *after

    found = results(torch.compile(run, fullgraph=True, backend="aot_eager"), inputs, cotangents)
    for a, b in zip(found, results(run, inputs, cotangents), strict=True):
        torch.testing.assert_close(a, b)
    leaves = [x.detach().requires_grad_() for x in inputs]
    torch.library.opcheck(streams.memory_inputs.overload, (*leaves, *rest))


def check_each_output_alone(device):
    """A loss of one output alone has the gradients that it has beside a zero for the other."""
    from nestor.ops.kernels import streams

    inputs = draw(16, 2, 2, 4, True, device=device)
    g, g_after = normal(2, 2, 2, 16, seed=3, device=device), normal(2, 3, 32, seed=4, device=device)
    for only, cotangents in ((0, (g, 0 * g_after)), (1, (0 * g, g_after))):

        def run(*x):
            return streams.convolved_heads(*x, None, 2, True, EPSILON, torch.float32)

        both = results(run, inputs, cotangents)[2:]
        alone = results(lambda *x: (run(*x)[only],), inputs, (cotangents[only],))[1:]
        for a, b in zip(alone, both, strict=True):
            torch.testing.assert_close(a, b)


def check_second_derivatives(device):
    """Are refused: silently they would be zero."""
    from nestor.ops.kernels import streams

    x, weight, before = (x.requires_grad_() for x in draw(16, 2, 5, 4, True, device=device))
    y, _ = streams.convolved_heads(x, weight, before, None, 2, True, EPSILON, torch.float32)
    with pytest.raises(RuntimeError, match="convolved_heads has no second derivative"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


def check_compilation(device):
    from nestor.ops.kernels import streams

    def run(x, weight, before):
        y, after = streams.convolved_heads(x * 2, weight, before, None, 4, True, EPSILON, torch.float32)
        return y * 3, after

    inputs, cotangents = draw(16, 4, 5, 4, True, device=device), (torch.ones((), device=device),) * 2
    whole = [g.expand(s) for g, s in zip(cotangents, ((2, 5, 4, 16), (2, 3, 64)), strict=True)]
    found = results(torch.compile(run, fullgraph=True, backend="aot_eager"), inputs, whole)
    for a, b in zip(found, results(run, inputs, whole), strict=True):
        torch.testing.assert_close(a, b)
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    torch.library.opcheck(streams.convolved_heads.overload, (*leaves, None, 4, True, EPSILON, torch.float32))


# --- on a CPU -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("tail", [False, True])
def test_on_a_cpu_it_is_the_pytorch_form(tail, start):
    x, weight, before = draw(5, 3, 7, 4, tail, torch.float64)
    weight = weight.double()
    first = normal(3, 15, seed=5, dtype=torch.float64) if start else None
    y, after = convolved_heads(x, weight, before, heads=3, unit=True, start_tail=first)
    none = x.new_zeros(3, 15) if first is None else first
    extended = torch.cat([none.expand(2, 3, 15) if before is None else before, x], 1)
    z = sum(extended[:, i : i + 7] * weight[:, i] for i in range(4))
    s = F.silu(z).unflatten(-1, (3, 5))
    torch.testing.assert_close(y, s / (s.square().sum(-1, keepdim=True) + EPSILON).sqrt())
    assert torch.equal(after, extended[:, -3:])


def test_half_precision_gives_float32_unless_asked_otherwise():
    x, weight, _ = draw(5, 3, 7, 4, False, torch.bfloat16)
    assert convolved_heads(x, weight, heads=3, unit=True)[0].dtype == torch.float32
    assert convolved_heads(x, weight, heads=3, unit=True, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_kernels_do_not_cover_a_cpu_and_wrong_shapes_are_named():
    x, weight, tail = draw(4, 2, 3, 4, True)
    assert not covered(x, weight, None)
    with pytest.raises(ShapeError, match="weight has 7 channels"):
        convolved_heads(x, weight[:7], heads=2, unit=True)
    with pytest.raises(ShapeError, match="tail has shape"):
        convolved_heads(x, weight, tail[:, :2], heads=2, unit=True)


def test_a_state_of_other_sequences_or_another_layer_is_refused():
    pytest.importorskip("triton")
    x, weight, bias = normal(2, 5, 3 * 8 + 2), normal(3 * 8, 4), normal(2)
    for shape in ((1, 3, 8), (2, 1, 8), (2, 3, 4)):
        with pytest.raises(ShapeError, match=r"needs \[2, 3, 8\]"):
            memory_inputs(x, weight, bias, [normal(*shape)] * 3, 2, [1.0], coupled=False)
    with pytest.raises(ShapeError, match="25 columns"):
        memory_inputs(x[..., 1:], weight, bias, None, 2, [1.0], coupled=False)


@pytest.mark.slow
def test_the_kernels_compute_the_pytorch_form_under_the_interpreter(run_interpreted):
    run_interpreted(__file__)


@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("tail", [False, True])
def test_the_kernels_compile_for_a_gpu(tail, starts):
    """Types that Triton's compiler asks for, and its interpreter does not."""
    pytest.importorskip("triton")
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nestor.ops.kernels.streams.backward import streams_backward_kernel
    from nestor.ops.kernels.streams.forward import streams_kernel

    shape = {"K": 4, "WIDTH": 64, "P": 64, "HB": 1, "UNITS": 2, "SILU": True, "STREAMS": 3, "HAS_TAIL": tail}
    for kernel, own in (
        (streams_kernel, {"BT": 32}),
        (streams_backward_kernel, {"S": 8, "L": 16}),
    ):
        constants = {**shape, **own, "STARTS": starts}
        kinds = {"eps": "fp32", "WEIGHT": "*fp32", "PARTS": "*fp32", "POSITION": "*i64"}
        kinds |= dict.fromkeys(constants, "constexpr")
        signature = {
            name: kinds.get(name, "*bf16" if name[0].isupper() else "i32") for name in kernel.arg_names
        }
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        made = compile(ASTSource(kernel, signature, places, {}), target=GPUTarget("cuda", 90, 32))
        assert "st.global" in made.asm["ptx"]


# --- on a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
)
def test_the_kernels_compute_the_pytorch_form(dtype, out_dtype, case):
    pytest.importorskip("triton")
    check("cuda", dtype, out_dtype, *case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", INPUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernels_compute_the_inputs_of_a_memory(dtype, case):
    pytest.importorskip("triton")
    check_inputs("cuda", dtype, *case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_token_sees_an_earlier_document(dtype):
    pytest.importorskip("triton")
    for case in STARTING:
        check("cuda", dtype, dtype, *case, starts=True)
        check("cuda", dtype, dtype, *case, starts=True, silu=False)
    for case in INPUTS:
        check_inputs("cuda", dtype, *case, starts=True)
    check("cuda", dtype, dtype, 64, 4, 3001, 4, True, True, starts=True)


@pytest.mark.gpu
def test_many_tokens_and_sequences():
    pytest.importorskip("triton")
    check("cuda", torch.float32, torch.float32, 64, 12, 3001, 4, True, True)


@pytest.mark.gpu
def test_a_gpu_takes_the_kernels_and_torch_compile_them():
    pytest.importorskip("triton")
    check_each_output_alone("cuda")
    check_compilation("cuda")
    check_second_derivatives("cuda")
    check_inputs_compilation("cuda")
    x, weight, tail = draw(64, 2, 9, 4, True, torch.bfloat16, "cuda")
    for start in (None, tail[0]):
        y, after = convolved_heads(
            x, weight.requires_grad_(), None if start is not None else tail, heads=2, unit=True,
            start_tail=start, dtype=torch.bfloat16,
        )  # fmt: skip
        assert "convolved_heads" in type(y.grad_fn).__name__ and y.is_contiguous()
        assert torch.equal(after, x[:, -3:])


if __name__ == "__main__":
    for case in CASES:
        check("cpu", torch.float32, torch.float32, *case)
    for case in STARTING:
        check("cpu", torch.float32, torch.float32, *case, starts=True, silu=False)
    check_each_output_alone("cpu")
    check_compilation("cpu")
    check_second_derivatives("cpu")
    for case in INPUTS:
        check_inputs("cpu", torch.float32, *case)
    for case in INPUTS[2::6]:
        check_inputs("cpu", torch.float32, *case, starts=True)
    check_inputs_compilation("cpu")
