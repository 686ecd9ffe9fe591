"""`nestor chat`: the State has read the conversation, exactly once, in this process and in the next."""

import errno
import os

import pytest
import torch
from transformers import AutoTokenizer

import nestor
from nestor.cli.conversation import Conversation, StopAfterLine
from nestor.data.tokenizers import ByteTokenizer
from nestor.files import FileLock

GREEDY = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 258}
OPTIONS = ("--no-do-sample", "--max-new-tokens", "12")
CHATML = (
    "{% for m in messages %}<sep>{{ m['role'] }}\n{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<sep>assistant\n{% endif %}"
)


@pytest.fixture
def model(model_folder):
    return nestor.NestorForCausalLM.from_pretrained(model_folder).eval()


def assert_has_read(state, model, ids: list[int]) -> None:
    want = model(torch.tensor([ids])).past_key_values
    assert state.clock.tolist() == [len(ids)]
    for index, layer in want.layers.items():
        for name, tensor in layer.items():
            torch.testing.assert_close(state.layers[index][name], tensor, rtol=1e-4, atol=1e-5)


def test_the_state_has_read_every_token_of_both_turns_exactly_once(model):
    conversation, read = Conversation(model, ByteTokenizer()), []
    for text in ("hello there", "and now?"):
        streamed: list[str] = []
        reply = conversation.reply(text, GREEDY, streamed.append)
        assert "".join(streamed) == reply
        start = len(text) + 1
        turn = conversation.last.ids
        assert turn[:start] == list(f"{text}\n".encode())
        ids = torch.tensor([turn[:start]])
        answer = model.generate(ids, past_key_values=conversation.last.before, **GREEDY)[0, start:].tolist()
        assert turn[start:] == [*answer, ord("\n")]
        assert reply == ByteTokenizer().decode(answer)
        read += turn
        assert_has_read(conversation.state, model, read)


def test_an_answer_ends_at_a_line_break_that_follows_text_and_it_is_read_once(model, monkeypatch):
    """The likeliest tokens are dictated: a blank line, a word, a line break, and more that must not come."""
    dictated, forward = list(b"\n hi\nmore text"), model.forward

    def forced(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits[:, -1] = -10.0
        output.logits[:, -1, dictated.pop(0) if dictated else 0] = 10.0
        return output

    conversation = Conversation(model, ByteTokenizer())
    monkeypatch.setattr(model, "forward", forced)
    reply = conversation.reply("hello", GREEDY, lambda text: None)
    monkeypatch.undo()
    assert reply == "\n hi\n"
    assert conversation.last.ids == list(b"hello\n\n hi\n")
    assert_has_read(conversation.state, model, list(b"hello\n\n hi\n"))


def test_a_chat_template_is_read_as_it_renders_the_whole_conversation(model, tmp_path):
    ByteTokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = CHATML
    conversation, messages, read = Conversation(model, tokenizer), [], []
    for text in ("hello there", "and now?"):
        reply = conversation.reply(text, GREEDY, lambda text: None)
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]
        read += conversation.last.ids
    assert tokenizer.decode(read) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert_has_read(conversation.state, model, read)


def test_an_answer_that_ends_itself_gets_no_second_end(model, tmp_path, monkeypatch):
    ByteTokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = CHATML
    conversation = Conversation(model, tokenizer)
    assert conversation._close([*b"ok", ByteTokenizer.eos_token_id], "<eos>\n") == [ord("\n")]
    assert conversation._close([*b"ok"], "<eos>\n") == [ByteTokenizer.eos_token_id, ord("\n")]


def test_two_processes_with_one_memory_file_say_what_one_would(nestor_command, model_folder, tmp_path):
    def lines(stdin: str, memory: str) -> list[str]:
        status, out, err = nestor_command(
            "chat", model_folder, "--memory", tmp_path / memory, *OPTIONS, stdin=stdin
        )
        assert status == 0, err
        return out.splitlines()

    together = lines("one\ntwo\n", "a")
    first, second = lines("one\n", "b"), lines("two\n", "b")
    assert "has read nothing yet" in first[0]
    assert "has read 17 tokens" in second[0]
    assert together[1:] == first[1:] + second[1:]
    fresh = lines("two\n", "c")
    assert fresh[1:] != second[1:]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_file_is_written_after_each_turn_not_only_at_the_end(
    nestor_command, model_folder, tmp_path, model
):
    memory, sizes = tmp_path / "m", []
    original = Conversation.reply

    def watched(self, *args):
        sizes.append(memory.exists() and nestor.State.load(memory, model=model).clock.item())
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Conversation, "reply", watched)
        nestor_command("chat", model_folder, "--memory", memory, *OPTIONS, stdin="one\none\none\n")
    assert sizes == [False, 17, 34]


def test_snapshot_rollback_and_forget(nestor_command, model_folder, tmp_path):
    memory = tmp_path / "m"
    chat = ("chat", model_folder, "--memory", memory, *OPTIONS)
    status, out, _ = nestor_command(*chat, stdin="one\n/snapshot first\ntwo\n/snapshots\n")
    assert status == 0
    assert out.splitlines()[-1] == "first"
    second_answer = out.split("kept as")[1].splitlines()[1]
    changed = memory.read_bytes()
    kept = (tmp_path / "m.snapshots" / "first.safetensors").read_bytes()
    assert changed != kept

    status, out, _ = nestor_command(*chat, stdin="/rollback first\n")
    assert "that of snapshot first again" in out
    assert memory.read_bytes() == kept
    _, out, _ = nestor_command(*chat, stdin="two\n")
    assert out.splitlines()[1] == second_answer
    assert memory.read_bytes() == changed

    _, out, _ = nestor_command(*chat, stdin="/forget\n")
    assert "the memory is empty. Snapshots kept: first." in out
    assert not memory.exists()
    _, out, _ = nestor_command(*chat, stdin="/rollback first\n")
    assert memory.read_bytes() == kept


def test_after_forget_the_answer_is_that_of_an_empty_memory(nestor_command, model_folder, tmp_path):
    chat = ("chat", model_folder, "--memory", tmp_path / "m", *OPTIONS)
    _, fresh, _ = nestor_command(*chat, stdin="two\n")
    (tmp_path / "m").unlink()
    _, forgot, _ = nestor_command(*chat, stdin="one\n/forget\ntwo\n")
    _, went_on, _ = nestor_command(*chat, stdin="two\n")
    assert forgot.splitlines()[-1] == fresh.splitlines()[-1] != went_on.splitlines()[-1]


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc/x", "..", "a.b", "x" * 65, "naïve", "-\0"])
def test_a_name_that_is_no_name_never_reaches_the_file_system(nestor_command, model_folder, tmp_path, name):
    memory = tmp_path / "m"
    stdin = f"one\n/snapshot {name}\n/rollback {name}\n"
    status, out, _ = nestor_command("chat", model_folder, "--memory", memory, *OPTIONS, stdin=stdin)
    assert status == 0
    assert out.count("cannot be a snapshot's name: use 1 to 64 letters, digits, - and _.") == 2
    assert sorted(os.listdir(tmp_path)) == ["m", "m.lock"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/snap x", "there is no command /snap. Did you mean '/snapshot'?"),
        ("/snapshot", "write it as /snapshot NAME."),
        ("/snapshot a b", "write it as /snapshot NAME."),
        ("/snapshot a", "there is nothing to keep yet"),
        ("/rollback a", "there is no snapshot 'a'; there are: none yet."),
        ("/snapshots", "no snapshots yet"),
        ("/surprise", "there is no turn yet to show"),
        ("/help", "/rollback NAME"),
        (b"caf\xe9", "not UTF-8 at byte 3"),
    ],
)
def test_a_wrong_line_is_explained_and_the_conversation_goes_on(
    nestor_command, model_folder, tmp_path, line, message
):
    line = line if isinstance(line, bytes) else line.encode()
    memory = tmp_path / "m"
    arguments = ("chat", model_folder, "--memory", memory, *OPTIONS)
    status, out, _ = nestor_command(*arguments, stdin=line + b"\n/quit\nnever read\n")
    assert status == 0
    assert message in out
    assert not memory.exists()


def test_a_snapshot_is_never_overwritten_and_needs_a_memory_file(nestor_command, model_folder, tmp_path):
    chat = ("chat", model_folder, "--memory", tmp_path / "m", *OPTIONS)
    nestor_command(*chat, stdin="one\n/snapshot a\n")
    kept = (tmp_path / "m.snapshots" / "a.safetensors").read_bytes()
    _, out, _ = nestor_command(*chat, stdin="two\n/snapshot a\n")
    assert "there is a snapshot 'a' already" in out
    assert (tmp_path / "m.snapshots" / "a.safetensors").read_bytes() == kept
    _, out, _ = nestor_command("chat", model_folder, *OPTIONS, stdin="two\n/snapshot a\n")
    assert "start with --memory FILE" in out


def test_a_second_process_on_the_same_memory_is_refused(nestor_command, model_folder, tmp_path):
    with FileLock(tmp_path / "m"):
        status, out, err = nestor_command("chat", model_folder, "--memory", tmp_path / "m", stdin="one\n")
    assert status == 2
    assert f"in use by process {os.getpid()}" in err
    assert out == ""


def test_the_memory_of_another_model_is_refused_and_stays(nestor_command, model_folder, tmp_path):
    memory = tmp_path / "m"
    nestor_command("chat", model_folder, "--memory", memory, *OPTIONS, stdin="one\n")
    before = memory.read_bytes()
    other = nestor.NestorForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        other.norm.weight[0] += 1
    other.save_pretrained(tmp_path / "other")
    status, _, err = nestor_command("chat", tmp_path / "other", "--memory", memory, stdin="one\n")
    assert status == 2 and "other weights" in err
    memory.write_bytes(before[:-10])
    status, _, err = nestor_command("chat", model_folder, "--memory", memory, stdin="one\n")
    assert status == 2 and "truncated" in err
    assert memory.read_bytes() == before[:-10]


def test_an_interrupted_turn_leaves_the_memory_as_it_was(nestor_command, model_folder, tmp_path, monkeypatch):
    memory = tmp_path / "m"
    nestor_command("chat", model_folder, "--memory", memory, *OPTIONS, stdin="one\n")
    before = memory.read_bytes()

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(nestor.NestorForCausalLM, "generate", interrupt)
    status, out, _ = nestor_command("chat", model_folder, "--memory", memory, *OPTIONS, stdin="two\n")
    assert status == 0
    assert "as it was before this turn" in out
    assert memory.read_bytes() == before


def test_a_full_disk_is_said_and_the_file_keeps_what_it_held(
    nestor_command, model_folder, tmp_path, monkeypatch
):
    memory = tmp_path / "m"
    nestor_command("chat", model_folder, "--memory", memory, *OPTIONS, stdin="one\n")
    before = memory.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("nestor.files.os.fsync", full)
    status, out, _ = nestor_command("chat", model_folder, "--memory", memory, *OPTIONS, stdin="two\n")
    assert status == 0
    assert "was not written (No space left on device); it holds what it held before" in out
    assert memory.read_bytes() == before


def test_an_answer_ends_with_the_line_break_that_follows_some_of_its_own_text():
    """Whatever stands before it: the prompt, and what a cache of keys and values has read."""
    stop, row = StopAfterLine(ByteTokenizer()), list(b"said before\n")
    ended = []
    for token in b"\n a\n":
        row.append(token)
        ended.append(bool(stop(torch.tensor([row]), None)))
    assert ended == [False, False, False, True]
