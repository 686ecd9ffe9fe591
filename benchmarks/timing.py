"""Time in interleaved rounds, and peak memory in a process of its own."""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from settings import Settings, saved

LONGEST = 540.0  # seconds of a process
PROGRAM = Path(__file__).with_name("layers.py")


def seconds(work: Callable[[], None], device: str) -> float:
    """Wall time of one run, the device's queue included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(
    works: dict[str, Callable[[], None]], s: Settings, progress: Progress, title: str
) -> dict[str, list[float]]:
    """Seconds of every work in each of `repeats` rounds, after one round that is not counted."""
    task = progress.add_task(title, total=(s.repeats + 1) * len(works))
    times: dict[str, list[float]] = {name: [] for name in works}
    for round_ in range(s.repeats + 1):
        for name, work in works.items():
            elapsed = seconds(work, s.device)
            if round_:
                times[name].append(elapsed)
            progress.advance(task)
    return times


def summary(times: list[float], tokens: int, reference: list[float] | None = None) -> dict[str, Any]:
    """Median, minimum, tokens/s, and the ratio to the reference of the same round with its quartiles."""
    result: dict[str, Any] = {
        "seconds_median": statistics.median(times),
        "seconds_min": min(times),
        "tokens_per_second": tokens / statistics.median(times),
    }
    if reference is not None:
        ratios = [a / b for a, b in zip(times, reference, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        result |= {
            "ratio_median": middle,
            "ratio_quartiles": [low, high],
            "ratio_of_minima": min(times) / min(reference),
        }
    return result


def release() -> None:
    """Give back the device's memory that nothing uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def in_a_process(
    subject: str, s: Settings, environment: dict[str, str] | None = None, processes: int = 1
) -> Any:
    """What `child.py` finds out about `kind/...` in a fresh process, or in the first of several."""
    release()
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    with saved(s) as file:
        command = [sys.executable, *(launcher if processes > 1 else []), str(PROGRAM)]
        command += ["--measure", f"{subject}@{file}"]
        everything = {**os.environ, **(environment or {})}
        done = subprocess.run(command, capture_output=True, text=True, env=everything, timeout=LONGEST)
    if done.returncode:
        raise RuntimeError(f"measuring {subject} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_memory(subject: str, s: Settings) -> int:
    """Bytes that `section/name` and three steps of it add to a fresh process, or take at most on the GPU."""
    return in_a_process(f"peak/{subject}", s)


def memory_status(field: str) -> int:
    """VmRSS (now) or VmHWM (the most ever) of this process, in bytes; Linux."""
    # Not ru_maxrss, which a child inherits from the process that started it.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; peak memory on a CPU is measured on Linux only")
