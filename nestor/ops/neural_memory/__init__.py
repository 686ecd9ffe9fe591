"""Neural memory: a small network per head that is trained, token by token, while the sequence is read.

`neural_memory` is the public operation. `reference.py` defines it, `chunked.py` computes it with PyTorch
anywhere, `native.cpp` in C++ on a CPU.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from nestor.errors import ConfigError
from nestor.ops.neural_memory.checks import self_check
from nestor.ops.neural_memory.chunked import ChunkState, Norm, Tokens
from nestor.ops.neural_memory.functions import ACTIVATIONS, make_head
from nestor.ops.neural_memory.layout import chunk_grid
from nestor.ops.neural_memory.native import native_walk, unsupported
from nestor.ops.neural_memory.reference import neural_memory_reference
from nestor.ops.neural_memory.scan import Plan
from nestor.ops.neural_memory.scan import walk as walk_chunks
from nestor.ops.neural_memory.spec import MemorySpec, MemoryState
from nestor.ops.neural_memory.validation import check_call

__all__ = [
    "BACKENDS",
    "MemorySpec",
    "MemoryState",
    "apply_network",
    "choose_backend",
    "neural_memory",
    "self_check",
]

BACKENDS = ("native", "chunked", "reference")


def choose_backend(
    spec: MemorySpec, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[str, str]:
    """The backend that `neural_memory` uses for these choices on this device, and why."""
    if torch.compiler.is_compiling():
        return "chunked", "torch.compile can trace the chunked PyTorch form"
    obstacle = unsupported(spec, device, dtype)
    if obstacle is not None:
        return "chunked", obstacle
    return "native", "the C++ form covers these choices on a cpu"


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
        q, k, v: ``[B, T, H, p]``. theta (write step), eta (momentum keep), alpha (forget fraction):
        ``[B, T, H]``; eta = None is a memory without momentum, alpha = None one that never forgets.
        initial: learned initial weights, one ``[H, in, out]`` per layer of the memory network (1 to 4).
        gamma, beta: ``[H, p]``, slow parameters of the norm "residual_layernorm".
        state: what an earlier call returned; None starts every sequence afresh.
        start: state (batch of 1) that fresh sequences and resets begin with; None is (initial, S = 0).
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
    )
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out_dtype = q.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, theta = (t.to(dtype) for t in (q, k, v, theta))
        eta, alpha, gamma, beta = (None if t is None else t.to(dtype) for t in (eta, alpha, gamma, beta))
        initial = tuple(w.to(dtype) for w in initial)
        chosen = backend
        if chosen is None:
            # A fake tensor is a shape alone, with nothing to point to.
            fake = isinstance(q, FakeTensor)
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
        elif chosen == "reference":
            first = start or MemoryState.fresh(initial, 1, eta is not None)
            state = state or _expand(first, q.shape[0])
            state = state._replace(phase=state.phase.clone())
            gamma4, beta4 = (None if t is None else t[None] for t in (gamma, beta))
            y, after = neural_memory_reference(
                q, k, v, theta, eta, alpha, initial, gamma4, beta4, state, first, spec, mask, resets
            )
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


def apply_network(
    spec: MemorySpec,
    x: Tensor,
    weights: Sequence[Tensor],
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
) -> Tensor:
    """f(x; W), a read without a write.

    Shapes: x ``[B, T, H, p]``, weights ``[B, H, in, out]``, gamma, beta ``[H, p]``; returns ``[B, T, H, p]``.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        inputs = z = x.to(dtype).transpose(1, 2)
        for layer, weight in enumerate(weights):
            z = torch.matmul(z, weight.to(dtype))
            if layer < len(weights) - 1:
                z = ACTIVATIONS[spec.activation].value(z)
        norm = [None if t is None else t.to(dtype).unsqueeze(1) for t in (gamma, beta)]
        y, _ = make_head(spec.norm, spec.norm_eps).value(inputs, z, *norm)
    return y.transpose(1, 2).to(x.dtype)


def _expand(state: MemoryState, batch: int) -> MemoryState:
    def grow(t: Tensor) -> Tensor:
        return t.expand(batch, *t.shape[1:])

    return MemoryState(
        tuple(map(grow, state.weights)),
        tuple(map(grow, state.momentum)),
        tuple(map(grow, state.anchor)),
        grow(state.phase),
    )


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

    def to_rows(x: Tensor) -> Tensor:
        """[B, T, H, ...] -> [B H, N, C, ...]"""
        x = grid.gather(x)
        axes = (0, 3, 1, 2, *range(4, x.dim()))
        return x.permute(axes).reshape(batch * heads, grid.rows, grid.width, *x.shape[4:])

    def merge(x: Tensor) -> Tensor:
        """[B or 1, H, ...] -> [B H, ...]"""
        return x.to(q.dtype).expand(batch, *x.shape[1:]).reshape(batch * heads, *x.shape[2:])

    valid = None
    if grid.valid is not None:
        valid = grid.valid.repeat_interleave(heads, 0)
    tokens = Tokens(
        q=to_rows(q),
        k=to_rows(k),
        v=to_rows(v),
        theta=to_rows(theta),
        eta=None if eta is None else to_rows(eta),
        alpha=None if alpha is None else to_rows(alpha),
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

    def from_rows(x: Tensor) -> Tensor:
        """[B H, N, C, ...] -> [B, T, H, ...]"""
        x = x.unflatten(0, (batch, heads))
        return grid.scatter(x.permute(0, 2, 3, 1, *range(4, x.dim())), length)

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
    final = MemoryState(weights, momentum, split(final_anchor), grid.phase)
    return from_rows(outputs), final, from_rows(surprise) if surprise_wanted else None
