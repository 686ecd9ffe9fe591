"""The recipe for length generalisation: its starts are what they are called, its pieces are kept and its
numbers are those of the suites."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nestor.errors import ConfigError, DataError, NonFiniteError
from nestor.training import TrainConfig, train


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A memory and a transformer, hardly trained."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    for name, more in (("titans-lmm", {"memory": {"chunk_size": 8}}), ("transformer", {"sliding_window": 8})):
        run = {"out": str(folder / name), "steps": 1, "device": "cpu", "tracker": "none", "eval_every": 0}
        config = {
            "model": {"preset": name, "size": "quick", "overrides": sizes | more},
            "data": {"sources": ["shakespeare"], "sequence_length": 32, "batch_size": 4},
            "optimizer": {"lr": 1e-2},
        }
        train(TrainConfig.from_dict(config | {"run": run}), quiet=True)
    return folder


@pytest.fixture
def args(evidence, models, tmp_path):
    return evidence.length.Args(
        (f"lmm={models / 'titans-lmm/final'}", f"attention={models / 'transformer/final'}"), seeds=(0, 1),
        steps=2, multiple=4, passages=2, questions=1, out=tmp_path / "out", results=tmp_path / "results",
    )  # fmt: skip


def quiet(text):
    pass


def test_all_pieces_are_made_once_and_come_to_a_table_and_plots(evidence, args, monkeypatch):
    results = evidence.length.main(args, quiet)
    files = sorted(path.name for path in args.out.glob("*.json"))
    assert (
        len(files) == 2 + 5 * 2 and "lmm-state-passing-1.json" in files and "attention-before.json" in files
    )
    assert not list((args.out / "training").iterdir())
    rows = {(row["model"], row["start"]): row for row in results["rows"]}
    assert list(rows) == [
        ("lmm", start) for start in ("before", *evidence.length.STARTS)
    ] + [("attention", "before")]  # fmt: skip
    for (_, start), row in rows.items():
        bits = row["numbers"]["last half"]
        assert 0 < bits["estimate"] < 12 and len(bits["by_seed"]) == (1 if start == "before" else 2)
        assert 0 <= row["numbers"]["half"]["estimate"] <= 1
    passed = rows["lmm", "state-passing"]
    base = rows["lmm", "none"]["numbers"]["last half"]["by_seed"]
    wanted = np.mean(np.array(passed["numbers"]["last half"]["by_seed"]) - np.array(base))
    assert passed["minus_none"]["last half"]["estimate"] == pytest.approx(wanted)
    # Every start trains something else.
    ends = [tuple(row["numbers"]["within"]["by_seed"]) for (name, _), row in rows.items() if name == "lmm"]
    assert len(set(ends)) == 6
    page = (args.results / "length.md").read_text()
    assert page.count("\n| lmm | ") == 6 and page.count("\n| attention | ") == 1
    for name in ("lmm-position", "lmm-remembrance", "attention-position"):
        assert (args.results / f"length-{name}.png").read_bytes().startswith(b"\x89PNG")
    # Of recall nothing is shown where there is none, and all of it where there is some.
    assert "Of planted facts none is told right" in page and "recall within" not in page
    assert not list(args.results.glob("*-recall.png"))
    some = copy.deepcopy(results)
    some["rows"][-1]["numbers"]["recall beyond"]["estimate"] = some["rows"][-1]["curves"]["right"][-1] = 0.5
    assert "| recall within | beyond |" in evidence.length_table.table(some)
    assert [one for one in evidence.length_table.plots(some) if "recall" in one] == ["attention-recall"]

    made = []
    monkeypatch.setattr(
        evidence.length.Piece,
        "measure",
        lambda piece, device: made.append(piece.name) or {"place": "here", "failed": "no"},
    )
    (args.out / "lmm-none-1.json").unlink()
    again = evidence.length.main(args, quiet)
    assert made == ["lmm-none-1"]
    none = next(row for row in again["rows"] if row["start"] == "none")
    assert none["numbers"]["within"]["estimate"] is None and none["failed"] == ["no"] and not none["curves"]
    assert "No numbers of lmm from none: no." in (args.results / "length.md").read_text()
    # From the JSON alone, without models.
    (args.results / "length.md").unlink()
    evidence.length.main(replace(args, models=(), table_only=True), quiet)
    assert (args.results / "length.md").is_file() and made == ["lmm-none-1"]


def test_pieces_of_other_settings_or_of_other_weights_are_refused(evidence, args, models, tmp_path):
    args = replace(args, starts=("random-noise",), seeds=(0,))
    pieces = evidence.length.pieces_of(args, "lmm", models / "titans-lmm/final")
    assert [piece.name for piece in pieces] == ["lmm-before", "lmm-random-noise-0"]
    noised = pieces[1]
    args.out.mkdir()
    noised.path.write_text(json.dumps({"settings": noised.settings(), "result": {"place": "here"}}))
    assert noised.kept() == {"place": "here"} and pieces[0].kept() is None
    for change in (
        {"steps": 3},
        {"noise": 0.5},
        {"fresh_share": 0.2},
        {"passages": 3},
        {"learning_rate": 1.0},
    ):
        with pytest.raises(ConfigError, match="is of a piece with.*--out"):
            replace(noised, args=replace(args, **change)).kept()
    with pytest.raises(ConfigError, match="'weights'"):
        replace(noised, folder=models / "transformer/final").kept()
    # What does not count for a piece may differ, and so may the machine.
    assert replace(noised, args=replace(args, seeds=(0, 5), device="cuda", workers=3)).kept()
    noised.path.write_text("{}")
    with pytest.raises(DataError, match="is not a result of this program"):
        noised.kept()


def test_post_training_is_the_training_of_the_model_from_another_start(evidence, args, models, tmp_path):
    def config(start, **changes):
        piece = evidence.length.Piece(replace(args, **changes), "lmm", models / "titans-lmm/final", start, 1)
        return piece.config()

    found = {start: config(start).run for start in evidence.length.STARTS}
    assert [run.state_mode for run in found.values()] == [
        "reset",
        "pass",
        "carry",
        "fitted-noise",
        "random-noise",
    ]
    assert [run.fresh_share for run in found.values()] == [0.0, 0.1, 0.0, 0.1, 0.1]
    plain = config("none")
    assert (plain.data.sequence_length, plain.data.batch_size, plain.data.sources[0].text) == (
        32,
        4,
        ("shakespeare",),
    )
    assert plain.optimizer.lr == pytest.approx(1e-3) and plain.run.seed == 1001
    for name in evidence.length.TRAIN:
        (tmp_path / name.removesuffix(".xz")).write_text('{"text": "A novel."}\n')
    other = config("none", data=tmp_path, context=64, batch_size=8, learning_rate=0.5)
    assert (other.data.sequence_length, other.data.batch_size, other.optimizer.lr) == (64, 8, 0.5)
    assert [Path(name).name for name in other.data.sources[0].text] == [
        "novels-train-a.jsonl",
        "novels-train-b.jsonl",
    ]


def test_a_folder_that_does_not_say_how_it_was_trained_needs_to_be_told(evidence, args, models, tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((models / "titans-lmm/final" / name).read_bytes())
    for changes, missing in (
        ({}, "--context"),
        ({"context": 32}, "--batch-size"),
        ({"context": 32, "batch_size": 4}, "--learning-rate"),
        ({"context": 32, "batch_size": 4, "learning_rate": 1e-3}, "--data"),
    ):
        with pytest.raises(ConfigError, match=f"does not say.*{missing}"):
            evidence.length.Piece(replace(args, **changes), "lmm", folder, "none").config()


def test_a_run_that_comes_to_no_number_is_a_result(evidence, args, models, monkeypatch):
    def fail(*_, **__):
        raise NonFiniteError("the loss is not finite at step 1")

    monkeypatch.setattr(evidence.length, "train", fail)
    piece = evidence.length.Piece(args, "lmm", models / "titans-lmm/final", "state-passing")
    assert piece.measure("cpu")["failed"] == "the loss is not finite at step 1"


def test_the_numbers_of_the_table_are_those_of_the_right_stretches(evidence):
    result = {
        "context": 32, "edges": [0, 16, 32, 64, 128, 256, 512], "bits": [32, 16, 32, 64, 256, 1024],
        "bytes": [16, 16, 32, 64, 128, 256], "distances": [16, 32, 64, 128], "right": [1.0, 0.5, 0.25, 0.0],
        "length": 512, "dropped": [1, 32, 256, 500], "remembrance": [0.0, 0.1, 0.2, 0.9],
    }  # fmt: skip
    assert evidence.length_table.numbers(result) == {
        "within": 1.5, "to 4 times": 1.0, "last half": 4.0, "recall within": 0.75, "recall beyond": 0.125,
        "sixteenth": 0.1, "half": 0.2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ()}, "no model is named"),
        ({"models": ("a=x", "a=y")}, "a name of its own"),
        ({"models": ("nowhere/final",)}, "nowhere/final holds no model"),
        ({"starts": ("noise",)}, "no start 'noise'"),
        ({"seeds": (1, 1)}, r"--seeds are \[1, 1\]; give some, each once"),
        ({"steps": 0}, "--steps is 0"),
        ({"data": Path("/nowhere")}, "has no novels-train-a.jsonl.xz"),
    ],
)
def test_refusals(evidence, args, changes, message):
    with pytest.raises((ConfigError, DataError), match=message):
        evidence.length.main(replace(args, **changes), quiet)
    assert not args.results.exists()
