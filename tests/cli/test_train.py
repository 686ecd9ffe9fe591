import pytest

from nestor.cli.main import main
from nestor.cli.train import Args, parse
from nestor.errors import ConfigError

TINY = [
    *("--model.overrides.hidden_size", "32", "--model.overrides.num_hidden_layers", "2"),
    *("--model.overrides.num_attention_heads", "2", "--model.overrides.intermediate_size", "32"),
    *("--data.sequence_length", "32", "--data.batch_size", "4", "--run.eval-every", "0"),
    *("--run.log-every", "1", "--run.tracker", "none", "--run.device", "cpu"),
]


@pytest.fixture
def book(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "book.txt"
    path.write_text("It was a dark and stormy night, and nobody was about.\n" * 80, encoding="utf-8")
    return path


def test_options_are_told_from_settings():
    assert parse(["x", "--restart", "--optimizer.lr", "1e-3", "--quiet", "--run.seed=4"]) == Args(
        "x", [("optimizer.lr", 1e-3), ("run.seed", 4)], "train", "never", True
    )
    assert parse(["--resume", "x"]).resume == "force" and parse(["x"]).resume == "auto"
    assert parse(["--list"]).action == "list" and parse(["x", "-h"]).action == "help"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "one configuration is wanted and none is named"),
        (["a", "b"], r"2 are named \(a, b\)"),
        (["a", "--resum"], "no option --resum. Did you mean 'resume'"),
        (["a", "--resume", "--restart"], "give one of them"),
        (["a", "--run.steps", "3", "stray"], "'stray' is no setting"),
    ],
)
def test_a_wrong_command_line_is_explained(argv, message):
    with pytest.raises(ConfigError, match=message):
        parse(argv)


def test_list_names_every_shipped_configuration(capsys):
    from nestor.training import shipped_configs

    assert main(["train", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in shipped_configs()) and "quick-titans-mag" in out


def test_help_and_show(capsys):
    assert main(["train", "--help"]) == 0
    assert "usage: nestor train CONFIG" in capsys.readouterr().out
    assert main(["train", "quick-transformer", "--show", "--optimizer.lr", "0.5"]) == 0
    assert "\nlr = 0.5\n" in capsys.readouterr().out


def test_an_unknown_setting_or_configuration_is_one_line_and_status_2(capsys):
    assert main(["train", "quick-transformer", "--optimizer.rl", "1"]) == 2
    assert capsys.readouterr().err.strip().endswith("Did you mean 'optimizer.lr'?")
    assert main(["train", "quick-transfomer"]) == 2
    assert "Did you mean 'quick-transformer'?" in capsys.readouterr().err


def test_train_resume_and_refusal_end_to_end(book, tmp_path, capsys):
    command = [
        "train",
        "quick-titans-mag",
        *TINY,
        "--data.sources",
        str(book),
        "--run.out",
        str(tmp_path / "run"),
        *("--optimizer.name", "m3", "--optimizer.m3-slow-period", "2"),
    ]
    assert main([*command, "--run.steps", "3"]) == 0
    out = capsys.readouterr().out
    assert (
        "step 3/3" in out
        and "finished:" in out
        and (tmp_path / "run" / "final" / "model.safetensors").is_file()
    )
    assert main([*command, "--run.steps", "5"]) == 2
    assert "run.steps was 3 and is 5" in capsys.readouterr().err
    assert main([*command, "--run.steps", "5", "--resume"]) == 0
    out = capsys.readouterr().out
    assert "resuming from" in out and "step 4/5" in out and "step 3/5" not in out
    assert main([*command, "--optimizer.name", "m33"]) == 2
    assert "adamw, muon, adamuon, m3. Did you mean 'm3'?" in capsys.readouterr().err
    assert main([*command, "--run.steps", "2", "--restart", "--quiet"]) == 0
    assert capsys.readouterr().out == ""


def test_a_missing_corpus_is_one_line(tmp_path, capsys):
    argv = ["train", "quick-transformer", *TINY, "--run.out", str(tmp_path / "run"), "--data.sources"]
    assert main([*argv, str(tmp_path / "nowhere.txt")]) == 2
    err = capsys.readouterr().err
    assert "nowhere.txt" in err and err.count("\n") == 1
