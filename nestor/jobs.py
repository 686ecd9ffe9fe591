"""Independent runs, many at once: processes of their own, dealt out over the GPUs of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from nestor.errors import ConfigError, JobError, NestorError

Say = Callable[[str], None]
_SHOWN = 5


@dataclass(frozen=True)
class Job:
    """`call(*arguments, device=...)` in a worker: a function of a module, all arguments to be pickled.

    after: names of jobs that must be finished first; names of none of the jobs count as finished.
    """

    name: str
    call: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shared:
    """What jobs of a worker have in common, such as a model: opened by the first of them.

    key: those of one key are the same. open: `open(device)`, to be pickled.
    """

    key: tuple[str, ...]
    open: Callable[[str], Any] = field(compare=False)

    def call(self, method: str, *arguments: Any, device: str) -> None:
        """For a job: call a method of it, for what it does; what it returns is not sent back."""
        getattr(_opened(self, device), method)(*arguments)


@lru_cache(maxsize=1)
def _opened(shared: Shared, device: str) -> Any:
    return shared.open(device)


@dataclass(frozen=True)
class Workers:
    """How many processes, and where they compute.

    Attributes:
        count: of processes.
        device: "cuda" deals out all GPUs in turn, "auto" does so if there is one and else takes the CPU; any
            other, such as "cpu" or "cuda:1", is that of all.
        quiet: no progress bar.
    """

    count: int = 1
    device: str = "auto"
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"--workers is {self.count}; it must be at least 1")

    def devices(self) -> list[str]:
        """The device of each process. Raises ConfigError: it is not there."""
        import torch

        gpus, device = torch.cuda.device_count(), self.device
        if device == "auto":
            device = "cuda" if gpus else "cpu"
        try:
            place = torch.device(device)
        except RuntimeError as error:
            raise ConfigError(f"there is no device {device!r}; give auto, cpu, cuda, cuda:1 ...") from error
        if place.type == "cuda" and (place.index or 0) >= gpus:
            raise ConfigError(f"device {device!r} cannot be used; PyTorch sees {gpus} GPUs")
        if device == "cuda":
            return [f"cuda:{number % gpus}" for number in range(self.count)]
        return [device] * self.count


def run_jobs(jobs: Sequence[Job], workers: Workers, title: str = "runs") -> dict[str, Any]:
    """Run all jobs; what each returned, by name. They start in their order, as far as `after` lets them.

    A job that fails is named at once, and the others go on. Ctrl-C, or the end of this process in any way,
    ends the workers where they are. What should last a job keeps in files itself. A worker has one thread on
    the CPU, and serves several jobs, one after another.

    Raises:
        JobError: jobs failed; the message names them. ConfigError: the device is not there.
    """
    waiting = {job.name: job for job in jobs}
    if len(waiting) < len(jobs):
        raise ConfigError("two jobs have the same name; give each its own")
    context = multiprocessing.get_context("spawn")
    # Workers hold the one end; the other is this process's alone, and closes at the latest when it ends.
    lifeline, ours = context.Pipe(duplex=False)
    idle = [_Worker(device, context, lifeline) for device in workers.devices()[: len(jobs)]]
    everyone = list(idle)
    running: dict[Future[Any], tuple[Job, _Worker, float]] = {}
    found: dict[str, Any] = {}
    failed: dict[str, str] = {}
    try:
        with _display(title, len(jobs), workers.quiet) as (say, advance):
            while waiting or running:
                missing = waiting.keys() | {job.name for job, *_ in running.values()} | failed.keys()
                ready = [job for job in waiting.values() if not missing & set(job.after)]
                for job, worker in zip(ready, list(idle), strict=False):
                    idle.remove(worker)
                    running[worker.start(job)] = (waiting.pop(job.name), worker, time.perf_counter())
                if not running:
                    break  # those that wait, wait for one that failed
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job, worker, begin = running.pop(future)
                    idle.append(worker)
                    reason, result = worker.outcome(future)
                    advance()
                    if reason:
                        failed[job.name] = reason
                        say(f"failed: {job.name}: {reason}")
                        continue
                    found[job.name] = result
                    if not workers.quiet:
                        done = len(found) + len(failed)
                        say(f"{done}/{len(jobs)} {job.name}, {time.perf_counter() - begin:.0f} s")
    finally:
        # Those that idle lose nothing by it, and others are to end.
        ours.close()
        for worker in everyone:
            worker.end()
        lifeline.close()
    if failed:
        raise JobError(_summary(failed, list(waiting), len(jobs)))
    return found


class _Worker:
    """One process, which is started at its first job, and anew after one that ended it."""

    def __init__(self, device: str, context: Any, lifeline: Any) -> None:
        self._device, self._context, self._lifeline = device, context, lifeline
        self._open()

    def start(self, job: Job) -> Future[Any]:
        with _interrupts_ignored():
            return self._pool.submit(_call, job, self._device)

    def outcome(self, future: Future[Any]) -> tuple[str, Any]:
        """Why the job failed, or an empty string; and what it returned."""
        try:
            return future.result()
        except BrokenProcessPool:
            self.end()
            self._open()
            return (
                "its process ended before its time: it was killed, for want of memory perhaps, or crashed",
                None,
            )
        except Exception as error:  # what cannot be pickled
            return f"{type(error).__name__}: {error}", None

    def end(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _open(self) -> None:
        # A pool for each process: it says whose job has ended its process, and leaves the others alone.
        given = (self._device, self._lifeline)
        self._pool = ProcessPoolExecutor(1, self._context, initializer=_prepare, initargs=given)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """A process that starts within ignores Ctrl-C from its very beginning."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _prepare(device: str, lifeline: Any) -> None:
    """In a new process, before its first job."""
    # Ctrl-C goes to all processes of a terminal; it is the first one's business, which ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    torch.set_num_threads(1)
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)


def _end_with(lifeline: Any) -> None:
    with suppress(EOFError, OSError):
        lifeline.recv()
    os._exit(1)


def _call(job: Job, device: str) -> tuple[str, Any]:
    """In a worker: as `_Worker.outcome`. Errors go back as text, for not every one can be pickled."""
    try:
        return "", job.call(*job.arguments, device=device)
    except NestorError as error:
        return f"{type(error).__name__}: {error}", None
    except Exception:
        return traceback.format_exc(), None
    finally:
        if device.startswith("cuda"):
            import torch

            # Others on this GPU may need what this job no longer does.
            torch.cuda.empty_cache()


@contextmanager
def _display(title: str, total: int, quiet: bool) -> Iterator[tuple[Say, Callable[[], None]]]:
    """Ways to write a line and to move the progress bar, both on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeLeft(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bar:
        task = bar.add_task(title, total=total)

        def say(text: str) -> None:
            bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

        yield say, lambda: bar.advance(task)


def _summary(failed: dict[str, str], waiting: Sequence[str], total: int) -> str:
    first = next(iter(failed.values())).strip().splitlines()[-1]
    text = f"{len(failed)} of {total} runs failed: {_some(list(failed))} (the first: {first})."
    if waiting:
        text += f" Not begun, for they need these: {_some(waiting)}."
    return f"{text} The others are finished"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
