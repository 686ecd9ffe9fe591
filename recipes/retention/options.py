"""Settings of meta_tune.py, checked once."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from nestor.errors import ConfigError
from nestor.evaluation.retention.settings import RetentionSettings


@dataclass
class Args:
    """Tune a model so that it learns from what it reads.

    Examples:
      python recipes/retention/meta_tune.py checkpoints/stories260K --out runs/meta/stories --facts 4 \\
        --relations 1
      python recipes/retention/meta_tune.py checkpoints/stories260K --out runs/meta/control --facts 4 \\
        --relations 1 --control
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A folder with a model, or the id of one on the Hugging Face hub."""
    out: Path
    """Folder of the results."""
    control: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Train in the ordinary way on the same sessions."""
    sessions: int = 4
    """Of a stream, one a step; what was learned stays until the last, and the next stream begins anew."""
    facts: int = 8
    """Facts of a session."""
    relations: int = 2
    """Kinds of facts in a session."""
    repeats: tuple[int, ...] = (1, 2)
    """How often facts are stated, in turn."""
    distractors: int = 3
    """Wrong answers beside the right one, when recall is measured."""
    filler: int = 300
    """Characters of ordinary text between the statements of a session."""
    gap: int = 16
    """Most periods of the fastest level of other text between a session and its questions; each step draws
    how many, and recall is measured after all of them."""
    ramp: float = 0.5
    """Share of the steps over which streams get longer: from one session, and no gap, to all."""
    kinds: tuple[Literal["seen", "held_out", "reversed"], ...] = ("seen",)
    """Questions: in a stated wording, in another one, or reversed."""
    corpus: tuple[str, ...] = ("classics",)
    """Ordinary text."""
    periods: tuple[int, ...] = (64, 256)
    """Tokens between updates of the levels; a session must have as many as the longest."""
    optimizer: Literal["sgd", "momentum", "adam", "m3"] = "sgd"
    """Inner steps of the levels."""
    learning_rates: tuple[float, ...] = ()
    """Of each level to begin with; none given: those with which a first update is --step."""
    step: float = 1e-2
    """A first update at the beginning, as a share of the norm of a level's weights."""
    largest_update: float = 0.1
    """Share of the norm of a level's weights that no update exceeds."""
    fixed: float = 0.5
    """Share of the layers, from the first on, that do not learn from streams."""
    tune: Literal["adaptive", "all"] = "adaptive"
    """Whose beginning is learned: the weights that learn from streams, or all of the model."""
    reach: int | None = None
    """Updates of a level that the outer gradient crosses, the newest first; 0: none. None given: all."""
    caches: bool = True
    """The outer gradient also goes through cached keys and values. Without, memory ends with --reach."""
    streams: int = 8
    """Of a step."""
    together: int | None = None
    """Streams that are read at the same time; fewer take less memory. None given: all, or 1 of models of
    Nestor's own."""
    steps: int = 400
    """Of outer training."""
    learning_rate: float = 1e-3
    """Of the initial weights."""
    rate_learning_rate: float = 0.03
    """Of the logarithms of the levels' learning rates."""
    warmup: int = 20
    """Steps over which these rise; afterwards they fall to a tenth along a cosine."""
    clip: float = 1.0
    """Norm of the outer gradient that is not exceeded."""
    keep: float = 1.0
    """How much it counts that old text stays as likely as it was: KL in nats a token."""
    old_passages: int = 256
    """Passages that the untuned model writes for it."""
    old_length: int = 64
    """Tokens of each."""
    seed: int = 0
    """Of the sessions."""
    measure_every: int = 100
    """Steps from measurement to measurement."""
    validation: int = 8
    """Streams of each."""
    save_every: int = 20
    """Steps after which a stopped run can go on, as soon as streams begin anew."""
    minutes: float | None = None
    """Stop after so long, with the model as it is then, to go on later."""
    context: int | None = None
    """Tokens read together; none given: what the model takes, at most 2,048."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ..."""

    def check(self) -> None:
        """Raises ConfigError for what is out of range."""
        for name in (
            "streams",
            "sessions",
            "steps",
            "validation",
            "measure_every",
            "save_every",
            "old_passages",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; give at least 1")
        if self.gap < 0 or self.keep < 0 or self.old_length < 8 or not 0 <= self.seed < 100:
            raise ConfigError(
                f"--gap is {self.gap}, --keep {self.keep}, --old-length {self.old_length}, --seed "
                f"{self.seed}; give 0 or more, 0 or more, 8 or more, and 0 to 99"
            )
        if not 0 <= self.ramp <= 1:
            raise ConfigError(f"--ramp is {self.ramp}; give a share of the steps, from 0 to 1")
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise ConfigError(f"--kinds are {list(self.kinds)}; give at least one, and none twice")

    def stream(self, number: int) -> tuple[int, int]:
        """Sessions of a stream that begins at this step, and the most chunks of a gap."""
        share = min(1.0, number / (self.ramp * self.steps)) if self.ramp else 1.0
        return 1 + round(share * (self.sessions - 1)), round(share * self.gap)

    def beginnings(self) -> set[int]:
        """Steps at which streams begin anew."""
        found, number = set(), 0
        while number <= self.steps:
            found.add(number)
            number += self.stream(number)[0]
        return found

    def suite(self) -> RetentionSettings:
        """What the retention suite calls the same."""
        return RetentionSettings(
            sessions=1, facts=self.facts, repeats=self.repeats, relations=self.relations,
            distractors=self.distractors, filler=self.filler, periods=self.periods, fixed=self.fixed,
            optimizers=(self.optimizer,), arms=("frozen",), context=self.context,
        )  # fmt: skip

    @property
    def digest(self) -> str:
        """Of all that what was learned depends on."""
        free = {"out", "minutes", "device", "save_every", "measure_every", "validation"}
        kept = {name: value for name, value in asdict(self).items() if name not in free}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
