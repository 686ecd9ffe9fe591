"""A call of `neural_memory` laid out for the walk of `general.py`, and its results laid back."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nestor.ops.neural_memory.chunked import Norm
from nestor.ops.neural_memory.functions import make_head
from nestor.ops.neural_memory.general import Carried, Tokens, Walk, walk
from nestor.ops.neural_memory.layout import chunk_grid
from nestor.ops.neural_memory.networks import make_network
from nestor.ops.neural_memory.retention import make_retention
from nestor.ops.neural_memory.spec import MemorySpec, MemoryState

# The choices that the chunked and the C++ form cover; everything else is the general form's.
FAST = {
    "network": "mlp",
    "retention": "l2",
    "optimizer": "gd",
    "renormalize": "none",
    "granularity": "token",
    "window": 1,
    "step_sizes": "head",
    "forget_gates": "head",
}


def beyond_fast_forms(spec: MemorySpec) -> str | None:
    """Why only the general form (and the reference) computes these choices; None: the fast forms do too."""
    for name, covered in FAST.items():
        value = getattr(spec, name)
        if value != covered:
            return f"only the general form covers {name}={value!r}"
    return None


def threshold_entries(delta: Tensor | None) -> int:
    """Entries of a token's loss threshold: 0, 1, or p if each channel has its own."""
    return 0 if delta is None else delta.shape[3] if delta.dim() == 4 else 1


def general_memory(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, eta: Tensor | None, alpha: Tensor | None,
    initial: Sequence[Tensor], gamma: Tensor | None, beta: Tensor | None,
    state: MemoryState | None, start: MemoryState | None, spec: MemorySpec,
    mask: Tensor | None, resets: Tensor | None,
    omega: Tensor | None = None, threshold: Tensor | None = None, step: Tensor | None = None,
) -> tuple[Tensor, MemoryState, Tensor]:  # fmt: skip
    """Outputs, state and surprise of a checked call; shapes as in `neural_memory`."""
    batch, length, heads, _ = q.shape
    grid = chunk_grid(
        batch, length, spec.chunk_size, q.device, None if state is None else state.phase, mask, resets
    )

    def rows(x: Tensor | None) -> Tensor | None:
        return None if x is None else grid.to_rows(x)

    def merge(x: Tensor) -> Tensor:
        """[B or 1, H, ...] -> [B H, ...]"""
        return x.to(q.dtype).expand(batch, *x.shape[1:]).reshape(batch * heads, *x.shape[2:])

    valid = None if grid.valid is None else grid.valid.repeat_interleave(heads, 0)
    if threshold is not None:
        threshold = threshold if threshold.dim() == 4 else threshold.unsqueeze(-1)
    entries = threshold_entries(threshold)
    thresholds = rows(threshold)
    if thresholds is not None and valid is not None:
        thresholds = torch.where(valid.unsqueeze(-1), thresholds, 1.0)
    tokens = Tokens(
        grid.to_rows(q), grid.to_rows(k), grid.to_rows(v), grid.to_rows(theta), rows(eta), rows(alpha),
        valid, rows(omega), thresholds, rows(step),
    )  # fmt: skip
    retention = make_retention(spec)
    has_target = spec.decay == "initial" and (alpha is not None or spec.pools)
    fresh = MemoryState.fresh(tuple(initial), 1, eta is not None, spec, entries)
    # A document begins with the weights and the momentum of `start`, at the start of a chunk and of a window.
    begin = fresh
    if start is not None:
        begin = fresh._replace(weights=start.weights, momentum=start.momentum, anchor=start.anchor)
    plan = Walk(
        spec=spec,
        network=make_network(spec.network, spec.activation, len(initial)),
        head=make_head(spec.norm, spec.norm_eps),
        loss=spec.loss(),
        retention=retention,
        norm=Norm(*(None if x is None else merge(x[None, :, None]) for x in (gamma, beta))),
        targets=[merge(retention.accumulator(w)[None]) for w in initial] if has_target else None,
        initial=[merge(w[None]) for w in initial],
        resets=[None if r is None else r.repeat_interleave(heads) for r in grid.resets],
        closes=[c if isinstance(c, bool) else c.repeat_interleave(heads) for c in grid.closes],
    )

    def carried(memory: MemoryState) -> Carried:
        return Carried(
            [merge(w) for w in memory.weights],
            [merge(w) for w in memory.momentum],
            [merge(w) for w in memory.anchor],
            [merge(w) for w in memory.pending],
            None if memory.pooled is None else merge(memory.pooled),
            tuple(merge(x) for x in memory.halo),
        )

    restored = begin._replace(anchor=begin.weights)
    outputs, surprise, last = walk(
        plan, tokens, carried(restored), carried(begin if state is None else state)
    )

    def split(x: Tensor) -> Tensor:
        return x.reshape(batch, heads, *x.shape[1:])

    def own(x: Tensor) -> Tensor:
        """For what a chunk may leave as it was, which shares memory with the state given or another part."""
        return split(x.clone())

    kept = own if spec.granularity == "chunk" else split
    final = MemoryState(
        tuple(map(kept, last.weights)),
        tuple(map(kept, last.momentum)),
        tuple(map(own, last.anchor)),
        grid.phase.clone(),
        tuple(map(split, last.pending)),
        None if last.pooled is None else split(last.pooled),
        tuple(map(split, last.halo)),
    )
    return grid.from_rows(outputs, batch, length), final, grid.from_rows(surprise, batch, length)
