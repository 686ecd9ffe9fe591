"""Synthetic tasks: answers stand where they are said to, distances hold, all follows from seed and index."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nestor.data import (
    IGNORED,
    ByteTokenizer,
    Corpus,
    TokenizedCorpus,
    encode_text,
    open_corpus,
    rank_lanes,
    tokenize,
)
from nestor.data.tasks import (
    NEEDLE_KINDS,
    TEMPLATES,
    CorpusHaystack,
    FactSpec,
    MqarTask,
    RecallTask,
    RepeatedHaystack,
    TaskStream,
    facts_page,
    needle,
)
from nestor.data.tasks.facts import guess_bits
from nestor.data.tasks.haystack import exact_tokens
from nestor.data.tasks.words import HELD_OUT_NAMES, NOUNS, RELATIONS, TRAIN_NAMES, invented_name
from nestor.errors import ConfigError, DataError, StateMismatchError

# Those that state and ask in one line.
ONE_LINE = ("key", "call", "house", "phone")
ALL_TEMPLATES = FactSpec(ONE_LINE, digits=3)
TALK = FactSpec(("ask-name", "ask-number"), digits=4)


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """Byte-level haystack of the shipped classics."""
    tokenizer = ByteTokenizer()
    corpus = tokenize(open_corpus("classics"), tokenizer, cache_dir=tmp_path_factory.mktemp("cache"))
    return CorpusHaystack(corpus, tokenizer)


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """Haystack under a small byte-pair tokenizer, whose tokens are of uneven length."""
    text = next(iter(open_corpus("shakespeare")))[:60_000] + " é ü 日本 key of 0123456789\n"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    corpus = tokenize(Corpus.from_texts([text]), wrapped, cache_dir=tmp_path_factory.mktemp("cache"))
    return CorpusHaystack(corpus, wrapped)


def rng_of(*seed):
    return np.random.default_rng(seed)


def test_names_are_many_and_held_out_ones_are_apart():
    assert len(TRAIN_NAMES) >= 200 and len(HELD_OUT_NAMES) >= 50
    assert not set(TRAIN_NAMES) & set(HELD_OUT_NAMES)
    invented = [invented_name(rng_of(seed)) for seed in range(100)]
    assert len(set(invented)) > 95 and all(name.isalpha() and name[0].isupper() for name in invented)
    assert "Marlow" in TRAIN_NAMES + HELD_OUT_NAMES
    assert all(word.isascii() and word.isalpha() for word in TRAIN_NAMES + HELD_OUT_NAMES + NOUNS)


@given(st.integers(0, 1000), st.integers(1, 60), st.booleans())
def test_facts_page_states_each_fact_and_asks_for_it(seed, count, held_out):
    page = facts_page(rng_of(seed), count, held_out=held_out)
    again = facts_page(rng_of(seed), count, held_out=held_out)
    assert page == again
    lines = page.text.splitlines()
    assert len(lines) == len(page.questions) == count
    assert sorted(question + answer for question, answer in page.questions) == sorted(lines)
    names, other = (HELD_OUT_NAMES, TRAIN_NAMES) if held_out else (TRAIN_NAMES, HELD_OUT_NAMES)
    assert all(line.split()[3] in names and line.split()[3] not in other for line in lines)
    assert len({answer for _, answer in page.questions}) == count
    assert all(answer[0] == " " and len(answer) == 6 and answer[1] != "0" for _, answer in page.questions)


def test_fact_spec_draws_every_template_and_refuses_what_cannot_be():
    kinds = {fact.question.replace(fact.name, "X") for fact in ALL_TEMPLATES.draw(rng_of(0), 60)}
    assert kinds == {TEMPLATES[template].question.format(name="X") for template in ONE_LINE}


def test_facts_of_a_conversation_are_lines_of_two_speakers():
    facts = TALK.draw(rng_of(0), 12)
    names = [fact for fact in facts if not fact.value.isdigit()]
    assert 0 < len(names) < 12 and len({fact.name for fact in facts}) == 12
    for fact in facts:
        user, _, rest = fact.question.partition("\n")
        assert fact.statement.count("\n") == 2 and fact.value in fact.statement.partition("\n")[0]
        assert user == f"What is {'my' if fact in names else 'the number of'} {fact.name}?"
        assert rest.endswith(f"{fact.name} is") and fact.answer == f" {fact.value}."
    assert 0 < sum(fact.value in TRAIN_NAMES for fact in names) < len(names)
    assert {fact.name for fact in names} <= set(RELATIONS)
    held_out = FactSpec(("ask-name",), held_out=True)
    drawn = held_out.draw(rng_of(1), len(RELATIONS))
    assert {fact.value for fact in drawn} <= set(HELD_OUT_NAMES)
    assert max(len(fact.statement) for fact in drawn) <= held_out.longest(len)
    assert guess_bits(drawn[0].value) == np.log2(len(HELD_OUT_NAMES)) and guess_bits("4821") == np.log2(9000)
    with pytest.raises(ConfigError, match="about relations"):
        held_out.draw(rng_of(1), len(RELATIONS) + 1)
    with pytest.raises(ConfigError, match=r"no fact template 'kye'.*Did you mean 'key'"):
        FactSpec(("kye",))
    with pytest.raises(ConfigError, match="has 0 digits"):
        FactSpec(digits=0)
    with pytest.raises(ConfigError, match=r"11 facts are wanted; .* 10 values of 1 digits"):
        FactSpec(digits=1).draw(rng_of(0), 11)
    with pytest.raises(ConfigError, match="999 facts are wanted"):
        FactSpec().draw(rng_of(0), 999)


@pytest.mark.parametrize("source", ["books", "merged"])
@settings(max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    length=st.integers(420, 900),
    facts=st.integers(1, 5),
    asked=st.integers(1, 7),
)
def test_recall_document_answers_are_where_they_are_said_to_be(request, source, seed, length, facts, asked):
    haystack = request.getfixturevalue(source)
    tokenizer = haystack.tokenizer
    task = RecallTask(haystack, length, n_facts=facts, n_questions=asked, spec=ALL_TEMPLATES)
    document = task.document(rng_of(seed))
    assert document.ids.shape == document.weights.shape == (length,) and (document.weights > 0).all()
    drawn = {fact.name: fact for fact in ALL_TEMPLATES.draw(rng_of(seed), facts)}
    assert len(document.answers) == asked
    for answer in document.answers:
        before = tokenizer.decode(document.ids[: answer.start].tolist())
        fact = next(
            fact
            for fact in drawn.values()
            if before.endswith("\n" + fact.question) or before == fact.question
        )
        assert document.ids[answer.start : answer.end].tolist() == encode_text(tokenizer, fact.answer)
        assert fact.statement in before
        # The distance runs from the end of the last line that said the value to the question.
        between = tokenizer.decode(document.ids[: answer.start].tolist())[: -len(fact.question)]
        lines = [fact.statement, fact.question + fact.answer + "\n"]
        said = max(between.rfind(line) + len(line) for line in lines if line in between)
        assert answer.distance == len(encode_text(tokenizer, between[said:]))


def test_recall_lines_stand_alone(books):
    document = RecallTask(books, 2000, n_facts=8, n_questions=16).document(rng_of(3))
    lines = ByteTokenizer().decode(document.ids).split("\n")
    planted = [line for line in lines if "The key of" in line]
    assert len(planted) == 24 and all(
        line.startswith("The key of") and line.endswith(".") for line in planted
    )


def test_recall_distances_are_short_and_long(books):
    task = RecallTask(books, 4000, n_facts=1, n_questions=1, distances=(16, 3000))
    found = np.array([task.document(rng_of(i)).answers[0].distance for i in range(200)])
    assert found.max() <= 3200
    # Log-uniform on 16..3000: each factor of about 5.7 has a third of the questions.
    for low, high in ((0, 92), (92, 525), (525, 3200)):
        assert 0.2 < ((found >= low) & (found < high)).mean() < 0.47


def test_recall_loss_on_answers_only(books):
    task = RecallTask(books, 600, loss_on="answers")
    document = task.document(rng_of(1))
    wanted = np.zeros(600, bool)
    for answer in document.answers:
        wanted[answer.start : answer.end] = True
    assert ((document.weights > 0) == wanted).all() and wanted.sum() == 8 * len(" 1234.")
    batch = next(TaskStream(task, 1, 600, eos=257, seed=5))
    document = TaskStream(task, 1, 600, seed=5).document(0)
    for t, label in enumerate(batch["labels"][0].tolist()):
        counted = t + 1 < 600 and document.weights[t + 1] > 0
        assert label == (document.ids[t + 1] if counted else IGNORED)


def test_recall_settings_that_cannot_be(books):
    with pytest.raises(
        ConfigError, match=r"document_length is 100; 4 facts and 8 questions .* greater than \d+"
    ):
        RecallTask(books, 100)
    with pytest.raises(ConfigError, match="n_facts is 0"):
        RecallTask(books, 1000, n_facts=0)
    with pytest.raises(ConfigError, match=r"distances are \(9, 3\)"):
        RecallTask(books, 1000, distances=(9, 3))
    with pytest.raises(ConfigError, match=r"loss_on is 'answer'.*Did you mean 'answers'"):
        RecallTask(books, 1000, loss_on="answer")


@pytest.mark.parametrize("source", ["books", "merged"])
@settings(max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    distance=st.one_of(st.integers(0, 40), st.integers(41, 700)),
    before=st.integers(0, 100),
    facts=st.integers(1, 6),
)
def test_recall_probe_meets_the_distance_exactly(request, source, seed, distance, before, facts):
    haystack = request.getfixturevalue(source)
    tokenizer = haystack.tokenizer
    task = RecallTask(haystack, 700, spec=ALL_TEMPLATES)
    probe = task.probe(rng_of(seed), distance, before=before, n_facts=facts, held_out=True)
    assert probe.fact.name in HELD_OUT_NAMES and probe.end == len(probe.ids)
    ids = probe.ids.tolist()
    assert ids[probe.start :] == encode_text(tokenizer, probe.fact.answer)
    statement, question = (
        encode_text(tokenizer, text) for text in (probe.fact.statement, probe.fact.question)
    )
    question_start = probe.start - len(question)
    assert ids[question_start : probe.start] == question
    statement_end = question_start - distance
    assert ids[statement_end - len(statement) : statement_end] == statement
    assert tokenizer.decode(ids).count(probe.fact.statement) == 1
    same = task.probe(rng_of(seed), distance, before=before, n_facts=facts, held_out=True)
    assert same.ids.tolist() == ids


@given(seed=st.integers(0, 1000), count=st.integers(0, 60))
def test_exact_haystack_never_cuts_a_character(seed, count):
    text = "日本語 é\n" * 50
    tokenizer = ByteTokenizer()
    haystack = CorpusHaystack(TokenizedCorpus.from_documents([tokenizer.encode(text)]), tokenizer)
    ids = exact_tokens(haystack, rng_of(seed), count)
    assert len(ids) == count and "\ufffd" not in tokenizer.decode(ids)
    assert count == 0 or ids[-1] == 10


def test_a_corpus_without_words_is_no_haystack():
    corpus = TokenizedCorpus.from_documents([[128] * 500])
    with pytest.raises(DataError, match="no passage of words"):
        CorpusHaystack(corpus, ByteTokenizer()).text(rng_of(0), 10)


@settings(max_examples=40)
@given(st.integers(0, 1000), st.integers(1, 12), st.integers(0, 60))
def test_mqar_values_follow_their_keys_again(seed, pairs, extra):
    task = MqarTask(90, pairs, 4 * pairs + extra)
    document = task.document(rng_of(seed))
    ids = document.ids
    memory = dict(zip(ids[0 : 2 * pairs : 2].tolist(), ids[1 : 2 * pairs : 2].tolist(), strict=True))
    assert len(memory) == len(set(memory.values())) == pairs
    assert all(0 <= key < 30 <= value < 60 for key, value in memory.items())
    assert len(document.answers) == pairs and (document.weights > 0).sum() == pairs
    asked = set()
    for answer in document.answers:
        key, value = ids[answer.start - 1], ids[answer.start]
        assert document.weights[answer.start] and memory[int(key)] == value and answer.end == answer.start + 1
        pair_end = 2 * list(memory).index(int(key)) + 2
        assert answer.distance == answer.start - 1 - pair_end
        asked.add(int(key))
    assert asked == set(memory)
    rest = np.delete(
        ids,
        [*range(2 * pairs), *(a.start - 1 for a in document.answers), *(a.start for a in document.answers)],
    )
    assert (rest >= 60).all() and (rest < 90).all()


def test_mqar_distances_and_impossible_settings():
    task = MqarTask(300, 1, 200, distances=(100, 120))
    assert all(98 <= task.document(rng_of(i)).answers[0].distance <= 121 for i in range(50))
    with pytest.raises(ConfigError, match="n_pairs is 31; a vocabulary of 90 has 30 keys"):
        MqarTask(90, 31, 1000)
    with pytest.raises(ConfigError, match="3 pairs and their queries take 12 tokens"):
        MqarTask(90, 3, 11)


@pytest.mark.parametrize("kind", NEEDLE_KINDS)
@settings(max_examples=15)
@given(seed=st.integers(0, 1000), length=st.integers(400, 3000), depth=st.floats(0, 1))
def test_needle_is_hidden_once_at_its_depth(books, kind, seed, length, depth):
    for haystack in (books, RepeatedHaystack(ByteTokenizer())):
        found = needle(haystack, rng_of(seed), kind=kind, length=length, depth=depth)
        meta = found.meta
        statement_line = next(line for line in found.prompt.split("\n") if meta["value"] in line)
        assert found.prompt.count(meta["value"]) == 1 and found.answer == f" {meta['value']}."
        # Sentences and clauses are far shorter than this.
        assert length - 700 <= meta["tokens"] + len(found.answer) <= length
        assert (
            abs(meta["real_depth"] - depth) < 0.7
            if haystack is books
            else abs(meta["real_depth"] - depth) < 0.2
        )
        tail = found.prompt.split(statement_line + "\n", 1)[1]
        question = found.prompt.split("\n")[-1]
        assert meta["distance"] == len((tail.removesuffix(question)).encode())
        assert found == needle(haystack, rng_of(seed), kind=kind, length=length, depth=depth)


def test_needle_ends_and_errors(books):
    first = needle(books, rng_of(0), length=500, depth=0)
    assert first.prompt.startswith("The secret number for")
    last = needle(books, rng_of(0), length=500, depth=1)
    assert last.meta["distance"] == 0
    with pytest.raises(ConfigError, match=r"no needle kind 'numbr'.*Did you mean 'number'"):
        needle(books, rng_of(0), kind="numbr")
    with pytest.raises(ConfigError, match=r"depth is 1\.5"):
        needle(books, rng_of(0), depth=1.5)
    with pytest.raises(ConfigError, match="length is 20; the needle and its question alone take"):
        needle(books, rng_of(0), length=20)


@settings(max_examples=30)
@given(st.integers(1, 60), st.integers(0, 12), st.sampled_from([1, 2, 4]))
def test_task_stream_is_its_documents_resumable_and_divisible(length, before, world):
    task = MqarTask(60, 4, 25, loss_on="all")
    stream = TaskStream(task, 4, length, eos=99, seed=3)
    batches = [next(stream) for _ in range(before + 3)]
    ids, labels, resets = (torch.cat([b[k] for b in batches], 1) for k in ("input_ids", "labels", "resets"))
    for lane in range(4):
        want = np.concatenate([stream.document(lane + 4 * k).ids for k in range(ids.shape[1] // 25 + 1)])
        assert ids[lane].tolist() == want[: ids.shape[1]].tolist()
        for t in range(ids.shape[1]):
            assert bool(resets[lane, t]) == (t % 25 == 0)
            assert labels[lane, t] == (99 if t % 25 == 24 else want[t + 1])
    resumed = TaskStream(task, 4, length, eos=99, seed=3)
    part = TaskStream(task, 4, length, eos=99, seed=3)
    for _ in range(before):
        next(part)
    resumed.load_state_dict(json.loads(json.dumps(part.state_dict())))
    for wanted in batches[before:]:
        got = next(resumed)
        assert all(torch.equal(got[key], wanted[key]) for key in got)
    ranks = [TaskStream(task, 4, length, eos=99, seed=3, lanes=rank_lanes(4, r, world)) for r in range(world)]
    together = [next(rank)["input_ids"] for rank in ranks]
    assert torch.equal(torch.cat(together), batches[0]["input_ids"])


def test_task_stream_refuses_a_state_of_another_task(books):
    state = TaskStream(RecallTask(books, 800), 2, 10).state_dict()
    json.dumps(state)
    with pytest.raises(StateMismatchError, match="task was"):
        TaskStream(RecallTask(books, 801), 2, 10).load_state_dict(state)


def test_answers_weigh_what_they_are_told_to_in_the_batch(books):
    task = RecallTask(books, 600, n_facts=2, n_questions=4, answer_weight=7.0)
    batch, document = next(TaskStream(task, 1, 600, seed=3)), TaskStream(task, 1, 600, seed=3).document(0)
    weights = batch["weights"][0]
    inside = torch.zeros(600, dtype=torch.bool)
    for answer in document.answers:
        # The weight stands where the token is predicted, one place before it.
        inside[answer.start - 1 : answer.end - 1] = True
    assert inside.sum() == 4 * len(" 1234.")
    assert (weights[inside] == 7).all() and (weights[~inside] == 1).all()
    only = RecallTask(books, 600, n_facts=2, n_questions=4, loss_on="answers", answer_weight=7.0)
    only_weights = next(TaskStream(only, 1, 600, seed=3))["weights"][0]
    assert (only_weights[inside] == 7).all() and (only_weights[~inside][:-1] == 0).all()
    with pytest.raises(ConfigError, match="answer_weight is -1"):
        RecallTask(books, 600, answer_weight=-1)


@pytest.mark.parametrize("kind", ["number", "word", "uuid"])
@pytest.mark.parametrize("seed", range(3))
def test_needles_among_others_of_their_kind(books, kind, seed):
    found = needle(books, rng_of(seed), kind=kind, length=1500, depth=0.5, others=5)
    *statements, question = [line for line in found.prompt.splitlines() if line.startswith("The secret ")]
    # Six are told, each for another noun, and the question is the beginning of the one that is asked for.
    assert len({line.split(" is ")[0] for line in statements}) == len(set(statements)) == 6
    assert found.prompt.endswith(question) and statements.count(question + found.answer) == 1
    assert 800 < len((found.prompt + found.answer).encode()) <= 1500
    behind = found.prompt.split(question + found.answer + "\n", 1)[1].removesuffix(question)
    assert found.meta["distance"] == len(behind.encode())
    assert found == needle(books, rng_of(seed), kind=kind, length=1500, depth=0.5, others=5)


def test_secrets_are_refused_where_there_cannot_be_so_many(books):
    with pytest.raises(ConfigError, match="4 secrets of kind 'passkey' are wanted; there can be 1 to 1"):
        needle(books, rng_of(0), kind="passkey", others=3)
    with pytest.raises(ConfigError, match="length is 40; the needle with 2 others and its question alone"):
        needle(books, rng_of(0), length=40, others=2)
