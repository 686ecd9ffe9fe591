"""What a self-modifying memory is (`SelfModifyingSpec`) and what it carries from call to call."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nestor.errors import ConfigError, suggest
from nestor.ops.neural_memory.functions import ACTIVATIONS

# Every memory that there may be, in the order of a state. "mem" is the one that is read.
MEMORIES = ("k", "v", "q", "eta", "alpha", "mem")
GATES = ("eta", "alpha")
LOSSES = ("l2", "dot_product")
READ_MODES = ("running", "anchor")
TARGETS = ("self", "bounded", "value")
STEP_CAPS = ("none", "spectral", "soft")
DECAYS = ("zero", "initial")

Memories = Mapping[str, tuple[Tensor, ...]]  # per memory its matrices


@dataclass(frozen=True)
class SelfModifyingSpec:
    """The choices that define one self-modifying memory (spec/nested-learning.md section c).

    chunk_size: tokens C_m between anchors of the memory that is read, "mem".
    projection_chunk_size: tokens C_o between anchors of all others. One of the two divides the other. Both
        change the function, not only the speed: a model must run with those that it was trained with.
    inner_loss: "l2" is 1/2 ||M(k) - v||^2, "dot_product" is -<M(k), v>.
    targets: "self", v^ = M(v): every memory makes its own; "bounded": the same, and shortened to length 1
        where it is longer, which the paper does not do; "value": v itself, for all (equations 79-82). A
        memory that makes its own targets feeds on itself: of a key k that repeats within chunks of C tokens,
        it multiplies its answer by x + (1 - x) (v.k - 1) a chunk, x = (1 - eta)^C, with the L2 loss and dgd,
        which for v = -k is below -1 where x is below 1/3: it explodes. A bounded target adds to it no more
        than 1 a chunk.
    dgd: whether the decay of a token is alpha I - eta k k^T (delta gradient descent), else alpha I.
    dgd_hidden: the same for the second matrix of a network, by its own input of unit length.
    read_mode: the weights that query t sees: "running" M_{t-1}, or "anchor", those of the chunk's start.
    step_cap: "none"; "spectral", eta <= alpha / ||k||^2; "soft", as well eta <- s (1 - exp(-eta / s)) with
        s = (1 - alpha) / r and r the norm of the gradient of the memories that share a period: it ties
        what is written to what is forgotten, so that no such norm of weights grows above max(1, its first).
    decay: what forgetting leads to, "zero" or "initial", the weights that documents start with:
        W alpha + W_initial (1 - alpha). A memory that makes its own targets cannot learn again what it has
        forgotten of its start: towards zero it fades, sooner with a shorter horizon. The paper has zero.
    max_step, horizon: of a gate that is a memory, eta = max_step sigmoid(.) and
        alpha = exp(-softplus(.) / horizon).
    activation: of networks of two matrices, "silu" or "gelu".
    norm_eps: keys and queries are x / sqrt(||x||^2 + norm_eps).
    recompute: backward recomputes the inside of the chunks and keeps only their start states.
    """

    chunk_size: int = 64
    projection_chunk_size: int = 16
    inner_loss: str = "l2"
    targets: str = "self"
    dgd: bool = True
    dgd_hidden: bool = True
    read_mode: str = "running"
    step_cap: str = "spectral"
    decay: str = "zero"
    max_step: float = 1.0
    horizon: float = 4096.0
    activation: str = "silu"
    norm_eps: float = 1e-6
    recompute: bool = False

    def __post_init__(self) -> None:
        periods = self.chunk_size, self.projection_chunk_size
        if min(periods) < 1 or max(periods) % min(periods):
            raise ConfigError(
                f"chunk_size is {periods[0]} and projection_chunk_size {periods[1]}; both must be at least "
                f"1, and one must divide the other."
            )
        for name in ("max_step", "horizon", "norm_eps"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be positive.")
        choices = {
            "inner_loss": LOSSES,
            "targets": TARGETS,
            "read_mode": READ_MODES,
            "step_cap": STEP_CAPS,
            "decay": DECAYS,
            "activation": tuple(ACTIVATIONS),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(
                    f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}. "
                    f"{suggest(value, allowed)}".rstrip()
                )

    @property
    def longest(self) -> int:
        """The longer of the two periods, after which both begin anew."""
        return max(self.chunk_size, self.projection_chunk_size)

    def period(self, name: str) -> int:
        """Tokens between the anchors of a memory."""
        return self.chunk_size if name == "mem" else self.projection_chunk_size


class Gate(NamedTuple):
    """How a gate is read from its memory: ``sum(M(x) * read) + bias``.

    bias: ``[H]``. read: ``[H, out]``, or None for a memory whose output is one number.
    """

    bias: Tensor
    read: Tensor | None = None


class SelfModifyingState(NamedTuple):
    """All that the recurrence needs to go on.

    weights:  per memory its matrices ``[B, H, in, out]``, M_t.
    momentum: the same shapes, S_t; empty for memories without momentum.
    anchor:   the same shapes, `weights` at the start of the memory's open chunk.
    phase:    int64 ``[B]``, tokens of the document modulo the longer of the two periods.
    """

    weights: dict[str, tuple[Tensor, ...]]
    momentum: dict[str, tuple[Tensor, ...]]
    anchor: dict[str, tuple[Tensor, ...]]
    phase: Tensor

    def ordered(self) -> "SelfModifyingState":
        """With the memories in the order of MEMORIES."""

        def sort(part: dict[str, tuple[Tensor, ...]]) -> dict[str, tuple[Tensor, ...]]:
            return {name: part[name] for name in MEMORIES if name in part}

        return SelfModifyingState(sort(self.weights), sort(self.momentum), sort(self.anchor), self.phase)

    @classmethod
    def fresh(cls, initial: Memories, batch: int, momentum: bool) -> "SelfModifyingState":
        """M = initial ``[H, in, out]``, S = 0, for `batch` sequences."""
        names = [name for name in MEMORIES if name in initial]
        weights = {
            name: tuple(w.unsqueeze(0).expand(batch, *w.shape) for w in initial[name]) for name in names
        }
        zeros = {name: tuple(torch.zeros_like(w) for w in matrices) for name, matrices in weights.items()}
        phase = torch.zeros(batch, dtype=torch.int64, device=initial["mem"][0].device)
        return cls(weights, zeros if momentum else {}, weights, phase)
