"""Watching what memories write: `record_writes` around any calls, and what a layer does to take part."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor

_recorder: ContextVar[list[Tensor] | None] = ContextVar("nestor_writes", default=None)


@contextmanager
def record_writes() -> Iterator[list[Tensor]]:
    """Collect how hard each token is written.

    Within the block every layer with a memory appends a float32 `[B, T, H]`, over its own tokens: the write
    step times the norm of the inner gradient (the "surprise" of Titans), 0 where a token is padding. What
    torch.compile has compiled is run uncompiled.
    """
    collected: list[Tensor] = []
    # The import of torch._dynamo takes seconds; nothing is compiled before it.
    loaded = "torch._dynamo" in sys.modules
    with torch.compiler.set_stance("force_eager") if loaded else nullcontext(), _recording_to(collected):
        yield collected


def recording() -> bool:
    """Whether a call is inside `record_writes`."""
    # torch.compile cannot trace a context variable; what it traces never records.
    return not torch.compiler.is_compiling() and _recorder.get() is not None


def report_write(strength: Tensor) -> None:
    """Add `[B, T, H]` to the innermost `record_writes`; outside of one, nothing happens."""
    collected = None if torch.compiler.is_compiling() else _recorder.get()
    if collected is not None:
        collected.append(strength.float())


def unrecorded() -> AbstractContextManager[None]:
    """A block within which writes are not reported: they belong to no token of the caller."""
    return nullcontext() if torch.compiler.is_compiling() else _recording_to(None)


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
