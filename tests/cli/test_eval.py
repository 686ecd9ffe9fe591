"""`nestor eval` from the command line: its files, the comparison, refusals, and interruptions."""

import json
import re

import pytest
import torch

import nestor
from nestor.cli.eval import Args, _names, _train_length
from nestor.evaluation import suites

QUICK = ("--lengths", "96", "--repeats", "2", "--seeds", "0", "1", "--quiet", "--batch-size", "4")


@pytest.fixture(scope="module")
def titans_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "mag" / "final"
    torch.manual_seed(6)
    config = nestor.preset(
        "titans-mag", "quick", hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, sliding_window=16, memory={"chunk_size": 8}, tokenizer_name="bytes",
    )  # fmt: skip
    nestor.NestorForCausalLM(config).save_pretrained(folder)
    (folder.parent / "config.toml").write_text("[data]\nsequence_length = 48\n")
    return folder


def test_two_models_in_one_call_give_one_comparison(model_folder, titans_folder, nestor_command, tmp_path):
    out = tmp_path / "out"
    needles = ("--depths", "0", "1", "--variants", "word")
    status, printed, _ = nestor_command("eval", model_folder, titans_folder, "--out", out, *QUICK, *needles)
    assert status == 0
    result = json.loads((out / "results.json").read_text())
    assert [m["name"] for m in result["models"]] == ["tiny", "mag"]
    assert [m["attention_reach"] for m in result["models"]] == [31, 31]
    assert set(result["results"]) == {"perplexity", "recall", "mqar", "needle"}
    for part in result["results"].values():
        assert set(part["models"]) == {"tiny", "mag"} and part["differences"][0]["model"] == "mag"
    recall = result["results"]["recall"]["models"]["mag"]
    assert [(row["distance"], row["n"]) for row in recall["distances"]] == [
        (16, 4),
        (32, 4),
        (64, 4),
        (96, 4),
    ]
    bits = result["results"]["perplexity"]
    both = [bits["models"][name]["bits_per_byte"]["estimate"] for name in ("tiny", "mag")]
    assert bits["differences"][0]["bits_per_byte"]["estimate"] == pytest.approx(both[1] - both[0])
    assert set(bits["models"]["tiny"]["by_seed"]) == {"0", "1"} and bits["models"]["tiny"]["passages"] == 4
    assert result["settings"]["seeds"] == [0, 1] and result["settings"]["longest"] == 96
    pictures = sorted(p.name for p in (out / "plots").iterdir())
    assert pictures == [
        "mqar-by-distance.png", "needle-mag-word.png", "needle-tiny-word.png", "perplexity-by-context.png",
        "perplexity-by-position.png", "recall-answer-bits.png", "recall-by-distance.png",
    ]  # fmt: skip
    assert all((out / "plots" / p).read_bytes().startswith(b"\x89PNG") for p in pictures)
    page = (out / "report.html").read_text()
    assert not re.search(r"""(src|href|srcset)=["'](?!data:image/png;base64,|#)""", page)
    assert page.count("<img ") == len(pictures) and "<script" not in page
    assert "mag minus tiny" in page and "guessing" in page
    assert re.search(r"bits per byte\s+\d\.\d+ \[\d\.\d+, \d\.\d+\]\s+\d\.\d+ \[", printed)
    assert str(out / "report.html") in printed.replace("\n", "")


def test_the_same_command_gives_the_same_numbers(model_folder, nestor_command, tmp_path):
    results = []
    for name in ("one", "two"):
        call = (
            "eval",
            model_folder,
            "--suite",
            "recall",
            "--recall-tasks",
            "facts",
            "--out",
            tmp_path / name,
        )
        assert nestor_command(*call, *QUICK)[0] == 0
        results.append(json.loads((tmp_path / name / "results.json").read_text())["results"])
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite", "recal"), "there is no suite 'recal'.*Did you mean 'recall'"),
        (("--suite", "recall", "--recall-tasks", "fact"), "Did you mean 'facts'"),
        (("--suite", "needle", "--variants", "nummber"), "Did you mean 'number'"),
        (("--lengths", "0"), "--lengths is 0; it must be at least 1"),
        (("--repeats", "0"), "--repeats is 0"),
        (("--batch-size", "0"), "--batch-size is 0"),
        (("--seeds", "1", "1"), "a seed given twice"),
        (("--seeds", "-1"), "none below 0"),
        (("--name", "a", "b"), "2 names for 1 models"),
        (("--suite", "perplexity", "--lengths", "9000000"), "no document of classics has 9000000 tokens"),
        (("--suite", "recall", "--templates", "kee"), "Did you mean 'key'"),
        (("--suite", "lm-eval", "recall"), "runs alone"),
        (("--scale", "cubic", "--suite", "perplexity"), "log, linear"),
        (("--suite", "retention", "--retention.arms", "frozn"), "Did you mean 'frozen'"),
        (("--suite", "retention", "--retention.gaps", "0", "1"), "and 4, where arms are compared"),
        (("--suite", "retention", "--workers", "0"), "--workers is 0; it must be at least 1"),
        (("--suite", "recall", "--workers", "2"), "--workers is 2, which is for retention and"),
        (("--suite", "retention"), "only 1 of the 2 layers learn"),
    ],
)
def test_a_wrong_setting_is_one_line_and_status_2(model_folder, nestor_command, tmp_path, arguments, message):
    status, _, err = nestor_command("eval", model_folder, "--out", tmp_path / "out", "--quiet", *arguments)
    assert status == 2 and re.search(message, err) and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_model_is_one_line(nestor_command, tmp_path):
    status, _, err = nestor_command("eval", tmp_path / "nowhere", *QUICK)
    assert status == 2 and "nowhere" in err and err.count("\n") == 1
    status, _, err = nestor_command("eval", *QUICK)
    assert status == 2


@pytest.mark.parametrize("moment", ["measuring", "writing"])
def test_an_interruption_leaves_no_half_written_file(
    model_folder, nestor_command, tmp_path, monkeypatch, moment
):
    out = tmp_path / "out"
    call = ("eval", model_folder, "--suite", "recall", "--recall-tasks", "facts", "--out", out, *QUICK)
    assert nestor_command(*call)[0] == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}

    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    if moment == "measuring":
        monkeypatch.setattr(suites.recall, "measure_recall", interrupt)
    else:
        # Between the bytes and the renaming: what a file is at that moment stays.
        monkeypatch.setattr("nestor.files._sync", interrupt)
    status, _, err = nestor_command(*call, "--facts", "1")
    assert status == 130 and "interrupted" in err
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_retention_is_measured_drawn_and_decided(model_folder, nestor_command, tmp_path):
    out = tmp_path / "out"
    settings = {
        "sessions": (1,), "facts": (2,), "relations": (1,), "distractors": (1,), "repeats": (1, 2),
        "filler": (0,), "periods": (32, 64), "fixed": (0,), "trials": (1,), "old-passages": (2,),
        "old-length": (16,), "context": (65,), "arms": ("frozen", "single-fast", "single-slow", "continuum"),
    }  # fmt: skip
    flags = [str(part) for name, values in settings.items() for part in (f"--retention.{name}", *values)]
    status, printed, err = nestor_command(
        "eval", model_folder, "--suite", "retention", "--out", out, "--quiet", *flags
    )
    assert status == 0, err
    model = json.loads((out / "results.json").read_text())["results"]["retention"]["models"]["tiny"]
    assert list(model["arms"]) == ["frozen", "single-fast", "single-slow", "continuum-2"]
    assert [c["holds"] for c in model["decisions"]["sgd"]["conditions"]][3] is None
    pictures = sorted(p.name for p in (out / "plots").iterdir())
    stem = "retention-tiny"
    matrices = [f"{stem}-matrix-{arm}.png" for arm in ("continuum-2", "single-fast", "single-slow")]
    assert pictures == [f"{stem}-gap.png", *matrices, f"{stem}-pareto.png", f"{stem}-trials.png"]
    page = (out / "report.html").read_text()
    assert page.count("<img ") == len(pictures) and model["decisions"]["sgd"]["words"] in page
    assert "level restored" in page and "held-out wording" in page and "retention claim (sgd)" in page
    assert re.search(r"retention: continuum-2\s+\d+ %", printed)
    # Finished runs are in the folder, from where the same command takes them.
    kept = sorted(p.name for p in (out / "retention" / "tiny").iterdir())
    assert kept[0] == "continuum-2-32x64-sgd-step-0.0001-seed-0.json" and len(kept) == 11


def test_names_come_from_the_paths():
    assert _names(Args(("runs/a/final", "runs/b/final"))) == ["a", "b"]
    assert _names(Args(("runs/a/final", "other/a/final"))) == ["runs/a/final", "other/a/final"]
    assert _names(Args(("org/model",), name=("mine",))) == ["mine"]


def test_the_greatest_length_is_sixteen_training_lengths(titans_folder, model_folder):
    assert _train_length((str(model_folder), str(titans_folder))) == 48
    assert suites.Settings(train_length=48).longest == 768 and suites.Settings().longest == 4096
    assert suites.Settings(train_length=48, lengths=(50, 20)).longest == 50
