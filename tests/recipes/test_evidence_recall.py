"""The table of recall: questions have an answer in the text, nothing gives it away, and runs make a table."""

import json
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nestor.data import ByteTokenizer
from nestor.data.tasks import CorpusHaystack
from nestor.errors import ConfigError

PAIRS = (2, 5, 16)
VOCABULARY = 96


class Reader:
    """A model that names what followed the last `context` tokens when they came before, and else token 0.

    window: how many tokens back it sees at most."""

    device = torch.device("cpu")

    def __init__(self, vocab_size, context=1, window=10**9):
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.context, self.window = context, window

    def forward(self, input_ids, past_key_values=None, use_cache=True):
        read = input_ids if past_key_values is None else torch.cat([past_key_values, input_ids], 1)
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for row, ids in enumerate(read.tolist()):
            followed = {}
            for place in range(len(ids)):
                key = tuple(ids[max(0, place + 1 - self.context) : place + 1])
                asked = place - (len(ids) - input_ids.shape[1])
                before = followed.get(key)
                if asked >= 0 and before is not None and place - before <= self.window:
                    logits[row, asked, ids[before + 1]] = 50.0
                followed[key] = place
        return SimpleNamespace(logits=logits, past_key_values=read)

    __call__ = forward


class Guesser(Reader):
    """A model that knows nothing."""

    def forward(self, input_ids, past_key_values=None, use_cache=True):
        generator = torch.Generator().manual_seed(int(input_ids.sum()))
        logits = torch.randn(*input_ids.shape, self.config.vocab_size, generator=generator)
        return SimpleNamespace(logits=logits, past_key_values=input_ids)

    __call__ = forward


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """A folder of novels with lines and clauses, without the nouns that needles are made of."""
    folder = tmp_path_factory.mktemp("books")
    rng = np.random.default_rng(0)
    words = ("she", "was", "old", "and", "went", "away", "slowly", "again", "because", "nobody", "came")
    for name in ("train-a", "train-b", "valid", "heldout-long"):
        lines = []
        for _ in range(3):
            clauses = [" ".join(rng.choice(words, 5)) for _ in range(120)]
            lines.append(json.dumps({"text": ", ".join(clauses[:60]) + ".\n" + "; ".join(clauses[60:])}))
        (folder / f"novels-{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def args(evidence, books, tmp_path):
    return evidence.recall.Args(
        models=("transformer", "linear-attention"), seeds=(0,), mqar_rates=(1e-3,), needle_rates=(1e-3,),
        pairs=(2, 4), vocabulary=30, mqar_context=32, mqar_steps=2, mqar_short_steps=1, mqar_short_context=16,
        mqar_batch=2, lengths=(64,), long_pairs=(4,), documents=4, needle_size="quick", needle_context=700,
        needle_lengths=(700,), needle_steps=2, needle_batch=1, needles=2, data=books, out=tmp_path / "out",
        results=tmp_path / "results",
    )  # fmt: skip


def answers(evidence, purpose=2, **settings):
    questions = tuple(evidence.associations.Question(pairs, 80, **settings) for pairs in PAIRS)
    return evidence.associations.Answers(questions, VOCABULARY, 8, purpose)


def test_who_reads_the_pairs_answers_all_and_who_guesses_none(evidence) -> None:
    for far in (False, True):
        found = answers(evidence, far=far)(Reader(VOCABULARY), "cpu")["answers"]
        assert [(one["pairs"], one["length"]) for one in found] == [(pairs, 80) for pairs in PAIRS]
        assert [one["accuracy"]["estimate"] for one in found] == [1.0] * 3
        assert [one["asked"] for one in found] == [8 * pairs for pairs in PAIRS]
    guessed = answers(evidence, purpose=1)(Guesser(VOCABULARY), "cpu")
    assert all(one["accuracy"]["estimate"] < 0.15 for one in guessed["answers"])
    # More than log2 of all ids: what it says is noise.
    assert guessed["valid"] == pytest.approx(np.mean([one["bits"] for one in guessed["answers"]]))
    assert guessed["valid"] > 6.5
    near = answers(evidence, far=True)(Reader(VOCABULARY, window=5), "cpu")["answers"]
    assert [one["accuracy"]["estimate"] for one in near[:2]] == [0.0, 0.0]


def test_only_answers_are_learned_and_documents_count_the_same(evidence) -> None:
    reading = evidence.associations.Associations(PAIRS, VOCABULARY)
    batch = next(reading.batches(3, 12, 80))
    again = next(reading.batches(3, 12, 80))
    assert torch.equal(batch["input_ids"], again["input_ids"])
    seen = set()
    for ids, labels, weights in zip(batch["input_ids"], batch["labels"], batch["weights"], strict=True):
        asked = (labels != -100).nonzero().flatten().tolist()
        seen.add(len(asked))
        pairs = {int(ids[2 * i]): int(ids[2 * i + 1]) for i in range(len(asked))}
        # The question is a key; its answer is that of its pair, and follows it in the text.
        assert [pairs[int(ids[place])] for place in asked] == labels[asked].tolist()
        assert ids[[place + 1 for place in asked]].tolist() == labels[asked].tolist()
        assert min(asked) >= 2 * len(asked) and len(set(ids[asked].tolist())) == len(asked)
        assert float(weights[asked].sum()) == pytest.approx(1)
    assert seen == set(PAIRS)


def test_short_documents_come_first_and_leave_the_long_ones_as_they_are(evidence) -> None:
    plain = evidence.associations.Associations(PAIRS, VOCABULARY)
    stages = replace(plain, short_steps=2, short_length=24)
    first, second, third = islice(stages.batches(3, 6, 80), 3)
    assert first["input_ids"].shape == second["input_ids"].shape == (4 * 6, 24)
    assert not torch.equal(first["input_ids"], second["input_ids"])
    # 24 tokens have room for 6 pairs and their questions.
    assert {int(row.sum()) for row in first["labels"] != -100} == {2, 5}
    assert torch.equal(third["input_ids"], next(plain.batches(3, 6, 80))["input_ids"])
    assert stages.identity() == plain.identity() | {"short_steps": 2, "short_length": 24}
    with pytest.raises(
        ConfigError, match=r"documents of 7 tokens have room for 1 pairs, and there are \[2, "
    ):
        replace(stages, short_length=7).batches(3, 6, 80)


def test_secrets_are_told_before_they_are_asked_for_and_told_once(evidence, books) -> None:
    file = str(books / "novels-valid.jsonl")
    haystack = CorpusHaystack(evidence.novels.corpus((file,)), ByteTokenizer())
    task = evidence.needles.Secrets(haystack, 1500)
    counts = set()
    for seed in range(30):
        document = task.document(np.random.default_rng(seed))
        assert document.ids.shape == document.weights.shape == (1500,)
        text = bytes(document.ids.astype(np.uint8)).decode()
        counts.add(len(document.answers))
        for answer in document.answers:
            value = text[answer.start : answer.end].strip(" .")
            first = text.index(f" {value}.")
            # Twice in all, as statement and as answer, with the distance that is said between them.
            assert text.count(f" {value}.") == 2 and first < answer.start
            told = text.index("\n", first) + 1
            asked = text.rindex("\n", 0, answer.start) + 1
            assert answer.distance == asked - told >= 0
            assert (document.weights[answer.start : answer.end] == 1).all()
        rest = np.ones(1500, bool)
        for answer in document.answers:
            rest[answer.start : answer.end] = False
        assert np.allclose(document.weights[rest], evidence.needles.TEXT_WEIGHT)
    assert counts == {1, 2, 4, 8}
    with pytest.raises(ConfigError, match="rows have 90 bytes"):
        for seed in range(9):
            evidence.needles.Secrets(haystack, 90).document(np.random.default_rng(seed))


def test_needles_are_found_by_who_reads_and_not_by_who_sees_the_end_alone(evidence, books) -> None:
    file = str(books / "novels-heldout-long.jsonl")
    found = evidence.needles.Found(file, (900,), 2, 2)
    read = found(Reader(256, context=14), "cpu")["needles"]
    assert [one["variant"] for one in read] == list(evidence.needles.VARIANTS)
    assert [one["exact"]["estimate"] for one in read] == [1.0] * 5
    assert [one["exact"]["n"] for one in read] == [10] * 5
    blind = found(Reader(256, context=14, window=150), "cpu")["needles"]
    for one in blind:
        assert one["by_depth"][:3] == [0.0, 0.0, 0.0] and one["exact"]["estimate"] <= 0.4
    guessed = evidence.needles.Found(file, (900,), 1, 1)(Guesser(256), "cpu")
    assert all(one["exact"]["estimate"] == 0 for one in guessed["needles"]) and guessed["valid"] > 8


def test_runs_make_tables_and_are_kept(evidence, args) -> None:
    said = []
    results = evidence.recall.main(args, said.append)
    assert list(results) == ["mqar", "needles"]
    mqar, needles = results.values()
    assert [row["model"] for row in mqar["rows"]] == ["transformer", "linear-attention"]
    assert [(one["pairs"], one["length"]) for one in mqar["rows"][0]["answers"]] == [(2, 32), (4, 32)]
    assert [(one["pairs"], one["length"]) for one in mqar["rows"][0]["longer"]] == [(4, 64)]
    assert len(needles["rows"][0]["needles"]) == 5 and needles["settings"]["needle_steps"] == 2
    for row in (*mqar["rows"], *needles["rows"]):
        scores = [*row.get("answers", ()), *row.get("longer", ()), *row.get("needles", ())]
        assert all([one["estimate"]] == one["by_seed"] for one in scores) and row["losses"][0] > 0
    written = {path.name for path in args.results.iterdir()}
    assert {"recall-mqar.json", "recall-mqar.md", "recall-needles.json", "recall-needles.md"} <= written
    assert {"recall-mqar-pairs-other-memories.png", "recall-needles-pass-key.png"} <= written
    path = args.results / "recall-mqar.md"
    text = path.read_text()
    assert "## 4 pairs in longer documents" in text and "| linear-attention |" in text
    assert sum("in validation" in text for text in said) == 4
    # Runs are kept, and the table follows from the JSON alone.
    path.unlink()
    said.clear()
    args.table_only, args.tasks = True, ("mqar",)
    evidence.recall.main(args, said.append)
    assert path.read_text() == text and said == [text]
    args.table_only, args.models = False, ("linear-attention",)
    evidence.recall.main(args, said.append)
    assert not any("in validation" in text for text in said)
    # Runs that were tested otherwise are no results of this test.
    for name in ("documents", "lengths"):
        other = replace(args, **{name: (16, 128) if name == "lengths" else 2 * args.documents})
        with pytest.raises(ConfigError, match=r"is of a run with .*measure"):
            evidence.recall.main(other, said.append)


def test_scores_of_one_seed_have_the_interval_over_documents(evidence) -> None:
    one = {"estimate": 0.5, "low": 0.4, "high": 0.6}
    assert evidence.recall.over_runs([one]) == one | {"by_seed": [0.5]}
    two = evidence.recall.over_runs([one, one | {"estimate": 0.7}])
    assert two["estimate"] == pytest.approx(0.6) and two["low"] < 0 < 1 < two["high"]
    assert evidence.recall.over_runs([one, None])["estimate"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ("mqa",)}, "there is no task 'mqa'.*Did you mean 'mqar'"),
        ({"models": ("titans",)}, "there is no model 'titans'"),
        ({"needles": 1}, "must be above 0"),
        ({"mqar_short_steps": 2}, "--mqar-short-steps is 2 of 2 updates"),
        ({"mqar_short_context": 64}, "documents of 64 tokens, where later ones have 32"),
        ({"seeds": ()}, "--seeds"),
    ],
)
def test_settings_are_refused(evidence, args, change, message) -> None:
    for name, value in change.items():
        setattr(args, name, value)
    with pytest.raises(ConfigError, match=message):
        evidence.recall.main(args)
