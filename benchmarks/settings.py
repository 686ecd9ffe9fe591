"""Settings of the benchmark, and what its numbers depend on."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import nestor
from nestor.ops.neural_memory import MemorySpec, choose_backend

SECTIONS = ("layers", "models", "length", "long")
BARS = ("shapes", "growth", "first_call", "users", "training", "captured")
PEER = "titans-pytorch"
REFERENCE = {"layers": "full_attention", "models": "transformer"}


@dataclasses.dataclass
class Bars:
    """Shapes and effort of the sections that measure the bars.

    Attributes:
        subjects: layers of the section shapes; neural_memory-packed reads documents of some 1,000 tokens;
            titans-pytorch-x2 and -x4 need its folder, kda (the peer's layer) and nestor-kda (this package's,
            around the peer's operation) a GPU.
        shapes: B x T of the section shapes. lengths: T of the section growth, one sequence each.
        dim, heads, expansion, chunk: of the layers; memories have 2 layers.
        tnt_chunk, tnt_locals, tnt_shard: chunk sizes of TNT's global and local memories, and its shard.
        users, read, slice: sequences of the section users, tokens they have read, and tokens a call reads.
        models, size, vocabulary: presets of the sections training and captured.
        contexts: T of those sections. step_tokens: tokens of a device's step, or T if that is more.
        dtype: bfloat16 (autocast) or float32.
        peak_flops: dense matrix rate of the device a second; default: known for some GPUs.
        repeats: rounds. seconds: of the rounds of a section, of which there are fewer if they take longer.
        compile_seconds: time after which a section runs nothing for the first time.
    """

    subjects: tuple[str, ...] = (
        "neural_memory", "neural_memory-packed", "self_modifying", "tnt", "attention", "kda",
        "titans-pytorch-x2", "titans-pytorch-x4",
    )  # fmt: skip
    shapes: tuple[str, ...] = ("8x4096", "2x16384", "1x65536")
    lengths: tuple[int, ...] = (4096, 16_384, 65_536, 262_144)
    dim: int = 1024
    heads: int = 16
    expansion: int = 4
    chunk: int = 64
    tnt_chunk: int = 64
    tnt_locals: tuple[int, ...] = (64,)
    tnt_shard: int = 2048
    users: int = 64
    read: tuple[int, ...] = (1024, 16_384)
    slice: int = 1024
    models: tuple[str, ...] = ("transformer", "titans-mag")
    size: str = "340m"
    vocabulary: int = 32_000
    contexts: tuple[int, ...] = (4096, 16_384, 65_536)
    step_tokens: int = 16_384
    dtype: str = "bfloat16"
    peak_flops: float | None = None
    repeats: int = 9
    seconds: float = 90.0
    compile_seconds: float = 330.0


@dataclasses.dataclass
class Settings:
    """Shapes and effort of the benchmark.

    Attributes:
        device: cpu or cuda.
        sections: which of layers, models, length, long (the default on a CPU), and of shapes, growth,
            first_call, users, training, captured (the default on a GPU).
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
        gpus: processes of the section training (torchrun, FSDP2); more than 1 measures one as well.
        bars: of the sections shapes to captured.
        measure: (internal) measure one subject in this process, print the result and exit.
    """

    device: str = "cpu"
    sections: tuple[str, ...] | None = None
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
    gpus: int = 1
    bars: Bars = dataclasses.field(default_factory=Bars)
    measure: str | None = None

    def result_file(self) -> Path:
        """Where the result is written."""
        return self.output or Path(__file__).parent / "results" / f"layers-{self.device}.json"

    def chosen(self) -> tuple[str, ...]:
        """The sections to run, in their order."""
        default = BARS if self.device == "cuda" else SECTIONS
        wanted = default if self.sections is None else self.sections
        return tuple(name for name in (*SECTIONS, *BARS) if name in wanted)

    def for_bars(self) -> Settings:
        """These settings with the layers of the bars in the place of those of the other sections."""
        b = self.bars
        same = {name: getattr(b, name) for name in ("dim", "heads", "expansion", "chunk", "dtype", "repeats")}
        return dataclasses.replace(self, size=b.size, vocabulary=b.vocabulary, **same)

    def autocast(self) -> torch.autocast:
        """The region in which layers and models compute."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bfloat16")


@contextmanager
def saved(s: Settings) -> Iterator[Path]:
    """A file with these settings, for another process (`load`)."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "settings.json"
        file.write_text(json.dumps(dataclasses.asdict(s), default=str))
        yield file


def load(file: Path) -> Settings:
    """The settings that `saved` wrote."""
    values = json.loads(file.read_text())
    for name in ("titans_pytorch", "output"):
        values[name] = None if values[name] is None else Path(values[name])
    return Settings(**{**values, "bars": Bars(**values["bars"])})


def describe(s: Settings) -> dict[str, Any]:
    """What the numbers depend on."""
    spec = MemorySpec(chunk_size=s.chunk)
    device = (
        torch.cuda.get_device_name()
        if s.device == "cuda"
        else f"{platform.machine()} CPU, {os.cpu_count()} cores"
    )
    left_out = ("measure", "output", "titans_pytorch", "bars", "gpus")
    settings = {k: v for k, v in dataclasses.asdict(s).items() if k not in left_out}
    settings["sections"] = s.chosen()
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device,
        "memory_backend": choose_backend(spec, torch.device(s.device))[0],
        "load_before": os.getloadavg()[0] if s.device == "cpu" else None,
        "versions": {
            "nestor": nestor.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "settings": settings,
    }


def describe_bars(s: Settings) -> dict[str, Any]:
    """What the numbers of the bars' sections depend on."""
    about = describe(s.for_bars())
    for name in ("triton", "flash-linear-attention"):
        try:
            about["versions"][name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            about["versions"][name] = None
    about["settings"] = {**dataclasses.asdict(s.bars), "gpus": s.gpus}
    return about
