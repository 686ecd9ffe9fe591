"""Whether the arguments of `self_modifying_memory` fit together."""

from collections.abc import Mapping

import torch
from torch import Tensor

from nestor.errors import ShapeError, suggest
from nestor.ops.neural_memory.validation import check_shapes
from nestor.ops.self_modifying.spec import (
    GATES,
    MEMORIES,
    Gate,
    Memories,
    SelfModifyingSpec,
    SelfModifyingState,
)


def check_call(
    q: Tensor,
    tokens: dict[str, Tensor | None],
    given: dict[str, Tensor | None],
    flags: dict[str, Tensor | None],
    gates: Mapping[str, Gate],
    initial: Memories,
    state: SelfModifyingState | None,
    spec: SelfModifyingSpec,
) -> None:
    """Raise ShapeError, with what was seen and what is wanted, unless everything fits q ``[B, T, H, p]``.

    tokens: k, v, g as q, the last may be None. given: eta, alpha, mu ``[B, T, H]`` or None. flags: mask,
    resets, bool ``[B, T]`` or None.
    """
    if q.dim() != 4 or 0 in q.shape:
        raise ShapeError(
            f"q has shape {tuple(q.shape)}; it must be [batch, tokens, heads, head width], none of them 0."
        )
    if not q.is_floating_point():
        raise ShapeError(f"q has dtype {q.dtype}; it must be a floating-point dtype.")
    place = tuple(q.shape[:3])
    check_shapes(q, ((tokens, tuple(q.shape)), (given, place), (flags, place[:2])), flags)
    _check_initial(initial, q.shape[2], q.shape[3], spec)
    _check_gates(tokens["g"], given, gates, initial, q.shape[2])
    if state is not None:
        _check_state(state, q.shape[0], initial, given["mu"] is not None, spec)


def _check_initial(initial: Memories, heads: int, width: int, spec: SelfModifyingSpec) -> None:
    for name in initial:
        if name not in MEMORIES:
            raise ShapeError(
                f"initial has {name!r}; memories are {', '.join(MEMORIES)}. "
                f"{suggest(name, MEMORIES)}".rstrip()
            )
    if "mem" not in initial:
        raise ShapeError("initial has no 'mem', the memory that is read.")
    depth = len(initial["mem"])
    if depth not in (1, 2):
        raise ShapeError(f"'mem' has {depth} matrices; memories have 1 (linear) or 2.")
    hidden = initial["mem"][0].shape[-1]
    for name, matrices in initial.items():
        shapes = [tuple(w.shape) for w in matrices]
        if depth == 2:
            wanted = [(heads, width, hidden), (heads, hidden, width)]
        else:
            wanted = [(heads, width, width)]
            # A gate may be one number, or a row that a vector is read with.
            free = name in GATES and spec.targets != "value" and len(shapes) == 1 and len(shapes[0]) == 3
            if free:
                wanted = [(heads, width, shapes[0][2])]
        if shapes != wanted:
            raise ShapeError(
                f"initial {name!r} has shapes {shapes}; with 'mem' of {depth} matrices, {heads} heads of "
                f"width {width} and targets={spec.targets!r} they must be {wanted}."
            )


def _check_gates(
    g: Tensor | None,
    given: dict[str, Tensor | None],
    gates: Mapping[str, Gate],
    initial: Memories,
    heads: int,
) -> None:
    for name in gates:
        if name not in initial or name not in GATES:
            raise ShapeError(f"gates has {name!r}, which is no gate that has a memory in initial.")
    for name in GATES:
        if name not in initial:
            if given[name] is None:
                raise ShapeError(f"{name} is None and no memory; pass {name}, or initial[{name!r}].")
            continue
        if given[name] is not None:
            raise ShapeError(f"{name} is given and a memory as well; pass {name}=None, or no initial.")
        if g is None or name not in gates:
            raise ShapeError(f"{name} is a memory; it needs g, its input, and gates[{name!r}].")
        outputs = initial[name][-1].shape[-1]
        bias, read = gates[name]
        wanted = (heads, outputs)
        bare = read is None and outputs == 1
        if tuple(bias.shape) != (heads,) or not (bare or (read is not None and tuple(read.shape) == wanted)):
            seen = None if read is None else tuple(read.shape)
            raise ShapeError(
                f"the gate {name!r} has a bias of shape {tuple(bias.shape)} and is read by {seen}; they must "
                f"be {(heads,)} and {wanted}" + (" or None." if outputs == 1 else ".")
            )


def _check_state(
    state: SelfModifyingState, batch: int, initial: Memories, momentum: bool, spec: SelfModifyingSpec
) -> None:
    if set(state.weights) != set(initial):
        raise ShapeError(
            f"the state has memories {sorted(state.weights)}; they must be {sorted(initial)}, as in initial."
        )
    if bool(state.momentum) != momentum:
        raise ShapeError("the state and mu disagree about momentum: both must have it, or neither.")
    if tuple(state.phase.shape) != (batch,):
        raise ShapeError(
            f"the state's phase has shape {tuple(state.phase.shape)}, q has {batch} sequences. Select or "
            f"stack states so that there is one row a sequence."
        )
    for part in ("weights", "momentum", "anchor") if momentum else ("weights", "anchor"):
        for name, matrices in initial.items():
            shapes = [tuple(w.shape) for w in getattr(state, part).get(name, ())]
            wanted = [(batch, *w.shape) for w in matrices]
            if shapes != wanted:
                raise ShapeError(
                    f"the state's {part} of {name!r} have shapes {shapes}; they must be {wanted}."
                )
    # Values are looked at where that does not wait for a device.
    if state.phase.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = (state.phase < 0) | (state.phase >= spec.longest)
        if bool(outside.any()):
            raise ShapeError(
                f"the state has phase {state.phase.tolist()}; it must be 0 to {spec.longest - 1}, as the "
                f"longer period has {spec.longest} tokens."
            )
