"""Whether the arguments of `neural_memory` fit together."""

from collections.abc import Iterable, Mapping, Sequence
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
    extras: dict[str, Tensor | None] | None = None,
) -> None:
    """Raise ShapeError, with what was seen and what is wanted, unless everything fits q ``[B, T, H, p]``.

    tokens: k, v as q. gates: theta, eta, alpha, shaped as the spec says, the last two may be None. flags:
    mask, resets, bool ``[B, T]`` or None. norm: gamma, beta ``[H, p]``, or None as the norm wants. extras:
    omega, delta, step. initial, state, start: as `neural_memory` documents.
    """
    if q.dim() != 4:
        raise ShapeError(f"q has shape {tuple(q.shape)}; it must be [batch, tokens, heads, head width].")
    if not q.is_floating_point():
        raise ShapeError(f"q has dtype {q.dtype}; it must be a floating-point dtype.")
    batch, length, heads, width = q.shape
    if length == 0:
        raise ShapeError("q has no tokens; neural_memory needs at least one.")
    if batch == 0:
        raise ShapeError("q has a batch of 0 sequences; neural_memory needs at least one.")
    place = (batch, length, heads)
    v = tokens["v"]
    # Without a residual the network may map keys to values of another width.
    values = width if spec.norm != "none" or v is None else v.shape[-1]
    kinds = {"head": place, "matrix": (*place, len(initial)), "channel": (*place, values)}
    of_theta, of_alpha = kinds[spec.step_sizes], kinds[spec.forget_gates]
    if gates["theta"] is None:
        raise ShapeError(f"theta is None; it must have shape {of_theta}.")
    if spec.norm != "residual_layernorm":
        if any(x is not None for x in norm.values()):
            raise ShapeError(f"norm {spec.norm!r} takes no gamma and beta; pass None.")
    elif any(x is None for x in norm.values()):
        raise ShapeError(
            f"norm {spec.norm!r} needs gamma and beta of shape {(heads, width)}; one of them is None."
        )
    groups: tuple[tuple[dict[str, Tensor | None], tuple[int, ...]], ...] = (
        ({"k": tokens["k"]}, (*place, width)),
        ({"v": v}, (*place, values)),
        ({"theta": gates["theta"]}, of_theta),
        ({"eta": gates["eta"]}, place),
        ({"alpha": gates["alpha"]}, of_alpha),
        (flags, (batch, length)),
        (norm, (heads, width)),
    )
    check_shapes(q, groups, flags)
    extras = extras or {}
    _check_extras(extras, spec, place, values, gates["eta"] is not None)
    _check_initial(initial, heads, width, values, spec.network)
    momentum = gates["eta"] is not None
    if state is not None:
        _check_state("state", state, batch, initial, momentum, spec.chunk_size)
        _check_additions(state, batch, initial, values, spec, extras.get("delta"))
    if start is not None:
        # A document begins at the start of a chunk.
        _check_state("start", start, 1, initial, momentum, 1)


def check_shapes(
    q: Tensor,
    groups: Iterable[tuple[Mapping[str, Tensor | None], tuple[int, ...]]],
    flags: Mapping[str, Tensor | None],
) -> None:
    """Tensors that come with q, by name, have the shape of their group, and flags are bool; None is left out.

    Raises:
        ShapeError: one has not; the message names it.
    """
    for group, shape in groups:
        for name, x in group.items():
            if x is not None and tuple(x.shape) != shape:
                raise ShapeError(
                    f"{name} has shape {tuple(x.shape)}; with q {tuple(q.shape)} it must be {shape}."
                )
    for name, x in flags.items():
        if x is not None and x.dtype != torch.bool:
            raise ShapeError(f"{name} has dtype {x.dtype}; it must be torch.bool.")


def _check_extras(
    extras: dict[str, Tensor | None], spec: MemorySpec, place: tuple[int, ...], width: int, momentum: bool
) -> None:
    omega, delta, step = (extras.get(name) for name in ("omega", "delta", "step"))
    shapes: tuple[tuple[str, Tensor | None, tuple[tuple[int, ...], ...]], ...] = (
        ("omega", omega, (place, (*place, spec.window))),
        ("delta", delta, (place, (*place, width))),
        ("step", step, (place,)),
    )
    for name, x, wanted in shapes:
        if x is not None and tuple(x.shape) not in wanted:
            either = " or ".join(map(str, wanted))
            raise ShapeError(f"{name} has shape {tuple(x.shape)}; it must be {either}.")
    if delta is not None and not spec.loss().thresholded:
        raise ShapeError(f"inner_loss {spec.inner_loss!r} has no threshold; pass delta=None.")
    if step is not None and spec.optimizer != "muon":
        raise ShapeError("step is the size of orthogonalised steps; with optimizer='gd' pass None.")
    if spec.optimizer == "muon" and spec.granularity == "token" and not spec.muon_per_token and not momentum:
        raise ShapeError(
            "eta is None; optimizer='muon' with granularity='token' orthogonalises the momentum at the end "
            "of a chunk, which without eta is the last token's step. Pass eta, or use granularity='chunk'."
        )


def _check_initial(initial: Sequence[Tensor], heads: int, width: int, values: int, network: str) -> None:
    shapes = [tuple(w.shape) for w in initial]
    if network == "gated":
        hidden = shapes[0][-1] if shapes and shapes[0] else 0
        wanted = [(heads, width, hidden), (heads, hidden, values), (heads, width, hidden)]
        if shapes != wanted:
            raise ShapeError(
                f"initial weights have shapes {shapes}; a gated network has W0 ({heads}, {width}, h), "
                f"W1 ({heads}, h, {values}) and W2 ({heads}, {width}, h)."
            )
        return
    if len(shapes) > MAX_DEPTH:
        raise ShapeError(f"initial has {len(shapes)} layers; a memory has 1 to {MAX_DEPTH}.")
    fits = bool(shapes) and all(len(s) == 3 and s[0] == heads for s in shapes)
    if fits:
        ends = shapes[0][1] == width and shapes[-1][2] == values
        fits = ends and all(a[2] == b[1] for a, b in pairwise(shapes))
    if not fits:
        raise ShapeError(
            f"initial weights have shapes {shapes}; "
            f"they must chain from ({heads}, {width}, ..) to ({heads}, .., {values})."
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


def _check_additions(
    state: MemoryState,
    rows: int,
    initial: Sequence[Tensor],
    values: int,
    spec: MemorySpec,
    delta: Tensor | None,
) -> None:
    """The parts of a state that only some specs have."""
    entries = 0 if delta is None else delta.shape[3] if delta.dim() == 4 else 1  # as `threshold_entries`
    heads, width = initial[0].shape[:2]
    place = (rows, heads, spec.window - 1)
    halo = [(*place, width), (*place, values), place, *([(*place, entries)] if entries else [])]
    wanted = {
        "pending": [(rows, *w.shape) for w in initial] if spec.granularity == "chunk" else [],
        "pooled": [(rows, heads, 4)] if spec.pools else [],
        "halo": halo if spec.window > 1 else [],
    }
    seen = {
        "pending": [tuple(x.shape) for x in state.pending],
        "pooled": [] if state.pooled is None else [tuple(state.pooled.shape)],
        "halo": [tuple(x.shape) for x in state.halo],
    }
    for name, shapes in wanted.items():
        if seen[name] != shapes:
            raise ShapeError(
                f"the state's {name} has shapes {seen[name]}; with these choices they must be {shapes}. "
                f"Start from MemoryState.fresh with the spec, or from a state that the same choices returned."
            )
