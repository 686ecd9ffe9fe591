"""Watching what memories write: `record_writes` around any calls, and what a layer does to take part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from threading import Lock

import torch
from torch import Tensor

_recorder: ContextVar[list[Tensor] | None] = ContextVar("nestor_writes", default=None)


class _Count:
    """How many `record_writes` are open, in all threads."""

    def __init__(self) -> None:
        self.open, self._lock = 0, Lock()

    def __enter__(self) -> None:
        with self._lock:
            self.open += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self.open -= 1


_count = _Count()


def _unwatched() -> bool:
    """Whether torch.compile, which cannot trace a context variable, can do without: nobody records. Where
    somebody does, it compiles anew, around it."""
    return torch.compiler.is_compiling() and _count.open == 0


@contextmanager
def record_writes() -> Iterator[list[Tensor]]:
    """Collect how hard each token is written.

    Within the block every layer with a memory appends a float32 `[B, T, H]`, over its own tokens: the write
    step times the norm of the inner gradient (the "surprise" of Titans), 0 where a token is padding.
    """
    collected: list[Tensor] = []
    with _count, _recording_to(collected):
        yield collected


def recording() -> bool:
    """Whether a call is inside `record_writes`."""
    return not _unwatched() and _recorder.get() is not None


def report_write(strength: Tensor) -> None:
    """Add `[B, T, H]` to the innermost `record_writes`; outside of one, nothing happens."""
    collected = None if _unwatched() else _recorder.get()
    if collected is not None:
        collected.append(strength.float())


def unrecorded() -> AbstractContextManager[None]:
    """A block within which writes are not reported: they belong to no token of the caller."""
    return nullcontext() if _unwatched() else _recording_to(None)


@contextmanager
def joined_writes(join: Callable[[list[Tensor]], Tensor]) -> Iterator[None]:
    """Report what is written within the block as one write, which `join` makes of the parts."""
    if not recording():
        yield
        return
    with record_writes() as parts:
        yield
    report_write(join(parts))


@contextmanager
def _recording_to(collected: list[Tensor] | None) -> Iterator[None]:
    token = _recorder.set(collected)
    try:
        yield
    finally:
        _recorder.reset(token)
