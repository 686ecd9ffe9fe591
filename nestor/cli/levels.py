"""What `nestor retrofit` and `nestor learn` share: which weights learn, by options or by a memory file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nestor.errors import ConfigError, StateMismatchError

if TYPE_CHECKING:
    from nestor.learning import Level, Retrofit

NOTE = "retrofit"


@dataclass
class LevelOptions:
    """Which feed-forward weights learn, and how; a memory file keeps this, and goes on with it."""

    reading: Literal["existing", "copies", "added"] | None = None
    """The networks that are there (default), or a copy of each a level, or small ones beside them."""
    periods: tuple[int, ...] | None = None
    """Tokens from update to update of each level, multiples of the shortest; none given: 64 512."""
    learning_rates: tuple[float, ...] | None = None
    """Of each level; none given: 0.03 (sgd, momentum) or 1e-4 (adam, m3). With 0 the model stays as it is."""
    optimizer: Literal["sgd", "momentum", "adam", "m3"] | None = None
    """How a level steps; none given: sgd."""
    largest_update: float | None = None
    """No update changes a level's weights by more than this share of their norm; none given: 0.01."""
    fixed: float | None = None
    """Share of the layers, from the first on, that do not learn; none given: 0.5."""
    order: Literal["shallow_first", "deep_first", "shuffled"] | None = None
    """Which of the others have the shortest period; none given: shallow_first."""
    seed: int | None = None
    """Of --order shuffled, and of the weights that --reading added begins with; none given: 0."""
    width: int | None = None
    """Inner width of the networks of --reading added; none given: a quarter of the model's width."""

    def given(self) -> dict[str, object]:
        """The options that the user set."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}


def retrofit_of(options: LevelOptions, memory: Path | None) -> Retrofit:
    """What the options say, or what a memory file was made with, which options must not contradict.

    Raises:
        StateMismatchError: they do; the message names each difference.
        ConfigError: the file is the memory of a model that does not learn by levels.
    """
    from nestor.learning import Retrofit
    from nestor.models.state import read_notes

    asked = options.given()
    if memory is None or not memory.exists():
        return Retrofit(**asked)  # type: ignore[arg-type]
    notes = read_notes(memory)
    if NOTE not in notes:
        raise ConfigError(
            f"{memory} is a memory without levels, as `nestor chat` makes it of a model with memory layers; "
            f"name another file."
        )
    kept = Retrofit.from_notes(notes[NOTE])
    wanted = Retrofit(**{**kept.to_notes(), **asked})
    differences = kept.differences(wanted)
    if differences:
        raise StateMismatchError(
            f"{memory} has other levels: {'; '.join(differences)}. Leave these options out to go on with it, "
            f"or name a new file."
        )
    return kept


def described(level: Level) -> list[str]:
    """A row of the table of levels: its period, its layers, how it steps."""
    layers = {next(int(part) for part in name.split(".") if part.isdigit()) for name in level.parameters}
    return [
        level.name + " tokens",
        _ranges(sorted(layers)),
        str(len(level.parameters)),
        level.optimizer,
        f"{level.learning_rate:g}",
    ]


COLUMNS = ("level", "layers", "matrices", "optimizer", "learning rate")


def _ranges(numbers: Sequence[int]) -> str:
    """`[3, 4, 5, 9]` as "3-5, 9"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
