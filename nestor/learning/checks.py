"""What has to be finite, looked at seldom: each look at a number on a GPU waits for all work queued there."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nestor.errors import NonFiniteError

#: Numbers on a GPU that one look takes in, at most: what follows one that is not finite is work for nothing.
MANY = 64


class Checks:
    """Numbers that must be finite, and what to say if one is not."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, str, str]] = []

    def add(self, number: Tensor, what: str, advice: str) -> None:
        """A number on the device, which the caller does not change after.

        Raises:
            NonFiniteError: as `look`, which this calls when many wait, and on a CPU at once.
        """
        self._waiting.append((number.double(), what, advice))
        if not number.is_cuda or len(self._waiting) >= MANY:
            self.look()

    def look(self) -> None:
        """Look at all numbers that wait.

        Raises:
            NonFiniteError: one is not finite; the message says which was the first.
        """
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        found = torch.stack([number for number, _, _ in waiting]).tolist()
        for value, (_, what, advice) in zip(found, waiting, strict=True):
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"{what} is {value}, which is not finite; go on from the State before, {advice}"
                )
