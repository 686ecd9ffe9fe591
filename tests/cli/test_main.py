"""The entry point: help that is quick, one line for a mistake, and exit statuses that scripts can rely on."""

import errno
import os
import subprocess
import sys
import types
from dataclasses import dataclass

import pytest

from nestor.cli import main as entry
from nestor.errors import ConfigError


@pytest.fixture
def command(monkeypatch):
    """A function that installs a subcommand `fake` whose `run` does what it is told."""

    def install(run, **extra):
        @dataclass
        class Args:
            """Do something."""

            steps: int = 3
            """How many."""

        module = types.ModuleType("nestor.cli.fake")
        module.__dict__.update(Args=Args, run=run, **extra)
        monkeypatch.setitem(sys.modules, "nestor.cli.fake", module)
        monkeypatch.setitem(entry.COMMANDS, "fake", "a command of this test")

    return install


def test_help_lists_every_command_with_a_line_about_it(capsys):
    assert entry.main(["--help"]) == 0
    out = capsys.readouterr().out
    for name, summary in entry.COMMANDS.items():
        assert f"  {name}" in out and summary in out
    assert entry.main([]) == 2


@pytest.mark.parametrize("name", entry.COMMANDS)
def test_help_of_a_command_has_examples_and_imports_no_torch(name):
    code = (
        "import sys, nestor.cli.main as m\n"
        "try: m.main(sys.argv[1:])\n"
        "finally: print('heavy:', [n for n in ('torch', 'transformers', 'matplotlib') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, name, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"nestor {name}" in done.stdout
    assert "xamples:" in done.stdout
    assert "heavy: []" in done.stdout


def test_the_console_script_and_the_module_are_the_same_command():
    module = subprocess.run(
        [sys.executable, "-m", "nestor", "--help"], capture_output=True, text=True, check=True
    )
    assert module.stdout.rstrip() == entry.usage()


def test_an_unknown_command_gets_the_nearest(capsys):
    assert entry.main(["evl"]) == 2
    assert capsys.readouterr().err == "nestor: there is no command 'evl'. Did you mean 'eval'?\n"


def test_arguments_reach_run_and_its_status_is_returned(command):
    seen = []
    command(lambda args: seen.append(args.steps) or 7)
    assert entry.main(["fake", "--steps", "5"]) == 7
    assert seen == [5]


def test_a_command_may_parse_for_itself(command):
    command(lambda args: len(args), parse=lambda argv: argv)
    assert entry.main(["fake", "--model.hidden-size", "32", "x"]) == 3


def test_a_nestor_error_is_one_line_on_stderr_and_status_2(command, capsys):
    def run(args):
        raise ConfigError("chunk is 0; it must be at least 1.")

    command(run)
    assert entry.main(["fake"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "nestor fake: chunk is 0; it must be at least 1.\n"
    assert captured.out == ""


def test_ctrl_c_is_status_130_without_a_traceback(command, capsys):
    def run(args):
        raise KeyboardInterrupt

    command(run)
    assert entry.main(["fake"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_a_fault_of_the_program_is_not_hidden(command, capsys):
    def full(args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/runs/a/model.safetensors")

    command(full)
    assert entry.main(["fake"]) == 2
    assert "No space left on device: /runs/a/model.safetensors" in capsys.readouterr().err

    def fault(args):
        raise FileNotFoundError(errno.ENOENT, "missing", "x")

    command(fault)
    with pytest.raises(FileNotFoundError):
        entry.main(["fake"])


def test_a_wrong_option_is_status_2_and_a_reader_that_leaves_is_no_traceback():
    wrong = subprocess.run(
        [sys.executable, "-m", "nestor", "generate", "m", "p", "--topk", "3"], capture_output=True, text=True
    )
    assert wrong.returncode == 2
    assert "topk" in wrong.stderr + wrong.stdout
    pipe = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m nestor generate --help | head -1; echo ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in pipe.stderr
