"""A conversation with a model whose weights learn from what the user writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nestor.cli.conversation import Conversation
from nestor.data.tokenizers import StreamDecoder
from nestor.errors import ConfigError, DataError
from nestor.learning import Learner
from nestor.models.state import State


class LearningConversation(Conversation):
    """Turns over the State of a `Learner`, which learns from what the user writes and not from its own words.

    limit: tokens of a context. Before a turn that would exceed it the context is closed: what was learned
    stays, the turns themselves are gone.
    """

    def __init__(self, learner: Learner, tokenizer: Any, limit: int, state: State | None = None) -> None:
        super().__init__(learner.model, tokenizer, state or learner.start())
        self.learner, self.limit = learner, limit
        self.logits: Tensor | None = None

    def reply(self, text: str, arguments: dict[str, Any], on_text: Callable[[str], None]) -> str:
        """As a Conversation's. Raises DataError for a turn that no context has room for."""
        needed = len(self._wrap(text)[0]) + arguments["max_new_tokens"]
        if needed + self.read > self.limit and self.read:
            self.state = self.learner.close(self._learned())
            needed = len(self._wrap(text)[0]) + arguments["max_new_tokens"]
        if needed > self.limit:
            raise DataError(
                f"this turn and its answer may take {needed} tokens, and the model reads {self.limit}; write "
                f"less, or lower --max-new-tokens"
            )
        return super().reply(text, arguments, on_text)

    def replace(self, state: State | None) -> None:
        """Go on from another State (None: from nothing)."""
        super().replace(state or self.learner.start())

    def described(self) -> str:
        """What each level has done."""
        reports = self.learner.report(self._learned())[0]
        return ", ".join(f"{r.name}: {r.updates:,} updates, change {r.change:.1e}" for r in reports)

    def surprise(self) -> list[tuple[str, float]]:
        """Pieces of text of the last turn, and how little each was expected (nats of its least expected
        token). Raises ConfigError before the first turn."""
        if self.last is None or self.logits is None:
            raise ConfigError("there is no turn yet to show; say something first.")
        ids = torch.tensor(self.last.ids[1:], device=self.logits.device)
        nats = [0.0, *F.cross_entropy(self.logits[:-1].float(), ids, reduction="none").tolist()]
        decoder, pieces, pending = StreamDecoder(self.tokenizer), [], 0.0
        for token, value in zip(self.last.ids, nats, strict=True):
            pending = max(pending, value)
            if piece := decoder.push([token]):
                pieces.append((piece, pending))
                pending = 0.0
        return pieces

    def _extend(
        self, ids: list[int], arguments: dict[str, Any], tail: Callable[[list[int]], list[int]]
    ) -> tuple[list[int], State]:
        state = self._learned()
        prompt = torch.tensor([ids], device=state.device)
        answer = self.learner.generate(prompt, state, use_cache=True, **arguments)[0].tolist()
        fed = torch.tensor([ids + answer + tail(answer)], device=state.device)
        weights = torch.zeros(fed.shape)
        weights[:, : len(ids)] = 1
        logits, state = self.learner.read(fed, state, weights)
        self.logits = logits[0]
        return answer, state

    def _learned(self) -> State:
        assert self.state is not None
        return self.state
