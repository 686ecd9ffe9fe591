"""`nestor eval`: measure perplexity, recall and needle retrieval of one or more models."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from nestor.cli.loading import Dtype, Opener
from nestor.errors import ConfigError, suggest
from nestor.evaluation.class_incremental.settings import ClassIncremental
from nestor.evaluation.retention.settings import RetentionSettings
from nestor.jobs import Workers

if TYPE_CHECKING:
    from nestor.evaluation.scoring import Progress
    from nestor.evaluation.subjects import Subject
    from nestor.evaluation.suites import Settings

SUITES = (
    "perplexity", "recall", "needle", "all", "remembrance", "retention", "class-incremental", "lm-eval",
)  # fmt: skip
_WITH_WORKERS = ("retention", "class-incremental")


@dataclass
class Args:
    """Measure models; several in one call read the same text and are compared.

    Writes results.json, plots/*.png and report.html into the folder --out.

    Examples:
      nestor eval runs/a/final runs/b/final --suite recall
      nestor eval runs/a/final --suite perplexity --lengths 65536 --corpus "books/*.txt"
      nestor eval runs/a/final --suite remembrance --lengths 8192
      nestor eval runs/a/final --suite needle --lengths 1024 4096 16384 --seeds 0 1 2 --variants passkey
      nestor eval runs/a/final --suite class-incremental --data folder/of/clinc150 --seeds 0 1 2 3 4
      nestor eval runs/a/final --suite lm-eval --tasks arc_easy piqa
      nestor eval some/llama --suite retention --seeds 0 1 2 3 4 --workers 8

    The suite retention asks whether a model that learns while it reads keeps what it read after the context
    is gone. Like class-incremental it tunes and runs every arm on every seed, which takes long. Finished runs
    are kept in --out: the same command goes on after an interruption, with as many --workers as it is given.
    """

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL [MODEL ...]")]
    """Folders with models, or ids on the Hugging Face hub."""
    suite: tuple[str, ...] = ("all",)
    """perplexity, recall, needle, all of these; remembrance, which reads its text a dozen times and must be
    named; retention; or one that runs alone: class-incremental (needs --data), lm-eval (needs the extra
    nestor[eval])."""
    lengths: tuple[int, ...] = ()
    """In tokens. Several: contexts, distances and lengths to measure. One: the greatest, the others are
    doubled up to it. None: up to 16 times the training length where the run is known, else up to 4,096."""
    seeds: tuple[int, ...] = (0,)
    """Each seed draws its own samples; all count."""
    repeats: int | None = None
    """Samples for each seed: passages (16), questions a distance (32), needles a cell (4)."""
    corpus: tuple[str, ...] = ("classics",)
    """Text to measure on: a shipped corpus, files, folders, globs, or hf:NAME."""
    split: str | None = None
    """all, train or valid; by default the held-out part of a shipped corpus and all of any other."""
    out: Path | None = None
    """Folder for the results; by default evals/NAME."""
    name: tuple[str, ...] = ()
    """Names of the models, in their order; by default from their paths."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a GPU if there is one."""
    dtype: Dtype = "auto"
    """Type of the weights; auto is the one they were saved in."""
    workers: int = 1
    """Processes that make the runs of the suites retention and class-incremental, many at the same time: on
    all GPUs in turn, or on the --device that is named. Each has the model, and one thread of the CPU."""
    tokenizer: str | None = None
    """Another tokenizer than the models' own: "bytes", a folder, a file, or a hub id."""
    batch_size: int = 16
    """Texts read at the same time."""
    piece: int = 2048
    """Tokens read in one call; a longer text is read in pieces, the State carried."""
    scale: str = "log"
    """Bins of positions: log or linear."""
    recall_tasks: tuple[str, ...] = ("facts", "mqar")
    """facts (planted in real text), mqar (pairs of plain tokens), or both."""
    facts: int = 4
    """Facts stated together, of which one is asked."""
    digits: int = 4
    """Digits of a fact's number."""
    templates: tuple[str, ...] = ("key",)
    """Wordings of the facts: key, house, phone."""
    pairs: int = 8
    """Pairs of a document of associative recall."""
    variants: tuple[str, ...] = ("passkey", "number", "word")
    """Kinds of needle: passkey, number, word, uuid."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where the needle is: 0 is the beginning of the text, 1 its end."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness, for --suite lm-eval."""
    limit: int | None = None
    """Items of each lm-eval task."""
    include_path: Path | None = None
    """Folder with lm-eval task files of your own."""
    intents: ClassIncremental = field(default_factory=ClassIncremental)
    """Of the suite class-incremental."""
    retention: RetentionSettings = field(default_factory=RetentionSettings)
    """The suite retention."""
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """No progress bars."""


def run(args: Args) -> int:
    """Measure, print the summary, write the folder. Raises NestorError for what the user can mend."""
    if not args.models:
        raise ConfigError("no model to evaluate; name at least one folder")
    for suite in args.suite:
        if suite not in SUITES:
            raise ConfigError(
                f"there is no suite {suite!r}; there are {', '.join(SUITES)}. "
                f"{suggest(suite, SUITES)}".rstrip()
            )
    names, workers = _names(args), Workers(args.workers, args.device, args.quiet)
    if args.workers > 1 and not set(args.suite) & set(_WITH_WORKERS):
        raise ConfigError(
            f"--workers is {args.workers}, which is for {' and '.join(_WITH_WORKERS)} alone; give 1 for "
            f"{', '.join(args.suite)}"
        )
    if "lm-eval" in args.suite:
        if len(args.suite) > 1:
            raise ConfigError("--suite lm-eval runs alone; call the command twice")
        return _lm_eval(args, names)
    if "class-incremental" in args.suite:
        if len(args.suite) > 1:
            raise ConfigError("--suite class-incremental runs alone; call the command twice")
        return _class_incremental(args, names, workers)
    from nestor.evaluation.suites import evaluate, write_results

    settings = _settings(args)
    settings.check()
    subjects = [_subject(args, path, name) for path, name in zip(args.models, names, strict=True)]
    out = _out(args, names)
    bar = _bars(args.quiet)
    result = evaluate(subjects, settings, name=names[0], bar=bar, folder=out, workers=workers)
    report = write_results(result, out, _go_on(args))
    _print_summary(result)
    print(f"\n{report}\n{out / 'results.json'}")
    return 0


def _settings(args: Args) -> Settings:
    from nestor.evaluation.suites import ASKED_FOR, READING, Settings

    shared = {field.name for field in fields(Settings)} & {field.name for field in fields(Args)}
    return Settings(
        suites=(*READING, *(suite for suite in ASKED_FOR if suite in args.suite))
        if "all" in args.suite
        else args.suite,
        train_length=_train_length(args.models),
        **{key: getattr(args, key) for key in shared},
    )


def _subject(args: Args, path: str, name: str) -> Subject:
    return Opener(name, path, args.dtype, args.tokenizer)(args.device)


def _train_length(paths: tuple[str, ...]) -> int | None:
    """The longest training segment of the runs in whose folders the models lie; None if no run is known."""
    from nestor.training.settings import read_toml

    lengths = []
    for path in paths:
        for folder in (Path(path), *Path(path).resolve().parents[:2]):
            if (folder / "config.toml").is_file():
                length = read_toml(folder / "config.toml").get("data", {}).get("sequence_length")
                if isinstance(length, int) and length > 0:
                    lengths.append(length)
                break
    return max(lengths, default=None)


def _names(args: Args) -> list[str]:
    if args.name:
        if len(args.name) != len(args.models):
            raise ConfigError(
                f"--name has {len(args.name)} names for {len(args.models)} models; give one for each"
            )
        return list(args.name)
    parts = [[p for p in Path(path).parts if p not in ("/", "..", ".")] or [path] for path in args.models]
    # runs/a/final and runs/b/final are a and b: `final` and what all paths share says nothing.
    names = [
        "/".join(part[:-1][-1:] if part[-1] == "final" and len(part) > 1 else part[-1:]) for part in parts
    ]
    if len(set(names)) < len(names):
        names = list(args.models)
    return names


def _out(args: Args, names: list[str]) -> Path:
    from nestor.evaluation.figures import file_name

    return (
        args.out if args.out is not None else Path("evals") / "-vs-".join(file_name(name) for name in names)
    )


def _bars(quiet: bool) -> Callable[[str], AbstractContextManager[Progress]]:
    """A function that opens a progress bar of tokens; to standard error, so that output can be piped."""
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(file=sys.stderr)

    @contextmanager
    def bar(title: str) -> Iterator[Progress]:
        columns = (
            SpinnerColumn(finished_text="done"),
            TextColumn("{task.description}"),
            TextColumn("{task.completed:,.0f} tokens", justify="right"),
            TextColumn("{task.fields[rate]}", justify="right"),
            TimeElapsedColumn(),
        )
        with Bars(*columns, console=console, disable=quiet) as bars:
            task = bars.add_task(title, total=None, rate="")

            def advance(tokens: int) -> None:
                bars.advance(task, tokens)
                state = bars.tasks[bars.task_ids.index(task)]
                bars.update(task, rate=f"{state.completed / max(state.elapsed or 0, 1e-3):,.0f} tokens/s")

            yield advance
            done = bars.tasks[bars.task_ids.index(task)].completed
            bars.update(task, total=max(done, 1), completed=max(done, 1))

    return bar


def _print_summary(result: dict[str, Any]) -> None:
    from rich.console import Console

    from nestor.cli.tables import print_table
    from nestor.evaluation.summary import summary_table

    print_table(Console(), *summary_table(result))


def _go_on(args: Args) -> list[tuple[str, str]]:
    models = shlex.join(args.models)
    longer = 4 * max(args.lengths, default=4096)
    return [
        ("Measure again with more seeds, for narrower intervals:", f"nestor eval {models} --seeds 0 1 2 3"),
        ("Measure further out:", f"nestor eval {models} --lengths {longer}"),
        ("Measure on text of your own:", f'nestor eval {models} --corpus "texts/**/*.txt"'),
        (
            "Talk with a model whose memory lasts:",
            f"nestor chat {shlex.quote(args.models[-1])} --memory memory.safetensors",
        ),
    ]


def _class_incremental(args: Args, names: list[str], workers: Workers) -> int:
    from dataclasses import asdict
    from datetime import UTC, datetime

    from rich.console import Console

    from nestor.cli.tables import print_table
    from nestor.data.tasks.intents import SOURCES, read_labelled
    from nestor.evaluation.class_incremental.measure import MEASURES, measure_class_incremental
    from nestor.evaluation.class_incremental.results import table_rows, write_class_incremental
    from nestor.evaluation.suites import device_name, versions

    stream = args.intents
    stream.check()
    if stream.data is None:
        raise ConfigError(f"--suite class-incremental needs --data, a folder. {SOURCES[stream.dataset]}")
    data = read_labelled(stream.dataset, stream.data)
    subjects = [_subject(args, path, name) for path, name in zip(args.models, names, strict=True)]
    bar, out = _bars(args.quiet), _out(args, names)
    found = {
        subject.name: measure_class_incremental(
            subject,
            data,
            stream,
            seeds=args.seeds,
            batch_size=args.batch_size,
            piece=args.piece,
            folder=out / "class-incremental",
            bar=bar,
            workers=workers,
        )
        for subject in subjects
    }
    result = {
        "format": "nestor-class-incremental",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "device": device_name(subjects[0].model.device),
        "settings": asdict(stream) | {"data": str(stream.data)},
        "seeds": list(args.seeds),
        "descriptions": [subject.describe() for subject in subjects],
        "models": found,
    }
    paths = write_class_incremental(result, out)
    for name, one in found.items():
        print(f"\n{name}")
        print_table(Console(), ("arm", "learning rate", *MEASURES), table_rows(one))
    print("\n" + "\n".join(map(str, paths)))
    return 0


def _lm_eval(args: Args, names: list[str]) -> int:
    from nestor.evaluation.harness import print_results, require, run_harness
    from nestor.files import write_json

    require(args.tasks)
    found = {}
    for path, name in zip(args.models, names, strict=True):
        subject = _subject(args, path, name)
        found[name] = run_harness(
            subject, args.tasks, batch_size=args.batch_size, limit=args.limit, include_path=args.include_path,
            seed=args.seeds[0],
        )  # fmt: skip
    out = _out(args, names) / "lm-eval.json"
    write_json(out, found)
    print_results(found)
    print(f"\n{out}")
    return 0
