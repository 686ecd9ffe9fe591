"""The two walks of `chunked.py` as one kernel each, for linear memories without momentum on a GPU."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nestor.ops.heads import to_unit
from nestor.ops.kernels import covered
from nestor.ops.neural_memory.layout import ChunkGrid
from nestor.ops.self_modifying.groups import Group, Stack
from nestor.ops.self_modifying.layout import Carried, Edges, Inputs, valid_rows
from nestor.ops.self_modifying.spec import GATES

# Narrower rows are filled up with zeros. Of wider ones a backward pass has no room for its products.
NARROWEST, WIDEST = 16, 64


class Part(NamedTuple):
    """A group of memories, its state before a call, the edges of the rows of its grid, the grid, and the
    biases of gates ``[B H]`` by name."""

    group: Group
    state: Carried
    edges: Edges
    grid: ChunkGrid
    biases: Mapping[str, Tensor]


def is_fused(groups: tuple[Group, ...], momentum: bool, x: Tensor) -> bool:
    """Whether the kernels cover all memories of a call, for rows like x ``[..., p]``."""
    spec = groups[0].spec
    for group in groups:
        gates = [width for name, width in zip(group.names, group.widths, strict=True) if name in GATES]
        if group.depth != 1 or any(width != 1 for width in gates):
            return False
    return not momentum and spec.step_cap != "soft" and x.shape[-1] <= WIDEST and covered(x)


def fused_walks(
    others: Part, own: Part, inputs: Inputs, fresh: bool, half: bool
) -> tuple[Tensor, Tensor, Carried, Carried]:
    """y ``[B, T, H, p]``, the strengths of writes ``[B, T, H]``, and the states of both groups after a call.

    inputs: ``[B, T, H, p]``, gates ``[B, T, H]``. fresh: the states are those of sequences that have read
    nothing. half: products may round what they multiply to that of half precision's.
    """
    p, eps = inputs.k.shape[-1], others.group.spec.norm_eps
    wide = max(NARROWEST, 1 << (p - 1).bit_length())
    q, k, v, g = (None if x is None else F.pad(x, (0, wide - p)) if wide > p else x for x in inputs[:4])
    assert q is not None and k is not None and v is not None
    tokens = {"q": q, "k": k, "v": v, "g": g, "eta": inputs.eta, "alpha": inputs.alpha}
    after = others.state
    if "k" not in others.group.names:
        tokens["k"] = to_unit(k, eps)
    if others.group.names:
        found, after = _walk(others, tokens, p, fresh, half)
        tokens |= {name: found[name] for name in others.group.names}
    raw = "q" not in others.group.names
    found, own_after = _walk(own, tokens, p, fresh, half, raw)
    return found["y"][..., :p], found["strength"], after, own_after


def _walk(
    part: Part, tokens: dict[str, Tensor | None], p: int, fresh: bool, half: bool, raw: bool = False
) -> tuple[dict[str, Tensor], Carried]:
    """What a group makes of tokens ``[B, T, H, ...]``, by name, and its state after them. raw: queries to
    be read with have not been brought to unit length."""
    from nestor.ops.self_modifying.kernels.calls import self_modifying_walk

    group, state, edges, grid, biases = part
    spec, first = group.spec, tokens["k"]
    assert first is not None
    batch, length, heads, wide = first.shape
    aligned = grid.index is None

    def laid(x: Tensor | None) -> Tensor | None:
        """In one piece; rows of a ragged grid are sequences of one head each."""
        if x is None or aligned:
            return None if x is None else x.contiguous()
        return grid.to_rows(x).flatten(1, 2).unsqueeze(2).contiguous()

    def back(x: Tensor) -> Tensor:
        return x if aligned else grid.from_rows(x.squeeze(2).unflatten(1, (grid.rows, -1)), batch, length)

    weights, start = (_widened(group, x, p, wide) for x in (state.weights, edges.start.weights))
    anchor = weights if fresh else _widened(group, state.anchor, p, wide)
    valid = None if aligned else valid_rows(grid, heads)
    resets, closes = (_flags(rows, len(weights), first) for rows in (edges.resets, edges.closes))
    if closes is None and not fresh:
        closes = torch.ones(len(weights), grid.rows, dtype=torch.bool, device=first.device)
    names = set(group.names)
    needed = {"k", "v", *(n for n in GATES if n not in names)}
    needed |= ({"q"} if {"q", "mem"} & names else set()) | ({"g"} if names & set(GATES) else set())
    given = [laid(tokens[n]) if n in needed else None for n in ("k", "q", "v", "g", "eta", "alpha")]
    given += [start, weights, anchor, *(biases[name] if name in group.names else None for name in GATES)]
    rule = (
        spec.inner_loss, spec.targets, "dgd" if spec.dgd else "plain", spec.step_cap, spec.read_mode,
        spec.decay, "raw" if raw else "unit", "tf32" if half else "tf32x3",
    )  # fmt: skip
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    found = self_modifying_walk(
        *given, None if valid is None else valid.flatten(1, 2).unsqueeze(2).contiguous(), resets, closes,
        " ".join(group.names), " ".join(rule), grid.width, grid.rows,
        spec.max_step, spec.horizon, spec.norm_eps, keep,
    )  # fmt: skip
    made = dict(zip(("q", "k", "v", "eta", "alpha", "y", "strength"), found[:7], strict=True))
    ends = _narrowed(group, found[7], p, wide)
    last = ends if closes is None else _narrowed(group, found[8], p, wide)
    return {name: back(x) for name, x in made.items() if x.numel()}, Carried(ends, [], last)


def _flags(rows: list, count: int, like: Tensor) -> Tensor | None:
    """Of the rows of a grid, bool ``[B H, N]``; None if there is none, or every row has one."""
    if all(row is None or row is True for row in rows):
        return None
    blank = torch.zeros(count, dtype=torch.bool, device=like.device)
    return torch.stack(
        [row if isinstance(row, Tensor) else ~blank if row is True else blank for row in rows], 1
    )


def _widened(group: Group, stack: Stack, p: int, wide: int) -> Tensor:
    """A group's matrices ``[m, p, o]`` side by side, `wide` by `wide`, and one of its gates behind."""
    from nestor.ops.self_modifying.kernels import calls

    parts = list(stack[0].split(group.widths, -1))
    gates = [w for name, w in zip(group.names, parts, strict=True) if name in GATES]
    others = [w for name, w in zip(group.names, parts, strict=True) if name not in GATES]
    blank = [w.new_zeros(len(w), p, calls.GATES - len(gates)) for w in gates[:1]]
    if wide > p:
        others = [F.pad(w, (0, wide - p)) for w in others]
    return F.pad(torch.cat([*others, *gates, *blank], -1), (0, 0, 0, wide - p))


def _narrowed(group: Group, stack: Tensor, p: int, wide: int) -> Stack:
    """Reverse of `_widened`."""
    parts, column = [], 0
    for name in group.names:
        parts.append(stack[:, :p, column : column + (1 if name in GATES else p)])
        column += 1 if name in GATES else wide
    return [torch.cat(parts, -1)]
