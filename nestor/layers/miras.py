"""Moneta, Yaad and Memora: the memories of MIRAS, with other losses and other ways to keep what they know."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestor.errors import ConfigError
from nestor.layers.neural_memory import OUTPUT_STD, Gates, NeuralMemory, draw_network
from nestor.layers.projections import project_wide
from nestor.ops.neural_memory.retention import make_retention

# softplus of it is 1.
UNIT_SOFTPLUS = math.log(math.e - 1.0)
# Standard deviation of Memora's initial logits. Of a softmax over n of them the sum of squares is about
# exp(LOGIT_STD^2) / n.
LOGIT_STD = 1.0


class LowRankGate(nn.Module):
    """`x W_1 W_2 + b`, `[B, T, d]` to float32 `[B, T, n]` (float64 stays): a gate for every channel."""

    def __init__(self, dim: int, outputs: int, rank: int, bias: float) -> None:
        super().__init__()
        self.start = bias
        self.down = nn.Linear(dim, rank, bias=False)
        self.up = nn.Linear(rank, outputs)

    def initialize(self, std: float) -> None:
        """The hidden row has the variance of normalised inputs; the gates start about equal."""
        nn.init.normal_(self.down.weight, std=self.down.in_features**-0.5)
        nn.init.normal_(self.up.weight, std=std)
        nn.init.constant_(self.up.bias, self.start)

    def forward(self, x: Tensor) -> Tensor:
        return project_wide(project_wide(x, self.down), self.up)


class Miras(NeuralMemory):
    """A memory of MIRAS, arXiv 2504.13173 (spec/neural-memory.md section 4.4): gradient descent without
    momentum, in the block of `NeuralMemory`, with a write step and a forget fraction for every channel.

    Channels are output units of the memory network: its last matrix takes the gates by column, the first
    their mean. Both gates, and the threshold of a loss that has one, are low-rank projections of the input.

    Args:
        dim, heads, depth, expansion, chunk_size, forget, max_step, conv_kernel, output_gate, activation,
            norm, norm_eps, loss_scale, decay, recompute: see `NeuralMemory`. Curvature, over which `max_step`
            stands, includes that of loss and retention.
        rank: of the gates' projections.
        step_bias, forget_bias: of the gates' sigmoids at initialisation.
        read_mode: None: "inclusive" where weights inside of a chunk are linear in what is accumulated, else
            "chunk_start".
        inner_loss, loss_exponent, loss_smooth, loss_sharpness, loss_eps, retention, retention_power,
            retention_dual, simplex_sum: see `MemorySpec`. simplex_sum None: the sum with which a unit key
            gives pre-activations of about unit variance. The threshold of "huber_norm" is one for each head
            and token, that of "huber" and "yaad" one for each channel too: `sqrt(p) softplus(.)`, at first
            sqrt(p), about the length of an error.

    State: as `NeuralMemory`, without momentum. With retention "softmax" `weights` and `anchor` are logits,
    with "lq" the accumulator A.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        *,
        depth: int = 2,
        expansion: float = 4,
        chunk_size: int = 16,
        rank: int = 32,
        forget: bool = True,
        max_step: float = 1.0,
        step_bias: float = -3.0,
        forget_bias: float = -8.0,
        conv_kernel: int = 4,
        output_gate: bool = True,
        activation: str = "gelu",
        norm: str = "residual_layernorm",
        norm_eps: float = 1e-3,
        inner_loss: str = "l2",
        loss_scale: float = 1.0,
        loss_exponent: float = 3.0,
        loss_smooth: bool = False,
        loss_sharpness: float = 10.0,
        loss_eps: float = 1e-6,
        retention: str = "l2",
        retention_power: float = 4.0,
        retention_dual: str = "paper",
        simplex_sum: float | None = None,
        read_mode: str | None = None,
        decay: str = "initial",
        recompute: bool = False,
        rms_norm_eps: float = 1e-6,
    ) -> None:
        if rank < 1:
            raise ConfigError(f"rank is {rank}; it must be at least 1.")
        # Before the parent, which builds the gates and draws the network.
        self.rank, self.retention, self.inner_loss = rank, retention, inner_loss
        super().__init__(
            dim, heads, depth=depth, expansion=expansion, chunk_size=chunk_size, momentum=False,
            forget=forget, max_step=max_step, step_bias=step_bias, forget_bias=forget_bias,
            conv_kernel=conv_kernel, output_gate=output_gate, activation=activation, norm=norm,
            norm_eps=norm_eps, inner_loss=inner_loss, loss_scale=loss_scale, read_mode="chunk_start",
            decay=decay, recompute=recompute, rms_norm_eps=rms_norm_eps,
        )  # fmt: skip
        width = self.head_dim
        if simplex_sum is None:
            simplex_sum = width / math.exp(LOGIT_STD**2 / 2)
        spec = replace(
            self.spec, loss_exponent=loss_exponent, loss_smooth=loss_smooth, loss_sharpness=loss_sharpness,
            loss_eps=loss_eps, retention=retention, retention_power=retention_power,
            retention_dual=retention_dual, simplex_sum=simplex_sum, step_sizes="channel",
            forget_gates="channel",
        )  # fmt: skip
        if read_mode is None:
            read_mode = "inclusive" if make_retention(spec).linear else "chunk_start"
        self.spec = replace(spec, read_mode=read_mode)
        if self.delta_gate is not None:
            self.threshold_entries = 1 if inner_loss == "huber_norm" else width
        self.max_theta /= self._loss_curvature() * self._retention_gain()

    def _add_gates(self) -> None:
        biases = self.gate_biases
        self.theta_gate = LowRankGate(self.dim, self.dim, self.rank, biases["theta"])
        self.alpha_gate = LowRankGate(self.dim, self.dim, self.rank, biases["alpha"]) if self.forget else None
        self.delta_gate = None
        if self.inner_loss in ("huber_norm", "huber", "yaad"):
            outputs = self.heads if self.inner_loss == "huber_norm" else self.dim
            self.delta_gate = LowRankGate(self.dim, outputs, self.rank, UNIT_SOFTPLUS)

    def _open_gates(self, std: float) -> None:
        for gate in (self.theta_gate, self.alpha_gate, self.delta_gate):
            if gate is not None:
                gate.initialize(std)

    def _draw_network(self) -> None:
        if self.retention == "softmax":
            for logits in self.initial:
                nn.init.normal_(logits, std=LOGIT_STD)
        else:
            draw_network(self.initial)

    def initial_weights(self) -> list[Tensor]:
        """Of Memora positive ones: `simplex_sum` times the softmax of the learned logits over the inputs."""
        if self.retention != "softmax":
            return list(self.initial)
        wide = [w if w.dtype == torch.float64 else w.float() for w in self.initial]
        return [self.spec.simplex_sum * torch.softmax(w, -2) for w in wide]

    def gates(self, x: Tensor) -> Gates:
        """theta and alpha `[B, T, H, p]`, delta `[B, T, H]` or `[B, T, H, p]`."""

        def by_head(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, -1))

        theta = by_head(torch.sigmoid(self.theta_gate(x))) * self.max_theta
        alpha = None if self.alpha_gate is None else by_head(torch.sigmoid(self.alpha_gate(x)))
        delta = None
        if self.delta_gate is not None:
            delta = by_head(F.softplus(self.delta_gate(x)) * self.head_dim**0.5)
            delta = delta.squeeze(-1) if self.inner_loss == "huber_norm" else delta
        return Gates(theta, None, alpha, delta=delta)

    def _loss_curvature(self) -> float:
        """Of the loss of an error of one unit a channel, over that of L2."""
        p = self.spec.loss_exponent
        return max(1.0, p * (p - 1.0)) if self.inner_loss == "lp" else 1.0

    def _retention_gain(self) -> float:
        """How much further the weights move than what is accumulated, at the initial weights: Moneta's map
        multiplies by `||A||_q^(2 - q) = ||W||_q^((2 - q) / (3 - q))`. The largest of the matrices'."""
        q = self.spec.retention_power
        if self.retention != "lq" or self.spec.retention_dual != "paper":
            return 1.0
        moment = 2 ** (q / 2) * math.gamma((q + 1) / 2) / math.pi**0.5  # of a standard normal
        norms = []
        for layer, weight in enumerate(self.initial):
            std = OUTPUT_STD if layer == len(self.initial) - 1 else 1.0
            norms.append(std * (moment * weight[0].numel()) ** (1 / q))
        return max(norm ** ((2 - q) / (3 - q)) for norm in norms)
