"""The kernels of `walk.py` and `backward.py` as one PyTorch operator with its gradient."""

from typing import Any

import torch
import triton
from torch import Tensor

from nestor.ops.operators import operator
from nestor.ops.self_modifying.kernels import primitives, tiled
from nestor.ops.self_modifying.kernels.backward import backward_kernel
from nestor.ops.self_modifying.kernels.walk import walk_kernel

BLOCK, GATES = primitives.BLOCK.value, primitives.GATES.value
# Tiles between the stacks that are kept for the backward pass.
TILES_KEPT = 8
#: Columns of the kernels by name of their memory, in the order of a stack; then the gates', of their matrix.
COLUMNS = {"k": "K", "v": "V", "q": "Q", "mem": "M"}
GATE_COLUMNS = {"eta": "E", "alpha": "A"}


def _shapes(xk: Tensor, weights: Tensor, names: str, chunk: int, chunks: int) -> dict[str, int]:
    """Sizes and columns. Names are in the order of the stack, the gates at its end."""
    width = xk.shape[-1]
    tiles = triton.cdiv(chunk, BLOCK)
    found = {"P": width, "O": weights.shape[-1], "C": chunk, "TILES": tiles}
    found["SEGMENT"] = max(1, TILES_KEPT // tiles)
    found |= dict.fromkeys((*COLUMNS.values(), "G", *GATE_COLUMNS.values()), -1)
    column, gate = 0, 0
    for name in names.split():
        if name in GATE_COLUMNS:
            found[GATE_COLUMNS[name]], found["G"] = gate, column
            gate += 1
        else:
            found[COLUMNS[name]] = column
            column += width
    return found


def _choices(
    xk: Tensor, valid: Tensor | None, resets: Tensor | None, closes: Tensor | None, rule: str
) -> dict[str, Any]:
    loss, targets, dgd, cap, read, decay, queries, precision = rule.split()
    return {
        "L2": loss == "l2",
        "TARGETS": targets,
        "DGD": dgd == "dgd",
        "CAP": cap == "spectral",
        "RUNNING": read == "running",
        "UNIT": queries == "raw",
        "INITIAL": decay == "initial",
        "OPEN": closes is not None,
        "HAS_VALID": valid is not None,
        "HAS_RESETS": resets is not None,
        "PRECISION": precision,
        # Eight warps leave room for one program on a multiprocessor, which products in three parts need.
        "num_warps": 8 if precision == "tf32x3" and xk.shape[-1] > 32 else 4,
        "num_stages": 1,
    }


def _rooms(
    xk: Tensor, weights: Tensor, is_open: bool, names: str, chunk: int, chunks: int, dgd: bool, keep: bool
) -> list[tuple[int, ...]]:
    """Shapes of what a walk returns; ``(0,)`` of what there is not."""
    sizes = _shapes(xk, weights, names, chunk, chunks)
    rows, places, none = tuple(xk.shape), tuple(xk.shape[:-1]), (0,)
    stack, count = tuple(weights.shape), weights.shape[0]
    segments = (count, triton.cdiv(chunks, sizes["SEGMENT"]), *stack[1:])

    def where(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape if sizes[name] >= 0 else none

    found = [where(name, rows) for name in "QKV"] + [where(name, places) for name in "EA"]
    found += [where("M", rows), where("M", places), stack, stack if is_open else none]
    kept = [segments, segments if is_open else none, (*places, sizes["O"])]
    kept += [(count, chunks, sizes["TILES"], BLOCK, BLOCK) if dgd else none]
    kept += [places, places, where("K", places)]
    return found + (kept if keep else [none] * len(kept))


@operator("self_modifying_walk")
def self_modifying_walk(
    xk: Tensor, xq: Tensor | None, xv: Tensor, xg: Tensor | None, eta: Tensor | None, alpha: Tensor | None,
    start: Tensor, weights: Tensor, anchor: Tensor, bias_eta: Tensor | None, bias_alpha: Tensor | None,
    valid: Tensor | None, resets: Tensor | None, closes: Tensor | None,
    names: str, rule: str, chunk: int, chunks: int, max_step: float, horizon: float, eps: float, keep: bool,
) -> list[Tensor]:  # fmt: skip
    """Walk the chunks of the memories `names`, in the order of the columns of a stack.

    xk, xq, xv, xg ``[B, T, H, P]``: what memories make keys, queries, values and gates from, or, where there
    is none, keys of unit length, queries and values; eta, alpha ``[B, T, H]`` where no memory makes them.
    start, weights, anchor: stacks ``[B H, P, O]`` of the matrices of k, v, q and mem, then one of GATES
    columns, of which the first are those of the gates. bias_eta, bias_alpha: ``[B H]``. valid: bool
    ``[B, T, H]``; resets, closes: bool ``[B H, chunks]``; no closes: all chunks begin and end in this call.
    All in one piece, float32, or bfloat16 for the x.
    rule: loss, targets, "dgd" or "plain", cap, read mode and decay of the spec; "raw" if queries of "mem" are
    not of unit length yet, else "unit"; and the precision of products.
    keep: backward will be asked for.

    Returns q, k, v, eta, alpha as memories made them, y and the strengths of "mem", the stacks after the last
    chunk and its anchor, and what backward needs. What there is not is empty.
    """
    is_open, dgd = closes is not None, rule.split()[2] == "dgd"
    rooms = _rooms(xk, weights, is_open, names, chunk, chunks, dgd, keep)
    made = [torch.empty(shape, dtype=torch.float32, device=xk.device) for shape in rooms]
    walk_kernel[(weights.shape[0],)](
        xq, xk, xv, xg, eta, alpha, valid, resets, closes, start, weights, anchor, bias_eta, bias_alpha,
        *made, xk.shape[1], xk.shape[2], chunks, max_step, horizon, eps,
        KEEP=keep, **_shapes(xk, weights, names, chunk, chunks),
        **_choices(xk, valid, resets, closes, rule),
    )  # fmt: skip
    return made


@operator("self_modifying_walk_backward")
def self_modifying_walk_backward(
    xk: Tensor, xq: Tensor | None, xv: Tensor, xg: Tensor | None, eta: Tensor | None, alpha: Tensor | None,
    start: Tensor, bias_eta: Tensor | None, bias_alpha: Tensor | None,
    valid: Tensor | None, resets: Tensor | None, closes: Tensor | None,
    outputs: list[Tensor], gradients: list[Tensor],
    names: str, rule: str, chunk: int, chunks: int, max_step: float, horizon: float, eps: float,
) -> list[Tensor]:  # fmt: skip
    """Gradients of xk, xq, xv, xg, eta, alpha, start, weights, anchor and the biases.

    outputs: all of the walk's. gradients: of its q, k, v, eta, alpha, y, and the stacks after the last chunk
    and its anchor. What there is not is empty.
    """
    sizes = _shapes(xk, start, names, chunk, chunks)
    _, k, v, step, _ = outputs[:5]
    k, v = k if sizes["K"] >= 0 else xk, v if sizes["V"] >= 0 else xv

    def like(x: Tensor | None) -> Tensor:
        return torch.empty_like(x) if x is not None else xk.new_empty(0)

    found = [like(x) for x in (xk, xq, xv, xg, eta, alpha)]
    # The anchor's is not written where no chunk is open, nor by the kernel in CUDA the half of the gates'
    # matrix that has none.
    stacks = [torch.zeros_like(start) for _ in range(3)]
    biases = [like(bias_eta), like(bias_alpha)]
    choices = _choices(xk, valid, resets, closes, rule)
    into = [found[1], found[0], *found[2:], *stacks, *biases]
    inputs = (xq, xk, xv, xg, eta, alpha, valid, resets, closes, start)
    kept = (k, v, step, *outputs[9:])
    tensors = [*inputs, bias_alpha, *kept, *gradients, *into]
    if tiled.covers(sizes, choices, tensors):
        tiled.backward(
            sizes, choices, (*inputs, bias_alpha), kept, gradients, into, chunks, (max_step, horizon, eps)
        )
        return [*found, *stacks, *biases]
    scratch = sizes["SEGMENT"] * start.numel()
    before = start.new_empty(sizes["TILES"] * scratch)
    before_anchor = start.new_empty(scratch if sizes["TILES"] > 1 or closes is not None else 0)
    backward_kernel[(start.shape[0],)](
        *inputs, bias_eta, bias_alpha, *kept, *gradients, before, before_anchor, *into,
        xk.shape[1], xk.shape[2], chunks, max_step, horizon, eps, **sizes, **choices,
    )  # fmt: skip
    return [*found, *stacks, *biases]


@self_modifying_walk.register_fake
def _(
    xk: Any, xq: Any, xv: Any, xg: Any, eta: Any, alpha: Any, start: Any, weights: Any, anchor: Any,
    bias_eta: Any, bias_alpha: Any, valid: Any, resets: Any, closes: Any, names: Any, rule: Any, chunk: Any,
    chunks: Any, max_step: Any, horizon: Any, eps: Any, keep: Any,
) -> list[Tensor]:  # fmt: skip
    dgd = rule.split()[2] == "dgd"
    rooms = _rooms(xk, weights, closes is not None, names, chunk, chunks, dgd, keep)
    return [weights.new_empty(shape) for shape in rooms]


@self_modifying_walk_backward.register_fake
def _(
    xk: Any, xq: Any, xv: Any, xg: Any, eta: Any, alpha: Any, start: Any, bias_eta: Any, bias_alpha: Any,
    valid: Any, resets: Any, closes: Any, outputs: Any, gradients: Any, names: Any, rule: Any, chunk: Any,
    chunks: Any, max_step: Any, horizon: Any, eps: Any,
) -> list[Tensor]:  # fmt: skip
    given = (xk, xq, xv, xg, eta, alpha, start, start, start, bias_eta, bias_alpha)
    return [xk.new_empty(0) if x is None else torch.empty_like(x) for x in given]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.choices = inputs[14:-1]
    ctx.set_materialize_grads(False)
    # Without weights and anchor, which begin what is kept.
    ctx.save_for_backward(*inputs[:7], *inputs[9:14], *output)


def _backward(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    given, outputs = saved[:12], list(saved[12:])
    # All but the strengths, which have no gradient.
    places = [*range(6), 7, 8]
    dense = []
    for place in places:
        g = gradients[place]
        dense.append(torch.zeros_like(outputs[place]) if g is None else g.contiguous())
    found = self_modifying_walk_backward(*given, outputs, dense, *ctx.choices)
    start = given[6]
    present = (*given[:6], start, start, start, *given[7:9])
    out = [g if x is not None else None for g, x in zip(found, present, strict=True)]
    return (*out, *[None] * (3 + len(ctx.choices) + 1))


self_modifying_walk.register_autograd(_backward, setup_context=_setup)
