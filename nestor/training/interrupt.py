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

    A second SIGINT leaves the process without unwinding: whatever file was being written is a temporary one.
    Outside the main thread, where Python takes no signals, nothing is caught.
    """

    def __init__(self) -> None:
        self.received = 0
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
        if self.received and number == signal.SIGINT:
            # The live display hides the cursor; a process that ends here has to show it again.
            message = "\nstopped at once; the last checkpoint is whole\n"
            os.write(
                sys.stderr.fileno(), ("\x1b[?25h" if sys.stderr.isatty() else "").encode() + message.encode()
            )
            os._exit(128 + number)
        self.received = self.received or number
