"""Which walks the kernel in CUDA takes, and what it is given."""

import importlib.util
import re

import pytest
import torch

from nestor.ops import cuda

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

RULE = "l2 bounded dgd spectral running zero unit tf32"
USUAL = ("k", "v", "eta", "alpha")


def problem(names=USUAL, rule=RULE, chunk=16, width=64, is_open=False, dtype=torch.float32):
    """Sizes and choices of a walk, and its inputs by letter."""
    from nestor.ops.self_modifying.kernels import calls

    gates = any(name in calls.GATE_COLUMNS for name in names)
    columns = sum(width for name in names if name in calls.COLUMNS) + calls.GATES * gates
    x, weights = torch.zeros(1, 16, 1, width, dtype=dtype), torch.zeros(1, width, columns)
    sizes = calls._shapes(x, weights, " ".join(names), chunk, 1)
    choices = calls._choices(x, None, None, torch.ones(1, 1) if is_open else None, rule)
    return sizes, choices, dict.fromkeys("QKVG", x)


@pytest.fixture
def tiled(monkeypatch):
    """The module, as if the tensors were on a GPU that it can use."""
    from nestor.ops.self_modifying.kernels import tiled

    monkeypatch.setattr(tiled, "runs_on", lambda device: True)
    return tiled


@pytest.mark.parametrize(
    ("taken", "choices"),
    [
        (True, {}),
        (True, {"is_open": True}),
        (True, {"names": ("mem",), "chunk": 64}),
        (True, {"names": ("k", "v", "q", "eta", "alpha")}),
        (False, {"rule": RULE.replace("tf32", "tf32x3")}),
        (False, {"rule": RULE.replace("zero", "initial")}),
        (False, {"width": 32}),
        # Anchors of so many memories find no room.
        (False, {"names": ("k", "v", "q", "eta", "alpha"), "is_open": True}),
    ],
)
def test_what_the_kernel_takes(tiled, taken, choices) -> None:
    sizes, chosen, inputs = problem(**choices)
    assert tiled.covers(sizes, chosen, [inputs["K"]]) == taken


def test_rows_that_begin_between_pieces_are_left_to_triton(tiled) -> None:
    sizes, choices, _ = problem()
    whole = torch.zeros(1025)
    assert tiled.covers(sizes, choices, [whole[:1024], None])
    assert not tiled.covers(sizes, choices, [whole[:1024], whole[1:]])


def test_no_kernel_without_its_gpu() -> None:
    from nestor.ops.self_modifying.kernels import tiled

    sizes, choices, inputs = problem()
    assert not tiled.covers(sizes, choices, [inputs["K"]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", [USUAL, ("mem",), ("k", "v", "q", "eta", "alpha"), ("v", "alpha")])
def test_a_program_has_room_and_the_next_tile_where_it_fits(tiled, names, dtype) -> None:
    sizes, choices, inputs = problem(names, dtype=dtype)
    found = tiled.definitions(sizes, choices, inputs)
    assert found["SHARED"] == tiled._room(found) <= cuda.SHARED_MEMORY
    both = tiled._room(found | {"STAGES": 2})
    assert found["STAGES"] == (2 if both <= cuda.SHARED_MEMORY else 1)
    assert (found["STAGES"] == 1) == ("q" in names)
    assert found["HALF_K"] == (dtype == torch.bfloat16)


def test_the_kernel_gets_what_its_source_declares(tiled, monkeypatch) -> None:
    from nestor.ops.self_modifying.kernels import calls

    seen = []

    def prepare(chosen, tensors, integers, numbers, device):
        seen.append((chosen, [len(tensors), len(integers), len(numbers)]))
        return lambda grid: seen.append(grid)

    monkeypatch.setattr(tiled, "prepare", prepare)
    x, bias = torch.randn(2, 32, 3, 64), torch.zeros(6)
    stack = torch.randn(6, 64, 160)
    rooms = calls._rooms(x, stack, False, " ".join(USUAL), 16, 2, True, True)
    outputs = [torch.zeros(shape) for shape in rooms]
    found = calls.self_modifying_walk_backward(
        x, None, x, x, None, None, stack, bias, bias, None, None, None, outputs, outputs[:6] + outputs[7:9],
        " ".join(USUAL), RULE, 16, 2, 1.0, 64.0, 1e-6,
    )  # fmt: skip
    assert [g.shape for g in found[:4]] == [x.shape, torch.Size([0]), x.shape, x.shape]

    (chosen, counts), grid = seen
    sources = "".join((tiled.FOLDER / name).read_text() for name in tiled.SOURCES)
    signature = re.search(r"backward_kernel\((.*?)\) \{", sources, re.DOTALL).group(1).split(",")
    kinds = ["pointer" if "*" in part else part.split()[-2] for part in signature]
    assert kinds == ["pointer"] * counts[0] + ["int"] * counts[1] + ["float"] * counts[2]
    assert grid == (6,)
    assert all(re.search(rf"\b{name}\b", sources) for name in chosen)
