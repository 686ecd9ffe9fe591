"""Facts to be remembered: what they are about, a value, the sentence that states them, the question."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nestor.data.tasks.words import (
    HELD_OUT_NAMES,
    INVENTED_NAMES,
    RELATIONS,
    TRAIN_NAMES,
    invented_name,
)
from nestor.errors import ConfigError, suggest


@dataclass(frozen=True)
class Template:
    """Wording of a fact. `statement` ends with a line end; `question` + `answer` is how it is asked.

    A fact is about a person, and its value a number; with `own` it is about a relation of the speaker (`dog's
    name`), and its value a name, half of the time an invented one unless held-out names are asked for.
    """

    statement: str
    question: str
    answer: str = " {value}."
    own: bool = False


TEMPLATES = {
    "key": Template("The key of {name} is {value}.\n", "The key of {name} is"),
    "call": Template("Call {name} {value}.\n", "Call {name}"),
    "house": Template("{name} lives at number {value}.\n", "{name} lives at number"),
    "phone": Template("Call {name} on {value} from now on.\n", "The telephone number of {name} is"),
    # Lines of two speakers in turn, as `nestor chat` feeds them: the second one answers.
    "ask-number": Template(
        "The number of {name} is {value}.\nI will remember that.\n",
        "What is the number of {name}?\nThe number of {name} is",
    ),
    "ask-name": Template(
        "My {name} is {value}.\nI will remember that.\n",
        "What is my {name}?\nYour {name} is",
        own=True,
    ),
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
            the statement, `phone` in other words; `ask-number` and `ask-name` are turns of a conversation.
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
        if sum(kind.own for kind in kinds) > len(RELATIONS):
            raise ConfigError(f"{count} facts are wanted, most about relations; there are {len(RELATIONS)}")
        facts = []
        relations = iter(rng.permutation(len(RELATIONS)) if any(kind.own for kind in kinds) else ())
        for kind, name, value in zip(kinds, names, values, strict=True):
            if not kind.own:
                facts.append(_fact(kind, name, str(value)))
                continue
            if not self.held_out and rng.integers(2):
                name = invented_name(rng)
            facts.append(_fact(kind, RELATIONS[next(relations)], name))
        return facts

    def longest(self, measure: Callable[[str], int]) -> int:
        """The greatest `measure` of a statement that can be drawn."""
        number = "8" * self.digits
        statements = [
            TEMPLATES[template].statement.format(name=about, value=value)
            for template in self.templates
            for about in (RELATIONS if TEMPLATES[template].own else self.names)
            for value in (self.names if TEMPLATES[template].own else (number,))
        ]
        return max(map(measure, statements))


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


def guess_bits(value: str) -> float:
    """Bits of a value as `FactSpec` draws it: of a number of so many digits, or of a name."""
    if value.isdigit():
        return math.log2(9 * 10 ** (len(value) - 1) if len(value) > 1 else 10)
    if value in HELD_OUT_NAMES:
        return math.log2(len(HELD_OUT_NAMES))
    return 1 + math.log2(len(TRAIN_NAMES) if value in TRAIN_NAMES else INVENTED_NAMES)


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
