"""The one live display of the quickstart: both models in training, and the progress of what follows.

On a terminal lines are redrawn in place; elsewhere there is a plain line each time there is news.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from nestor.training.logging import duration, rate

Advance = Callable[[int], None]


class TrainingDisplay:
    """Loss, bits per byte, speed and time left of every model.

    Args:
        lengths: steps of each model by its name, in the order of their training.
    """

    def __init__(self, console: Console, lengths: Mapping[str, int]) -> None:
        self.console = console
        self.lengths = dict(lengths)
        self.latest: dict[str, dict[str, Any]] = {name: {} for name in lengths}
        self._printed: dict[str, int] = dict.fromkeys(lengths, 0)
        self._bars = Progress(
            TextColumn("{task.description}", style="bold"),
            BarColumn(bar_width=14),
            MofNCompleteColumn(),
            TextColumn("{task.fields[news]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks = {
            name: self._bars.add_task(name, total=steps, news="waits") for name, steps in lengths.items()
        }

    def __enter__(self) -> TrainingDisplay:
        self._bars.start()
        # A second Ctrl-C ends the process at once, which leaves the cursor as it is.
        self.console.show_cursor(True)
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def begin(self, name: str) -> None:
        """The run of `name` is being opened."""
        self._bars.update(self._tasks[name], news="starting")

    def show(self, name: str, metrics: Mapping[str, Any]) -> None:
        """Show what a log step or a validation gave."""
        latest = self.latest[name]
        latest |= metrics
        step, total = latest.get("step", 0), self.lengths[name]
        news = line(latest)
        self._bars.update(self._tasks[name], completed=step, news=news)
        due = step == total or step >= self._printed[name] + max(1, total // 10)
        if not self.console.is_terminal and due and "loss" in metrics:
            self._printed[name] = step
            self.console.print(f"{name}  {step}/{total}  {news}", markup=False, soft_wrap=True)


def line(latest: Mapping[str, Any]) -> str:
    """`loss 1.432  2.105 bits/byte  31.2k tok/s  0:12 left`, of what is known."""
    parts = []
    if "loss" in latest:
        parts.append(f"loss {latest['loss']:.3f}")
    if "valid_bits_per_byte" in latest:
        parts.append(f"{latest['valid_bits_per_byte']:.3f} bits/byte")
    if "tokens_per_second" in latest:
        parts.append(f"{rate(latest['tokens_per_second'])} tok/s")
    if latest.get("seconds_left"):
        parts.append(f"{duration(latest['seconds_left'])} left")
    return "  ".join(parts)


@contextmanager
def measuring(console: Console) -> Iterator[Callable[[str], Any]]:
    """A function that opens a progress bar of tokens, as `nestor.evaluation.evaluate` wants it.

    How many tokens a suite takes is known after its first model: the second bar has an end.
    """
    columns: Sequence[Any] = (
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=14),
        TextColumn("{task.fields[news]}", justify="right"),
        TimeElapsedColumn(),
    )
    totals: dict[str, float] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:

        @contextmanager
        def bar(title: str) -> Iterator[Advance]:
            suite = title.partition(":")[0]
            task = bars.add_task(title, total=totals.get(suite), news="")
            done = 0

            def advance(tokens: int) -> None:
                nonlocal done
                done += tokens
                bars.update(task, completed=done, news=f"{rate(done)} tokens")

            yield advance
            totals[suite] = done
            bars.update(task, total=max(done, 1), completed=max(done, 1))
            if not console.is_terminal:
                console.print(f"{title}: {done:,} tokens", markup=False)

        yield bar
