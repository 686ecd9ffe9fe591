"""Kimi Delta Attention and Gated DeltaNet, baselines on the kernels of flash-linear-attention.

The layers are as in that package's version 0.6.0 (`fla.layers.kda`, `fla.layers.gated_deltanet`), with this
package's convolution. The kernels need a GPU and are imported when such a layer is built.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestor.errors import ConfigError, suggest
from nestor.layers.convolution import ShortConvolution
from nestor.layers.norm import RMSNorm
from nestor.layers.registry import register_mixer
from nestor.layers.span import Span

LayerState = dict[str, Tensor]
KERNELS = {
    "kda": ("fla.ops.kda", "chunk_kda", "fused_recurrent_kda"),
    "gated_deltanet": (
        "fla.ops.gated_delta_rule",
        "chunk_gated_delta_rule",
        "fused_recurrent_gated_delta_rule",
    ),
}
# Up to this many tokens the kernel that goes token by token is the faster one. It has no backward.
RECURRENT_TOKENS = 64
# The chunk kernels take keys of up to this width.
MAX_WIDTH = 256


class Kernels(NamedTuple):
    """Functions of q, k, v `[B, T, H, p]`, log decay g and beta that return outputs and final states."""

    chunk: Callable[..., tuple[Tensor, Tensor]]
    recurrent: Callable[..., tuple[Tensor, Tensor]]


@functools.cache
def load_kernels(kind: str) -> Kernels:
    """The kernels of flash-linear-attention for "kda" or "gated_deltanet".

    Raises:
        ConfigError: the package is missing, or there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            f"the layer {kind!r} needs a CUDA GPU, and there is none: it runs on the kernels of "
            f"flash-linear-attention. Use a machine with a GPU and `pip install nestor[gpu]`"
        )
    module, chunk, recurrent = KERNELS[kind]
    try:
        found = import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"the layer {kind!r} needs flash-linear-attention, which cannot be imported ({error}); "
            f"`pip install nestor[gpu]` brings it"
        ) from error
    return Kernels(getattr(found, chunk), getattr(found, recurrent))


class DeltaAttention(nn.Module):
    """A linear memory under the gated delta rule: with unit keys and `d_t` in (0, 1)

        S_t = d_t S_{t-1} + beta_t k_t^T (v_t - k_t d_t S_{t-1}),      o_t = q_t S_t / sqrt(p).

    "gated_deltanet": one decay `d_t` a head (arXiv 2412.06464), output gate `silu(x W_G)`. "kda": one for
    each channel of the key (Kimi Linear, arXiv 2510.26692), output gate `sigmoid(x W_G1 W_G2)`. In both
    `log d_t = -exp(A) softplus(a(x_t) + b)`, `q, k, v = silu(conv(x W))`, `y = W_O (RMSNorm(o) * gate)`.

    The backward of "gated_deltanet" is refused by its kernels on Hopper GPUs with Triton 3.4 to 3.7.0, where
    it would be wrong.

    Args:
        dim: width `d` of input and output. heads: each with keys of width `p = d / heads`.
        kind: "kda" or "gated_deltanet".
        expand_v: width of a head's values over p.
        conv_kernel: tokens seen by the short convolution on q, k, v.

    State (`[B, ...]`): `recurrent` float32 `[B, H, p, expand_v p]`, and the convolution tails `tail.q|k|v`.

    Raises:
        ConfigError: an impossible combination, or no kernels (see `load_kernels`).
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        kind: str = "kda",
        *,
        expand_v: float = 1,
        conv_kernel: int = 4,
        rms_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if kind not in KERNELS:
            raise ConfigError(f"kind is {kind!r}; it must be one of {', '.join(map(repr, KERNELS))}.")
        if heads < 1 or dim % heads or dim // heads > MAX_WIDTH:
            raise ConfigError(
                f"width {dim} in {heads} heads; heads must divide it into widths of at most {MAX_WIDTH}."
            )
        self.dim, self.heads, self.kind, self.head_dim = dim, heads, kind, dim // heads
        self.value_dim = round(expand_v * self.head_dim)
        if self.value_dim < 1:
            raise ConfigError(f"expand_v is {expand_v}; it must be positive.")
        # Counting parameters on the meta device takes no kernels.
        if torch.get_default_device().type != "meta":
            load_kernels(kind)
        channels = kind == "kda"
        values = heads * self.value_dim
        widths = {"q": dim, "k": dim, "v": values}
        self.projections = nn.ModuleDict(
            {name: nn.Linear(dim, width, bias=False) for name, width in widths.items()}
        )
        self.convolutions = nn.ModuleDict(
            {name: ShortConvolution(width, conv_kernel) for name, width in widths.items()}
        )
        self.beta_proj = nn.Linear(dim, heads, bias=False)
        self.decay_log = nn.Parameter(torch.empty(heads))
        self.decay_bias = nn.Parameter(torch.empty(dim if channels else heads))
        if channels:
            self.decay_proj: nn.Module = _low_rank(dim, self.value_dim, dim, bias=False)
            self.gate_proj: nn.Module = _low_rank(dim, self.value_dim, values, bias=True)
        else:
            self.decay_proj = nn.Linear(dim, heads, bias=False)
            self.gate_proj = nn.Linear(dim, values, bias=False)
        self.out_norm = RMSNorm(self.value_dim, rms_norm_eps)
        self.o_proj = nn.Linear(values, dim, bias=False)
        self.initialize(0.02)

    @torch.no_grad()
    def initialize(self, std: float) -> None:
        """Decays that forget within some ten to some thousand tokens, as the published layers start."""
        self.decay_log.copy_(torch.empty_like(self.decay_log).uniform_(1, 16).log())
        rate = torch.empty_like(self.decay_bias).uniform_(math.log(1e-3), math.log(0.1)).exp()
        # softplus(bias) = rate
        self.decay_bias.copy_(rate + torch.log(-torch.expm1(-rate)))

    def forward(
        self, x: Tensor, state: LayerState | None = None, span: Span | None = None
    ) -> tuple[Tensor, LayerState]:
        """`[B, T, d]` to `[B, T, d]` and the state after the call."""
        if span is None:
            span = Span.build(None, x.shape[0], x.shape[1], x.device)
        after: LayerState = {}
        streams = []
        for name, projection in self.projections.items():
            key = f"tail.{name}"
            convolution = cast(ShortConvolution, self.convolutions[name])
            y, after[key] = convolution(projection(x), None if state is None else state[key], span)
            streams.append(F.silu(y).unflatten(-1, (self.heads, -1)))
        log_decay, beta = self.gates(x, span)
        before = None if state is None else state["recurrent"]
        q, k, v = streams
        y, after["recurrent"] = self._walk(q, k, v, log_decay, beta, before, span)
        gate = self.gate_proj(x)
        gate = torch.sigmoid(gate) if self.kind == "kda" else F.silu(gate)
        return self.o_proj(self.out_norm(y.to(x.dtype)).flatten(-2) * gate), after

    def gates(self, x: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """log d `[B, T, H]` ("kda": `[B, T, H, p]`) and beta `[B, T, H]`, float32 (float64 stays)."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        raw = self.decay_proj(x).to(wide) + self.decay_bias.to(wide)
        rate = self.decay_log.to(wide).exp()
        if self.kind == "kda":
            raw, rate = raw.unflatten(-1, (self.heads, -1)), rate.unsqueeze(-1)
        log_decay, beta = -rate * F.softplus(raw), torch.sigmoid(self.beta_proj(x).to(wide))
        if span.valid is not None:
            # Without momentum, no decay and no write is no step.
            beta = torch.where(span.valid[..., None], beta, 0.0)
            mask = span.valid.reshape(*span.valid.shape, *[1] * (log_decay.dim() - 2))
            log_decay = torch.where(mask, log_decay, 0.0)
        return log_decay, beta

    def _walk(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        before: Tensor | None,
        span: Span,
    ) -> tuple[Tensor, Tensor]:
        """Outputs `[B, T, H, expand_v p]` and the state after the call."""
        kernels = load_kernels(self.kind)
        short = q.shape[1] <= RECURRENT_TOKENS and not torch.is_grad_enabled()
        kernel = kernels.recurrent if short else kernels.chunk
        tokens: dict[str, Any] = {"q": q, "k": k, "v": v, "g": log_decay, "beta": beta}
        options: dict[str, Any] = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
        if span.resets is None:
            tokens = {name: tensor.contiguous() for name, tensor in tokens.items()}
            return kernel(**tokens, initial_state=before, **options)
        # Documents stand one after the other in a single row, as sequences of their own.
        batch, length = span.shape
        starts = span.resets if span.valid is None else span.resets & span.valid
        fresh = starts[:, 0]
        starts = starts.clone()
        starts[:, 0] = True
        sequence = starts.flatten().cumsum(0).unflatten(0, (batch, length)) - 1
        bounds = starts.flatten().nonzero()[:, 0]
        bounds = torch.cat([bounds, bounds.new_tensor([batch * length])])
        shape = (batch, self.heads, self.head_dim, self.value_dim)
        initial = log_decay.new_zeros(len(bounds) - 1, *shape[1:])
        if before is not None:
            kept = torch.where(fresh[:, None, None, None], 0.0, before)
            initial = initial.index_put((sequence[:, 0],), kept)
        packed = {name: tensor.flatten(0, 1).unsqueeze(0) for name, tensor in tokens.items()}
        y, final = kernel(**packed, initial_state=initial, cu_seqlens=bounds, **options)
        return y[0].unflatten(0, (batch, length)), final[sequence[:, -1]]


def _low_rank(dim: int, rank: int, out: int, bias: bool) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, out, bias=bias))


@register_mixer("kda")
def build_kda(config: Any, layer_index: int) -> DeltaAttention:
    """Kimi Delta Attention with the `memory` arguments of the configuration."""
    return _build(config, "kda")


@register_mixer("gated_deltanet")
def build_gated_deltanet(config: Any, layer_index: int) -> DeltaAttention:
    """Gated DeltaNet with the `memory` arguments of the configuration."""
    return _build(config, "gated_deltanet")


def _build(config: Any, kind: str) -> DeltaAttention:
    known = [n for n in list(inspect.signature(DeltaAttention.__init__).parameters)[2:] if n != "kind"]
    for name in config.memory or {}:
        if name not in known:
            raise ConfigError(f"unknown memory setting {name!r}. {suggest(name, known)}".rstrip())
    settings = {"heads": config.num_attention_heads, "rms_norm_eps": config.rms_norm_eps}
    return DeltaAttention(config.hidden_size, kind=kind, **{**settings, **(config.memory or {})})
