"""The sections of the bars that look at layers: shapes, growth, first_call, users.

Layers compute in bfloat16 under autocast and take inputs of that dtype, except titans-pytorch, which mixes
dtypes of such inputs and gets float32 ones.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from rich.progress import Progress
from rounds import Deadline, Step, attempt, capture_graph, measure
from settings import PEER, Settings
from subjects import Layer, build_memory, build_titans_pytorch, nestor_layer, size_of
from timing import in_a_process

from nestor.layers.attention import Attention
from nestor.layers.fla import DeltaAttention, load_kernels
from nestor.layers.self_modifying import SelfModifyingMemory
from nestor.layers.span import Span
from nestor.layers.tnt import FIXED, TNT

Keep = Callable[[dict[str, Any]], None]
REFERENCES = ("neural_memory", "kda", "nestor-kda", "titans-pytorch-x2", "titans-pytorch-x4")
SUBJECT = "neural_memory"
DOCUMENT_TOKENS = 1000


def _tnt(s: Settings) -> Layer:
    b = s.bars
    memory = build_memory(dataclasses.replace(s, chunk=b.tnt_chunk), **FIXED)
    return nestor_layer(TNT(memory, b.tnt_locals, b.tnt_shard))


def _packed(s: Settings) -> Layer:
    """The memory on documents of some 1,000 tokens, one after another, each with a memory of its own."""
    module = build_memory(s)

    @functools.cache
    def span(batch: int, tokens: int) -> Span:
        generator = torch.Generator().manual_seed(0)
        resets = torch.rand(batch, tokens, generator=generator) < 1 / DOCUMENT_TOKENS
        return Span.build(None, batch, tokens, s.device, resets=resets.to(s.device))

    return Layer(module, lambda x, state: module(x, state, span(*x.shape[:2])))


def _kda(s: Settings) -> Layer:
    """The layer of flash-linear-attention itself, with its fused convolutions, gates and norm."""
    load_kernels("kda")  # says what is missing
    from fla.layers import KimiDeltaAttention

    module = KimiDeltaAttention(s.dim, head_dim=s.dim // s.heads, num_heads=s.heads, layer_idx=0)
    return Layer(module, lambda x, state: (module(x)[0], None))


def _peer(expansion: int) -> Callable[[Settings], Layer]:
    def build(s: Settings) -> Layer:
        if s.titans_pytorch is None:
            raise LookupError("its folder is not given (--titans-pytorch)")
        return build_titans_pytorch(dataclasses.replace(s, expansion=expansion))

    return build


LAYERS: dict[str, Callable[[Settings], Layer]] = {
    SUBJECT: lambda s: nestor_layer(build_memory(s)),
    "neural_memory-packed": _packed,
    "tnt": _tnt,
    "self_modifying": lambda s: nestor_layer(SelfModifyingMemory(s.dim, s.heads, chunk_size=s.chunk)),
    "attention": lambda s: nestor_layer(Attention(s.dim, s.heads)),
    "kda": _kda,
    "nestor-kda": lambda s: nestor_layer(DeltaAttention(s.dim, s.heads, "kda")),
    "titans-pytorch-x2": _peer(2),
    "titans-pytorch-x4": _peer(4),
}


def parse_shape(shape: str) -> tuple[int, int]:
    """B and T of "BxT"."""
    batch, tokens = shape.split("x")
    return int(batch), int(tokens)


def bar_layer(name: str, s: Settings) -> Layer:
    """A layer of `LAYERS` on the device."""
    torch.manual_seed(0)
    layer = LAYERS[name](s.for_bars())
    layer.module.to(s.device)
    return layer


def bar_step(layer: Layer, s: Settings, batch: int, tokens: int, name: str = SUBJECT) -> Step:
    """Forward and backward of one call, to every parameter and the input."""
    bars = s.for_bars()
    plain = bars.dtype != "bfloat16" or name.startswith(PEER)
    dtype = torch.float32 if plain else torch.bfloat16

    x = torch.randn(batch, tokens, bars.dim, device=s.device, dtype=dtype, requires_grad=True)
    upstream = torch.randn_like(x.detach())

    def step() -> None:
        try:
            with bars.autocast():
                y, _ = layer.call(x, None)
            y.backward(upstream.to(y.dtype))
        finally:
            layer.module.zero_grad(set_to_none=True)
            x.grad = None

    return step


def run_shapes(s: Settings, progress: Progress, keep: Keep) -> dict[str, Any]:
    """Forward and backward of every layer at every shape, in tokens/s and bytes, and ratios to the peers.

    `peak_bytes`: the layer's parameters, and what a step adds to them and its input at most.
    """
    b = s.bars
    layers: dict[str, Layer] = {}
    missing: dict[str, str] = {}
    for name in b.subjects:
        failure = attempt(lambda name=name: layers.__setitem__(name, bar_layer(name, s)))
        if failure is not None:
            missing[name] = failure
    result: dict[str, Any] = {"left_out": missing}
    begin = Deadline(b.compile_seconds)
    task = progress.add_task("shapes", total=len(b.shapes))
    for index, shape in enumerate(b.shapes):
        batch, tokens = parse_shape(shape)
        steps = {n: bar_step(layer, s, batch, tokens, n) for n, layer in layers.items()}
        measured = measure(steps, s.device, b.repeats, b.seconds / len(b.shapes), begin)
        found: dict[str, Any] = {}
        for name, one in measured.items():
            found[name] = {"parameters": size_of(layers[name].module), **one.summary(batch * tokens)}
            if one.peak is not None:
                found[name]["peak_bytes"] = one.peak + 4 * size_of(layers[name].module)
        for name, one in measured.items():
            for reference in REFERENCES:
                other = measured.get(reference)
                if other is not None and other.seconds and one.seconds:
                    found[name] |= _ratios(found, name, reference)
        result[shape] = found
        keep(result)
        progress.update(task, completed=index + 1)
    return result


def _ratios(found: dict[str, Any], name: str, reference: str) -> dict[str, float]:
    own, other = found[name], found[reference]
    ratios = {f"speed_over_{reference}": own["tokens_per_second"] / other["tokens_per_second"]}
    if own.get("peak_bytes") and other.get("peak_bytes"):
        ratios[f"peak_over_{reference}"] = own["peak_bytes"] / other["peak_bytes"]
    return ratios


def run_growth(s: Settings, progress: Progress, keep: Keep) -> dict[str, Any]:
    """Forward and backward of the memory layer on one sequence of T tokens, against T."""
    b = s.bars
    task = progress.add_task("growth", total=1)
    layer = bar_layer(SUBJECT, s)
    steps = {str(t): bar_step(layer, s, 1, t) for t in b.lengths}
    measured = measure(steps, s.device, b.repeats, b.seconds, Deadline(b.compile_seconds))
    result: dict[str, Any] = {"layer": SUBJECT, "batch": 1}
    first = measured[str(b.lengths[0])]
    for t in b.lengths:
        one = measured[str(t)]
        result[str(t)] = one.summary(t)
        if one.seconds and first.seconds:
            base = result[str(b.lengths[0])]["seconds_median"] / b.lengths[0]
            result[str(t)]["token_time_over_first"] = result[str(t)]["seconds_median"] / t / base
    progress.advance(task)
    return result


def run_first_call(s: Settings, progress: Progress, keep: Keep) -> dict[str, Any]:
    """The first forward and backward of a fresh process, with empty caches of kernels and with full ones."""
    shape = s.bars.shapes[0]
    task = progress.add_task("first_call", total=2)
    result: dict[str, Any] = {"layer": SUBJECT, "shape": shape}
    with tempfile.TemporaryDirectory() as folder:
        names = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME")
        caches = {name: os.path.join(folder, name) for name in names}
        for name in ("cold", "warm"):
            result[name] = in_a_process(f"first_call/{SUBJECT}/{shape}", s, caches)
            progress.advance(task)
    return result


@torch.no_grad()
def run_users(s: Settings, progress: Progress, keep: Keep) -> dict[str, Any]:
    """One token of every user, from the state after `read` tokens, against a copy of that state.

    `copy` reads and writes as many bytes as the state has. `graph` is the step replayed as a CUDA graph,
    `eager` one of `chunk` steps one after the other, in which every place in a chunk occurs once.
    """
    b = s.bars
    layer = bar_layer(SUBJECT, s)
    dtype = torch.bfloat16 if b.dtype == "bfloat16" else torch.float32
    task = progress.add_task("users", total=len(b.read))
    result: dict[str, Any] = {"layer": SUBJECT, "users": b.users}
    autocast = s.for_bars().autocast
    for read in b.read:
        state: Any = None
        with autocast():
            for start in range(0, read, b.slice):
                size = min(b.slice, read - start)
                x = torch.randn(b.users, size, b.dim, device=s.device, dtype=dtype)
                _, state = layer.call(x, state)
        token = torch.randn(b.users, 1, b.dim, device=s.device, dtype=dtype)
        with autocast():
            # A first step lays the state out as later steps find it.
            _, state = layer.call(token, state)
        opened = state
        values = [tensor for tensor in opened.values() if isinstance(tensor, torch.Tensor)]
        source = torch.empty(sum(tensor.nbytes for tensor in values), dtype=torch.uint8, device=s.device)
        target = torch.empty_like(source)

        def one(before: Any = opened, token: torch.Tensor = token) -> Any:
            with autocast():
                return layer.call(token, before)[1]

        def many(opened: Any = opened, one: Callable[..., Any] = one) -> None:
            after = opened
            for _ in range(b.chunk):
                after = one(after)

        steps: dict[str, Step] = {"eager": many, "copy": lambda a=target, b=source: a.copy_(b)}
        found: dict[str, Any] = {"state_bytes": source.nbytes}
        if s.device == "cuda":
            graph = torch.cuda.CUDAGraph()
            failure = attempt(lambda one=one, graph=graph: capture_graph(graph, one))
            if failure is None:
                steps["graph"] = lambda graph=graph: graph.replay()
            else:
                found["graph"] = {"failure": failure}
        measured = measure(steps, s.device, b.repeats, b.seconds / len(b.read))
        for name, taken in measured.items():
            if name == "eager":
                taken.seconds = [seconds / b.chunk for seconds in taken.seconds]
            found[name] = taken.summary(b.users)
            if taken.seconds and measured["copy"].seconds and name != "copy":
                copy = measured["copy"].summary(1)["seconds_median"]
                found[name]["time_over_copy"] = found[name]["seconds_median"] / copy
        result[str(read)] = found
        keep(result)
        progress.advance(task)
    first, last = (result[str(read)] for read in (b.read[0], b.read[-1]))
    for name in ("graph", "eager"):
        if "seconds_median" in first.get(name, {}) and "seconds_median" in last.get(name, {}):
            ratio = last[name]["seconds_median"] / first[name]["seconds_median"]
            result[f"{name}_last_over_first"] = ratio
    return result
