"""Self-modifying memory: memories that make their own keys, gates and targets while the sequence is read.

`self_modifying_memory` is the public operation. `reference.py` defines it token by token; `chunked.py` is the
same function in dense products, on any device.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from nestor.errors import ConfigError
from nestor.ops.self_modifying.chunked import self_modifying_chunks
from nestor.ops.self_modifying.reference import self_modifying_reference
from nestor.ops.self_modifying.spec import (
    MEMORIES,
    Gate,
    Memories,
    SelfModifyingSpec,
    SelfModifyingState,
)
from nestor.ops.self_modifying.validation import check_call

__all__ = [
    "BACKENDS",
    "MEMORIES",
    "Gate",
    "SelfModifyingSpec",
    "SelfModifyingState",
    "self_modifying_memory",
]

BACKENDS = ("chunked", "reference")


def self_modifying_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Memories,
    *,
    spec: SelfModifyingSpec,
    g: Tensor | None = None,
    eta: Tensor | None = None,
    alpha: Tensor | None = None,
    mu: Tensor | None = None,
    gates: Mapping[str, Gate] | None = None,
    state: SelfModifyingState | None = None,
    mask: Tensor | None = None,
    resets: Tensor | None = None,
    backend: str = "chunked",
    return_strength: bool = False,
) -> tuple[Tensor, SelfModifyingState] | tuple[Tensor, SelfModifyingState, Tensor]:
    """Rewrite all memories with every token, and read "mem" with q.

    "Nested Learning", arXiv 2512.24695, equations 83-93 (spec/nested-learning.md section c):
    ``M_t = M_{t-1} (alpha_t I - eta_t k_t k_t^T) + S_t`` with ``S_t = mu_t S_{t-1} - eta_t grad L(M; k_t,
    M(v_t))`` for every memory M, with keys, values and gates that are memories' outputs, too.

    Shapes (B sequences, T tokens, H heads, p head width):
        q, k, v, g: inputs of the projections ``[B, T, H, p]``, g of the gates; a memory as wide as the model
        has x_t for all of them. Keys and queries are brought to unit length after their projection.
        initial: learned initial weights by memory, M(x) = x W (``[H, p, p]``; of eta and alpha ``[H, p, o]``)
        or x + phi(x W_a) W_b (``[H, p, h]``, ``[H, h, p]``), all of one kind. "mem" is read; those of k, v,
        q, eta, alpha that are here are memories, for the others the input stands in place of M(x).
        eta (write step), alpha (fraction KEPT): ``[B, T, H]`` where they are no memories.
        gates: how eta and alpha are read from their memories, see `Gate`.
        mu (momentum keep): ``[B, T, H]``; None: no momentum.
        state: what an earlier call returned; None starts every sequence afresh.
        mask: bool ``[B, T]``; a False token is skipped as if it were not there, and its output is 0.
        resets: bool ``[B, T]``, True at the first token of a document: every memory is as learned again.
    Dtypes: everything is cast to float32 (float64 stays); fast weights are float32 or float64. On a GPU with
        Triton, linear memories without momentum are walked by kernels, whose products take float32 in three
        parts, or, where q is of half precision or autocast is on, as TF32.
    Returns: y ``[B, T, H, p]`` in the dtype of q, and the state after the last token; with `return_strength`
        also eta times the norm of the gradient of "mem", ``[B, T, H]``, without a gradient.
    Raises: ShapeError for shapes that do not fit, ConfigError for an unknown backend.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}.")
    gates = gates or {}
    check_call(
        q,
        {"k": k, "v": v, "g": g},
        {"eta": eta, "alpha": alpha, "mu": mu},
        {"mask": mask, "resets": resets},
        gates,
        initial,
        state,
        spec,
    )
    out_dtype = q.dtype
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32

    def wide(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(dtype)

    half = q.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(q.device.type)
    with torch.autocast(q.device.type, enabled=False):
        own = {name: tuple(w.to(dtype) for w in initial[name]) for name in MEMORIES if name in initial}
        start = SelfModifyingState.fresh(own, 1, mu is not None)
        if state is None:
            before = SelfModifyingState.fresh(own, len(q), mu is not None)
        else:
            before = state.ordered()
        heads = {name: Gate(gate.bias.to(dtype), wide(gate.read)) for name, gate in gates.items()}
        if backend == "reference":
            y, after, strength = self_modifying_reference(
                q.to(dtype),
                k.to(dtype),
                v.to(dtype),
                wide(g),
                before,
                start,
                spec,
                wide(eta),
                wide(alpha),
                wide(mu),
                heads,
                mask,
                resets,
            )
        else:
            y, after, strength = self_modifying_chunks(
                q, k, v, g, before, start, spec, wide(eta), wide(alpha), wide(mu), heads, mask, resets,
                fresh=state is None, half=half,
            )  # fmt: skip
    if return_strength:
        return y.to(out_dtype), after, strength.detach()
    return y.to(out_dtype), after
