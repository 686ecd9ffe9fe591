"""Speed and memory of whole layers and whole models, memory against attention, on a CPU or a GPU.

One process measures everything that is compared: rounds in which every subject runs once, medians over the
rounds, and ratios within a round, so that a busy machine slows both sides of a ratio. Peak memory is measured
in a fresh process for each subject. The result is a JSON file in benchmarks/results and a printed table.

Sections:
    layers: forward + backward and token-by-token decoding of single layers.
    models: a training step (forward, backward, AdamW) of whole models of one size, against `transformer`.
    length: forward + backward of the memory layer against T; the exponent of its time.
    long: a forward of one long stream at default settings; outputs and state must be finite.

Examples:
    python benchmarks/layers.py                                    # all, on the CPU with 2 threads
    python benchmarks/layers.py --sections models --repeats 15
    python benchmarks/layers.py --device cuda --batch 8 --tokens 4096 --dim 1024 --heads 16
    python benchmarks/layers.py --titans-pytorch /tmp/titans       # with titans-pytorch among the layers

titans-pytorch is measured if its folder is given; it and what it imports are installed for this alone:
    pip install --no-deps --target /tmp/titans titans-pytorch==0.5.5 assoc-scan einx tensordict pyvers \\
        cloudpickle frozendict loguru axial-positional-embedding hyper-connections rotary-embedding-torch \\
        x-transformers torch-einops-utils
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import nestor
from nestor.files import write_json, write_text
from nestor.layers.attention import Attention
from nestor.layers.memory_as_gate import MemoryAsGate
from nestor.layers.neural_memory import NeuralMemory
from nestor.models.presets import count_parameters
from nestor.ops.neural_memory import choose_backend

SECTIONS = ("layers", "models", "length", "long")
PEER = "titans-pytorch"
REFERENCE = {"layers": "full_attention", "models": "transformer"}


@dataclasses.dataclass
class Settings:
    """Shapes and effort of the benchmark.

    Attributes:
        device: cpu or cuda.
        sections: which of layers, models, length, long.
        batch, tokens: B and T of the layers and models.
        dim, heads, expansion, chunk, window: of the layers; memories have 2 layers, `expansion` times as
            wide as a head.
        size, models: presets to train, and their size.
        vocabulary: of the models; 256 is bytes.
        decode_tokens: tokens decoded one by one, after one call on `tokens` tokens.
        lengths: T of the section length, one sequence each. long: T of the section long.
        repeats: rounds. threads: of PyTorch on a CPU.
        dtype: float32 or, on CUDA, bfloat16 (autocast).
        titans_pytorch: folder with an installed titans-pytorch, see above.
        output: JSON file; default: benchmarks/results/layers-<device>.json.
        measure: (internal) print the peak memory of one subject and exit.
    """

    device: str = "cpu"
    sections: tuple[str, ...] = SECTIONS
    batch: int = 4
    tokens: int = 1024
    dim: int = 256
    heads: int = 4
    expansion: int = 2
    chunk: int = 64
    window: int = 256
    size: str = "5m"
    models: tuple[str, ...] = ("transformer", "titans-lmm", "titans-mag")
    vocabulary: int = 256
    decode_tokens: int = 32
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    long: int = 131_072
    repeats: int = 9
    threads: int = 2
    dtype: str = "float32"
    titans_pytorch: Path | None = None
    output: Path | None = None
    measure: str | None = None

    def result_file(self) -> Path:
        return self.output or Path(__file__).parent / "results" / f"layers-{self.device}.json"

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bfloat16")


# --- subjects ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Layer:
    """A mixer layer with one interface: ``call(x, state) -> (y, state)`` for x ``[B, T, d]``."""

    module: nn.Module
    call: Callable[[Tensor, Any], tuple[Tensor, Any]]


def nestor_layer(module: nn.Module) -> Layer:
    return Layer(module, lambda x, state: module(x, state))


def build_memory(s: Settings, **settings: Any) -> NeuralMemory:
    return NeuralMemory(s.dim, s.heads, depth=2, expansion=s.expansion, chunk_size=s.chunk, **settings)


def build_titans_pytorch(s: Settings) -> Layer:
    """titans-pytorch 0.5.5, which updates its memory per chunk.

    Its gradients are all taken at the first weights (`batch_size=None`, its default), so that one scan covers
    the whole sequence. The largest step is 1e-2 in place of 1; it changes values, not the work that is done.
    One repair: heads are given as views of one parameter, which no optimizer can step; here each has its own.
    """
    sys.path.append(str(s.titans_pytorch))
    from titans_pytorch.neural_memory import NeuralMemory as PeerMemory

    module = PeerMemory(
        s.dim,
        chunk_size=s.chunk,
        heads=s.heads,
        dim_head=s.dim // s.heads,
        default_step_transform_max_lr=1e-2,
        default_model_kwargs={"depth": 2, "expansion_factor": float(s.expansion)},
    )
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous()
    return Layer(module, lambda x, state: module(x, state=state))


LAYERS: dict[str, Callable[[Settings], Layer]] = {
    "full_attention": lambda s: nestor_layer(Attention(s.dim, s.heads)),
    "sliding_attention": lambda s: nestor_layer(Attention(s.dim, s.heads, window=s.window)),
    "neural_memory": lambda s: nestor_layer(build_memory(s)),
    "memory_as_gate": lambda s: nestor_layer(
        MemoryAsGate(Attention(s.dim, s.heads, window=s.window), build_memory(s, output_gate=False))
    ),
    PEER: build_titans_pytorch,
}


def build_layer(name: str, s: Settings) -> Layer:
    torch.manual_seed(0)
    layer = LAYERS[name](s)
    layer.module.to(s.device)
    return layer


def layer_step(layer: Layer, s: Settings, tokens: int, batch: int) -> Callable[[], None]:
    """Forward and backward of one call, to every parameter and the input."""
    x = torch.randn(batch, tokens, s.dim, device=s.device, requires_grad=True)
    upstream = torch.randn(batch, tokens, s.dim, device=s.device)

    def step() -> None:
        with s.autocast():
            y, _ = layer.call(x, None)
        y.backward(upstream.to(y.dtype))
        layer.module.zero_grad(set_to_none=True)
        x.grad = None

    return step


def layer_decode(layer: Layer, s: Settings) -> Callable[[], None]:
    """`decode_tokens` calls on one token each, from the state that one call on `tokens` tokens leaves."""
    with torch.no_grad(), s.autocast():
        _, start = layer.call(torch.randn(s.batch, s.tokens, s.dim, device=s.device), None)
    token = torch.randn(s.batch, 1, s.dim, device=s.device)

    @torch.no_grad()
    def decode() -> None:
        state = start
        with s.autocast():
            for _ in range(s.decode_tokens):
                _, state = layer.call(token, state)

    return decode


def build_model(name: str, s: Settings, **settings: Any) -> nestor.NestorForCausalLM:
    return nestor.NestorForCausalLM(nestor.preset(name, s.size, vocab_size=s.vocabulary, **settings))


class _Stateless(nn.Module):
    """titans-pytorch's memory in the place of a mixer of the decoder, for training."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, state: None, span: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self.module(x)[0], {}


def build_peer_model(s: Settings) -> nn.Module:
    """The titans-lmm of this size with titans-pytorch's memories; the feed-forward equals their sizes."""
    own = build_model("titans-lmm", s)
    memory, width = own.config.memory, own.config.hidden_size
    shape = dataclasses.replace(
        s, dim=width, heads=memory["heads"], expansion=memory["expansion"], chunk=memory["chunk_size"]
    )
    layer = own.layers[0]
    spare = _size(layer.mixer) - _size(build_titans_pytorch(shape).module)
    inner = own.config.intermediate_size + round(spare / (3 * width) / 8) * 8
    model = build_model("titans-lmm", s, intermediate_size=inner)
    for block in model.layers:
        block.mixer = _Stateless(build_titans_pytorch(shape).module)
    return model


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def model_step(name: str, s: Settings) -> tuple[nn.Module, Callable[[], None]]:
    """A model and its training step on random tokens."""
    torch.manual_seed(0)
    model = (build_peer_model(s) if name == PEER else build_model(name, s)).to(s.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(0, s.vocabulary, (s.batch, s.tokens), device=s.device)

    def step() -> None:
        with s.autocast():
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return model, step


# --- measuring --------------------------------------------------------------------------------------------


def seconds(work: Callable[[], None], device: str) -> float:
    """Wall time of one run, the device's queue included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(
    works: dict[str, Callable[[], None]], s: Settings, progress: Progress, title: str
) -> dict[str, list[float]]:
    """Seconds of every work in each of `repeats` rounds, after one round that is not counted."""
    task = progress.add_task(title, total=(s.repeats + 1) * len(works))
    times: dict[str, list[float]] = {name: [] for name in works}
    for round_ in range(s.repeats + 1):
        for name, work in works.items():
            elapsed = seconds(work, s.device)
            if round_:
                times[name].append(elapsed)
            progress.advance(task)
    return times


def summary(times: list[float], tokens: int, reference: list[float] | None = None) -> dict[str, Any]:
    """Median, minimum, tokens/s, and the ratio to the reference of the same round with its quartiles."""
    result: dict[str, Any] = {
        "seconds_median": statistics.median(times),
        "seconds_min": min(times),
        "tokens_per_second": tokens / statistics.median(times),
    }
    if reference is not None:
        ratios = [a / b for a, b in zip(times, reference, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        result |= {
            "ratio_median": middle,
            "ratio_quartiles": [low, high],
            "ratio_of_minima": min(times) / min(reference),
        }
    return result


def peak_memory(subject: str, s: Settings) -> int:
    """Bytes that `section/name` and three steps of it add to a fresh process, or take at most on the GPU."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "settings.json"
        file.write_text(json.dumps(dataclasses.asdict(s), default=str))
        command = [sys.executable, __file__, "--measure", f"{subject}@{file}"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {subject} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def measure_peak(argument: str) -> int:
    """The other side of `peak_memory`."""
    subject, file = argument.split("@", 1)
    values = json.loads(Path(file).read_text())
    for name in ("titans_pytorch", "output"):
        values[name] = None if values[name] is None else Path(values[name])
    s = Settings(**values)
    torch.set_num_threads(s.threads)
    section, name = subject.split("/", 1)
    on_gpu = s.device == "cuda"
    before = 0 if on_gpu else _memory_status("VmRSS")
    step = (
        model_step(name, s)[1]
        if section == "models"
        else layer_step(build_layer(name, s), s, s.tokens, s.batch)
    )
    for _ in range(3):
        step()
    return torch.cuda.max_memory_allocated() if on_gpu else _memory_status("VmHWM") - before


def _memory_status(field: str) -> int:
    """VmRSS (now) or VmHWM (the most ever) of this process, in bytes; Linux."""
    # Not ru_maxrss, which a child inherits from the process that started it.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; peak memory on a CPU is measured on Linux only")


# --- sections ---------------------------------------------------------------------------------------------


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
            "parameters": _size(layers[name].module),
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


def describe(s: Settings) -> dict[str, Any]:
    """What the numbers depend on."""
    device = (
        torch.cuda.get_device_name()
        if s.device == "cuda"
        else f"{platform.machine()} CPU, {os.cpu_count()} cores"
    )
    settings = {
        k: v for k, v in dataclasses.asdict(s).items() if k not in ("measure", "output", "titans_pytorch")
    }
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device,
        "memory_backend": choose_backend(build_memory(s).spec, torch.device(s.device))[0],
        "load_before": os.getloadavg()[0] if s.device == "cpu" else None,
        "versions": {
            "nestor": nestor.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "settings": settings,
    }


# --- tables -----------------------------------------------------------------------------------------------


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """One line a measurement: what, tokens/s, ratio with quartiles, decoding tokens/s, peak memory."""

    def cells(what: str, timing: dict[str, Any], decode: str, peak: int) -> list[str]:
        ratio = "-"
        if "ratio_median" in timing:
            low, high = timing["ratio_quartiles"]
            ratio = f"{timing['ratio_median']:.2f} ({low:.2f} to {high:.2f})"
        return [what, f"{timing['tokens_per_second']:,.0f}", ratio, decode, f"{peak / 2**20:,.0f}"]

    lines = [
        cells(
            f"layer {name}",
            r["forward_backward"],
            f"{r['decode']['tokens_per_second']:,.0f}",
            r["peak_bytes"],
        )
        for name, r in result.get("layers", {}).items()
    ]
    return lines + [
        cells(f"model {name}", r["step"], "-", r["peak_bytes"])
        for name, r in result.get("models", {}).items()
    ]


HEADER = ["", "training tokens/s", "time over the reference's", "decoding tokens/s", "peak MiB"]


def remarks_of(result: dict[str, Any]) -> list[str]:
    lines = []
    if "length" in result and "exponent" in result["length"]:
        r = result["length"]
        longest = list(r["seconds_min"])[-1]
        lines.append(
            f"Time of the memory layer to T = {longest}: T^{r['exponent']:.2f}; a token costs "
            f"{r['per_token_last_over_first']:.2f} times what it does at the shortest T."
        )
    for name, r in result.get("long", {}).items():
        state = "all outputs and state finite" if r["finite"] else "NOT FINITE"
        lines.append(f"{r['tokens']:,} tokens in one call, {name} settings: {state}.")
    return lines


def markdown(result: dict[str, Any]) -> str:
    """The table of benchmarks/README.md."""
    table = ["| " + " | ".join(line) + " |" for line in [HEADER, ["---"] * len(HEADER), *rows_of(result)]]
    about = result["about"]
    shape = about["settings"]
    head = (
        f"{about['device']}, {shape['threads']} threads, "
        f"PyTorch {about['versions']['torch']}, {about['date']}; "
        f"B{shape['batch']} x T{shape['tokens']}, layers of width {shape['dim']}, models of size "
        f"{shape['size']}, {shape['dtype']}, {shape['repeats']} rounds."
    )
    return "\n".join([head, "", *table, "", *(f"- {line}" for line in remarks_of(result)), ""])


def print_tables(result: dict[str, Any], console: Console) -> None:
    table = Table(*HEADER)
    for line in rows_of(result):
        table.add_row(*line)
    if table.row_count:
        console.print(table)
    for line in remarks_of(result):
        console.print(line)


START, END = "<!-- tables of layers.py -->", "<!-- end -->"


def update_readme(readme: Path) -> None:
    """Write the tables of all results of this benchmark between the marks of the README."""
    text = readme.read_text(encoding="utf-8")
    files = sorted((readme.parent / "results").glob("layers-*.json"))
    tables = [markdown(json.loads(file.read_text(encoding="utf-8"))) for file in files]
    before, rest = text.split(START)
    write_text(readme, f"{before}{START}\n\n" + "\n".join(tables) + END + rest.split(END)[1])


def main(s: Settings) -> None:
    if s.measure is not None:
        print(measure_peak(s.measure))
        return
    unknown = set(s.sections) - set(SECTIONS)
    if unknown:
        raise SystemExit(f"unknown section {', '.join(sorted(unknown))}; known are {', '.join(SECTIONS)}")
    if s.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda, but PyTorch sees no GPU; use --device cpu")
    torch.set_num_threads(s.threads)
    console = Console()
    result: dict[str, Any] = {"about": describe(s)}
    with Progress(console=console) as progress:
        for section in SECTIONS:
            if section in s.sections:
                result[section] = RUN[section](s, progress)
    write_json(s.result_file(), result)
    readme = Path(__file__).with_name("README.md")
    if s.output is None:
        update_readme(readme)
    print_tables(result, console)
    console.print(f"written to {s.result_file()}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
