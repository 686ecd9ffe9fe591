"""The benchmark's sections that measure the bars, on tiny shapes on a CPU."""

import importlib
import json
import math

import pytest
import torch
from torch import nn

from nestor.layers.attention import Attention
from nestor.layers.neural_memory import NeuralMemory

TINY = {
    "subjects": ("neural_memory", "tnt", "attention", "kda", "titans-pytorch-x4"), "shapes": ("1x64", "2x32"),
    "lengths": (32, 64), "dim": 32, "heads": 2, "expansion": 2, "chunk": 16, "tnt_chunk": 16,
    "tnt_locals": (8,), "tnt_shard": 32, "users": 2, "read": (16, 32), "slice": 16, "size": "quick",
    "vocabulary": 64, "contexts": (16, 32), "step_tokens": 32, "dtype": "float32", "peak_flops": 1e12,
    "repeats": 2,
}  # fmt: skip


@pytest.fixture
def tiny(benchmark_modules, tmp_path):
    settings = importlib.import_module("settings")
    return settings.Settings(threads=1, bars=settings.Bars(**TINY), output=tmp_path / "result.json")


def check_summary(summary: dict, tokens: int) -> None:
    assert summary["rounds"] == 2 and 0 < summary["seconds_min"] <= summary["seconds_median"]
    assert math.isclose(summary["tokens_per_second"], tokens / summary["seconds_median"])


def run(settings, *sections: str) -> dict:
    program = importlib.import_module("layers")
    settings.sections = sections
    program.main(settings)
    return json.loads(settings.output.read_text())


def test_layers_at_every_shape_and_what_cannot_run_here(tiny) -> None:
    result = run(tiny, "shapes")["shapes"]
    assert result["about"]["settings"]["chunk"] == 16
    assert "needs a CUDA GPU" in result["left_out"]["kda"] or torch.cuda.is_available()
    assert "--titans-pytorch" in result["left_out"]["titans-pytorch-x4"]
    for shape in TINY["shapes"]:
        for name in ("neural_memory", "tnt", "attention"):
            check_summary(result[shape][name], 64)


def test_a_section_replaces_its_part_and_a_failing_one_leaves_the_others(tiny, monkeypatch) -> None:
    first = run(tiny, "growth", "users")
    for length in TINY["lengths"]:
        check_summary(first["growth"][str(length)], length)
    assert first["growth"]["32"]["token_time_over_first"] == 1
    for read in TINY["read"]:
        found = first["users"][str(read)]
        # Two layers, momentum and anchor, two users and heads; the rest are tails and phases.
        assert found["state_bytes"] > 3 * 2 * 2 * 2 * 16 * 32 * 4
        assert found["eager"]["time_over_copy"] > 0 and found["copy"]["seconds_min"] > 0
    second = run(tiny, "growth")
    assert second["users"] == first["users"] and second["growth"] != first["growth"]

    def broken(*arguments) -> dict:
        raise ValueError("no")

    monkeypatch.setitem(importlib.import_module("layers").RUN_BARS, "users", broken)
    with pytest.raises(SystemExit):
        run(tiny, "growth", "users")
    third = json.loads(tiny.output.read_text())
    assert third["users"]["failure"] == "ValueError: no" and "32" in third["growth"]
    assert [path.name for path in tiny.output.parent.iterdir()] == ["result.json"]


def test_training_counts_its_operations(tiny) -> None:
    result = run(tiny, "training")["training"]["1"]
    for context in TINY["contexts"]:
        for name in ("transformer", "titans-mag"):
            found = result[str(context)][name]
            check_summary(found, 32)
            assert found["batch"] == 32 // context and not found["recomputed"]
            assert math.isclose(found["mfu"], found["flops_per_token"] * found["tokens_per_second"] / 1e12)
        assert result[str(context)]["transformer"]["speed_over_transformer"] == 1
    report = importlib.import_module("report")
    assert "| model titans-mag T32" in report.bars_markdown(json.loads(tiny.output.read_text()))


def test_captured_steps_are_of_compiled_blocks(tiny) -> None:
    """On a CPU nothing is captured."""
    tiny.bars.models = ("transformer",)
    result = run(tiny, "captured")["captured"]
    for context in tiny.bars.contexts:
        found = result[str(context)]["transformer"]
        assert found["tokens_per_second"] > 0 and not found["recomputed"] and not found["captured"]
    assert "T16, compiled, recomputed" in importlib.import_module("report").bars_markdown(
        {"captured": result}
    )
    models = {"titans-mag": {"speed_over_transformer": 0.5, "captured": True}}
    (verdict,) = importlib.import_module("verdicts").verdicts({"captured": {"4096": models}})
    assert not verdict.met and "captured" in verdict.bar


def test_recomputed_activations_give_the_same_gradients(tiny) -> None:
    training = importlib.import_module("training")
    weights = []
    for recompute in (False, True):
        subject = training.Subject("titans-mag", tiny, 1)
        torch.manual_seed(1)
        subject.step(tiny, 1, 32, recompute)()
        weights.append([parameter.detach() for parameter in subject.model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*weights, strict=True))


def test_flops_of_known_models(benchmark_modules) -> None:
    flops = importlib.import_module("flops")
    linear = nn.Linear(8, 4)
    assert flops.training_flops(linear, 16) == 6 * 32
    full, window = Attention(32, 2), Attention(32, 2, window=4)
    projections = 2 * 4 * 32 * 32
    assert flops.training_flops(full, 16) == 3 * (projections + 4 * 8.5 * 32)
    assert flops.visible(window, 16) == (1 + 2 + 3 + 13 * 4) / 16
    memory = NeuralMemory(32, 2, expansion=2, chunk_size=16)
    n = 2 * 16 * 32
    assert flops.memory_flops(memory) == 2 * n + 2 * n + n + 4 * n + 16 * 2 * (16 + 32)
    assert flops.peak_of("NVIDIA H100 80GB HBM3") == 989.4e12 and flops.peak_of("another") is None


def test_steps_that_fail_or_come_too_late_are_recorded(benchmark_modules) -> None:
    rounds = importlib.import_module("rounds")

    def full() -> None:
        raise torch.OutOfMemoryError("too much")

    measured = rounds.measure({"full": full, "good": lambda: None}, "cpu", 3, 60.0)
    assert measured["full"].summary(1)["failure"] == "out of memory"
    assert measured["good"].summary(1)["rounds"] == 3
    assert rounds.measure({"good": lambda: None}, "cpu", 3, 0.0)["good"].summary(1)["rounds"] == 1
    late = rounds.measure({"good": lambda: None}, "cpu", 3, 60.0, rounds.Deadline(-1.0))["good"]
    assert late.failure == "out of time" and not late.seconds


def test_verdicts_say_what_was_wanted_and_measured(benchmark_modules) -> None:
    verdicts = importlib.import_module("verdicts").verdicts
    lines = verdicts({
        "shapes": {
            "left_out": {},
            "8x4096": {"neural_memory": {"speed_over_kda": 0.9, "speed_over_titans-pytorch-x4": 7.0}},
            "1x65536": {"neural_memory": {"speed_over_kda": 0.8}, "tnt": {"speed_over_kda": 1.2}},
        },
        "growth": {"4096": {"token_time_over_first": 1.0}, "262144": {"failure": "out of memory"}},
        "first_call": {"cold": {"first": 50.0}, "warm": {"first": 6.0}},
        "users": {"users": 64, "1024": {"graph": {"time_over_copy": 1.4}, "eager": {"time_over_copy": 3.0}}},
        "training": {"2": {"4096": {"titans-mag": {"speed_over_transformer": 0.5, "scaling": 1.9}}}},
    })  # fmt: skip
    assert [line.met for line in lines] == [
        False, True, True, True, True, False, True, False, True, False, True,
    ]  # fmt: skip
    assert "(graph)" in lines[8].bar and lines[5].measured == "out of memory"


def test_kernels_lists_what_a_step_consists_of(benchmark_modules, tmp_path) -> None:
    kernels = importlib.import_module("kernels")
    settings = kernels.Settings(
        shapes=("1x32",), dim=32, heads=2, chunk=16, expansion=2, dtype="float32", steps=1,
        output=tmp_path / "kernels.json",
    )  # fmt: skip
    kernels.main(settings)
    found = json.loads(settings.output.read_text())["1x32"]
    times = [kernel["ms"] for kernel in found["kernels"]]
    assert times == sorted(times, reverse=True) and math.isclose(sum(times), found["kernels_ms"])
    assert found["ms"] > 0 and found["about"]["settings"]["chunk"] == 16


@pytest.mark.slow
def test_first_call_and_two_processes(tiny) -> None:
    tiny.gpus = 2
    tiny.bars.shapes = ("1x32",)
    result = run(tiny, "first_call", "training")
    assert result["first_call"]["cold"]["first"] > result["first_call"]["warm"]["first"] > 0
    for context in TINY["contexts"]:
        found = result["training"]["2"][str(context)]["titans-mag"]
        check_summary(found, 64)
        assert found["scaling"] > 0
