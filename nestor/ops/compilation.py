"""C++ kernels, compiled on first use and kept in the user's cache folder."""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

from nestor.files import atomic_write

logger = logging.getLogger(__name__)

FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-fPIC",
    "-shared",
)


class CompilationError(Exception):
    """A kernel cannot be compiled here; the message says why."""


@functools.cache
def load_library(source: Path, *defines: str) -> ctypes.CDLL:
    """The shared library of a C++ file, compiled with ``-D`` each of the defines.

    A compiler is looked for as ``$CXX``, then c++, g++, clang++. Libraries lie in ``$XDG_CACHE_HOME/nestor``
    (``~/.cache/nestor``), named by their source, the command, the compiler and the processor.

    Raises:
        CompilationError: there is no compiler, or it fails; not tried again in this process.
    """
    outcome = _load(source, defines)
    if isinstance(outcome, str):
        raise CompilationError(outcome)
    return outcome


@functools.cache
def _load(source: Path, defines: tuple[str, ...]) -> ctypes.CDLL | str:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if os.name != "posix":
        return f"kernels are not compiled on {platform.system()}"
    if compiler is None:
        return "there is no C++ compiler (install g++)"
    command = [*shlex.split(compiler), *FLAGS, *(f"-D{define}" for define in defines)]
    try:
        version = subprocess.run(
            [*shlex.split(compiler), "--version"], capture_output=True, check=True
        ).stdout
        key = b"\0".join([source.read_bytes(), " ".join(command).encode(), version, _processor()])
        library = cache_folder() / f"{source.stem}-{hashlib.sha256(key).hexdigest()[:20]}.so"
        if library.exists():
            with contextlib.suppress(OSError):  # damaged: made again
                return ctypes.CDLL(str(library))
        _compile(command, source, library)
        return ctypes.CDLL(str(library))
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").splitlines()
        return f"{compiler} fails: {next((line for line in lines if 'error:' in line), error)}"
    except (OSError, RuntimeError) as error:
        return str(error)


def _compile(command: list[str], source: Path, library: Path) -> None:
    logger.info("compiling %s with %s", source.name, command[0])
    with atomic_write(library) as made:
        subprocess.run([*command, str(source), "-o", str(made)], capture_output=True, check=True)


def _own(folder: Path) -> None:
    """Make the folder, or see that no other user can put a library there."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} belongs to, or can be written by, another user; chmod go-w it")


def cache_folder() -> Path:
    """Where compiled kernels are kept; it exists, and no other user can write to it."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nestor"
    _own(folder)
    return folder


def _processor() -> bytes:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    return "".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU"))})
    ).encode()
