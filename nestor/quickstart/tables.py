"""The summary: one column for each model, for the screen and for the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nestor.evaluation.report import with_interval
from nestor.evaluation.summary import summary_table
from nestor.training.logging import rate


def summary(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a quickstart's result."""
    evaluation, memory = result["evaluation"], result["memory"]
    columns, rows = summary_table(evaluation)
    names = columns[1:]
    trained = {run["name"]: run for run in result["training"]}
    rows[2:2] = [
        ["trained before", *[trained[name]["before"] or "no" for name in names]],
        ["trained here", *[_trained_here(trained[name]) for name in names]],
        ["training speed", *[_speed(trained[name]) for name in names]],
    ]
    beyond = evaluation["beyond_reach"]
    if beyond is not None:
        bits, recall = beyond["bits_per_byte"], beyond["recall"]
        late = f"bits per byte from {beyond['reach']:,} on"
        rows.append([late, *[with_interval(bits[name]) for name in names]])
        far = f"recall at {beyond['distance']:,}"
        if all(row[0] != far for row in rows):
            rows.append([far, *[with_interval(recall[name], as_percent=True) for name in names]])
    asked = memory["asked"]
    rows.append(["answers in a new process", *[_score(asked[name]) for name in names]])
    forgetful = {memory["remembering"]: _score(memory["after_forget"])}
    rows.append(["the same after /forget", *[forgetful.get(name, "-") for name in names]])
    return columns, rows


def _trained_here(run: Mapping[str, Any]) -> str:
    return f"{run['steps']:,} steps, {rate(run['tokens'])} tokens"


def _speed(run: Mapping[str, Any]) -> str:
    speed = run["metrics"].get("tokens_per_second")
    return "-" if speed is None else f"{rate(speed)} tokens/s"


def _score(asking: Mapping[str, Any]) -> str:
    return f"{asking['right']} of {len(asking['answers'])}"
