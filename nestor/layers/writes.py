"""Watching what memories write: `record_writes` around any calls, and what a layer does to take part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_recorder: ContextVar[list[Tensor] | None] = ContextVar("nestor_writes", default=None)


@contextmanager
def record_writes() -> Iterator[list[Tensor]]:
    """Collect how hard each token is written.

    Within the block every layer with a memory appends a float32 `[B, T, H]`, over its own tokens: the write
    step times the norm of the inner gradient (the "surprise" of Titans), 0 where a token is padding.
    """
    collected: list[Tensor] = []
    with _recording_to(collected):
        yield collected


def recording() -> bool:
    """Whether a call is inside `record_writes`."""
    return _recorder.get() is not None


def report_write(strength: Tensor) -> None:
    """Add `[B, T, H]` to the innermost `record_writes`; outside of one, nothing happens."""
    collected = _recorder.get()
    if collected is not None:
        collected.append(strength.float())


@contextmanager
def unrecorded() -> Iterator[None]:
    """Within the block, writes are not reported: they belong to no token of the caller."""
    with _recording_to(None):
        yield


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
