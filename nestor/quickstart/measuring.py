"""What both models are measured on: bits per byte by position, and recall of planted facts by distance."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from nestor.data import load_tokenizer
from nestor.evaluation import Settings, Subject, evaluate
from nestor.evaluation.statistics import (
    paired_proportion_difference,
    paired_ratio_differences,
    ratio_intervals,
    wilson_interval,
)
from nestor.evaluation.suites import Bar
from nestor.quickstart.recipe import Entrant, recall_source, text_of
from nestor.training.model import open_model

# Multiple of the attention reach at which recall is summed up in one number.
FAR = 4


def open_subject(entrant: Entrant) -> Subject:
    """The trained model of an entrant, in evaluation mode, on a GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = open_model(entrant.final, torch.float32).to(device).eval()
    return Subject(entrant.name, model, load_tokenizer(str(entrant.final)), str(entrant.final))


def settings_for(entrant: Entrant, max_length: int | None, seed: int) -> Settings:
    """Held-out text of the recipe and facts as it plants them, up to `max_length` tokens or 16 segments."""
    config = entrant.config
    source = recall_source(config)
    options = source.options if source is not None else {}
    templates = options.get("templates", Settings.templates)
    return Settings(
        lengths=() if max_length is None else (max_length,),
        seeds=(seed,),
        corpus=text_of(config),
        split="valid",
        recall_tasks=("facts",),
        facts=options.get("n_facts", Settings.facts),
        digits=options.get("digits", Settings.digits),
        templates=(templates,) if isinstance(templates, str) else tuple(templates),
        train_length=config.data.sequence_length,
        by_context=False,
        piece=512,
    )


def measure(
    subjects: Sequence[Subject], settings: Settings, passages: int, questions: int, bar: Bar
) -> dict[str, Any]:
    """Both suites as one result of `nestor.evaluation.evaluate`, to which comes `beyond_reach`.

    Args:
        passages: texts that are read for bits per byte. questions: questions at each distance.
    """
    parts = [
        evaluate(subjects, replace(settings, suites=(suite,), repeats=count), name="quickstart", bar=bar)
        for suite, count in (("perplexity", passages), ("recall", questions))
    ]
    result = parts[0]
    result["results"] |= parts[1]["results"]
    result["settings"] |= {"suites": ["perplexity", "recall"], "repeats": [passages, questions]}
    result["beyond_reach"] = beyond_reach(result)
    return result


def beyond_reach(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """Both measurements where no attention of either model reaches; None if nothing was measured there.

    Recall is that at one distance: questions at several distances about one text are not independent. It is
    the first that is at least `FAR` times the attention reach, or the greatest. Bits per byte are those of
    all tokens with at least the reach before them. Differences are the second model's minus the first's, on
    the same questions and texts.
    """
    reaches = [model["attention_reach"] for model in result["models"]]
    if None in reaches:
        return None
    reach = max(reaches)
    recall, bits = result["results"]["recall"]["models"], result["results"]["perplexity"]["models"]
    first, second = recall
    distances = [int(distance) for distance in recall[first]["exact"] if int(distance) >= reach]
    edges = next(iter(bits.values()))["by_position"]["edges"]
    columns = [i for i, (low, _) in enumerate(itertools.pairwise(edges)) if low >= reach]
    if not columns or not distances:
        return None
    distance = min((d for d in distances if d >= FAR * reach), default=max(distances))
    exact = {name: part["exact"][str(distance)] for name, part in recall.items()}
    sums = {
        name: tuple(np.asarray(part["sums"][key])[:, columns].sum(axis=1) for key in ("bits", "bytes"))
        for name, part in bits.items()
    }
    seed = result["settings"]["seeds"][0]
    difference = paired_proportion_difference(exact[second], exact[first])
    spared = paired_ratio_differences(sums[second], sums[first], seed=seed)[0]  # type: ignore[arg-type]
    return {
        "reach": reach,
        "distance": distance,
        "recall": {name: wilson_interval(sum(row), len(row)).as_dict() for name, row in exact.items()},
        "recall_difference": difference.as_dict(),
        "bits_per_byte": {
            name: ratio_intervals(*pair, seed=seed)[0].as_dict() for name, pair in sums.items()
        },
        "bits_difference": spared.as_dict(),
    }
