"""What a neural memory is (`MemorySpec`) and what it carries from call to call (`MemoryState`)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nestor.errors import ConfigError, suggest
from nestor.ops.neural_memory.functions import ACTIVATIONS, INNER_LOSSES, NORMS
from nestor.ops.neural_memory.losses import InnerLoss, LossSettings, make_loss
from nestor.ops.neural_memory.muon import NEWTON_SCHULZ
from nestor.ops.neural_memory.networks import NETWORKS, make_network
from nestor.ops.neural_memory.retention import DUALS, RETENTIONS, make_retention

READ_MODES = ("inclusive", "exclusive", "chunk_start")
DECAYS = ("initial", "zero")
GRADIENT_PLACES = ("pre_decay", "post_decay")
OPTIMIZERS = ("gd", "muon")
GRANULARITIES = ("token", "chunk")
RENORMALIZATIONS = ("none", "rows")
STEP_SIZES = ("head", "matrix", "channel")
FORGET_GATES = ("head", "channel")


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
    network: "mlp", 1 to 4 matrices in the order of their use; or "gated" (LaCT, section 7.1),
        f(x) = head(x, (phi(x W0) * (x W2)) W1), matrices in the order W0, W1, W2; phi is the activation.
    retention: how the weights follow from what is accumulated (section 4.3, `retention.py`). The forget gate
        acts on the accumulator. "l2": the accumulator is W. "softmax" (Memora): it holds logits, and
        W = simplex_sum softmax of them over the inputs of each output unit. "lq" (Moneta):
        W = A / ||A||_q^(q-2) with q = retention_power as printed (retention_dual "paper"), or the exact
        gradient of ||A||_q^2 / 2 ("exact"). "elastic_net": W is soft-thresholded by retention_threshold at
        every chunk's end; "elastic_net_ftrl": W = Soft(A). "bregman_logit": W = sigmoid(A).
    optimizer: "gd" adds the surprise S to the weights at every token; "muon" adds, at the end of a chunk,
        the Newton-Schulz orthogonalisation of S: W' = A_C W_0 + step NS(S_C) (section 5.2). Reads inside of
        the chunk see what "gd" would have written.
    muon_per_token: W_t = a_t W_{t-1} + step_t NS(S_t) at every token. A p x h matrix per token: for tests.
    newton_schulz: coefficients, "constant" (the same in all five steps) or "scheduled" (LaCT's).
    renormalize: "rows" rescales, at the end of a chunk, the weights into each output unit to their initial
        norm: rows of LaCT's out x in matrices, columns of the in x out matrices here.
    granularity: "token", gates act at every token; "chunk" (semantics B of section 1.2, LaCT): a chunk is one
        step, S' = mean(eta) S - sum theta_t g_t, W' = (1 - mean(alpha)) W + S', nothing before its end.
    window: tokens c whose losses each step descends (Omega rule, section 5.1); 1: the token's own.
    step_sizes: theta is ``[B, T, H]`` ("head"), ``[B, T, H, L]``, one for each matrix ("matrix"), or
        ``[B, T, H, p]`` ("channel"): one for each output unit of the network; its last matrix takes them by
        column, the other matrices their mean (section 4.4). forget_gates: the same for alpha, "head" or
        "channel".
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
    network: str = "mlp"
    retention: str = "l2"
    retention_threshold: float = 0.01
    retention_power: float = 4.0
    retention_dual: str = "paper"
    simplex_sum: float = 1.0
    optimizer: str = "gd"
    muon_per_token: bool = False
    newton_schulz: str = "constant"
    renormalize: str = "none"
    granularity: str = "token"
    window: int = 1
    step_sizes: str = "head"
    forget_gates: str = "head"

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
            "network": NETWORKS,
            "retention": RETENTIONS,
            "retention_dual": DUALS,
            "optimizer": OPTIMIZERS,
            "newton_schulz": tuple(NEWTON_SCHULZ),
            "renormalize": RENORMALIZATIONS,
            "granularity": GRANULARITIES,
            "step_sizes": STEP_SIZES,
            "forget_gates": FORGET_GATES,
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(
                    f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}. "
                    f"{suggest(value, allowed)}"
                )
        self.loss()  # refuses impossible settings
        self._check_numbers()
        self._check_combination()

    def loss(self) -> InnerLoss:
        """The inner loss with its settings."""
        settings = LossSettings(
            self.loss_exponent, self.loss_smooth, self.loss_sharpness,
            self.loss_eps, self.loss_threshold, self.loss_shift,
        )  # fmt: skip
        return make_loss(self.inner_loss, self.loss_scale, settings)

    def _check_numbers(self) -> None:
        if self.window < 1:
            raise ConfigError(f"window is {self.window}; it must be at least 1.")
        if self.retention_threshold < 0 or self.simplex_sum <= 0:
            raise ConfigError(
                f"retention_threshold is {self.retention_threshold} and simplex_sum {self.simplex_sum}; the "
                "first must not be negative, the second must be positive."
            )
        if self.retention == "lq":
            if self.retention_power <= 1:
                raise ConfigError(f"retention_power is {self.retention_power}; it must be above 1.")
            if self.retention_power == 3 and self.retention_dual == "paper":
                raise ConfigError(
                    "retention_power is 3 with retention_dual='paper': W = A / ||A||_3 forgets the scale of "
                    "A, so no A gives the initial weights. Use another power, or retention_dual='exact'."
                )

    def _check_combination(self) -> None:
        """Refuse choices that have no meaning together."""
        inside = self.read_mode != "chunk_start" and self.chunk_size > 1
        reads = f"read_mode is {self.read_mode!r} with chunk_size {self.chunk_size}"
        fix = "use read_mode='chunk_start' or chunk_size=1."
        if inside and self.granularity == "chunk":
            raise ConfigError(f"{reads}; with granularity='chunk' nothing changes inside of a chunk: {fix}")
        if inside and not make_retention(self).linear:
            dual = f" of dual {self.retention_dual!r}" if self.retention == "lq" else ""
            raise ConfigError(
                f"{reads}; retention {self.retention!r}{dual} has no weights inside of a chunk that a masked "
                f"product could read: {fix}"
            )
        if self.grad_at == "post_decay":
            self._refuse_beside("grad_at='post_decay'", retention="l2", granularity="token", window=1,
                                forget_gates="head")  # fmt: skip
        if self.optimizer == "muon" or self.granularity == "chunk":
            one = "optimizer='muon'" if self.optimizer == "muon" else "granularity='chunk'"
            self._refuse_beside(one, forget_gates="head")
        if self.renormalize != "none":
            self._refuse_beside(f"renormalize={self.renormalize!r}", retention="l2")
        if self.muon_per_token:
            self._refuse_beside("muon_per_token=True", optimizer="muon", granularity="token", retention="l2")

    def _refuse_beside(self, choice: str, **wanted: object) -> None:
        for name, value in wanted.items():
            seen = getattr(self, name)
            if seen != value:
                raise ConfigError(f"{choice} needs {name}={value!r}; it is {seen!r}.")

    @property
    def pools(self) -> bool:
        """Whether a step at the chunk's end uses means of the chunk's gates."""
        return self.granularity == "chunk" or (self.optimizer == "muon" and not self.muon_per_token)


class MemoryState(NamedTuple):
    """Fast weights of every sequence and head; all that the recurrence needs to go on.

    weights:  one tensor ``[B, H, in, out]`` per matrix of the memory network, W_t; with a retention other
        than "l2" what its weights are a function of, A_t (`fast_weights` gives W).
    momentum: the same shapes, S_t; an empty tuple for a memory without momentum.
    anchor:   the same shapes, `weights` at the start of the open chunk (equal to them at phase 0).
    phase:    int64 ``[B]``, tokens already read in the open chunk.
    pending:  the same shapes, the open chunk's steps summed; empty unless granularity is "chunk".
    pooled:   ``[B, H, 4]``, of the open chunk: the product of 1 - alpha, and the sums of eta, alpha and step;
        None unless the spec `pools`.
    halo:     the last c - 1 tokens of a window of c: k, v ``[B, H, c-1, p]``, gate ``[B, H, c-1]`` (0 where
        there is no token yet), and the threshold ``[B, H, c-1, 1 or p]`` of losses that have one; else empty.
    """

    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    anchor: tuple[Tensor, ...]
    phase: Tensor
    pending: tuple[Tensor, ...] = ()
    pooled: Tensor | None = None
    halo: tuple[Tensor, ...] = ()

    @classmethod
    def fresh(
        cls,
        initial: tuple[Tensor, ...],
        batch: int,
        momentum: bool,
        spec: MemorySpec | None = None,
        threshold: int = 0,
    ) -> "MemoryState":
        """W = initial ``[H, in, out]``, S = 0, for `batch` sequences.

        spec: needed unless it is of the plain family (retention "l2", granularity "token", optimizer "gd",
        window 1). threshold: entries of a token's loss threshold, 0 for losses without.
        """
        if spec is not None:
            retention = make_retention(spec)
            begin = tuple(map(retention.accumulator, initial))
        else:
            begin = initial
        weights = tuple(w.unsqueeze(0).expand(batch, *w.shape) for w in begin)
        zeros = tuple(torch.zeros_like(w) for w in weights)
        phase = torch.zeros(batch, dtype=torch.int64, device=initial[0].device)
        state = cls(weights, zeros if momentum else (), weights, phase)
        if spec is None:
            return state
        heads, width = initial[0].shape[:2]
        values = initial[make_network(spec.network, spec.activation, len(initial)).output].shape[-1]
        like = weights[0]
        if spec.granularity == "chunk":
            state = state._replace(pending=tuple(torch.zeros_like(w) for w in weights))
        if spec.pools:
            state = state._replace(pooled=nothing_pooled(like.new_empty(batch, heads, 4)))
        if spec.window > 1:
            place = (batch, heads, spec.window - 1)
            halo = (like.new_zeros(*place, width), like.new_zeros(*place, values), like.new_zeros(place))
            state = state._replace(halo=(*halo, like.new_ones(*place, threshold)) if threshold else halo)
        return state

    def expand(self, batch: int) -> "MemoryState":
        """A state of one sequence as that of `batch` sequences; views."""

        def grow(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(t.expand(batch, *t.shape[1:]) for t in parts)

        pooled = None if self.pooled is None else grow((self.pooled,))[0]
        return MemoryState(
            grow(self.weights), grow(self.momentum), grow(self.anchor), grow((self.phase,))[0],
            grow(self.pending), pooled, grow(self.halo),
        )  # fmt: skip


def nothing_pooled(like: Tensor) -> Tensor:
    """`MemoryState.pooled` of a chunk without tokens yet, in the shape and on the device of `like`."""
    # A list of numbers would be copied to the device for every chunk.
    return torch.cat([torch.ones_like(like[..., :1]), torch.zeros_like(like[..., 1:])], -1)
