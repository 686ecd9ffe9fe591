"""The loss of a language model's batch and its gradient, replayed as a CUDA graph where that can be."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestor.data import IGNORED, Batch

# Beside the folders of the recipes lies what they share.
sys.path.append(str(Path(__file__).parents[1]))
from captured import CapturedLoss, own_queue

__all__ = ["Gradients", "of_batch", "own_queue", "precision"]


class Gradients(CapturedLoss):
    """Nats a token, each by its weight, from fresh States."""

    def __call__(self, batch: Batch) -> Tensor:
        """Of a batch; the next call may overwrite it."""
        return self.of(of_batch(batch))

    def loss(self, inputs: dict[str, Tensor]) -> Tensor:
        """In the precision of the device."""
        with precision(self.device):
            return self.model(**inputs, loss_only=True, use_cache=False).loss


def of_batch(batch: Batch) -> dict[str, Tensor]:
    """What a model is given of a batch, on the CPU."""
    targets = (batch["weights"] * (batch["labels"] != IGNORED)).sum(dtype=torch.float32).clamp(min=1)
    inputs = {
        "input_ids": batch["input_ids"],
        "shift_labels": batch["labels"],
        "num_items_in_batch": targets,
    }
    resets = batch["resets"].clone()
    # A fresh row needs no reset at its start, and without any reset the layers take shorter ways.
    resets[:, 0] = False
    if bool(resets.any()):
        inputs["resets"] = resets
    if bool((batch["weights"] != 1).any()):
        inputs["loss_weights"] = batch["weights"]
    return inputs


def precision(device: str | torch.device) -> AbstractContextManager[Any]:
    """bfloat16 for the matrix products of a GPU."""
    kind = torch.device(device).type
    return torch.autocast("cuda", dtype=torch.bfloat16) if kind == "cuda" else nullcontext()
