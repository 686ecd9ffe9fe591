"""Streams, questions and old text: asking changes nothing, and no answer is in what is not to have it."""

import copy
import inspect
from dataclasses import replace

import numpy as np
import pytest
import torch

from nestor.data.tasks.sessions import KINDS, Question
from nestor.errors import ConfigError
from nestor.evaluation.retention.arms import Rate, arms_of, make_student
from nestor.evaluation.retention.old import OldKnowledge, old_passages, written_by
from nestor.evaluation.retention.questions import ask, statements_for
from nestor.evaluation.retention.run import make_stream, run_arm
from nestor.evaluation.retention.students import Frozen, Reader
from nestor.learning import Learner, Level, feed_forward_weights


def test_asking_never_changes_what_was_learned(subject, words, old, filler, small, same):
    """The leak guard: with questions or without, and in whatever order, the same State comes out."""
    stream = make_stream(replace(small, sessions=1), filler, words, seed=0)
    arm = next(arm for arm in arms_of(small) if arm.base == "continuum-2")
    rates = [Rate(0.01, 1.0)] * 2

    def state(**choices):
        student = make_student(arm, subject.model, rates, small, 129)
        run_arm(subject, student, stream, small, old, **choices)
        return student.state

    asked, hardly = state(), state(endpoint_only=True)
    reader = make_student(arm, subject.model, rates, small, 129)
    for text, gaps in zip(stream.texts, stream.gaps, strict=True):
        for ids in (text, *gaps):
            before = reader.state.clone()
            ask(reader.model(), words, stream.sessions[0].questions("seen"))
            reader.without("every 32").study(stream.related)
            same(reader.state, before)
            reader.study(ids)
    same(asked, hardly)
    same(asked, reader.state)


def test_answers_are_read_as_statements_alone(filler, words, small):
    """What goes into the stream is the sessions' text and the corpus, and questions are in neither."""
    stream = make_stream(small, filler, words, seed=1)
    text = words.decode(stream.ids)
    for session, ids in zip(stream.sessions, stream.texts, strict=True):
        assert words.decode(ids) == session.text
        for kind in KINDS:
            for question in session.questions(kind):
                assert (question.text in text) == (kind == "seen")
        stated = sum(len(fact.seen) for fact in session.facts)
        assert sum(text.count(f"{fact.entity}") for fact in session.facts) == stated
    for gaps in stream.gaps:
        assert [len(ids) - 1 for ids in gaps] == [4 * 64]
    # Nor is anything of what is asked in the related text, which is of the same kind.
    long = make_stream(replace(small, periods=(32, 512)), filler, words, seed=1)
    related = words.decode(long.related)
    facts = [fact for session in long.sessions for fact in session.facts + session.untaught]
    assert len(long.related) - 1 == 512 and "The emblem of " in related and "Rain fell" in related
    assert not any(fact.entity in related or fact.value in related for fact in facts)


def test_windows_cover_a_document_once_and_end_at_updates(subject, words):
    level = Level("all", tuple(feed_forward_weights(subject.model)[1]), 8, 0.01)

    class Recorder(Reader):
        def _read(self, window):
            read.append((self._clock, window))
            super()._read(window)

    ids = words.encode("The rain fell on the roof all night long, and nobody came. ")
    for context in (5, 20):
        read = []
        reader = Recorder(Learner(subject.model, [level]), context)
        reader.study(ids[:30])
        reader.study(ids[30:])
        joined = [token for _, window in read for token in window[1:]]
        assert joined == ids[1:30] + ids[31:]
        assert all(1 < len(window) <= context for _, window in read)
        assert reader.tokens == len(ids) - 2
        assert int(reader.state.learned["all"]["updates"]) == (len(ids) - 2) // 8
        if context == 20:
            assert all((clock + len(w) - 1) % 8 == 0 for clock, w in read if len(w) == 17)


def test_what_is_shown_in_the_prompt_answers(copier, words, two_facts):
    """Upper bounds: a model that copies is right with the material in front of it, and by chance without."""
    stream = two_facts(words)
    session = stream.sessions[0]
    model = copier()
    for shows, wanted in (("nothing", False), ("session", True), ("statements", True)):
        student = Frozen(model, 64, shows)
        questions = session.questions("seen")
        materials = [student.material([session], session, q) for q in questions]
        found = ask(student.model(), words, questions, materials=materials)
        assert all(a.exact == a.correct == wanted for a in found), shows
    cut = ask(model, words, questions, materials=["x" * 500 + session.text] * 2, limit=200)
    assert all(a.correct for a in cut)
    gone = ask(model, words, questions, materials=[session.text + "x" * 500] * 2, limit=200)
    assert not any(a.correct for a in gone)
    with pytest.raises(ConfigError, match="more tokens than the 10"):
        ask(model, words, questions, limit=10)


def test_material_that_questions_share_is_read_once_and_short_questions_together(
    foreign, words, monkeypatch, two_facts
):
    session = two_facts(words).sessions[0]
    questions = [*session.questions("seen"), *session.questions("untaught")]
    materials = ["It rained all day, and the old man slept. " * 3] * 2 + [""]
    alone = [
        ask(foreign.model, words, [q], materials=[m], limit=256, batch_size=1)[0]
        for q, m in zip(questions, materials, strict=True)
    ]
    shapes = []
    forward = foreign.model.forward

    def seen(input_ids, **given):
        shapes.append(tuple(input_ids.shape))
        return forward(input_ids=input_ids, **given)

    seen.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(foreign.model, "forward", seen)
    found = ask(foreign.model, words, questions, materials=materials, limit=256)
    for one, other in zip(found, alone, strict=True):
        assert one[:3] == other[:3] and one.margin == pytest.approx(other.margin, abs=1e-4)
    # The material; two questions with two answers each behind it; the one without.
    assert [rows for rows, _ in shapes] == [1, 4, 2] and shapes[0][1] > 100 > 40 > shapes[1][1]
    # 16 ordinary texts are as long as many short questions: one call takes them all.
    shapes.clear()
    ask(foreign.model, words, questions * 20, limit=256)
    assert [rows for rows, _ in shapes] == [120]


def test_retrieval_finds_the_statement_of_the_one_who_is_asked_about(filler, small):
    session = small.spec().draw(filler, 0)[0]
    stated = [line for fact in session.facts for line in fact.statements]
    for fact, question in zip(session.facts, session.questions("held_out"), strict=True):
        assert statements_for(question.text, stated, 1)[0] in fact.statements
    assert statements_for("nothing shared?", ["A b c.\n"]) == []


def test_answers_are_scored_by_the_probability_of_all_their_tokens(subject, words):
    question = Question("seen", "The emblem of Zuv is the", (" oak.", " ivy."))
    found = ask(subject.model, words, [question])[0]
    nats = []
    for answer in question.answers:
        ids = torch.tensor([words.encode(question.text + answer)])
        with torch.no_grad():
            logs = subject.model(ids).logits[0].log_softmax(-1)
        begin = len(words.encode(question.text))
        nats.append(sum(float(logs[t - 1, ids[0, t]]) for t in range(begin, ids.shape[1])))
    assert found.margin == pytest.approx(nats[0] - nats[1], abs=1e-4)
    assert found.correct == (nats[0] > nats[1])
    other = ask(subject.model, words, [question._replace(answers=question.answers[::-1])])[0]
    assert other.margin == pytest.approx(-found.margin, abs=1e-5)


def test_old_text_is_what_the_model_writes(subject, foreign):
    for who in (subject, foreign):
        one, again, other = (written_by(who, 3, 10, seed) for seed in (0, 0, 1))
        assert one == again != other and [len(ids) for ids in one] == [10] * 3
    old = OldKnowledge(subject, written_by(subject, 8, 40))
    unchanged = old.measure(subject.model)
    assert np.array_equal(unchanged.bits, old.before.bits) and np.array_equal(unchanged.right, old.items)
    worse = copy.deepcopy(subject.model)
    with torch.no_grad():
        for parameter in worse.parameters():
            parameter.mul_(1.3)
    assert old.measure(worse).bits.sum() > old.before.bits.sum()
    assert old.measure(worse).right.sum() < old.items.sum()
    books = old_passages(subject, ("classics",), 2, 20)
    assert [len(ids) for ids in books] == [20, 20] and books != old_passages(
        subject, ("classics",), 2, 20, "fisher"
    )
