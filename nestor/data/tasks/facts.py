"""Facts to be remembered: a name, a number, a sentence that states them, and the question that asks for the
number."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nestor.data.tasks.words import HELD_OUT_NAMES, TRAIN_NAMES
from nestor.errors import ConfigError, suggest


@dataclass(frozen=True)
class Template:
    """Wording of a fact. `statement` ends with a line end; `question` + `answer` is how it is asked."""

    statement: str
    question: str
    answer: str = " {value}."


TEMPLATES = {
    "key": Template("The key of {name} is {value}.\n", "The key of {name} is"),
    "call": Template("Call {name} {value}.\n", "Call {name}"),
    "house": Template("{name} lives at number {value}.\n", "{name} lives at number"),
    "phone": Template("Call {name} on {value} from now on.\n", "The telephone number of {name} is"),
}


@dataclass(frozen=True)
class Fact:
    """One fact. `statement` goes into the text; `question` asks for `answer` (which begins with a space)."""

    name: str
    value: str
    statement: str
    question: str
    answer: str


@dataclass(frozen=True)
class FactSpec:
    """Which facts are drawn.

    Args:
        templates: wordings to draw from, keys of `TEMPLATES`. `key`, `call` and `house` ask in the words of
            the statement, `phone` in other words.
        digits: digits of a value; the first is not 0 (a single digit may be).
        held_out: draw from the names that are kept out of training.
    """

    templates: tuple[str, ...] = ("key",)
    digits: int = 4
    held_out: bool = False

    def __post_init__(self) -> None:
        if not self.templates:
            raise ConfigError(f"no fact template named; choose from {', '.join(TEMPLATES)}")
        for name in self.templates:
            if name not in TEMPLATES:
                raise ConfigError(
                    f"no fact template {name!r}; there are {', '.join(TEMPLATES)}. {suggest(name, TEMPLATES)}"
                )
        if not 1 <= self.digits <= 15:
            raise ConfigError(f"a fact's value has {self.digits} digits; 1 to 15 are possible")

    @property
    def names(self) -> tuple[str, ...]:
        """The names that facts are about."""
        return HELD_OUT_NAMES if self.held_out else TRAIN_NAMES

    def draw(self, rng: np.random.Generator, count: int) -> list[Fact]:
        """`count` facts about different names, with different values.

        Raises:
            ConfigError: there are fewer names or values than that.
        """
        low = 10 ** (self.digits - 1) if self.digits > 1 else 0
        available = 10**self.digits - low
        if count > min(len(self.names), available):
            raise ConfigError(
                f"{count} facts are wanted; there are {len(self.names)} names and {available} values "
                f"of {self.digits} digits, and no two facts share one"
            )
        names = [self.names[i] for i in rng.choice(len(self.names), count, replace=False)]
        values = _distinct(rng, low, 10**self.digits, count)
        kinds = [TEMPLATES[self.templates[i]] for i in rng.integers(len(self.templates), size=count)]
        return [_fact(kind, name, str(value)) for kind, name, value in zip(kinds, names, values, strict=True)]


@dataclass(frozen=True)
class FactsPage:
    """A page of facts, one a line, and `(question, answer)` for each, in another order."""

    text: str
    questions: list[tuple[str, str]]


def facts_page(
    rng: np.random.Generator, n_facts: int, *, held_out: bool = False, spec: FactSpec | None = None
) -> FactsPage:
    """Draw a page of `n_facts` facts.

    Args:
        held_out: use names that training never sees (with the default `spec`).
    """
    facts = (spec or FactSpec(held_out=held_out)).draw(rng, n_facts)
    order = rng.permutation(n_facts)
    return FactsPage(
        "".join(fact.statement for fact in facts), [(facts[i].question, facts[i].answer) for i in order]
    )


def _fact(template: Template, name: str, value: str) -> Fact:
    wordings = (template.statement, template.question, template.answer)
    return Fact(name, value, *(wording.format(name=name, value=value) for wording in wordings))


def _distinct(rng: np.random.Generator, low: int, high: int, count: int) -> list[int]:
    if high - low <= 100_000:
        return [low + int(i) for i in rng.choice(high - low, count, replace=False)]
    values: dict[int, None] = {}
    while len(values) < count:
        values[int(rng.integers(low, high))] = None
    return list(values)
