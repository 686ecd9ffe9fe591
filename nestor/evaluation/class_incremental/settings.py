"""What a class-incremental measurement depends on besides the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from nestor.errors import ConfigError, suggest

#: What is compared; see `arms.py`.
ARMS = ("nearest", "frozen", "in-context", "online", "online-slow", "continuum", "replay")
#: Those whose weights change, for which a learning rate is chosen.
LEARNING = ("online", "online-slow", "continuum", "replay")


@dataclass(frozen=True)
class ClassIncremental:
    """The stream of classes, and how arms read it."""

    data: Annotated[Path | None, tyro.conf.arg(aliases=["--data"])] = None
    """Folder with the files of the data set (nestor/data/tasks/intents.py says which and where from)."""
    dataset: str = "clinc150"
    """clinc150, banking77 or dbpedia14."""
    classes: int = 10
    """New classes of a session."""
    sessions: int | None = None
    """Sessions; none given: until all classes have come."""
    examples: int = 10
    """Texts of each class that are read."""
    tests: int = 10
    """Texts of each class that are asked after every session from its own on."""
    passes: int = 1
    """How often the examples of a session are read."""
    arms: tuple[str, ...] = ("nearest", "frozen", "in-context", "online", "continuum", "replay")
    """nearest, frozen, in-context, online, online-slow, continuum, replay."""
    periods: tuple[int, ...] = (64, 512)
    """Tokens from update to update: all of them in continuum, the first in online and replay, the last in
    online-slow."""
    learning_rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    """Tried for each learning arm on a stream of its own."""
    tuning_sessions: int = 3
    """Sessions of that stream, at most."""
    optimizer: str = "sgd"
    """How a level steps: sgd, momentum, adam."""
    largest_update: float = 0.01
    """No update changes a level's weights by more than this share of their norm."""
    fixed: float = 0.5
    """Share of the layers, from the first on, that do not learn."""
    text_weight: float = 0.0
    """How much predicting a token of a text counts in learning; one of a label counts 1."""
    replay: float = 0.5
    """In the arm replay, the chance that an example of an earlier session is read after one."""
    text_tokens: int = 64
    """Tokens of a text that are read; the rest is cut."""
    context: int | None = None
    """Tokens of the arm in-context; none given: what the model takes, at most 2,048."""

    def check(self) -> None:
        """Raises ConfigError for a setting that is unknown or out of range."""
        # Not at the top: the command's help is to be quick.
        from nestor.data.tasks.intents import DATASETS

        for kind, given, known in (("arm", self.arms, ARMS), ("data set", (self.dataset,), DATASETS)):
            for name in given:
                if name not in known:
                    raise ConfigError(
                        f"there is no {kind} {name!r}; there are {', '.join(known)}. "
                        f"{suggest(name, known)}".rstrip()
                    )
        if not self.arms or len(set(self.arms)) < len(self.arms):
            raise ConfigError(f"arms are {list(self.arms)}; name at least one, each once")
        for what in ("classes", "sessions", "examples", "tests", "passes", "tuning_sessions", "text_tokens"):
            value = getattr(self, what)
            if value is not None and value < 1:
                raise ConfigError(f"{what} is {value}; it must be at least 1")
        if not self.learning_rates or min(self.learning_rates) <= 0 or not self.periods:
            raise ConfigError(
                f"learning rates are {list(self.learning_rates)} and periods {list(self.periods)}; give at "
                f"least one of each, above 0"
            )
        if not 0 <= self.replay <= 1 or self.text_weight < 0:
            raise ConfigError(
                f"replay is {self.replay}, a chance from 0 to 1, and text_weight {self.text_weight}, which "
                f"must not be below 0"
            )
