"""`nestor generate` prints what the model says, and touches a memory file only when told to."""

import os

import pytest
import torch
import transformers

import nestor
from nestor.data.tokenizers import ByteTokenizer
from nestor.files import FileLock

PROMPT = "It was a dark and"
GREEDY = ("--no-do-sample", "--max-new-tokens", "12")


@pytest.fixture
def model(model_folder):
    return nestor.NestorForCausalLM.from_pretrained(model_folder).eval()


def continuation(model, text: str, state=None, tokens: int = 12, **arguments) -> list[int]:
    ids = torch.tensor([list(text.encode())])
    output = model.generate(ids, past_key_values=state, max_new_tokens=tokens, do_sample=False, **arguments)
    return output[0, ids.shape[1] :].tolist()


def test_the_streamed_text_is_the_decoded_continuation(nestor_command, model_folder, model):
    status, out, err = nestor_command("generate", model_folder, PROMPT, *GREEDY)
    assert status == 0, err
    assert out == ByteTokenizer().decode(continuation(model, PROMPT)) + "\n"


def test_the_prompt_may_come_from_standard_input(nestor_command, model_folder):
    direct = nestor_command("generate", model_folder, PROMPT, *GREEDY)
    assert nestor_command("generate", model_folder, "-", *GREEDY, stdin=PROMPT) == direct
    status, _, err = nestor_command("generate", model_folder, "-", *GREEDY, stdin=b"caf\xe9 au lait")
    assert status == 2 and "not UTF-8 at byte 3" in err


def test_a_seed_repeats_a_sample_and_another_seed_does_not(nestor_command, model_folder):
    def sample(seed: int):
        return nestor_command("generate", model_folder, PROMPT, "--max-new-tokens", 30, "--seed", seed)

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_top_k_of_one_is_greedy(nestor_command, model_folder):
    greedy = nestor_command("generate", model_folder, PROMPT, *GREEDY)
    sampled = nestor_command("generate", model_folder, PROMPT, "--top-k", 1, "--max-new-tokens", 12)
    assert sampled == greedy


def test_beam_search_prints_the_best_beam(nestor_command, model_folder, model):
    status, out, _ = nestor_command("generate", model_folder, PROMPT, *GREEDY, "--num-beams", 3)
    assert status == 0
    assert out == ByteTokenizer().decode(continuation(model, PROMPT, num_beams=3)) + "\n"


def test_a_memory_is_read_and_left_alone(nestor_command, model_folder, model, tmp_path):
    state = model(torch.tensor([list(b"The key of Marlow is 4821.\n")])).past_key_values
    memory = tmp_path / "ada.safetensors"
    state.save(memory, model=model)
    before = memory.read_bytes()
    status, out, _ = nestor_command("generate", model_folder, PROMPT, *GREEDY, "--memory", memory)
    assert status == 0
    assert out == ByteTokenizer().decode(continuation(model, PROMPT, state)) + "\n"
    assert memory.read_bytes() == before
    assert os.listdir(tmp_path) == ["ada.safetensors"]


@pytest.mark.parametrize("beams", [1, 3])
def test_a_written_memory_has_read_the_prompt_and_the_whole_answer_once(
    nestor_command, model_folder, model, tmp_path, beams
):
    memory = tmp_path / "ada.safetensors"
    arguments = (*GREEDY, "--num-beams", beams, "--memory", memory, "--write-memory")
    read: list[int] = []
    for text in (PROMPT, " and then"):
        status, _, err = nestor_command("generate", model_folder, text, *arguments)
        assert status == 0, err
        state = None
        if read:
            state = model(torch.tensor([read])).past_key_values
        read += [*text.encode(), *continuation(model, text, state, num_beams=beams)]
    want = model(torch.tensor([read])).past_key_values
    got = nestor.State.load(memory, model=model)
    assert got.clock.tolist() == [len(read)]
    for index, layer in want.layers.items():
        for name, tensor in layer.items():
            torch.testing.assert_close(got.layers[index][name], tensor, rtol=1e-4, atol=1e-5)


def test_a_memory_in_use_is_refused_for_writing(nestor_command, model_folder, tmp_path):
    memory = tmp_path / "ada.safetensors"
    with FileLock(memory):
        status, _, err = nestor_command("generate", model_folder, "x", "--memory", memory, "--write-memory")
    assert status == 2 and f"in use by process {os.getpid()}" in err
    assert not memory.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--temperature", "0"), "--temperature is 0.0; it must be above 0"),
        (("--temperature", "nan"), "--temperature is nan"),
        (("--top-p", "1.5"), "--top-p is 1.5; it must be above 0 and at most 1"),
        (("--top-k", "0"), "--top-k is 0; it must be at least 1"),
        (("--max-new-tokens", "0"), "--max-new-tokens is 0; it must be at least 1"),
        (("--num-beams", "0"), "--num-beams is 0"),
        (("--write-memory",), "name one with --memory FILE"),
        (("--memory", "missing.safetensors"), "missing.safetensors is missing"),
        (("--device", "gpux"), "device 'gpux' cannot be used"),
    ],
)
def test_an_impossible_option_says_what_is_possible(nestor_command, model_folder, arguments, message):
    status, out, err = nestor_command("generate", model_folder, PROMPT, *arguments)
    assert status == 2
    assert message in err and out == ""
    assert err.count("\n") == 1


def test_a_wrong_model_is_one_line_that_helps(nestor_command, model_folder, tmp_path):
    def error_of(model) -> str:
        status, _, err = nestor_command("generate", model, PROMPT)
        assert status == 2
        assert err.count("\n") == 1
        return err

    assert "there is no folder" in error_of(tmp_path / "nowhere")
    assert f"Did you mean {model_folder}?" in error_of(model_folder.parent)
    assert "is a file" in error_of(model_folder / "config.json")
    assert "was not found on the Hugging Face hub" in error_of("no-one/no-model")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in model_folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "truncated or damaged" in error_of(broken)
    (broken / "config.json").write_text('{"model_type": "nestro"}')
    assert "nestro" in error_of(broken)


def test_an_empty_prompt_starts_a_text_with_the_opening_token(nestor_command, model_folder, model):
    status, out, err = nestor_command("generate", model_folder, "", *GREEDY)
    assert status == 0, err
    answer = model.generate(torch.tensor([[ByteTokenizer.bos_token_id]]), max_new_tokens=12, do_sample=False)
    assert out == ByteTokenizer().decode(answer[0, 1:]) + "\n"


def test_a_model_of_another_library_runs_and_has_no_memory_to_write(nestor_command, tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=260, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    ByteTokenizer().save_pretrained(tmp_path / "llama")
    status, out, err = nestor_command("generate", tmp_path / "llama", PROMPT, *GREEDY)
    assert status == 0, err
    assert len(out) > 1
    status, _, err = nestor_command(
        "generate", tmp_path / "llama", PROMPT, "--memory", tmp_path / "m", "--write-memory"
    )
    assert status == 2 and "a 'llama' model has no State" in err


def test_lines_are_prompts_of_their_own_from_one_memory(nestor_command, model_folder, model, tmp_path):
    state = model(torch.tensor([list(b"The key of Marlow is 4821.\n")])).past_key_values
    memory = tmp_path / "ada.safetensors"
    state.save(memory, model=model)
    lines = [PROMPT, "The key of Marlow is"]
    status, out, err = nestor_command(
        "generate", model_folder, "-", "--lines", *GREEDY, "--memory", memory, stdin="\n\n".join(lines)
    )
    assert status == 0, err
    decode = ByteTokenizer().decode
    wanted = [line + "".join(decode(continuation(model, line, state)).splitlines()[:1]) for line in lines]
    assert out.splitlines() == wanted
    status, _, err = nestor_command(
        "generate", model_folder, "-", "--lines", "--memory", memory, "--write-memory", stdin=PROMPT
    )
    assert status == 2 and "--lines starts every line from the same memory" in err
