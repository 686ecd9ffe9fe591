"""Two queues on a GPU."""

import functools
from typing import Any

import torch
from torch import Tensor


class Beside:
    """A context in which a GPU's work runs beside what is queued after it, until `join`.

    It is for work that leaves multiprocessors idle, which then goes first. Autograd runs each gradient in the
    queue of its operation, so gradients run side by side as well. On other devices, and where torch.compile
    traces, there is one queue.
    """

    def __init__(self, *inputs: Tensor, worth: bool = True) -> None:
        """inputs: made outside and used inside. worth: whether the work is long enough for a second queue."""
        device = inputs[0].device
        used = device.type == "cuda" and worth and not torch.compiler.is_compiling()
        self._inputs, self._side = inputs, _side(device) if used else None
        self._context: Any = None

    def __enter__(self) -> None:
        if self._side is None:
            return
        self._side.wait_stream(torch.cuda.current_stream(self._side.device))
        for x in self._inputs:
            x.record_stream(self._side)
        self._context = torch.cuda.stream(self._side)
        self._context.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._side is not None:
            self._context.__exit__(*error)

    def join(self, *outputs: Tensor) -> None:
        """What is queued from now on waits for the work inside. outputs: made inside and used outside."""
        if self._side is None:
            return
        here = torch.cuda.current_stream(self._side.device)
        here.wait_stream(self._side)
        for x in outputs:
            x.record_stream(here)


@functools.cache
def _side(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)
