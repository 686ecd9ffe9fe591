"""Many runs at once: results, order, failures by name, devices dealt out, and an end that ends all."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nestor.errors import ConfigError, JobError
from nestor.jobs import Job, Workers, run_jobs

QUIET = Workers(2, "cpu", quiet=True)


def add(a, b, device):
    return a + b, device, torch.get_num_threads(), os.getpid()


def refuse(device):
    raise ConfigError("x is 3; it must be 4")


def crash(device):
    os._exit(7)


def unpicklable(device):
    return lambda: None


def leave(path, device):
    Path(path).write_text(str(os.getpid()))


def reads(path, device):
    return Path(path).read_text()


def forever(path, device):
    leave(path, device)
    time.sleep(600)


def test_every_job_runs_in_another_process_on_one_thread_after_those_it_waits_for(tmp_path):
    path = str(tmp_path / "made")
    # Named first, and begun last.
    late = Job("late", reads, (path,), after=("early",))
    found = run_jobs(
        [late, *(Job(str(n), add, (n, 1)) for n in range(4)), Job("early", leave, (path,))], QUIET
    )
    assert found.pop("late") == Path(path).read_text() and found.pop("early") is None
    assert {name: result[:3] for name, result in found.items()} == {
        str(n): (n + 1, "cpu", 1) for n in range(4)
    }
    pids = {result[3] for result in found.values()}
    assert os.getpid() not in pids and len(pids) <= 2


def test_a_failure_is_named_and_the_others_go_on(tmp_path, capfd):
    done = tmp_path / "done"
    jobs = [
        Job("bad setting", refuse),
        Job("crash", crash),
        Job("strange", unpicklable),
        Job("waits", leave, (str(tmp_path / "never"),), after=("crash",)),
        *(Job(f"good {n}", leave, (f"{done}{n}",), after=("absent",)) for n in range(3)),
    ]
    with pytest.raises(JobError) as caught:
        run_jobs(jobs, QUIET)
    assert "3 of 7 runs failed" in str(caught.value) and "Not begun, for they need these: waits" in str(
        caught.value
    )
    assert all(name in str(caught.value) for name in ("bad setting", "crash", "strange"))
    assert all(Path(f"{done}{n}").is_file() for n in range(3)) and not (tmp_path / "never").exists()
    printed = capfd.readouterr().err
    assert "failed: bad setting: ConfigError: x is 3; it must be 4" in printed
    assert "failed: crash: its process ended before its time" in printed


def test_gpus_are_dealt_out_in_turn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert (
        Workers(4, "auto").devices()
        == Workers(4, "cuda").devices()
        == ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]
    )
    assert Workers(2, "cuda:1").devices() == ["cuda:1"] * 2 and Workers(2, "cpu").devices() == ["cpu"] * 2
    with pytest.raises(ConfigError, match="'cuda:3' cannot be used; PyTorch sees 3 GPUs"):
        Workers(1, "cuda:3").devices()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert Workers(2, "auto").devices() == ["cpu"] * 2
    with pytest.raises(ConfigError, match="'cuda' cannot be used"):
        Workers(2, "cuda").devices()
    with pytest.raises(ConfigError, match="no device 'gpu'"):
        Workers(2, "gpu").devices()
    with pytest.raises(ConfigError, match="--workers is 0"):
        Workers(0)
    with pytest.raises(ConfigError, match="same name"):
        run_jobs([Job("a", add), Job("a", add)], QUIET)


PROGRAM = """
import sys
sys.path.insert(0, {folder!r})
from test_jobs import forever, leave
from nestor.jobs import Job, Workers, run_jobs

if __name__ == "__main__":
    jobs = [Job("short", leave, ({out!r} + "/short",)), Job("long", forever, ({out!r} + "/long",))]
    run_jobs(jobs, Workers(2, "cpu"))
"""


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_the_end_of_the_first_process_ends_all(tmp_path, end):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(folder=str(Path(__file__).parent), out=str(tmp_path)))
    process = subprocess.Popen(
        [sys.executable, str(program)], stderr=subprocess.PIPE, text=True, start_new_session=True,
        # Tests that run in the background have inherited that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    marks = [tmp_path / "short", tmp_path / "long"]
    _until(lambda: all(mark.is_file() and mark.read_text() for mark in marks))
    # Ctrl-C goes to every process of the terminal, a kill to the one alone.
    os.killpg(process.pid, end) if end == signal.SIGINT else process.kill()
    _, printed = process.communicate(timeout=60)
    assert process.returncode == (-end if end == signal.SIGKILL else -signal.SIGINT)
    assert printed.count("Traceback") == (end == signal.SIGINT)
    _until(lambda: not _alive(int(marks[1].read_text())))


def _alive(pid):
    try:
        # What has ended and was not waited for is no longer running.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _until(holds, seconds=60.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
