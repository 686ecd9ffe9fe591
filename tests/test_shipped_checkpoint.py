"""The model in checkpoints/talk speaks, and recalls from its State alone what attention no longer sees."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import nestor
from nestor.cli.conversation import Conversation
from nestor.cli.loading import load_model
from nestor.data import encode_text, open_corpus, tokenize
from nestor.data.tasks import CorpusHaystack, FactSpec, RecallTask
from nestor.data.tasks.words import HELD_OUT_NAMES
from nestor.evaluation.subjects import attention_reach

FOLDER = Path(__file__).parents[1] / "checkpoints" / "talk"

# What these tests measured on a CPU stands beside; the bounds leave room for another machine's rounding.
BITS_PER_BYTE = 1.8  # 1.717
RECALL = 0.8  # 30 of 32
CHANCE = 0.05  # none of 32
ANSWERED = 2  # of the four questions of a conversation; 3 were

GREEDY = {"do_sample": False, "max_new_tokens": 24}


@pytest.fixture(scope="module")
def loaded():
    return load_model(str(FOLDER), "cpu")


@pytest.fixture(scope="module")
def model(loaded):
    return loaded[0]


@pytest.fixture(scope="module")
def tokenizer(loaded):
    return loaded[1]


@pytest.fixture(scope="module")
def books(tokenizer, tmp_path_factory):
    """The shipped classics, of which training had none."""
    corpus = tokenize(open_corpus("classics"), tokenizer, cache_dir=tmp_path_factory.mktemp("cache"))
    return CorpusHaystack(corpus, tokenizer)


@pytest.fixture(scope="module")
def probes(model, books):
    """Questions about held-out names and numbers, farther back than attention reaches."""
    reach = attention_reach(model.config).tokens
    task = RecallTask(books, 512, spec=FactSpec(("ask-name", "ask-number")))
    return [task.probe(np.random.default_rng(i), reach + 16, n_facts=2, held_out=True) for i in range(32)]


def recalled(model, probes, **forgotten) -> float:
    """Share of probes whose answer is the likeliest, token by token. With `reset` the question, of so many
    tokens for each probe, starts afresh."""
    longest = max(len(probe.ids) for probe in probes)
    ids = torch.zeros(len(probes), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, probe in enumerate(probes):
        ids[row, : probe.end], mask[row, : probe.end] = torch.from_numpy(probe.ids), 1
    resets = torch.zeros_like(mask, dtype=torch.bool)
    for row, start in enumerate(forgotten.get("reset", ())):
        resets[row, start] = True
    with torch.no_grad():
        best = model(ids, mask, resets=resets, use_cache=False).logits.argmax(-1)
    right = [
        torch.equal(best[row, probe.start - 1 : probe.end - 1], ids[row, probe.start : probe.end])
        for row, probe in enumerate(probes)
    ]
    return sum(right) / len(right)


def test_the_folder_is_small_and_holds_safetensors_only():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 15_000_000
    assert {path.suffix for path in FOLDER.iterdir()} <= {".safetensors", ".json", ".md"}


def test_it_reads_books_that_it_never_saw(model, tokenizer, books):
    texts = [books.text(np.random.default_rng(i), 512) for i in range(8)]
    rows = [torch.tensor([encode_text(tokenizer, text)]) for text in texts]
    with torch.no_grad():
        nats = sum(float(model(row, labels=row).loss) * (row.shape[1] - 1) for row in rows)
    assert nats / math.log(2) / sum(len(text.encode()) for text in texts) < BITS_PER_BYTE


def test_it_recalls_what_attention_cannot_reach(model, probes):
    assert recalled(model, probes) > RECALL


def test_a_reset_before_the_question_leaves_chance(model, tokenizer, probes):
    starts = [probe.start - len(encode_text(tokenizer, probe.fact.question)) for probe in probes]
    assert recalled(model, probes, reset=starts) <= CHANCE


def test_a_saved_memory_goes_on_as_the_one_it_was(model, probes, tmp_path):
    probe = probes[0]
    page, question = torch.from_numpy(probe.ids[None, : probe.start - 8]), probe.ids[None, probe.start - 8 :]
    with torch.no_grad():
        state = model(page).past_key_values
        state.save(tmp_path / "memory.safetensors", model=model)
        loaded = nestor.State.load(tmp_path / "memory.safetensors", model=model)
        one, other = (model(torch.from_numpy(question), past_key_values=s).logits for s in (state, loaded))
    assert torch.equal(one, other)


def test_it_answers_in_a_conversation_and_not_after_forgetting(model, tokenizer):
    told = dict(
        zip(("name", "dog's name", "sister's name", "teacher's name"), HELD_OUT_NAMES[3::7], strict=False)
    )
    chat = Conversation(model, tokenizer)

    def ask() -> int:
        answers = [chat.reply(f"What is my {what}?", GREEDY, lambda text: None) for what in told]
        return sum(name in answer for name, answer in zip(told.values(), answers, strict=True))

    for what, name in told.items():
        chat.reply(f"My {what} is {name}.", GREEDY, lambda text: None)
    remembered = ask()
    chat.replace(None)
    assert remembered >= ANSWERED and ask() == 0
