"""Next-token loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestor.layers.span import Span
from nestor.ops.linear_cross_entropy import IGNORED, choose_backend, linear_cross_entropy


def next_token_targets(labels: Tensor, span: Span) -> Tensor:
    """Targets `[B, T]` of left-justified labels `[B, T]`: the label of the next valid token.

    The last token of a row and the last one before a reset have none (-100).
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    if span.lengths is not None:
        index = torch.arange(labels.shape[1], device=labels.device)
        targets = targets.masked_fill(index >= span.lengths[:, None] - 1, IGNORED)
    if span.resets is not None:
        targets = targets.masked_fill(F.pad(span.resets[:, 1:], (0, 1), value=False), IGNORED)
    return targets


def next_token_loss(
    logits: Tensor,
    targets: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Cross-entropy in nats, float32 at least, of logits `[B, T, V]` on targets `[B, T]`; -100 is ignored.

    The mean over targets, or their sum divided by `num_items_in_batch` (gradient accumulation). With
    `weights` `[B, T]` the weighted mean, or the weighted sum so divided.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    targets = targets.to(logits.device)
    if weights is not None:
        targets, weights = targets.flatten(), weights.to(logits).flatten()
        losses = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORED, reduction="none")
        if num_items_in_batch is None:
            num_items_in_batch = (weights * (targets != IGNORED)).sum()
        return (losses * weights).sum() / num_items_in_batch
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction=reduction)
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


def hidden_loss(
    x: Tensor,
    head: Any,
    targets: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """`next_token_loss` of the logits `head(x)`, x `[B, T, d]`, for callers that want no logits.

    Where a kernel can compute the unweighted loss of a plain linear head, the logits are never all in memory.
    """
    plain = type(head) is nn.Linear and type(head.weight) is nn.Parameter and head.bias is None
    if weights is not None or not plain or choose_backend(x.device, x.dtype, len(head.weight))[0] == "torch":
        return next_token_loss(head(x), targets, num_items_in_batch, weights)
    targets = targets.to(x.device)
    total = linear_cross_entropy(x.flatten(0, 1), head.weight, targets.flatten())
    if num_items_in_batch is None:
        return total / (targets != IGNORED).sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
