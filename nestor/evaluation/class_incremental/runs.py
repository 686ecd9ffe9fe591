"""Arms on streams of classes: each run is made once and kept; and what a run says."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nestor.data.tasks.intents import LabelledTexts, Session, class_sessions
from nestor.errors import NonFiniteError
from nestor.evaluation.class_incremental.arms import Arm, make_arm
from nestor.evaluation.class_incremental.settings import LEARNING, ClassIncremental
from nestor.evaluation.figures import file_name
from nestor.evaluation.keeping import Kept
from nestor.evaluation.scoring import PIECE, Bar
from nestor.evaluation.subjects import Subject
from nestor.models.state import fingerprint

FORMAT = 1
#: Of the stream on which learning rates are chosen; its texts are of the training part.
TUNING_SEED = 0
MEASURES = ("average", "final", "acquired", "forgetting")
# Settings on which the names of runs depend, or that say where the data is, which is there itself.
_FREE = ("data", "dataset", "arms", "learning_rates")


class Runs:
    """The runs of one model.

    Args:
        folder: where they are kept and found again; None: nowhere.
        depends: what they depend on, if it is known (`kept.settings` of another process for the same).
    """

    def __init__(
        self,
        subject: Subject,
        data: LabelledTexts,
        settings: ClassIncremental,
        *,
        batch_size: int = 64,
        piece: int = PIECE,
        folder: Path | None = None,
        bar: Bar | None = None,
        depends: Mapping[str, Any] | None = None,
    ) -> None:
        self.subject, self.data, self.settings, self.folder = subject, data, settings, folder
        self.batch_size, self.piece = batch_size, piece
        self._bar = bar or (lambda title: nullcontext(None))
        kept = None if folder is None else folder / file_name(subject.name)
        self.kept = Kept(kept, self._depends() if depends is None else depends)

    def rates(self, arm: str) -> tuple[float, ...]:
        """The learning rates that an arm tries; none where there is nothing to choose."""
        rates = self.settings.learning_rates
        return rates if arm in LEARNING and len(rates) > 1 else ()

    def trial(self, arm: str, rate: float) -> float:
        """Average accuracy of an arm at a learning rate, on a stream whose tests are training texts that it
        does not read."""

        def make() -> float:
            short = min(
                self.settings.tuning_sessions, self.settings.sessions or self.settings.tuning_sessions
            )
            stream = self.stream(TUNING_SEED, sessions=short, held_out=True)
            return measures(self._run(arm, rate, TUNING_SEED, stream, f"trying {rate:g}"))["average"]

        return self.kept.get(trial_name(arm, rate), make)

    def tuned(self, arm: str) -> tuple[float | None, dict[str, float]]:
        """The learning rate of the best average accuracy, None of an arm that learns nothing; and what was
        tried."""
        if arm not in LEARNING:
            return None, {}
        tried = {rate: self.trial(arm, rate) for rate in self.rates(arm)}
        best = max(tried, key=lambda rate: tried[rate]) if tried else self.settings.learning_rates[0]
        return best, {f"{rate:g}": average for rate, average in tried.items()}

    def run(self, arm: str, seed: int) -> dict[str, Any]:
        """An arm on a seed's stream at the learning rate that was chosen: `run_stream`, and the seed."""
        rate = self.tuned(arm)[0]
        name = run_name(arm, rate, seed)
        return self.kept.get(
            name,
            lambda: {"seed": seed, **self._run(arm, rate or 0.0, seed, self.stream(seed), f"seed {seed}")},
        )

    def stream(self, seed: int, sessions: int | None = None, held_out: bool = False) -> list[Session]:
        """The sessions of a seed. Raises as `class_sessions`."""
        chosen = self.settings
        return class_sessions(
            self.data, seed=seed, classes=chosen.classes, examples=chosen.examples, tests=chosen.tests,
            sessions=sessions or chosen.sessions, held_out=held_out,
        )  # fmt: skip

    def _run(self, arm: str, rate: float, seed: int, stream: Sequence[Session], title: str) -> dict[str, Any]:
        with self._bar(f"{self.subject.name}: {arm}, {title}") as progress:
            made = make_arm(
                arm, self.subject, self.settings, learning_rate=rate, seed=seed, batch_size=self.batch_size,
                piece=self.piece, progress=progress,
            )  # fmt: skip
            return run_stream(made, stream)

    def _depends(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "settings": {k: v for k, v in asdict(self.settings).items() if k not in _FREE},
            "data": self.data.identity(),
            "model": fingerprint(self.subject.model),
            "tokenizer": self.subject.describe()["tokenizer"],
        }


def trial_name(arm: str, rate: float) -> str:
    """The file of `Runs.trial`, without its suffix."""
    return f"{arm}-tuning-rate-{rate:g}"


def run_name(arm: str, rate: float | None, seed: int) -> str:
    """That of `Runs.run`."""
    return f"{arm}{'' if rate is None else f'-rate-{rate:g}'}-seed-{seed}"


def run_stream(arm: Arm, stream: Sequence[Session]) -> dict[str, Any]:
    """One arm through one stream.

    Returns:
        `right[j][i]`: texts of session i, for i up to j, whose class is chosen among the labels of sessions 0
        to j after session j was read; `asked[i]`: texts of session i; `seen[j]`: labels so far. From a
        session on whose learning is not finite, `diverged`, nothing is right.
    """
    begin = time.perf_counter()
    labels: list[str] = []
    right: list[list[int]] = []
    diverged = None
    for number, session in enumerate(stream):
        labels += session.labels
        try:
            if diverged is None:
                arm.read(session)
                right.append(
                    [
                        sum(arm.choose(one.text, labels) == one.label for one in before.tests)
                        for before in stream[: number + 1]
                    ]
                )
        except NonFiniteError:
            diverged = number
        if diverged is not None:
            right.append([0] * (number + 1))
    seen = [sum(len(session.labels) for session in stream[: n + 1]) for n in range(len(stream))]
    return {
        "right": right,
        "asked": [len(session.tests) for session in stream],
        "seen": seen,
        "classes": [list(session.labels) for session in stream],
        "diverged": diverged,
        "learning": arm.report(),
        "seconds": round(time.perf_counter() - begin, 1),
    }


def curve(run: dict[str, Any]) -> list[float]:
    """Accuracy on all classes so far after each session."""
    return [sum(row) / sum(run["asked"][: len(row)]) for row in run["right"]]


def measures(run: dict[str, Any]) -> dict[str, float]:
    """Figures of one run, with `R[j][i]` the accuracy on session i after session j of S.

    average: mean of the `curve`. final: its last value. acquired: mean of `R[i][i]`. forgetting: mean over
    sessions i but the last of `max_j R[j][i] - R[S][i]`, j from i to S - 1; a text that is taken for one of a
    later class counts in it as well as one that is no longer known.
    """
    accuracy = [
        [right / asked for right, asked in zip(row, run["asked"], strict=False)] for row in run["right"]
    ]
    last = len(accuracy) - 1
    lost = [max(accuracy[j][i] for j in range(i, last)) - accuracy[last][i] for i in range(last)]
    whole = curve(run)
    return {
        "average": sum(whole) / len(whole),
        "final": whole[-1],
        "acquired": sum(accuracy[i][i] for i in range(last + 1)) / (last + 1),
        "forgetting": sum(lost) / len(lost) if lost else 0.0,
    }
