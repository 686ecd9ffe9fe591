"""Memory that lasts: a page of facts is read here, and asked about in other processes that never see it.

    here           model(page) -> State -> NAME.safetensors
    new process    nestor generate MODEL - --lines --memory NAME.safetensors < questions.txt
    new process    nestor chat MODEL --memory COPY     /forget
    new process    nestor generate MODEL - --lines < questions.txt

The facts come first on the page and real text after them, more than any attention reaches. Their names are
kept out of the training. The commands are those a user would type; what they print is taken as it comes.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nestor.data import encode_text, open_corpus, tokenize
from nestor.data.tasks import CorpusHaystack, FactSpec, facts_page
from nestor.data.tasks.haystack import exact_tokens
from nestor.errors import NestorError
from nestor.evaluation import Settings, Subject
from nestor.files import write_text

# The least that is asked, even if the recipe plants fewer facts in a document.
_FEWEST = 4
# Text in front of the facts, in tokens, as in the probes of the recall suite.
_BEFORE = 64


@dataclass(frozen=True)
class Answer:
    """A question, what was wanted, and what a process printed after it."""

    question: str
    wanted: str
    given: str

    @property
    def right(self) -> bool:
        """The answer begins with all that was wanted."""
        return self.given.startswith(self.wanted)


@dataclass(frozen=True)
class Asking:
    """One process: its command line, its process id and its answers."""

    command: str
    process: int
    answers: list[Answer]

    @property
    def right(self) -> int:
        """How many answers are right."""
        return sum(answer.right for answer in self.answers)

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        answers = [asdict(answer) | {"right": answer.right} for answer in self.answers]
        return {"command": self.command, "process": self.process, "right": self.right, "answers": answers}


@dataclass(frozen=True)
class Page:
    """What is read, and the questions about it. `distance`: tokens between the last fact and the end."""

    text: str
    facts: str
    distance: int
    questions: list[tuple[str, str]] = field(default_factory=list)


def make_page(subjects: Sequence[Subject], settings: Settings, n_facts: int | None = None) -> Page:
    """A page of facts about names that training never had, with real text before and behind.

    Args:
        n_facts: default: as many as a document of the recipe has, at least 4.
    """
    tokenizer = subjects[0].tokenizer
    corpus = open_corpus(list(settings.corpus), split=settings.split)
    haystack = CorpusHaystack(tokenize(corpus, tokenizer), tokenizer)
    rng = np.random.default_rng((settings.seeds[0], 0xFAC7))
    spec = FactSpec(settings.templates, settings.digits, held_out=True)
    facts = facts_page(rng, n_facts or max(_FEWEST, settings.facts), spec=spec)
    reach = max(subject.reach.tokens or settings.train_length or 0 for subject in subjects)
    before, behind = (tokenizer.decode(exact_tokens(haystack, rng, n)) for n in (_BEFORE, 2 * reach))
    return Page(before + facts.text + behind, facts.text, 2 * reach, facts.questions)


def demonstrate(subjects: Sequence[Subject], page: Page, folder: Path) -> dict[str, Any]:
    """Let both models read the page, and new processes answer; the last model then forgets.

    Writes page.txt, questions.txt and a memory file for each model into `folder`. The result is JSON.

    Raises:
        NestorError: one of the processes failed; the message is what it printed.
    """
    write_text(folder / "page.txt", page.text)
    questions = folder / "questions.txt"
    write_text(questions, "".join(question + "\n" for question, _ in page.questions))
    memories = {}
    for subject in subjects:
        memories[subject.name] = folder / f"{subject.name}.safetensors"
        _read(subject, page.text).save(memories[subject.name], model=subject.model)
    remembering = subjects[-1]
    shown = [remembering, *subjects[:-1]]
    weights = _digest(Path(remembering.path))
    longest = max(len(encode_text(subjects[0].tokenizer, answer)) for _, answer in page.questions)
    ask = [
        ["generate", subject.path, "-", "--lines", "--memory", str(memories[subject.name]), *_greedy(longest)]
        for subject in shown
    ]
    copy, orders = folder / "forgetting.safetensors", folder / "forget.txt"
    shutil.copyfile(memories[remembering.name], copy)
    write_text(orders, "/forget\n")
    forget = ["chat", remembering.path, "--memory", str(copy)]
    running = [_start(arguments, questions) for arguments in ask]
    forgetting = _start(forget, orders)
    asked = {
        subject.name: _finish(process, arguments, questions, page)
        for subject, process, arguments in zip(shown, running, ask, strict=True)
    }
    forgot = _output(forgetting, forget)
    blank = ["generate", remembering.path, "-", "--lines", *_greedy(longest)]
    return {
        "facts": page.facts,
        "page_tokens": len(encode_text(remembering.tokenizer, page.text)),
        "distance": page.distance,
        "process": os.getpid(),
        "remembering": remembering.name,
        "asked": {name: asking.as_dict() for name, asking in asked.items()},
        "memory_bytes": {name: path.stat().st_size for name, path in memories.items()},
        "forget": {
            "command": _shown(forget, orders),
            "said": forgot.strip().splitlines()[-1:],
            "file_left": copy.exists(),
        },
        "after_forget": _finish(_start(blank, questions), blank, questions, page).as_dict(),
        "weights_unchanged": weights == _digest(Path(remembering.path)),
    }


@torch.no_grad()
def _read(subject: Subject, text: str) -> Any:
    ids = torch.tensor([encode_text(subject.tokenizer, text)], device=subject.model.device)
    return subject.model(ids, use_cache=True, logits_to_keep=1).past_key_values


def _greedy(tokens: int) -> list[str]:
    return ["--no-do-sample", "--max-new-tokens", str(tokens)]


def _start(arguments: Sequence[str], stdin: Path) -> subprocess.Popen[str]:
    with open(stdin, encoding="utf-8") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "nestor", *arguments],
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )


def _output(process: subprocess.Popen[str], arguments: Sequence[str]) -> str:
    out, err = process.communicate()
    if process.returncode:
        raise NestorError(
            f"`{_shown(arguments)}` ended with status {process.returncode}: {err.strip()[-2000:]}"
        )
    return out


def _finish(process: subprocess.Popen[str], arguments: Sequence[str], questions: Path, page: Page) -> Asking:
    lines = _output(process, arguments).splitlines()
    answers = [
        Answer(question, wanted, printed.removeprefix(question))
        for (question, wanted), printed in zip(page.questions, lines, strict=True)
    ]
    return Asking(_shown(arguments, questions), process.pid, answers)


def _shown(arguments: Sequence[str], stdin: Path | None = None) -> str:
    return shlex.join(["nestor", *arguments]) + (f" < {shlex.quote(str(stdin))}" if stdin else "")


def _digest(model: Path) -> str:
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
