"""How tokens and states are laid out for the walks: chunk rows, and sequences and heads as one axis m."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nestor.ops.neural_memory.layout import ChunkGrid
from nestor.ops.self_modifying.groups import Group, Stack
from nestor.ops.self_modifying.spec import Gate, SelfModifyingState


class Projected(NamedTuple):
    """What tokens write and read with: q, k, v ``[m, C, p]``, eta, alpha ``[m, C]``."""

    q: Tensor
    k: Tensor
    v: Tensor
    eta: Tensor
    alpha: Tensor


class Inputs(NamedTuple):
    """What projections are made from: q, k, v, g ``[m, C, p]``; eta, alpha ``[m, C]`` if they are given."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    eta: Tensor | None
    alpha: Tensor | None


class Carried(NamedTuple):
    """What goes from chunk to chunk of a group, each a stack (see `groups.py`)."""

    weights: Stack
    momentum: Stack
    anchor: Stack


@dataclass(frozen=True)
class Edges:
    """For each chunk: whether documents start with it, None or bool ``[m]``, and whether it ends, a bool or
    bool ``[m]``; start: what documents start with."""

    resets: list[Tensor | None]
    closes: list[bool | Tensor]
    start: Carried

    def enter(self, n: int, state: Carried) -> Carried:
        """The state at the start of chunk n."""
        fresh = self.resets[n]
        return state if fresh is None else _choose(fresh, self.start, state)

    def leave(self, n: int, after: Carried, anchor: Stack) -> Carried:
        """The state after chunk n, whose anchor moves where it ends."""
        closed = self.closes[n]
        if closed is not False:
            anchor = after.weights if closed is True else _pick(closed, after.weights, anchor)
        return after._replace(anchor=anchor)


def at_chunk(parts: Sequence[Tensor | None], n: int) -> list:
    """Chunk n of each."""
    return [None if x is None else x[:, n] for x in parts]


def gather(group: Group, state: SelfModifyingState, batch: int) -> Carried:
    """The part of a state that a group carries, ``[B or 1, H, ...]`` to ``[B H, ...]``."""

    def rows(memories: dict[str, tuple[Tensor, ...]]) -> Stack:
        def merge(w: Tensor) -> Tensor:
            return w.expand(batch, *w.shape[1:]).flatten(0, 1)

        return group.join({name: tuple(map(merge, memories[name])) for name in group.names if memories})

    return Carried(rows(state.weights), rows(state.momentum), rows(state.anchor))


def edges_of(grid: ChunkGrid, heads: int, start: Carried) -> Edges:
    """The edges of a grid's rows, for every head."""
    resets = [None if r is None else r.repeat_interleave(heads) for r in grid.resets]
    closes = [c if isinstance(c, bool) else c.repeat_interleave(heads) for c in grid.closes]
    return Edges(resets, closes, start)


def valid_rows(grid: ChunkGrid, heads: int) -> Tensor | None:
    return None if grid.valid is None else grid.valid.repeat_interleave(heads, 0)


def gate_rows(gate: Gate, batch: int) -> Gate:
    """Bias ``[m, 1]``, read ``[m, 1, out]``."""
    read = None if gate.read is None else gate.read.repeat(batch, 1).unsqueeze(1)
    return Gate(gate.bias.repeat(batch).unsqueeze(1), read)


def regrid(tokens: Projected, old: ChunkGrid, new: ChunkGrid, batch: int, length: int) -> Projected:
    """The same tokens in the chunks of another grid."""
    if old is new:
        return tokens
    rows = torch.cat([x if x.dim() == 4 else x.unsqueeze(-1) for x in tokens], -1)
    if old.index is None and new.index is None:
        flat = rows.flatten(1, 2)[:, :length]
        flat = torch.nn.functional.pad(flat, (0, 0, 0, new.rows * new.width - length))
        rows = flat.unflatten(1, (new.rows, new.width))
    else:
        rows = new.to_rows(old.from_rows(rows, batch, length))
    sizes = [1 if x.dim() == 3 else x.shape[-1] for x in tokens]
    parts = rows.split(sizes, -1)
    return Projected(*(p.squeeze(-1) if x.dim() == 3 else p for p, x in zip(parts, tokens, strict=True)))


def _choose(condition: Tensor, new: Carried, old: Carried) -> Carried:
    return Carried(*(_pick(condition, a, b) for a, b in zip(new, old, strict=True)))


def _pick(condition: Tensor, new: Stack, old: Stack) -> Stack:
    return [
        torch.where(condition.reshape(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(new, old, strict=True)
    ]
