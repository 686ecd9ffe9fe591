"""Training memory branches on books as streams: each lane reads book after book, its memory carried on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from longer_lived_settings import Args, Training
from numpy.typing import NDArray
from rich.progress import Progress, track
from torch import Tensor

from nestor.cli.loading import load_model
from nestor.data import open_corpus
from nestor.errors import ConfigError, DataError, NonFiniteError
from nestor.evaluation.suites import device_name
from nestor.files import read_tensors, write_json, write_tensors
from nestor.learning import Attached, Branches, WindowedDecoder
from nestor.models.state import LayerState, State, is_cache

CORPORA = ("novels-train-a", "novels-train-b")
# Tokenised together.
BOOKS = 32


def read_books(args: Args, tokenizer: Any) -> list[NDArray]:
    """Ids of each book, int32; kept in the folder once they are made."""
    path = args.out / "books.safetensors"
    if not path.is_file():
        documents = [text for name in CORPORA for text in open_corpus(args.text(name))]
        books = []
        # Encodings take a hundred bytes a token.
        for begin in track(range(0, len(documents), BOOKS), "tokens of books"):
            part = documents[begin : begin + BOOKS]
            encoded = tokenizer.backend_tokenizer.encode_batch_fast(part, add_special_tokens=False)
            books += [torch.tensor(one.ids, dtype=torch.int32) for one in encoded]
        write_tensors(path, {f"{number:04d}": book for number, book in enumerate(books)})
    found, _ = read_tensors(path)
    return [found[name].numpy() for name in sorted(found)]


class Place(NamedTuple):
    """Where a lane reads next, and whether it begins there."""

    book: int
    offset: int
    fresh: bool


def places(sizes: Sequence[int], lanes: int, segment: int, seed: int) -> Iterator[list[Place]]:
    """What the lanes read, step by step, without end. A lane that has finished a book takes the next of the
    order, which is drawn anew for each epoch; what is left of a book, too short for a segment, is left out.

    Raises:
        DataError: no book is as long as a segment.
    """
    fitting = [book for book, size in enumerate(sizes) if size > segment]
    if not fitting:
        raise DataError(f"no book has more than {segment} tokens, a segment; give a shorter one")
    rng = np.random.default_rng(seed)
    order: list[int] = []
    at: list[Place | None] = [None] * lanes
    while True:
        for lane, place in enumerate(at):
            if place is not None and place.offset + 2 * segment < sizes[place.book]:
                at[lane] = Place(place.book, place.offset + segment, False)
                continue
            order = order or [fitting[i] for i in rng.permutation(len(fitting))]
            at[lane] = Place(order.pop(), 0, True)
        yield [place for place in at if place is not None]


def factor(progress: float) -> float:
    """Of the learning rate, at a share of the training."""
    return min(1.0, max(progress, 1e-3) / 0.05, max(0.02, (1 - progress) / 0.33))


@dataclass
class Progressed:
    """How far training is."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0


class Trainer:
    """Branches with their AdamW and what the lanes remember."""

    def __init__(self, args: Args, model: Any, books: list[NDArray]) -> None:
        self.args, self.settings = args, args.training
        model.requires_grad_(False)
        branches = Branches(
            self.settings.layers, self.settings.count, {"chunk_size": self.settings.chunk_size},
            self.settings.seed,
        )  # fmt: skip
        self.attached: Attached = branches.attach(model)
        self.decoder = WindowedDecoder(model, self.settings.window)
        self.books = books
        self.parameters = self.attached.parameters()
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=self.settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.01
        )
        self.at = Progressed()
        self.carried: State | None = None
        self.history: list[dict[str, float]] = []
        self._recent: list[Tensor] = []

    def share(self) -> float:
        """How much of the training is done."""
        if self.settings.steps is not None:
            return self.at.step / self.settings.steps
        return self.at.seconds / (60 * self.settings.minutes)

    def step(self, where: list[Place]) -> None:
        """One step. Raises NonFiniteError: of its loss or gradient, which `look` finds."""
        segment = self.settings.segment
        ids = torch.from_numpy(
            np.stack([self.books[p.book][p.offset : p.offset + segment + 1] for p in where]).astype(np.int64)
        ).to(self.decoder.device, non_blocking=True)
        fresh = torch.tensor([p.fresh for p in where], device=self.decoder.device)
        self.optimizer.zero_grad(set_to_none=True)
        output = self.decoder(
            ids[:, :-1], past_key_values=self._beginning(fresh), shift_labels=ids[:, 1:], use_cache=True
        )
        output.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.settings.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * factor(self.share())
        self.optimizer.step()
        self.carried = _memories(output.past_key_values)
        self._recent.append(torch.stack((output.loss.detach(), norm)))
        self.at.step += 1
        self.at.tokens += len(where) * segment

    def look(self) -> float:
        """Mean loss of the steps since the last look, for which this waits for the device."""
        loss, norm = torch.stack(self._recent).mean(0).tolist()
        self._recent = []
        if not loss + norm < float("inf"):
            raise NonFiniteError(f"the loss is {loss} and its gradient {norm}; give a lower learning rate")
        self.history.append({"step": self.at.step, "loss": loss, "gradient": norm})
        return loss

    def _beginning(self, fresh: Tensor) -> State | None:
        """What each lane remembers: nothing where a book begins."""
        if self.carried is None:
            return None
        begin = self.decoder.initial_state(len(fresh))
        layers: dict[int, LayerState] = {}
        for index, layer in begin.layers.items():
            layers[index] = dict(layer)
            for name, before in self.carried.layers[index].items():
                rows = fresh.view(-1, *[1] * (before.dim() - 1))
                layers[index][name] = torch.where(rows, layer[name], before)
        return State(layers, torch.where(fresh, 0, self.carried.clock))

    def save(self, path: Any) -> None:
        """A checkpoint: weights, optimiser, memories and progress."""
        assert self.carried is not None
        tensors = {f"branch/{name}": p.detach() for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            tensors |= {
                f"optimizer/{name}/{key}": value for key, value in self.optimizer.state[parameter].items()
            }
        for index, layer in self.carried.layers.items():
            tensors |= {f"state/{index}/{name}": value for name, value in layer.items()}
        tensors["clock"] = self.carried.clock
        notes = {"settings": _identity(self.settings), "at": asdict(self.at), "history": self.history}
        write_tensors(path, tensors, {"training": json.dumps(notes)})

    def load(self, path: Any) -> None:
        """Go on from a checkpoint. Raises ConfigError: it is of other settings."""
        tensors, metadata = read_tensors(path, str(self.decoder.device))
        notes = json.loads(metadata["training"])
        if notes["settings"] != _identity(self.settings):
            raise ConfigError(f"{path} is of a training with other settings; name another folder with --out")
        self.at, self.history = Progressed(**notes["at"]), notes["history"]
        layers: dict[int, LayerState] = {
            index: {} for index in range(len(self.decoder.initial_state(1).layers))
        }
        with torch.no_grad():
            for key, value in tensors.items():
                kind, _, rest = key.partition("/")
                if kind == "branch":
                    self.parameters[rest].copy_(value)
                elif kind == "optimizer":
                    name, _, slot = rest.rpartition("/")
                    self.optimizer.state[self.parameters[name]][slot] = (
                        value.cpu() if slot == "step" else value
                    )
                elif kind == "state":
                    index, _, name = rest.partition("/")
                    layers[int(index)][name] = value
        self.carried = State(layers, tensors["clock"])


def train(args: Args) -> dict[str, Any]:
    """Train what is not trained yet; what is kept of it beside the branches' file.

    Raises:
        ConfigError: a checkpoint of other settings. NonFiniteError: of a loss.
    """
    kept, path = args.out / "training.json", args.out / "training.safetensors"
    if kept.is_file() and args.branch_file.is_file():
        found = json.loads(kept.read_text())
        if found["settings"] != json.loads(json.dumps(asdict(args.training))):
            raise ConfigError(f"{kept} is of other settings; name another folder with --out")
        return found
    model, tokenizer = load_model(args.model, args.device, args.dtype)
    trainer = Trainer(args, model, read_books(args, tokenizer))
    if path.is_file():
        trainer.load(path)
    settings = args.training
    stream = places([len(book) for book in trainer.books], settings.lanes, settings.segment, settings.seed)
    for _ in range(trainer.at.step):
        next(stream)
    last = began = time.perf_counter()
    before, first = trainer.at.seconds, trainer.at.step
    with Progress() as bar:
        task = bar.add_task("training", total=1.0, completed=trainer.share())
        while trainer.share() < 1:
            trainer.step(next(stream))
            if trainer.at.step == first + 1:
                # Kernels are compiled in the first step.
                trainer.look()
                last = began = time.perf_counter()
            now = time.perf_counter()
            if trainer.at.step % 10 == 0 and trainer.at.step > first + 1:
                bar.update(task, description=f"training, loss {trainer.look():.3f}")
                now = time.perf_counter()
            trainer.at.seconds = before + now - began
            bar.update(task, completed=min(1.0, trainer.share()))
            if now - last > settings.save_seconds:
                trainer.save(path)
                # Saving is no training.
                began += time.perf_counter() - now
                last = time.perf_counter()
    trainer.save(path)
    trainer.attached.save(args.branch_file)
    found = {
        "settings": json.loads(json.dumps(asdict(settings))),
        "layers": list(trainer.attached.modules),
        "parameters": sum(p.numel() for p in trainer.parameters.values()),
        **asdict(trainer.at),
        "device": device_name(trainer.decoder.device),
        "branches": args.trained_branches(),
        "history": trainer.history,
    }
    write_json(kept, found)
    return found


def _memories(state: State) -> State:
    """What goes on after a segment: keys and values end with their window."""
    return State(
        {
            i: {n: x.detach() for n, x in layer.items() if not is_cache(n)}
            for i, layer in state.layers.items()
        },
        state.clock,
    )


def _identity(settings: Training) -> dict[str, Any]:
    """What a training that goes on must have in common with its beginning; it may last longer."""
    free = ("minutes", "steps", "save_seconds")
    return json.loads(json.dumps({k: v for k, v in asdict(settings).items() if k not in free}))
