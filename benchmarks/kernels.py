"""Where the time of the operation `neural_memory` goes: milliseconds of each kernel, forward and backward.

The operation alone, without the layer around it: a 2-layer memory with momentum and forgetting; with --layers
also whole layers of the bars, and how long the host takes to queue their kernels. On a GPU the table also has
registers, spilled registers and shared memory of the Triton kernels; on a CPU it has PyTorch's operations
instead of kernels. Writes benchmarks/results/kernels-<device>.json and a printed table.

Examples:
    python benchmarks/kernels.py --device cuda
    python benchmarks/kernels.py --device cuda --layers neural_memory tnt nestor-kda
    python benchmarks/kernels.py --shapes 1x256 --dim 64 --heads 2 --chunk 16     # on a CPU
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import pkgutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import tyro
from bars import bar_layer, bar_step, parse_shape
from rich.console import Console
from rich.table import Table
from rounds import Deadline, attempt, timed
from settings import Bars, describe_bars
from settings import Settings as LayerSettings
from torch.profiler import ProfilerActivity, profile

from nestor.files import write_json
from nestor.ops.neural_memory import MemorySpec, neural_memory

PACKAGE = "nestor.ops.neural_memory.kernels"


# Steps queued one after another of which the time is taken.
QUEUED = 5


@dataclasses.dataclass
class Settings:
    """What is profiled.

    Attributes:
        device: cpu or cuda.
        shapes: B x T. dim, heads, expansion, chunk: of the memory.
        layers: of those that bars.py knows, to be profiled beside the operation.
        dtype: bfloat16 or float32, of q, k, v.
        read_mode: inclusive or chunk_start.
        steps: profiled forwards and backwards. seconds: time after which no new shape is begun.
        rows: kernels of each shape in the printed table; the file has all.
        output: JSON file; default: benchmarks/results/kernels-<device>.json. A shape replaces its own part.
    """

    device: str = "cpu"
    shapes: tuple[str, ...] = Bars.shapes
    dim: int = Bars.dim
    heads: int = Bars.heads
    expansion: int = Bars.expansion
    chunk: int = Bars.chunk
    layers: tuple[str, ...] = ()
    dtype: str = "bfloat16"
    read_mode: str = "inclusive"
    steps: int = 5
    seconds: float = 120.0
    rows: int = 12
    output: Path | None = None

    def result_file(self) -> Path:
        """Where the result is written."""
        return self.output or Path(__file__).parent / "results" / f"kernels-{self.device}.json"


def operation(s: Settings, batch: int, tokens: int) -> Callable[[], None]:
    """Forward and backward of the operation, to every input."""
    torch.manual_seed(0)
    width, hidden = s.dim // s.heads, s.expansion * s.dim // s.heads
    dtype = torch.bfloat16 if s.dtype == "bfloat16" else torch.float32

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=s.device)

    unit = torch.nn.functional.normalize
    q, k = (unit(random(batch, tokens, s.heads, width), dim=-1).to(dtype) for _ in range(2))
    v, upstream = (random(batch, tokens, s.heads, width).to(dtype) for _ in range(2))
    gates = [torch.sigmoid(random(batch, tokens, s.heads) + bias) for bias in (-3.0, 0.0, -8.0)]
    initial = [random(s.heads, width, hidden) / 1, random(s.heads, hidden, width) / 2]
    norm = [torch.ones(s.heads, width, device=s.device), torch.zeros(s.heads, width, device=s.device)]
    inputs = [q, k, v, *gates, *initial, *norm]
    for tensor in inputs:
        tensor.requires_grad_()
    spec = MemorySpec(s.chunk, norm="residual_layernorm", norm_eps=1e-3, read_mode=s.read_mode)

    def step() -> None:
        y = neural_memory(q, k, v, *gates, initial, spec=spec, gamma=norm[0], beta=norm[1])[0]
        y.backward(upstream.to(y.dtype))
        for tensor in inputs:
            tensor.grad = None

    return step


def profiled(s: Settings, step: Callable[[], None]) -> list[dict[str, Any]]:
    """Kernels (on a CPU: operations) of a step: calls and milliseconds, the longest first."""
    on_gpu = s.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        for _ in range(s.steps):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    kernels = []
    for event in found.key_averages():
        if on_gpu and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if microseconds:
            calls = event.count / s.steps
            kernels.append({"name": event.key, "calls": calls, "ms": microseconds / 1e3 / s.steps})
    return sorted(kernels, key=lambda kernel: -kernel["ms"])


def compiled() -> list[dict[str, Any]]:
    """Registers, spills, shared memory and warps of every variant of a Triton kernel that has run here."""
    return [
        {
            "name": name,
            "registers": getattr(kernel, "n_regs", None),
            "spills": getattr(kernel, "n_spills", None),
            "shared_bytes": getattr(kernel.metadata, "shared", None),
            "warps": getattr(kernel.metadata, "num_warps", None),
            "stages": getattr(kernel.metadata, "num_stages", None),
        }
        for name, kernel in _variants()
    ]


def _variants() -> Iterator[tuple[str, Any]]:
    if importlib.util.find_spec("triton") is None:
        return
    package = importlib.import_module(PACKAGE)
    seen: set[int] = set()
    for module in pkgutil.iter_modules(package.__path__, f"{PACKAGE}."):
        for function in vars(importlib.import_module(module.name)).values():
            # Triton keeps by device a tuple that begins with the variants by key.
            caches = getattr(function, "device_caches", None)
            if caches is None or id(function) in seen:
                continue
            seen.add(id(function))
            for cache in caches.values():
                variants = cache[0] if isinstance(cache, tuple) else cache
                for kernel in variants.values():
                    if hasattr(kernel, "metadata"):
                        getattr(kernel, "_init_handles", int)()  # loaded: only then are registers known
                        yield function.__name__, kernel


def layer(s: Settings, name: str, batch: int, tokens: int) -> Callable[[], object]:
    """Forward and backward of a whole layer."""
    sizes = {size: getattr(s, size) for size in ("dim", "heads", "expansion", "chunk", "dtype")}
    bars = LayerSettings(device=s.device, bars=dataclasses.replace(Bars(), tnt_chunk=s.chunk, **sizes))
    return bar_step(bar_layer(name, bars), bars, batch, tokens, name)


def measure(s: Settings, shape: str, name: str | None) -> dict[str, Any]:
    """Milliseconds of a step of the operation or a layer, those on the host, and those of its kernels."""
    batch, tokens = parse_shape(shape)
    found: dict[str, Any] = {}

    def work() -> None:
        step = operation(s, batch, tokens) if name is None else layer(s, name, batch, tokens)
        for _ in range(2):
            step()
        times = sorted(timed(step, s.device, QUEUED) for _ in range(s.steps))
        found["ms"] = times[len(times) // 2] * 1e3
        found["host_ms"] = statistics.median(on_host(step, s.device) for _ in range(s.steps)) * 1e3
        found["tokens_per_second"] = batch * tokens / found["ms"] * 1e3
        found["kernels"] = profiled(s, step)
        found["kernels_ms"] = sum(kernel["ms"] for kernel in found["kernels"])

    failure = attempt(work)
    return found if failure is None else {"failure": failure}


def on_host(step: Callable[[], object], device: str) -> float:
    """Seconds until the call returns; on a GPU kernels may still run then."""
    start = time.perf_counter()
    step()
    taken = time.perf_counter() - start
    if device == "cuda":
        torch.cuda.synchronize()
    return taken


def print_shape(console: Console, shape: str, found: dict[str, Any], rows: int) -> None:
    """The longest kernels of a shape."""
    if "failure" in found:
        console.print(f"{shape}: {found['failure']}")
        return
    launches = sum(kernel["calls"] for kernel in found["kernels"])
    title = f"{shape}: {found['ms']:.2f} ms, {found['kernels_ms']:.2f} ms of it in {launches:g} kernels"
    title += f", {found['host_ms']:.2f} ms on the host"
    table = Table("kernel", "calls", "ms", "share", "registers", "spills", "shared KiB", title=title)
    for kernel in found["kernels"][:rows]:
        same = [one for one in found["variants"] if one["name"] == kernel["name"]]
        last = ["/".join(sorted({str(one[what]) for one in same})) or "-" for what in ("registers", "spills")]
        shared = "/".join(sorted({f"{(one['shared_bytes'] or 0) / 1024:.0f}" for one in same})) or "-"
        share = f"{kernel['ms'] / found['kernels_ms']:.0%}"
        cells = [kernel["name"][:60], f"{kernel['calls']:g}", f"{kernel['ms']:.3f}", share, *last, shared]
        table.add_row(*cells)
    console.print(table)


def main(s: Settings) -> None:
    """Profile every shape; the file has what is measured after each."""
    if s.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda, but PyTorch sees no GPU; use --device cpu")
    file, console = s.result_file(), Console()
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    about = describe_bars(LayerSettings(device=s.device))
    settings = {k: v for k, v in dataclasses.asdict(s).items() if k != "output"}
    deadline = Deadline(s.seconds)
    for name in (None, *s.layers):
        for shape in s.shapes:
            key = shape if name is None else f"{name} {shape}"
            found = {"failure": "out of time"} if deadline.over() else measure(s, shape, name)
            variants = compiled() if s.device == "cuda" else []
            result[key] = {"about": {**about, "settings": settings}, **found, "variants": variants}
            write_json(file, result)
            print_shape(console, key, result[key], s.rows)
    console.print(f"written to {file}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
