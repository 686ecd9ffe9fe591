"""Titans MAC: attention inside segments, with what the memory recalls as extra context."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nestor.errors import ConfigError
from nestor.layers.attention import append, attend, keep_recent
from nestor.layers.neural_memory import LayerState, NeuralMemory, memory_from_config
from nestor.layers.norm import RMSNorm
from nestor.layers.registry import register_mixer
from nestor.layers.rotary import rotary_table, rotate
from nestor.layers.span import Span
from nestor.layers.substate import join_states, part_of
from nestor.layers.writes import joined_writes
from nestor.ops.neural_memory.layout import chunk_grid


class MemoryAsContext(nn.Module):
    """Titans, arXiv 2501.00663, equations 21-25, made causal as spec/neural-memory.md section 3.2 derives.

    For each segment X of `segment_size` tokens, with M the memory before it:

        h = M(X W_Q)                    retrieval, at the weights of the segment's start
        y = Attn([P | h | X])           token i sees P, and h_j, x_j of its segment for j <= i
        M is written with y; o_i = y_i * sigmoid(RMSNorm(M_i(y_i)))

    Two traps are closed: h_j depends on token j, so it is hidden from tokens before j; and the gate reads the
    memory after its own token, not after the whole segment. h_j shares the rotary position of x_j; P has
    none. The segments of a document are walked in order, since each reads what the one before it wrote.

    State: `memory.*`; `query_tail` of the retrieval's convolution; `segment.l`, the memory's weights at the
    start of the open segment; `cache.key|value` and `cache.memory_key|memory_value` of its tokens; `clock`.
    """

    def __init__(
        self,
        memory: NeuralMemory,
        segment_size: int,
        heads: int,
        kv_heads: int | None = None,
        persistent_tokens: int = 0,
        rope_theta: float = 10_000.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        dim, kv_heads = memory.dim, heads if kv_heads is None else kv_heads
        chunk = memory.spec.chunk_size
        if segment_size < 1 or segment_size % chunk:
            raise ConfigError(
                f"segment_size is {segment_size}; it must be a multiple of the memory's chunk_size {chunk}."
            )
        if dim % heads or heads % kv_heads:
            raise ConfigError(
                f"width {dim}, {heads} heads, {kv_heads} key-value heads: each must divide the last."
            )
        self.memory, self.segment_size = memory, segment_size
        self.heads, self.kv_heads, self.head_dim, self.rope_theta = heads, kv_heads, dim // heads, rope_theta
        self.q_proj = nn.Linear(dim, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, dim, bias=False)
        self.retrieved_norm, self.gate_norm = RMSNorm(dim, norm_eps), RMSNorm(dim, norm_eps)
        self.persistent = nn.Parameter(torch.empty(persistent_tokens, dim)) if persistent_tokens else None
        self.initialize(0.02)

    def initialize(self, std: float) -> None:
        """Persistent tokens are drawn at the scale of normalised inputs."""
        if self.persistent is not None:
            nn.init.normal_(self.persistent)

    def forward(
        self, x: Tensor, state: LayerState | None = None, span: Span | None = None
    ) -> tuple[Tensor, LayerState]:
        """`[B, T, d]` to `[B, T, d]` and the state after the call."""
        batch, length, _ = x.shape
        if span is None:
            span = Span.build(None if state is None else state["clock"], batch, length, x.device)
        clock = None if state is None else state["clock"]
        phase = None if clock is None else clock % self.segment_size
        grid = chunk_grid(batch, length, self.segment_size, x.device, phase, span.valid, span.resets)
        rows = grid.gather(x)
        clock = torch.zeros(batch, dtype=torch.int64, device=x.device) if clock is None else clock
        state = self._fresh(batch, x) if state is None else state
        outputs = []
        with joined_writes(lambda parts: grid.scatter(torch.stack(parts, 1), length)):
            for n in range(grid.rows):
                lengths = None if grid.valid is None else grid.valid[:, n].sum(1)
                resets = grid.resets[n]
                if resets is not None:
                    clock = torch.where(resets, 0, clock)
                    state = self._restart(state, resets, x)
                segment = Span.build(clock, batch, grid.width, x.device, lengths)
                y, state = self._segment(rows[:, n], state, segment)
                state = self._close(state, grid.closes[n])
                clock = state["clock"]
                outputs.append(y)
        return grid.scatter(torch.stack(outputs, 1), length), state

    def _segment(self, x: Tensor, state: LayerState, span: Span) -> tuple[Tensor, LayerState]:
        """Tokens of one segment, or of the rest of it: `[B, C, d]`."""
        memory_state = part_of(state, "memory")
        retrieval = {"tail.q": state["query_tail"]} if "query_tail" in state else None
        recalled, tails = self.memory.queries(x, retrieval, span)
        weights = [state[f"segment.{layer}"] for layer in range(self.memory.depth)]
        h = self.retrieved_norm(self.memory.read(recalled, weights).to(x.dtype).flatten(-2))

        table = rotary_table(span.position, self.head_dim, self.rope_theta, x.dtype)
        query = rotate(self.q_proj(x).unflatten(-1, (self.heads, self.head_dim)), table)
        pairs = {}
        for name, source in (("", x), ("memory_", h)):
            key, value = self._key_value(source)
            pairs[f"cache.{name}key"] = append(state.get(f"cache.{name}key"), rotate(key, table))
            pairs[f"cache.{name}value"] = append(state.get(f"cache.{name}value"), value)
        prefix_key = prefix_value = None
        if self.persistent is not None:
            prefix_key, prefix_value = self._key_value(self.persistent.to(x.dtype))
        # Stream index of the segment's first token; every token of the call is in the same segment.
        index = torch.arange(x.shape[1], device=x.device)
        first = (index - span.position % self.segment_size).expand(x.shape[0], -1)
        first = torch.minimum(first, index)
        if span.lengths is not None:
            first = torch.where(index < span.lengths[:, None], first, index)
        y = self.o_proj(
            attend(
                query,
                [pairs["cache.memory_key"], pairs["cache.key"]],
                [pairs["cache.memory_value"], pairs["cache.value"]],
                first_visible=first,
                prefix_key=prefix_key,
                prefix_value=prefix_value,
            ).flatten(2)
        )
        m, memory_state = self.memory(y, memory_state, span)
        after = {name: keep_recent(pair, span, self.segment_size - 1) for name, pair in pairs.items()}
        after |= {key: value for key, value in state.items() if key.startswith("segment.")}
        after |= {"query_tail": tails["tail.q"]} if tails else {}
        after["clock"] = span.clock_after()
        return y * torch.sigmoid(self.gate_norm(m)), {**after, **join_states(memory=memory_state)}

    def _key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = (self.kv_heads, self.head_dim)
        return self.k_proj(x).unflatten(-1, shape), self.v_proj(x).unflatten(-1, shape)

    def _fresh(self, batch: int, x: Tensor) -> LayerState:
        """The state that a document begins with."""
        memory = self.memory.fresh_state(batch, x)
        state = join_states(memory=memory)
        state |= {f"segment.{layer}": memory[f"weights.{layer}"] for layer in range(self.memory.depth)}
        if "tail.q" in memory:
            state["query_tail"] = memory["tail.q"]
        state["clock"] = torch.zeros(batch, dtype=torch.int64, device=x.device)
        return state

    def _restart(self, state: LayerState, resets: Tensor, x: Tensor) -> LayerState:
        """Rows that start a document begin afresh; their cached tokens are out of sight by the clock."""
        fresh = self._fresh(1, x)

        def choose(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(resets.reshape(-1, *[1] * (old.dim() - 1)), new.to(old.dtype), old)

        return {**state, **{key: choose(value, state[key]) for key, value in fresh.items()}}

    def _close(self, state: LayerState, closed: bool | Tensor) -> LayerState:
        """At the end of a segment the memory as it now is becomes what the next segment retrieves from."""
        if closed is False:
            return state
        moved = {}
        for layer in range(self.memory.depth):
            weights, old = state[f"memory.weights.{layer}"], state[f"segment.{layer}"]
            flag = None if closed is True else closed.reshape(-1, 1, 1, 1)  # type: ignore[union-attr]
            moved[f"segment.{layer}"] = weights if flag is None else torch.where(flag, weights, old)
        return {**state, **moved}


@register_mixer("memory_as_context")
def build_memory_as_context(config: Any, layer_index: int) -> MemoryAsContext:
    """MAC with the configuration's segments, heads, persistent tokens and memory."""
    return MemoryAsContext(
        memory_from_config(config, config.memory, output_gate=False),
        config.segment_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.persistent_tokens,
        config.rope_theta,
        config.rms_norm_eps,
    )
