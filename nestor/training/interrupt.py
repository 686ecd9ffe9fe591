"""Ctrl-C and SIGTERM: the first asks for a clean end, a second Ctrl-C ends at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """Remembers the first SIGINT or SIGTERM while it is entered; the loop asks `received` between steps.

    After the first, SIGINT has the system's own effect again: it ends the process wherever it is, even inside
    a call that does not return. Whatever file was being written is a temporary one.
    Outside the main thread, where Python takes no signals, nothing is caught.

    Args:
        quiet: do not say that the request was taken.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.received = 0
        self.quiet = quiet
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            return
        self.received = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if not self.quiet:
            # The live display hides the cursor, and the next Ctrl-C would leave it so. A handler may run
            # inside another write to the same stream, so it writes past Python's buffers.
            show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
            text = "\nfinishing this step, then saving; Ctrl-C again stops at once\n"
            os.write(2, (show_cursor + text).encode())
