"""Neural memory: a small network per head that is trained, token by token, while the sequence is read.

`neural_memory` is the public operation. `reference.py` defines it for the whole family and `general.py`
computes it with PyTorch anywhere; `chunked.py` (PyTorch) and `native.cpp` (C++ on a CPU) are faster for the
MLPs that learn by gradient descent with momentum.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from nestor.errors import ConfigError
from nestor.ops.neural_memory.arrangement import beyond_fast_forms, general_memory, threshold_entries
from nestor.ops.neural_memory.checks import self_check
from nestor.ops.neural_memory.chunked import ChunkState, Norm, Tokens
from nestor.ops.neural_memory.functions import make_head
from nestor.ops.neural_memory.layout import chunk_grid
from nestor.ops.neural_memory.native import native_walk, unsupported
from nestor.ops.neural_memory.networks import make_network
from nestor.ops.neural_memory.reference import neural_memory_reference
from nestor.ops.neural_memory.retention import make_retention
from nestor.ops.neural_memory.scan import Plan
from nestor.ops.neural_memory.scan import walk as walk_chunks
from nestor.ops.neural_memory.selection import BACKENDS, choose_backend, kernel_obstacle, notice_fallback
from nestor.ops.neural_memory.spec import MemorySpec, MemoryState
from nestor.ops.neural_memory.validation import check_call

__all__ = [
    "BACKENDS",
    "MemorySpec",
    "MemoryState",
    "apply_network",
    "choose_backend",
    "fast_weights",
    "neural_memory",
    "self_check",
]


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    eta: Tensor | None,
    alpha: Tensor | None,
    initial: Sequence[Tensor],
    *,
    spec: MemorySpec,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    omega: Tensor | None = None,
    delta: Tensor | None = None,
    step: Tensor | None = None,
    state: MemoryState | None = None,
    start: MemoryState | None = None,
    mask: Tensor | None = None,
    resets: Tensor | None = None,
    backend: str | None = None,
    return_surprise: bool = False,
) -> tuple[Tensor, MemoryState] | tuple[Tensor, MemoryState, Tensor]:
    """Write (k, v) into the memory with a step of gradient descent per token, and read it with q.

    Titans, arXiv 2501.00663, equations 8-15; the general recurrence is spec/neural-memory.md section 1.1.

    Shapes (B sequences, T tokens, H heads, p head width):
        q, k, v: ``[B, T, H, p]``; with norm "none" v, and with it y, may have another width.
        theta (write step), eta (momentum keep), alpha (forget fraction): ``[B, T, H]``; eta = None is a
        memory without momentum, alpha = None one that never forgets. Where the spec's step_sizes and
        forget_gates say so, theta is ``[B, T, H, L]`` or ``[B, T, H, p]``, alpha ``[B, T, H, p]``.
        initial: learned initial weights, one ``[H, in, out]`` per layer of the memory network (1 to 4), or
        W0, W1, W2 of a gated network.
        gamma, beta: ``[H, p]``, slow parameters of the norm "residual_layernorm".
        omega: gates in [0, 1] of a window of c tokens, ``[B, T, H]``, of the token learned, or
        ``[B, T, H, c]``, of the token that learns it and how many tokens ago it was; None: 1.
        delta: thresholds of the losses that have one, ``[B, T, H]`` or ``[B, T, H, p]``; None: the spec's.
        step: sizes of orthogonalised steps (optimizer "muon"), ``[B, T, H]``; a chunk's step takes their
        mean. None: 1.
        state: what an earlier call returned; None starts every sequence afresh.
        start: state (batch of 1) that fresh sequences and resets begin with; None is (initial, S = 0). A
        reset takes its weights and momentum, and begins a chunk and a window.
        mask: bool ``[B, T]``; a False token is skipped as if it were not there, and its output is 0.
        resets: bool ``[B, T]``, True at the first token of a document: the memory forgets all before it.
    Dtypes: q, k, v and the gates are cast to float32 (float64 stays); fast weights are float32 or float64.
    Returns: y ``[B, T, H, p]`` in the dtype of q, and the state after the last token; with `return_surprise`
        also the norm of each token's inner gradient, float32 ``[B, T, H]``, without a gradient.
    backend: one of BACKENDS; None: what `choose_backend` says.
    Raises: ShapeError for shapes that do not fit, ConfigError for an unknown backend, or one that does not
        cover these choices.
    """
    check_call(
        q,
        {"k": k, "v": v},
        {"theta": theta, "eta": eta, "alpha": alpha},
        {"mask": mask, "resets": resets},
        {"gamma": gamma, "beta": beta},
        initial,
        state,
        start,
        spec,
        {"omega": omega, "delta": delta, "step": step},
    )
    beyond = _beyond_fast_forms(spec, q, v, delta)
    if backend == "kernels" or (backend is None and beyond is None and q.is_cuda):
        obstacle = beyond or kernel_obstacle(spec, q.device, q.dtype, initial)
        if obstacle is None and return_surprise:
            obstacle = "only the other forms report surprise"
        elif obstacle is not None and backend is None:
            notice_fallback(obstacle)
        if obstacle is None:
            with torch.autocast(q.device.type, enabled=False):
                k, v = k.to(q.dtype), v.to(q.dtype)
                return _on_gpu(
                    q, k, v, theta, eta, alpha, tuple(initial), gamma, beta, state, start, spec, mask, resets
                )
        if backend is not None:
            raise ConfigError(f"backend is {backend!r}; {obstacle}. Use another, or leave it out.")
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out_dtype = q.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, theta = (t.to(dtype) for t in (q, k, v, theta))
        eta, alpha, gamma, beta, omega, delta, step = (
            None if t is None else t.to(dtype) for t in (eta, alpha, gamma, beta, omega, delta, step)
        )
        if omega is not None and spec.window == 1:
            # Gamma is diagonal: a factor of the token's own step.
            own = omega if omega.dim() == 3 else omega.squeeze(-1)
            theta, omega = theta * (own if theta.dim() == 3 else own.unsqueeze(-1)), None
        initial = tuple(w.to(dtype) for w in initial)
        chosen = backend
        if chosen is None and beyond is not None:
            chosen = "general"
        elif chosen in ("native", "chunked") and beyond is not None:
            raise ConfigError(f"backend is {chosen!r}; {beyond}. Use backend='general', or leave it out.")
        elif chosen is None:
            # A fake tensor is a shape alone, with nothing to point to.
            fake = q.is_cuda or isinstance(q, FakeTensor)
            chosen = "chunked" if fake else choose_backend(spec, q.device, dtype)[0]
        elif chosen == "native" and (obstacle := unsupported(spec, q.device, dtype)) is not None:
            raise ConfigError(f"backend is 'native'; {obstacle}. Use backend='chunked', or leave it out.")
        if chosen in ("native", "chunked"):
            y, after, surprise = _in_chunks(
                native_walk if chosen == "native" else walk_chunks,
                q,
                k,
                v,
                theta,
                eta,
                alpha,
                initial,
                gamma,
                beta,
                state,
                start,
                spec,
                mask,
                resets,
                return_surprise,
            )
        elif chosen == "general":
            y, after, surprise = general_memory(
                q, k, v, theta, eta, alpha, initial, gamma, beta, state, start, spec, mask, resets,
                omega, delta, step,
            )  # fmt: skip
        elif chosen == "reference":
            fresh = MemoryState.fresh(initial, 1, eta is not None, spec, threshold_entries(delta))
            if start is not None:
                fresh = fresh._replace(weights=start.weights, momentum=start.momentum, anchor=start.anchor)
            state = state or fresh.expand(q.shape[0])
            state = state._replace(phase=state.phase.clone())
            gamma4, beta4 = (None if t is None else t[None] for t in (gamma, beta))
            y, after = neural_memory_reference(
                q, k, v, theta, eta, alpha, initial, gamma4, beta4, state, fresh, spec, mask, resets,
                omega, delta, step,
            )  # fmt: skip
            surprise = None
        else:
            raise ConfigError(f"backend is {chosen!r}; it must be one of {', '.join(BACKENDS)}.")
    if not return_surprise:
        return y.to(out_dtype), after
    if surprise is None:
        raise ConfigError(
            "the reference backend does not report surprise; use backend='chunked', or leave it out."
        )
    return y.to(out_dtype), after, surprise


def _beyond_fast_forms(spec: MemorySpec, q: Tensor, v: Tensor, delta: Tensor | None) -> str | None:
    beyond = beyond_fast_forms(spec)
    if beyond is None and delta is not None:
        return "only the general form covers a tensor delta"
    if beyond is None and v.shape[-1] != q.shape[-1]:
        return "only the general form covers values of another width than the keys"
    return beyond


def _on_gpu(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, eta: Tensor | None, alpha: Tensor | None,
    initial: tuple[Tensor, ...], gamma: Tensor | None, beta: Tensor | None,
    state: MemoryState | None, start: MemoryState | None, spec: MemorySpec,
    mask: Tensor | None, resets: Tensor | None,
) -> tuple[Tensor, MemoryState]:  # fmt: skip
    """The kernels take sequences at a chunk's start; what is before it goes through the chunked form."""
    from nestor.ops.neural_memory.kernels import decode_token, neural_memory_kernels

    def part(at: slice, before: MemoryState | None, chunked: bool) -> tuple[Tensor, MemoryState]:
        def cut(x: Tensor | None) -> Any:
            return None if x is None else x[:, at]

        tokens = (cut(q), cut(k), cut(v), cut(theta), cut(eta), cut(alpha), initial)
        if chunked:
            result = neural_memory(
                *tokens, spec=spec, gamma=gamma, beta=beta, state=before, start=start,
                mask=cut(mask), resets=cut(resets), backend="chunked",
            )  # fmt: skip
            return result[0], result[1]
        return neural_memory_kernels(*tokens, gamma, beta, before, start, spec, cut(mask), cut(resets))

    length = q.shape[1]
    if state is None:
        return part(slice(None), None, chunked=length == 1)
    if length == 1 and mask is None and resets is None and not torch.is_grad_enabled():
        return decode_token(q, k, v, theta, eta, alpha, initial, gamma, beta, state, spec)
    lowest, highest = (int(x) for x in torch.aminmax(state.phase))
    head = spec.chunk_size - lowest
    if length > 1 and highest == 0:
        return part(slice(None), state, chunked=False)
    if lowest != highest or mask is not None or resets is not None or head >= length:
        return part(slice(None), state, chunked=True)
    first, state = part(slice(head), state, chunked=True)
    rest, state = part(slice(head, None), state, chunked=False)
    return torch.cat([first, rest], 1), state


def apply_network(
    spec: MemorySpec,
    x: Tensor,
    weights: Sequence[Tensor],
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
) -> Tensor:
    """f(x; W), a read without a write.

    Shapes: x ``[B, T, H, p]``, weights ``[B, H, in, out]``, as a `MemoryState` holds them, gamma, beta
    ``[H, p]``; returns ``[B, T, H, p]``.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        inputs = x.to(dtype).transpose(1, 2)
        matrices = fast_weights(spec, [w.to(dtype) for w in weights])
        network = make_network(spec.network, spec.activation, len(matrices))
        z = network.value(inputs, lambda layer, z: torch.matmul(z, matrices[layer]))
        norm = [None if t is None else t.to(dtype).unsqueeze(1) for t in (gamma, beta)]
        y, _ = make_head(spec.norm, spec.norm_eps).value(inputs, z, *norm)
    return y.transpose(1, 2).to(x.dtype)


def fast_weights(spec: MemorySpec, weights: Sequence[Tensor]) -> list[Tensor]:
    """The network's weights from the `weights` (or the `anchor`) of a state, which hold what the retention
    accumulates."""
    retention = make_retention(spec)
    return [retention.weights(w) for w in weights]


def _in_chunks(
    walk: Callable[..., tuple[Tensor, Tensor, list[Tensor], list[Tensor]]],
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, eta: Tensor | None, alpha: Tensor | None,
    initial: tuple[Tensor, ...], gamma: Tensor | None, beta: Tensor | None,
    state: MemoryState | None, start: MemoryState | None, spec: MemorySpec,
    mask: Tensor | None, resets: Tensor | None, surprise_wanted: bool,
) -> tuple[Tensor, MemoryState, Tensor | None]:  # fmt: skip
    batch, length, heads, _ = q.shape
    grid = chunk_grid(
        batch, length, spec.chunk_size, q.device, None if state is None else state.phase, mask, resets
    )

    def merge(x: Tensor) -> Tensor:
        """[B or 1, H, ...] -> [B H, ...]"""
        return x.to(q.dtype).expand(batch, *x.shape[1:]).reshape(batch * heads, *x.shape[2:])

    valid = None
    if grid.valid is not None:
        valid = grid.valid.repeat_interleave(heads, 0)
    tokens = Tokens(
        q=grid.to_rows(q),
        k=grid.to_rows(k),
        v=grid.to_rows(v),
        theta=grid.to_rows(theta),
        eta=None if eta is None else grid.to_rows(eta),
        alpha=None if alpha is None else grid.to_rows(alpha),
        valid=valid,
    )
    begin = start or MemoryState.fresh(initial, 1, eta is not None)
    opening = state or begin
    has_target = spec.decay == "initial" and alpha is not None
    plan = Plan(
        spec=spec,
        depth=len(initial),
        resets=[None if r is None else r.repeat_interleave(heads)[:, None, None] for r in grid.resets],
        closes=[c if isinstance(c, bool) else c.repeat_interleave(heads)[:, None, None] for c in grid.closes],
        has_norm=gamma is not None,
        has_targets=has_target,
        surprise=surprise_wanted,
    )

    def stacks(memory: MemoryState) -> list[Tensor]:
        weights = memory.weights
        deviations = [w - m for w, m in zip(weights, initial, strict=True)] if has_target else weights
        components = zip(deviations, memory.momentum, strict=True) if eta is not None else zip(deviations)
        return [torch.stack([merge(x) for x in part], 1) for part in components]

    opening_stacks = stacks(opening)
    # Without a reset nothing reads what a document begins with.
    begin_stacks = opening_stacks if all(r is None for r in grid.resets) else stacks(begin)
    outputs, surprise, final_stacks, final_anchor = walk(
        plan,
        tokens,
        Norm(
            None if gamma is None else merge(gamma[None, :, None]),
            None if beta is None else merge(beta[None, :, None]),
        ),
        begin_stacks,
        ChunkState(
            opening_stacks,
            [merge(w) for w in opening.anchor],
            [merge(w[None]) for w in initial] if has_target else None,
        ),
    )

    def split(parts: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(w.reshape(batch, heads, *w.shape[1:]) for w in parts)

    weights = split([s[:, 0] for s in final_stacks])
    if has_target:
        weights = tuple(w + m for w, m in zip(weights, initial, strict=True))
        if mask is not None and state is not None:
            # The way over W - M rounds; a sequence without a token keeps every bit.
            read = mask.any(1)[:, None, None, None]
            weights = tuple(torch.where(read, w, b) for w, b in zip(weights, state.weights, strict=True))
    momentum = () if eta is None else split([s[:, 1] for s in final_stacks])
    final = MemoryState(weights, momentum, split(final_anchor), grid.phase.clone())
    norms = grid.from_rows(surprise, batch, length) if surprise_wanted else None
    return grid.from_rows(outputs, batch, length), final, norms
