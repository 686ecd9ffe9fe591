"""Class-incremental learning: scores of labels, measures, what arms read, and that weights learn."""

import dataclasses
from pathlib import Path

import pytest
import torch

from nestor.cli.loading import Opener
from nestor.data.tasks.intents import Labelled, LabelledTexts, class_sessions
from nestor.errors import ConfigError, NonFiniteError
from nestor.evaluation import Subject
from nestor.evaluation.class_incremental import measure, runs
from nestor.evaluation.class_incremental.arms import Frozen, Learning, Nearest, make_arm, overlap
from nestor.evaluation.class_incremental.parallel import jobs_of
from nestor.evaluation.class_incremental.results import markdown, write_class_incremental
from nestor.evaluation.class_incremental.settings import ClassIncremental
from nestor.evaluation.scoring import Row, score_choices, score_rows
from nestor.jobs import Workers

STORIES = Path(__file__).parents[2] / "checkpoints" / "stories260K"

CODES = ("red", "green", "blue", "black", "white", "brown")
DATA = LabelledTexts(
    "made",
    tuple(Labelled(f"{code[::-1]} {i}", code) for code in CODES for i in range(12)),
    tuple(Labelled(f"{code[::-1]} {i}", code) for code in CODES for i in range(20, 24)),
)
SIZES = {"classes": 2, "examples": 4, "tests": 3}


def stream(seed=0, **changes):
    return class_sessions(DATA, seed=seed, **(SIZES | changes))


def settings(**changes):
    return ClassIncremental(**(SIZES | {"periods": (16, 32), "learning_rates": (0.1,)} | changes))


@pytest.fixture
def subject(make_tiny, words):
    return Subject("tiny", make_tiny(), words)


class Told:
    """Answers by a function of the text, the labels so far, and those of the session that was read last."""

    def __init__(self, answer):
        self.answer, self.last = answer, ()

    def read(self, session):
        self.last = session.labels

    def choose(self, text, labels):
        return self.answer(text, labels, self.last)

    def report(self):
        return {}


def truth(text):
    return text.split()[0][::-1]


def test_an_oracle_is_always_right_and_a_constant_is_not() -> None:
    sessions = stream()
    run = runs.run_stream(Told(lambda text, labels, last: truth(text)), sessions)
    assert run["right"] == [[6], [6, 6], [6, 6, 6]] and run["asked"] == [6, 6, 6] and run["seen"] == [2, 4, 6]
    assert runs.measures(run) == {"average": 1, "final": 1, "acquired": 1, "forgetting": 0}
    constant = runs.measures(runs.run_stream(Told(lambda text, labels, last: labels[0]), sessions))
    assert constant["final"] == pytest.approx(1 / 6) and constant["acquired"] == pytest.approx(1 / 6)
    # After sessions one, two and three a half, a quarter and a sixth of the texts are of that class.
    assert constant["average"] == pytest.approx((1 / 2 + 1 / 4 + 1 / 6) / 3)


def test_who_knows_only_the_last_session_has_forgotten_all_others() -> None:
    arm = Told(lambda text, labels, last: truth(text) if truth(text) in last else last[0])
    found = runs.measures(runs.run_stream(arm, stream()))
    assert (found["acquired"], found["forgetting"]) == (1, 1)
    assert found["final"] == pytest.approx(1 / 3) and found["average"] == pytest.approx(
        (1 + 1 / 2 + 1 / 3) / 3
    )


def test_measures_by_hand() -> None:
    run = {"right": [[4], [3, 2], [1, 4, 2]], "asked": [4, 4, 4]}
    assert runs.curve(run) == [1, 5 / 8, 7 / 12]
    found = runs.measures(run)
    assert found["acquired"] == pytest.approx((1 + 1 / 2 + 1 / 2) / 3) and found["final"] == 7 / 12
    # Session one falls from its best, 1, to 1/4; session two rises after it was read, so its fall is below 0.
    assert found["forgetting"] == pytest.approx((3 / 4 + (1 / 2 - 1)) / 2)
    alone = measure.summarised([{**run, "seen": [1, 2, 3]}])
    assert (
        alone["final"]["method"] == "wilson" and alone["final"]["n"] == 12 and alone["average"]["low"] is None
    )


@pytest.mark.parametrize("kind", ["full", "titans", "foreign", "guesser"])
def test_choices_score_as_whole_texts_do(kind, models, foreign, guesser, words) -> None:
    one = {
        "full": models[0],
        "titans": models[1],
        "foreign": foreign,
        "guesser": Subject("g", guesser(2), words),
    }
    model = one[kind].model
    prompt = words.encode("The key is")
    choices = [words.encode(text) for text in (" 12.", " 7", " 98765.", " 12")]
    prefix = [1] if kind == "foreign" else []
    rows = [Row([*prompt, *c], len(prompt), len(prompt) + len(c)) for c in choices]
    whole = torch.stack([bits.sum() for bits, _ in score_rows(model, rows, batch_size=1, prefix=prefix)])
    for batch_size in (1, 3, 8):
        found = score_choices(model, prompt, choices, prefix=prefix, batch_size=batch_size, piece=4)
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-4)
    # Every further token costs something, unless it is certain.
    assert whole[3] < whole[0] or kind == "guesser"
    with pytest.raises(ConfigError, match="1 tokens are to be read first"):
        score_choices(model, prompt[:1], choices, batch_size=2)


def test_nearest_goes_by_words_in_common() -> None:
    arm = Nearest()
    for session in stream():
        arm.read(session)
    assert all(arm.choose(one.text, CODES) == one.label for one in DATA.test)
    assert overlap("My card, please", "my CARD") == pytest.approx(2 / 3) and overlap("", "") == 0


def test_examples_in_context_are_the_nearest_that_fit_with_the_nearest_last(subject, words) -> None:
    arm = Frozen(subject, settings(context=64), in_context=True)
    for session in stream():
        arm.read(session)
    text = DATA.test[0].text
    shown = words.decode(arm.demonstrations(text, 36))
    assert len(shown) <= 36 and shown.count("\n") == shown.count("der ") == 2
    assert all(line in {f"{one.text} -> {one.label}" for one in arm.examples} for line in shown.splitlines())
    assert arm.demonstrations(text, 5) == []
    last = words.decode(arm.demonstrations("red 3", 60)).splitlines()[-1]
    best = max(overlap("red 3", one.text) for one in arm.examples)
    assert overlap("red 3", last.split(" ->")[0]) == best
    asked = []
    original = arm.model.forward
    arm.model.forward = lambda *a, **k: asked.append(k["input_ids"].shape) or original(*a, **k)
    try:
        assert arm.choose(text, CODES) in CODES
    finally:
        del arm.model.forward
    # The prompt was read once, and then a row for each label; both fit into the context.
    assert asked[0][0] == 1 and asked[1][0] == 6 and asked[0][1] + asked[1][1] <= 64
    with pytest.raises(ConfigError, match="do not fit into 16 tokens"):
        Frozen(subject, settings(context=16), in_context=True).choose("a long text that is too long", CODES)


def test_a_learning_arm_reads_the_examples_and_nothing_else(subject, words) -> None:
    arm = make_arm("replay", subject, settings(replay=1.0, passes=2), learning_rate=0.1, seed=3)
    original, calls = arm.learner.study, []

    def study(ids, state, weights):
        assert int(state.clock) == 0  # a context of its own
        calls.append((words.decode(ids[0].tolist()), weights[0].tolist()))
        return original(ids, state, weights)

    arm.learner.study = study
    sessions = stream()
    arm.read(sessions[0])
    # Twice eight examples, and nothing of an earlier session to replay.
    lines = [f"{one.text} -> {one.label}\n" for one in sessions[0].examples]
    assert [text for text, _ in calls] == lines * 2
    for text, weights in calls:
        answer = len(text.split(" ->")[1])
        assert weights == [0.0] * (len(text) - answer) + [1.0] * answer
    calls.clear()
    arm.read(sessions[1])
    new = [f"{one.text} -> {one.label}\n" for one in sessions[1].examples]
    assert [text for text, _ in calls[::2]] == new * 2 and {text for text, _ in calls[1::2]} <= set(lines)
    assert len(calls) == 32 and len({text for text, _ in calls[1::2]}) > 3


def test_levels_of_the_arms(make_tiny, words) -> None:
    subject = Subject("tiny", make_tiny(num_hidden_layers=4), words)

    def periods(name):
        arm = make_arm(name, subject, settings(), learning_rate=0.2, seed=0)
        assert all(level.learning_rate == 0.2 for level in arm.learner.levels)
        return [level.period for level in arm.learner.levels], arm.replay

    assert periods("online") == ([16], 0.0) and periods("online-slow") == ([32], 0.0)
    assert periods("continuum") == ([16, 32], 0.0) and periods("replay") == ([16], 0.5)
    one = make_arm("online", subject, settings(), learning_rate=0.2, seed=0).learner.levels[0]
    both = make_arm("continuum", subject, settings(), learning_rate=0.2, seed=0).learner.levels
    # The same weights learn, in one level or in two.
    assert set(one.parameters) == {name for level in both for name in level.parameters}


def test_weights_learn_and_the_model_stays(make_tiny, words) -> None:
    torch.manual_seed(0)
    subject = Subject("tiny", make_tiny(num_hidden_layers=2, initializer_range=0.1), words)
    before = {name: p.clone() for name, p in subject.model.named_parameters()}
    quick = settings(optimizer="adam", largest_update=1.0, fixed=0.0, passes=8, periods=(32,))
    arm = make_arm("online", subject, quick, learning_rate=0.01, seed=0)
    assert isinstance(arm, Learning)
    sessions = stream()[:1]
    frozen = runs.run_stream(make_arm("frozen", subject, quick, learning_rate=0.0, seed=0), sessions)
    run = runs.run_stream(arm, sessions)
    # Texts that were not read, classes told from each other: by the weights alone, for nothing is in context.
    assert run["right"] == [[6]] and frozen["right"][0][0] < 5
    assert all(torch.equal(before[name], p) for name, p in subject.model.named_parameters())
    report = run["learning"]
    assert report["tokens"] == sum(
        8 * len(f"{one.text} -> {one.label}\n") for session in sessions for one in session.examples
    )
    (level,) = report["levels"]
    # The last token of an example has nothing after it to learn from.
    assert level["updates"] == (report["tokens"] - 8 * 8) // 32 and level["change"] > 0.01
    still = make_arm("online", subject, quick, learning_rate=1e-12, seed=0)
    assert runs.run_stream(still, sessions)["right"] == frozen["right"]


def test_the_learning_rate_is_chosen_on_a_stream_of_training_texts(subject, monkeypatch) -> None:
    asked = []

    def arm(name, subject, chosen, *, learning_rate, seed, **options):
        def answer(text, labels, last):
            asked.append((learning_rate, text))
            good = learning_rate == 0.2 or name == "frozen"
            return truth(text) if good else labels[0]

        return Told(answer)

    monkeypatch.setattr(runs, "make_arm", arm)
    chosen = settings(learning_rates=(0.1, 0.2, 0.3), arms=("frozen", "online"), tuning_sessions=2)
    result = measure.measure_class_incremental(subject, DATA, chosen, seeds=(0, 1))
    online, frozen = result["arms"]["online"], result["arms"]["frozen"]
    assert online["learning_rate"] == 0.2 and frozen["learning_rate"] is None
    assert set(online["tuning"]) == {"0.1", "0.2", "0.3"} and frozen["tuning"] == {}
    test = {one.text for one in DATA.test}
    tried = [text for rate, text in asked if rate == 0.3]
    assert tried and not set(tried) & test and set(tried) <= {one.text for one in DATA.train}
    assert [run["seed"] for run in online["runs"]] == [0, 1]
    assert online["runs"][0]["classes"] == frozen["runs"][0]["classes"] != online["runs"][1]["classes"]
    assert online["average"]["estimate"] == 1 and result["differences"][0]["arm"] == "frozen"
    assert result["differences"][0]["average"]["estimate"] == 0


def test_learning_that_is_not_finite_scores_nothing_from_then_on() -> None:
    class Breaking(Told):
        def read(self, session):
            super().read(session)
            if session.labels == sessions[1].labels:
                raise NonFiniteError("loss is nan")

    sessions = stream()
    run = runs.run_stream(Breaking(lambda text, labels, last: truth(text)), sessions)
    assert run["right"] == [[6], [0, 0], [0, 0, 0]] and run["diverged"] == 1


def test_a_page_a_picture_and_the_same_numbers_again(subject, tmp_path) -> None:
    chosen = settings(arms=("nearest", "frozen", "online"), sessions=2, tests=2)
    found = measure.measure_class_incremental(subject, DATA, chosen, seeds=(0, 1))
    again = measure.measure_class_incremental(subject, DATA, chosen, seeds=(0, 1))
    for name in chosen.arms:
        for one, two in zip(found["arms"][name]["runs"], again["arms"][name]["runs"], strict=True):
            assert one["right"] == two["right"] and one["learning"] == two["learning"]
    result = {
        "settings": dataclasses.asdict(chosen) | {"data": "x"},
        "seeds": [0, 1],
        "device": "cpu",
        "date": "today",
        "models": {"tiny": found},
    }
    page = markdown(result)
    assert "| nearest | - | 100 % | 100 % | 100 % | 0 % |" in page and "mean of 2 seeds" in page
    assert "nearest minus online: average" in page or "| online | 0.1 |" in page
    written = write_class_incremental(result, tmp_path)
    assert [path.name for path in written] == [
        "class-incremental.json", "class-incremental.md", "class-incremental-tiny.png",
    ]  # fmt: skip
    assert written[2].read_bytes().startswith(b"\x89PNG")


def test_a_stopped_measurement_goes_on_with_what_is_finished(subject, tmp_path, monkeypatch) -> None:
    chosen = settings(arms=("frozen", "online"), sessions=1, tests=2, learning_rates=(0.1, 0.2))
    whole = measure.measure_class_incremental(subject, DATA, chosen)
    made = []

    def make(name, *given, learning_rate, **options):
        if len(made) == limit:
            raise KeyboardInterrupt
        made.append((name, learning_rate))
        return make_arm(name, *given, learning_rate=learning_rate, **options)

    monkeypatch.setattr(runs, "make_arm", make)
    limit = 2
    with pytest.raises(KeyboardInterrupt):
        measure.measure_class_incremental(subject, DATA, chosen, folder=tmp_path)
    assert made == [("frozen", 0.0), ("online", 0.1)]
    limit = 99
    found = measure.measure_class_incremental(subject, DATA, chosen, folder=tmp_path)
    assert made[2:] == [("online", 0.2), ("online", whole["arms"]["online"]["learning_rate"])]
    assert untimed(found) == untimed(whole)


def untimed(found):
    """Results without what a clock said."""
    if isinstance(found, dict):
        return {k: untimed(v) for k, v in found.items() if k != "seconds"}
    return [untimed(one) for one in found] if isinstance(found, list) else found


@pytest.fixture(scope="module")
def stories():
    return Opener("stories", str(STORIES))("cpu")


THREE = settings(arms=("nearest", "online", "replay"), sessions=2, tests=2, learning_rates=(0.1, 0.2))


@pytest.mark.slow
def test_workers_find_what_one_process_finds(stories, monkeypatch) -> None:
    alone = measure.measure_class_incremental(stories, DATA, THREE)
    monkeypatch.setattr(runs, "make_arm", lambda *_given, **_options: pytest.fail("made in this process"))
    two = Workers(2, "cpu", quiet=True)
    together = measure.measure_class_incremental(stories, DATA, THREE, workers=two)
    assert untimed(together) == untimed(alone)


def test_what_is_missing_is_what_is_run(stories, tmp_path) -> None:
    measure.measure_class_incremental(stories, DATA, THREE, folder=tmp_path)

    def missing(data=DATA, seeds=(0,), **changes):
        some = runs.Runs(stories, data, dataclasses.replace(THREE, **changes), folder=tmp_path)
        return [job.name for job in jobs_of(some, seeds)]

    assert missing() == missing(arms=("nearest",), data=dataclasses.replace(DATA)) == []
    assert missing(seeds=(0, 3)) == ["nearest: seed 3", "online: seed 3", "replay: seed 3"]
    online = {"arms": ("online",)}
    assert missing(learning_rates=(0.1, 0.2, 0.3), **online) == ["online: trying 0.3", "online: seed 0"]
    everything = ["online: trying 0.1", "online: trying 0.2", "online: seed 0"]
    other = LabelledTexts("made", DATA.train[:-1], DATA.test)
    assert missing(other, **online) == missing(passes=2, **online) == everything
    with pytest.raises(ConfigError, match="workers open the model 'stories' themselves"):
        jobs_of(runs.Runs(dataclasses.replace(stories, reopen=None), DATA, THREE), (0,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ("on-line",)}, r"no arm 'on-line'.*Did you mean 'online'"),
        ({"dataset": "clinc"}, "Did you mean 'clinc150'"),
        ({"arms": ("online", "online")}, "each once"),
        ({"examples": 0}, "examples is 0"),
        ({"learning_rates": ()}, "at least one of each"),
        ({"replay": 1.5}, "a chance from 0 to 1"),
    ],
)
def test_refusals(changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**changes).check()
