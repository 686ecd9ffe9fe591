"""Time and peak memory of the linear layer and cross-entropy at the end of a model, forward and backward.

PyTorch's form holds all logits, Liger's a few rows at a time (`nestor.ops.linear_cross_entropy`). Weights are
float32 under bfloat16 autocast, as in training. Writes benchmarks/results/cross-entropy-<device>.json and a
printed table.

Examples:
    python benchmarks/cross_entropy.py --device cuda
    python benchmarks/cross_entropy.py --rows 512 --sizes 64x260     # on a CPU
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from timing import seconds

from nestor.files import write_json
from nestor.ops.linear_cross_entropy import choose_backend, has_liger, linear_cross_entropy


@dataclasses.dataclass
class Settings:
    """What is measured.

    Attributes:
        device: cpu or cuda. rows: tokens of a step.
        sizes: width x vocabulary: the presets' with the shipped tokenizers', 32,000 and GPT-2's.
        repeats: measured steps, in turn, after two that are not.
        output: JSON file; default: benchmarks/results/cross-entropy-<device>.json.
    """

    device: str = "cpu"
    rows: int = 8 * 4096
    sizes: tuple[str, ...] = ("256x260", "256x2048", "512x8192", "512x32000", "1024x32000", "1024x50257")
    repeats: int = 10
    output: Path | None = None

    def result_file(self) -> Path:
        """Where the result is written."""
        return self.output or Path(__file__).parent / "results" / f"cross-entropy-{self.device}.json"


def step_of(s: Settings, width: int, vocabulary: int, backend: str) -> Callable[[], None]:
    """Forward and backward, to hidden states and weight."""
    torch.manual_seed(0)
    x = torch.randn(s.rows, width, device=s.device).requires_grad_()
    weight = (0.02 * torch.randn(vocabulary, width, device=s.device)).requires_grad_()
    targets = torch.randint(vocabulary, (s.rows,), device=s.device)

    def step() -> None:
        x.grad = weight.grad = None
        with torch.autocast(s.device, torch.bfloat16):
            loss = linear_cross_entropy(x, weight, targets, backend)
        (loss / s.rows).backward()

    return step


def peak(s: Settings, step: Callable[[], None]) -> float | None:
    """MiB that a step needs beside its inputs; None on a CPU."""
    if s.device != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(s: Settings, size: str) -> dict[str, Any]:
    """Both forms at one size, in turn; an error takes the place of figures that cannot be had."""
    width, vocabulary = map(int, size.split("x"))
    backends = ["torch", *(["liger"] if s.device == "cuda" and has_liger() else [])]
    chosen, why = choose_backend(torch.device(s.device), torch.bfloat16, vocabulary)
    result: dict[str, Any] = {"width": width, "vocabulary": vocabulary, "chosen": chosen, "why": why}
    steps = {backend: step_of(s, width, vocabulary, backend) for backend in backends}
    for backend in backends:
        try:
            seconds(steps[backend], s.device), seconds(steps[backend], s.device)
            result[backend] = {"peak_mib": peak(s, steps[backend])}
        except torch.OutOfMemoryError as error:
            result[backend] = {"error": str(error).splitlines()[0]}
            del steps[backend]
    times: dict[str, list[float]] = {backend: [] for backend in steps}
    for _ in range(s.repeats):
        for backend, step in steps.items():
            times[backend].append(1e3 * seconds(step, s.device))
    for backend, found in times.items():
        result[backend] |= {"ms_median": statistics.median(found), "ms_min": min(found)}
    return result


def main(s: Settings) -> None:
    """Measure, print, write."""
    name = torch.cuda.get_device_name() if s.device == "cuda" else "cpu"
    results = [measure(s, size) for size in s.sizes]
    write_json(
        s.result_file(),
        {"device": name, "torch": torch.__version__, "rows": s.rows, "dtype": "bfloat16", "sizes": results},
    )
    table = Table(title=f"linear + cross-entropy, forward and backward, {s.rows:,} rows, {name}")
    for column in ("width", "vocabulary", "form", "ms", "peak MiB"):
        table.add_column(column, justify="right")
    for result in results:
        for backend in ("torch", "liger"):
            found = result.get(backend, {})
            shown = [
                "-" if found.get(key) is None else f"{found[key]:,.2f}" for key in ("ms_median", "peak_mib")
            ]
            table.add_row(str(result["width"]), str(result["vocabulary"]), backend, *shown)
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
