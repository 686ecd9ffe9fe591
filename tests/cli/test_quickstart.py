"""`nestor quickstart` trains, measures, lets other processes answer, and words its verdict by the figures."""

import contextlib
import html
import io
import json
import os
import re
import shlex
import signal
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest
import torch

import nestor
from nestor.cli import quickstart
from nestor.cli.main import main
from nestor.data.tokenizers import ByteTokenizer
from nestor.errors import ConfigError
from nestor.quickstart import picture, recipe, training
from nestor.quickstart.display import TrainingDisplay
from nestor.quickstart.measuring import beyond_reach
from nestor.quickstart.report import commands
from nestor.quickstart.verdict import bits_sentence, memory_sentences, recall_sentence

STEPS, WINDOW = 4, 8
NAMES = ("transformer", "titans-mag")
RECIPE = """\
name = "tiny-{preset}"
[model]
preset = "{preset}"
[model.overrides]
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 2
intermediate_size = 48
sliding_window = {window}
initializer_range = 0.2
[data]
sequence_length = 64
batch_size = 2
[[data.sources]]
text = ["shakespeare"]
[[data.sources]]
task = "recall"
options = {{ n_facts = 1, n_questions = 1, distances = [4], digits = 2, templates = ["house"] }}
[optimizer]
lr = 1e-2
[schedule]
final = 0.2
[run]
steps = 50
state_mode = "carry"
"""


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("recipes")
    paths = []
    for name in NAMES:
        paths.append(folder / f"{name}.toml")
        paths[-1].write_text(RECIPE.format(preset=name, window=WINDOW))
    return [str(path) for path in paths]


@pytest.fixture(scope="module")
def finished(recipes, tmp_path_factory):
    """A whole quickstart: its folder, results.json and what was on the screen."""
    folder = tmp_path_factory.mktemp("quickstart")
    argv = ["quickstart", "--output", folder, "--recipes", *recipes, "--steps", STEPS, "--max-length", 128]
    argv += ["--passages", 2, "--questions", 2, "--facts", 3]
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen):
        assert main([str(word) for word in argv]) == 0
    return folder, json.loads((folder / "results.json").read_text()), screen.getvalue()


def open_model(path):
    return nestor.NestorForCausalLM.from_pretrained(path).eval()


def greedy(model, text: str, count: int, state=None) -> str:
    ids = torch.tensor([list(text.encode())])
    output = model.generate(ids, past_key_values=state, max_new_tokens=count, do_sample=False)
    return ByteTokenizer().decode(output[0, ids.shape[1] :].tolist()).partition("\n")[0]


def test_everything_is_written(finished):
    folder, result, _ = finished
    written = {path.name for path in (folder / "plots").iterdir()}
    assert {"recall-by-distance.png", "perplexity-by-position.png", "training-loss.png"} <= written
    for run in result["training"]:
        assert run["steps"] == STEPS and run["tokens"] == STEPS * 2 * 64
        assert [row["step"] for row in run["curve"] if "loss" in row] == list(range(1, STEPS + 1))
        assert open_model(folder / run["name"] / "final").config.sliding_window == WINDOW


def test_the_report_is_one_file_with_all_in_it(finished):
    folder, result, _ = finished
    page = (folder / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|srcset)\s*=\s*"([^"]*)"', page)
    assert len(sources) >= 10 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert all(link.startswith("#") for link in re.findall(r'href\s*=\s*"([^"]*)"', page))
    assert "<script" not in page and "@import" not in page and "url(" not in page
    text = html.unescape(page)
    memory = result["memory"]
    wanted = [*result["verdict"], memory["after_forget"]["command"], memory["forget"]["command"]]
    wanted += [asking["command"] for asking in memory["asked"].values()]
    wanted += [command for _, command in result["commands"]]
    assert [words for words in wanted if words not in text] == []


def test_the_screen_shows_speed_questions_and_verdict(finished):
    _, result, screen = finished
    for name in NAMES:
        assert f"{name} begins from scratch" in screen
        assert re.search(rf"{name}  {STEPS}/{STEPS}  loss .* bits/byte .* tok/s", screen)
    assert all(sentence in screen for sentence in result["verdict"])
    for answer in result["memory"]["asked"]["titans-mag"]["answers"]:
        assert f"wanted{answer['wanted']}" in screen or answer["right"]


def test_other_processes_answer_from_the_state_alone(finished):
    folder, result, _ = finished
    memory = result["memory"]
    askings = [*memory["asked"].values(), memory["after_forget"]]
    processes = {asking["process"] for asking in askings}
    assert len(processes) == 3 and os.getpid() == memory["process"] not in processes
    page = (folder / "memory" / "page.txt").read_text()
    questions = (folder / "memory" / "questions.txt").read_text().splitlines()
    reach = 2 * (WINDOW - 1) + 1
    assert memory["facts"] in page and memory["distance"] > reach
    assert len(page) - page.index(memory["facts"]) - len(memory["facts"]) == memory["distance"]
    for name, asking in memory["asked"].items():
        model = open_model(folder / name / "final")
        state = model(torch.tensor([list(page.encode())])).past_key_values
        for question, answer in zip(questions, asking["answers"], strict=True):
            assert answer["question"] == question
            assert f"{question}{answer['wanted']}" in memory["facts"]
            assert answer["wanted"] not in "".join(questions)
            assert answer["given"].rstrip() == greedy(model, question, 4, state).rstrip()
            assert answer["right"] == answer["given"].startswith(answer["wanted"])


def test_after_forget_the_model_answers_as_if_it_had_read_nothing(finished):
    folder, result, _ = finished
    memory = result["memory"]
    model = open_model(folder / "titans-mag" / "final")
    blank = [greedy(model, a["question"], 4).rstrip() for a in memory["after_forget"]["answers"]]
    assert [a["given"].rstrip() for a in memory["after_forget"]["answers"]] == blank
    # Two steps of training rarely change a greedy answer; that the memory is read at all shows in the logits.
    state = nestor.State.load(folder / "memory" / "titans-mag.safetensors", model=model)
    ids = torch.tensor([list(memory["after_forget"]["answers"][0]["question"].encode())])
    with torch.no_grad():
        assert (model(ids, past_key_values=state).logits - model(ids).logits)[0, -1].abs().max() > 1e-3
    assert memory["forget"]["file_left"] is False and memory["weights_unchanged"] is True
    assert (folder / "memory" / "titans-mag.safetensors").is_file()


def test_the_shown_command_can_be_repeated(finished, nestor_command):
    _, result, _ = finished
    asking = result["memory"]["asked"]["titans-mag"]
    command, _, questions = asking["command"].partition(" < ")
    status, out, err = nestor_command(*shlex.split(command)[1:], stdin=Path(questions).read_text())
    assert status == 0, err
    assert out.splitlines() == [a["question"] + a["given"] for a in asking["answers"]]


def test_an_interrupted_training_goes_on_to_the_same_weights(finished, recipes, tmp_path, monkeypatch):
    folder, _, _ = finished
    argv = ["quickstart", "--output", tmp_path, "--recipes", *recipes, "--steps", STEPS]
    argv = [str(word) for word in argv]
    shown = TrainingDisplay.show

    def interrupt(self, name, metrics):
        shown(self, name, metrics)
        if name == "titans-mag" and metrics["step"] == 2 and "loss" in metrics:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(TrainingDisplay, "show", interrupt)
    assert main(argv) == 130
    assert not (tmp_path / "titans-mag" / "final").exists()
    monkeypatch.undo()
    steps: list[tuple[str, int]] = []
    monkeypatch.setattr(TrainingDisplay, "show", lambda self, name, m: steps.append((name, m["step"])))

    class Reached(Exception):
        pass

    def reached(*_):
        raise Reached

    monkeypatch.setattr("nestor.quickstart.measuring.measure", reached)
    with pytest.raises(Reached):
        main(argv)
    for name in NAMES:
        assert (name, STEPS) in steps
        ours, theirs = (open_model(root / name / "final").state_dict() for root in (tmp_path, folder))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_another_request_in_the_same_folder_is_refused(finished, recipes, capsys):
    folder, _, _ = finished
    argv = ["quickstart", "--output", str(folder), "--recipes", *recipes, "--steps", "5"]
    assert main(argv) == 2
    assert "length was '4 steps' and is '5 steps'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "0"], "--steps is 0"),
        (["--minutes", "0"], "--minutes is 0"),
        (["--recipes", "quick-transformer"], "--recipes names 1 configurations"),
        (["--from-scratch", "--checkpoints", "x"], "give one of them"),
        (["--checkpoints", "nowhere"], "nowhere/quick-transformer holds no model"),
    ],
)
def test_a_wrong_option_is_one_line(argv, message, tmp_path, capsys):
    assert main(["quickstart", "--output", str(tmp_path), *argv]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_given_model_is_the_start_and_is_named(finished, recipes, tmp_path, capsys):
    folder, _, _ = finished
    for name in NAMES:
        os.symlink(folder / name / "final", tmp_path / f"tiny-{name}")
    entrants = recipe.choose(recipes, tmp_path / "out", 3, tmp_path, False)
    for name, entrant in zip(NAMES, entrants, strict=True):
        assert entrant.config.optimizer.lr == pytest.approx(0.2 * 1e-2)
        assert entrant.origin.words == f"{STEPS} steps (0.0 M tokens)"
        one = recipe.with_run(recipe.with_steps(entrant, 1).config, eval_every=0)
        with TrainingDisplay(silent(), {name: 1}) as display:
            training.train_all([replace(entrant, config=one)], display, "auto")
        before, after = (open_model(path) for path in (folder / name / "final", entrant.final))
        moved = max((a - b).abs().max() for a, b in zip(before.parameters(), after.parameters(), strict=True))
        # AdamW moves a weight by about the learning rate; random weights would lie much further off.
        assert 0 < moved < 3 * 0.2 * 1e-2
    assert ("Train titans-mag by its whole recipe:", f"nestor train {recipes[1]}") in commands(
        tmp_path, entrants
    )
    made = replace(entrants[1].origin, training={**entrants[1].origin.training, "command": "make it"})
    entrants[1] = replace(entrants[1], origin=made)
    assert ("Make the model that titans-mag went on from:", "make it") in commands(tmp_path, entrants)
    scratch = recipe.choose(recipes, tmp_path / "out", 3, None, True)
    assert [entrant.origin for entrant in scratch] == [None, None]
    assert scratch[0].config.optimizer.lr == 1e-2 and scratch[0].config.model.path == ""
    args = quickstart.Args(output=tmp_path, steps=1)
    quickstart._open(args, entrants, console := silent(record=True))
    assert f"{NAMES[0]} was trained before by the same recipe, for {STEPS} steps" in console.export_text()


def test_one_missing_checkpoint_leaves_both_without(recipes, tmp_path, finished):
    folder, _, _ = finished
    os.symlink(folder / "transformer" / "final", tmp_path / "tiny-transformer")
    with pytest.raises(ConfigError, match="tiny-titans-mag holds no model"):
        recipe.choose(recipes, tmp_path / "out", 1, tmp_path, False)


def test_steps_are_what_fits_for_both():
    assert training.steps_within(60.0, [0.25, 0.5]) == 80
    assert training.steps_within(0.01, [1.0, 1.0]) == 1


def test_the_picture_holds_both_plots(finished, tmp_path):
    folder, _, _ = finished
    assert picture.main([str(folder / "results.json"), str(tmp_path / "images" / "q.png")]) == 0
    both = matplotlib.image.imread(tmp_path / "images" / "q.png")
    parts = [matplotlib.image.imread(folder / "plots" / f"{name}.png") for name in picture.FIGURES]
    assert both.shape[1] == sum(part.shape[1] for part in parts)
    assert picture.main([str(tmp_path / "none.json"), str(tmp_path / "q.png")]) == 2


# What the figures say.


def interval(estimate, low, high, n=100):
    return {"estimate": estimate, "low": low, "high": high, "n": n}


def recall(one, other):
    return recall_sentence({"distance": 250, "recall": {"a": one, "b": other}}, "a", "b")


def test_the_sentence_on_recall_follows_the_intervals():
    low, middle, high = interval(0.02, 0.0, 0.1), interval(0.12, 0.08, 0.3), interval(0.9, 0.8, 0.95)
    assert "b remembers what attention cannot see" in recall(low, high)
    assert "90 % [80, 95] of 100 questions exactly and a 2 % [0, 10]" in recall(low, high)
    assert "it is a that recalls more" in recall(high, low)
    for pair in ((low, middle), (middle, low)):
        assert "no difference in recall" in recall(*pair) and "remembers" not in recall(*pair)


def bits(difference):
    pair = {"a": interval(2.5, 2.4, 2.6), "b": interval(2.4, 2.3, 2.5)}
    return bits_sentence({"bits_per_byte": pair, "bits_difference": difference}, "a", "b")


def test_the_sentence_on_bits_follows_the_paired_difference():
    assert "0.100 [0.050, 0.150] fewer" in bits(interval(-0.1, -0.15, -0.05))
    assert "0.100 [0.050, 0.150] more" in bits(interval(0.1, 0.05, 0.15))
    assert "-0.100 [-0.250, 0.050], may be zero" in bits(interval(-0.1, -0.25, 0.05))
    assert "too little was read" in bits(interval(-0.1, None, None))


def memory(before, other, after, file_left=False, unchanged=True):
    def asking(right):
        return {"right": right, "answers": [None] * 6}

    return " ".join(
        memory_sentences(
            {
                "remembering": "b",
                "asked": {"b": asking(before), "a": asking(other)},
                "memory_bytes": {"b": 1234567, "a": 10},
                "forget": {"file_left": file_left},
                "after_forget": asking(after),
                "weights_unchanged": unchanged,
            }
        )
    )


def test_the_sentences_on_memory_follow_the_counts():
    good = memory(6, 0, 0)
    assert "(1,235 kB) and never saw the text answered all of 6 questions; a with its saved State" in good
    assert "State answered none of 6 questions." in good
    assert "After /forget it answered none of 6 questions: what it knew was in the memory" in good
    assert "4 of 6 questions" in memory(4, 1, 2) and "1 of 6 questions" in memory(4, 1, 2)
    assert "did not come from the memory" in memory(3, 0, 3) and "did not come" not in good
    assert "nothing to forget" in memory(0, 0, 0)
    assert "was not forgotten" in memory(6, 0, 0, file_left=True)
    assert "must not" in memory(6, 0, 0, unchanged=False) and "must not" not in good


def crafted(reaches):
    def perplexity(far):
        sums = {"bits": [[8.0, 8.0, far], [8.0, 8.0, far + 1]], "bytes": [[4.0, 4.0, 4.0]] * 2}
        return {"by_position": {"edges": [0, 16, 32, 64]}, "sums": sums}

    return {
        "models": [{"name": name, "attention_reach": r} for name, r in zip("ab", reaches, strict=True)],
        "settings": {"seeds": [0]},
        "results": {
            "perplexity": {"models": {"a": perplexity(12.0), "b": perplexity(8.0)}},
            "recall": {
                "models": {
                    "a": {"exact": {"8": [True] * 3, "32": [False] * 3, "64": [False, True, False]}},
                    "b": {"exact": {"8": [False] * 3, "32": [True] * 3, "64": [True, True, False]}},
                }
            },
        },
    }


def test_only_what_lies_beyond_both_reaches_counts():
    found = beyond_reach(crafted([20, 32]))
    assert found["reach"] == 32 and found["distance"] == 64
    assert beyond_reach(crafted([8, 8]))["distance"] == 32
    assert {name: row["estimate"] for name, row in found["recall"].items()} == {"a": 1 / 3, "b": 2 / 3}
    assert found["recall_difference"]["estimate"] == pytest.approx(1 / 3)
    assert {name: row["estimate"] for name, row in found["bits_per_byte"].items()} == {
        "a": 25 / 8,
        "b": 17 / 8,
    }
    assert found["bits_difference"]["estimate"] == pytest.approx(-1.0)
    assert beyond_reach(crafted([20, None])) is None
    assert beyond_reach(crafted([20, 100])) is None


def silent(record=False):
    from rich.console import Console

    return Console(file=io.StringIO(), record=record, width=300)
