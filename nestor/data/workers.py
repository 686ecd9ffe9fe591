"""The lanes of a stream made by several processes."""

from __future__ import annotations

import multiprocessing
import queue
import signal
from collections.abc import Callable, Sequence
from typing import Any

import torch

from nestor.data.streams import Batch, LaneStream, Piece, as_batch, as_piece, empty_piece, put_rows
from nestor.errors import DataError

# Batches that a process is ahead.
AHEAD = 4
Build = Callable[[Sequence[int]], LaneStream]


class WorkerStream(LaneStream):
    """A stream's batches, each process making some of the lanes; the same batches as the stream's own.

    Processes start at the first batch and end with `close` or with this process. Text that has not been
    tokenized should be before: every process opens it.

    Args:
        stream: what this process would make. It says what the batches are, and is not advanced.
        build: makes a stream like it with other lanes, in a fresh process: it must be picklable.
        workers: how many processes, at most one a lane.

    Raises:
        DataError: a process ends before its time. What it raised is raised here.
    """

    def __init__(self, stream: LaneStream, build: Build, workers: int) -> None:
        super().__init__(stream.batch_size, stream.length, stream.lanes)
        self.stream, self.build = stream, build
        self.position = stream.position
        count = min(workers, len(self.lanes))
        self._rows = [list(range(worker, len(self.lanes), count)) for worker in range(count)]
        self._running: list[tuple[Any, Any]] = []

    def __next__(self) -> Batch:
        if not self._running:
            self._start()
        batch = as_batch(empty_piece(len(self.lanes), self.length))
        for rows, (process, parts) in zip(self._rows, self._running, strict=True):
            put_rows(batch, rows, as_batch(_next_part(process, parts)))
        self.position += self.length
        return batch

    def identity(self) -> dict[str, Any]:
        return self.stream.identity()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._stop()
        super().load_state_dict(state)

    def close(self) -> None:
        self._stop()
        self.stream.close()

    def _start(self) -> None:
        # Forked processes would share locks and a GPU's context with this one.
        context = multiprocessing.get_context("spawn")
        state = self.state_dict()
        for rows in self._rows:
            parts = context.Queue(maxsize=AHEAD)
            lanes = [self.lanes[row] for row in rows]
            process = context.Process(
                target=_make, args=(self.build, lanes, state, parts), name="nestor-data", daemon=True
            )
            process.start()
            self._running.append((process, parts))

    def _stop(self) -> None:
        for process, parts in self._running:
            process.terminate()
            process.join()
            parts.close()
        self._running = []


def _next_part(process: Any, parts: Any) -> Piece:
    while True:
        try:
            part = parts.get(timeout=1.0)
        except queue.Empty:
            if process.is_alive():
                continue
            raise DataError(
                f"a process that makes batches has ended with exit code {process.exitcode}; set "
                "run.data_workers to 0 to make them in the training process"
            ) from None
        if isinstance(part, BaseException):
            raise part
        return part


def _make(build: Build, lanes: Sequence[int], state: dict[str, Any], parts: Any) -> None:
    """A process: batches of these lanes from the position in `state` on, for ever."""
    # Ctrl-C is the training process's business: it saves, and ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    try:
        stream = build(lanes)
        stream.load_state_dict(state)
        while True:
            # As arrays: tensors would be shared memory that ends with this process.
            parts.put(as_piece(next(stream)))
    except BaseException as error:  # whatever it is, the consumer gets it
        parts.put(error)
        parts.close()
        parts.join_thread()
