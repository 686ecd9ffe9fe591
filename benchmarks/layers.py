"""Speed and memory of whole layers and whole models, memory against attention, on a CPU or a GPU.

One process measures everything that is compared: rounds in which every subject runs once, medians over the
rounds, and ratios within a round, so that a busy machine slows both sides of a ratio. Peak memory is measured
in a fresh process for each subject. The result is a JSON file in benchmarks/results and a printed table.
A run replaces the sections that it measured and leaves the others in the file, if they can stand beside it.

Sections:
    layers: forward + backward and token-by-token decoding of single layers.
    models: a training step (forward, backward, AdamW) of whole models of one size, against `transformer`.
    length: forward + backward of the memory layer against T; the exponent of its time.
    long: a forward of one long stream at default settings; outputs and state must be finite.
Sections that measure the bars, chosen by default on a GPU; `--bars.*` are their settings:
    shapes: forward + backward of whole layers, peers among them, at three shapes of B x T.
    growth: forward + backward of the memory layer on one sequence of T tokens, for growing T.
    first_call: its first forward and backward in a fresh process, with empty and with full caches.
    users: one token of each of many users, against a copy of their states.
    training: a training step of whole models at several T; `--gpus 2` also with FSDP2 over two.
    captured: that step with compiled blocks, forward and backward as a CUDA graph.
benchmarks/kernels.py profiles the kernels of the operation.

Examples:
    python benchmarks/layers.py                                    # all, on the CPU with 2 threads
    python benchmarks/layers.py --sections models --repeats 15
    python benchmarks/layers.py --device cuda --sections layers --batch 8 --tokens 4096 --dim 1024 --heads 16
    python benchmarks/layers.py --device cuda --titans-pytorch /tmp/titans     # the bars
    python benchmarks/layers.py --device cuda --sections training --gpus 2
    python benchmarks/layers.py --titans-pytorch /tmp/titans       # with titans-pytorch among the layers

titans-pytorch is measured if its folder is given; it and what it imports are installed for this alone:
    pip install --no-deps --target /tmp/titans titans-pytorch==0.5.5 assoc-scan einx tensordict pyvers \\
        cloudpickle frozendict loguru axial-positional-embedding hyper-connections rotary-embedding-torch \\
        x-transformers torch-einops-utils
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro
from bars import run_first_call, run_growth, run_shapes, run_users
from child import measure
from report import print_tables, update_readme
from rich.console import Console
from rich.progress import Progress
from sections import RUN
from settings import BARS, SECTIONS, Settings, describe, describe_bars
from timing import release
from training import run_captured, run_training

from nestor.files import write_json

RUN_BARS: dict[str, Callable[..., dict[str, Any]]] = {
    "shapes": run_shapes,
    "growth": run_growth,
    "first_call": run_first_call,
    "users": run_users,
    "training": run_training,
    "captured": run_captured,
}


def earlier(s: Settings) -> dict[str, Any]:
    """What the file has of sections that this run does not measure, and that may stand beside its own.

    Sections of the bars say for themselves what they depend on. The others share one account of it, so they
    stay only where this run writes no other.
    """
    file = s.result_file()
    if not file.exists():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    chosen = s.chosen()
    kept = {name: part for name, part in found.items() if name not in chosen}
    if set(chosen) & set(SECTIONS) and not _same(found.get("about"), describe(s)):
        kept = {name: part for name, part in kept.items() if name in BARS}
    return kept


def _same(one: dict[str, Any] | None, other: dict[str, Any]) -> bool:
    def essence(about: dict[str, Any]) -> str:
        kept = {name: part for name, part in about.items() if name not in ("date", "load_before")}
        kept["settings"] = {name: part for name, part in kept["settings"].items() if name != "sections"}
        return json.dumps(kept, sort_keys=True)

    return one is not None and essence(one) == essence(other)


def main(s: Settings) -> None:
    """Measure the chosen sections; what is measured is in the file after each of them."""
    if s.measure is not None:
        measure(s.measure)
        return
    unknown = set(s.sections or ()) - {*SECTIONS, *BARS}
    if unknown:
        known = ", ".join((*SECTIONS, *BARS))
        raise SystemExit(f"unknown section {', '.join(sorted(unknown))}; known are {known}")
    if s.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda, but PyTorch sees no GPU; use --device cpu")
    if s.device == "cuda" and s.gpus > torch.cuda.device_count():
        raise SystemExit(f"--gpus {s.gpus}, but PyTorch sees {torch.cuda.device_count()}")
    torch.set_num_threads(s.threads)
    console = Console()
    result: dict[str, Any] = earlier(s)
    chosen = s.chosen()
    if "about" not in result or set(chosen) & set(SECTIONS):
        result = {**result, "about": describe(s)}
    result = {"about": result.pop("about"), **result}
    failed: list[str] = []
    with Progress(console=console) as progress:
        for section in chosen:
            if section in RUN:
                result[section] = RUN[section](s, progress)
                write_json(s.result_file(), result)
                continue

            result.pop(section, None)
            release()
            about = describe_bars(s)

            def keep(part: dict[str, Any], section: str = section, about: dict[str, Any] = about) -> None:
                result[section] = {"about": about, **part}
                write_json(s.result_file(), result)

            try:
                keep(RUN_BARS[section](s, progress, keep))
            except Exception as error:
                # What the section has measured so far stays, and so does what follows it.
                failed.append(section)
                keep({**result.get(section, {}), "failure": f"{type(error).__name__}: {error}"[-2000:]})
    if s.output is None:
        update_readme(Path(__file__).with_name("README.md"))
    print_tables(result, console)
    console.print(f"written to {s.result_file()}")
    for section in failed:
        console.print(f"{section} failed: {result[section]['failure']}", markup=False)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
