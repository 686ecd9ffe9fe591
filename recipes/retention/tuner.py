"""What outer training learns, and a step of it: through the updates of a stream, or without them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from drawing import Streams
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from nestor.errors import ConfigError, NonFiniteError
from nestor.evaluation.subjects import Subject
from nestor.files import read_tensors, write_tensors
from nestor.learning import Level, Unrolled

#: Where a level's rate is among what is learned.
RATE = "log_scale/"


@dataclass(frozen=True)
class Outer:
    """How outer training steps.

    Attributes:
        reach, caches: of `Unrolled`. together: streams of one graph. keep: how much old text counts.
    """

    learning_rate: float
    rate_learning_rate: float
    reach: int | None
    caches: bool
    together: int
    keep: float
    clip: float


class Tuner:
    """Initial weights, and learning rates of levels, with their AdamW.

    Args:
        subject: whose model stays as it is, and says what old text was to it.
        levels: with the learning rates to begin with.
        names: parameters whose beginning is learned. control: next-token loss in place of recall.
    """

    def __init__(
        self, subject: Subject, levels: Sequence[Level], names: Sequence[str], outer: Outer, *, control: bool
    ) -> None:
        model = subject.model.requires_grad_(False)
        self.model, self.levels, self.outer, self.control = model, levels, outer, control
        self._context = subject.context()
        self._own = dict(model.named_parameters())
        self.values = {name: self._own[name].detach().clone().requires_grad_() for name in names}
        self.scales = {
            level.name: torch.zeros((), device=model.device, requires_grad=True) for level in levels
        }
        self.learned = {**self.values, **{RATE + name: x for name, x in self.scales.items()}}
        groups = [
            {"params": list(self.values.values()), "lr": outer.learning_rate},
            {"params": list(self.scales.values()), "lr": outer.rate_learning_rate},
        ]
        self._optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
        self._streams: list[Unrolled] = []

    def rates(self) -> list[float]:
        """Learning rates of the levels."""
        return [level.learning_rate * float(self.scales[level.name].detach().exp()) for level in self.levels]

    def tuned_levels(self) -> list[Level]:
        """The levels with these rates."""
        return [replace(x, learning_rate=rate) for x, rate in zip(self.levels, self.rates(), strict=True)]

    @torch.no_grad()
    def write(self, model: Any) -> None:
        """Put what was learned into a model of the same parameters."""
        for name, value in self.values.items():
            model.get_parameter(name).copy_(value)

    def step(self, streams: Streams, old: Tensor, factor: float, *, fresh: bool) -> dict[str, float]:
        """One step, in which streams read on; its losses.

        Args:
            old: old text, int64 `[B, N, T]`. factor: of the learning rates.
            fresh: the streams have read nothing so far. Otherwise they are those of the last step.

        Raises:
            NonFiniteError: of the loss or its gradient.
        """
        self._optimizer.zero_grad()
        together, found = self.outer.together, {"recall": 0.0, "kept": 0.0}
        if fresh:
            self._streams = []
        parts = zip(streams.split(together), old.split(together), strict=True)
        for number, (part, texts) in enumerate(parts):
            share = len(part.asked) / len(streams.asked)
            recall, kept = self._control(part, texts) if self.control else self._recall(number, part, texts)
            ((recall + self.outer.keep * kept) * share).backward()
            found["recall"] += float(recall.detach()) * share
            found["kept"] += float(kept.detach()) * share
        parameters = [x for x in self.learned.values() if x.grad is not None]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.outer.clip))
        if not norm < float("inf"):
            raise NonFiniteError(
                f"the outer gradient is {norm} at a loss of {found}; give a lower --learning-rate, a smaller "
                f"--step, or a --largest-update"
            )
        for group, rate in zip(
            self._optimizer.param_groups,
            (self.outer.learning_rate, self.outer.rate_learning_rate),
            strict=True,
        ):
            group["lr"] = rate * factor
        self._optimizer.step()
        return {**found, "gradient": norm}

    def _recall(self, number: int, part: Streams, old: Tensor) -> tuple[Tensor, Tensor]:
        """Nats of an answer's token with the context gone; how far from the untuned model old text is."""
        scales = {name: x.exp() for name, x in self.scales.items()}
        if number == len(self._streams):
            fresh = Unrolled(
                self.model, self.levels, streams=len(part.asked), initial=self.values, scales=scales,
                reach=self.outer.reach, caches=self.outer.caches,
            )  # fmt: skip
            self._streams.append(fresh)
        else:
            self._streams[number].detach(scales)
        streams = self._streams[number]
        for document in part.session:
            streams.read(document)
        for document in part.gap:
            streams.read(document, through=False)
        recall = answer_nats(streams.logits(part.questions), part.questions, part.answers)
        # Before the stream and after it.
        kept = self._divergence(self._logits(old), old) + self._divergence(streams.logits(old), old)
        return recall, kept / 2

    def _control(self, part: Streams, old: Tensor) -> tuple[Tensor, Tensor]:
        """Next-token loss of sessions followed by their questions, read as ordinary training reads."""
        losses = []
        for row in range(len(part.asked)):
            answers = part.answers[row].long().flip(-1).cummax(-1).values.flip(-1).bool()
            asked = part.questions[row][answers]
            text = torch.cat([*(one[row, :-1] for one in part.session), asked])
            text = text[-self._context :][None]
            losses.append(F.cross_entropy(self._logits(text[None])[0, 0, :-1], text[0, 1:]))
        return torch.stack(losses).mean(), self._divergence(self._logits(old), old)

    def _logits(self, texts: Tensor) -> Tensor:
        """Of texts int64 `[B, N, T]` with the weights that streams begin with."""
        every = {**self._own, **self.values}
        found = functional_call(self.model, every, (texts.flatten(0, 1),), {"use_cache": False}).logits
        return found.unflatten(0, texts.shape[:2])

    def _divergence(self, logits: Tensor, texts: Tensor) -> Tensor:
        """KL from the untuned model to these predictions of texts, in nats a token."""
        with torch.no_grad():
            before = self.model(texts.flatten(0, 1), use_cache=False).logits.float().log_softmax(-1)
        now = logits.flatten(0, 1).float().log_softmax(-1)
        return F.kl_div(now, before, reduction="none", log_target=True).sum(-1).mean()

    def save(self, path: Path, notes: Mapping[str, str]) -> None:
        """What was learned and the state of AdamW, as one file."""
        tensors = {f"value/{name}": x for name, x in self.learned.items()}
        for name, x in self.learned.items():
            tensors |= {f"{key}/{name}": slot for key, slot in self._optimizer.state.get(x, {}).items()}
        write_tensors(path, tensors, notes)

    def load(self, path: Path) -> dict[str, str]:
        """Go on from a file of `save`; its notes.

        Raises:
            ConfigError: it is of another model or other levels.
        """
        tensors, notes = read_tensors(path)
        if {f"value/{name}" for name in self.learned} != {n for n in tensors if n.startswith("value/")}:
            raise ConfigError(f"{path} is of another model or other levels; remove it, or name another --out")
        with torch.no_grad():
            for key, tensor in tensors.items():
                slot, _, name = key.partition("/")
                own = self.learned[name]
                if slot == "value":
                    own.copy_(tensor)
                else:
                    # AdamW counts its steps on the CPU.
                    place = tensor if slot == "step" else tensor.to(own.device)
                    self._optimizer.state[own][slot] = place
        return notes


def answer_nats(logits: Tensor, questions: Tensor, answers: Tensor) -> Tensor:
    """Mean nats of the tokens of answers. logits `[B, N, T, V]`, questions and answers `[B, N, T]`."""
    nats = F.cross_entropy(
        logits[:, :, :-1].flatten(0, 2).float(), questions[:, :, 1:].flatten(), reduction="none"
    )
    counted = answers[:, :, 1:].flatten().to(nats)
    return (nats * counted).sum() / counted.sum()
