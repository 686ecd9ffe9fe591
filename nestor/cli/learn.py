"""`nestor learn`: read files with a model whose feed-forward weights learn from them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from nestor.cli.levels import LevelOptions
from nestor.cli.loading import Dtype, load_model
from nestor.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from nestor.learning import Learner
    from nestor.models.state import State


@dataclass
class Args:
    """Read files with a model whose feed-forward weights learn from them, on several time scales.

    The last layers' feed-forward networks are split into levels, each updated once in its period from the
    model's own next-token loss. The model stays as it is: what it learns goes into the memory file, with
    which the next call, and `nestor chat`, go on (`nestor retrofit` makes an empty one). --export writes the
    model with what it has learned as a folder of its own, for any other program. For each file the table
    compares the text's bits a byte with those of the model that does not learn.

    Examples:
      nestor learn some/llama book.txt --memory book.safetensors
      nestor learn some/llama day2.txt day3.txt --memory book.safetensors
      nestor learn some/llama book.txt --periods 64 512 4096 --optimizer adam --export some/reader
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A folder with a model, or the id of one on the Hugging Face hub."""
    files: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FILES")]
    """UTF-8 texts, read one after another."""
    memory: Path | None = None
    """Go on from this file, and write what is learned back to it after each text (made if it is missing)."""
    export: Path | None = None
    """Write the model as it has become to this new folder."""
    levels: Annotated[LevelOptions, tyro.conf.arg(name="")] = field(default_factory=LevelOptions)
    context: int | None = None
    """Tokens that are read together; none given: what the model takes, at most 2,048."""
    compare: bool = True
    """Also read the texts without learning, to compare."""
    tokenizer: str | None = None
    """Another tokenizer than the model's own: "bytes", a folder, a file, or a hub id."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a GPU if there is one."""
    dtype: Dtype = "auto"
    """Type of the weights; auto is the one they were saved in."""


@dataclass
class Read:
    """Nats and seconds of a text, learning and frozen."""

    tokens: int = 0
    size: int = 0
    learning: float = 0.0
    frozen: float = 0.0
    learning_seconds: float = 0.0
    frozen_seconds: float = 0.0

    def bits(self, nats: float) -> float:
        return nats / math.log(2) / max(self.size, 1)


def run(args: Args) -> int:
    """Learn, and print what came of it. Raises NestorError for what the user can mend."""
    if not args.files:
        raise ConfigError("there is nothing to read; name at least one file.")
    if args.memory is None and args.export is None and not args.compare:
        raise ConfigError("nothing would be kept or shown; name a --memory file or an --export folder.")
    if args.export is not None and (args.export.exists() or args.export == args.memory):
        raise ConfigError(f"{args.export} is there already; --export wants a new folder.")
    texts = [_text(path) for path in args.files]

    from contextlib import nullcontext

    from nestor.files import FileLock

    with FileLock(args.memory) if args.memory else nullcontext():
        return _learn(args, texts)


def _learn(args: Args, texts: list[str]) -> int:
    model, tokenizer = load_model(args.model, args.device, args.dtype, args.tokenizer)

    from rich.console import Console
    from rich.progress import Progress

    from nestor.cli.levels import COLUMNS, NOTE, described, retrofit_of
    from nestor.cli.memory_file import MemoryFile
    from nestor.cli.tables import print_table
    from nestor.data.windows import windows
    from nestor.evaluation.subjects import Subject
    from nestor.learning import Learner

    retrofit = retrofit_of(args.levels, args.memory)
    if args.export is not None and retrofit.reading != "existing":
        raise ConfigError(
            f"--export writes a model of its own kind, which one with the networks of reading "
            f"{retrofit.reading!r} is not; leave it out, the memory file holds all that was learned."
        )
    learner = Learner(model, retrofit.apply(model))
    context = Subject(args.model, model, tokenizer).context() if args.context is None else args.context
    if context < 2:
        raise ConfigError(f"--context is {context}; it must be at least 2.")
    tokens = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
    for path, ids in zip(args.files, tokens, strict=True):
        if len(ids) < 2:
            raise DataError(f"{path} has {len(ids)} tokens; a text needs at least two.")
    if args.export is not None:
        args.export.parent.mkdir(parents=True, exist_ok=True)
    console = Console()
    print_table(console, COLUMNS, [described(level) for level in learner.levels])
    file = MemoryFile(args.memory, model, {NOTE: retrofit.to_notes()}) if args.memory else None
    state = (file.load() if file else None) or learner.start()
    if int(state.clock):
        state = learner.close(state)  # a conversation that `nestor chat` left open
    before = [report.updates for report in learner.report(state)[0]]

    rows: list[list[str]] = []
    with Progress(console=console, transient=True) as progress:
        for path, text, ids in zip(args.files, texts, tokens, strict=True):
            task = progress.add_task(path.name, total=len(ids) - 1)
            read = Read(size=len(text.encode()))
            for window in windows(ids, context):
                state = _read(learner, model, window, state, read, args.compare)
                progress.update(task, completed=read.tokens)
            if file is not None:
                file.save(state)
                progress.console.print(f"read {path.name}, and saved what it taught")
            rows.append(_row(path, read, args.compare))
    columns = ["text", "tokens", "bits a byte", "frozen", "less", "time over frozen"]
    print_table(console, columns if args.compare else columns[:3], rows)
    reports = learner.report(state)[0]
    print_table(
        console,
        ("level", "updates", "in all", "pending tokens", "change"),
        [
            [r.name, str(r.updates - b), str(r.updates), str(r.pending), f"{r.change:.1e}"]
            for r, b in zip(reports, before, strict=True)
        ],
    )
    if all(r.updates == b for r, b in zip(reports, before, strict=True)):
        console.print(
            f"nothing was learned: the texts are shorter than the shortest period, {learner.base} tokens"
        )
    if file is not None:
        console.print(f"memory in {args.memory}")
    if args.export is not None:
        _export(args.export, model, tokenizer, learner, state)
        console.print(f"the model with what it has learned is in {args.export}")
    return 0


def _read(learner: Learner, model: Any, window: list[int], state: State, read: Read, compare: bool) -> State:
    """The State after a window, of which the context is over."""
    import torch
    from torch.nn import functional as F

    ids = torch.tensor([window], device=model.device)

    def nats(logits: Tensor) -> float:
        return float(F.cross_entropy(logits[0, : len(window) - 1].float(), ids[0, 1:], reduction="sum"))

    begin = time.perf_counter()
    logits, state = learner.read(ids, state)
    state = learner.close(state)
    read.learning += nats(logits)
    read.learning_seconds += time.perf_counter() - begin
    if compare:
        begin = time.perf_counter()
        with torch.no_grad():
            read.frozen += nats(model(ids).logits)
        read.frozen_seconds += time.perf_counter() - begin
    read.tokens += len(window) - 1
    return state


def _row(path: Path, read: Read, compare: bool) -> list[str]:
    learning = read.bits(read.learning)
    row = [path.name, f"{read.tokens:,}", f"{learning:.3f}"]
    if compare:
        frozen = read.bits(read.frozen)
        cost = read.learning_seconds / read.frozen_seconds
        row += [f"{frozen:.3f}", f"{frozen - learning:.3f}", f"{cost:.1f}"]
    return row


def _export(folder: Path, model: Any, tokenizer: Any, learner: Learner, state: State) -> None:
    from nestor.training.checkpoint import whole_folder

    learner.write(state, model)
    with whole_folder(folder, folder.with_name(f".{folder.name}.tmp")) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}.") from error
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder; name the files in it.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start}; convert it first.") from error
