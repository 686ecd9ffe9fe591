"""How likely a model finds given tokens, read as a stream of pieces through its State.

This is the one place where the suites call a model. Position t of a row is scored by the prediction made
after tokens 0 .. t-1 of that row: bits[t] = -log2 p(ids[t] | ids[:t]). Position 0 has no prediction and is
never scored.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nestor.errors import ConfigError, NonFiniteError
from nestor.models.state import State

PIECE = 2048
# Logits of one piece: at most this many numbers (1 GiB in float32).
_LOGIT_NUMBERS = 1 << 28

Progress = Callable[[int], None]
# Opens a progress bar of that title, which counts tokens.
Bar = Callable[[str], AbstractContextManager[Progress | None]]


@dataclass(frozen=True)
class Scores:
    """`bits` [B, T] float64, nan where not asked; `correct` [B, T] bool, the token is the likeliest one."""

    bits: Tensor
    correct: Tensor


@torch.inference_mode()
def stream_scores(
    model: Any, ids: Tensor, wanted: Tensor, *, piece: int = PIECE, progress: Progress | None = None
) -> Scores:
    """Score the wanted tokens of rows read from their beginning, `piece` tokens at a time, State carried.

    Args:
        ids: [B, T] int64. Shorter rows are filled up at the end with any id: later tokens change nothing
            before. wanted: [B, T] bool, tokens to score; column 0 must be False. Tokens after the last
            wanted one are not read. progress: called with the number of tokens read after each piece.

    Raises:
        ConfigError: column 0 is wanted, or the model keeps no cache and the text needs more than one piece.
        NonFiniteError: the model gives a score that is not finite.
    """
    return _continue(Stream(model, piece, progress), ids, wanted)


@dataclass(frozen=True)
class Branch:
    """Tokens read after the first `after` tokens of a trunk and then forgotten; `ids[start:]` is scored."""

    after: int
    ids: Sequence[int]
    start: int


@torch.inference_mode()
def score_branches(
    model: Any,
    trunks: Sequence[Sequence[int]],
    branches: Sequence[Sequence[Branch]],
    *,
    batch_size: int,
    prefix: Sequence[int] = (),
    piece: int = PIECE,
    progress: Progress | None = None,
) -> list[list[tuple[Tensor, Tensor]]]:
    """`(bits, correct)` of what each branch scores, as if its trunk up to it had been read anew.

    Each trunk is read once; at each branch the State is kept, the branch is read from it, and the trunk
    goes on from the kept State. `branches[i]` are those of trunk i, in order of `after`; branch j is at the
    same place in all trunks, so that trunks make a batch. `prefix` goes in front of every trunk.

    Raises:
        ConfigError: branch j of two trunks is at two places, or one is at the beginning or out of order.
    """
    _check_branches(trunks, branches)
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in trunks]
    for chosen in _batches(range(len(trunks)), batch_size):
        places = [branch.after for branch in branches[chosen[0]]]
        end = max(places, default=0)
        trunk = torch.as_tensor([[*prefix, *list(trunks[i])[:end]] for i in chosen])
        stream = Stream(model, piece, progress)
        read = 0
        for number, place in enumerate(places):
            if len(prefix) + place > read:
                stream.read(trunk[:, read : len(prefix) + place])
                read = len(prefix) + place
            mine = [branches[i][number] for i in chosen]
            scores = _continue(stream.fork(), *_pad([Row(b.ids, b.start, len(b.ids)) for b in mine]))
            for slot, (i, branch) in enumerate(zip(chosen, mine, strict=True)):
                here = slice(branch.start, len(branch.ids))
                found[i].append((scores.bits[slot, here], scores.correct[slot, here]))
    return found


def _check_branches(trunks: Sequence[Sequence[int]], branches: Sequence[Sequence[Branch]]) -> None:
    places = {tuple(branch.after for branch in mine) for mine in branches}
    if len(trunks) != len(branches) or len(places) > 1:
        raise ConfigError(f"branches are at different places of the trunks: {sorted(places)}; align them")
    for place in places:
        if any(after < 1 for after in place) or list(place) != sorted(place):
            raise ConfigError(f"branches are after {list(place)} tokens; give places from 1 on, in order")


class Stream:
    """A model that reads on from its State, `piece` tokens in one call."""

    def __init__(self, model: Any, piece: int, progress: Progress | None = None, state: Any = None) -> None:
        if piece < 1:
            raise ConfigError(f"piece is {piece}; it must be at least 1")
        self.model = model
        self.piece = piece
        self.progress = progress
        self.state = state
        self._begun = state is not None
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def fork(self, rows: int | None = None) -> Stream:
        """Another stream that has read the same. A State of Nestor is never changed by a call; the caches of
        other libraries are, and are copied. `rows`: so many times the only row."""
        state = self.state if isinstance(self.state, State) else copy.deepcopy(self.state)
        if rows is not None:
            index = torch.zeros(rows, dtype=torch.int64, device=self.model.device)
            if isinstance(state, State):
                state = state.select(index)
            else:
                state.reorder_cache(index)
        fork = Stream(self.model, self.piece, self.progress, state)
        fork._begun = self._begun
        return fork

    def read(self, ids: Tensor, keep: int = 1) -> Tensor:
        """Read ids [B, T] in pieces; logits of the last piece's last `keep` tokens, [B, keep, vocab_size]."""
        for part in ids.split(self.piece, dim=1):
            logits = self.step(part, min(keep, part.shape[1]))
        return logits

    def step(self, ids: Tensor, keep: int) -> Tensor:
        """Read ids [B, T] in one call; logits of the last `keep` tokens, [B, keep, vocab_size]."""
        if self._begun and self.state is None:
            raise ConfigError(
                f"{type(self.model).__name__} returns no cache, so it reads at most {self.piece} tokens, and "
                f"those at once. Ask for shorter texts or a longer piece"
            )
        output = self.model(
            input_ids=ids.to(self.model.device),
            past_key_values=self.state,
            use_cache=True,
            **({"logits_to_keep": keep} if self._keeps else {}),
        )
        self.state, self._begun = getattr(output, "past_key_values", None), True
        if self.progress is not None:
            self.progress(ids.numel())
        return output.logits[:, -keep:]


def _continue(stream: Stream, ids: Tensor, wanted: Tensor) -> Scores:
    """Score the wanted tokens of ids, which follow what the stream has read."""
    if bool(wanted[:, 0].any()):
        raise ConfigError("the first token of a row has no prediction; it cannot be scored")
    batch, length = ids.shape
    bits = torch.full((batch, length), float("nan"), dtype=torch.float64)
    correct = torch.zeros(batch, length, dtype=torch.bool)
    columns = wanted.any(dim=0).nonzero().flatten()
    # The last wanted token is a target only, never an input.
    end = int(columns[-1]) if len(columns) else 0
    step = max(1, min(stream.piece, _LOGIT_NUMBERS // (batch * int(stream.model.config.vocab_size))))
    for start in range(0, end, step):
        stop = min(start + step, end)
        used = wanted[:, start + 1 : stop + 1].any(dim=0).nonzero().flatten()
        first = int(used[0]) if len(used) else stop - start - 1
        here = slice(start + 1 + first, stop + 1)
        logits = stream.step(ids[:, start:stop], stop - start - first)
        if len(used):
            piece_bits, piece_correct = _score(logits, ids[:, here].to(logits.device))
            bits[:, here] = torch.where(wanted[:, here], piece_bits, bits[:, here])
            correct[:, here] = wanted[:, here] & piece_correct
    if not bool(torch.isfinite(bits[wanted]).all()):
        raise NonFiniteError(
            f"{type(stream.model).__name__} gave a score that is not finite; try --dtype float32, or check "
            f"the weights"
        )
    return Scores(bits, correct)


def _score(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Bits [B, n] float64 and whether the target is the argmax [B, n], on the CPU."""
    logits = logits.float()
    chosen = logits.gather(-1, targets[..., None]).squeeze(-1)
    bits = (torch.logsumexp(logits, dim=-1) - chosen) / math.log(2)
    return bits.double().cpu(), (logits.argmax(dim=-1) == targets).cpu()


@dataclass(frozen=True)
class Row:
    """Token ids, and the half-open range of those to score."""

    ids: Sequence[int]
    start: int
    end: int


def score_rows(
    model: Any,
    rows: Sequence[Row],
    *,
    batch_size: int,
    prefix: Sequence[int] = (),
    piece: int = PIECE,
    progress: Progress | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """`(bits [end - start], correct [end - start])` of each row, in the order given.

    Rows of like length share a batch. `prefix` goes in front of every row. Without a prefix a range that
    starts at 0 has nan for its first token: nothing predicts it.
    """

    def score(ids: Tensor, wanted: Tensor) -> Scores:
        return stream_scores(model, ids, wanted, piece=piece, progress=progress)

    return _in_batches(rows, batch_size, prefix, score)


@torch.inference_mode()
def score_after(
    model: Any,
    read: Sequence[int],
    rows: Sequence[Row],
    *,
    batch_size: int,
    piece: int = PIECE,
    progress: Progress | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """What `score_rows` gives for rows behind the tokens `read`, which are read once.

    Their State or cache is repeated for the rows; by a model without one they are read with each row.

    Raises:
        ConfigError: `read` has less than two tokens.
    """
    if len(read) < 2:
        raise ConfigError(f"{len(read)} tokens are to be read first; there must be at least two")
    stream = Stream(model, piece, progress)
    stream.read(torch.as_tensor([read[:-1]]))
    if not isinstance(stream.state, State) and not hasattr(stream.state, "reorder_cache"):
        return score_rows(model, rows, batch_size=batch_size, prefix=read, piece=piece, progress=progress)

    def score(ids: Tensor, wanted: Tensor) -> Scores:
        return _continue(stream.fork(len(ids)), ids, wanted)

    return _in_batches(rows, batch_size, read[-1:], score)


def score_choices(
    model: Any,
    prompt: Sequence[int],
    choices: Sequence[Sequence[int]],
    *,
    prefix: Sequence[int] = (),
    batch_size: int,
    piece: int = PIECE,
    progress: Progress | None = None,
) -> Tensor:
    """Bits of each choice as what follows the prompt, which is read once: float64 [len(choices)].

    `prefix` goes in front of the prompt. Raises as `score_after`.
    """
    rows = [Row(choice, 0, len(choice)) for choice in choices]
    read = [*prefix, *prompt]
    scored = score_after(model, read, rows, batch_size=batch_size, piece=piece, progress=progress)
    return torch.stack([bits.sum() for bits, _ in scored])


def _in_batches(
    rows: Sequence[Row], size: int, prefix: Sequence[int], score: Callable[[Tensor, Tensor], Scores]
) -> list[tuple[Tensor, Tensor]]:
    """`(bits, correct)` of each row's range, rows of like length together.

    score: of ids and which of them are wanted, [B, T] both."""
    found: list[tuple[Tensor, Tensor] | None] = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    for chosen in _batches(order, size):
        scores = score(*_pad([rows[i] for i in chosen], prefix))
        for slot, i in enumerate(chosen):
            here = slice(len(prefix) + rows[i].start, len(prefix) + rows[i].end)
            found[i] = (scores.bits[slot, here], scores.correct[slot, here])
    return [pair for pair in found if pair is not None]


def _pad(rows: Sequence[Row], prefix: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """Ids of rows behind the prefix, filled up at the end, and which are to be scored: [B, T] both."""
    lead = len(prefix)
    width = lead + max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    wanted = torch.zeros(len(rows), width, dtype=torch.bool)
    for slot, row in enumerate(rows):
        ids[slot, : lead + len(row.ids)] = torch.as_tensor([*prefix, *row.ids])
        wanted[slot, max(1, lead + row.start) : lead + row.end] = True
    return ids, wanted


@torch.inference_mode()
def greedy(stream: Stream, prompt: Sequence[int], count: int) -> list[int]:
    """`count` tokens after `prompt`, each the likeliest, read on from where the stream is."""
    answer: list[int] = []
    ids = torch.as_tensor([list(prompt)])
    for _ in range(count):
        ids = stream.read(ids)[:, -1].float().argmax(dim=-1, keepdim=True)
        answer.append(int(ids))
    return answer


def _batches(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    if size < 1:
        raise ConfigError(f"batch_size is {size}; it must be at least 1")
    for start in range(0, len(order), size):
        yield order[start : start + size]
