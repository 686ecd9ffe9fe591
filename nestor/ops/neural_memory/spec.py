"""What a neural memory is (`MemorySpec`) and what it carries from call to call (`MemoryState`)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nestor.errors import ConfigError, suggest
from nestor.ops.neural_memory.functions import ACTIVATIONS, INNER_LOSSES, NORMS
from nestor.ops.neural_memory.losses import InnerLoss, LossSettings, make_loss

READ_MODES = ("inclusive", "exclusive", "chunk_start")
DECAYS = ("initial", "zero")
GRADIENT_PLACES = ("pre_decay", "post_decay")


@dataclass(frozen=True)
class MemorySpec:
    """The choices that define one memory (spec/neural-memory.md section 1.1).

    chunk_size: tokens that share one anchor. It changes the function, not only the speed: a model must run
        with the chunk size that it was trained with.
    activation: between the layers of the memory network, "gelu" or "silu".
    norm: "none" f = MLP(x); "residual" f = x + MLP(x); "residual_layernorm" f = x + gamma LN(MLP(x)) + beta.
    inner_loss, loss_scale: "l2" is c/2 ||f - v||^2, "dot_product" is -c <f, v>, with c = loss_scale; "lp",
        "l1", "huber", "huber_norm", "yaad" and "worst_case_shift" are in `losses.py`.
    read_mode: which weights query t sees: "inclusive" W_t, "exclusive" W_{t-1}, "chunk_start" the anchor.
    decay: what the forget gate pulls the weights to: their learned "initial" value, or "zero".
    grad_at: the inner gradient is taken at the anchor before ("pre_decay", Titans) or after the token's own
        decay ("post_decay", Gated DeltaNet).
    recompute: backward recomputes the inside of the chunks and keeps only their start states.
    loss_exponent, loss_smooth, loss_sharpness, loss_eps, loss_threshold, loss_shift: see `LossSettings`.
    """

    chunk_size: int = 64
    activation: str = "gelu"
    norm: str = "residual_layernorm"
    norm_eps: float = 1e-3
    inner_loss: str = "l2"
    loss_scale: float = 1.0
    read_mode: str = "inclusive"
    decay: str = "initial"
    grad_at: str = "pre_decay"
    recompute: bool = False
    loss_exponent: float = 3.0
    loss_smooth: bool = False
    loss_sharpness: float = 10.0
    loss_eps: float = 1e-6
    loss_threshold: float = 1.0
    loss_shift: float = 0.1

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise ConfigError(f"chunk_size is {self.chunk_size}; it must be at least 1.")
        if self.norm_eps <= 0 or self.loss_scale <= 0:
            raise ConfigError(
                f"norm_eps is {self.norm_eps} and loss_scale {self.loss_scale}; both must be positive."
            )
        choices = {
            "activation": tuple(ACTIVATIONS),
            "norm": NORMS,
            "inner_loss": tuple(INNER_LOSSES),
            "read_mode": READ_MODES,
            "decay": DECAYS,
            "grad_at": GRADIENT_PLACES,
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(
                    f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}. "
                    f"{suggest(value, allowed)}"
                )
        self.loss()  # refuses impossible settings

    def loss(self) -> InnerLoss:
        """The inner loss with its settings."""
        settings = LossSettings(
            self.loss_exponent, self.loss_smooth, self.loss_sharpness,
            self.loss_eps, self.loss_threshold, self.loss_shift,
        )  # fmt: skip
        return make_loss(self.inner_loss, self.loss_scale, settings)


class MemoryState(NamedTuple):
    """Fast weights of every sequence and head; all that the recurrence needs to go on.

    weights:  one tensor ``[B, H, in, out]`` per layer of the memory network, W_t.
    momentum: the same shapes, S_t; an empty tuple for a memory without momentum.
    anchor:   the same shapes, the weights at the start of the open chunk (equal to `weights` at phase 0).
    phase:    int64 ``[B]``, tokens already read in the open chunk.
    """

    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    anchor: tuple[Tensor, ...]
    phase: Tensor

    @classmethod
    def fresh(cls, initial: tuple[Tensor, ...], batch: int, momentum: bool) -> "MemoryState":
        """W = initial ``[H, in, out]``, S = 0, for `batch` sequences."""
        weights = tuple(w.unsqueeze(0).expand(batch, *w.shape) for w in initial)
        zeros = tuple(torch.zeros_like(w) for w in weights) if momentum else ()
        phase = torch.zeros(batch, dtype=torch.int64, device=initial[0].device)
        return cls(weights, zeros, weights, phase)
