"""The loss and the gradient of a training step, which a GPU does as one CUDA graph.

One operation after another, a small model's step takes several times as long to launch as to compute, and a
memory without a kernel of its own launches some hundred thousand. A graph is captured in the shapes and at
the addresses of then, and takes one launch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nestor.training.loop import to_device

#: Kinds of layers that a graph cannot hold: they ask the GPU for numbers that decide what comes next, or try
#: out kernels.
ASKING = ("memory_as_context", "kda", "gated_deltanet")


class CapturedLoss(ABC):
    """Computes a loss, and leaves its gradient in the parameters of a model. Subclasses say which loss.

    On a GPU, called in a queue besides the default one, it replays a graph from the call after `eager` others
    on, unless the model has layers of `ASKING`. Where inputs become others in shape, it begins anew: those
    whose shapes alternate are not for it.

    Attributes:
        eager: calls before the one with which a graph is captured: kernels are compiled in them.
        replays: how often it has replayed a graph.
    """

    eager = 3

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model, device
        asking = set(model.config.layer_types) & set(ASKING)
        self._captures = device.type == "cuda" and not asking
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: dict[str, Tensor] = {}
        self._kind: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._loss = torch.empty(())
        self.replays = 0

    @abstractmethod
    def loss(self, inputs: dict[str, Tensor]) -> Tensor:
        """The loss of inputs on the device, a number. Nothing in it may wait for a GPU."""

    def of(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The loss of inputs on the CPU, without a gradient of its own; the next call may overwrite it."""
        there = {name: to_device(tensor, self.device) for name, tensor in inputs.items()}
        kind = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in there.items()}
        if kind != self._kind:
            self._kind, self._calls, self._graph = kind, 0, None
        self._calls += 1
        if not self._captures or self._calls <= self.eager:
            return self._differentiate(there)
        if self._graph is None:
            self._capture(there)
        assert self._graph is not None
        for name, tensor in there.items():
            self._inputs[name].copy_(tensor)
        self._graph.replay()
        self.replays += 1
        return self._loss

    def _capture(self, inputs: dict[str, Tensor]) -> None:
        """Capture the graph; nothing is computed yet."""
        self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        graph = torch.cuda.CUDAGraph()
        here = torch.cuda.current_stream(self.device)
        with torch.cuda.graph(graph, stream=here, capture_error_mode="thread_local"):
            self._loss = self._differentiate(self._inputs)
        self._graph = graph

    def _differentiate(self, inputs: dict[str, Tensor]) -> Tensor:
        # Without gradients backward makes them: of a graph among its own tensors, and each replay anew.
        self.model.zero_grad(set_to_none=True)
        loss = self.loss(inputs)
        loss.backward()
        return loss.detach()


@contextmanager
def own_queue(device: torch.device) -> Iterator[None]:
    """On a GPU a queue besides the default one, in which nothing can be captured."""
    if device.type != "cuda":
        yield
        return
    default = torch.cuda.current_stream(device)
    queue = torch.cuda.Stream(device)
    queue.wait_stream(default)
    try:
        with torch.cuda.stream(queue):
            yield
    finally:
        default.wait_stream(queue)
