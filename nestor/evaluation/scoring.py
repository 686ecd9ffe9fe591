"""How likely a model finds given tokens, read as a stream of pieces through its State.
 This is the one place where the suites call a model. Position t of a row is scored by the prediction made
after tokens 0 .. t-1 of that row: bits[t] = -log2 p(ids[t] | ids[:t]). Position 0 has no prediction and is
never scored.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nestor.errors import ConfigError, NonFiniteError

PIECE = 2048
# Logits of one piece: at most this many numbers (1 GiB in float32).
_LOGIT_NUMBERS = 1 << 28

Progress = Callable[[int], None]


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
    if bool(wanted[:, 0].any()):
        raise ConfigError("the first token of a row has no prediction; it cannot be scored")
    if piece < 1:
        raise ConfigError(f"piece is {piece}; it must be at least 1")
    batch, length = ids.shape
    bits = torch.full((batch, length), float("nan"), dtype=torch.float64)
    correct = torch.zeros(batch, length, dtype=torch.bool)
    columns = wanted.any(dim=0).nonzero().flatten()
    if not len(columns):
        return Scores(bits, correct)
    # The last wanted token is a target only, never an input.
    end = int(columns[-1])
    step = max(1, min(piece, _LOGIT_NUMBERS // (batch * int(model.config.vocab_size))))
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    state = None
    for start in range(0, end, step):
        stop = min(start + step, end)
        targets = ids[:, start + 1 : stop + 1].to(model.device)
        asked = wanted[:, start + 1 : stop + 1]
        used = asked.any(dim=0).nonzero().flatten()
        first = int(used[0]) if len(used) else stop - start - 1
        extra = {"logits_to_keep": stop - start - first} if keeps else {}
        output = model(
            input_ids=ids[:, start:stop].to(model.device), past_key_values=state, use_cache=True, **extra
        )
        state = getattr(output, "past_key_values", None)
        if state is None and stop < end:
            raise ConfigError(
                f"{type(model).__name__} returns no cache, so it reads at most {step} tokens at once; "
                f"{end} are asked for. Ask for shorter texts or a longer piece"
            )
        if len(used):
            here = slice(start + 1 + first, stop + 1)
            piece_bits, piece_correct = _score(
                output.logits[:, -(stop - start - first) :], targets[:, first:]
            )
            bits[:, here] = torch.where(asked[:, first:], piece_bits, bits[:, here])
            correct[:, here] = asked[:, first:] & piece_correct
        if progress is not None:
            progress(batch * (stop - start))
    if not bool(torch.isfinite(bits[wanted]).all()):
        raise NonFiniteError(
            f"{type(model).__name__} gave a score that is not finite; try --dtype float32, or check the "
            f"weights"
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
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
    lead = len(prefix)
    found: list[tuple[Tensor, Tensor] | None] = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    for chosen in _batches(order, batch_size):
        width = lead + max(len(rows[i].ids) for i in chosen)
        ids = torch.zeros(len(chosen), width, dtype=torch.int64)
        wanted = torch.zeros(len(chosen), width, dtype=torch.bool)
        for slot, i in enumerate(chosen):
            ids[slot, : lead + len(rows[i].ids)] = torch.as_tensor([*prefix, *rows[i].ids])
            wanted[slot, max(1, lead + rows[i].start) : lead + rows[i].end] = True
        scores = stream_scores(model, ids, wanted, piece=piece, progress=progress)
        for slot, i in enumerate(chosen):
            here = slice(lead + rows[i].start, lead + rows[i].end)
            found[i] = (scores.bits[slot, here], scores.correct[slot, here])
    return [pair for pair in found if pair is not None]


@torch.inference_mode()
def greedy(model: Any, prompt: Sequence[int], count: int, *, piece: int = PIECE) -> list[int]:
    """`count` tokens after `prompt`, each the likeliest; the prompt is read in pieces, the State carried."""
    state, answer = None, []
    ids = torch.as_tensor([list(prompt)], device=model.device)
    pieces: Iterable[Tensor] = ids.split(piece, dim=1)
    for _ in range(count):
        for part in pieces:
            output = model(input_ids=part, past_key_values=state, use_cache=True)
            state = output.past_key_values
        token = output.logits[:, -1].float().argmax(dim=-1, keepdim=True)
        answer.append(int(token))
        pieces = [token]
    return answer


def _batches(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(order), size):
        yield order[start : start + size]
