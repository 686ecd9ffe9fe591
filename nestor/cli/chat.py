"""`nestor chat`: talk with a model whose memory lasts."""

import sys
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from nestor.cli.loading import Dtype, Sampling, load_model
from nestor.errors import ConfigError, NestorError, suggest

if TYPE_CHECKING:
    from rich.console import Console

    from nestor.cli.conversation import Conversation
    from nestor.cli.memory_file import MemoryFile

HELP = {
    "/snapshot NAME": "keep a copy of the memory as it is now",
    "/rollback NAME": "go back to a snapshot",
    "/snapshots": "list the snapshots",
    "/forget": "start from an empty memory (snapshots stay)",
    "/surprise": "show how hard each piece of the last turn was written",
    "/help": "show these commands",
    "/quit": "end; so does the end of the input (Ctrl-D)",
}


@dataclass
class Args:
    """Talk with a model. With --memory it goes on, next time, from what it has read.

    A model with memory layers keeps it in their state. Of any other decoder (Llama, Qwen, GPT-NeoX ...)
    weights learn from what you write, as `nestor learn` and `nestor retrofit` say, and stay learned when the
    turns themselves no longer fit into its context.
    The memory file is read at the start and replaced, atomically, after each turn; a second process that
    would write the same file is refused. Type /help in the conversation for its commands.

    Examples:
      nestor chat runs/a/final --memory ada.safetensors
      nestor chat some/llama --memory book.safetensors       # what `nestor learn` wrote
      nestor chat runs/a/final --temperature 0.5 --max-new-tokens 100
      printf 'The key of Marlow is 4821.\\n/surprise\\n' | nestor chat runs/a/final
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A folder with a model, or the id of one on the Hugging Face hub."""
    memory: Path | None = None
    """The file that holds the memory; made if it is missing. Without it the memory ends with the process."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    tokenizer: str | None = None
    """Another tokenizer than the model's own: "bytes", a folder, a file, or a hub id."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a GPU if there is one."""
    dtype: Dtype = "auto"
    """Type of the weights; auto is the one they were saved in."""


def run(args: Args) -> int:
    """Hold the conversation. Raises NestorError for what the user can mend before it starts."""
    arguments = args.sampling.generation_arguments()

    from nestor.files import FileLock

    with FileLock(args.memory) if args.memory else nullcontext():
        return _chat(args, arguments)


def _chat(args: Args, arguments: dict[str, Any]) -> int:
    model, tokenizer = load_model(args.model, args.device, args.dtype, args.tokenizer)

    import torch
    from rich.console import Console

    from nestor.cli.conversation import Conversation, require_state
    from nestor.cli.memory_file import MemoryFile

    if args.sampling.seed is not None:
        torch.manual_seed(args.sampling.seed)
    if tokenizer.pad_token_id is not None:
        arguments["pad_token_id"] = tokenizer.pad_token_id
    file: MemoryFile | None = None
    if args.memory is not None and _learns(args.memory, model):
        conversation, file = _learning(args.memory, model, tokenizer)
    else:
        require_state(model)
        if args.memory is not None:
            file = MemoryFile(args.memory, model)
        conversation = Conversation(model, tokenizer, None if file is None else file.load())
    chat = Chat(conversation, file, arguments, Console(highlight=False, soft_wrap=True))
    chat.greet()
    return chat.loop()


def _learns(memory: Path, model: Any) -> bool:
    """Whether the memory is what weights have learned: its file says so, or the model has no other."""
    from nestor.cli.levels import NOTE
    from nestor.models.state import read_notes

    return NOTE in read_notes(memory) if memory.exists() else model.config.model_type != "nestor"


def _learning(memory: Path, model: Any, tokenizer: Any) -> "tuple[Conversation, MemoryFile]":
    from nestor.cli.learning_conversation import LearningConversation
    from nestor.cli.levels import NOTE, LevelOptions, retrofit_of
    from nestor.cli.memory_file import MemoryFile
    from nestor.evaluation.subjects import Subject
    from nestor.learning import Learner

    retrofit = retrofit_of(LevelOptions(), memory)
    learner = Learner(model, retrofit.apply(model))
    file = MemoryFile(memory, model, {NOTE: retrofit.to_notes()})
    limit = Subject("", model, tokenizer).limit or 1 << 30
    return LearningConversation(learner, tokenizer, limit, file.load()), file


class Chat:
    """The loop around a Conversation: reads lines, does commands, writes the memory file after each turn."""

    def __init__(
        self,
        conversation: "Conversation",
        file: "MemoryFile | None",
        arguments: dict[str, Any],
        console: "Console",
    ) -> None:
        self.conversation = conversation
        self.file = file
        self.arguments = arguments
        self.console = console

    def greet(self) -> None:
        """Say what the memory holds."""
        where = "The memory ends with this conversation" if self.file is None else f"Memory: {self.file.path}"
        self._say(f"{where}; {self.conversation.described()}. /help shows the commands.")

    def loop(self) -> int:
        """Answer lines until /quit or the end of the input."""
        prompt = "you> " if sys.stdin.isatty() else ""
        with suppress(ImportError):
            import readline  # noqa: F401  (gives input() a history and editing)
        while True:
            try:
                line = input(prompt).strip()
            except EOFError:
                return 0
            except UnicodeDecodeError as error:
                self._complain(f"that line is not UTF-8 at byte {error.start}; it was not read.")
                continue
            if line in ("/quit", "/exit"):
                return 0
            try:
                if line.startswith("/"):
                    self._command(line)
                elif line:
                    self._turn(line)
            except NestorError as error:
                self._complain(str(error))

    def _turn(self, line: str) -> None:
        started = False

        def show(text: str) -> None:
            nonlocal started
            text = text if started else text.lstrip()
            started = started or bool(text)
            self.console.file.write(text)
            self.console.file.flush()

        try:
            reply = self.conversation.reply(line, self.arguments, show)
        except KeyboardInterrupt:
            self._complain("\ninterrupted: the memory is as it was before this turn.")
            return
        if not reply.endswith("\n"):
            self.console.print()
        self._save()

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        commands = {word.partition(" ")[0]: word for word in HELP}
        if name not in commands:
            raise ConfigError(f"there is no command {name}. {suggest(name, commands) or 'Type /help.'}")
        words = rest.split()
        if len(words) != len(commands[name].split()) - 1:
            raise ConfigError(f"write it as {commands[name]}.")
        getattr(self, "_" + name[1:])(*words)

    def _help(self) -> None:
        for word, meaning in HELP.items():
            self._say(f"{word:<16}{meaning}")

    def _snapshot(self, name: str) -> None:
        if self.conversation.state is None:
            raise ConfigError("there is nothing to keep yet: the memory is empty.")
        self._say(f"kept as {self._memory_file().snapshot(name, self.conversation.state)}")

    def _rollback(self, name: str) -> None:
        self.conversation.replace(self._memory_file().rollback(name))
        self._save()
        self._say(f"the memory is that of snapshot {name} again.")

    def _snapshots(self) -> None:
        names = self._memory_file().snapshots()
        self._say(", ".join(names) if names else "no snapshots yet: /snapshot NAME makes one.")

    def _forget(self) -> None:
        self.conversation.replace(None)
        self._save()
        kept = [] if self.file is None else self.file.snapshots()
        self._say("the memory is empty." + (f" Snapshots kept: {', '.join(kept)}." if kept else ""))

    def _surprise(self) -> None:
        from nestor.cli.surprise import coloured, hardest

        pieces = self.conversation.surprise()
        self.console.print(coloured(pieces))
        self._say("written hardest: " + ", ".join(f"{word} {share:.0%}" for word, share in hardest(pieces)))

    def _memory_file(self) -> "MemoryFile":
        if self.file is None:
            raise ConfigError("snapshots live beside the memory file; start with --memory FILE.")
        return self.file

    def _save(self) -> None:
        if self.file is None:
            return
        try:
            self.file.save(self.conversation.state)
        except OSError as error:
            self._complain(
                f"{self.file.path} was not written ({error.strerror}); it holds what it held before."
            )

    def _say(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False)

    def _complain(self, text: str) -> None:
        self.console.print(text, style="yellow", markup=False)
