"""Compiling kernels: what is kept, what is refused, and that nothing half-made is ever loaded."""

import shutil
import stat
import sys

import pytest

from nestor.ops import compilation
from nestor.ops.compilation import CompilationError, load_library

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="needs Linux and g++"
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, in a process that has compiled nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "g++")
    forget()
    yield tmp_path / "cache" / "nestor"
    forget()


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "answer.cpp"
    file.write_text('extern "C" int answer() { return ANSWER; }\n')
    return file


def forget():
    compilation._load.cache_clear()
    load_library.cache_clear()


def test_a_library_is_compiled_once_and_kept_by_source_and_defines(cache, source, monkeypatch):
    assert load_library(source, "ANSWER=42").answer() == 42
    assert load_library(source, "ANSWER=7").answer() == 7
    assert len(list(cache.iterdir())) == 2
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    forget()
    monkeypatch.setattr(compilation, "_compile", lambda *_: pytest.fail("compiled again"))
    assert load_library(source, "ANSWER=42").answer() == 42


def test_a_folder_that_others_can_write_is_not_trusted(cache, source):
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    with pytest.raises(CompilationError, match="chmod go-w"):
        load_library(source, "ANSWER=1")


def test_no_home_is_told(cache, source, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(
        compilation.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory"))
    )
    with pytest.raises(CompilationError, match="no home directory"):
        load_library(source, "ANSWER=1")


def test_a_changed_source_is_compiled_again(cache, source):
    load_library(source, "ANSWER=1")
    forget()
    source.write_text('extern "C" int answer() { return ANSWER + 1; }\n')
    assert load_library(source, "ANSWER=1").answer() == 2


def test_a_compiler_error_is_told_and_leaves_nothing(cache, source):
    with pytest.raises(CompilationError, match=r"g\+\+ fails: .*nonsense"):
        load_library(source, "ANSWER=nonsense")
    assert not list(cache.iterdir())


def test_no_compiler_is_told(cache, source, monkeypatch):
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CompilationError, match="no C\\+\\+ compiler"):
        load_library(source, "ANSWER=1")


def test_a_compiler_that_is_not_there_is_told(cache, source, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(CompilationError, match="no-such-compiler"):
        load_library(source, "ANSWER=1")


def test_a_cache_that_cannot_be_written_is_told(cache, source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CompilationError, match="Not a directory"):
        load_library(source, "ANSWER=1")


def test_a_damaged_library_is_made_again(cache, source, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(compilation, "_compile", lambda command, source, library: damage(library))
        with pytest.raises(CompilationError, match="answer-.*too short"):
            load_library(source, "ANSWER=1")
    forget()
    assert load_library(source, "ANSWER=1").answer() == 1


def damage(library):
    library.write_bytes(b"half")
