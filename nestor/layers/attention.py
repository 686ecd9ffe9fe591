"""Grouped-query attention, full or over a sliding window, with persistent key-value pairs.

All of it runs through PyTorch: `scaled_dot_product_attention`, or FlexAttention where asked for on a GPU.
This file decides which keys a query sees, and keeps the masks small. Tokens are addressed by their stream
index: the tokens of a call are 0 .. T-1, cached ones are negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestor.errors import ConfigError, ShapeError
from nestor.layers.convolution import ShortConvolution, start_projections
from nestor.layers.norm import RMSNorm
from nestor.layers.registry import register_mixer
from nestor.layers.rotary import rotary_table, rotate
from nestor.layers.span import Span

# Entries of one explicit mask; longer calls are cut into stretches of queries.
MASK_BUDGET = 1 << 24


def attend(
    query: Tensor,
    key: Tensor | Sequence[Tensor],
    value: Tensor | Sequence[Tensor],
    *,
    first_visible: Tensor | None = None,
    window: int | None = None,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    implementation: str = "sdpa",
) -> Tensor:
    """Causal attention of T queries on the last S tokens of a stream and on an input-independent prefix.

    The last T of the S keys belong to the tokens of the queries, the S - T before them to tokens of earlier
    calls. Query i sees key j if `j <= i`, `i - j < window` and `j >= first_visible[i]`, and sees all of the
    prefix. It must be allowed to see itself. Time and memory are linear in T for a window, and quadratic in
    time only otherwise.

    Args:
        query: `[B, T, H, p]`.
        key, value: `[B, S, Hkv, p]`, Hkv a divisor of H; or a sequence of such tensors, several pairs a
            token, each visible by the same rule.
        first_visible: `[B, T]` int64 stream index of the first token that a query may see; None: every key.
        window: number of tokens a query sees, itself included; None: no limit.
        prefix_key, prefix_value: `[N, Hkv, p]`, visible from everywhere.
        implementation: `sdpa`, or `flex_attention` to run masked attention on CUDA through FlexAttention.

    Returns:
        `[B, T, H, p]`.
    """
    keys = [key] if isinstance(key, Tensor) else list(key)
    values = [value] if isinstance(value, Tensor) else list(value)
    _, length, heads, _ = query.shape
    stored = keys[0].shape[1]
    if stored < length or heads % keys[0].shape[2]:
        raise ShapeError(
            f"keys {list(keys[0].shape)} do not fit queries {list(query.shape)}: there must be at least as "
            f"many keys as queries, and a number of key heads that divides the query heads"
        )
    prefix = None
    if prefix_key is not None and prefix_value is not None and len(prefix_key):
        prefix = (prefix_key, prefix_value)
    if window is not None and window >= stored:
        window = None
    if window is None and first_visible is None and stored == length and len(keys) == 1:
        return _causal(query, keys[0], values[0], prefix)
    if implementation == "flex_attention" and query.is_cuda and length > 1:
        from nestor.layers.flex import attend_flex

        return attend_flex(query, keys, values, first_visible, window, prefix)
    if window is not None and length > window:
        return _blocked(query, keys, values, first_visible, window, prefix)
    return _masked(query, keys, values, first_visible, window, prefix)


Prefix = tuple[Tensor, Tensor] | None


def _causal(query: Tensor, key: Tensor, value: Tensor, prefix: Prefix) -> Tensor:
    """A whole stream from its start, which needs no mask."""
    if prefix is None:
        return _scaled_dot_product(query, key, value, None)
    # The prefix stands before the first token with queries of its own, whose outputs are dropped: the plain
    # causal rule then shows it to every token.
    batch, count = query.shape[0], len(prefix[0])
    query = torch.cat((query.new_zeros(batch, count, *query.shape[2:]), query), dim=1)
    key = torch.cat((prefix[0].to(key.dtype).expand(batch, -1, -1, -1), key), dim=1)
    value = torch.cat((prefix[1].to(value.dtype).expand(batch, -1, -1, -1), value), dim=1)
    return _scaled_dot_product(query, key, value, None)[:, count:]


def _masked(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    first_visible: Tensor | None,
    window: int | None,
    prefix: Prefix,
) -> Tensor:
    """Any case, with an explicit mask, one stretch of queries at a time."""
    batch, length = query.shape[:2]
    stored = keys[0].shape[1]
    cached = stored - length
    stretch = max(1, MASK_BUDGET // (stored * (1 if first_visible is None else batch)))
    out = []
    for start in range(0, length, stretch):
        stop = min(length, start + stretch)
        low = 0 if window is None else max(0, cached + start - window + 1)
        high = cached + stop
        row = torch.arange(start, stop, device=query.device)[:, None]
        column = torch.arange(low - cached, high - cached, device=query.device)
        mask = column <= row
        if window is not None:
            mask = mask & (row - column < window)
        mask = mask[None]
        if first_visible is not None:
            mask = mask & (column >= first_visible[:, start:stop, None])
        out.append(
            _visible(
                query[:, start:stop],
                [k[:, low:high] for k in keys],
                [v[:, low:high] for v in values],
                mask,
                prefix,
            )
        )
    return out[0] if len(out) == 1 else torch.cat(out, dim=1)


def _blocked(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    first_visible: Tensor | None,
    window: int,
    prefix: Prefix,
) -> Tensor:
    """A window shorter than the call: blocks of `window` queries, each on its own and the one before."""
    batch, length = query.shape[:2]
    cached = keys[0].shape[1] - length
    blocks = -(-length // window)
    missing = blocks * window - length

    def fold_keys(x: Tensor) -> Tensor:
        x = F.pad(x[:, max(0, cached - window) :], (0, 0, 0, 0, max(0, window - cached), missing))
        x = x.unflatten(1, (blocks + 1, window))
        return torch.cat((x[:, :-1], x[:, 1:]), dim=2).flatten(0, 1)

    row = torch.arange(window, device=query.device)[:, None]
    column = torch.arange(-window, window, device=query.device)
    near = (column <= row) & (row - column < window)
    index = torch.arange(blocks, device=query.device)[:, None] * window + column
    if first_visible is None:
        mask = (near & (index[:, None] >= -cached)).expand(batch, -1, -1, -1)
    else:
        first = F.pad(first_visible.clamp(min=-cached), (0, missing), value=-cached).unflatten(
            1, (blocks, window)
        )
        mask = near & (index[:, None] >= first[..., None])
    folded = F.pad(query, (0, 0, 0, 0, 0, missing)).unflatten(1, (blocks, window)).flatten(0, 1)
    out = _visible(
        folded, [fold_keys(k) for k in keys], [fold_keys(v) for v in values], mask.flatten(0, 1), prefix
    )
    return out.unflatten(0, (batch, blocks)).flatten(1, 2)[:, :length]


def _visible(query: Tensor, keys: list[Tensor], values: list[Tensor], mask: Tensor, prefix: Prefix) -> Tensor:
    """Attention on `[prefix | keys ...]` where `mask` `[1 or N, T, S]` rules each of the key sets."""
    if prefix is not None:
        count = len(prefix[0])
        keys = [prefix[0].to(query.dtype).expand(len(query), -1, -1, -1), *keys]
        values = [prefix[1].to(query.dtype).expand(len(query), -1, -1, -1), *values]
        always = mask.new_ones(()).expand(*mask.shape[:2], count)
        mask = torch.cat((always, *[mask] * (len(keys) - 1)), dim=2)
    elif len(keys) > 1:
        mask = torch.cat([mask] * len(keys), dim=2)
    key = keys[0] if len(keys) == 1 else torch.cat(keys, dim=1)
    value = values[0] if len(values) == 1 else torch.cat(values, dim=1)
    return _scaled_dot_product(query, key, value, mask)


def _scaled_dot_product(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """PyTorch's attention in this file's layout; causal if there is no mask."""
    repeats = query.shape[2] // key.shape[2]
    if repeats > 1:
        # Written out, since the kernels that take a mask do not all group heads themselves.
        key, value = key.repeat_interleave(repeats, dim=2), value.repeat_interleave(repeats, dim=2)
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if mask is None:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] > 1)
    else:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None])
    return out.transpose(1, 2)


def append(cache: Tensor | None, new: Tensor) -> Tensor:
    """A cache `[B, n, ...]` (None: empty) followed by the tokens of a call `[B, T, ...]`."""
    return new if cache is None else torch.cat((cache.to(new.dtype), new), dim=1)


def keep_recent(joined: Tensor, span: Span, limit: int | None = None) -> Tensor:
    """The right-aligned cache that later calls need, out of an old cache followed by the tokens of a call.

    Args:
        joined: `[B, n + T, ...]`, from `append`; its last T entries are left-justified as `span` says.
        limit: entries to keep at most; None keeps all of the current documents.

    Returns:
        `[B, n', ...]`, most recent last. Entries older than a row's current document are zero.
    """
    batch, total = joined.shape[:2]
    if span.lengths is None and span.resets is None:
        # Copied, so that the state does not hold on to the memory of the whole call.
        return joined if limit is None or total <= limit else joined[:, total - limit :].clone()
    clock = span.clock_after()
    keep = int(clock.max()) if limit is None else limit
    keep = min(keep, total)
    slot = torch.arange(keep, device=joined.device)
    end = total if span.lengths is None else total - span.shape[1] + span.lengths[:, None]
    source = (end - keep + slot).expand(batch, keep)
    shape = (batch, keep, *[1] * (joined.dim() - 2))
    kept = joined.gather(1, source.clamp(min=0).reshape(shape).expand(-1, -1, *joined.shape[2:]))
    return kept.masked_fill((slot < keep - clock[:, None]).reshape(shape), 0)


class Attention(nn.Module):
    """Grouped-query causal self-attention with rotary positions: `y = softmax(q k^T / sqrt(p)) v W_o`.

    State: `cache.key`, `cache.value` `[B, n, Hkv, p]` (keys after rotation), `clock` `[B]` int64, the tokens
    of the current document read so far; the last `min(clock, n)` cache entries are theirs. With convolutions
    their tails `tail.q|k|v` `[B, conv_kernel - 1, H p or Hkv p]`.

    Args:
        hidden_size: width `d`.
        heads: query heads `H`.
        kv_heads: key and value heads; None: `heads`.
        window: tokens a query sees, itself included; None: all.
        persistent_tokens: learned key-value pairs visible from everywhere, without positions.
        qk_norm: RMSNorm on each query and key head before the rotation.
        conv_kernel: tokens seen by a short convolution of queries, of keys and of values, from 2 on; 0: none.
            With as many key heads as query heads attention then starts as memories do: a query finds what
            followed the same few tokens before.
        implementation: `sdpa` or `flex_attention` (CUDA only; elsewhere it runs as `sdpa`).

    Raises:
        ConfigError: heads do not divide the width, or the implementation is not known.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        window: int | None = None,
        persistent_tokens: int = 0,
        rope_theta: float = 10_000.0,
        qk_norm: bool = False,
        conv_kernel: int = 0,
        norm_eps: float = 1e-6,
        implementation: str = "sdpa",
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if hidden_size % heads or heads % kv_heads:
            raise ConfigError(
                f"width {hidden_size}, {heads} heads, {kv_heads} key-value heads: each must divide the last"
            )
        if implementation not in ("sdpa", "flex_attention"):
            raise ConfigError(f"attention implementation {implementation!r}; use 'sdpa' or 'flex_attention'")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, hidden_size // heads
        self.window, self.rope_theta, self.implementation = window, rope_theta, implementation
        self.q_proj = nn.Linear(hidden_size, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, norm_eps) if qk_norm else None
        widths = {"q": heads, "k": kv_heads, "v": kv_heads} if conv_kernel else {}
        self.convolutions = nn.ModuleDict(
            {name: ShortConvolution(count * self.head_dim, conv_kernel) for name, count in widths.items()}
        )
        self.prefix_key: nn.Parameter | None = None
        self.prefix_value: nn.Parameter | None = None
        if persistent_tokens:
            self.prefix_key = nn.Parameter(torch.empty(persistent_tokens, kv_heads, self.head_dim))
            self.prefix_value = nn.Parameter(torch.empty(persistent_tokens, kv_heads, self.head_dim))
        self.initialize(0.02)

    def initialize(self, std: float) -> None:
        """Draw the persistent pairs; without convolutions the projections draw their own weights."""
        if self.convolutions and self.heads == self.kv_heads:
            start_projections(self.q_proj, self.k_proj, self.v_proj, self.convolutions)
        if self.prefix_key is not None and self.prefix_value is not None:
            nn.init.normal_(self.prefix_key, std=std)
            nn.init.normal_(self.prefix_value, std=std)

    def forward(
        self,
        x: Tensor,
        state: dict[str, Tensor] | None = None,
        span: Span | None = None,
        prefix: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`[B, T, d]` to `[B, T, d]` and the state after the call.

        prefix: `[N, d]` persistent tokens given by the caller instead of learned here: input vectors whose
        keys and values are visible from everywhere, without positions.
        """
        streams = {"q": self.q_proj(x), "k": self.k_proj(x), "v": self.v_proj(x)}
        tails: dict[str, Tensor] = {}
        if self.convolutions:
            if span is None:
                batch, length, _ = x.shape
                span = Span.build(None if state is None else state["clock"], batch, length, x.device)
            for name, convolution in self.convolutions.items():
                tail = None if state is None else state[f"tail.{name}"]
                streams[name], tails[f"tail.{name}"] = convolution(streams[name], tail, span)
        out, after = self.mix(streams["q"], streams["k"], streams["v"], state, span, prefix)
        return self.o_proj(out), after | tails

    def mix(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        state: dict[str, Tensor] | None = None,
        span: Span | None = None,
        prefix: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`forward` from queries, keys and values `[B, T, H p]` to what is projected out, `[B, T, d]`."""
        batch, length, _ = query.shape
        if span is None:
            span = Span.build(None if state is None else state["clock"], batch, length, query.device)
        query = query.unflatten(-1, (self.heads, self.head_dim))
        key = key.unflatten(-1, (self.kv_heads, self.head_dim))
        value = value.unflatten(-1, (self.kv_heads, self.head_dim))
        prefix_key, prefix_value = self.prefix_key, self.prefix_value
        if prefix is not None:
            prefix_key = self.k_proj(prefix).unflatten(-1, (self.kv_heads, self.head_dim))
            prefix_value = self.v_proj(prefix).unflatten(-1, (self.kv_heads, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
            prefix_key = None if prefix_key is None else self.k_norm(prefix_key)
        table = rotary_table(span.position, self.head_dim, self.rope_theta, query.dtype)
        query, key = rotate(query, table), rotate(key, table)

        keys = append(None if state is None else state["cache.key"], key)
        values = append(None if state is None else state["cache.value"], value)
        out = attend(
            query,
            keys,
            values,
            first_visible=None if state is None and span.resets is None else span.document_start,
            window=self.window,
            prefix_key=prefix_key,
            prefix_value=prefix_value,
            implementation=self.implementation,
        )
        limit = None if self.window is None else self.window - 1
        new_state = {
            "cache.key": keep_recent(keys, span, limit),
            "cache.value": keep_recent(values, span, limit),
            "clock": span.clock_after(),
        }
        return out.flatten(2), new_state


@register_mixer("full_attention")
def build_full_attention(config: Any, layer_index: int) -> Attention:
    """Attention on the whole document."""
    return attention_from_config(config, window=None, conv_kernel=config.attention_conv_kernel)


@register_mixer("sliding_attention")
def build_sliding_attention(config: Any, layer_index: int) -> Attention:
    """Attention on the last `sliding_window` tokens."""
    return attention_from_config(
        config, window=config.sliding_window, conv_kernel=config.attention_conv_kernel
    )


def attention_from_config(
    config: Any, window: int | None, persistent_tokens: int | None = None, conv_kernel: int = 0
) -> Attention:
    """The attention of a layer, by the configuration's head counts, rotation, norms and persistent tokens."""
    return Attention(
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        window=window,
        persistent_tokens=config.persistent_tokens if persistent_tokens is None else persistent_tokens,
        rope_theta=config.rope_theta,
        qk_norm=config.qk_norm,
        conv_kernel=conv_kernel,
        norm_eps=config.rms_norm_eps,
        implementation=getattr(config, "_attn_implementation", None) or "sdpa",
    )
