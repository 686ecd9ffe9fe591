"""Bits per byte on held-out text."""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from nestor.data import IGNORED, ByteTokenizer, LaneStream
from nestor.training.carrying import next_start
from nestor.training.distributed import Processes


@torch.no_grad()
def validate(
    model: nn.Module,
    stream: LaneStream,
    batches: int,
    tokenizer: Any,
    processes: Processes,
    *,
    carry: bool,
    autocast: Any,
) -> dict[str, float]:
    """Loss in nats per token, and bits per byte of the predicted text, over `batches` batches of `stream`.

    Bits per byte compare models with different tokenizers: all nats, those of end-of-document tokens too,
    over the UTF-8 bytes of the predicted tokens. The stream is read from its start each time.

    Args:
        carry: hand the State on from batch to batch, as the training does.
        autocast: makes the context of a forward call.
    """
    stream.position = 0
    training = model.training
    model.eval()
    # Nats stay on the device; they are read once, at the end.
    nats = torch.zeros((), device=processes.device)
    counts = torch.zeros(2, dtype=torch.int64)
    state = None
    for batch in islice(stream, batches):
        counts[0] += (batch["labels"] != IGNORED).sum()
        counts[1] += text_bytes(tokenizer, batch["labels"])
        inputs = {key: batch[key].to(processes.device) for key in ("input_ids", "labels", "resets")}
        with autocast():
            output = model(
                input_ids=inputs["input_ids"],
                shift_labels=inputs["labels"],
                num_items_in_batch=1,
                loss_only=True,
                resets=inputs["resets"],
                past_key_values=state,
                use_cache=carry,
            )
        nats += output.loss  # the sum over targets, as it is divided by 1
        state = next_start(output.past_key_values, "carry") if carry else None
    model.train(training)
    total = processes.sum(nats).item()
    tokens, size = processes.sum(counts.to(processes.device)).tolist()
    result = {"valid_loss": total / max(tokens, 1)}
    if size:
        result["valid_bits_per_byte"] = total / math.log(2) / size
    return result


def text_bytes(tokenizer: Any, labels: Tensor) -> int:
    """UTF-8 bytes of the text that `labels` `[B, T]` stand for; special tokens and -100 have none."""
    if isinstance(tokenizer, ByteTokenizer):
        return int(((labels >= 0) & (labels < 256)).sum())
    total = 0
    for row in labels.tolist():
        ids = [token for token in row if token != IGNORED]
        total += len(tokenizer.decode(ids, skip_special_tokens=True).encode("utf-8"))
    return total
