"""The neural memory on a GPU, in Triton. Imported only where Triton is installed.

`neural_memory_kernels` is the whole operation; `unsupported` says what it does not cover.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nestor.ops.neural_memory.kernels.decode import READS, memory_decode
from nestor.ops.neural_memory.kernels.linear_decode import linear_memory_decode
from nestor.ops.neural_memory.kernels.linear_walk import linear_memory_walk
from nestor.ops.neural_memory.kernels.primitives import ACTIVATIONS, LOSSES, NORMS
from nestor.ops.neural_memory.kernels.walk import memory_walk
from nestor.ops.neural_memory.layout import chunk_grid
from nestor.ops.neural_memory.spec import MemorySpec, MemoryState

__all__ = ["decode_token", "neural_memory_kernels", "obstacle"]

CHUNKS = (16, 32, 64, 128)
WIDTHS = (16, 32, 64, 128)
DTYPES = (torch.bfloat16, torch.float32)


def obstacle(spec: MemorySpec, initial: Sequence[Tensor] | None, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot compute this memory; None: they can."""
    for name, value, known in (
        ("dtype", dtype, DTYPES),
        ("activation", spec.activation, ACTIVATIONS),
        ("norm", spec.norm, NORMS),
        ("inner_loss", spec.inner_loss, LOSSES),
        ("read_mode", spec.read_mode, ("inclusive", "chunk_start")),
        ("grad_at", spec.grad_at, ("pre_decay",)),
        ("chunk_size", spec.chunk_size, CHUNKS),
    ):
        if value not in known:
            return f"the kernels do not cover {name} = {value!r}"
    if initial is None:
        return None
    if len(initial) > 2:
        return f"the kernels cover memories of one and two layers, not of {len(initial)}"
    width, hidden = initial[0].shape[-2:]
    if width not in WIDTHS:
        return f"the kernels do not cover heads of width {width}; it must be one of {WIDTHS}"
    # What shared memory has no room for.
    long, exact, wide = spec.chunk_size == 128, dtype == torch.float32, width == 128
    if exact and ((long and wide) if len(initial) == 1 else (long or wide)):
        return f"the kernels do not cover chunks of {spec.chunk_size} with heads of width {width} in {dtype}"
    if len(initial) == 2 and hidden % 32 and hidden != 16:
        return f"the kernels do not cover a hidden width of {hidden}; it must be a multiple of 32"
    return None


def neural_memory_kernels(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, eta: Tensor | None, alpha: Tensor | None,
    initial: Sequence[Tensor], gamma: Tensor | None, beta: Tensor | None,
    state: MemoryState | None, start: MemoryState | None, spec: MemorySpec,
    mask: Tensor | None, resets: Tensor | None,
) -> tuple[Tensor, MemoryState]:  # fmt: skip
    """`neural_memory` for sequences that stand at a chunk's start: q, k, v bfloat16 or float32."""
    batch, length, heads, _ = q.shape
    depth, hidden, chunk = len(initial), initial[0].shape[-1], spec.chunk_size
    begin = start or MemoryState.fresh(tuple(initial), 1, eta is not None)
    opening = state or begin
    ragged = mask is not None or resets is not None
    valid = row_resets = opened = grid = None
    tokens = [q, k, v, theta, eta, alpha]
    left = length % chunk
    phase = torch.full((batch,), left, dtype=torch.int64, device=q.device)
    if ragged:
        grid = chunk_grid(batch, length, chunk, q.device, None, mask, resets, whole=True)
        tokens = [None if x is None else grid.gather(x).flatten(1, 2) for x in tokens]
        cells = grid.valid
        assert cells is not None
        valid = cells.flatten(1).to(torch.uint8)
        row_resets = None if grid.row_resets is None else grid.row_resets.to(torch.uint8)
        phase = grid.phase.clone()  # a State's own: layers share the grid
        used = cells.any(2)
        final_row = torch.where(used, torch.arange(grid.rows, device=q.device), -1).amax(1)
        opened = torch.where(phase == 0, -1, final_row).to(torch.int32)
    elif left:
        opened = torch.full((batch,), -(-length // chunk) - 1, dtype=torch.int32, device=q.device)
    tokens = [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tokens[:3]] + [
        None if g is None else g.float().contiguous() for g in tokens[3:]
    ]

    def pack(memory: MemoryState, rows: int) -> Tensor:
        layers = (*memory.weights, *(memory.momentum if eta is not None else ()))
        packed = torch.stack([w.float().flatten(-2) for w in layers], 2)
        return packed.expand(rows, *packed.shape[1:]).flatten(0, 1)

    has_target = spec.decay == "initial" and alpha is not None
    targets = torch.stack([w.float().flatten(-2) for w in initial], 1) if has_target else None
    gamma, beta = (None if g is None else g.float().contiguous() for g in (gamma, beta))
    packed = pack(opening, batch).contiguous()
    first = pack(begin, 1).contiguous() if row_resets is not None else None
    inputs = (*tokens, packed, targets, first, gamma, beta)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    choices = (
        NORMS.index(spec.norm), LOSSES.index(spec.inner_loss), spec.read_mode == "inclusive",
        spec.norm_eps, spec.loss_scale, spec.loss_threshold, keep,
    )  # fmt: skip
    if depth == 1:
        y, final, anchor, *_ = linear_memory_walk(*inputs, valid, row_resets, opened, chunk, *choices)
    else:
        y, final, anchor, *_ = memory_walk(
            *inputs, valid, row_resets, opened, chunk, hidden, ACTIVATIONS.index(spec.activation), *choices
        )
    if grid is not None:
        y = grid.scatter(y.unflatten(1, (grid.rows, chunk)), length)

    def unpack(part: Tensor) -> tuple[Tensor, ...]:
        layers = part.view(batch, heads, depth, -1).unbind(2)
        return tuple(x.unflatten(-1, w.shape[-2:]) for x, w in zip(layers, initial, strict=True))

    weights = unpack(final[:, :depth])
    momentum = unpack(final[:, depth:]) if eta is not None else ()
    silent = None if mask is None else (~mask.any(1))[:, None, None, None]
    if silent is not None:
        # The way over W - M rounds; a sequence without a token keeps every bit.
        weights = tuple(
            torch.where(silent, b.float(), w) for b, w in zip(opening.weights, weights, strict=True)
        )
    anchors = weights
    if opened is not None:
        # Where the call ends inside a chunk, its anchor is what the chunk began with.
        inside = (opened >= 0)[:, None, None, None]
        held = unpack(anchor)
        before = opening.anchor
        anchors = tuple(
            torch.where(inside, a, w) if silent is None else
            torch.where(silent, b.float(), torch.where(inside, a, w))
            for a, w, b in zip(held, weights, before, strict=True)
        )  # fmt: skip
    return y, MemoryState(weights, momentum, anchors, phase)


def decode_token(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, eta: Tensor | None, alpha: Tensor | None,
    initial: Sequence[Tensor], gamma: Tensor | None, beta: Tensor | None,
    state: MemoryState, spec: MemorySpec,
) -> tuple[Tensor, MemoryState]:  # fmt: skip
    """`neural_memory` on one token of every sequence, each at its own place in its chunk; no gradient."""

    def floats(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.float().contiguous()

    has_target = spec.decay == "initial" and alpha is not None
    depth = len(initial)
    targets = [floats(w) for w in initial] if has_target else [None] * depth
    momentum = [floats(x) for x in state.momentum] if eta is not None else [None] * depth
    weights, anchor = ([x.float().contiguous() for x in part] for part in (state.weights, state.anchor))
    inputs = (
        q.contiguous(), k.contiguous(), v.contiguous(),
        theta.float().contiguous(), floats(eta), floats(alpha),
        state.phase.contiguous(), *weights, *momentum, *anchor, *targets,
        floats(gamma), floats(beta), spec.chunk_size,
    )  # fmt: skip
    choices = (
        NORMS.index(spec.norm), LOSSES.index(spec.inner_loss), READS.index(spec.read_mode),
        spec.norm_eps, spec.loss_scale, spec.loss_threshold,
    )  # fmt: skip
    if depth == 1:
        y, *parts = linear_memory_decode(*inputs, *choices)
    else:
        y, *parts = memory_decode(*inputs, ACTIVATIONS.index(spec.activation), *choices)
    phase = (state.phase + 1) % spec.chunk_size
    new_weights, new_anchor, new_momentum = parts[:depth], parts[depth : 2 * depth], parts[2 * depth :]
    return y, MemoryState(tuple(new_weights), tuple(new_momentum), tuple(new_anchor), phase)
