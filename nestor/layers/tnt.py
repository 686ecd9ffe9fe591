"""TNT: a global memory with long chunks, and local ones with short chunks that start anew every shard."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nestor.errors import ConfigError, suggest
from nestor.layers.neural_memory import LayerState, NeuralMemory, draw_network, memory_from_config
from nestor.layers.projections import project_wide
from nestor.layers.registry import register_mixer
from nestor.layers.span import Span
from nestor.layers.substate import part_of
from nestor.layers.walking import pack, read_and_write
from nestor.layers.writes import report_write
from nestor.ops.beside import Beside
from nestor.ops.neural_memory import MemoryState
from nestor.ops.query_projection import MODES, query_projection

PROJECTIONS = (*MODES, "none")
# What the global memory is for: no momentum, no forgetting, reads that wait for nothing in their chunk.
FIXED = {"momentum": False, "forget": False, "read_mode": "chunk_start"}
Tokens = tuple[Tensor, ...]  # [B, T, ...] each


class Learned:
    """What a memory learns outside of sequences, as views: their gradients pass the queue in which this is
    made, for which they may be read before the end of a backward (FSDP2 does)."""

    def __init__(self, memory: NeuralMemory) -> None:
        gamma, beta = memory.memory_gamma, memory.memory_beta
        self.initial = [w.view_as(w) for w in memory.initial]
        self.memory_gamma = None if gamma is None else gamma.view_as(gamma)
        self.memory_beta = None if beta is None else beta.view_as(beta)


class LocalMemory(nn.Module):
    """What one local memory learns outside of sequences: initial weights, norm, write step; see `TNT`."""

    def __init__(self, memory: NeuralMemory, chunk_size: int) -> None:
        super().__init__()
        self.spec = replace(memory.spec, chunk_size=chunk_size, read_mode="inclusive")
        self.heads, self.max_theta = memory.heads, memory.max_theta
        self.step_bias = memory.gate_biases["theta"]
        self.step_proj = nn.Linear(memory.dim, memory.heads)
        self.initial = nn.ParameterList(nn.Parameter(torch.empty_like(w)) for w in memory.initial)
        has_norm = memory.memory_gamma is not None
        self.memory_gamma = nn.Parameter(torch.ones(memory.heads, memory.head_dim)) if has_norm else None
        self.memory_beta = nn.Parameter(torch.zeros(memory.heads, memory.head_dim)) if has_norm else None
        self.initialize(0.02)

    def initialize(self, std: float) -> None:
        """As the memory of `NeuralMemory` starts."""
        nn.init.constant_(self.step_proj.bias, self.step_bias)
        draw_network(self.initial)
        if self.memory_gamma is not None and self.memory_beta is not None:
            nn.init.ones_(self.memory_gamma)
            nn.init.zeros_(self.memory_beta)

    def theta(self, x: Tensor) -> Tensor:
        """The write step `[B, T, H]` from the layer's input `[B, T, d]`, in float32 (float64 stays)."""
        return torch.sigmoid(project_wide(x, self.step_proj)) * self.max_theta


class TNT(nn.Module):
    """`o_t = f(V_xi(t); q_t) + sum_i f(W_t^(i); q_t Pi_t)`, TNT, arXiv 2511.07343 (spec section 6).

    The global memory V reads everything, in chunks of `memory.spec.chunk_size` tokens, and answers from the
    weights at the start of the chunk. Each local memory W^(i) goes back to its own learned initial weights
    every `shard_size` tokens of a document, and answers from its newest weights, queries projected onto the
    keys of the shard. All learn by gradient descent with a learned step per token, without momentum and
    without forgetting. Projections, convolutions, norm and gate around them are those of `NeuralMemory`.

    The paper's printed local rule starts from W_{t-1} and sums from the chunk's start, which counts steps
    twice; here all gradients of a chunk are taken at, and added to, the weights at its start.

    Args:
        memory: the global memory, which has no momentum, does not forget, and reads at "chunk_start". Its
            write step is the smaller the longer its chunk, by `min(1, p / chunk_size)`: that many tokens
            write without seeing each other's writes.
        local_chunk_sizes: one local memory each. They change the function but no parameter: the second stage
            of training goes on with smaller ones.
        shard_size: tokens S_L from one start of the local memories to the next.
        projection: "raw", "unit", "trace" (see `query_projection`), or "none", plain queries.

    State (`[B, ...]`): that of the global memory as `memory.*`, of the local ones as `local.i.*`;
    `projection` float32 `[B, H, p, p]`, Pi; `position` int64 `[B]`, tokens of the open shard.

    Raises:
        ConfigError: an impossible combination.
    """

    def __init__(
        self,
        memory: NeuralMemory,
        local_chunk_sizes: tuple[int, ...] | list[int] = (8, 32),
        shard_size: int = 2048,
        projection: str = "unit",
    ) -> None:
        super().__init__()
        for name, wanted in FIXED.items():
            seen = memory.spec.read_mode if name == "read_mode" else getattr(memory, name)
            if seen != wanted:
                raise ConfigError(f"{name} of the global memory is {seen!r}; TNT needs {wanted!r}.")
        if shard_size < 1:
            raise ConfigError(f"shard_size is {shard_size}; it must be at least 1.")
        if projection not in PROJECTIONS:
            known = ", ".join(map(repr, PROJECTIONS))
            raise ConfigError(
                f"projection is {projection!r}; it must be one of {known}. {suggest(projection, PROJECTIONS)}"
            )
        self.memory, self.shard_size, self.projection = memory, shard_size, projection
        self.global_share = min(1.0, memory.head_dim / memory.spec.chunk_size)
        self.locals = nn.ModuleList(LocalMemory(memory, size) for size in local_chunk_sizes)

    def forward(
        self, x: Tensor, state: LayerState | None = None, span: Span | None = None
    ) -> tuple[Tensor, LayerState]:
        """`[B, T, d]` to `[B, T, d]` and the state after the call."""
        if span is None:
            span = Span.build(None, x.shape[0], x.shape[1], x.device)
        own = part_of(state, "memory")
        q, k, v, gate, gates, after, thetas = self.memory.inputs(x, own, span, None, list(self.locals))
        theta = gates.theta if self.global_share == 1.0 else gates.theta * self.global_share
        # One chunk after another is little work at a time, all shards side by side are much.
        beside = Beside(q, k, v, theta, worth=x.shape[1] > 1)
        learned = Learned(self.memory)
        with beside:
            y, memory, writes = read_and_write(
                learned, self.memory.spec, (q, k, v, theta), own, span.valid, span.resets
            )
        after |= memory
        state_after = {f"memory.{name}": tensor for name, tensor in after.items()}
        near: Tokens = ()
        if len(self.locals):
            near, local_state = self._shards((q, k, v, *thetas), state, span)
            state_after |= local_state
        beside.join(y, *memory.values(), *writes)
        if near:
            y, writes = y + near[0], [*writes, *near[1:]]
        for strength in writes:
            report_write(strength)
        return self.memory._output(y, gate, x.dtype), state_after

    def _shards(self, tokens: Tokens, state: LayerState | None, span: Span) -> tuple[Tokens, LayerState]:
        """What the local memories answer, and their state. Tokens as in `_shard`."""
        batch, length = span.shape
        size = self.shard_size
        position = None if state is None else state["position"]
        shard = Span.build(position, batch, length, tokens[0].device, span.lengths, span.resets)
        after = shard.clock_after() % size
        begins = shard.position % size == 0
        if span.valid is not None:
            begins = begins & span.valid
        plain = span.lengths is None and span.resets is None
        # Looking at positions waits for a GPU, so only where shards may be whole.
        aligned = plain and (state is None or (length > size and not bool((state["position"] % size).any())))
        if aligned:
            answers, now = self._whole_shards(tokens)
        elif length == 1 and state is not None:
            fresh = self._fresh(batch)
            opened = {
                name: torch.where(begins[:, 0].reshape(-1, *[1] * (tensor.dim() - 1)), tensor, state[name])
                for name, tensor in fresh.items()
            }
            answers, now = self._shard(tokens, opened, span.valid, None)
        else:
            answers, now = self._shard(tokens, state, span.valid, begins)
        return answers, {**now, "position": after}

    def _whole_shards(self, tokens: Tokens) -> tuple[Tokens, LayerState]:
        """Shards that begin with the first token, side by side as one batch: no state crosses them."""
        batch, length = tokens[0].shape[:2]
        whole, size = length // self.shard_size, self.shard_size
        parts: list[Tokens] = []
        state: LayerState = {}
        if whole:
            folded = tuple(x[:, : whole * size].unflatten(1, (whole, size)).flatten(0, 1) for x in tokens)
            answers, ends = self._shard(folded, None, None, None)
            parts.append(tuple(x.unflatten(0, (batch, whole)).flatten(1, 2) for x in answers))
            state = {name: tensor.unflatten(0, (batch, whole))[:, -1] for name, tensor in ends.items()}
        if length > whole * size:
            answers, state = self._shard(tuple(x[:, whole * size :] for x in tokens), None, None, None)
            parts.append(answers)
        if len(parts) == 1:
            return parts[0], state
        return tuple(torch.cat(same, 1) for same in zip(*parts, strict=True)), state

    def _shard(
        self, tokens: Tokens, state: LayerState | None, mask: Tensor | None, begins: Tensor | None
    ) -> tuple[Tokens, LayerState]:
        """Walk q, k, v `[B, T, H, p]` and each local memory's theta `[B, T, H]`, starting anew at `begins`.

        Returns the sum of the local answers, and how hard each wrote if writes are recorded.
        """
        q, k, v, *thetas = tokens
        after: LayerState = {}
        queries = q
        if self.projection != "none":
            carried = None if state is None else state["projection"]
            queries, after["projection"] = query_projection(
                q, k, carried, mode=self.projection, mask=mask, resets=begins
            )
        answers: list[Tensor] = []
        strengths: list[Tensor] = []
        for index, (local, theta) in enumerate(zip(self.locals, thetas, strict=True)):
            own = part_of(state, f"local.{index}")
            y, memory, written = read_and_write(local, local.spec, (queries, k, v, theta), own, mask, begins)  # type: ignore[arg-type]
            answers.append(y)
            strengths += written
            after |= {f"local.{index}.{name}": tensor for name, tensor in memory.items()}
        return (sum(answers[1:], answers[0]), *strengths), after

    def _fresh(self, batch: int) -> LayerState:
        """The local state with which a shard begins."""
        state: LayerState = {}
        for index, local in enumerate(self.locals):
            wide = [w if w.dtype == torch.float64 else w.float() for w in local.initial]  # type: ignore[union-attr]
            fresh = MemoryState.fresh(tuple(wide), batch, False)
            state |= {f"local.{index}.{name}": tensor for name, tensor in pack(fresh).items()}
        if self.projection != "none":
            heads, width = self.memory.heads, self.memory.head_dim
            state["projection"] = wide[0].new_zeros(batch, heads, width, width)
        return state


@register_mixer("tnt")
def build_tnt(config: Any, layer_index: int) -> TNT:
    """TNT from the `memory` arguments of the configuration: its own, and those of the global memory."""
    arguments = dict(config.memory or {})
    for name, wanted in {"kind": "titans", **FIXED}.items():
        if arguments.pop(name, wanted) != wanted:
            raise ConfigError(f"{name} cannot be set in TNT; it is {wanted!r}. Leave it out.")
    own = {
        name: arguments.pop(name)
        for name in ("local_chunk_sizes", "shard_size", "projection")
        if name in arguments
    }
    return TNT(memory_from_config(config, {"chunk_size": 2048, **arguments}, **FIXED), **own)
