"""The sections training and captured of the bars: steps of whole models, in this process or, with FSDP2, in
several; and with the host taken out."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from flops import peak_of, training_flops
from rich.progress import Progress
from rounds import Measured, Step, capture_graph, measure
from settings import Settings
from subjects import build_model
from timing import in_a_process, release

from nestor.models.presets import count_parameters
from nestor.training.distributed import shard

Keep = Callable[[dict[str, Any]], None]


def run_training(s: Settings, progress: Progress, keep: Keep) -> dict[str, Any]:
    """Tokens/s, and the share of the device's matrix rate, of a training step at each T.

    With `gpus` above 1 the steps are measured once more in as many processes, each with the same batch:
    `scaling` is the tokens/s of all over those of the one.
    """
    b = s.bars
    task = progress.add_task("training", total=2 if s.gpus > 1 else 1)
    alone = measure_contexts(s, lambda found: keep({"1": found}))
    result = {"1": alone}
    progress.advance(task)
    if s.gpus > 1:
        keep(result)
        # The same work in each process: activations are recomputed where one device needed it.
        recomputed = [t for t in map(str, b.contexts) if any(one["recomputed"] for one in alone[t].values())]
        together = in_a_process(f"training/{','.join(recomputed)}", s, processes=s.gpus)
        for context, models in together.items():
            for name, found in models.items():
                own = alone[context][name]
                if "tokens_per_second" in found and "tokens_per_second" in own:
                    found["scaling"] = found["tokens_per_second"] / own["tokens_per_second"]
        result[str(s.gpus)] = together
        progress.advance(task)
    return result


def in_this_process(s: Settings, recomputed: list[str]) -> dict[str, Any] | None:
    """`measure_contexts` in one of the processes that torchrun started; None in all but the first."""
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if s.device == "cuda":
        torch.cuda.set_device(local)
    torch.distributed.init_process_group("nccl" if s.device == "cuda" else "gloo")
    try:
        found = measure_contexts(s, lambda found: None, recomputed)
    finally:
        torch.distributed.destroy_process_group()
    return found if rank == 0 else None


def measure_contexts(s: Settings, keep: Keep, recomputed: list[str] | None = None) -> dict[str, Any]:
    """By T and model: what a step takes.

    recomputed: each T at which activations are recomputed; None: where a model does not fit without it, all
    models of that T are measured with it.
    """
    b = s.bars
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    subjects = {name: Subject(name, s, world) for name in b.models}
    result: dict[str, Any] = {}
    for context in b.contexts:
        batch = max(1, b.step_tokens // context)
        choices = (False, True) if recomputed is None else (str(context) in recomputed,)
        # Processes must do the same number of rounds, so only one alone looks at the clock.
        limit = b.seconds / len(b.contexts) if world == 1 else float("inf")
        for recompute in choices:
            steps = {name: one.step(s, batch, context, recompute) for name, one in subjects.items()}
            measured = measure(steps, s.device, b.repeats, limit)
            if all(one.failure != "out of memory" for one in measured.values()):
                break
        found = {
            name: subjects[name].found(s, one, context, batch, world) | {"recomputed": recompute}
            for name, one in measured.items()
        }
        _compare(found)
        result[str(context)] = found
        keep(result)
    return result


def _compare(found: dict[str, Any]) -> None:
    """Add to what models were found to take their speed over the transformer's."""
    reference = found.get("transformer", {}).get("tokens_per_second")
    for values in found.values():
        if reference and "tokens_per_second" in values:
            values["speed_over_transformer"] = values["tokens_per_second"] / reference


def run_captured(s: Settings, progress: Progress, keep: Keep) -> dict[str, Any]:
    """The same steps in one process with the work of the host taken out, as far as PyTorch can.

    Blocks are compiled, windows of attention run through FlexAttention, and forward and backward of a step
    are replayed as a CUDA graph; where that does not fit, activations are recomputed and nothing is captured.
    """
    b = s.bars
    task = progress.add_task("captured", total=len(b.models) * len(b.contexts))
    result: dict[str, Any] = {str(context): {} for context in b.contexts}
    for name in b.models:
        subject = Subject(name, s, 1, compiled=True)
        for context in b.contexts:
            batch = max(1, b.step_tokens // context)
            for recompute in (False, True):
                capture = s.device == "cuda" and not recompute
                step = subject.step(s, batch, context, recompute, capture)
                measured = measure({name: step}, s.device, b.repeats, b.seconds / len(b.contexts))[name]
                del step
                subject.optimizer.zero_grad(set_to_none=True)
                release()
                if measured.failure != "out of memory":
                    break
            found = subject.found(s, measured, context, batch) | {
                "recomputed": recompute,
                "captured": capture,
            }
            if capture:
                found["step_peak_bytes"] = None  # the graph has its memory from before the step
            result[str(context)][name] = found
            _compare(result[str(context)])
            keep(result)
            progress.advance(task)
        del subject
        release()
    return result


class Subject:
    """A preset with its optimiser, on the device, sharded over several processes if there are."""

    def __init__(self, name: str, s: Settings, world: int, compiled: bool = False) -> None:
        torch.manual_seed(0)
        attention = {"attn_implementation": "flex_attention"} if compiled else {}
        with torch.device(s.device):
            self.model = build_model(name, s.for_bars(), **attention).train()
        for block in self.model.layers if compiled else ():
            # On a CPU, where this is only tried, inductor takes minutes.
            block.compile(dynamic=False, backend="inductor" if s.device == "cuda" else "eager")
        enable = getattr(self.model, "activation_checkpointing_enable", None)
        (enable or self.model.gradient_checkpointing_enable)()
        self.parameters = count_parameters(self.model)
        self.flops = {tokens: training_flops(self.model, tokens) for tokens in s.bars.contexts}
        if world > 1:
            shard(self.model, s.device, world)
        fused = s.device == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=fused)

    def found(self, s: Settings, one: Measured, context: int, batch: int, world: int = 1) -> dict[str, Any]:
        """What was measured of its steps on `batch` sequences of T = context in each of `world` processes."""
        found: dict[str, Any] = {"parameters": self.parameters, "batch": batch}
        found |= one.summary(batch * context * world)
        if one.seconds:
            rate = s.bars.peak_flops or peak_of(torch.cuda.get_device_name() if s.device == "cuda" else "")
            achieved = self.flops[context] * found["tokens_per_second"] / world
            found |= {"flops_per_token": self.flops[context], "mfu": achieved / rate if rate else None}
        return found

    def step(self, s: Settings, batch: int, tokens: int, recompute: bool, capture: bool = False) -> Step:
        """A training step on random tokens; capture: what comes before the optimiser as a CUDA graph."""
        bars = s.for_bars()
        ids = torch.randint(0, bars.vocabulary, (batch, tokens), device=s.device)

        def gradients() -> None:
            # Enabled once, switched here; the methods of the model that do it change their names.
            for module in self.model.modules():
                if hasattr(module, "gradient_checkpointing"):
                    module.gradient_checkpointing = recompute
            with bars.autocast():
                loss = self.model(ids, labels=ids, use_cache=False).loss
            loss.backward()

        def step() -> None:
            try:
                gradients()
                self.optimizer.step()
            finally:
                self.optimizer.zero_grad(set_to_none=True)

        graph: list[torch.cuda.CUDAGraph] = []

        def replay() -> None:
            if not graph:
                captured = torch.cuda.CUDAGraph()
                capture_graph(captured, gradients, lambda: self.optimizer.zero_grad(set_to_none=True))
                graph.append(captured)
            graph[0].replay()
            self.optimizer.step()

        return replay if capture else step
