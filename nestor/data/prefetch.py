"""Make batches ahead of time in a thread, without losing the exact position."""

from __future__ import annotations

import queue
import threading
import weakref
from typing import Any

from nestor.data.streams import Batch, LaneStream


class Prefetcher:
    """Iterates a stream while a background thread makes the next `depth` batches.

    `state_dict` describes the batch that was handed out last, not those made ahead. An exception in the
    thread is raised by the `next` that would have got its batch, and by every later one. The stream must
    not be used by others meanwhile. Use it as a context manager, or call `close`."""

    def __init__(self, stream: LaneStream, depth: int = 2) -> None:
        self.stream = stream
        self.depth = max(1, depth)
        self._consumed = stream.state_dict()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._closed = False

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise ValueError("this Prefetcher is closed")
        if self._failure is not None:
            raise self._failure
        if self._thread is None:
            self._start()
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._failure = item
            raise item
        batch, self._consumed = item
        return batch

    def state_dict(self) -> dict[str, Any]:
        """State of the stream right after the last batch that was handed out."""
        return self._consumed

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Drop what was made ahead and continue from `state`."""
        self._stop()
        self.stream.load_state_dict(state)
        self._consumed = self.stream.state_dict()
        self._failure = None

    def close(self) -> None:
        """Stop the thread and close the stream. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self._stop()
        self.stream.close()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=self.depth)
        self._stopping = threading.Event()
        self._thread = threading.Thread(
            target=_produce,
            args=(self.stream, self._queue, self._stopping),
            name="nestor-prefetch",
            daemon=True,
        )
        self._thread.start()
        weakref.finalize(self, self._stopping.set)

    def _stop(self) -> None:
        """End the thread and put the stream back to the batch that was handed out last."""
        if self._thread is None:
            return
        self._stopping.set()
        self._thread.join()
        self._thread = None
        self.stream.load_state_dict(self._consumed)


def _produce(stream: LaneStream, out: queue.Queue[Any], stopping: threading.Event) -> None:
    """The thread: it holds no reference to the Prefetcher, so that one that is dropped unclosed can be
    collected."""
    while not stopping.is_set():
        try:
            item: Any = (next(stream), stream.state_dict())
        except BaseException as error:  # whatever it is, the consumer gets it
            item = error
        while not stopping.is_set():
            try:
                out.put(item, timeout=0.05)
                break
            except queue.Full:
                continue
        if isinstance(item, BaseException):
            return
