"""The kernels of this folder as two PyTorch operators with their gradients."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from nestor.ops.kernels.streams.backward import streams_backward_kernel
from nestor.ops.kernels.streams.forward import streams_kernel
from nestor.ops.kernels.streams.gates import gates_backward_kernel, gates_kernel
from nestor.ops.operators import operator

# Elements of a program's tile, forward and backward, of four warps each; tokens of a segment.
TILES = (2048, 512)
SEGMENT = 16
ROW = 64
# Rows of a program of gates.
GATE_ROWS = 128


def _shape(channels: int, heads: int) -> dict[str, int]:
    """Columns of a head, whole and as a power of two, and heads of a program."""
    width = channels // heads
    padded = triton.next_power_of_2(width)
    together = 1
    while padded * together < ROW and heads % (2 * together) == 0:
        together *= 2
    return {"WIDTH": width, "P": padded, "HB": together}


def _launch_streams(
    x: Tensor, weight: Tensor, tails: list[Tensor | None], position: Tensor | None, heads: int, units: int,
    eps: float, dtype: torch.dtype, silu: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """Heads ``[B, T, H, p]`` and next tail of each stream."""
    batch, tokens, _ = x.shape
    streams, kernel = len(tails), weight.shape[1]
    channels = weight.shape[0] // streams
    y = [x.new_empty((batch, tokens, heads, channels // heads), dtype=dtype) for _ in tails]
    after = [x.new_empty((batch, kernel - 1, channels)) for _ in tails]
    shape = _shape(channels, heads)
    rows = max(1, min(TILES[0] // (shape["HB"] * shape["P"]), triton.next_power_of_2(tokens)))
    streams_kernel[(triton.cdiv(tokens, rows), streams * heads // shape["HB"], batch)](
        x, weight, *_three(tails), x if position is None else position, *_three(y), *_three(after),
        x.stride(0), x.stride(1), tokens, heads, eps, K=kernel, **shape, BT=rows,
        HAS_TAIL=tails[0] is not None, STARTS=position is not None, UNITS=units, SILU=silu, STREAMS=streams,
        num_warps=4 if rows > 4 else 1,
    )  # fmt: skip
    return y, after


def _launch_streams_backward(
    x: Tensor, weight: Tensor, tails: list[Tensor | None], position: Tensor | None, g_y: list[Tensor],
    g_x: Tensor, heads: int, units: int, eps: float, silu: bool = True,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Gradients of the weight and of each tail (empty: there is none); that of the streams goes to g_x."""
    batch, tokens, _ = x.shape
    streams, kernel = len(tails), weight.shape[1]
    channels = weight.shape[0] // streams
    if len({g.stride() for g in g_y}) > 1 or g_y[0].stride(-1) != 1:
        g_y = [g.contiguous() for g in g_y]
    g_tails = _like(tails, x)
    shape = _shape(channels, heads)
    segments = max(1, TILES[1] // (shape["HB"] * shape["P"]))
    blocks = triton.cdiv(tokens, segments * SEGMENT)
    parts = x.new_empty((batch * blocks, kernel, streams * channels), dtype=torch.float32)
    streams_backward_kernel[(blocks, streams * heads // shape["HB"], batch)](
        x, weight, *_three(tails), x if position is None else position, *_three(g_y), g_x, *_three(g_tails),
        parts, x.stride(0), x.stride(1), g_x.stride(0), g_x.stride(1), *g_y[0].stride()[:3], tokens, heads,
        eps, K=kernel, **shape, S=segments, L=SEGMENT, HAS_TAIL=tails[0] is not None,
        STARTS=position is not None, UNITS=units, SILU=silu, STREAMS=streams, num_warps=4,
    )  # fmt: skip
    g_weight = parts.sum(0).t().to(weight.dtype, memory_format=torch.contiguous_format, copy=True)
    return g_weight, g_tails


def _like(tails: Sequence[Tensor | None], x: Tensor) -> list[Tensor]:
    """Room for the gradient of each tail; empty: there is none."""
    return [x.new_empty(0, dtype=torch.float32) if t is None else t.new_empty(t.shape) for t in tails]


def _add_after(g_x: Tensor, g_tail: Tensor | None, position: Tensor | None, g_after: Tensor | None) -> None:
    """Add to the gradients of a stream and its tail that of the next tail, which is the end of both."""
    if g_after is None:
        return
    tokens, before = g_x.shape[1], g_after.shape[1]
    if position is not None:
        # Rows of the last document alone.
        back = torch.arange(before - 1, -1, -1, device=g_x.device)
        g_after = torch.where((back <= position[:, -1:]).unsqueeze(-1), g_after, 0.0)
    new = min(tokens, before)
    g_x[:, tokens - new :] += g_after[:, before - new :]
    if g_tail is not None:
        g_tail[:, tokens:] += g_after[:, : before - new]


def _three(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """As many as the kernels take."""
    return [*tensors, *[tensors[0]] * (3 - len(tensors))]


@operator("convolved_heads")
def convolved_heads(
    x: Tensor, weight: Tensor, tail: Tensor | None, position: Tensor | None, heads: int, unit: bool,
    eps: float, dtype: torch.dtype, silu: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y ``[B, T, H, p]`` and the next tail ``[B, K-1, d]``; x ``[B, T, d]`` with each row in one piece;
    position int64 ``[B, T]``, contiguous."""
    (y,), (after,) = _launch_streams(x, weight, [tail], position, heads, int(unit), eps, dtype, silu)
    return y, after


@operator("convolved_heads_backward")
def convolved_heads_backward(
    x: Tensor, weight: Tensor, tail: Tensor | None, position: Tensor | None, g_y: Tensor, heads: int,
    unit: bool, eps: float, silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight and tail (empty: there is none)."""
    g_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    g_weight, (g_tail,) = _launch_streams_backward(
        x, weight, [tail], position, [g_y], g_x, heads, int(unit), eps, silu
    )
    return g_x, g_weight, g_tail


@convolved_heads.register_fake
def _(
    x: Tensor, weight: Tensor, tail: Tensor | None, position: Tensor | None, heads: int, unit: bool,
    eps: float, dtype: torch.dtype, silu: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, tokens, channels = x.shape
    after = x.new_empty((batch, weight.shape[1] - 1, channels))
    return x.new_empty((batch, tokens, heads, channels // heads), dtype=dtype), after


@convolved_heads_backward.register_fake
def _(
    x: Tensor, weight: Tensor, tail: Tensor | None, position: Tensor | None, g_y: Tensor, heads: int,
    unit: bool, eps: float, silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (g_tail,) = _like([tail], x)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), g_tail


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.heads, ctx.unit, ctx.eps, _, ctx.silu = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, g_y: Tensor | None, g_after: Tensor | None) -> tuple[Any, ...]:
    x, weight, tail, position = ctx.saved_tensors
    g_y = x.new_zeros(x.shape).unflatten(-1, (ctx.heads, -1)) if g_y is None else g_y
    g_x, g_weight, g_tail = convolved_heads_backward(
        x, weight, tail, position, g_y, ctx.heads, ctx.unit, ctx.eps, ctx.silu
    )
    g_before = None if tail is None else g_tail
    _add_after(g_x, g_before, position, g_after)
    return g_x, g_weight, g_before, *[None] * 6


convolved_heads.register_autograd(_backward, setup_context=_setup)


@operator("memory_inputs")
def memory_inputs(
    x: Tensor, weight: Tensor, bias: Tensor, tail_q: Tensor | None, tail_k: Tensor | None,
    tail_v: Tensor | None, position: Tensor | None, heads: int, eps: float, scales: Sequence[float],
    coupled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k, v ``[B, T, H, p]``, gates float32 ``[G, B, T, H]``, and the next tails ``[B, K-1, d]``.

    x ``[B, T, 3d + G H]`` or wider: the projected streams and gates, each row in one piece; weight
    ``[3d, K]`` of the convolutions; bias ``[G H]``; position int64 ``[B, T]``, contiguous; scales, G, and
    `coupled` as in `gates_kernel`.
    """
    tails = [tail_q, tail_k, tail_v]
    (q, k, v), (after_q, after_k, after_v) = _launch_streams(
        x, weight, tails, position, heads, 2, eps, x.dtype
    )
    batch, tokens, _ = x.shape
    gates = x.new_empty((len(scales), batch, tokens, heads), dtype=torch.float32)
    gates_kernel[(triton.cdiv(tokens, GATE_ROWS), batch)](
        x[..., len(weight) :], bias, gates, x.stride(0), x.stride(1), tokens, heads, **_gates(scales, heads),
        COUPLED=coupled, num_warps=4,
    )  # fmt: skip
    return q, k, v, gates, after_q, after_k, after_v


def _gates(scales: Sequence[float], heads: int) -> dict[str, Any]:
    width = triton.next_power_of_2(heads)
    return {"SCALES": tuple(scales), "GATES": len(scales), "H": width, "BT": GATE_ROWS}


@operator("memory_inputs_backward")
def memory_inputs_backward(
    x: Tensor, weight: Tensor, bias: Tensor, tail_q: Tensor | None, tail_k: Tensor | None,
    tail_v: Tensor | None, position: Tensor | None, g_q: Tensor, g_k: Tensor, g_v: Tensor, g_gates: Tensor,
    heads: int, eps: float, scales: Sequence[float], coupled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias and the tails (empty: there are none)."""
    g_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    g_weight, (g_tail_q, g_tail_k, g_tail_v) = _launch_streams_backward(
        x, weight, [tail_q, tail_k, tail_v], position, [g_q, g_k, g_v], g_x, heads, 2, eps
    )
    batch, tokens, _ = x.shape
    blocks, streams = triton.cdiv(tokens, GATE_ROWS), len(weight)
    parts = x.new_empty((batch * blocks, len(scales) * heads), dtype=torch.float32)
    gates_backward_kernel[(blocks, batch)](
        x[..., streams:], bias, g_gates.contiguous(), g_x[..., streams:], parts, x.stride(0), x.stride(1),
        g_x.stride(0), g_x.stride(1), tokens, heads, **_gates(scales, heads), COUPLED=coupled, num_warps=4,
    )  # fmt: skip
    g_x[..., streams + len(bias) :].zero_()
    return g_x, g_weight, parts.sum(0).to(bias.dtype), g_tail_q, g_tail_k, g_tail_v


@memory_inputs.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, tail_q: Tensor | None, tail_k: Tensor | None,
    tail_v: Tensor | None, position: Tensor | None, heads: int, eps: float, scales: Sequence[float],
    coupled: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    batch, tokens, _ = x.shape
    channels = len(weight) // 3
    streams = [x.new_empty((batch, tokens, heads, channels // heads)) for _ in range(3)]
    gates = x.new_empty((len(scales), batch, tokens, heads), dtype=torch.float32)
    return *streams, gates, *(x.new_empty((batch, weight.shape[1] - 1, channels)) for _ in range(3))


@memory_inputs_backward.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, tail_q: Tensor | None, tail_k: Tensor | None,
    tail_v: Tensor | None, position: Tensor | None, g_q: Tensor, g_k: Tensor, g_v: Tensor, g_gates: Tensor,
    heads: int, eps: float, scales: Sequence[float], coupled: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    g_tails = _like([tail_q, tail_k, tail_v], x)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape), *g_tails


def _setup_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.heads, ctx.eps, ctx.scales, ctx.coupled = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward_inputs(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
    x, weight, bias, *tails, position = ctx.saved_tensors
    batch, tokens, _ = x.shape
    channels = len(weight) // 3
    heads, scales = ctx.heads, ctx.scales
    shapes = [(batch, tokens, heads, channels // heads)] * 3 + [(len(scales), batch, tokens, heads)]
    g = [
        torch.zeros(shape, dtype=x.dtype, device=x.device) if given is None else given
        for shape, given in zip(shapes, gradients[:4], strict=True)
    ]
    g_x, g_weight, g_bias, *g_tails = memory_inputs_backward(
        x, weight, bias, *tails, position, *g, heads, ctx.eps, scales, ctx.coupled
    )
    g_before = [None if tail is None else g for tail, g in zip(tails, g_tails, strict=True)]
    for index, g_after in enumerate(gradients[4:]):
        own = g_x[..., index * channels : (index + 1) * channels]
        _add_after(own, g_before[index], position, g_after)
    return g_x, g_weight, g_bias, *g_before, None, None, None, None, None


memory_inputs.register_autograd(_backward_inputs, setup_context=_setup_inputs)
