"""`nestor train`: train a model from a configuration file or one of the shipped configurations."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from nestor.errors import ConfigError, suggest

HELP = """\
usage: nestor train CONFIG [--KEY VALUE ...] [--resume | --restart] [--quiet]
       nestor train --list
       nestor train CONFIG --show [--KEY VALUE ...]

Train a model. CONFIG is a TOML file or the name of a shipped configuration. Any setting in it can be replaced
by --KEY VALUE, where KEY is its dotted name. The run goes to run.out (by default runs/NAME); the same command
continues it there, exactly, after Ctrl-C or a crash.

options:
  --list      name the shipped configurations
  --show      print the whole configuration, with the settings of the command line, and stop
  --resume    continue the run in the folder even if it was begun with other settings
  --restart   remove the run in the folder and begin anew
  --quiet     print nothing but errors

examples:
  nestor train quick-transformer
  nestor train quick-titans-mag --optimizer.lr 1e-3 --run.steps 2000
  nestor train quick-titans-mag --optimizer.name m3     (or adamw, muon, adamuon)
  nestor train quick-titans-mag --data.sources "books/**/*.txt" --run.out runs/books
  nestor train my.toml --run.precision bf16 --run.state-mode pass
  torchrun --nproc-per-node 4 -m nestor train 60m-titans-mag --run.parallel fsdp2"""

FLAGS = ("list", "show", "resume", "restart", "quiet", "help")


@dataclass
class Args:
    """The command line of `nestor train`; `overrides` are dotted keys with their values."""

    config: str = ""
    overrides: list[tuple[str, Any]] = field(default_factory=list)
    action: Literal["train", "list", "show", "help"] = "train"
    resume: Literal["auto", "force", "never"] = "auto"
    quiet: bool = False


def parse(argv: Sequence[str]) -> Args:
    """Tell the command's own options from the settings of the configuration.

    Raises:
        ConfigError: no configuration is named, two are, or an option is unknown.
    """
    from nestor.training.settings import parse_overrides

    flags = {
        argument.lstrip("-") for argument in argv if argument in ("-h", *(f"--{name}" for name in FLAGS))
    }
    rest = [argument for argument in argv if argument not in ("-h", *(f"--{name}" for name in FLAGS))]
    # The configuration stands before the first setting.
    names = rest[: next((i for i, argument in enumerate(rest) if argument.startswith("--")), len(rest))]
    overrides = parse_overrides(rest[len(names) :])
    if flags & {"help", "h"}:
        return Args(action="help")
    if "list" in flags:
        return Args(action="list")
    for key, _ in overrides:
        near = suggest(key, FLAGS) if "." not in key and key != "name" else ""
        if near:
            raise ConfigError(f"there is no option --{key}. {near}")
    if len(names) != 1:
        seen = f"{len(names)} are named ({', '.join(names)})" if names else "none is named"
        raise ConfigError(
            f"one configuration is wanted and {seen}; `nestor train --list` shows the shipped ones"
        )
    if {"resume", "restart"} <= flags:
        raise ConfigError("--resume continues a run and --restart removes it; give one of them")
    return Args(
        config=names[0],
        overrides=overrides,
        action="show" if "show" in flags else "train",
        resume="force" if "resume" in flags else "never" if "restart" in flags else "auto",
        quiet="quiet" in flags,
    )


def run(args: Args) -> int:
    """Do what the command line says; the exit status is 130 after Ctrl-C and 143 after SIGTERM."""
    if args.action == "help":
        print(HELP)
        return 0

    from nestor.training.config import load_config, shipped_configs

    if args.action == "list":
        configs = shipped_configs()
        width = max(map(len, configs))
        print("\n".join(f"{name:<{width}}  {summary}" for name, summary in configs.items()))
        return 0
    config = load_config(args.config, args.overrides)
    if args.action == "show":
        sys.stdout.write(config.to_toml())
        return 0

    from nestor.training.loop import train

    return train(config, resume=args.resume, quiet=args.quiet).exit_code
