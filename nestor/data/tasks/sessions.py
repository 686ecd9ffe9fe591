"""A stream of sessions: facts about people that nobody has, stated in real text, asked for long after.

Entities are invented names and values are dealt out by the seed, so who has not read the statements is right
as often as chance: one in as many as there are candidates. Other candidates are values that were stated of
others in the same session, so to have seen the word does not help; one has to know whose it is. All of it is
text, the same for every tokenizer (spec nested-learning, i.1).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from nestor.data.corpora.sources import TextSource
from nestor.data.tasks.haystack import as_lines, breaks
from nestor.data.tasks.relations import RELATIONS, TRAIN_RELATIONS, Relation
from nestor.data.tasks.words import NOUNS, TRAIN_NOUNS, invented_name
from nestor.errors import ConfigError, DataError

KINDS = ("seen", "held_out", "reversed", "untaught")
# Text of a corpus that is kept to draw from, in characters.
_LARGEST_FILLER = 4_000_000
# Between two statements of a session there are about so many characters of other text, where there is any.
_FILLER_PIECE = 160
#: "training" has relations and values of its own, "related" the relations of the others and the values of
#: "training"; the others share theirs, and none shares an entity.
STREAMS = ("test", "tuning", "training", "validation", "related")
_WORDINGS: dict[str, Relation] = {**RELATIONS, **TRAIN_RELATIONS}


@dataclass(frozen=True)
class SessionFact:
    """An entity, a relation, a value.

    Attributes:
        seen: numbers of the wordings in which it is stated, one for each time; empty: it is never stated.
        other_values, other_entities: what stands to choose beside the right answer.
    """

    entity: str
    relation: str
    value: str
    seen: tuple[int, ...]
    other_values: tuple[str, ...]
    other_entities: tuple[str, ...]

    def wording(self, number: int) -> str:
        """The statement up to the value."""
        return _WORDINGS[self.relation].wordings[number].format(entity=self.entity)

    @property
    def statements(self) -> list[str]:
        """One for each time it is stated, each a line."""
        return [f"{self.wording(number)} {self.value}.\n" for number in self.seen]


class Question(NamedTuple):
    """`text` is to be continued by one of the answers, of which the first is right."""

    kind: str
    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Session:
    """Facts with the text that states them, and entities of which nothing is stated.

    `parts` make the text: lines of statements, and other text.
    """

    facts: tuple[SessionFact, ...]
    untaught: tuple[SessionFact, ...]
    parts: tuple[str, ...]

    @property
    def text(self) -> str:
        return "".join(self.parts)

    def questions(self, kind: str) -> list[Question]:
        """One for each fact; of "untaught", for each entity of which nothing was stated.

        Raises:
            ConfigError: a kind that is not in `KINDS`.
        """
        if kind not in KINDS:
            raise ConfigError(f"there are no {kind!r} questions; there are {', '.join(KINDS)}")
        return [_question(kind, fact) for fact in (self.untaught if kind == "untaught" else self.facts)]


class FillerText:
    """Ordinary text to draw passages from: the documents of a corpus, at most about 4 million characters.

    Raises:
        DataError: the documents are empty.
    """

    def __init__(self, documents: Iterable[str]) -> None:
        self.documents: list[str] = []
        have = 0
        for document in documents:
            if document.strip():
                self.documents.append(document[: _LARGEST_FILLER - have])
                have += len(self.documents[-1])
            if have >= _LARGEST_FILLER:
                break
        if not self.documents:
            raise DataError("there is no text to fill sessions with; name a --corpus that has some")
        self._shares = np.array([len(document) for document in self.documents]) / have

    def identity(self) -> list[str]:
        """What passages depend on, JSON-able: a hash of the documents, wherever they are kept."""
        return TextSource(tuple(self.documents)).identity()

    def text(self, rng: np.random.Generator, characters: int) -> str:
        """At least so many characters of passages that begin at sentences, each ending with a line end."""
        parts: list[str] = []
        missing = characters
        while missing > 0:
            document = self.documents[int(rng.choice(len(self.documents), p=self._shares))]
            start = int(rng.integers(len(document)))
            piece = document[start : start + missing + 400]
            places = breaks(piece)
            begin = int(places[1]) if start and len(places) > 1 else 0
            ends = places[places >= begin + missing]
            passage = as_lines(piece[begin : int(ends[0]) if len(ends) else len(piece)])
            if passage.strip():
                parts.append(passage)
                missing -= len(passage)
        return "".join(parts)


@dataclass(frozen=True)
class SessionSpec:
    """Which sessions are drawn.

    Args:
        sessions: how many; facts: stated in each; untaught: entities in each that are only asked about.
        repeats: times that facts are stated, in turn.
        relations: how many of `RELATIONS`, from the first (in "training" any of `TRAIN_RELATIONS`); facts
            are spread evenly over them.
        distractors: wrong answers to choose from beside the right one.
        filler: characters of ordinary text in each session, between statements.
    """

    sessions: int = 4
    facts: int = 12
    untaught: int = 12
    repeats: tuple[int, ...] = (1, 3, 10)
    relations: int = 2
    distractors: int = 3
    filler: int = 1000

    def __post_init__(self) -> None:
        for name in ("sessions", "facts", "untaught", "relations", "distractors"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.repeats or min(self.repeats) < 1:
            raise ConfigError(f"repeats are {list(self.repeats)}; give how often facts are stated, from 1 on")
        if self.filler < 0:
            raise ConfigError(f"filler is {self.filler} characters; it must not be below 0")
        if self.relations > len(RELATIONS):
            raise ConfigError(f"{self.relations} relations are wanted; there are {len(RELATIONS)}")
        if not self.distractors < self.facts // self.relations <= len(NOUNS):
            raise ConfigError(
                f"{self.facts} facts over {self.relations} relations are {self.facts // self.relations} for "
                f"each; there must be more than the {self.distractors} distractors, which are values of "
                f"other facts of the same relation, and at most {len(NOUNS)}"
            )

    def draw(
        self, filler: FillerText, seed: int, stream: str = "test", beside: Sequence[Session] = ()
    ) -> list[Session]:
        """The sessions of a seed.

        No entity is in two of `STREAMS`, but by the chance of two draws of invented names being the same. In
        "training" relations and values are others too, and each session draws its relations; in "related"
        values are others.

        Args:
            beside: sessions of which no entity is drawn, nor a name that is in one of theirs.
        """
        rng = np.random.default_rng([STREAMS.index(stream), 0, seed])
        taken = [fact.entity for session in beside for fact in session.facts + session.untaught]
        names = _names(rng, self.sessions * (self.facts + self.untaught), taken)
        return [self._session(rng, names, filler, stream) for _ in range(self.sessions)]

    def _session(
        self, rng: np.random.Generator, names: list[str], filler: FillerText, stream: str
    ) -> Session:
        kinds = list(RELATIONS)[: self.relations]
        nouns = TRAIN_NOUNS if stream in ("training", "related") else NOUNS
        if stream == "training":
            known = list(TRAIN_RELATIONS)
            kinds = [known[n] for n in rng.choice(len(known), self.relations, replace=False)]
        times = [self.repeats[i % len(self.repeats)] for i in range(self.facts)]
        rng.shuffle(times)
        entities: dict[str, list[str]] = {kind: [] for kind in kinds}
        for i in range(self.facts):
            entities[kinds[i % len(kinds)]].append(names.pop())
        values = {
            kind: [nouns[n] for n in rng.choice(len(nouns), len(entities[kind]), replace=False)]
            for kind in kinds
        }
        facts = []
        for i in range(self.facts):
            kind, place = kinds[i % len(kinds)], i // len(kinds)
            stated = len(_WORDINGS[kind].wordings) - 1
            first = int(rng.integers(stated))
            facts.append(
                SessionFact(
                    entities[kind][place],
                    kind,
                    values[kind][place],
                    tuple((first + n) % stated for n in range(times[i])),
                    _others(rng, values[kind], place, self.distractors),
                    _others(rng, entities[kind], place, self.distractors),
                )
            )
        untaught = []
        for i in range(self.untaught):
            kind = kinds[i % len(kinds)]
            place = int(rng.integers(len(values[kind])))
            others = _others(rng, values[kind], place, self.distractors)
            untaught.append(SessionFact(names.pop(), kind, values[kind][place], (), others, ()))
        return Session(tuple(facts), tuple(untaught), self._parts(rng, facts, filler))

    def _parts(
        self, rng: np.random.Generator, facts: list[SessionFact], filler: FillerText
    ) -> tuple[str, ...]:
        """Statements in random order with other text evenly between them."""
        statements = [statement for fact in facts for statement in fact.statements]
        rng.shuffle(statements)
        pieces = min(len(statements), -(-self.filler // _FILLER_PIECE))
        after = {round((n + 1) * len(statements) / (pieces + 1)) for n in range(pieces)}
        parts: list[str] = []
        for number, statement in enumerate(statements):
            if number in after:
                parts.append(filler.text(rng, -(-self.filler // len(after))))
            parts.append(statement)
        return tuple(parts)


def gap_text(filler: FillerText, seed: int, session: int, characters: int, stream: str = "test") -> str:
    """The ordinary text that follows a session, at least so many characters."""
    return filler.text(np.random.default_rng([STREAMS.index(stream), 1, seed, session]), characters)


def _question(kind: str, fact: SessionFact) -> Question:
    values = tuple(f" {value}." for value in (fact.value, *fact.other_values))
    if kind == "reversed":
        text = _WORDINGS[fact.relation].reverse.format(value=fact.value)
        return Question(kind, text, tuple(f" {name}." for name in (fact.entity, *fact.other_entities)))
    if kind == "held_out":
        return Question(kind, fact.wording(-1), values)
    return Question(kind, fact.wording(fact.seen[0] if kind == "seen" else 0), values)


def _others(rng: np.random.Generator, items: list[str], place: int, count: int) -> tuple[str, ...]:
    rest = items[:place] + items[place + 1 :]
    return tuple(rest[i] for i in rng.choice(len(rest), count, replace=False))


def _names(rng: np.random.Generator, count: int, taken: Sequence[str]) -> list[str]:
    """Different invented names of four letters or more, none of which is in another or in one that is taken,
    or has it in itself."""
    names: list[str] = []
    while len(names) < count:
        name = invented_name(rng)
        if len(name) >= 4 and not any(name in other or other in name for other in (*taken, *names)):
            names.append(name)
    return names
