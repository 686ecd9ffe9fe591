"""`nestor retrofit`, and what learns and talks with the memory that it makes, on real small weights."""

import re
from pathlib import Path

import pytest
import torch

from nestor.learning import Learner, Retrofit
from nestor.models import State
from nestor.models.state import read_notes

STORIES = Path(__file__).parents[2] / "checkpoints" / "stories260K"
# Of another kind than what the model was trained on, as it reads it: one sentence, again and again.
TEXT = "Marlow the raven keeps the red key under the old clock. " * 30


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(TEXT)
    return path


def stories(retrofit):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(STORIES).eval()
    return model, Learner(model, retrofit.apply(model))


@pytest.mark.parametrize("reading", ["existing", "copies", "added"])
def test_an_empty_memory_then_a_text_then_a_conversation(nestor_command, story, tmp_path, reading) -> None:
    memory = tmp_path / "m.safetensors"
    options = ("--reading", reading, "--periods", 16, 64, "--fixed", 0.4)
    status, out, err = nestor_command("retrofit", STORIES, "--memory", memory, *options)
    assert status == 0, err
    flat = " ".join(out.split())
    same = "the same to the bit" if reading != "copies" else "predictions are the same to"
    assert same in flat and "every 16 tokens" in flat and "weights learn" in flat
    assert read_notes(memory)["retrofit"]["reading"] == reading
    assert nestor_command("retrofit", STORIES, "--memory", memory)[0] == 2

    rate = () if reading == "existing" else ("--learning-rates", 0.1, 0.1)
    status, out, err = nestor_command("learn", STORIES, story, "--memory", memory, *rate)
    if rate:  # these are not those of the file
        assert status == 2 and "learning_rates is" in err
        status, out, err = nestor_command("learn", STORIES, story, "--memory", memory)
    assert status == 0, err
    row = next(line for line in out.splitlines() if line.startswith("story.txt")).split()
    assert float(row[2]) < float(row[3])  # bits a byte: learning below frozen

    before = memory.read_bytes()
    talk = ("chat", STORIES, "--memory", memory, "--no-do-sample", "--max-new-tokens", 12)
    status, out, err = nestor_command(*talk, stdin="Marlow the raven keeps the\n/surprise\n")
    assert status == 0 and "every 16:" in out and "written hardest" in out, err
    after = memory.read_bytes()
    assert after != before
    _, learner = stories(Retrofit.from_notes(read_notes(memory)["retrofit"]))
    state = State.load(memory, learner.model)
    assert int(state.clock) > 12 and (state.learned["every 16"]["updates"] > 20).all()
    # What the model wrote itself counts for nothing.
    assert int((state.learned["stream"]["weights"] == 0).sum()) > 0
    # A text closes the conversation and goes on with what was learned.
    status, out, err = nestor_command("learn", STORIES, story, "--memory", memory)
    assert status == 0 and float(re.search(r"story.txt\s+\S+\s+(\S+)", out)[1]) < float(row[2]), err


def test_a_conversation_answers_from_what_was_learned(nestor_command, story, tmp_path) -> None:
    memory = tmp_path / "m.safetensors"
    learned = ("--memory", memory, "--periods", 16, 64, "--fixed", 0, "--learning-rates", 1, 1)
    for _ in range(2):
        assert nestor_command("learn", STORIES, story, "--no-compare", *learned)[0] == 0
    talk = ("chat", STORIES, "--no-do-sample", "--max-new-tokens", 24)
    question = "Marlow the raven keeps the red\n"
    status, out, err = nestor_command(*talk, "--memory", memory, stdin=question)
    assert status == 0 and "key under the old clock" in " ".join(out.split()), (out, err)
    fresh = tmp_path / "fresh.safetensors"
    status, out, err = nestor_command(*talk, "--memory", fresh, stdin=question)
    assert status == 0 and "old clock" not in out and fresh.exists(), (out, err)
    status, out, _ = nestor_command(
        *talk, "--memory", memory, stdin="/snapshot a\n/forget\n/rollback a\n/quit\n"
    )
    assert status == 0 and "again" in out and memory.exists()
    assert nestor_command(*talk, stdin=question)[0] == 2  # without a memory nothing would last


def test_a_context_that_is_full_is_closed_and_what_was_learned_stays(story) -> None:
    from transformers import AutoTokenizer

    from nestor.cli.learning_conversation import LearningConversation
    from nestor.errors import DataError

    _, learner = stories(Retrofit(periods=(8,), fixed=0.0))
    talk = LearningConversation(learner, AutoTokenizer.from_pretrained(STORIES), limit=60)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    for _ in range(5):
        talk.reply("Once upon a time there was a raven.", options, lambda text: None)
        assert 0 < talk.read <= 60
    assert learner.report(talk.state)[0][0].updates >= 5
    with pytest.raises(DataError, match="the model reads 60"):
        talk.reply("once " * 70, options, lambda text: None)
    assert torch.equal(talk.state.clock, torch.tensor([talk.read]))


def test_memories_are_of_one_kind(nestor_command, model_folder, story, tmp_path) -> None:
    memory = tmp_path / "m.safetensors"
    arguments = ("chat", model_folder, "--memory", memory, "--max-new-tokens", 3)
    assert nestor_command(*arguments, stdin="the key\n")[0] == 0
    status, _, err = nestor_command("learn", model_folder, story, "--memory", memory)
    assert status == 2 and "memory without levels" in err
    status, _, err = nestor_command("learn", STORIES, story, "--reading", "added", "--export", tmp_path / "e")
    assert status == 2 and "--export" in err
    status, _, err = nestor_command("retrofit", STORIES, "--memory", tmp_path / "n", "--width", 4)
    assert status == 2 and "only with reading 'added'" in err
