"""benchmarks/layers.py on tiny shapes: it runs, and its JSON says what was measured."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "layers.py"
TINY = {
    "batch": 1, "tokens": 64, "dim": 32, "heads": 2, "chunk": 16, "window": 32, "size": "quick", "repeats": 2,
    "threads": 1, "long": 256, "decode-tokens": 4,
}  # fmt: skip


def run(output: Path, *arguments: str) -> dict:
    tiny = [text for name, value in TINY.items() for text in (f"--{name}", str(value))]
    command = [
        sys.executable,
        str(PROGRAM),
        *tiny,
        "--lengths",
        "32",
        "64",
        "--output",
        str(output),
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


def check_timing(timing: dict, tokens: int, reference: bool) -> None:
    assert 0 < timing["seconds_min"] <= timing["seconds_median"]
    assert math.isclose(timing["tokens_per_second"], tokens / timing["seconds_median"])
    low, high = timing["ratio_quartiles"]
    assert low <= timing["ratio_median"] <= high
    if reference:
        assert low == high == 1


@pytest.mark.slow
def test_every_section_runs_and_writes_what_it_measured(tmp_path) -> None:
    result = run(tmp_path / "result.json")
    assert result["about"]["settings"]["tokens"] == 64 and result["about"]["versions"]["torch"]
    assert set(result["layers"]) == {"full_attention", "sliding_attention", "neural_memory", "memory_as_gate"}
    for name, layer in result["layers"].items():
        check_timing(layer["forward_backward"], 64, name == "full_attention")
        check_timing(layer["decode"], 4, name == "full_attention")
        assert layer["peak_bytes"] > 4 * layer["parameters"]  # weights and gradients at least
    for name, model in result["models"].items():
        check_timing(model["step"], 64, name == "transformer")
        assert model["peak_bytes"] > 16 * model["parameters"]["total"]  # and two moments
    assert list(result["length"]["seconds_min"]) == ["32", "64"]
    assert all(long["finite"] and long["tokens"] == 256 for long in result["long"].values())


def test_sections_are_chosen_and_unknown_ones_refused(tmp_path) -> None:
    result = run(tmp_path / "result.json", "--sections", "long")
    assert set(result) == {"about", "long"}
    command = [sys.executable, str(PROGRAM), "--sections", "lenght"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode != 0 and "unknown section lenght" in refused.stderr


def test_titans_pytorch_is_measured_where_it_is_installed(tmp_path) -> None:
    found = importlib.util.find_spec("titans_pytorch")
    folder = os.environ.get("TITANS_PYTORCH") or (found and str(Path(found.origin).parents[1]))
    if not folder:
        pytest.skip("titans-pytorch is not installed and TITANS_PYTORCH does not name its folder")
    result = run(tmp_path / "result.json", "--sections", "layers", "models", "--titans-pytorch", folder)
    check_timing(result["layers"]["titans-pytorch"]["forward_backward"], 64, reference=False)
    own, peer = (result["models"][n]["parameters"]["total"] for n in ("titans-lmm", "titans-pytorch"))
    assert abs(own / peer - 1) < 0.02
