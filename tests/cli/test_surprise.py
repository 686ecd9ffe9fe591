"""What `/surprise` shows: the pieces of the last turn by how hard they were written."""

import pytest
import torch

import nestor
from nestor.cli.conversation import Conversation
from nestor.cli.surprise import SHADES, coloured, hardest
from nestor.data.tokenizers import ByteTokenizer

GREEDY = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 258}


def test_the_strongest_piece_has_the_last_shade_and_an_unwritten_one_none():
    text = coloured([("low", 0.0), ("mid", 1.0), ("high", 2.0)])
    assert text.plain == "lowmidhigh"
    assert [str(span.style) for span in text.spans] == [SHADES[0], SHADES[3], SHADES[-1]]


def test_nothing_written_has_no_shade():
    assert {str(span.style) for span in coloured([("a", 0.0), ("b", 0.0)]).spans} == {SHADES[0]}


def test_words_are_ranked_by_their_strongest_piece_and_named_once():
    pieces = [
        ("Mar", 0.1),
        ("low is ", 0.4),
        ("4", 0.8),
        ("8", 0.2),
        ("21", 0.1),
        (".\n", 0.1),
        ("Marlow", 0.6),
    ]
    assert hardest(pieces) == [("4821.", 1.0), ("Marlow", pytest.approx(0.75)), ("is", pytest.approx(0.5))]
    assert hardest(pieces, count=1) == [("4821.", 1.0)]
    assert hardest([]) == []


@pytest.fixture
def memory_model():
    torch.manual_seed(3)
    config = nestor.preset(
        "titans-mag",
        "quick",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        sliding_window=16,
        intermediate_size=32,
        memory={"heads": 2, "chunk_size": 4},
    )
    return nestor.NestorForCausalLM(config).eval().requires_grad_(False)


def test_pieces_make_up_the_whole_turn_and_a_character_takes_its_strongest_byte(memory_model):
    conversation = Conversation(memory_model, ByteTokenizer())
    conversation.reply("first", GREEDY, lambda text: None)
    before = conversation.state
    conversation.reply("Brontë", GREEDY, lambda text: None)
    pieces = conversation.surprise()
    ids = conversation.last.ids
    text = "".join(piece for piece, _ in pieces)
    assert text.startswith("Brontë\n")
    strength = memory_model.write_strength(torch.tensor([ids]), past_key_values=before)[0]
    assert strength.shape == (len(ids),)
    want = [*strength[:5].tolist(), float(strength[5:7].max()), float(strength[7])]
    assert [value for _, value in pieces[:7]] == pytest.approx(want)
    assert all(value >= 0 for _, value in pieces)
    assert conversation.state.clock.tolist() == [len(ids) + int(before.clock)]


def test_the_command_shows_the_words_of_a_turn(nestor_command, memory_model, tmp_path):
    memory_model.config.tokenizer_name = "bytes"
    memory_model.save_pretrained(tmp_path / "model")
    options = ("--no-do-sample", "--max-new-tokens", "4")
    status, out, err = nestor_command(
        "chat", tmp_path / "model", *options, stdin="the key of Marlow\n/surprise\n"
    )
    assert status == 0, err
    assert "the key of Marlow" in out
    assert "written hardest: " in out and "100%" in out


def test_a_model_without_a_memory_says_so(nestor_command, model_folder):
    status, out, _ = nestor_command("chat", model_folder, "--max-new-tokens", "4", stdin="hello\n/surprise\n")
    assert status == 0
    assert "memory" in out.splitlines()[-1]
    assert "Traceback" not in out
