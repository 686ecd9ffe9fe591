"""Padding: rows with padding anywhere, made left-justified for the layers and put back after them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nestor.errors import ShapeError


@dataclass(frozen=True)
class Padding:
    """Where the real tokens of a batch are; all fields None if every token is real.

    Attributes:
        mask: `[B, T]` bool, True at real tokens.
        order: `[B, T]` int64, the column that comes to each place: real tokens first, in their order.
        lengths: `[B]` int64, real tokens of each row.
    """

    mask: Tensor | None = None
    order: Tensor | None = None
    lengths: Tensor | None = None

    @staticmethod
    def build(attention_mask: Tensor | None, batch: int, length: int) -> Padding:
        """From an attention mask of which the last `length` columns count, or from None.

        Raises:
            ShapeError: the mask does not have `batch` rows of at least `length` columns of 0 and 1.
        """
        if attention_mask is None:
            return Padding()
        shape = attention_mask.shape
        if len(shape) != 2 or shape[0] != batch or shape[1] < length:
            raise ShapeError(
                f"attention_mask has shape {list(shape)}; {[batch, length]} is wanted, "
                f"1 at tokens and 0 at padding"
            )
        mask = attention_mask[:, -length:].bool()
        if not torch.compiler.is_compiling() and bool(mask.all()):
            return Padding()
        order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
        return Padding(mask, order, mask.sum(dim=1))

    def justify(self, x: Tensor) -> Tensor:
        """`[B, T, ...]` with the real tokens of each row first, in their order."""
        return x if self.order is None else _gather(x, self.order)

    def restore(self, x: Tensor, fill: int = 0) -> Tensor:
        """`[B, T, ...]` with each token back in its column and `fill` at padding."""
        if self.order is None or self.mask is None:
            return x
        back = _gather(x, self.order.argsort(dim=1))
        return back.masked_fill(~self.mask.reshape(*self.mask.shape, *[1] * (x.dim() - 2)), fill)

    def ignore(self, targets: Tensor) -> Tensor:
        """Targets `[B, T]` in the original columns, with -100 at padding."""
        return targets if self.mask is None else targets.masked_fill(~self.mask, -100)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.reshape(*index.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))
