"""Both runs, one by one, through `nestor.training.train`; and the speed that decides their length."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nestor.quickstart.display import TrainingDisplay
from nestor.quickstart.recipe import Entrant, with_run
from nestor.training.folder import Resume
from nestor.training.loop import RunResult, train

# Steps of a trial; the first ones also warm up caches and are not counted.
_TRIAL, _COLD = 6, 2


class Interrupted(Exception):
    """A signal asked the training to end; what it had done is saved."""

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


@dataclass(frozen=True)
class Trained:
    """What a run came to. `seconds` is the time of this call, `curve` the lines of metrics.jsonl."""

    name: str
    steps: int
    tokens: int
    seconds: float
    metrics: dict[str, Any]
    curve: list[dict[str, Any]]


def seconds_per_step(entrant: Entrant) -> float:
    """Median time of a training step here, from a few steps that are thrown away.

    Raises:
        Interrupted: by Ctrl-C or SIGTERM.
    """
    times: list[float] = []

    def note(metrics: dict[str, Any]) -> None:
        if "tokens_per_second" in metrics:
            times.append(entrant.config.tokens_per_step / metrics["tokens_per_second"])

    with TemporaryDirectory() as folder:
        trial = with_run(
            entrant.config,
            out=str(Path(folder) / "trial"),
            steps=_TRIAL,
            tokens=0,
            log_every=1,
            eval_every=0,
            save_every=0,
        )
        _completed(train(trial, on_step=note, quiet=True))
    return statistics.median(times[_COLD:])


def steps_within(seconds: float, each: Sequence[float]) -> int:
    """Steps that fit into `seconds` if every model takes as many; `each` is the time of one step of each."""
    return max(1, int(seconds / sum(each)))


def train_all(entrants: Sequence[Entrant], display: TrainingDisplay, resume: Resume) -> list[Trained]:
    """Train every entrant, or go on where an earlier call stopped.

    Raises:
        Interrupted: by Ctrl-C or SIGTERM, after the step under way and its checkpoint.
    """
    done = []
    for entrant in entrants:
        display.begin(entrant.name)
        for metrics in _curve(entrant) if resume != "never" else []:
            display.show(entrant.name, metrics)
        began = time.monotonic()
        result = _completed(
            train(
                entrant.config,
                resume=resume,
                quiet=True,
                on_step=lambda metrics, name=entrant.name: display.show(name, metrics),  # type: ignore[misc]
            )
        )
        seconds = time.monotonic() - began
        done.append(
            Trained(entrant.name, result.step, result.tokens, seconds, result.metrics, _curve(entrant))
        )
    return done


def _completed(result: RunResult) -> RunResult:
    if result.signal:
        raise Interrupted(result.signal)
    return result


def _curve(entrant: Entrant) -> list[dict[str, Any]]:
    path = entrant.config.folder / "metrics.jsonl"
    return (
        [json.loads(row) for row in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    )
