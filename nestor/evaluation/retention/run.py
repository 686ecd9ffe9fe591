"""One arm reads one stream, and is asked along the way (spec i.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nestor.data.tasks import FillerText, Session, gap_text
from nestor.data.tasks.sessions import KINDS, Question
from nestor.data.tokenizers import encode_text
from nestor.errors import DataError
from nestor.evaluation.retention.old import OldKnowledge
from nestor.evaluation.retention.questions import Answer, ask
from nestor.evaluation.retention.settings import ENDPOINT, RetentionSettings
from nestor.evaluation.retention.students import Frozen, Reader, Student
from nestor.evaluation.subjects import Subject

# The questions in words that were read.
SEEN = ("seen",)


@dataclass(frozen=True)
class TokenStream:
    """A stream in a model's tokens: for each session its text, and one document for each gap after it that is
    not 0, up to which the next is counted from the one before.

    related: what is read at the end by who has lost a level: sentences of the same kinds, of other entities
    and values, and other text behind them.
    """

    sessions: list[Session]
    texts: list[list[int]]
    gaps: list[list[list[int]]]
    related: list[int]

    @property
    def ids(self) -> list[int]:
        """All tokens of sessions and gaps in order."""
        return [
            i
            for text, gaps in zip(self.texts, self.gaps, strict=True)
            for part in (text, *gaps)
            for i in part
        ]


def make_stream(
    settings: RetentionSettings, filler: FillerText, tokenizer: Any, seed: int, stream: str = "test"
) -> TokenStream:
    """The stream of a seed. A gap of g has exactly g periods of the slowest level in predicted tokens, and
    the related text one, in which every level learns.

    Raises:
        DataError: a gap's text is shorter than its tokens, with a tokenizer of more than 16 letters a token.
    """
    spec = settings.spec()
    sessions = spec.draw(filler, seed, stream)
    texts = [encode_text(tokenizer, session.text) for session in sessions]
    lengths = [(b - a) * settings.slowest for a, b in zip(settings.gaps, settings.gaps[1:], strict=False)]

    def other(number: int, length: int, stream: str, before: str = "") -> list[int]:
        ids = encode_text(tokenizer, before + gap_text(filler, seed, number, 16 * length, stream))
        if len(ids) < length + 1:
            raise DataError(f"the text of a gap has {len(ids)} tokens, and {length + 1} are wanted")
        return ids[: length + 1]

    gaps = []
    for number in range(len(sessions)):
        ids = other(number, sum(lengths), stream)
        documents, start = [], 0
        for length in lengths:
            documents.append(ids[start : start + length + 1])
            start += length
        gaps.append(documents)
    alike = "".join(session.text for session in spec.draw(filler, seed, "related", beside=sessions))
    return TokenStream(sessions, texts, gaps, other(0, settings.slowest, "related", alike))


def run_arm(
    subject: Subject,
    student: Student,
    stream: TokenStream,
    settings: RetentionSettings,
    old: OldKnowledge,
    *,
    endpoint_only: bool = False,
    batch_size: int = 16,
) -> dict[str, Any]:
    """Read the stream and answer; everything that was found, as JSON.

    Args:
        endpoint_only: ask only what tuning needs: the stated wordings, after the gap of the endpoint.

    The result has `tests`: sessions (from 0) asked `after` a session at a `gap` (in periods of the slowest
    level), "before" they are read, or at the "end", with the answers by kind of question; `old`; `levels`;
    `localisation`, right answers at the end with one level restored; `loop_back`, those after the fastest was
    restored and the related text was read; and what it cost.
    """
    asker = _Asker(subject, student, stream.sessions, batch_size)
    tests: list[dict[str, Any]] = []
    for number, (text, gaps) in enumerate(zip(stream.texts, stream.gaps, strict=True)):
        if number and not endpoint_only:
            tests += asker(number, "before", {number: SEEN})
        student.study(text)
        read = number + 1
        if not endpoint_only:
            earlier = dict.fromkeys(range(number), SEEN)
            tests += asker(read, 0, {**earlier, number: KINDS})
        for gap, ids in zip(settings.gaps[1:], gaps, strict=True):
            student.study(ids)
            if not endpoint_only or gap == ENDPOINT:
                tests += asker(read, gap, {number: SEEN if endpoint_only else KINDS})
    scores = old.measure(student.model())
    found: dict[str, Any] = {
        "tests": tests,
        "old": {
            "before": old.before.bits.tolist(),
            "after": scores.bits.tolist(),
            "bytes": old.bytes.tolist(),
            "items": old.items.tolist(),
            "right": scores.right.tolist(),
        },
        "repeats": [[len(fact.seen) for fact in session.facts] for session in stream.sessions],
        "tokens": student.tokens,
        "tokens_again": student.again,
        "seconds": student.seconds,
        "levels": [],
        "localisation": {},
        "loop_back": {},
        "state_bytes": 0,
    }
    count = len(stream.sessions)
    everything = dict.fromkeys(range(count), SEEN)
    if not endpoint_only:
        tests += asker(count, "end", everything)
    if isinstance(student, Reader):
        reports = student.learner.report(student.state)[0]
        found["levels"] = [
            {"name": r.name, "period": r.period, "updates": r.updates, "change": r.change} for r in reports
        ]
        found["state_bytes"] = student.state.nbytes
        if len(reports) > 1 and not endpoint_only:

            def right(reader: Reader) -> list[list[bool]]:
                answers = asker.answers(reader.model(), count, everything)
                return [[a.correct for a in answers[i, kind]] for i in everything for kind in SEEN]

            for report in reports:
                found["localisation"][report.name] = right(student.without(report.name))
            fastest = min(reports, key=lambda report: report.period or math.inf).name
            again = student.without(fastest)
            again.study(stream.related)
            found["loop_back"] = {
                "level": fastest, "tokens": again.tokens - student.tokens, "correct": right(again),
            }  # fmt: skip
    return found


class _Asker:
    """Asks a student about sessions. It sees a scratch copy and changes nothing of the student."""

    def __init__(
        self, subject: Subject, student: Student, sessions: Sequence[Session], batch_size: int
    ) -> None:
        self._subject, self._student, self._sessions = subject, student, sessions
        self._batch_size = batch_size
        # What a model that never changes says of the same material is said once.
        self._said: dict[tuple[Any, ...], list[Answer]] = {}

    def __call__(self, read: int, gap: int | str, kinds: Mapping[int, Sequence[str]]) -> list[dict[str, Any]]:
        """A test for each session: the answers to its kinds of question, after so many sessions were read."""
        found = self.answers(self._student.model(), read, kinds)
        return [
            {
                "session": session,
                "after": read - 1,
                "gap": gap,
                "answers": {kind: _columns(found[session, kind]) for kind in mine},
            }
            for session, mine in kinds.items()
        ]

    def answers(
        self, model: Any, read: int, kinds: Mapping[int, Sequence[str]]
    ) -> dict[tuple[int, str], list[Answer]]:
        """By session and kind. All that is not known is asked at once."""
        found: dict[tuple[int, str], list[Answer]] = {}
        questions: list[Question] = []
        materials: list[str] = []
        places: dict[tuple[int, str], slice] = {}
        keys: dict[tuple[int, str], tuple[Any, ...]] = {}
        for session, kind in [(session, kind) for session, mine in kinds.items() for kind in mine]:
            one = self._sessions[session]
            mine = one.questions(kind)
            shown = [self._student.material(self._sessions[:read], one, q) for q in mine]
            keys[session, kind] = key = (session, kind, *shown)
            if key in self._said:
                found[session, kind] = self._said[key]
                continue
            places[session, kind] = slice(len(questions), len(questions) + len(mine))
            questions += mine
            materials += shown
        said = ask(
            model,
            self._subject.tokenizer,
            questions,
            materials=materials,
            prefix=self._subject.prefix,
            limit=self._subject.limit,
            batch_size=self._batch_size,
        )
        for place, here in places.items():
            found[place] = said[here]
            if isinstance(self._student, Frozen):
                self._said[keys[place]] = said[here]
        return found


def _columns(answers: Sequence[Answer]) -> dict[str, list[Any]]:
    return {
        "correct": [a.correct for a in answers],
        "exact": [a.exact for a in answers],
        "recalled": [a.recalled for a in answers],
        "margin": [round(a.margin, 4) for a in answers],
    }
