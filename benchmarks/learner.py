"""Time of a chunk that a Learner reads and learns from, one operation after another and as a CUDA graph.

A Llama of random weights, in the shape of SmolLM2-135M, reads a context in chunks of each length while the
feed-forward networks of its upper half learn; `frozen` is the model alone, which reads the context in one
piece. The time of a chunk is what a reading of all chunks takes longer than one of the first alone, for each.
Writes benchmarks/results/learner-<device>.json and a printed table.

Examples:
    python benchmarks/learner.py --device cuda
    python benchmarks/learner.py --layers 4 --width 64 --heads 2 --kv-heads 1 --inner 96 --vocabulary 300 \
        --context 256 --chunks 64 --dtype float32     # on a CPU, where nothing is captured
"""

from __future__ import annotations

import dataclasses
import datetime
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
import tyro
from rich.console import Console
from rich.table import Table
from timing import seconds
from transformers import LlamaConfig, LlamaForCausalLM

from nestor.files import write_json
from nestor.learning import Learner, assign_levels


@dataclasses.dataclass
class Settings:
    """What is measured.

    Attributes:
        chunks: tokens of the shortest period; the second is 8 times as long.
        context: tokens of a reading, several of the longest chunk.
        attention: Hugging Face's implementations, each in turn.
        repeats: measured readings, in interleaved rounds, after two that are not.
        output: JSON file; default: benchmarks/results/learner-<device>.json.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    layers: int = 30
    width: int = 576
    heads: int = 9
    kv_heads: int = 3
    inner: int = 1536
    vocabulary: int = 49_152
    context: int = 2048
    chunks: tuple[int, ...] = (64, 512)
    attention: tuple[str, ...] = ("sdpa", "eager")
    repeats: int = 10
    output: Path | None = None

    def result_file(self) -> Path:
        """Where the result is written."""
        return self.output or Path(__file__).parent / "results" / f"learner-{self.device}.json"


def build(s: Settings, attention: str) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=s.vocabulary, hidden_size=s.width, intermediate_size=s.inner, num_hidden_layers=s.layers,
        num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, max_position_embeddings=8192,
        tie_word_embeddings=True, attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(s.device, getattr(torch, s.dtype)).eval()


def peak(s: Settings, work: Callable[[], Any]) -> float | None:
    """MiB that a subject has come to need beside what was there before its first reading; None on a CPU."""
    if s.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    work(), work()
    return (torch.cuda.max_memory_allocated() - before) / 2**20 if s.device == "cuda" else None


def measure(s: Settings, attention: str, chunk: int) -> dict[str, Any]:
    """Milliseconds of a reading and of a chunk, and how far logits of the two that learn are apart."""
    model = build(s, attention)
    # The last token is only predicted: it lets the chunk before it be learned from.
    ids = torch.randint(s.vocabulary, (1, s.context + 1), device=s.device)
    levels = assign_levels(model, [chunk, 8 * chunk], [0.1, 0.1], largest_update=0.01)

    def learning(capture: bool) -> Callable[[int], torch.Tensor]:
        learner = Learner(model, levels, capture=capture)
        start = learner.start()
        return lambda length: learner.read(ids[:, : length + 1], start).logits

    @torch.no_grad()
    def frozen(length: int) -> torch.Tensor:
        return model(ids[:, : length + 1]).logits

    subjects = {"frozen": frozen, "eager": learning(False), "captured": learning(True)}
    result: dict[str, Any] = {
        name: {"peak_mib": peak(s, lambda read=read: read(s.context))} for name, read in subjects.items()
    }
    eager, captured = (subjects[name](s.context).float() for name in ("eager", "captured"))
    apart = float((eager - captured).norm() / eager.norm())
    del eager, captured
    lengths = {"all": s.context, "first": chunk}
    times: dict[str, dict[str, list[float]]] = {name: {what: [] for what in lengths} for name in subjects}
    for _ in range(s.repeats):
        for name, read in subjects.items():
            for what, length in lengths.items():
                took = seconds(lambda read=read, length=length: read(length), s.device)
                times[name][what].append(1e3 * took)
    for name, found in times.items():
        chunks = zip(found["all"], found["first"], strict=True)
        over = zip(found["all"], times["frozen"]["all"], strict=True)
        result[name] |= {
            "ms": statistics.median(found["all"]),
            "ms_a_chunk": statistics.median((a - b) / (s.context / chunk - 1) for a, b in chunks),
            "over_frozen": statistics.median(a / b for a, b in over),
        }
    del result["frozen"]["ms_a_chunk"]
    return {"attention": attention, "chunk": chunk, "difference": apart, **result}


def main(s: Settings) -> None:
    """Measure, print, write."""
    device = torch.cuda.get_device_name() if s.device == "cuda" else f"{platform.machine()} CPU"
    results = [measure(s, attention, chunk) for attention in s.attention for chunk in s.chunks]
    about = {
        "device": device,
        "date": str(datetime.date.today()),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "settings": {k: v for k, v in dataclasses.asdict(s).items() if k != "output"},
    }
    write_json(s.result_file(), {"about": about, "results": results})
    table = Table(title=f"reading {s.context} tokens, {s.dtype}, {device}")
    for column in ("attention", "chunk", "", "ms", "ms a chunk", "over frozen", "peak MiB"):
        table.add_column(column, justify="right")
    for result in results:
        for name in ("frozen", "eager", "captured"):
            one = result[name]
            memory = "-" if one["peak_mib"] is None else f"{one['peak_mib']:,.0f}"
            a_chunk = "-" if name == "frozen" else f"{one['ms_a_chunk']:.2f}"
            table.add_row(
                result["attention"], str(result["chunk"]), name, f"{one['ms']:.1f}", a_chunk,
                f"{one['over_frozen']:.2f}", memory,
            )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
