"""What the retention suite finds of one model, in pieces that are made once and kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nestor.data.tasks import FillerText
from nestor.evaluation.figures import file_name
from nestor.evaluation.keeping import Kept
from nestor.evaluation.retention.arms import (
    Arm,
    Rate,
    arms_of,
    given_rates,
    make_student,
    rates_for,
    unit_steps,
)
from nestor.evaluation.retention.old import OldKnowledge, old_passages
from nestor.evaluation.retention.run import TokenStream, make_stream, run_arm
from nestor.evaluation.retention.settings import RetentionSettings
from nestor.evaluation.retention.tuning import Trial, choose, steps_of, try_step
from nestor.evaluation.scoring import Bar
from nestor.evaluation.subjects import Subject
from nestor.models.state import fingerprint

FORMAT = 3
# Settings on which the names of pieces depend, or what is made of them, or that are there as what they name.
_FREE = ("old", "arms", "optimizers", "old_limit", "trials", "smallest_step", "largest_step")


class Pieces:
    """One model with its streams, old text, and what is finished.

    Args:
        filler: ordinary text. folder: where pieces are kept and found again; None: nowhere.
        depends: what pieces depend on, if it is known (`kept.settings` of another process for the same).
    """

    def __init__(
        self,
        subject: Subject,
        filler: FillerText,
        settings: RetentionSettings,
        *,
        batch_size: int = 16,
        folder: Path | None = None,
        bar: Bar | None = None,
        depends: Mapping[str, Any] | None = None,
    ) -> None:
        self.subject, self.filler, self.settings = subject, filler, settings
        self.batch_size, self.folder = batch_size, folder
        self.arms = {arm.name: arm for arm in arms_of(settings)}
        self.context = subject.context(settings.context)
        self._bar = bar or (lambda title: nullcontext(None))
        self._streams: dict[tuple[int, str], TokenStream] = {}
        kept = None if folder is None else folder / file_name(subject.name)
        self.kept = Kept(kept, self._depends() if depends is None else depends)
        self.old = OldKnowledge(subject, self._old("test"), batch_size)
        self._fisher = self._old("fisher") if any(arm.pull for arm in self.arms.values()) else []

    def units(self, arm: Arm) -> list[tuple[float, float]]:
        """Of each level of an arm the size of a first step (`unit_steps`)."""
        ids = self.stream(0, "tuning").ids
        return self.kept.get(
            units_name(arm),
            lambda: unit_steps(arm, self.subject.model, ids, self.settings, self.context),
        )

    def trial(self, arm: Arm, step: float) -> Trial:
        """What came of a step of an arm on the tuning stream."""

        def run(step: float) -> Any:
            title = f"{arm.name}, trying {step:g}"
            return self._run(arm, rates_for(step, self.units(arm)), 0, title, "tuning")

        return Trial(**self.kept.get(trial_name(arm, step), lambda: asdict(try_step(run, step))))

    def tuned(self, arm: Arm) -> dict[str, Any]:
        """The trials of an arm and the learning rates that they chose, or those that are given, as JSON."""
        if not arm.learns:
            return {"trials": [], "step": None, "rates": [], "rates_of": ""}
        if arm.rates_of:
            return {**self.tuned(self.arms[arm.rates_of]), "trials": [], "rates_of": arm.rates_of}
        if given := given_rates(arm, self.settings):
            return {"trials": [], "step": None, "rates": [asdict(rate) for rate in given], "rates_of": ""}
        trials = [self.trial(arm, step) for step in steps_of(self.settings)]
        best = choose(trials, self.settings.old_limit)
        rates = [asdict(rate) for rate in rates_for(best.step, self.units(arm))]
        return {
            "trials": [asdict(trial) for trial in trials], "step": best.step, "rates": rates, "rates_of": "",
        }  # fmt: skip

    def record(self, arm: Arm, seed: int) -> Any:
        """What came of an arm on a seed's stream, at the learning rates that its trials chose."""
        tuned = self.tuned(arm)
        rates = [Rate(**rate) for rate in tuned["rates"]]
        name = record_name(arm, tuned["step"], seed)
        return self.kept.get(name, lambda: self._run(arm, rates, seed, f"{arm.name}, seed {seed}"))

    def stream(self, seed: int, stream: str = "test") -> TokenStream:
        """The stream of a seed, in the model's tokens."""
        if (seed, stream) not in self._streams:
            made = make_stream(self.settings, self.filler, self.subject.tokenizer, seed, stream)
            self._streams[seed, stream] = made
        return self._streams[seed, stream]

    def _depends(self) -> dict[str, Any]:
        shared = {k: v for k, v in asdict(self.settings).items() if k not in _FREE}
        return {
            "format": FORMAT,
            "settings": shared,
            "filler": self.filler.identity(),
            # What the model writes itself follows from the model.
            "old": None if self._own_text else self._draw_old("test"),
            "model": fingerprint(self.subject.model),
            "tokenizer": self.subject.describe()["tokenizer"],
        }

    @property
    def _own_text(self) -> bool:
        return tuple(self.settings.old) == ("self",)

    def _old(self, use: str) -> list[list[int]]:
        # To the last bit another device writes other text, so what the model writes is kept.
        draw = self._draw_old
        return self.kept.get(f"old-{use}", lambda: draw(use)) if self._own_text else draw(use)

    def _draw_old(self, use: str) -> list[list[int]]:
        settings = self.settings
        return old_passages(self.subject, settings.old, settings.old_passages, settings.old_length, use=use)

    def _run(
        self, arm: Arm, rates: Sequence[Rate], seed: int, title: str, stream: str = "test"
    ) -> dict[str, Any]:
        texts = self.stream(seed, stream)
        with self._bar(f"retention: {self.subject.name}, {title}") as progress:
            student = make_student(
                arm, self.subject.model, rates, self.settings, self.context,
                old=self._fisher, seed=seed, progress=progress,
            )  # fmt: skip
            return run_arm(
                self.subject, student, texts, self.settings, self.old, endpoint_only=stream == "tuning",
                batch_size=self.batch_size,
            )  # fmt: skip


def units_name(arm: Arm) -> str:
    """The file of `Pieces.units`, without its suffix."""
    return f"{_stem(arm)}-units"


def trial_name(arm: Arm, step: float) -> str:
    """That of `Pieces.trial`."""
    return f"{_stem(arm)}-tuning-step-{step:g}"


def record_name(arm: Arm, step: float | None, seed: int) -> str:
    """That of `Pieces.record`."""
    return f"{_stem(arm)}{'' if step is None else f'-step-{step:g}'}-seed-{seed}"


def _stem(arm: Arm) -> str:
    """The arm as files of pieces call it, whatever other optimisers are run."""
    return f"{arm.base}-{'x'.join(map(str, arm.periods))}-{arm.optimizer}" if arm.learns else arm.base
