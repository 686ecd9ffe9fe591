"""`nestor retrofit`: give a trained model levels that learn, in a memory file of their own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from nestor.cli.levels import LevelOptions
from nestor.cli.loading import Dtype, load_model
from nestor.errors import ConfigError

if TYPE_CHECKING:
    from nestor.learning import Learner, Retrofit

PROBE = "The model reads this sentence twice, once as it was and once with levels that have learned nothing."


@dataclass
class Args:
    """Give a trained model levels: feed-forward weights that learn from what it reads.

    Prints which weights are updated how often, checks that the model's predictions are what they were
    before, and writes an empty memory with these levels for `nestor learn` and `nestor chat`. The model's
    own folder is not changed.

    Examples:
      nestor retrofit some/llama --memory ada.safetensors
      nestor retrofit some/llama --memory ada.safetensors --periods 64 512 4096 --optimizer adam
      nestor retrofit some/llama --memory ada.safetensors --reading added --width 256
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A folder with a model, or the id of one on the Hugging Face hub."""
    memory: Path
    """The new file for what it will learn."""
    levels: Annotated[LevelOptions, tyro.conf.arg(name="")] = field(default_factory=LevelOptions)
    tokenizer: str | None = None
    """Another tokenizer than the model's own: "bytes", a folder, a file, or a hub id."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a GPU if there is one."""
    dtype: Dtype = "auto"
    """Type of the weights; auto is the one they were saved in."""


def run(args: Args) -> int:
    """Make the levels, check them, write the file. Raises NestorError for what the user can mend."""
    from nestor.files import FileLock

    with FileLock(args.memory):
        if args.memory.exists():
            raise ConfigError(
                f"{args.memory} is there already; name a new file, or go on with it: nestor learn --memory."
            )
        return _retrofit(args)


def _retrofit(args: Args) -> int:
    from nestor.cli.levels import retrofit_of

    retrofit = retrofit_of(args.levels, None)
    model, tokenizer = load_model(args.model, args.device, args.dtype, args.tokenizer)

    import torch
    from rich.console import Console

    from nestor.cli.levels import COLUMNS, NOTE, described
    from nestor.cli.memory_file import MemoryFile
    from nestor.cli.tables import print_table
    from nestor.learning import Learner

    ids = torch.tensor([tokenizer(PROBE)["input_ids"]], device=model.device)
    with torch.no_grad():
        before = model(ids).logits
    learner = Learner(model, retrofit.apply(model))
    console = Console()
    print_table(console, COLUMNS, [described(level) for level in learner.levels])
    console.print(_sizes(model, learner, retrofit))
    state = learner.start()
    with learner.applied(state), torch.no_grad():
        after = model(ids).logits
    console.print(_comparison(before, after))
    MemoryFile(args.memory, model, {NOTE: retrofit.to_notes()}).save(state)
    console.print(f"memory in {args.memory}: nestor learn {args.model} FILES --memory {args.memory}")
    return 0


def _sizes(model: Any, learner: Learner, retrofit: Retrofit) -> str:
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    adaptive = sum(sizes[name] for level in learner.levels for name in level.parameters)
    text = f"{adaptive:,} of {sum(sizes.values()):,} weights learn ({adaptive / sum(sizes.values()):.0%})"
    return text + (
        "" if retrofit.reading == "existing" else f", with what reading {retrofit.reading!r} added"
    )


def _comparison(before: Any, after: Any) -> str:
    import torch

    if torch.equal(before, after):
        return "predictions are the same to the bit"
    difference = float((before - after).abs().max() / before.abs().max())
    if not difference < 1e-2:
        raise ConfigError(
            f"with its levels the model predicts something else (by {difference:.1e} of its largest logit); "
            f"this model cannot be retrofitted so, try --reading existing"
        )
    return f"predictions are the same to {difference:.1e} of the largest logit"
