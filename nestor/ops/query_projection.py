"""Queries projected onto the keys that were written: ``q_t Pi_t`` with ``Pi_t = sum_{s <= t} k_s^T k_s``.

TNT (arXiv 2511.07343) reads a memory that is young, or was just reset, with queries filtered by the keys it
has seen (spec/neural-memory.md section 6.2). For orthonormal keys Pi is the projector onto their span. In
blocks of tokens, with Pi_0 the matrix before the block:

    Q_proj = Q Pi_0 + tril(Q K^T) K        Pi' = Pi_0 + K^T K
"""

import torch
from torch import Tensor

from nestor.errors import ConfigError, ShapeError, suggest
from nestor.ops.kernels import covered

MODES = ("raw", "unit", "trace")
BLOCK = 64
EPSILON = 1e-6
# Of the kernel.
WIDTHS = (16, 32, 64)


def query_projection(
    q: Tensor,
    k: Tensor,
    state: Tensor | None = None,
    *,
    mode: str = "unit",
    mask: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Project each query onto the keys up to its own token.

    Shapes (B sequences, T tokens, H heads, p head width): q, k ``[B, T, H, p]``, keys of unit length; state
    ``[B, H, p, p]``, Pi after an earlier call, None for a fresh sequence. mask: bool ``[B, T]``; a False
    token is skipped and its output is 0. resets: bool ``[B, T]``, True where Pi starts anew, before the
    token's own key.
    mode: "raw" q Pi, the norm of which grows with repeated keys; "unit" q Pi scaled to unit length (below
        1e-3 it fades to zero instead); "trace" q Pi / trace(Pi).
    Returns: the projected queries ``[B, T, H, p]`` and the next Pi ``[B, H, p, p]``, which is symmetric and
        positive semi-definite; both float32, or float64 if q is. On a GPU queries of half precision stay
        so, and products take and give it; Pi is summed in float32.
    Raises: ShapeError for shapes that do not fit, ConfigError for an unknown mode.
    """
    _check(q, k, state, mode, mask, resets)
    half = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
    dtype = q.dtype if half or q.dtype == torch.float64 else torch.float32
    # What a kernel does at once: nothing of the size of the scores or of Pi for each block leaves the chip.
    plain = mask is None and resets is None and mode != "trace" and q.dtype == k.dtype
    if plain and q.shape[-1] in WIDTHS and covered(q, k, state):
        from nestor.ops.kernels import query_projection as kernels

        q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
        state = None if state is None else state.float().contiguous()
        return kernels.query_projection(q, k, state, mode == "unit", EPSILON)
    with torch.autocast(q.device.type, enabled=False):
        return _project(q.to(dtype), k.to(dtype), state, mode, mask, resets)


def _project(
    q: Tensor, k: Tensor, state: Tensor | None, mode: str, mask: Tensor | None, resets: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, length, heads, width = q.shape
    if mask is not None:
        q, k = (torch.where(mask[..., None, None], x, 0.0) for x in (q, k))
        resets = None if resets is None else resets & mask
    wide = torch.promote_types(q.dtype, torch.float32)
    Pi = q.new_zeros(batch, heads, width, width, dtype=wide) if state is None else state.to(wide)
    size = min(BLOCK, length)
    rows = -(-length // size)
    missing = rows * size - length

    def blocks(x: Tensor) -> Tensor:
        """[B, T, H, p] -> [B, H, N, C, p]"""
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing))
        return x.unflatten(1, (rows, size)).permute(0, 3, 1, 2, 4)

    q, k = blocks(q), blocks(k)
    sees = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    if resets is None:
        sees = sees.expand(1, 1, 1, size, size)
        grams = (k.transpose(-1, -2) @ k).to(wide)
        sums = torch.cat([Pi.unsqueeze(2), grams], 2).cumsum(2)
        before, Pi = sums[:, :, :-1], sums[:, :, -1]
        old = None
    else:
        # Documents are numbered within the call; 0 is the one that `state` belongs to.
        document = torch.nn.functional.pad(resets, (0, missing)).cumsum(1).unflatten(1, (rows, size))
        ends = document[:, :, -1]
        begins = torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], 1)
        sees = (sees & (document.unsqueeze(-1) == document.unsqueeze(-2))).unsqueeze(1)
        lasting = torch.where((document == ends.unsqueeze(-1))[:, None, ..., None], k, 0.0)
        grams = (lasting.transpose(-1, -2) @ k).to(wide)
        goes_on = (begins == ends)[:, None, :, None, None]
        states = []
        for n in range(rows):
            states.append(Pi)
            Pi = torch.where(goes_on[:, :, n], Pi, 0.0) + grams[:, :, n]
        before = torch.stack(states, 2)
        old = (document == begins.unsqueeze(-1))[:, None, ..., None]
    y = q @ before.to(q.dtype)
    y = y if old is None else torch.where(old, y, 0.0)
    y = y + torch.where(sees, q @ k.transpose(-1, -2), 0.0) @ k
    if mode == "unit":
        y = y * torch.rsqrt(y.square().sum(-1, keepdim=True, dtype=wide) + EPSILON).to(y.dtype)
    elif mode == "trace":
        earlier = before.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        earlier = earlier if old is None else torch.where(old, earlier, 0.0)
        trace = earlier + sees.to(wide) @ k.square().sum(-1, keepdim=True, dtype=wide)
        y = y / trace.clamp(min=EPSILON).to(y.dtype)
    return y.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :length], Pi


def _check(
    q: Tensor, k: Tensor, state: Tensor | None, mode: str, mask: Tensor | None, resets: Tensor | None
) -> None:
    if mode not in MODES:
        raise ConfigError(
            f"mode is {mode!r}; it must be one of {', '.join(map(repr, MODES))}. {suggest(mode, MODES)}"
        )
    if q.dim() != 4 or q.shape[1] == 0:
        raise ShapeError(f"q has shape {tuple(q.shape)}; it must be [batch, tokens, heads, head width].")
    batch, length, heads, width = q.shape
    for name, x, shape in (
        ("k", k, tuple(q.shape)),
        ("state", state, (batch, heads, width, width)),
        ("mask", mask, (batch, length)),
        ("resets", resets, (batch, length)),
    ):
        if x is not None and tuple(x.shape) != shape:
            raise ShapeError(
                f"{name} has shape {tuple(x.shape)}; with q {tuple(q.shape)} it must be {shape}."
            )
