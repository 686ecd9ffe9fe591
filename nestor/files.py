"""Files that are either whole or absent: atomic writes, checked safetensors, a lock between processes."""

import fcntl
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from nestor.errors import DataError, FileFormatError, LockedError

if TYPE_CHECKING:
    from torch import Tensor

PathLike = str | os.PathLike[str]


@contextmanager
def atomic_write(path: PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on failure it is removed.

    The bytes and the folder entry are synced to disk before this returns. A reader, or a process that
    starts after a crash, sees the old file or the new one and never a part of one. Missing parent folders
    are created. The file keeps the permissions of the one it replaces.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    mode = os.fstat(descriptor).st_mode
    os.close(descriptor)
    try:
        if target.exists():
            mode = target.stat().st_mode
        yield temporary
        os.chmod(temporary, stat.S_IMODE(mode))
        _sync(temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(target.parent)


def write_text(path: PathLike, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: PathLike, obj: Any) -> None:
    """Write `obj` as indented JSON, atomically. A value that JSON does not know raises TypeError."""
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False) + "\n")


def write_tensors(
    path: PathLike, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors (any dtype safetensors knows, any device) and string metadata, atomically.

    Tensors that share memory are stored apart, so what is read back never aliases.
    Raises OSError, with its errno, if the system cannot write (disk full).
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        if pointer in seen or tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(pointer)
        stored[name] = tensor
    with atomic_write(path) as temporary:
        try:
            save_file(stored, temporary, metadata=dict(metadata or {}))
        except SafetensorError as error:
            code = re.search(r"os error (\d+)", str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def read_tensors(path: PathLike, device: str = "cpu") -> tuple[dict[str, "Tensor"], dict[str, str]]:
    """The tensors and metadata of a safetensors file.

    Raises: DataError if there is no such file, FileFormatError if it is truncated or of another kind.
    """
    with _opened(path, device) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def read_metadata(path: PathLike) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors. Raises as `read_tensors`."""
    with _opened(path, "cpu") as file:
        return file.metadata() or {}


@contextmanager
def _opened(path: PathLike, device: str) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"{path} is {'a folder' if path.is_dir() else 'missing'}; a safetensors file is wanted."
        )
    try:
        with safe_open(path, framework="pt", device=device) as file:
            yield file
    except SafetensorError as error:
        size = path.stat().st_size
        raise FileFormatError(
            f"{path} ({size:,} bytes) is truncated or not a safetensors file ({error}). "
            "Restore it from a copy or an earlier checkpoint."
        ) from error


class FileLock:
    """Hold `path` (a file or folder, existing or not) for this process, as a context manager.

    The lock is an advisory one on `<path>.lock`, dropped by the system when the process ends in any way.
    A second holder, in this process or another, is refused at once with a LockedError that names the
    file and the process. The small lock file stays behind: removing it would let two processes lock two
    different files of one name.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        self.lock_path = self.path.with_name(self.path.name + ".lock")
        self._descriptor: int | None = None

    def __enter__(self) -> "FileLock":
        self.lock_path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 64).decode("ascii", "replace").strip()
            os.close(descriptor)
            raise LockedError(
                f"{self.path} is in use by process {holder or '(unknown)'}. "
                "Wait until it ends, or choose another file or folder."
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode("ascii"))
        self._descriptor = descriptor
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
