"""CUDA kernels, compiled by NVRTC on first use and kept in the user's cache folder.

NVRTC and the driver are reached through cuda-bindings, which comes with PyTorch's CUDA builds. A kernel's
arguments are pointers, then 64-bit integers, 32-bit integers and floats.
"""

import ctypes
import functools
import hashlib
import importlib.util
import logging
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestor.files import atomic_write
from nestor.ops.compilation import CompilationError, cache_folder

logger = logging.getLogger(__name__)

#: Bytes that a block can have on the GPUs that these kernels are for, not all of capability 9 and later.
SHARED_MEMORY = 227 * 1024
# The driver's names for a launch with its arguments in one buffer (CU_LAUNCH_PARAM_*).
BUFFER_END, BUFFER_POINTER, BUFFER_SIZE = 0, 1, 2


@functools.cache
def obstacle(device: torch.device) -> str | None:
    """Why CUDA kernels with clusters cannot run on this device; None: they can."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"CUDA kernels run on NVIDIA GPUs, not on {device.type}"
    if torch.cuda.get_device_capability(device) < (9, 0):
        return "they need a GPU of compute capability 9.0 or later"
    properties: Any = torch.cuda.get_device_properties(device)
    if properties.shared_memory_per_block_optin < SHARED_MEMORY:
        return f"they need {SHARED_MEMORY // 1024} KiB of shared memory for a block"
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return "they need cuda-bindings (pip install cuda-bindings)"
    return None


@functools.cache
def architecture(device: torch.device) -> str:
    """What to compile for; on Hopper with the instructions that only it has."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


class CudaKernel:
    """A kernel on one device."""

    def __init__(self, function: Any, threads: int, shared: int, device: int) -> None:
        from cuda.bindings import driver

        self.function, self.threads, self.shared, self.device = function, threads, shared, device
        self.launch = driver.cuLaunchKernel
        kinds = driver.CUfunction_attribute
        size = kinds.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        # All the room there is: as many blocks to a multiprocessor as fit.
        room = kinds.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        for kind, value in ((size, shared), (room, 100)):
            _check(driver.cuFuncSetAttribute(function, kind, value))

    def prepare(
        self,
        tensors: Sequence[Tensor | None],
        longs: Sequence[int],
        ints: Sequence[int],
        floats: Sequence[float],
    ) -> "Launch":
        """The kernel with its arguments. None is a null pointer."""
        return Launch(self, tensors, longs, ints, floats)


class Launch:
    """A kernel and its arguments, to be queued any number of times."""

    def __init__(
        self,
        kernel: CudaKernel,
        tensors: Sequence[Tensor | None],
        longs: Sequence[int],
        ints: Sequence[int],
        floats: Sequence[float],
    ) -> None:
        pointers = [0 if x is None else x.data_ptr() for x in tensors]
        wide = len(pointers) + len(longs)
        packed = struct.pack(f"{wide}q{len(ints)}i{len(floats)}f", *pointers, *longs, *ints, *floats)
        self._kernel, self._tensors, self._first_int = kernel, tensors, 8 * wide
        self._arguments = (ctypes.c_char * len(packed)).from_buffer_copy(packed)
        self._size = ctypes.c_size_t(len(packed))
        self._extra = (ctypes.c_void_p * 5)(
            BUFFER_POINTER,
            ctypes.addressof(self._arguments),
            BUFFER_SIZE,
            ctypes.addressof(self._size),
            BUFFER_END,
        )
        self._address = ctypes.addressof(self._extra)

    def __call__(self, grid: tuple[int, ...], changed: Sequence[tuple[int, int]] = ()) -> None:
        """Queue it on the device's current stream.

        Args:
            grid: blocks, in one to three dimensions. changed: numbers of 32-bit integers among the arguments,
                and what each is from now on.
        """
        for number, value in changed:
            struct.pack_into("i", self._arguments, self._first_int + 4 * number, value)
        kernel = self._kernel
        x, y, z = (*grid, 1, 1)[:3]
        stream = torch._C._cuda_getCurrentRawStream(kernel.device)
        (status,) = kernel.launch(
            kernel.function, x, y, z, kernel.threads, 1, 1, kernel.shared, stream, 0, self._address
        )
        if status:
            raise RuntimeError(f"CUDA: {status!r}")


def load_kernel(
    sources: tuple[Path, ...],
    name: str,
    definitions: tuple[tuple[str, int], ...],
    threads: int,
    shared: int,
    device: torch.device,
) -> CudaKernel:
    """The kernel `name` of the sources, one after another, with the definitions before them; to be kept.

    Args:
        threads: of a block. shared: bytes of dynamic shared memory of a block.

    Raises:
        CompilationError: NVRTC refuses it.
    """
    from cuda.bindings import driver

    code = "".join(f"#define {key} {value}\n" for key, value in definitions)
    code += "".join(source.read_text() for source in sources)
    image = _image(code, name, architecture(device))
    with torch.cuda.device(device):
        torch.cuda.current_stream()
        module = _check(driver.cuModuleLoadData(image))
        function = _check(driver.cuModuleGetFunction(module, name.encode()))
        return CudaKernel(function, threads, shared, torch.cuda.current_device())


def _image(code: str, name: str, target: str) -> bytes:
    """The compiled kernel, from the cache folder if it has been compiled before."""
    from cuda.bindings import nvrtc

    version = _check(nvrtc.nvrtcVersion())
    key = "\0".join((code, target, str(version))).encode()
    kept = cache_folder() / f"{name}-{hashlib.sha256(key).hexdigest()[:20]}.cubin"
    if kept.exists():
        return kept.read_bytes()
    logger.info("compiling %s for %s", name, target)
    image = _compile(code, name, target)
    with atomic_write(kept) as made:
        made.write_bytes(image)
    return image


def _compile(code: str, name: str, target: str) -> bytes:
    from cuda.bindings import nvrtc

    program = _check(nvrtc.nvrtcCreateProgram(code.encode(), f"{name}.cu".encode(), 0, [], []))
    options = [f"--gpu-architecture={target}".encode(), b"--device-as-default-execution-space"]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = bytes(_check(nvrtc.nvrtcGetProgramLogSize(program)))
        _check(nvrtc.nvrtcGetProgramLog(program, log))
        raise CompilationError(f"NVRTC fails on {name}: {log.decode(errors='replace').strip(chr(0))}")
    image = bytes(_check(nvrtc.nvrtcGetCUBINSize(program)))
    _check(nvrtc.nvrtcGetCUBIN(program, image))
    return image


def _check(result: tuple[Any, ...]) -> Any:
    """What a call of cuda-bindings returns beside its status."""
    status, *values = result
    if int(status):
        raise RuntimeError(f"CUDA: {status!r}")
    if len(values) == 1:
        return values[0]
    return tuple(values)
