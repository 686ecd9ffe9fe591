"""The sections that compare layers and models at one shape, on a CPU or a GPU."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from typing import Any

import torch
from rich.progress import Progress
from settings import PEER, REFERENCE, Settings
from subjects import LAYERS, build_layer, layer_decode, layer_step, model_step, size_of
from timing import interleaved, peak_memory, summary

from nestor.layers.neural_memory import NeuralMemory
from nestor.models.presets import count_parameters


def run_layers(s: Settings, progress: Progress) -> dict[str, Any]:
    names = [name for name in LAYERS if name != PEER or s.titans_pytorch is not None]
    layers = {name: build_layer(name, s) for name in names}
    steps = interleaved(
        {n: layer_step(layer, s, s.tokens, s.batch) for n, layer in layers.items()},
        s,
        progress,
        "layers, training",
    )
    decodes = interleaved(
        {n: layer_decode(layer, s) for n, layer in layers.items()}, s, progress, "layers, decoding"
    )
    reference = REFERENCE["layers"]
    task = progress.add_task("layers, memory", total=len(names))
    result = {}
    for name in names:
        result[name] = {
            "parameters": size_of(layers[name].module),
            "forward_backward": summary(steps[name], s.batch * s.tokens, steps[reference]),
            "decode": summary(decodes[name], s.batch * s.decode_tokens, decodes[reference]),
            "peak_bytes": peak_memory(f"layers/{name}", s),
        }
        progress.advance(task)
    return result


def run_models(s: Settings, progress: Progress) -> dict[str, Any]:
    names = [*s.models, *([] if s.titans_pytorch is None else [PEER])]
    built = {name: model_step(name, s) for name in names}
    times = interleaved({name: step for name, (_, step) in built.items()}, s, progress, "models, training")
    counts = {name: count_parameters(model) for name, (model, _) in built.items()}
    del built
    reference = times.get(REFERENCE["models"])
    task = progress.add_task("models, memory", total=len(names))
    result = {}
    for name in names:
        result[name] = {
            "parameters": counts[name],
            "step": summary(times[name], s.batch * s.tokens, reference),
            "peak_bytes": peak_memory(f"models/{name}", s),
        }
        progress.advance(task)
    return result


def run_length(s: Settings, progress: Progress) -> dict[str, Any]:
    layer = build_layer("neural_memory", s)
    steps = {str(t): layer_step(layer, s, t, batch=1) for t in s.lengths}
    times = interleaved(steps, dataclasses.replace(s, repeats=max(1, s.repeats // 3)), progress, "length")
    best = [min(times[str(t)]) for t in s.lengths]
    result: dict[str, Any] = {
        "layer": "neural_memory",
        "batch": 1,
        "seconds_min": dict(zip(map(str, s.lengths), best, strict=True)),
    }
    if len(s.lengths) > 1:
        # Least squares in logarithms: time ~ T^exponent.
        slope = statistics.linear_regression(
            [math.log(t) for t in s.lengths], [math.log(b) for b in best]
        ).slope
        per_token = [b / t for b, t in zip(best, s.lengths, strict=True)]
        result |= {"exponent": slope, "per_token_last_over_first": per_token[-1] / per_token[0]}
    return result


@torch.no_grad()
def run_long(s: Settings, progress: Progress) -> dict[str, Any]:
    task = progress.add_task("long", total=1)
    layer = build_layer("neural_memory", s)
    module = NeuralMemory(s.dim, s.heads).to(s.device)  # default settings, and those of the benchmark
    result = {}
    for name, call in {"benchmark": layer.call, "default": lambda x, state: module(x, state)}.items():
        x = torch.randn(1, s.long, s.dim, device=s.device)
        start = time.perf_counter()
        y, state = call(x, None)
        finite = all(bool(t.isfinite().all()) for t in [y, *state.values()])
        result[name] = {
            "tokens": s.long,
            "finite": finite,
            "largest_output": float(y.abs().max()),
            "largest_state": max(float(t.abs().max()) for t in state.values()),
            "seconds": time.perf_counter() - start,
        }
    progress.advance(task)
    return result


RUN = {"layers": run_layers, "models": run_models, "length": run_length, "long": run_long}
