"""Files are whole or absent whatever happens to the writer, and two processes never hold one file."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from nestor import files
from nestor.errors import DataError, FileFormatError, LockedError
from nestor.files import FileLock, atomic_write, read_tensors, write_json, write_tensors, write_text


def start(code: str, *arguments: str) -> subprocess.Popen:
    """A second Python process; it prints a line when it is where the test wants it."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "ready"
    return process


def test_kill_9_in_the_middle_of_a_write_leaves_the_old_tensors_loadable(tmp_path: Path):
    path = tmp_path / "state.safetensors"
    write_tensors(path, {"w": torch.arange(1000.0)}, {"step": "1"})
    writer = start(
        """
        import sys, time
        from nestor.files import atomic_write
        with atomic_write(sys.argv[1]) as temporary:
            with open(temporary, "wb") as file:
                file.write(b"half of the new file")
                file.flush()
                print("ready", flush=True)
                time.sleep(60)
        """,
        str(path),
    )
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    tensors, metadata = read_tensors(path)
    assert torch.equal(tensors["w"], torch.arange(1000.0))
    assert metadata == {"step": "1"}


def test_kill_9_at_any_moment_of_repeated_writes_leaves_a_whole_file(tmp_path: Path):
    path = tmp_path / "state.safetensors"
    writer = start(
        """
        import sys, torch
        from nestor.files import write_tensors
        for step in range(1_000_000):
            write_tensors(sys.argv[1], {"w": torch.full((50_000,), float(step))}, {"step": str(step)})
            if step == 0:
                print("ready", flush=True)
        """,
        str(path),
    )
    time.sleep(0.2)
    writer.kill()
    writer.wait()
    tensors, metadata = read_tensors(path)
    assert torch.equal(tensors["w"], torch.full((50_000,), float(metadata["step"])))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_an_error_at_the_final_sync_keeps_the_old_file_and_removes_the_new(tmp_path, monkeypatch, code):
    path = tmp_path / "config.json"
    write_text(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=os.strerror(code)):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["config.json"]


def test_a_full_disk_under_safetensors_is_an_oserror_and_keeps_the_old_file(tmp_path: Path):
    path = tmp_path / "state.safetensors"
    write_tensors(path, {"w": torch.ones(4)})
    # A limit on file size is the full disk that needs no privileges: the system refuses the same write.
    code = """
        import resource, signal, sys, torch
        from nestor.files import write_tensors
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            write_tensors(sys.argv[1], {"w": torch.zeros(100_000)})
        except OSError as error:
            print(error.errno, error.filename)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(errno.EFBIG), str(path)]
    assert torch.equal(read_tensors(path)[0]["w"], torch.ones(4))
    assert os.listdir(tmp_path) == ["state.safetensors"]


def test_an_exception_in_the_block_keeps_the_old_file(tmp_path: Path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as temporary:
        temporary.write_text("new")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_private_file_stays_private_when_it_is_replaced(tmp_path: Path):
    path = tmp_path / "memory"
    write_text(path, "old")
    os.chmod(path, 0o600)
    write_text(path, "new")
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_new_file_has_ordinary_permissions(tmp_path: Path):
    (tmp_path / "plain").touch()
    write_tensors(tmp_path / "ours", {"w": torch.ones(1)})
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_missing_folders_are_made_and_text_is_utf8(tmp_path: Path):
    write_json(tmp_path / "a" / "b" / "c.json", {"name": "Brontë"})
    assert "Brontë" in (tmp_path / "a" / "b" / "c.json").read_bytes().decode("utf-8")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_come_back_as_they_were_also_views_scalars_and_shared_ones(tmp_path, dtype):
    base = torch.arange(12).reshape(3, 4).to(dtype)
    tensors = {"base": base, "same": base, "row": base[1], "turned": base.T, "scalar": base[2, 3]}
    tensors["none"] = base[:0]
    write_tensors(tmp_path / "t", tensors, {"format": "1"})
    back, metadata = read_tensors(tmp_path / "t")
    assert metadata == {"format": "1"}
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_truncated_file_is_refused_with_its_name(tmp_path: Path, keep: int):
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"w": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FileFormatError, match=r"model\.safetensors.*truncated"):
        read_tensors(path)


def test_a_foreign_file_a_folder_and_a_missing_file_are_refused(tmp_path: Path):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    with pytest.raises(FileFormatError, match="not a safetensors file"):
        read_tensors(tmp_path / "picture.png")
    with pytest.raises(DataError, match="is a folder"):
        read_tensors(tmp_path)
    with pytest.raises(DataError, match="is missing"):
        read_tensors(tmp_path / "none")


def test_a_second_process_is_refused_and_told_who_holds_the_file(tmp_path: Path):
    path = tmp_path / "memory.safetensors"
    code = """
        import sys, time
        from nestor.files import FileLock
        with FileLock(sys.argv[1]):
            print("ready", flush=True)
            time.sleep(60)
    """
    holder = start(code, str(path))
    try:
        message = rf"memory\.safetensors is in use by process {holder.pid}\b"
        with pytest.raises(LockedError, match=message), FileLock(path):
            pass
    finally:
        holder.kill()
        holder.wait()
    with FileLock(path):  # the system drops the lock of a process that died
        pass


def test_one_process_cannot_hold_a_file_twice_and_can_hold_it_again_later(tmp_path: Path):
    with FileLock(tmp_path / "run"):
        with pytest.raises(LockedError, match=str(os.getpid())), FileLock(tmp_path / "run"):
            pass
        with pytest.raises(LockedError), FileLock(tmp_path / "run"):  # the refusal did not drop the lock
            pass
    with FileLock(tmp_path / "run"):
        pass
