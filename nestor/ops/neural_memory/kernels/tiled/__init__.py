"""The kernels that most memories run on, again in CUDA: chunks and heads of 64, bfloat16.

Triton cannot keep the state of a walk in registers and shared memory as these do, nor let the programs of a
walk trade sums through shared memory. They take the places of Triton's kernels in `walk.py`, on the same
tensors; what only kernels read lies in the order in which they want it (see tiles.cuh).
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestor.ops import cuda

TILE = 64
#: Slices of 64 of the hidden width; each is a program of a walk.
SPLITS = (1, 2, 4)
THREADS = 256
# Bytes of a program's shared memory besides its tiles: the norm's parameters and barriers.
SMALL = 2 * TILE * 4 + 5 * 8
FOLDER = Path(__file__).parent
# Tiles of 64 x 64 bfloat16 numbers in a program's shared memory: always, with targets, with momentum.
TILES = {
    "read": (11, 4, 4),
    "read_backward": (20, 4, 4),
    "write_gradients": (3, 0, 0),
    "decode": (1, 0, 0),
}
# The same for the programs of a walk: at once, and of each slice.
WALK_TILES = {"write": ((4, 0, 0), (5, 2, 3)), "write_backward": ((5, 0, 0), (10, 7, 6))}
#: Of a grid, and of sizes that change: queues a kernel.
Queue = Callable[..., None]
#: False: all kernels are Triton's.
ENABLED = True


def covers(device: torch.device, dtype: torch.dtype, chunk: int, width: int, hidden: int) -> bool:
    """Whether these kernels compute such a memory here."""
    return chunk == TILE and dtype == torch.bfloat16 and covers_decode(device, width, hidden)


def covers_decode(device: torch.device, width: int, hidden: int) -> bool:
    """Whether `decode` computes one token here; in bfloat16 or float32, whatever the length of chunks."""
    sizes = width == TILE and hidden % TILE == 0 and hidden // TILE in SPLITS
    return ENABLED and sizes and cuda.obstacle(device) is None


def begins_aligned(x: Tensor) -> bool:
    """Whether x begins at a multiple of 16 bytes: kernels read and write such pieces."""
    return x.data_ptr() % 16 == 0


def aligned(x: Tensor) -> Tensor:
    """x ``[B, T, H, p]`` with rows that begin at multiples of 16 bytes."""
    whole = begins_aligned(x) and all(stride % 8 == 0 for stride in x.stride()[:3])
    return x if whole else x.clone(memory_format=torch.contiguous_format)


def prepare(
    name: str, programs: int, choices: dict[str, Any], tensors: Sequence[Tensor | None],
    strides: Sequence[int], sizes: Sequence[int], numbers: Sequence[float], device: torch.device,
) -> Queue:  # fmt: skip
    """The kernel `name` of the file of that name and its arguments: a function of a grid, and of sizes that
    change (see `cuda.Launch`), that queues it.

    Args:
        programs: of a walk, in the largest grid. choices: compile-time definitions; booleans as 0 and 1.
    """
    slices = 1
    if name in WALK_TILES:
        slices = _slices(name, programs, choices["SPLIT"], device)
        choices = choices | {"SLICES": slices}
    queued = _kernel(name, device, tuple(choices.items())).prepare(tensors, strides, sizes, numbers)
    if slices == 1:
        return queued
    return lambda grid, changed=(): queued((grid[0] // slices,), changed)


@functools.cache
def _kernel(name: str, device: torch.device, choices: tuple[tuple[str, Any], ...]) -> cuda.CudaKernel:
    definitions = {key: int(value) for key, value in choices}
    definitions["WGMMA"] = int(cuda.architecture(device) == "sm_90a")
    sources = ["tiles.cuh", f"{name}.cu"]

    def count(always: int, targets: int, momentum: int) -> int:
        return always + targets * definitions["TARGET"] + momentum * definitions["MOMENTUM"]

    if name in WALK_TILES:
        sources.insert(1, "cluster.cuh")
        once, each = WALK_TILES[name]
        slices = definitions["SLICES"]
        tiles = count(*once) + slices * count(*each)
    else:
        tiles = count(*TILES[name])
    return cuda.load_kernel(
        tuple(FOLDER / source for source in sources),
        f"{name}_kernel",
        tuple(sorted(definitions.items())),
        THREADS,
        tiles * TILE * TILE * 2 + SMALL,
        device,
    )


@functools.cache
def lanes(walks: int, split: int, device: torch.device) -> int:
    """In how many parts, one after another, walks leave half of the multiprocessors to other kernels; 0:
    they are so many that they do best all at once. A last part may be smaller than the others.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    if walks * split > processors:
        return 0
    return next(n for n in range(1, walks + 1) if -(-walks // n) * split <= processors // 2)


@functools.cache
def _slices(name: str, programs: int, split: int, device: torch.device) -> int:
    """Slices of the hidden width to a program of a walk.

    A program for each is the fastest walk. But a cluster of four finds room on about 31 of 33 quarters of an
    H100: where not all walks have room at once, two slices to a program let more of them run. The backward
    has no registers for that.
    """
    many = programs > torch.cuda.get_device_properties(device).multi_processor_count
    return 2 if many and split > 1 and name == "write" else 1


def _tile_places(device: torch.device) -> Tensor:
    """Where in memory each number of a tile ``[64, 64]`` lies: pieces of 8, swizzled by the row."""
    # Made once, but not inside of a CUDA graph: its memory is the graph's.
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return (_new_places if capturing else _kept_places)(device)


def _new_places(device: torch.device) -> Tensor:
    number = torch.arange(TILE * TILE, device=device)
    return number ^ ((number >> 6 & 7) << 3)


_kept_places = functools.cache(_new_places)


def targets_as_tiles(targets: Tensor) -> Tensor:
    """``[H, 2, P HIDDEN]`` float32 as bfloat16 tiles ``[H, 2, SPLIT, P P]``."""
    w1, w2 = targets.unbind(1)
    slices = torch.stack(
        (w1.unflatten(1, (TILE, -1, TILE)).transpose(1, 2).flatten(2), w2.unflatten(1, (-1, TILE * TILE))), 1
    )
    made = torch.empty_like(slices, dtype=torch.bfloat16)
    made[..., _tile_places(targets.device)] = slices.to(torch.bfloat16)
    return made


def targets_from_fragments(fragments: Tensor) -> Tensor:
    """``[M, 2 P HIDDEN]`` as fragments, in rows."""
    # Bits of a number's place: a column's, a row's (see tiles.cuh).
    bits = fragments.view(len(fragments), 2, -1, 2, 2, 4, 8, 4, 2, 2, 2)
    by_row = bits.permute(0, 1, 2, 5, 9, 6, 4, 3, 8, 7, 10).reshape(len(fragments), 2, -1, TILE * TILE)
    w1 = by_row[:, 0].unflatten(2, (TILE, TILE)).transpose(1, 2).flatten(1)
    return torch.cat((w1, by_row[:, 1].flatten(1)), 1)
