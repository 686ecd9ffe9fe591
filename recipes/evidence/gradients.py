"""The loss and the gradient of a training step, which a GPU does as one CUDA graph.

One operation after another, a small model's step takes several times as long to launch as to compute, and a
memory without a kernel of its own launches some hundred thousand. A graph is captured once, in the shapes
and at the addresses of then, and takes one launch.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from nestor.data import IGNORED, Batch
from nestor.training.loop import to_device

#: Kinds of layers that a graph cannot hold: they ask the GPU for numbers that decide what comes next, or try
#: out kernels.
ASKING = ("memory_as_context", "kda", "gated_deltanet")


class Gradients:
    """Computes the loss of a batch, and leaves its gradient in the parameters.

    Attributes:
        captured: whether it does so by replaying a graph.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model, self._device = model, device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: dict[str, Tensor] = {}
        self._loss: Tensor | None = None

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def __call__(self, batch: Batch) -> Tensor:
        """Nats a token of a batch, each by its weight, from fresh States; the next call may overwrite it."""
        inputs = {name: to_device(tensor, self._device) for name, tensor in of_batch(batch).items()}
        if self._graph is not None and inputs.keys() == self._inputs.keys():
            for name, tensor in inputs.items():
                self._inputs[name].copy_(tensor)
            self._graph.replay()
            assert self._loss is not None
            return self._loss
        # The gradients of a graph stay where they are, for it to find them again.
        self._model.zero_grad(set_to_none=self._graph is None)
        return self._differentiate(inputs)

    def capture(self, batch: Batch) -> bool:
        """Capture the graph for batches like this one, of which nothing is computed yet; False: there is no
        GPU, or the model has layers of `ASKING`. Kernels must have been compiled by earlier calls."""
        if self._device.type != "cuda" or set(self._model.config.layer_types) & set(ASKING):
            return False
        self._inputs = {name: tensor.to(self._device) for name, tensor in of_batch(batch).items()}
        graph = torch.cuda.CUDAGraph()
        # Without gradients, backward makes them among the tensors of the graph, and each replay anew.
        self._model.zero_grad(set_to_none=True)
        # Other threads of this process may use the GPU meanwhile, such as those that pin memory.
        here = torch.cuda.current_stream(self._device)
        with torch.cuda.graph(graph, stream=here, capture_error_mode="thread_local"):
            self._loss = self._differentiate(self._inputs, cast_once=False)
        self._graph = graph
        return True

    def _differentiate(self, inputs: dict[str, Tensor], cast_once: bool = True) -> Tensor:
        with precision(self._device, cast_once):
            output = self._model(**inputs, loss_only=True, use_cache=False)
        output.loss.backward()
        return output.loss.detach()


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


def precision(device: str | torch.device, cast_once: bool = True) -> AbstractContextManager[Any]:
    """bfloat16 for the matrix products of a GPU. cast_once: keep the bfloat16 of weights from one use to the
    next, which a graph, that would find those of its capture, must not."""
    kind = torch.device(device).type
    if kind != "cuda":
        return nullcontext()
    return torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=cast_once)
