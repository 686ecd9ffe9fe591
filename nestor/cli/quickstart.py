"""`nestor quickstart`: train two small models, measure what they remember, write one report."""

from __future__ import annotations

import signal as signals
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from nestor.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from nestor.quickstart.recipe import Entrant
    from nestor.quickstart.training import Trained


@dataclass
class Args:
    """Train a Transformer and a model with a neural memory on this machine, and compare what they remember.

    Writes report.html, results.json, plots and both models into the folder --output. After Ctrl-C the same
    command goes on where it stopped.

    Examples:
      nestor quickstart
      nestor quickstart --minutes 30 --output runs/longer
      nestor quickstart --from-scratch --steps 2000
      nestor quickstart --recipes my-transformer.toml my-titans.toml
    """

    output: Path = Path("runs/quickstart")
    """Folder for everything that is written."""
    minutes: float = 5.0
    """Time for the training of both models; both get the same number of steps."""
    steps: int | None = None
    """Train each model for so many steps, however long it takes."""
    from_scratch: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Train from random weights, not from the models that were trained by the same recipes before."""
    restart: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Remove the models that are in the folder already, and train again."""
    seed: int = 1
    """Decides the order of the text, the facts and all samples."""
    max_length: int | None = None
    """Measure up to this many tokens; by default 16 times the training length."""
    passages: int = 8
    """Texts that are read for bits per byte."""
    questions: int = 64
    """Questions at each distance."""
    facts: int | None = None
    """Facts on the page of the memory demonstration; by default as many as the recipe plants, at least 4."""
    recipes: tuple[str, ...] = ("quick-transformer", "quick-titans-mag")
    """Two configurations, shipped ones or files: a baseline, and the model with the memory."""
    checkpoints: Path | None = None
    """Folder with a trained model under each recipe's name, to go on from; by default those shipped."""


def run(args: Args) -> int:
    """Do it all; the status is 130 after Ctrl-C. Raises NestorError for what the user can mend."""
    _check(args)

    from rich.console import Console

    from nestor.files import FileLock
    from nestor.quickstart.training import Interrupted

    console = Console(highlight=False, soft_wrap=True)
    with FileLock(args.output / "quickstart"):
        try:
            return _run(args, console)
        except Interrupted as stop:
            name = signals.Signals(stop.signal).name
            console.print(f"\nstopped by {name}; the same command goes on from here", style="yellow")
            return 128 + stop.signal


def _check(args: Args) -> None:
    for name, value, least in (
        ("steps", args.steps, 1), ("passages", args.passages, 1), ("questions", args.questions, 1),
        ("facts", args.facts, 1), ("max-length", args.max_length, 32), ("seed", args.seed, 0),
    ):  # fmt: skip
        if value is not None and value < least:
            raise ConfigError(f"--{name} is {value}; it must be at least {least}")
    if args.minutes <= 0:
        raise ConfigError(f"--minutes is {args.minutes}; it must be above 0")
    if args.from_scratch and args.checkpoints is not None:
        raise ConfigError("--from-scratch uses no model and --checkpoints names some; give one of them")


def _run(args: Args, console: Console) -> int:
    began = time.monotonic()
    from nestor.quickstart.recipe import choose

    entrants = choose(args.recipes, args.output, args.seed, args.checkpoints, args.from_scratch)
    _open(args, entrants, console)

    _title(console, 1, "Training")
    entrants = _with_length(args, entrants, console)
    trained = _train(args, entrants, console)

    from nestor.quickstart.display import measuring
    from nestor.quickstart.measuring import measure, open_subject, settings_for
    from nestor.quickstart.memory import demonstrate, make_page
    from nestor.quickstart.report import commands, write_everything
    from nestor.quickstart.samples import write_samples
    from nestor.quickstart.verdict import verdict

    subjects = [open_subject(entrant) for entrant in entrants]
    settings = settings_for(entrants[-1], args.max_length, args.seed)
    _title(console, 2, f"Measuring, up to {settings.longest:,} tokens")
    with measuring(console) as bar:
        evaluation = measure(subjects, settings, args.passages, args.questions, bar)

    _title(console, 3, "Memory that lasts")
    memory = demonstrate(subjects, make_page(subjects, settings, args.facts), args.output / "memory")
    _show_memory(console, memory)

    _title(console, 4, "Summary")
    result: dict[str, Any] = {
        "format": "nestor-quickstart",
        "version": 1,
        "evaluation": evaluation,
        "training": [_described(entrant, one) for entrant, one in zip(entrants, trained, strict=True)],
        "memory": memory,
        "samples": write_samples(subjects, settings),
        "settings": _settings(args) | {"seconds": round(time.monotonic() - began)},
        "commands": commands(args.output, entrants),
    }
    result["verdict"] = verdict(result)
    report = write_everything(result, args.output)
    _show_summary(console, result)
    console.print(f"\n{report}  ({(time.monotonic() - began) / 60:.1f} minutes)", markup=False, style="bold")
    for words, command in result["commands"]:
        console.print(f"{words}\n    {command}", markup=False)
    return 0


def _open(args: Args, entrants: Sequence[Entrant], console: Console) -> None:
    """Say what will happen, where, and what the models have behind them."""
    import torch

    from nestor.evaluation.suites import device_name

    device = device_name("cuda" if torch.cuda.is_available() else "cpu")
    names = " and ".join(entrant.name for entrant in entrants)
    length = f"{args.steps:,} steps each" if args.steps else f"about {args.minutes:g} minutes in all"
    say = [
        f"Nestor quickstart: {names}, on {device}.",
        f"1 both are trained for {length}; 2 measured on held-out text; 3 a new process answers from a saved "
        f"memory; 4 {args.output / 'report.html'} is written. Ctrl-C stops, the same command goes on.",
    ]
    for entrant in entrants:
        if entrant.origin is None:
            say.append(f"{entrant.name} begins from scratch (recipe {entrant.recipe}).")
        else:
            say.append(
                f"{entrant.name} was trained before by the same recipe, for {entrant.origin.words}, and goes "
                f"on from {entrant.origin.path}."
            )
    for text in say:
        console.print(text, markup=False)


def _with_length(args: Args, entrants: Sequence[Entrant], console: Console) -> list[Entrant]:
    """The entrants with the number of steps of the plan in the folder, or of a new one."""
    from nestor.quickstart.recipe import Plan, with_steps
    from nestor.quickstart.training import seconds_per_step, steps_within

    request = {
        "length": f"{args.steps} steps" if args.steps else f"{args.minutes:g} minutes",
        "seed": args.seed,
        "recipes": list(args.recipes),
        "from": [None if entrant.origin is None else entrant.origin.path for entrant in entrants],
    }
    book = Plan(args.output / "plan.json", request)
    plan = None if args.restart else book.load()
    if plan is None and args.steps:
        plan = book.save(args.steps, {})
    elif plan is None:
        console.print("measuring the speed of a step ...", style="dim")
        each = {entrant.name: seconds_per_step(entrant) for entrant in entrants}
        plan = book.save(steps_within(60 * args.minutes, list(each.values())), each)
        told = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in each.items())
        console.print(f"a step takes: {told}; {plan['steps']:,} steps each fit", markup=False, style="dim")
    return [with_steps(entrant, plan["steps"]) for entrant in entrants]


def _train(args: Args, entrants: Sequence[Entrant], console: Console) -> list[Trained]:
    from nestor.quickstart.display import TrainingDisplay
    from nestor.quickstart.training import train_all

    lengths = {entrant.name: entrant.config.total_steps for entrant in entrants}
    with TrainingDisplay(console, lengths) as display:
        return train_all(entrants, display, "never" if args.restart else "auto")


def _described(entrant: Entrant, trained: Trained) -> dict[str, Any]:
    origin = entrant.origin
    return {
        "name": trained.name,
        "recipe": entrant.recipe,
        "before": None if origin is None else origin.words,
        "origin": None if origin is None else {"path": origin.path, **origin.training},
        "steps": trained.steps,
        "tokens": trained.tokens,
        "seconds": round(trained.seconds, 1),
        "metrics": trained.metrics,
        "curve": trained.curve,
        "config": entrant.config.to_dict(),
    }


def _settings(args: Args) -> dict[str, Any]:
    values = {key: value for key, value in vars(args).items() if key != "restart"}
    return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}


def _title(console: Console, number: int, text: str) -> None:
    console.print(f"\n{number}/4 {text}", style="bold")


def _show_memory(console: Console, memory: dict[str, Any]) -> None:
    from rich.text import Text

    from nestor.evaluation.report import printable

    console.print(
        f"process {memory['process']} let both read {memory['page_tokens']:,} tokens once; the facts lie "
        f"{memory['distance']:,} tokens before the end:",
        markup=False,
    )
    console.print(Text(memory["facts"].rstrip(), style="dim"))

    def show(title: str, asking: dict[str, Any]) -> None:
        console.print(f"\n{title}, process {asking['process']}:\n$ {asking['command']}", markup=False)
        for answer in asking["answers"]:
            mark, style = ("right", "green") if answer["right"] else ("wrong", "red")
            text = Text(f"  {answer['question']}")
            text.append(printable(answer["given"].rstrip()), style=style)
            text.append(
                f"   {mark}" + ("" if answer["right"] else f", wanted{answer['wanted']}"), style="dim"
            )
            console.print(text)
        console.print(f"  {asking['right']} of {len(asking['answers'])} right", style="bold")

    for name, asking in memory["asked"].items():
        show(name, asking)
    forget = memory["forget"]
    console.print(f"\n{' '.join(forget['said'])}\n$ {forget['command']}", markup=False)
    show(f"{memory['remembering']}, after /forget", memory["after_forget"])


def _show_summary(console: Console, result: dict[str, Any]) -> None:
    from nestor.cli.tables import print_table
    from nestor.quickstart.tables import summary

    print_table(console, *summary(result))
    console.print()
    for sentence in result["verdict"]:
        console.print(sentence, markup=False)
