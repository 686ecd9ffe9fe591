"""What a model with levels recalls of streams that it was not tuned on, read as `nestor learn` reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from drawing import Drawer, Streams
from torch.nn import functional as F
from tuner import answer_nats

from nestor.evaluation.retention.questions import ask
from nestor.evaluation.retention.students import Reader
from nestor.evaluation.statistics import wilson_interval
from nestor.learning import Learner, Level

#: Streams of "training" from this seed on are for measuring.
HELD_OUT = 10**9
WORDS = {"known words": ("training", HELD_OUT), "new words": ("validation", 0)}
MOMENTS = ("at once", "after the gap")


def measure(
    model: Any,
    levels: Sequence[Level],
    drawer: Drawer,
    *,
    count: int,
    sessions: int,
    gap: int,
    done: Callable[[], None],
) -> dict[str, Any]:
    """Recall of `count` streams of sessions, each asked about its last session, by words and by moment.

    Words are those of training, said of new entities, or those of the retention suite, which no training
    stream has. Of each: the share of right answers among the candidates with its interval (facts count as
    independent), the mean margin to the best other, and nats of an answer's token.
    """
    learner = Learner(model, levels)
    found: dict[str, Any] = {}
    for words, (stream, first) in WORDS.items():
        rows: dict[str, list[Any]] = {moment: [] for moment in MOMENTS}
        for seed in range(first, first + count * sessions):
            streams = drawer.draw([seed], gap, stream)
            if seed % sessions == first % sessions:
                reader = Reader(learner, drawer.context)
            for moment, documents in zip(MOMENTS, (streams.session, streams.gap), strict=True):
                for document in documents:
                    reader.study(document[0].tolist())
                rows[moment].append(_asked(learner, reader, drawer, streams))
            done()
        found[words] = {moment: _summary(answered) for moment, answered in rows.items()}
    return found


def _asked(learner: Learner, reader: Reader, drawer: Drawer, streams: Streams) -> tuple[list[Any], float]:
    questions = [q for kind in drawer.kinds for q in streams.asked[0].questions(kind)]
    with learner.applied(reader.state) as model, torch.no_grad():
        answers = ask(model, drawer.tokenizer, questions, prefix=drawer.prefix)
        here = streams.to(model.device)
        logits = model(here.questions[0], use_cache=False).logits[None]
        return answers, float(answer_nats(logits, here.questions, here.answers))


def _summary(answered: Sequence[tuple[list[Any], float]]) -> dict[str, Any]:
    answers = [a for one, _ in answered for a in one]
    return {
        "recall": wilson_interval(sum(a.correct for a in answers), len(answers)).as_dict(),
        "margin": float(np.mean([a.margin for a in answers])),
        "nats": float(np.mean([nats for _, nats in answered])),
    }


@torch.no_grad()
def bits(model: Any, texts: torch.Tensor) -> float:
    """Bits a token of texts int64 `[N, T]`."""
    found = []
    for part in texts.split(16):
        logits = model(part, use_cache=False).logits[:, :-1].float()
        found.append(F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none"))
    return float(torch.cat(found).mean() / np.log(2))
