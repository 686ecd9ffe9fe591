"""`nestor generate`: continue a prompt, printing the text as it comes."""

import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from nestor.cli.loading import Dtype, Sampling, load_model
from nestor.errors import ConfigError, DataError


@dataclass
class Args:
    """Continue a prompt; the text is printed as it comes.

    Examples:
      nestor generate runs/a/final "It was a dark and"
      nestor generate runs/a/final --no-do-sample --max-new-tokens 40 "The key of Marlow is"
      nestor generate runs/a/final --memory ada.safetensors "The key of Marlow is"
      cat page.txt | nestor generate runs/a/final - --memory ada.safetensors --write-memory
      cat questions.txt | nestor generate runs/a/final - --lines --memory ada.safetensors
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A folder with a model, or the id of one on the Hugging Face hub."""
    prompt: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PROMPT")]
    """The text to go on from; - reads it from standard input."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    memory: Path | None = None
    """Go on from the State in this file, which is only read."""
    write_memory: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write the State after the text back to the memory file (made if it is missing)."""
    lines: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Take each line as a prompt of its own, all from the same memory, and continue it to its end."""
    tokenizer: str | None = None
    """Another tokenizer than the model's own: "bytes", a folder, a file, or a hub id."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a GPU if there is one."""
    dtype: Dtype = "auto"
    """Type of the weights; auto is the one they were saved in."""


def run(args: Args) -> int:
    """Print the continuation. Raises NestorError for what the user can mend."""
    arguments = args.sampling.generation_arguments()
    if args.write_memory and args.memory is None:
        raise ConfigError("--write-memory has no file to write; name one with --memory FILE.")
    if args.write_memory and args.lines:
        raise ConfigError("--lines starts every line from the same memory; leave out --write-memory.")
    prompt = _read_standard_input() if args.prompt == "-" else args.prompt

    from nestor.files import FileLock

    with FileLock(args.memory) if args.memory and args.write_memory else nullcontext():
        return _generate(args, prompt, arguments)


def _generate(args: Args, prompt: str, arguments: dict[str, Any]) -> int:
    model, tokenizer = load_model(args.model, args.device, args.dtype, args.tokenizer)

    import torch

    from nestor.cli.conversation import TokenStream, encode_prompt, extend, require_state
    from nestor.cli.memory_file import MemoryFile

    if args.sampling.seed is not None:
        torch.manual_seed(args.sampling.seed)
    file, state = None, None
    if args.memory is not None:
        require_state(model)
        file = MemoryFile(args.memory, model)
        state = file.load(required=not args.write_memory)

    if tokenizer.pad_token_id is not None:
        arguments["pad_token_id"] = tokenizer.pad_token_id
    if args.lines:
        return _continue_lines(model, tokenizer, prompt, state, arguments)
    ids = encode_prompt(tokenizer, prompt, opening=state is None)
    if args.sampling.num_beams == 1:
        arguments["streamer"] = TokenStream(tokenizer, _show)
    if file is None:
        tokens = torch.tensor([ids], device=model.device)
        output: Any = model.generate(tokens, attention_mask=torch.ones_like(tokens), **arguments)  # type: ignore[operator]
        answer = output[0, len(ids) :].tolist()
    else:
        answer, state = extend(model, ids, state, arguments, lambda _: [])
        if args.write_memory:
            file.save(state)
    if args.sampling.num_beams > 1:
        _show(tokenizer.decode(answer, skip_special_tokens=True))
    _show("\n")
    return 0


def _continue_lines(model: Any, tokenizer: Any, prompt: str, state: Any, arguments: dict[str, Any]) -> int:
    """Print each line of `prompt` with its continuation, which ends where the line does."""
    import torch

    from nestor.cli.conversation import StopAfterLine, encode_prompt

    if state is not None:
        arguments["past_key_values"] = state
    for line in filter(str.strip, prompt.splitlines()):
        ids = encode_prompt(tokenizer, line, opening=state is None)
        tokens = torch.tensor([ids], device=model.device)
        arguments["stopping_criteria"] = [StopAfterLine(tokenizer)]
        output = model.generate(tokens, attention_mask=torch.ones_like(tokens), **arguments)
        answer = tokenizer.decode(output[0, len(ids) :].tolist(), skip_special_tokens=True)
        _show(line + "".join(answer.splitlines()[:1]) + "\n")
    return 0


def _read_standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not UTF-8 at byte {error.start}; convert it first.") from error


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
