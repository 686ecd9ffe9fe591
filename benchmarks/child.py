"""One measurement in a process of its own: peak memory, a first call, training in several processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from settings import Settings, load
from subjects import build_layer, layer_step, model_step
from timing import memory_status, seconds


def peak(subject: str, s: Settings) -> int:
    """The other side of `timing.peak_memory`."""
    section, name = subject.split("/", 1)
    on_gpu = s.device == "cuda"
    before = 0 if on_gpu else memory_status("VmRSS")
    step = (
        model_step(name, s)[1]
        if section == "models"
        else layer_step(build_layer(name, s), s, s.tokens, s.batch)
    )
    for _ in range(3):
        step()
    return torch.cuda.max_memory_allocated() if on_gpu else memory_status("VmHWM") - before


def first_call(subject: str, s: Settings) -> dict[str, float]:
    """Seconds of the first and the second forward and backward of a layer of this process."""
    from bars import bar_layer, bar_step, parse_shape

    name, shape = subject.split("/")
    layer = bar_layer(name, s)
    if s.device == "cuda":
        torch.ones(8, 8, device="cuda").sum().item()  # the device is up
    step = bar_step(layer, s, *parse_shape(shape))
    return {"first": seconds(step, s.device), "second": seconds(step, s.device)}


def training(subject: str, s: Settings) -> dict[str, Any] | None:
    """The section training with the processes that torchrun started; subject: each T to recompute at."""
    from training import in_this_process

    return in_this_process(s, subject.split(","))


KINDS: dict[str, Callable[[str, Settings], Any]] = {
    "peak": peak,
    "first_call": first_call,
    "training": training,
}


def measure(argument: str) -> None:
    """Print as JSON what is wanted of `kind/...@settings`; None is not printed."""
    wanted, file = argument.split("@", 1)
    s = load(Path(file))
    torch.set_num_threads(s.threads)
    kind, subject = wanted.split("/", 1)
    found = KINDS[kind](subject, s)
    if found is not None:
        print(json.dumps(found), flush=True)
