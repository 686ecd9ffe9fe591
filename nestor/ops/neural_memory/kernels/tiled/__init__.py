"""The kernels that most memories run on, again in CUDA: chunks of 64 tokens, heads of width 64, bfloat16.

Triton cannot keep the state of a walk in shared memory from chunk to chunk, nor let the programs of a walk meet
in it. The functions here take the places of the launches in `walk.py`, on the same tensors.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestor.ops import cuda

TILE = 64
SPLITS = (1, 2, 4)
THREADS = 256
# Bytes of a program's shared memory besides its tiles: the norm's parameters, two barriers.
SMALL = 2 * TILE * 4 + 2 * 8
FOLDER = Path(__file__).parent
#: False: all kernels are Triton's.
ENABLED = True


def covers(device: torch.device, dtype: torch.dtype, chunk: int, width: int, hidden: int) -> bool:
    """Whether these kernels compute such a memory here."""
    return (
        ENABLED
        and dtype == torch.bfloat16
        and chunk == width == TILE
        and hidden % TILE == 0
        and hidden // TILE in SPLITS
        and cuda.obstacle(device) is None
    )


def aligned(x: Tensor) -> Tensor:
    """x ``[B, T, H, p]`` with rows that begin at multiples of 16 bytes."""
    whole = x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:3])
    return x if whole else x.clone(memory_format=torch.contiguous_format)


def launch(
    name: str, blocks: tuple[int, ...], tiles: int, definitions: dict[str, Any],
    tensors: Sequence[Tensor | None], longs: Sequence[int], ints: Sequence[int], floats: Sequence[float],
    device: torch.device,
) -> None:  # fmt: skip
    """Queue the kernel `name` of the file of that name.

    Args:
        tiles: of 64 x 64 bfloat16 numbers, in shared memory, besides SMALL bytes.
        definitions: compile-time choices; booleans as 0 and 1.
    """
    index = device.index if device.index is not None else torch.cuda.current_device()
    definitions = {**definitions, "WGMMA": cuda.architecture(index) == "sm_90a"}
    kernel = cuda.load_kernel(
        (FOLDER / "tiles.cuh", FOLDER / f"{name}.cu"),
        f"{name}_kernel",
        tuple((key, int(value)) for key, value in sorted(definitions.items())),
        THREADS,
        tiles * TILE * TILE * 2 + SMALL,
        index,
    )
    kernel(blocks, tensors, longs, ints, floats)
