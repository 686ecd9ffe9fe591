"""The entry point of `nestor`: finds the subcommand, parses its arguments, and turns errors into one line.

A subcommand is a module of `nestor.cli` with a dataclass `Args`, whose docstring is its help, and a
function `run(args) -> int` that returns the exit status. A module that must look at the arguments before
their types are known (`train` merges them into a configuration file) has `parse(argv) -> Args` as well.
Only the module of the chosen subcommand is imported, and modules import torch inside `run`: help is quick.
"""

import errno
import importlib
import inspect
import os
import sys
from collections.abc import Sequence

from nestor.errors import NestorError, suggest

COMMANDS = {
    "quickstart": "train two small models on this machine, measure their memory, write report.html",
    "train": "train a model from a configuration file or one of the shipped recipes",
    "retrofit": "give a trained model levels: weights that learn from what it reads",
    "learn": "read files with a model whose weights learn from them",
    "eval": "measure perplexity, recall and needle retrieval of one or more models",
    "generate": "continue a prompt",
    "chat": "talk with a model whose memory lasts",
    "doctor": "show versions, devices and backends, and check every operation against its reference",
}

EXAMPLES = """\
examples:
  nestor quickstart
  nestor train --list
  nestor eval runs/a/final runs/b/final --suite recall
  nestor generate runs/a/final "It was a dark and"
  nestor chat runs/a/final --memory ada.safetensors
  nestor learn some/llama book.txt --memory book.safetensors

nestor COMMAND --help shows the options of a command."""

# What a person can mend, as opposed to a fault of the program: the traceback would say no more.
_ENVIRONMENT_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; the exit status is 0, its own, 2 for a mistake in the input, 130 for Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"nestor {version('nestor')}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        hint = suggest(name, COMMANDS) or f"The commands are {', '.join(COMMANDS)}."
        print(f"nestor: there is no command {name!r}. {hint}", file=sys.stderr)
        return 2
    try:
        return _run(name, rest)
    except NestorError as error:
        print(f"nestor {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nnestor {name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe (head, less) has gone. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in _ENVIRONMENT_ERRORS:
            raise
        print(f"nestor {name}: {error.strerror}: {error.filename or 'while writing'}", file=sys.stderr)
        return 2


def usage() -> str:
    """The text of `nestor --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: nestor COMMAND ...",
            "",
            "Language models that keep learning.",
            "",
            "commands:",
            *lines,
            "",
            EXAMPLES,
        ]
    )


def _run(name: str, argv: list[str]) -> int:
    module = importlib.import_module(f"nestor.cli.{name}")
    if hasattr(module, "parse"):
        return module.run(module.parse(argv))
    import tyro

    description = inspect.cleandoc(module.Args.__doc__ or "")
    return module.run(tyro.cli(module.Args, prog=f"nestor {name}", description=description, args=argv))
