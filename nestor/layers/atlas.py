"""ATLAS: memories that learn from a window of tokens at each step, on polynomial features of their keys."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from nestor.errors import ConfigError
from nestor.layers.neural_memory import HIDDEN_SQUARE, SLOPE_SQUARE, Gates, NeuralMemory
from nestor.ops.polynomial import polynomial_features

# Of polynomial features of unit keys, with the coefficients 1/i! of degree 0 to 2.
FEATURE_SQUARE = 2.5
# Standard deviation of what the memory answers before it has read anything.
OUTPUT_SCALE = 0.5


class Atlas(NeuralMemory):
    """OmegaNet, Atlas and Atlas++, arXiv 2505.23735 (spec/neural-memory.md section 5), in the block of
    `NeuralMemory`.

    Each token takes a step on the losses of the last `window` tokens, each with its gate in [0, 1],
    `sigmoid(w . x_i)` of the token i that is learned (Omega rule). With Muon the momentum is orthogonalised
    once, at the end of a chunk, by five Newton-Schulz steps, and added with a learned size; reads inside of
    the chunk see plain steps.

    The memory reads polynomial features of degree 2 of queries and keys, D = (m + 1)(m + 2) / 2 of them for
    keys of width m. Papers do not say how they keep D small; here keys are projected to m = 16 (D = 153),
    whatever the width of values. Since D is not that width, f has neither a residual nor the norm on it;
    what is read is normalised behind the memory, as always.

    Args:
        dim, heads, depth, expansion, chunk_size, momentum, forget, max_step, step_bias, momentum_bias,
            forget_bias, conv_kernel, output_gate, activation, loss_scale, read_mode, decay, recompute: see
            `NeuralMemory`. max_step None: 2 / chunk_size, at most 1. Without a norm nothing bounds errors: a
            chunk of equal keys, of which none sees what the others write, must not overshoot. Steps are
            divided by the window, in which every token is learned that often.
        key_width: m. degree: 2, or 1 for the keys themselves.
        window: tokens c; 1 is the rule of Titans. omega_bias: of the gates' sigmoid.
        muon: needs momentum. max_muon_step, muon_bias: the largest size of orthogonalised steps, and the bias
            of the sigmoid that multiplies it.
        network: "mlp", or "gated", f(x) = (phi(x W0) * (x W2)) W1 (Atlas++), of depth 2.

    State: as `NeuralMemory`; with a window of c, `halo.0|1|2`, its last c - 1 keys, values and gates; with
    Muon, `pooled` `[B, H, 4]`, sums of gates in the open chunk.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        *,
        depth: int = 2,
        expansion: float = 4,
        chunk_size: int = 64,
        key_width: int = 16,
        degree: int = 2,
        window: int = 8,
        muon: bool = True,
        network: str = "mlp",
        momentum: bool = True,
        forget: bool = True,
        max_step: float | None = None,
        max_muon_step: float = 1.0,
        step_bias: float = 0.0,
        momentum_bias: float = 0.0,
        forget_bias: float = -8.0,
        omega_bias: float = 0.0,
        muon_bias: float = -2.0,
        conv_kernel: int = 4,
        output_gate: bool = True,
        activation: str = "gelu",
        loss_scale: float = 1.0,
        read_mode: str = "inclusive",
        decay: str = "initial",
        recompute: bool = False,
        rms_norm_eps: float = 1e-6,
    ) -> None:
        if degree not in (1, 2) or key_width < 1:
            raise ConfigError(
                f"degree is {degree}, key_width {key_width}; 1 or 2, and at least 1, are wanted."
            )
        if muon and not momentum:
            raise ConfigError("muon is True and momentum False; Muon orthogonalises the momentum: set both.")
        if network == "gated" and depth != 2:
            raise ConfigError(f"depth is {depth}; a gated network has depth 2.")
        if max_step is None:
            max_step = min(1.0, 2.0 / chunk_size)
        # Before the parent, which builds gates and network.
        self.key_width, self.degree, self.network = key_width, degree, network
        self.window, self.muon = window, muon
        self.gate_biases = {"omega": omega_bias, "step": muon_bias}
        super().__init__(
            dim, heads, depth=depth, expansion=expansion, chunk_size=chunk_size, momentum=momentum,
            forget=forget, max_step=max_step, step_bias=step_bias, momentum_bias=momentum_bias,
            forget_bias=forget_bias, conv_kernel=conv_kernel, output_gate=output_gate, activation=activation,
            norm="none", loss_scale=loss_scale, read_mode=read_mode, decay=decay, recompute=recompute,
            rms_norm_eps=rms_norm_eps,
        )  # fmt: skip
        optimizer = "muon" if muon else "gd"
        self.spec = replace(self.spec, window=window, network=network, optimizer=optimizer)
        self.max_muon_step = max_muon_step
        self.max_theta = max_step / (loss_scale * self._curvature() * window)

    @property
    def _key_square(self) -> float:
        """Square of the length of what the memory network reads."""
        return FEATURE_SQUARE if self.degree == 2 else 1.0

    def _curvature(self) -> float:
        """Curvature, about, of a token's L2 loss in the initial weights: of each matrix, the square of what
        goes into it times that of the gain from there to the output."""
        layers = len(self.initial)
        if layers == 1:
            return self._key_square
        hidden = self.initial[0].shape[-1]
        row, slope = HIDDEN_SQUARE * hidden, OUTPUT_SCALE**2 * SLOPE_SQUARE / HIDDEN_SQUARE
        if self.network == "gated":
            return row + self._key_square * (slope + OUTPUT_SCALE**2)
        return row * (1.0 + (layers - 2) * slope) + self._key_square * slope

    def _key_widths(self) -> tuple[int, int]:
        width = self.key_width
        return width, (width + 1) * (width + 2) // 2 if self.degree == 2 else width

    def _matrices(self, widths: list[int]) -> list[tuple[int, int]]:
        layers = list(pairwise(widths))
        return [*layers, layers[0]] if self.network == "gated" else layers

    def _gate_names(self) -> list[str]:
        return super()._gate_names() + ["omega"] * (self.window > 1) + ["step"] * self.muon

    def _add_gates(self) -> None:
        super()._add_gates()
        # Logarithms of a_0, a_1, a_2 in phi(q) . phi(k) = sum a_i (q . k)^i.
        self.log_coefficients = nn.Parameter(torch.empty(3)) if self.degree == 2 else None

    def _draw_network(self) -> None:
        """Pre-activations of unit variance, outputs of OUTPUT_SCALE: values are about as large."""
        output = 1 if self.network == "gated" else len(self.initial) - 1
        for layer, weight in enumerate(self.initial):
            reads_keys = layer == 0 or layer > output
            square = self._key_square if reads_keys else HIDDEN_SQUARE * weight.shape[-2]
            nn.init.normal_(weight, std=(OUTPUT_SCALE if layer == output else 1.0) / square**0.5)
        if self.log_coefficients is not None:
            nn.init.zeros_(self.log_coefficients)
            nn.init.constant_(self.log_coefficients[2:], math.log(0.5))

    def _stream(self, name: str, *arguments: Any) -> Tensor:
        y = super()._stream(name, *arguments)
        if name == "v" or self.log_coefficients is None:
            return y
        return polynomial_features(y, self.log_coefficients.to(y.dtype).exp())

    def gates(self, x: Tensor) -> Gates:
        """Gates `[B, T, H]`, of the window and the orthogonalised step too."""
        gates = super().gates(x)
        if gates.step is not None:
            gates.step = gates.step * self.max_muon_step
        return gates
