"""The walk of `backward.py` again in CUDA, for memories of 64 x 64 whose products are of TF32.

Triton's programs exchange each product through shared memory, and have no registers for all that they keep
from tile to tile. Here a warp has columns of its own from the first tile to the last (see backward.cu). The
tensors are the same, but for the scratch memory.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestor.ops import cuda

WIDTH = 64
FOLDER = Path(__file__).parent
SOURCES = (
    "instructions.cuh", "rows.cuh", "program.cuh", "targets.cuh", "tokens.cuh", "made.cuh", "backward.cu",
)  # fmt: skip
TARGETS = ("self", "bounded", "value")
CHOICES = ("L2", "DGD", "CAP", "RUNNING", "UNIT", "OPEN", "HAS_VALID", "HAS_RESETS")
# Bytes: a slice of 16 columns or the rows of a tile; numbers of 16 x 16, in rows of 20 or not; of 16 tokens.
NUMBERS = 16 * WIDTH
BLOCK, PADDED, SQUARE, ROW = NUMBERS * 4, 16 * 20 * 4, 16 * 16 * 4, 16 * 4
#: False: all kernels are Triton's.
ENABLED = True


def covers(sizes: dict[str, int], choices: dict[str, Any], tensors: Sequence[Tensor | None]) -> bool:
    """Whether the kernel takes such memories, and what a walk is given, here. Sizes and choices as the walk's
    in Triton have them."""
    alone = sizes["M"] < 0 or sizes["O"] == WIDTH
    if choices["INITIAL"] or not (
        ENABLED and alone and sizes["P"] == WIDTH and choices["PRECISION"] == "tf32"
    ):
        return False
    given = [x for x in tensors if x is not None]
    # Kernels read and write pieces of 16 bytes.
    if not (runs_on(given[0].device) and all(x.data_ptr() % 16 == 0 for x in given)):
        return False
    return _room(_flags(sizes, choices) | {"STAGES": 1}) <= cuda.SHARED_MEMORY


def runs_on(device: torch.device) -> bool:
    return cuda.obstacle(device) is None


def backward(
    sizes: dict[str, int], choices: dict[str, Any], inputs: Sequence[Tensor | None],
    kept: Sequence[Tensor | None], gradients: Sequence[Tensor | None], found: Sequence[Tensor],
    chunks: int, numbers: Sequence[float],
) -> None:  # fmt: skip
    """Queue the walk backward.

    Args:
        inputs: xq, xk, xv, xg, eta, alpha, valid, resets, closes, start, bias of alpha. kept: by the walk
            forward: k, v, eta, and all that it keeps. gradients: of what it makes. found: room for the
            gradients, xq's first. numbers: max_step, horizon, eps.
    """
    xq, xk, xv, xg, start = *inputs[:4], inputs[9]
    assert xk is not None and start is not None
    chosen = definitions(sizes, choices, {"Q": xq, "K": xk, "V": xv, "G": xg})
    count, programs = slices(chosen), len(start)
    tiles, anchors = (
        programs * n * count * NUMBERS for n in (sizes["SEGMENT"] * sizes["TILES"], sizes["SEGMENT"])
    )
    scratch = start.new_empty(tiles), start.new_empty(anchors if _anchored(chosen) else 0)
    tensors = [*inputs, *kept, *gradients, *scratch, *found]
    queue = prepare(chosen, tensors, (*xk.shape[1:3], chunks), numbers, xk.device)
    queue((programs,))


def prepare(
    chosen: dict[str, int], tensors: Sequence[Tensor | None], integers: Sequence[int],
    numbers: Sequence[float], device: torch.device,
) -> Callable[[tuple[int, ...]], None]:  # fmt: skip
    """The kernel and its arguments: a function of a grid that queues it."""
    return _kernel(device, tuple(sorted(chosen.items()))).prepare(tensors, (), integers, numbers)


@functools.cache
def _kernel(device: torch.device, chosen: tuple[tuple[str, int], ...]) -> cuda.CudaKernel:
    sizes = dict(chosen)
    sources, threads = tuple(FOLDER / name for name in SOURCES), 32 * (slices(sizes) + 1)
    return cuda.load_kernel(sources, "walk_backward_kernel", chosen, threads, sizes["SHARED"], device)


def definitions(
    sizes: dict[str, int], choices: dict[str, Any], inputs: dict[str, Tensor | None]
) -> dict[str, int]:
    """What the kernel is compiled with. inputs: xk, xv, xq and xg by the letter of what is made of them."""
    found = _flags(sizes, choices)
    found |= {f"HALF_{name}": int(x is not None and x.dtype == torch.bfloat16) for name, x in inputs.items()}
    # The inputs of the next tile come while one is worked on, where there is room for both.
    stages = 2 if _room(found | {"STAGES": 2}) <= cuda.SHARED_MEMORY else 1
    return found | {"STAGES": stages, "SHARED": _room(found | {"STAGES": stages})}


def _flags(sizes: dict[str, int], choices: dict[str, Any]) -> dict[str, int]:
    found = {f"HAS_{name}": int(sizes[name] >= 0) for name in "KVQM"}
    found |= {"GATE_E": sizes["E"], "GATE_A": sizes["A"], "CHUNK": sizes["C"]}
    found |= {name: sizes[name] for name in ("TILES", "SEGMENT")}
    found |= {name: int(choices[name]) for name in CHOICES}
    return found | {"TARGETS": TARGETS.index(choices["TARGETS"])}


def slices(chosen: dict[str, int]) -> int:
    """Slices of 16 columns that the memories have, with the gates'."""
    return 4 * sum(chosen[f"HAS_{name}"] for name in "KVQM") + _has_gates(chosen)


def _has_gates(chosen: dict[str, int]) -> bool:
    return chosen["GATE_E"] >= 0 or chosen["GATE_A"] >= 0


def _anchored(chosen: dict[str, int]) -> bool:
    """Whether the anchor may be other than the memory before a tile."""
    return chosen["TILES"] > 1 or bool(chosen["OPEN"])


def _room(chosen: dict[str, int]) -> int:
    """Bytes of shared memory, as program.cuh cuts them up; rows of x as float32 unless known."""
    k, v, q, mem = (chosen[f"HAS_{name}"] for name in "KVQM")
    dgd, count, gates = chosen["DGD"], slices(chosen), _has_gates(chosen)
    reads = mem * chosen["RUNNING"]
    values = count // 4 if TARGETS[chosen["TARGETS"]] == "value" else count
    norms = count if TARGETS[chosen["TARGETS"]] == "bounded" else 0
    x = {name: BLOCK // 2 if chosen.get(f"HALF_{name}") else BLOCK for name in "KVQG"}
    inputs = x["K"] + k * BLOCK + x["V"] + v * BLOCK + (q or mem) * x["Q"] + gates * x["G"] + mem * BLOCK
    inputs += (count + dgd) * PADDED + 2 * ROW
    total = chosen["STAGES"] * (inputs + (1 + _anchored(chosen)) * count * BLOCK)
    total += (count + values + (4 if mem else q)) * BLOCK
    total += (dgd * count + reads * 4) * SQUARE + (dgd + reads) * PADDED
    # What tokens have, for two tiles; sums; norms of targets and of queries; gates.
    return total + (2 * 8 + count * 4 + norms * 2 + q * 4 * 2 + 6) * ROW
