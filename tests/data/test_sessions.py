"""The stream of sessions: drawn by the seed, by chance alone, and with no answer in it but as a statement."""

from itertools import combinations

import numpy as np
import pytest

from nestor.data.tasks import FillerText, SessionSpec, gap_text
from nestor.data.tasks.relations import RELATIONS, TRAIN_RELATIONS
from nestor.data.tasks.sessions import KINDS, STREAMS
from nestor.data.tasks.words import NOUNS, TRAIN_NOUNS
from nestor.errors import ConfigError, DataError

SPEC = SessionSpec(sessions=3, facts=12, untaught=6, repeats=(1, 3), relations=3, distractors=2, filler=500)


@pytest.fixture(scope="module")
def filler():
    return FillerText(
        ["Rain fell on the roof, and nothing moved. " * 50, "A door closed. It was late.\n" * 50]
    )


def test_the_seed_gives_the_stream_and_tuning_is_another(filler):
    one, again, other = SPEC.draw(filler, 3), SPEC.draw(filler, 3), SPEC.draw(filler, 4)
    tuning = SPEC.draw(filler, 3, "tuning")
    assert one == again
    entities = [
        {f.entity for s in sessions for f in s.facts + s.untaught} for sessions in (one, other, tuning)
    ]
    assert [len(e) for e in entities] == [3 * 18] * 3
    assert not entities[0] & entities[1] and not entities[0] & entities[2]
    assert gap_text(filler, 3, 0, 300) == gap_text(filler, 3, 0, 300) != gap_text(filler, 3, 1, 300)
    assert gap_text(filler, 3, 0, 300) != gap_text(filler, 3, 0, 300, "tuning")
    assert len(gap_text(filler, 3, 0, 300)) >= 300


def test_a_stream_for_training_shares_no_word_of_a_fact_with_those_for_tests(filler):
    asked = {stream: [SPEC.draw(filler, seed, stream) for seed in range(20)] for stream in STREAMS}
    facts = {
        stream: [f for sessions in drawn for s in sessions for f in s.facts + s.untaught]
        for stream, drawn in asked.items()
    }
    entities = {stream: {f.entity for f in found} for stream, found in facts.items()}
    for one, other in combinations(STREAMS, 2):
        # Invented names of a few letters are drawn twice now and then.
        assert len(entities[one] & entities[other]) < 0.02 * len(entities[one])
    for part in ("relation", "value"):
        used = {stream: {getattr(f, part) for f in found} for stream, found in facts.items()}
        assert used["test"] & used["validation"] and not used["training"] & (
            used["test"] | used["tuning"] | used["validation"]
        )
    wordings = [
        {w for r in known.values() for w in (*r.wordings, r.reverse)}
        for known in (RELATIONS, TRAIN_RELATIONS)
    ]
    assert not wordings[0] & wordings[1] and not set(NOUNS) & set(TRAIN_NOUNS)
    # The relations of a session are drawn, and all have their turn.
    assert {f.relation for f in facts["training"]} == set(TRAIN_RELATIONS)
    for session in asked["training"][0]:
        assert len({f.relation for f in session.facts}) == 3
        assert all(q.text + q.answers[0] in session.text for q in session.questions("seen"))
        assert not any(q.text in session.text for q in session.questions("held_out"))


def test_related_text_speaks_alike_of_nobody_and_nothing_that_is_asked_about(filler):
    asked = SPEC.draw(filler, 0)
    related = SPEC.draw(filler, 0, "related", beside=asked)
    text = "".join(session.text for session in related)
    facts = [fact for session in asked for fact in session.facts + session.untaught]
    assert (
        {f.relation for s in related for f in s.facts}
        == {f.relation for f in facts}
        == set(RELATIONS) - {"fear"}
    )
    assert not any(fact.entity in text or f" {fact.value}." in text for fact in facts)
    # A name that the draw gives by itself is left out where it is taken.
    free = SPEC.draw(filler, 0, "related")
    again = SPEC.draw(filler, 0, "related", beside=free)
    names = [{f.entity for s in drawn for f in s.facts + s.untaught} for drawn in (free, again)]
    assert not any(one in other or other in one for one in names[0] for other in names[1])


def test_answers_are_in_the_stream_as_statements_alone(filler):
    sessions = SPEC.draw(filler, 0)
    stream = "".join(s.text for s in sessions)
    for session in sessions:
        assert sorted(len(f.seen) for f in session.facts) == [1] * 6 + [3] * 6
        statements = [line for f in session.facts for line in f.statements]
        assert sorted(p for p in session.parts if p in statements) == sorted(statements)
        for fact in session.facts:
            assert stream.count(fact.entity) == len(fact.seen) and set(fact.seen) <= {0, 1, 2}
            assert all(f"{fact.entity}" in s and s.endswith(f"the {fact.value}.\n") for s in fact.statements)
        for fact in session.untaught:
            assert fact.entity not in stream
        for kind in ("held_out", "reversed", "untaught"):
            for question in session.questions(kind):
                assert question.text not in stream
        for question in session.questions("seen"):
            right, *wrong = question.answers
            assert question.text + right in stream
            assert not any(question.text + answer in stream for answer in wrong)


def test_candidates_are_values_of_others_of_the_same_relation(filler):
    for session in SPEC.draw(filler, 1):
        stated = {name: {f.value for f in session.facts if f.relation == name} for name in RELATIONS}
        names = {name: {f.entity for f in session.facts if f.relation == name} for name in RELATIONS}
        for fact in session.facts + session.untaught:
            assert {fact.value, *fact.other_values} <= stated[fact.relation]
            assert len({fact.value, *fact.other_values}) == 3
        for fact in session.facts:
            assert len({fact.entity, *fact.other_entities}) == 3
            assert set(fact.other_entities) <= names[fact.relation]
        for kind in KINDS:
            assert len(session.questions(kind)) == (6 if kind == "untaught" else 12)


def test_the_right_answer_is_where_chance_puts_it(filler):
    """Whatever a reader likes best, it is right one time in three: the right value is no favourite."""
    spec = SessionSpec(sessions=100, facts=12, untaught=6, repeats=(1,), relations=2, distractors=2, filler=0)
    ranks = [
        sorted(question.answers).index(question.answers[0])
        for session in spec.draw(filler, 5)
        for kind in ("seen", "reversed", "untaught")
        for question in session.questions(kind)
    ]
    shares = np.bincount(ranks, minlength=3) / len(ranks)
    assert np.abs(shares - 1 / 3).max() < 4 * np.sqrt(2 / 9 / len(ranks))


def test_filler_lies_between_statements(filler):
    session = SPEC.draw(filler, 2)[0]
    statements = {line for f in session.facts for line in f.statements}
    other = [part for part in session.parts if part not in statements]
    assert len(other) == 4 and sum(map(len, other)) >= 500
    assert session.parts[0] in statements and session.parts[-1] in statements
    bare = SessionSpec(facts=8, relations=2, repeats=(1,), filler=0).draw(filler, 2)[0]
    assert len(bare.parts) == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"facts": 6, "relations": 2, "distractors": 3}, "more than the 3 distractors"),
        ({"relations": 5}, "there are 4"),
        ({"repeats": (0,)}, "from 1 on"),
        ({"sessions": 0}, "sessions is 0"),
        ({"filler": -1}, "-1 characters"),
    ],
)
def test_what_cannot_be_drawn_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        SessionSpec(**settings)


def test_filler_wants_text_and_questions_a_kind(filler):
    with pytest.raises(DataError, match="no text"):
        FillerText(["", " \n"])
    with pytest.raises(ConfigError, match="no 'other' questions"):
        SPEC.draw(filler, 0)[0].questions("other")
