"""Arms of the retention suite on a tiny model: facts are learned, and the step that is asked for is made."""

import copy
from dataclasses import replace

import pytest
import torch

from nestor.errors import ConfigError
from nestor.evaluation.retention import suite as suite_module
from nestor.evaluation.retention.arms import Rate, arms_of, levels_of, make_student, rates_for, unit_steps
from nestor.evaluation.retention.measures import pooled
from nestor.evaluation.retention.questions import ask
from nestor.evaluation.retention.run import make_stream, run_arm
from nestor.evaluation.retention.students import Frozen, Reader
from nestor.learning import Learner, feed_forward_weights

NAMES = (
    "frozen", "in-context", "retrieval", "single-fast", "single-slow", "continuum-2", "equal-periods",
    "shuffled", "low-rank", "replay", "ewc",
)  # fmt: skip


def test_a_two_fact_stream_is_learned_and_known_with_the_context_closed(
    subject, words, old, small, two_facts
):
    stream = two_facts(words)
    settings = replace(small, optimizers=("adam",), periods=(16, 32), gaps=(0, 8))
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


@pytest.mark.parametrize("name", NAMES)
def test_every_arm_reads_the_stream_and_learns_unless_it_is_frozen(
    subject, words, old, name, small, two_facts
):
    arm = next(arm for arm in arms_of(small) if arm.name == name)
    stream = two_facts(words, 3, gap=64)
    before = copy.deepcopy(subject.model.state_dict())
    rates = [Rate(0.01, 1.0)] * len(arm.periods)
    student = make_student(arm, subject.model, rates, small, 129, old=old.ids, seed=3)
    found = run_arm(subject, student, stream, small, old)
    assert found["tokens"] == len(stream.texts[0]) - 1 + 64 and bool(found["levels"]) == arm.learns
    for level in found["levels"]:
        assert level["updates"] >= found["tokens"] // level["period"] and level["change"] > 0
    assert found["tokens_again"] == (0 if not arm.replay else pytest.approx(0.2 * found["tokens"], abs=64))
    assert all(torch.equal(before[name], weight) for name, weight in subject.model.state_dict().items())
    if arm.together:
        assert {level["period"] for level in found["levels"]} == {32} and len(found["levels"]) == 2


def test_the_step_that_is_asked_for_is_the_step_that_is_made(subject, words, small):
    ids = words.encode("The rain fell on the roof all night long. " * 8)
    for arm in arms_of(small):
        if arm.base not in ("single-fast", "single-slow"):
            continue
        (rate, *_) = rates_for(1e-3, unit_steps(arm, subject.model, ids, small, 129))
        _, levels = levels_of(arm, subject.model, [rate] * len(arm.periods), small, 0)
        reader = Reader(Learner(subject.model, levels[:1]), 129)
        reader.study(ids[: levels[0].period + 1])
        change = reader.learner.report(reader.state)[0][0].change
        assert change == pytest.approx(1e-3, rel=0.7) and rate.largest_update == pytest.approx(4e-3)
    # Of an adapter the step is that of the product beside the matrix.
    arm = next(arm for arm in arms_of(small) if arm.rank)
    rate = rates_for(1e-3, unit_steps(arm, subject.model, ids, small, 129))[0]
    model, levels = levels_of(arm, subject.model, [rate], small, 0)
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


def test_who_knows_a_session_before_it_is_read_is_found_out(subject, copier, words, old, filler, small):
    stream = make_stream(small, filler, words, seed=0)
    copying = replace(subject, model=copier())
    students = {
        "frozen": Frozen(copying.model, 64),
        "in-context": Frozen(copying.model, 64, "session"),
        "retrieval": Frozen(copying.model, 64, "statements"),
        "ahead": ReadsAhead(copying.model, 64, "session"),
    }
    found = {name: run_arm(copying, who, stream, small, old) for name, who in students.items()}
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
    (note,) = suite_module._leaks(several, small.chance)
    assert note.startswith("ahead knows facts before it has read them, 50 points above chance")
    # A learner that has read it all is found out as well.
    settings = replace(small, optimizers=("adam",))
    arm = next(arm for arm in arms_of(settings) if arm.base == "single-fast")
    honest, cheat = (make_student(arm, subject.model, [Rate(0.01, 1.0)], settings, 129) for _ in range(2))
    for _ in range(12):
        cheat.study(stream.texts[1])
    before = {}
    for name, who in (("honest", honest), ("cheat", cheat)):
        record = run_arm(subject, who, stream, settings, old)
        before[name] = pooled([record], "margin", gap="before")[0]
    assert before["cheat"].mean() > 2 > before["honest"].mean()


def test_the_fastest_level_is_put_back_and_learns_again_from_related_text(
    subject, words, old, filler, small, same
):
    stream = make_stream(small, filler, words, seed=0)
    settings = replace(small, optimizers=("adam",))
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
    single = next(arm for arm in arms_of(small) if arm.base == "single-fast")
    student = make_student(single, subject.model, rates[:1], small, 129)
    assert run_arm(subject, student, stream, small, old)["loop_back"] == {}


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


def test_all_arms_adapt_the_same_weights(subject, small):
    wanted = {name for layer in feed_forward_weights(subject.model) for name in layer}
    for arm in arms_of(small):
        if arm.learns and not arm.rank:
            _, levels = levels_of(arm, subject.model, [Rate(0.1, 1.0)] * len(arm.periods), small, 1)
            assert {name for level in levels for name in level.parameters} == wanted
    with pytest.raises(ConfigError, match="only 1 of the 2 layers learn"):
        arm = arms_of(small)[-6]
        levels_of(
            replace(arm, periods=(8, 16)), subject.model, [Rate(0.1, 1.0)] * 2, replace(small, fixed=0.5), 1
        )
