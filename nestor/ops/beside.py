"""Two queues on a GPU."""

import functools
from contextlib import AbstractContextManager, nullcontext
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
        self._inputs, self._side = inputs, _side(device, "beside") if used else None
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


class Stages:
    """The queue in use and one at its side for the stages of a pipeline, or (`two` False) one for all.

    Work in one queue waits for that of the other where it says so, `wait(mark())`. What both use must be made
    before the first wait of the side and be free only when the queue in use has waited for the side's last
    mark, as it does where the context is left by an error. Stages that leave multiprocessors idle go to the
    side, whose work goes first.
    """

    def __init__(self, device: torch.device, two: bool) -> None:
        self._side = _side(device, "stages") if two and device.type == "cuda" else None

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, *error: Any) -> None:
        if self._side is not None and kind is not None:
            torch.cuda.current_stream(self._side.device).wait_stream(self._side)

    def side(self) -> AbstractContextManager[Any]:
        """What is queued inside goes to the side."""
        return nullcontext() if self._side is None else torch.cuda.stream(self._side)

    def mark(self) -> torch.cuda.Event | None:
        """What has been queued up to now."""
        return None if self._side is None else torch.cuda.current_stream(self._side.device).record_event()

    def wait(self, mark: torch.cuda.Event | None) -> None:
        """What is queued from now on waits for a mark."""
        if self._side is not None and mark is not None:
            torch.cuda.current_stream(self._side.device).wait_event(mark)


def _side(device: torch.device, purpose: str) -> torch.cuda.Stream:
    return _new_side(device, torch.cuda.current_stream(device).cuda_stream, purpose)


@functools.cache
def _new_side(device: torch.device, here: int, purpose: str) -> torch.cuda.Stream:
    """A queue at the side of the queue `here`, for one purpose; of higher priority than those of others."""
    return torch.cuda.Stream(device, priority={"beside": -1, "stages": -2}[purpose])
