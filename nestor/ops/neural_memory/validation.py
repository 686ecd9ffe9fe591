"""Whether the arguments of `neural_memory` fit together."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from nestor.errors import ShapeError
from nestor.ops.neural_memory.spec import MemorySpec, MemoryState

MAX_DEPTH = 4


def check_call(
    q: Tensor,
    tokens: dict[str, Tensor | None],
    gates: dict[str, Tensor | None],
    flags: dict[str, Tensor | None],
    norm: dict[str, Tensor | None],
    initial: Sequence[Tensor],
    state: MemoryState | None,
    start: MemoryState | None,
    spec: MemorySpec,
) -> None:
    """Raise ShapeError, with what was seen and what is wanted, unless everything fits q ``[B, T, H, p]``.

    tokens: k, v as q. gates: theta, eta, alpha ``[B, T, H]``, the last two may be None. flags: mask, resets,
    bool ``[B, T]`` or None. norm: gamma, beta ``[H, p]``, or None as the norm wants. initial, state, start:
    as `neural_memory` documents.
    """
    if q.dim() != 4:
        raise ShapeError(f"q has shape {tuple(q.shape)}; it must be [batch, tokens, heads, head width].")
    if not q.is_floating_point():
        raise ShapeError(f"q has dtype {q.dtype}; it must be a floating-point dtype.")
    batch, length, heads, width = q.shape
    if length == 0:
        raise ShapeError("q has no tokens; neural_memory needs at least one.")
    if gates["theta"] is None:
        raise ShapeError(f"theta is None; it must have shape {(batch, length, heads)}.")
    if spec.norm != "residual_layernorm":
        if any(x is not None for x in norm.values()):
            raise ShapeError(f"norm {spec.norm!r} takes no gamma and beta; pass None.")
    elif any(x is None for x in norm.values()):
        raise ShapeError(
            f"norm {spec.norm!r} needs gamma and beta of shape {(heads, width)}; one of them is None."
        )
    groups: tuple[tuple[dict[str, Tensor | None], tuple[int, ...]], ...] = (
        (tokens, (batch, length, heads, width)),
        (gates, (batch, length, heads)),
        (flags, (batch, length)),
        (norm, (heads, width)),
    )
    for group, shape in groups:
        for name, x in group.items():
            if x is not None and tuple(x.shape) != shape:
                raise ShapeError(
                    f"{name} has shape {tuple(x.shape)}; with q {tuple(q.shape)} it must be {shape}."
                )
    for name, x in flags.items():
        if x is not None and x.dtype != torch.bool:
            raise ShapeError(f"{name} has dtype {x.dtype}; it must be torch.bool.")
    _check_initial(initial, heads, width)
    momentum = gates["eta"] is not None
    if state is not None:
        _check_state("state", state, batch, initial, momentum, spec.chunk_size)
    if start is not None:
        # A document begins at the start of a chunk.
        _check_state("start", start, 1, initial, momentum, 1)


def _check_initial(initial: Sequence[Tensor], heads: int, width: int) -> None:
    shapes = [tuple(w.shape) for w in initial]
    if len(shapes) > MAX_DEPTH:
        raise ShapeError(f"initial has {len(shapes)} layers; a memory has 1 to {MAX_DEPTH}.")
    fits = bool(shapes) and all(len(s) == 3 and s[0] == heads for s in shapes)
    if fits:
        fits = shapes[0][1] == width == shapes[-1][2] and all(a[2] == b[1] for a, b in pairwise(shapes))
    if not fits:
        raise ShapeError(
            f"initial weights have shapes {shapes}; "
            f"they must chain from ({heads}, {width}, ..) to ({heads}, .., {width})."
        )


def _check_state(
    name: str, state: MemoryState, rows: int, initial: Sequence[Tensor], momentum: bool, chunk_size: int
) -> None:
    heads = initial[0].shape[0]
    seen = tuple(state.weights[0].shape[:2]) if state.weights else ()
    if seen != (rows, heads) or tuple(state.phase.shape) != (rows,):
        wanted = f"q has {(rows, heads)}. Select or stack states so that there is one row a sequence."
        if name == "start":
            wanted = f"it must be {(1, heads)}, one row for every document."
        raise ShapeError(f"the {name} holds {seen} (batch, heads); {wanted}")
    if bool(state.momentum) != momentum:
        raise ShapeError(f"the {name} and eta disagree about momentum: both must have it, or neither.")
    shapes_wanted = [(rows, *w.shape) for w in initial]
    for part in ("weights", "momentum", "anchor") if momentum else ("weights", "anchor"):
        shapes = [tuple(w.shape) for w in getattr(state, part)]
        if shapes != shapes_wanted:
            raise ShapeError(f"the {name}'s {part} have shapes {shapes}; they must be {shapes_wanted}.")
    # Values are looked at where that does not wait for a device.
    if state.phase.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = (state.phase < 0) | (state.phase >= chunk_size)
        if bool(outside.any()):
            limit = f"0 to {chunk_size - 1}, as chunks have {chunk_size} tokens" if name == "state" else "0"
            raise ShapeError(f"the {name} has phase {state.phase.tolist()}; it must be {limit}.")
