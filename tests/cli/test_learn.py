"""`nestor learn`: texts go into a memory file, and into a model of their own if asked."""

import math
import re

import pytest
import torch
from torch.nn import functional as F

import nestor
from nestor.files import FileLock
from nestor.learning import Learner, assign_levels
from nestor.models import State

LEVELS = ("--periods", 8, 16, "--learning-rates", 0.5, 0.25, "--context", 40, "--fixed", 0)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the ravens of Marlow keep the key, café. " * 5, encoding="utf-8")
    return path


def test_what_a_text_teaches_is_kept_and_goes_on(nestor_command, model_folder, text, tmp_path):
    memory = tmp_path / "m.safetensors"
    status, out, err = nestor_command("learn", model_folder, text, "--memory", memory, *LEVELS)
    assert status == 0, err
    model = nestor.NestorForCausalLM.from_pretrained(model_folder).eval()
    ids = list(text.read_bytes())
    # The same by hand: windows of 40 that begin with the last token of the one before.
    learner = Learner(model, assign_levels(model, [8, 16], [0.5, 0.25], fixed=0, largest_update=0.01))
    state, learning, frozen = learner.start(), 0.0, 0.0
    for begin in range(0, len(ids) - 1, 39):
        window = torch.tensor([ids[begin : begin + 40]])
        logits, state = learner.read(window, state)
        state = learner.close(state)
        learning += float(F.cross_entropy(logits[0, :-1], window[0, 1:], reduction="sum"))
        with torch.no_grad():
            plain = model(window).logits
        frozen += float(F.cross_entropy(plain[0, :-1], window[0, 1:], reduction="sum"))
    row = next(line for line in out.splitlines() if line.startswith("text.txt")).split()
    assert row[1] == str(len(ids) - 1)
    for shown, nats in ((row[2], learning), (row[3], frozen)):
        assert float(shown) == pytest.approx(nats / math.log(2) / len(ids), abs=6e-4)
    saved = State.load(memory, model)
    for part, tensors in state.learned.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(saved.learned[part][name], tensor, msg=name)
    updates = int(state.learned["every 8"]["updates"])
    assert updates == (len(ids) - 1) // 8 and re.search(rf"every 8\s+{updates}\s+{updates}\s", out)

    status, out, err = nestor_command("learn", model_folder, text, "--memory", memory, *LEVELS)
    assert status == 0, err
    again = next(line for line in out.splitlines() if line.startswith("text.txt")).split()
    assert float(again[2]) < float(row[2]) and float(again[3]) == float(row[3])
    assert re.search(rf"every 8\s+\d+\s+{2 * (len(ids) - 1) // 8}\s", out)


def test_the_exported_model_is_what_was_learned(nestor_command, model_folder, text, tmp_path):
    memory, folder = tmp_path / "m.safetensors", tmp_path / "new" / "reader"
    arguments = ("learn", model_folder, text, "--no-compare", "--memory", memory, "--export", folder, *LEVELS)
    status, out, err = nestor_command(*arguments)
    assert status == 0 and "frozen" not in out, err
    model = nestor.NestorForCausalLM.from_pretrained(model_folder).eval()
    learner = Learner(model, assign_levels(model, [8, 16], [0.5, 0.25], fixed=0))
    learned = learner.weights(State.load(memory, model))
    exported = nestor.NestorForCausalLM.from_pretrained(folder)
    changed = 0
    for name, weight in exported.named_parameters():
        assert torch.equal(weight, learned[name]), name
        changed += not torch.equal(weight, dict(model.named_parameters())[name])
    assert changed == sum(len(level.parameters) for level in learner.levels)
    assert nestor_command("generate", folder, "the key", "--no-do-sample", "--max-new-tokens", 3)[0] == 0
    assert nestor_command(*arguments)[0] == 2


def test_a_text_shorter_than_a_period_teaches_nothing_and_says_so(nestor_command, model_folder, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("short")
    status, out, err = nestor_command("learn", model_folder, path, *LEVELS)
    assert (
        status == 0 and "nothing was learned" in out and "shortest period, 8 tokens" in " ".join(out.split())
    )


def test_what_cannot_be_learned_from_is_named(nestor_command, model_folder, text, tmp_path):
    def error(*arguments):
        status, _, err = nestor_command("learn", model_folder, *arguments)
        assert status == 2
        return err

    assert "there is no file" in error(tmp_path / "none.txt")
    assert "is a folder" in error(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert "not UTF-8 at byte 3" in error(tmp_path / "latin.txt")
    (tmp_path / "one.txt").write_text("x")
    assert "at least two" in error(tmp_path / "one.txt", *LEVELS)
    assert "is there already" in error(text, "--export", tmp_path)
    assert "nothing would be kept" in error(text, "--no-compare")
    assert "a learning rate for each" in error(text, "--learning-rates", 0.1)
    assert "--context is 1" in error(text, *LEVELS, "--context", 1)
    memory = tmp_path / "m.safetensors"
    assert nestor_command("learn", model_folder, text, "--memory", memory, *LEVELS)[0] == 0
    before = memory.read_bytes()
    found = error(text, "--memory", memory, "--periods", 8, "--fixed", 0.5)
    assert "periods is (8, 16), not (8,); fixed is 0.0, not 0.5" in found
    assert "has other levels: reading is existing, not added" in error(
        text, "--memory", memory, "--reading", "added"
    )
    with FileLock(memory):
        assert "m.safetensors" in error(text, "--memory", memory, *LEVELS)
    assert memory.read_bytes() == before
