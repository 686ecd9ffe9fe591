"""One model, one language, one seed: training on sets of legal symbols, and how many strings are right."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from entries import build
from torch import Tensor
from torch.nn import functional as F

from nestor.data.tasks.formal_languages import (
    FormalBatch,
    FormalLanguage,
    distinct_strings,
    draw_strings,
    formal_batch,
    formal_language,
)

# Beside the folders of the recipes lies what they share.
sys.path.append(str(Path(__file__).parents[1]))
from captured import CapturedLoss, own_queue

#: What a generator of random numbers is for, so that none is used twice.
TRAINING, VALIDATION, TEST = 1, 2, 3
#: The seed of the runs that choose a learning rate; no test string is drawn by it.
TUNING_SEED = 1_000_003
#: Strings that are read at the same time when they are scored.
SCORED = 64


@dataclass(frozen=True)
class Trial:
    """Everything that a run depends on."""

    model: str
    language: str
    seed: int
    learning_rate: float
    steps: int
    batch_size: int
    width: int
    layers: int
    chunk_size: int
    bins: tuple[tuple[int, int], ...]
    """Least and greatest length of each bin; the first is that of training."""
    strings: int
    """Strings of a bin that are scored."""

    def settings(self) -> dict[str, Any]:
        """The same as JSON."""
        return json.loads(json.dumps(asdict(self)))


def run_trial(trial: Trial, device: str = "cpu") -> dict[str, Any]:
    """Train and score; the result is JSON. A run whose loss is not finite has no strings right."""
    begin = time.perf_counter()
    language = formal_language(trial.language)
    model = build(
        trial.model, language.vocab_size, width=trial.width, layers=trial.layers,
        chunk_size=trial.chunk_size, seed=trial.seed,
    ).to(device)  # fmt: skip
    loss = train(model, language, trial)
    purpose = VALIDATION if trial.seed == TUNING_SEED else TEST
    bins = []
    for number, lengths in enumerate(trial.bins):
        rng = np.random.default_rng((trial.seed, purpose, number))
        strings = distinct_strings(language, rng, lengths, trial.strings)
        scored = score(model, language, strings) if math.isfinite(loss) else {"right": 0, "places": 0.0}
        bins.append({"lengths": list(lengths), "n": len(strings), **scored})
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": loss if math.isfinite(loss) else None,
        "bins": bins,
        "seconds": round(time.perf_counter() - begin, 1),
    }


def train(model: Any, language: FormalLanguage, trial: Trial) -> float:
    """AdamW with a linear warm-up over a twentieth of the steps, then linearly to 0.

    Returns the mean loss of the last tenth; no number as soon as a loss is not finite."""
    optimizer = torch.optim.AdamW(
        model.parameters(), trial.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    warm = max(1, trial.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (trial.steps - step) / max(1, trial.steps - warm))
    )
    model.train()
    loss_of = SetLoss(model, model.device)
    # A graph is of one shape; on a CPU what is read beyond the longest string takes time.
    width = 1 + trial.bins[0][1] if model.device.type == "cuda" else None
    last = []
    with own_queue(model.device):
        for step in range(trial.steps):
            rng = np.random.default_rng((trial.seed, TRAINING, step))
            strings = draw_strings(language, rng, trial.bins[0], trial.batch_size)
            loss = loss_of(formal_batch(language, strings, width))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            # The one wait for a GPU in a step.
            last = [*last, loss.item()][-max(1, trial.steps // 10) :]
            if not math.isfinite(last[-1]):
                return math.nan
    return float(np.mean(last))


class SetLoss(CapturedLoss):
    """Nats of binary cross-entropy, the mean over symbols and the places of strings."""

    def __call__(self, batch: FormalBatch) -> Tensor:
        """Of a batch; the next call may overwrite it."""
        parts = {"ids": batch.ids, "legal": batch.legal, "counted": batch.counted}
        return self.of({name: torch.from_numpy(part) for name, part in parts.items()})

    def loss(self, inputs: dict[str, Tensor]) -> Tensor:
        """In float32."""
        counted = inputs["counted"].unsqueeze(-1)
        logits = self.model(inputs["ids"], use_cache=False).logits.float()
        each = F.binary_cross_entropy_with_logits(logits, inputs["legal"].float(), reduction="none")
        return torch.where(counted, each, 0.0).sum() / (counted.sum() * logits.shape[-1])


def logits_of(model: Any, batch: FormalBatch) -> Tensor:
    """`[B, T, V]` in float32. Padding is at the end, where it changes nothing before."""
    ids = torch.from_numpy(batch.ids).to(model.device)
    return model(ids, use_cache=False).logits.float()


@torch.inference_mode()
def score(model: Any, language: FormalLanguage, strings: list[str]) -> dict[str, Any]:
    """`right`: strings whose sets are right at all places, a symbol being named where its sigmoid is at least
    0.5; `places`: the share of places that are right."""
    model.eval()
    right, places, counted = 0, 0, 0
    for start in range(0, len(strings), SCORED):
        batch = formal_batch(language, strings[start : start + SCORED])
        named = (logits_of(model, batch) >= 0).cpu().numpy()
        right += int(batch.solved(named).sum())
        places += int(((named == batch.legal).all(axis=-1) & batch.counted).sum())
        counted += int(batch.counted.sum())
    return {"right": right, "places": places / counted}
