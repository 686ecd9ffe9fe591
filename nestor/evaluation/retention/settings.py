"""Settings of the retention suite, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nestor.errors import ConfigError, suggest

if TYPE_CHECKING:
    from nestor.data.tasks import SessionSpec

ARMS = (
    "frozen", "in-context", "retrieval", "single-fast", "single-slow", "continuum", "equal-periods",
    "shuffled", "low-rank", "replay", "ewc",
)  # fmt: skip
#: The gap of the primary endpoint, in periods of the slowest level.
ENDPOINT = 4
#: Updates of the slowest level below which it is a constant rather than a memory (spec i.6).
FEWEST_UPDATES = 50


@dataclass(frozen=True)
class RetentionSettings:
    """What the retention suite reads, which arms it compares, and how they are tuned."""

    sessions: int = 4
    """Sessions of facts, read one after another."""
    facts: int = 12
    """Facts of a session; as many entities are asked about of which nothing is stated."""
    repeats: tuple[int, ...] = (1, 3, 10)
    """How often facts are stated, in turn."""
    relations: int = 2
    """Kinds of facts, 1 to 4."""
    distractors: int = 3
    """Wrong answers beside the right one; chance is one in one more than these."""
    filler: int = 1000
    """Characters of ordinary text between the statements of a session."""
    gaps: tuple[int, ...] = (0, 1, 4)
    """Text after a session until it is asked again, in periods of the slowest level; 0 and 4 among them."""
    periods: tuple[int, ...] = (64, 512, 4096)
    """Tokens between updates of the levels; the arms with fewer levels keep the shortest and the longest."""
    arms: tuple[str, ...] = ARMS
    """frozen, in-context, retrieval, single-fast, single-slow, continuum (one for each number of levels),
    equal-periods, shuffled, low-rank, replay, ewc."""
    optimizers: tuple[str, ...] = ("sgd",)
    """Inner steps; each arm that learns is run with each."""
    learning_rates: tuple[float, ...] = ()
    """Of the levels, one for each period, in place of trials; none given: each arm is tuned. The low-rank
    arm, whose weights are others, always is."""
    largest_update: float | None = None
    """With learning_rates: the share of the norm of a level's weights that no update exceeds."""
    trials: int = 4
    """Learning rates tried for each arm, on a stream of its own."""
    smallest_step: float = 1e-4
    """The least of the tried steps, in shares of the norm of the weights."""
    largest_step: float = 1e-2
    """The greatest of them."""
    old_limit: float = 0.01
    """Rise of the bits per byte of old text that an arm may cost."""
    old: tuple[str, ...] = ("self",)
    """Old text: "self", what the model itself writes, or corpora, whose held-out part is taken."""
    old_passages: int = 32
    """Passages of old text."""
    old_length: int = 128
    """Tokens of each."""
    fixed: float = 0.5
    """Share of the layers, from the first on, that do not learn."""
    rank: int = 4
    """Of the low-rank adapter."""
    replay: float = 0.2
    """Share of earlier tokens that the replay arm reads again."""
    pull: float = 0.01
    """Share of what it learned that an average weight of the ewc arm loses at each update."""
    context: int | None = None
    """Tokens read together; none given: what the model takes, at most 2,048."""

    def check(self) -> None:
        """Raises ConfigError for a setting that is unknown or out of range."""
        from nestor.learning.inner import OPTIMIZERS

        for kind, given, known in (
            ("arm", self.arms, ARMS),
            ("inner step", self.optimizers, tuple(OPTIMIZERS)),
        ):
            for name in given:
                if name not in known:
                    raise ConfigError(
                        f"there is no {kind} {name!r}; there are {', '.join(known)}. "
                        f"{suggest(name, known)}".rstrip()
                    )
            if not given or len(set(given)) < len(given):
                raise ConfigError(f"name at least one {kind}, and none twice; got {list(given)}")
        if "equal-periods" in self.arms and "continuum" not in self.arms:
            raise ConfigError(
                "the arm equal-periods takes the learning rates of continuum; name that as well"
            )
        if list(self.periods) != sorted(set(self.periods)) or not self.periods or self.periods[0] < 1:
            raise ConfigError(f"periods are {list(self.periods)}; give rising numbers of tokens")
        wanted = {"continuum", "equal-periods", "shuffled"} & set(self.arms)
        if wanted and len(self.periods) < 2:
            raise ConfigError(f"the arm {min(wanted)} needs two periods or more; got {list(self.periods)}")
        if (
            list(self.gaps) != sorted(set(self.gaps))
            or not {0, ENDPOINT} <= set(self.gaps)
            or self.gaps[0] < 0
        ):
            raise ConfigError(
                f"gaps are {list(self.gaps)}; give rising numbers with 0, right after a session, and "
                f"{ENDPOINT}, where arms are compared"
            )
        if self.learning_rates and len(self.learning_rates) != len(self.periods):
            raise ConfigError(
                f"learning_rates are {list(self.learning_rates)} for periods {list(self.periods)}; give one "
                f"for each"
            )
        if self.learning_rates and len(self.optimizers) > 1:
            raise ConfigError(
                f"learning_rates are given for one inner step, not for {list(self.optimizers)}; name one"
            )
        if self.largest_update is not None and not (self.learning_rates and self.largest_update > 0):
            raise ConfigError(
                f"largest_update is {self.largest_update}; give a share above 0, and only with "
                f"learning_rates (tuned arms have limits of their own)"
            )
        for name in ("trials", "old_passages", "rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.old_length < 8:
            raise ConfigError(f"old_length is {self.old_length}; it must be at least 8 tokens")
        if self.context is not None and self.context < 2:
            raise ConfigError(f"context is {self.context}; it must be at least 2 tokens")
        if not 0 < self.smallest_step <= self.largest_step < math.inf:
            raise ConfigError(
                f"steps are tried from {self.smallest_step} to {self.largest_step}; they must be above 0 and "
                f"in order"
            )
        for name in ("old_limit", "replay", "pull"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if not self.old or ("self" in self.old and len(self.old) > 1):
            raise ConfigError(f'old is {list(self.old)}; give "self" or names of corpora')
        self.spec()

    def spec(self) -> SessionSpec:
        """The sessions as the stream draws them."""
        from nestor.data.tasks import SessionSpec

        return SessionSpec(
            self.sessions, self.facts, self.facts, self.repeats, self.relations, self.distractors, self.filler
        )

    @property
    def slowest(self) -> int:
        """C_max, in tokens."""
        return self.periods[-1]

    @property
    def chance(self) -> float:
        """Of choosing the right answer."""
        return 1 / (1 + self.distractors)
