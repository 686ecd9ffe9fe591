"""The retention suite on tiny models: facts are learned, asking changes nothing, a stopped run goes on."""

import copy
import inspect
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import nestor
from nestor.data.tasks import FillerText, Session, SessionFact
from nestor.data.tasks.sessions import KINDS, Question
from nestor.errors import ConfigError, NonFiniteError
from nestor.evaluation import Subject
from nestor.evaluation.keeping import Kept
from nestor.evaluation.report import Section
from nestor.evaluation.retention import pieces as pieces_module
from nestor.evaluation.retention import suite as suite_module
from nestor.evaluation.retention.arms import Rate, arms_of, levels_of, make_student, rates_for, unit_steps
from nestor.evaluation.retention.drawing import retention_tables
from nestor.evaluation.retention.measures import pooled
from nestor.evaluation.retention.old import OldKnowledge, old_passages, written_by
from nestor.evaluation.retention.questions import ask, statements_for
from nestor.evaluation.retention.run import TokenStream, make_stream, run_arm
from nestor.evaluation.retention.settings import RetentionSettings
from nestor.evaluation.retention.students import Frozen, Reader
from nestor.evaluation.retention.suite import measure_retention
from nestor.learning import Learner, Level, feed_forward_weights
from nestor.models.state import State

SMALL = RetentionSettings(
    sessions=2, facts=2, repeats=(1, 2), relations=1, distractors=1, filler=0, gaps=(0, 4), periods=(32, 64),
    trials=2, old_passages=3, old_length=24, fixed=0.0, context=129, rank=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def filler():
    return FillerText(["Rain fell on the roof, and nothing moved. A door closed.\n" * 60])


@pytest.fixture(scope="module")
def subject(words):
    torch.manual_seed(4)
    config = nestor.preset(
        "transformer", "quick", hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, initializer_range=0.2,
    )  # fmt: skip
    return Subject("tiny", nestor.NestorForCausalLM(config).eval().requires_grad_(False), words)


@pytest.fixture(scope="module")
def old(subject):
    return OldKnowledge(subject, old_passages(subject, ("self",), 3, 24))


def two_facts(words, times=20, gap=256):
    """A stream of one session that states two facts many times, and a gap of other text."""
    facts = (
        SessionFact("Zuv", "emblem", "oak", (0,) * times, ("ivy",), ("Kib",)),
        SessionFact("Kib", "fear", "ivy", (1,) * times, ("oak",), ("Zuv",)),
    )
    untaught = (SessionFact("Wod", "emblem", "oak", (), ("ivy",), ()),)
    lines = [fact.statements[n] for n in range(times) for fact in facts]
    session = Session(facts, untaught, tuple(lines))
    after = words.encode("It rained. " * 40)[: gap + 1]
    return TokenStream([session], [words.encode(session.text)], [[after]], after)


def test_a_two_fact_stream_is_learned_and_known_with_the_context_closed(subject, words, old):
    stream = two_facts(words)
    settings = replace(SMALL, optimizers=("adam",), periods=(16, 32), gaps=(0, 8))
    arm = next(arm for arm in arms_of(settings) if arm.base == "continuum-2")
    student = make_student(arm, subject.model, [Rate(0.01, 1.0)] * 2, settings, 129)
    frozen = Frozen(subject.model, 129)
    learned, plain = (run_arm(subject, who, stream, settings, old) for who in (student, frozen))
    margins, before = (pooled([r], "margin", gap=0)[0] for r in (learned, plain))
    assert margins.min() > 2 > 0 > before.min()
    assert pooled([learned], "correct", gap=0)[0].tolist() == [1, 1]
    assert learned["tokens"] == plain["tokens"] == len(stream.texts[0]) - 1 + 256
    assert [level["updates"] for level in learned["levels"]] == [learned["tokens"] // p for p in (16, 32)]
    assert learned["levels"][0]["change"] > 0 and plain["levels"] == []
    assert measured_rise(learned) > 0 == measured_rise(plain)
    assert set(learned["localisation"]) == {"every 16", "every 32"} and plain["localisation"] == {}
    # With a level restored, the scratch copy is the plain model but for the other level.
    restored = dict(student.without("every 16").model().named_parameters())
    for level in student.learner.levels:
        for name in level.parameters:
            same = torch.equal(restored[name], subject.model.get_parameter(name))
            assert same == (level.name == "every 16")


def measured_rise(record):
    return sum(record["old"]["after"]) - sum(record["old"]["before"])


@pytest.mark.parametrize("arm", arms_of(SMALL), ids=lambda arm: arm.name)
def test_every_arm_reads_the_stream_and_learns_unless_it_is_frozen(subject, words, old, arm):
    stream = two_facts(words, 3, gap=64)
    before = copy.deepcopy(subject.model.state_dict())
    rates = [Rate(0.01, 1.0)] * len(arm.periods)
    student = make_student(arm, subject.model, rates, SMALL, 129, old=old.ids, seed=3)
    found = run_arm(subject, student, stream, SMALL, old)
    assert found["tokens"] == len(stream.texts[0]) - 1 + 64 and bool(found["levels"]) == arm.learns
    for level in found["levels"]:
        assert level["updates"] >= found["tokens"] // level["period"] and level["change"] > 0
    assert found["tokens_again"] == (0 if not arm.replay else pytest.approx(0.2 * found["tokens"], abs=64))
    assert all(torch.equal(before[name], weight) for name, weight in subject.model.state_dict().items())
    if arm.together:
        assert {level["period"] for level in found["levels"]} == {32} and len(found["levels"]) == 2


def test_the_step_that_is_asked_for_is_the_step_that_is_made(subject, words):
    ids = words.encode("The rain fell on the roof all night long. " * 8)
    for arm in arms_of(SMALL):
        if arm.base not in ("single-fast", "single-slow"):
            continue
        (rate, *_) = rates_for(1e-3, unit_steps(arm, subject.model, ids, SMALL, 129))
        _, levels = levels_of(arm, subject.model, [rate] * len(arm.periods), SMALL, 0)
        reader = Reader(Learner(subject.model, levels[:1]), 129)
        reader.study(ids[: levels[0].period + 1])
        change = reader.learner.report(reader.state)[0][0].change
        assert change == pytest.approx(1e-3, rel=0.7) and rate.largest_update == pytest.approx(4e-3)
    # Of an adapter the step is that of the product beside the matrix.
    arm = next(arm for arm in arms_of(SMALL) if arm.rank)
    rate = rates_for(1e-3, unit_steps(arm, subject.model, ids, SMALL, 129))[0]
    model, levels = levels_of(arm, subject.model, [rate], SMALL, 0)
    reader = Reader(Learner(model, levels), 129)
    reader.study(ids[:33])
    names = [n for layer in feed_forward_weights(subject.model) for n in layer]
    plain, learned = dict(subject.model.named_parameters()), reader.model()
    change = sum(
        float((learned.get_submodule(n.rpartition(".")[0]).weight - plain[n]).square().sum()) for n in names
    )
    whole = sum(float(plain[n].square().sum()) for n in names)
    assert (change / whole) ** 0.5 == pytest.approx(1e-3, rel=0.7)
    with pytest.raises(ConfigError, match="no gradient"):
        rates_for(1e-3, [(0.0, 0.0)])


class ReadsAhead(Frozen):
    """Is shown a session before it was read."""

    def material(self, read, session, question):
        return session.text


def test_who_knows_a_session_before_it_is_read_is_found_out(subject, copier, words, old, filler):
    stream = make_stream(SMALL, filler, words, seed=0)
    copying = replace(subject, model=copier())
    students = {
        "frozen": Frozen(copying.model, 64),
        "in-context": Frozen(copying.model, 64, "session"),
        "retrieval": Frozen(copying.model, 64, "statements"),
        "ahead": ReadsAhead(copying.model, 64, "session"),
    }
    found = {name: run_arm(copying, who, stream, SMALL, old) for name, who in students.items()}
    for name, record in found.items():
        before = [test for test in record["tests"] if test["gap"] == "before"]
        assert [(test["session"], test["after"], list(test["answers"])) for test in before] == [
            (1, 0, ["seen"])
        ]
        # All that are shown it know it when it was read; one knew it before.
        assert pooled([record], "correct", gap=0)[0].all() == (name != "frozen"), name
        assert all(before[0]["answers"]["seen"]["correct"]) == (name == "ahead")
    nothing, closed = (pooled([found[name]], "margin", gap="before")[0] for name in ("frozen", "in-context"))
    assert nothing.tolist() == closed.tolist()
    several = {name: [record] * 8 for name, record in found.items()}
    (note,) = suite_module._leaks(several, SMALL.chance)
    assert note.startswith("ahead knows facts before it has read them, 50 points above chance")
    # A learner that has read it all is found out as well.
    settings = replace(SMALL, optimizers=("adam",))
    arm = next(arm for arm in arms_of(settings) if arm.base == "single-fast")
    honest, cheat = (make_student(arm, subject.model, [Rate(0.01, 1.0)], settings, 129) for _ in range(2))
    for _ in range(12):
        cheat.study(stream.texts[1])
    before = {}
    for name, who in (("honest", honest), ("cheat", cheat)):
        record = run_arm(subject, who, stream, settings, old)
        before[name] = pooled([record], "margin", gap="before")[0]
    assert before["cheat"].mean() > 2 > before["honest"].mean()


def test_the_fastest_level_is_put_back_and_learns_again_from_related_text(subject, words, old, filler):
    stream = make_stream(SMALL, filler, words, seed=0)
    settings = replace(SMALL, optimizers=("adam",))
    arm = next(arm for arm in arms_of(settings) if arm.base == "continuum-2")
    rates = [Rate(0.01, 1.0)] * 2
    student = make_student(arm, subject.model, rates, settings, 129)
    record = run_arm(subject, student, stream, settings, old)
    back = record["loop_back"]
    assert back["level"] == "every 32" and back["tokens"] == len(stream.related) - 1 == 64
    assert (
        record["tokens"]
        == student.tokens
        == len(stream.ids) - len(stream.texts) - sum(len(gaps) for gaps in stream.gaps)
    )
    # By hand: read everything, put the level back, read on, ask.
    reader = make_student(arm, subject.model, rates, settings, 129)
    for text, gaps in zip(stream.texts, stream.gaps, strict=True):
        for ids in (text, *gaps):
            reader.study(ids)
    same(student.state, reader.state)
    reader.state = reader.learner.forget(reader.state, "every 32")
    fast, slow = (level.parameters for level in reader.learner.levels)
    kept = {name: tensor.clone() for name, tensor in reader.learner.weights(reader.state).items()}
    assert all(torch.equal(kept[name], subject.model.get_parameter(name)) for name in fast)
    reader.study(stream.related)
    now = reader.learner.weights(reader.state)
    assert not any(torch.equal(now[name], kept[name]) for name in (*fast, *slow))
    asked = [ask(reader.model(), words, session.questions("seen")) for session in stream.sessions]
    assert back["correct"] == [[a.correct for a in answers] for answers in asked]
    # One level has none that is faster than another.
    single = next(arm for arm in arms_of(SMALL) if arm.base == "single-fast")
    student = make_student(single, subject.model, rates[:1], SMALL, 129)
    assert run_arm(subject, student, stream, SMALL, old)["loop_back"] == {}


def test_what_related_text_brings_back_counts_as_a_gain():
    def test(session, correct):
        return {"session": session, "after": 1, "gap": "end", "answers": {"seen": {"correct": correct}}}

    one = {
        "tests": [test(0, [1, 1, 1, 1]), test(1, [1, 1, 1, 0])],
        "localisation": {"slow": [[False] * 4] * 2, "fast": [[True, False, False, False]] * 2},
        "loop_back": {"level": "fast", "tokens": 64, "correct": [[True, True, True, False]] * 2},
    }
    found = suite_module._loop_back([one] * 3)
    estimates = {key: found[key]["estimate"] for key in ("before", "restored", "after", "recovered")}
    assert estimates == {"before": 0.875, "restored": 0.25, "after": 0.75, "recovered": 0.5}
    assert 0 < found["recovered"]["low"] < 0.5 < found["recovered"]["high"] and found["level"] == "fast"
    assert suite_module._loop_back([{"loop_back": {}}]) == {}


def test_all_arms_adapt_the_same_weights(subject):
    wanted = {name for layer in feed_forward_weights(subject.model) for name in layer}
    for arm in arms_of(SMALL):
        if arm.learns and not arm.rank:
            _, levels = levels_of(arm, subject.model, [Rate(0.1, 1.0)] * len(arm.periods), SMALL, 1)
            assert {name for level in levels for name in level.parameters} == wanted
    with pytest.raises(ConfigError, match="only 1 of the 2 layers learn"):
        arm = arms_of(SMALL)[-6]
        levels_of(
            replace(arm, periods=(8, 16)), subject.model, [Rate(0.1, 1.0)] * 2, replace(SMALL, fixed=0.5), 1
        )


def test_asking_never_changes_what_was_learned(subject, words, old, filler):
    """The leak guard: with questions or without, and in whatever order, the same State comes out."""
    stream = make_stream(replace(SMALL, sessions=1), filler, words, seed=0)
    arm = next(arm for arm in arms_of(SMALL) if arm.base == "continuum-2")
    rates = [Rate(0.01, 1.0)] * 2

    def state(**choices):
        student = make_student(arm, subject.model, rates, SMALL, 129)
        run_arm(subject, student, stream, SMALL, old, **choices)
        return student.state

    asked, hardly = state(), state(endpoint_only=True)
    reader = make_student(arm, subject.model, rates, SMALL, 129)
    for text, gaps in zip(stream.texts, stream.gaps, strict=True):
        for ids in (text, *gaps):
            before = reader.state.clone()
            ask(reader.model(), words, stream.sessions[0].questions("seen"))
            reader.without("every 32").study(stream.related)
            same(reader.state, before)
            reader.study(ids)
    same(asked, hardly)
    same(asked, reader.state)


def same(one: State, other: State):
    assert set(one.learned) == set(other.learned)
    for part, tensors in one.learned.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, other.learned[part][name]), (part, name)


def test_answers_are_read_as_statements_alone(filler, words):
    """What goes into the stream is the sessions' text and the corpus, and questions are in neither."""
    stream = make_stream(SMALL, filler, words, seed=1)
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
    long = make_stream(replace(SMALL, periods=(32, 512)), filler, words, seed=1)
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


def test_what_is_shown_in_the_prompt_answers(copier, words):
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


def test_material_that_questions_share_is_read_once_and_short_questions_together(foreign, words, monkeypatch):
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


def test_retrieval_finds_the_statement_of_the_one_who_is_asked_about(filler):
    session = SMALL.spec().draw(filler, 0)[0]
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


@pytest.fixture(scope="module")
def few():
    return replace(SMALL, arms=("frozen", "single-fast", "continuum", "equal-periods"))


@pytest.fixture(scope="module")
def measured(subject, filler, few, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    return measure_retention(subject, filler, few, seeds=(0, 1), folder=folder), folder


def test_the_suite_measures_every_arm_and_decides(measured):
    result, _ = measured
    assert list(result["arms"]) == ["frozen", "single-fast", "continuum-2", "equal-periods"]
    trials = {name: [t["step"] for t in arm["tuning"]["trials"]] for name, arm in result["arms"].items()}
    # Equal trials for all that are tuned; equal periods take the learning rates of the continuum.
    assert trials["single-fast"] == trials["continuum-2"] == [1e-4, 1e-2]
    assert trials["frozen"] == trials["equal-periods"] == []
    assert (
        result["arms"]["equal-periods"]["tuning"]["rates"] == result["arms"]["continuum-2"]["tuning"]["rates"]
    )
    frozen, several = result["arms"]["frozen"], result["arms"]["continuum-2"]
    assert frozen["old_loss"]["estimate"] == 0 == frozen["forgetting"] and frozen["time_over_frozen"] is None
    assert frozen["tokens"] == several["tokens"] and several["state_bytes"] > 0
    assert several["recall"]["n"] == 2 * 2 * 2 and len(several["recall_by_seed"]) == 2
    assert [row["repeats"] for row in several["by_repeats"]] == [1, 2]
    assert np.array(several["matrix"], dtype=float).shape == (2, 3) and several["matrix"][1][0] is None
    assert set(several["localisation"]) == {"every 32", "every 64"}
    assert several["forward_transfer"]["n"] == 2 * 2 and frozen["loop_back"] == {}
    back = several["loop_back"]
    lost = several["localisation"]["every 32"]["all"]
    assert back["before"]["estimate"] - back["restored"]["estimate"] == pytest.approx(lost)
    assert back["before"]["estimate"] == pytest.approx(several["accuracy"])
    assert back["recovered"]["estimate"] == pytest.approx(
        back["after"]["estimate"] - back["restored"]["estimate"]
    )
    page = write_words(result)
    assert (
        "FWT" in page
        and "after related text" in page
        and "read 64 tokens of sentences of the same kinds" in page
    )
    held = {c["condition"]: c["holds"] for c in result["decisions"]["sgd"]["conditions"]}
    assert list(held) == list("abcd") and held["b"] is None and held["a"] is not None
    assert any("2 seeds" in note for note in result["notes"])
    assert any(re.search(r"period 64 made \d+ updates", note) for note in result["notes"])


def test_a_stopped_run_goes_on_with_what_is_finished(subject, filler, few, measured, monkeypatch, tmp_path):
    result, folder = measured
    done = []
    run = pieces_module.run_arm

    def stop(*given, **choices):
        if len(done) == limit:
            raise KeyboardInterrupt
        done.append(1)
        return run(*given, **choices)

    monkeypatch.setattr(pieces_module, "run_arm", stop)
    limit = 0
    again = measure_retention(subject, filler, few, seeds=(0, 1), folder=folder)
    assert json.dumps(again) == json.dumps(result)
    two = replace(few, arms=("frozen", "single-fast"))
    # The frozen run and two trials are done when it is stopped; they are not done again.
    limit = 3
    with pytest.raises(KeyboardInterrupt):
        measure_retention(subject, filler, two, seeds=(1,), folder=tmp_path)
    done.clear()
    limit = 99
    whole = measure_retention(subject, filler, two, seeds=(1,), folder=tmp_path)
    assert len(done) == 1
    for name, arm in whole["arms"].items():
        assert arm["recall_by_seed"] == result["arms"][name]["recall_by_seed"][1:]
        assert arm["tuning"] == result["arms"][name]["tuning"]
    # Under other settings nothing counts as finished.
    done.clear()
    measure_retention(subject, filler, replace(two, sessions=1, trials=1), seeds=(0,), folder=tmp_path)
    assert len(done) == 3


def test_a_piece_is_kept_for_its_settings_alone(tmp_path):
    kept = Kept(tmp_path, {"a": 1})
    assert kept.get("x y", lambda: {"v": (1, 2)}) == {"v": [1, 2]}
    assert kept.get("x y", lambda: pytest.fail("made twice")) == {"v": [1, 2]}
    assert Kept(tmp_path, {"a": 2}).get("x y", lambda: 5) == 5
    (tmp_path / "x-y.json").write_text("{ broken")
    assert kept.get("x y", lambda: 6) == 6 and Kept(None, {}).get("x y", lambda: 7) == 7


def test_other_models_learn_too(foreign, filler):
    two = replace(SMALL, arms=("frozen", "continuum"), trials=1, sessions=1)
    result = measure_retention(foreign, filler, two)
    assert result["arms"]["continuum-2"]["levels"][1]["updates"] > 0 and result["context"] == 129
    several = replace(two, optimizers=("sgd", "adam"))
    names = [arm.name for arm in arms_of(several)]
    assert names == ["frozen", "continuum-2 sgd", "continuum-2 adam"]


def test_given_rates_take_the_place_of_trials(subject, words, old, filler):
    settings = replace(
        SMALL, arms=("single-fast", "single-slow", "continuum", "equal-periods", "low-rank"), trials=1,
        sessions=1, learning_rates=(0.02, 0.05), largest_update=0.003,
    )  # fmt: skip
    result = measure_retention(subject, filler, settings)
    rates = {name: arm["tuning"]["rates"] for name, arm in result["arms"].items()}
    fast, slow = ({"learning_rate": rate, "largest_update": 0.003} for rate in (0.02, 0.05))
    low = rates.pop("low-rank")
    assert rates == {
        "single-fast": [fast], "single-slow": [slow], "continuum-2": [fast, slow],
        "equal-periods": [fast, slow],
    }  # fmt: skip
    tuned = [name for name, arm in result["arms"].items() if arm["tuning"]["trials"]]
    assert tuned == ["low-rank"] and low[0] not in (fast, slow)
    # They are what the arms learn with.
    arm = next(arm for arm in arms_of(settings) if arm.base == "continuum-2")
    student = make_student(arm, subject.model, [Rate(0.02, 0.003), Rate(0.05, 0.003)], settings, 129)
    knowledge = OldKnowledge(subject, old_passages(subject, ("self",), 3, 24))
    record = run_arm(subject, student, make_stream(settings, filler, words, 0), settings, knowledge)
    assert result["arms"]["continuum-2"]["levels"] == record["levels"] and record["levels"][0]["change"] > 0
    text = write_words(result)
    assert "Learning rates of single-fast, single-slow, continuum-2, equal-periods were given." in text
    assert "Of the other arms the step was chosen" in text and "rates 0.02, 0.05" in text
    for wrong, message in (
        ({"learning_rates": (0.1,)}, "give one for each"),
        ({"learning_rates": (), "largest_update": 0.1}, "only with learning_rates"),
        ({"optimizers": ("sgd", "adam")}, "one inner step"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(settings, **wrong).check()


def write_words(result):
    """All that the report says of a model."""
    section = Section("retention", "retention")
    retention_tables(section, {"models": {"tiny": result}})
    return json.dumps(section.blocks)


def test_trials_that_all_fail_say_so(subject, filler, monkeypatch):
    def fail(*_given, **_choices):
        raise NonFiniteError("no number")

    monkeypatch.setattr(pieces_module, "run_arm", fail)
    with pytest.raises(NonFiniteError, match="none of the steps"):
        measure_retention(subject, filler, replace(SMALL, arms=("single-fast",)))
