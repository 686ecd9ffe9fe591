"""The loss and the gradient of a training step, which a GPU does as one CUDA graph.

One operation after another, a small model's step takes several times as long to launch as to compute, and a
memory without a kernel of its own launches some hundred thousand. A graph is captured in the shapes and at
the addresses of then, and takes one launch.
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
#: Batches before the one with which a graph is captured: kernels are compiled in them.
EAGER = 3


class Gradients:
    """Computes the loss of a batch, and leaves its gradient in the parameters.

    On a GPU, called in a queue besides the default one, it replays a graph from the batch after `EAGER`
    others on, unless the model has layers of `ASKING`. Where batches become others in shape, it begins anew.

    Attributes:
        replays: how often it has replayed a graph.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model, self._device = model, device
        asking = set(model.config.layer_types) & set(ASKING)
        self._captures = device.type == "cuda" and not asking
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: dict[str, Tensor] = {}
        self._kind: dict[str, tuple[int, ...]] = {}
        self._loss = torch.empty(())
        self.replays = 0

    def __call__(self, batch: Batch) -> Tensor:
        """Nats a token of a batch, each by its weight, from fresh States; the next call may overwrite it."""
        inputs = {name: to_device(tensor, self._device) for name, tensor in of_batch(batch).items()}
        kind = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        if kind != self._kind:
            self._kind, self._calls, self._graph = kind, 0, None
        self._calls += 1
        if not self._captures or self._calls <= EAGER:
            return self._differentiate(inputs)
        if self._graph is None:
            self._capture(inputs)
        assert self._graph is not None
        for name, tensor in inputs.items():
            self._inputs[name].copy_(tensor)
        self._graph.replay()
        self.replays += 1
        return self._loss

    def _capture(self, inputs: dict[str, Tensor]) -> None:
        """Capture the graph; nothing is computed yet."""
        self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        graph = torch.cuda.CUDAGraph()
        here = torch.cuda.current_stream(self._device)
        with torch.cuda.graph(graph, stream=here, capture_error_mode="thread_local"):
            self._loss = self._differentiate(self._inputs)
        self._graph = graph

    def _differentiate(self, inputs: dict[str, Tensor]) -> Tensor:
        # Without gradients backward makes them: of a graph among its own tensors, and each replay anew.
        self._model.zero_grad(set_to_none=True)
        with precision(self._device):
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


def precision(device: str | torch.device) -> AbstractContextManager[Any]:
    """bfloat16 for the matrix products of a GPU."""
    kind = torch.device(device).type
    return torch.autocast("cuda", dtype=torch.bfloat16) if kind == "cuda" else nullcontext()
