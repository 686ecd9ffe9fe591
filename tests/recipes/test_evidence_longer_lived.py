"""recipes/evidence/longer_lived.py on a small model: each part, that a run goes on, and what it refuses."""

import importlib
import importlib.util
import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nestor.cli.loading import load_model
from nestor.errors import ConfigError

ROOT = Path(__file__).parents[2]
STORIES = ROOT / "checkpoints" / "stories260K"
SOME = ("as it is", "levels", "branch", "forgetful branch", "both", "sliding", "branch, sliding")
WORDS = "The raven keeps the red key under the old clock. Ann took 4,821 boats to the island, café.\n"


@pytest.fixture
def recipe(evidence):
    return evidence.longer_lived


@pytest.fixture
def arguments(recipe, monkeypatch, tmp_path):
    text = tmp_path / "data" / "text"
    text.mkdir(parents=True)
    for name in ("train-a", "train-b", "valid", "heldout-long"):
        books = [WORDS.replace("key", f"{name} {number}") * 40 for number in range(2)]
        lines = "".join(json.dumps({"text": book}) + "\n" for book in books)
        (text / f"novels-{name}.jsonl").write_text(lines)
    for name in ("longer_lived_table", "longer_lived"):
        monkeypatch.setattr(sys.modules[name], "RESULTS", tmp_path / "results")

    def make(**choices):
        training = {
            "steps": 3, "count": 1, "chunk_size": 16, "window": 64, "segment": 128, "lanes": 2,
            "learning_rate": 0.05, **choices.pop("training", {}),
        }  # fmt: skip
        few = {
            "window": 128, "short": 64, "tokens": 256, "bins": 4, "periods": (32, 64), "lengths": (200,),
            "variants": ("passkey",), "depths": (0.0, 1.0), "needles": 1, "cost_tokens": 64, "device": "cpu",
            "dtype": "float32", "parts": ("train", "cost", "documents", "needles"),
            "arms": SOME,
        }  # fmt: skip
        settings = sys.modules["longer_lived_settings"]
        return settings.Args(
            model=str(STORIES), data=tmp_path / "data", out=tmp_path / "run",
            training=settings.Training(**training), **{**few, **choices},
        )  # fmt: skip

    return make


def test_all_parts_but_zero_shot_go_on_where_they_were_stopped(recipe, arguments, tmp_path) -> None:
    said = []
    some = arguments(arms=("as it is",), documents=1, parts=("documents",))
    first = recipe.main(some, said.append)
    assert [row["name"] for row in first["arms"]] == ["as it is"] and first["training"] is None
    piece = tmp_path / "run" / "documents" / "as-it-is-0.json"
    before = piece.stat().st_mtime_ns
    result = recipe.main(arguments(), said.append)
    assert piece.stat().st_mtime_ns == before
    arms = {row["name"]: row for row in result["arms"]}
    assert list(arms) == list(SOME)
    # All that is left out are the items of zero-shot tasks.
    missing = {name: row["missing"] for name, row in arms.items() if row["missing"]}
    assert missing == dict.fromkeys(("as it is", "levels", "branch", "both"), 4)
    base, levels, branch, forgetful = (arms[name]["documents"] for name in SOME[:4])
    # What repeats itself is learned.
    assert levels["whole"][0]["estimate"] < base["whole"][0]["estimate"]
    assert branch["bits"] != base["bits"] and branch["less"]["whole"][0]["n"] == 2
    # The first two stretches are those of the first window.
    assert forgetful["bits"][0][:2] == branch["bits"][0][:2]
    assert forgetful["bits"][0][2:] != branch["bits"][0][2:]
    carried = arms["branch"]["carried"]["whole"][0]["estimate"]
    assert carried == pytest.approx(forgetful["whole"][0]["estimate"] - branch["whole"][0]["estimate"])
    assert arms["branch, sliding"]["baseline"] == "sliding" and arms["both"]["baseline"] == "as it is"
    # A control costs what its arm costs.
    assert [name for name, row in arms.items() if not row["cost"]] == ["forgetful branch"]
    added = {name: row["cost"]["added"] for name, row in arms.items() if row["cost"]}
    assert added["branch"] == result["training"]["parameters"] > 0 == added["levels"]
    assert [one["right"]["n"] for one in arms["both"]["needles"]] == [2]
    files = {path.name for path in (tmp_path / "results").iterdir()}
    assert files == {f"longer_lived{end}" for end in (".json", ".md", ".png", "-needles.png")}
    table = (tmp_path / "results" / "longer_lived.md").read_text()
    assert "| branch, sliding |" in table and said[-1] == table
    (tmp_path / "results" / "longer_lived.md").unlink()
    assert recipe.main(arguments(table_only=True), said.append) == json.loads(json.dumps(result))
    assert (tmp_path / "results" / "longer_lived.md").read_text() == table
    with pytest.raises(ConfigError, match="tokens.*name another folder"):
        recipe.main(arguments(tokens=128, parts=("documents",)), said.append)
    with pytest.raises(ConfigError, match="of other settings"):
        recipe.main(arguments(training={"steps": 4}), said.append)
    # Pieces alone, as those that were copied here, make the same result without the weights they are of.
    (tmp_path / "run" / "branches.safetensors").unlink()
    again = recipe.main(arguments(parts=("documents",)), said.append)
    assert again["arms"] == json.loads(json.dumps(result["arms"]))
    (tmp_path / "run" / "training.json").unlink()
    with pytest.raises(ConfigError, match="run --parts train first"):
        recipe.main(arguments(parts=("documents",)), said.append)


def test_bits_of_a_document_are_those_of_its_windows(recipe, arguments) -> None:
    args = arguments()
    measures = sys.modules["longer_lived_measures"]
    found = measures.Reader(args, args.all_arms()["as it is"], "cpu").document(1)
    model, tokenizer = load_model(str(STORIES), "cpu", "float32")
    text = (WORDS.replace("key", "heldout-long 1") * 40).encode()
    ids = tokenizer.backend_tokenizer.encode(text.decode(), add_special_tokens=False).ids[:257]
    nats = 0.0
    for begin in (0, 128):
        with torch.no_grad():
            logits = model(torch.tensor([ids[begin : begin + 128]])).logits[0]
        nats += float(F.cross_entropy(logits, torch.tensor(ids[begin + 1 : begin + 129]), reduction="sum"))
    assert sum(found["bits"]) == pytest.approx(nats / math.log(2), rel=1e-4) and len(found["bits"]) == 4
    assert abs(sum(found["bytes"]) - len(tokenizer.decode(ids[1:]).encode())) <= 2


def test_a_needle_is_right_if_greedy_decoding_gives_it(recipe, arguments, tmp_path) -> None:
    args = arguments()
    measures, settings = sys.modules["longer_lived_measures"], sys.modules["longer_lived_settings"]
    measures.draw(args, "passkey", 200)
    path = tmp_path / "run" / "drawn" / "passkey-200.json"
    kept = json.loads(path.read_text())
    assert [one["depth"] for one in kept["result"]] == [0.0, 1.0]
    assert all(150 < len(one["ids"]) <= 200 for one in kept["result"])
    reader = measures.Reader(args, args.all_arms()["as it is"], "cpu")
    for one in kept["result"]:
        prompt = torch.tensor([one["ids"][: one["start"]]])
        made = reader.decoder.generate(prompt, max_new_tokens=2, do_sample=False)
        one["ids"] = made[0].tolist()
    kept["result"][1]["ids"][-1] += 1
    settings.keep(path, kept["settings"], kept["result"])
    assert reader.needles("passkey", 200)["exact"] == [True, False]


def test_lanes_read_book_after_book_and_begin_anew_with_each(recipe) -> None:
    training = sys.modules["longer_lived_training"]
    stream = training.places([35, 5, 21], 2, 10, 0)
    steps = [next(stream) for _ in range(9)]
    for lane in range(2):
        read = [step[lane] for step in steps]
        assert read[0].fresh and all(place.book != 1 for place in read)
        for before, after in pairwise(read):
            if after.fresh:
                assert after.offset == 0 and before.offset + 20 >= [35, 5, 21][before.book]
            else:
                assert (after.book, after.offset) == (before.book, before.offset + 10)
    again = training.places([35, 5, 21], 2, 10, 0)
    assert [next(again) for _ in range(9)] == steps


def test_a_training_that_was_cut_ends_as_one_that_was_not(recipe, arguments, monkeypatch, tmp_path) -> None:
    training = sys.modules["longer_lived_training"]
    whole = training.train(arguments(training={"steps": 4}))
    weights, _ = training.read_tensors(tmp_path / "run" / "branches.safetensors")
    for name in ("training.json", "branches.safetensors", "training.safetensors"):
        (tmp_path / "run" / name).unlink()

    class Cut(Exception):
        pass

    def cut(self, where, plain=training.Trainer.step):
        if self.at.step == 2:
            raise Cut
        plain(self, where)

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "step", cut)
        with pytest.raises(Cut):
            training.train(arguments(training={"steps": 4, "save_seconds": 0.0}))
    found = training.train(arguments(training={"steps": 4}))
    assert (found["step"], found["tokens"]) == (whole["step"], whole["tokens"]) == (4, 4 * 2 * 128)
    for name, weight in training.read_tensors(tmp_path / "run" / "branches.safetensors")[0].items():
        torch.testing.assert_close(weight, weights[name])
    with pytest.raises(ConfigError, match="other settings"):
        (tmp_path / "run" / "training.json").unlink()
        training.train(arguments(training={"steps": 4, "lanes": 3}))


def test_a_memory_is_carried_within_a_book_and_not_into_the_next(recipe, arguments) -> None:
    training = sys.modules["longer_lived_training"]
    model, _ = load_model(str(STORIES), "cpu", "float32")
    books = [np.arange(5, 405, dtype=np.int32) % 200 + 5, np.arange(7, 407, dtype=np.int32) % 90 + 9]
    trainer = training.Trainer(arguments(), model, books)
    place = training.Place
    trainer.step([place(0, 0, True), place(1, 0, True)])
    before = trainer.carried.layers[2]["memory.weights.0"]
    begun = trainer._beginning(torch.tensor([False, True]))
    assert torch.equal(begun.layers[2]["memory.weights.0"][0], before[0]) and begun.clock.tolist() == [128, 0]
    fresh = trainer.decoder.initial_state(1).layers[2]["memory.weights.0"]
    assert torch.equal(begun.layers[2]["memory.weights.0"][1], fresh[0])
    assert not torch.equal(before[1], fresh[0]) and not before.requires_grad


def test_unknown_names_and_missing_branches_are_refused(recipe, arguments) -> None:
    for choices, message in (
        ({"arms": ("brnch",)}, "no arm 'brnch'.*branch"),
        ({"variants": ("passky",)}, "no needle 'passky'"),
        ({"tokens": 254}, "one of 4 bins"),
        ({"short": 128}, "short must be below window"),
        ({"arms": ("branch",), "parts": ("documents",)}, "run --parts train first"),
    ):
        with pytest.raises(ConfigError, match=message):
            recipe.main(arguments(**choices), lambda text: None)


def test_zero_shot_items_are_compared_in_pairs(recipe, arguments, tmp_path) -> None:
    args = arguments(parts=(), tasks=("piqa", "openbook_qa"))
    settings = sys.modules["longer_lived_settings"]
    args.out.mkdir(parents=True)
    args.branch_file.write_bytes(b"of some training")
    right = {"as it is": [1.0] * 6 + [0.0] * 4, "branch": [1.0] * 8 + [0.0] * 2}
    for name, items in right.items():
        arm = args.all_arms()[name]
        result = {"acc": items, "acc_norm": items[::-1], "weights": "w", "place": "here"}
        for task in args.tasks:
            settings.keep(args.piece("zeroshot", arm, task), args.settings("zeroshot", arm), result)
    arms = {row["name"]: row["zeroshot"] for row in recipe.main(args, lambda text: None)["arms"]}
    assert [(one["task"], one["metric"]) for one in arms["branch"]] == [
        ("piqa", "acc"), ("openbook_qa", "acc_norm"),
    ]  # fmt: skip
    assert "more" not in arms["as it is"][0] and arms["branch"][0]["right"]["estimate"] == 0.8
    more = arms["branch"][0]["more"]
    assert more["estimate"] == pytest.approx(0.2) and more["method"] == "newcombe-paired"
    table = (tmp_path / "results" / "longer_lived.md").read_text()
    assert "| openbook_qa (acc_norm) |" in table and "80.0 % (20 % [" in table
    # A piece of another model does not go into the same table.
    arm = args.all_arms()["branch"]
    other = {"acc": right["branch"], "weights": "v", "place": "here"}
    settings.keep(args.piece("zeroshot", arm, "piqa"), args.settings("zeroshot", arm), other)
    with pytest.raises(ConfigError, match="pieces of two models"):
        recipe.main(args, lambda text: None)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra nestor[eval]")
def test_zero_shot_tasks_are_scored_item_by_item(recipe, arguments, tmp_path) -> None:
    import lzma

    folder = tmp_path / "data" / "bench" / "zeroshot"
    folder.mkdir(parents=True)
    items = {
        "piqa": [
            {"query": f"Question: {i}?\n", "choices": ["a dog", "a cat"], "gold": i % 2} for i in range(4)
        ],
        "lambada_openai": [{"context": "Once upon a", "continuation": "time"}] * 3,
    }
    for name, rows in items.items():
        with lzma.open(folder / f"{name}.jsonl.xz", "wt") as file:
            file.write("\n".join(map(json.dumps, rows)))
    args = arguments(
        parts=("zeroshot",), tasks=tuple(items), arms=("as it is", "levels"), batch_size=2,
    )  # fmt: skip
    recipe.main(args, lambda text: None)
    found = json.loads((tmp_path / "run" / "zeroshot" / "as-it-is-lambada_openai.json").read_text())["result"]
    assert found["acc"] == [1.0] * 3
    found = json.loads((tmp_path / "run" / "zeroshot" / "levels-piqa.json").read_text())["result"]
    assert len(found["acc"]) == 4 and sum(found["acc"]) == 2
