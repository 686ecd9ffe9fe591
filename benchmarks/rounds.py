"""Interleaved rounds within a time limit, of steps that may fail or run out of the device's memory."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from timing import release

Step = Callable[[], object]
# Seconds of a step's turn in a round on a GPU, and runs at most.
ROUND = 0.15
MOST_RUNS = 20


class Deadline:
    """A time after which nothing new is begun."""

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds

    def over(self) -> bool:
        """Whether that time has come."""
        return time.perf_counter() > self.end


@dataclasses.dataclass
class Measured:
    """What one step took.

    Attributes:
        runs: of a round, one queued after the other.
        seconds: of one run, in each counted round.
        first: seconds of the first run, compilation included.
        peak: bytes that the second run added to what stood before it; None on a CPU.
        failure: why there is nothing more: "out of memory", "out of time", or an error.
    """

    runs: int = 1
    seconds: list[float] = dataclasses.field(default_factory=list)
    first: float | None = None
    peak: int | None = None
    failure: str | None = None

    def summary(self, tokens: int) -> dict[str, Any]:
        """As plain values; `tokens` are those of a step."""
        result: dict[str, Any] = {"first_seconds": self.first, "step_peak_bytes": self.peak}
        if self.failure is not None:
            result["failure"] = self.failure
        if self.seconds:
            middle = statistics.median(self.seconds)
            result |= {
                "rounds": len(self.seconds),
                "runs": self.runs,
                "seconds_median": middle,
                "seconds_min": min(self.seconds),
            }
            result["tokens_per_second"] = tokens / middle
        return result


def timed(step: Step, device: str, runs: int = 1) -> float:
    """Seconds of one of several runs: by the device's events on a GPU, by the clock elsewhere."""
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(runs):
            step()
        return (time.perf_counter() - start) / runs
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(runs):
        step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / runs


def measure(
    steps: dict[str, Step], device: str, repeats: int, seconds: float, begin: Deadline | None = None
) -> dict[str, Measured]:
    """Run every step twice, then for at most `seconds` in rounds, the steps in turn.

    On a GPU a step's turn is as many runs as take ROUND seconds, queued without a wait between them: as in
    training, where what the host does for a run goes on while the device works on the one before.

    A step that fails is left out of what follows. One round is run however long it takes. After `begin` no
    step is run for the first time: that may compile for minutes.
    """
    results = {name: Measured() for name in steps}
    for name, step in steps.items():
        result = results[name]
        if begin is not None and begin.over():
            result.failure = "out of time"
            continue
        start = time.perf_counter()
        result.failure = attempt(lambda step=step: timed(step, device))
        if result.failure is not None:
            continue
        result.first = time.perf_counter() - start
        before = _reset_peak() if device == "cuda" else 0
        result.failure = attempt(lambda step=step: timed(step, device))
        if device == "cuda" and result.failure is None:
            result.peak = torch.cuda.max_memory_allocated() - before
            result.runs = _runs(step)
    deadline = Deadline(seconds)
    for round_ in range(repeats):
        if round_ and deadline.over():
            break
        for name, step in steps.items():
            result = results[name]
            if result.failure is None:
                result.failure = attempt(lambda: result.seconds.append(timed(step, device, result.runs)))  # noqa: B023
    return results


def _runs(step: Step) -> int:
    """How many runs of a warm step take ROUND seconds."""
    if torch.distributed.is_initialized():
        return 1  # processes must do the same, and each has a clock of its own
    return max(1, min(MOST_RUNS, round(ROUND / min(timed(step, "cuda") for _ in range(3)))))


def attempt(work: Callable[[], object]) -> str | None:
    """Do it; why it failed, else None. What it held on the device is free again."""
    try:
        work()
        return None
    except torch.OutOfMemoryError:
        failure = "out of memory"
    except Exception as error:
        # A peer that cannot run here is a result, too.
        lines = str(error).strip().splitlines()
        failure = f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
    release()
    return failure


def capture_graph(graph: Any, work: Step, between: Step | None = None) -> None:
    """Record the work as a CUDA graph, after runs outside of it; between: done after each of those."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
            if between is not None:
                between()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        work()


def _reset_peak() -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()
