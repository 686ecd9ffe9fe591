"""Runs in processes of their own: torchrun, Ctrl-C, kill -9."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from nestor.training import train
from nestor.training.checkpoint import list_checkpoints


def command(config, tmp_path, processes=1, name="config.toml"):
    path = tmp_path / name
    path.write_text(config.to_toml(), encoding="utf-8")
    launch = launcher(processes) if processes > 1 else [sys.executable]
    return [*launch, "-m", "nestor", "train", str(path)]


def launcher(processes):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    return [*launch, "--master-addr", "127.0.0.1", "--master-port", str(port)]


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def run(arguments):
    done = subprocess.run(
        arguments, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


@pytest.mark.parametrize(("parallel", "optimizer"), [("ddp", "adamw"), ("fsdp2", "m3")])
def test_two_processes_equal_one(tiny, tmp_path, weights, parallel, optimizer):
    """Same lanes, weights after six steps equal to 1e-6, and the checkpoint of two is resumed by one."""
    settings = {"run__precision": "fp64", "run__steps": 6, "run__eval_every": 3, "run__save_every": 3}
    settings |= {"optimizer__name": optimizer, "optimizer__m3_slow_period": 2}
    sources = [
        {"text": list(tiny().data.sources[0].text)},
        # Few of its tokens count, so that the processes have different numbers of targets.
        {"task": "mqar", "options": {"n_pairs": 2, "document_length": 48}},
    ]
    one = tiny(run__out=str(tmp_path / "one"), data__sources=sources, **settings)
    two = tiny(
        run__out=str(tmp_path / "two"), data__sources=sources, run__parallel=parallel,
        run__accumulation=2, **settings,
    )  # fmt: skip
    train(one, quiet=True)
    out = run(command(two, tmp_path, processes=2, name="two.toml"))
    assert "on 2 x cpu" in out and out.count("finished:") == 1
    assert ("sharded" in out) is (parallel == "fsdp2")
    alone, together = weights(one.folder / "final"), weights(two.folder / "final")
    assert alone.keys() == together.keys()
    for name in alone:
        assert torch.allclose(alone[name], together[name], rtol=0, atol=1e-6), name
    if parallel == "ddp":
        # One process goes on with the run of two, from the middle.
        shutil.rmtree(two.folder / "checkpoints" / "step-000006")
        shutil.rmtree(two.folder / "final")
        for name, tensor in weights(train(two, quiet=True).final).items():
            assert torch.allclose(alone[name], tensor, rtol=0, atol=1e-6), name
    lines = [(config.folder / "metrics.jsonl").read_text().splitlines() for config in (one, two)]
    assert len(lines[0]) == len(lines[1])


def test_two_processes_carry_states_of_models_whose_start_is_then_not_read(tiny, tmp_path, weights):
    """Without a forget gate what a memory began with is of no account once a State is handed on."""
    settings = {
        "model__preset": "ttt-linear",
        "model__overrides": {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32},
        "run__precision": "fp64",
        "run__steps": 4,
        "run__eval_every": 0,
    }
    one = tiny(run__out=str(tmp_path / "one"), **settings)
    two = tiny(run__out=str(tmp_path / "two"), **settings)
    train(one, quiet=True)
    run(command(two, tmp_path, processes=2, name="two.toml"))
    together = weights(two.folder / "final")
    for name, tensor in weights(one.folder / "final").items():
        assert torch.allclose(tensor, together[name], rtol=0, atol=1e-6), name


SHARDED = """
import torch
from torch import nn
from nestor.training.config import OptimizerConfig
from nestor.training.distributed import shard, whole
from nestor.training.optimizer import build_optimizers, load_optimizer_state, optimizer_state

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()

def make(sharded):
    torch.manual_seed(0)
    # Rows that two processes cannot share evenly.
    model = nn.Sequential(nn.Linear(40, 35), nn.Tanh(), nn.Linear(35, 32)).double()
    return shard(model, "cpu", 2) if sharded else model

def advance(model, optimizers, steps):
    for step in steps:
        x = torch.randn(8, 40, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        model(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

for name in ("m3", "adamuon"):
    config = OptimizerConfig(name=name, lr=0.01, m3_slow_period=2)
    alone, model, twin = make(False), make(True), make(True)
    ours, theirs, others = (build_optimizers(m, config) for m in (alone, model, twin))
    advance(alone, ours, range(7))
    advance(model, theirs, range(3))
    saved = optimizer_state(model, theirs)
    assert saved["0.weight/momentum"].shape == (35, 40), saved["0.weight/momentum"].shape
    with torch.no_grad():
        for one, other in zip(twin.parameters(), model.parameters()):
            one.copy_(other)
    load_optimizer_state(twin, others, saved)
    advance(twin, others, range(3, 7))
    for (key, one), other in zip(alone.named_parameters(), twin.parameters()):
        assert torch.allclose(one, whole(other), rtol=0, atol=1e-9), (name, key)
        assert hasattr(others[-1].state[twin[0].weight]["momentum"], "device_mesh")
    for key, value in optimizer_state(alone, ours).items():
        assert torch.allclose(value, optimizer_state(twin, others)[key], rtol=1e-6, atol=1e-9), (name, key)
torch.distributed.destroy_process_group()
"""


def test_matrices_in_parts_are_orthogonalised_whole_and_resumed(tmp_path):
    (tmp_path / "sharded.py").write_text(SHARDED, encoding="utf-8")
    run([*launcher(2), str(tmp_path / "sharded.py")])


def test_ctrl_c_saves_and_a_second_one_leaves_at_once(tiny, tmp_path):
    config = tiny(run__steps=100_000, run__eval_every=0, run__save_every=0, run__log_every=1)
    metrics = config.folder / "metrics.jsonl"
    process = subprocess.Popen(
        command(config, tmp_path),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(lambda: metrics.is_file() and metrics.stat().st_size, process)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert "stopped by SIGINT after step" in out and "the same command goes on from there" in out
    (saved,) = list_checkpoints(config.folder / "checkpoints")

    # The second run goes on from there, and hangs in its first save; kill -9 while it does.
    hang = (
        "import sys, time, nestor.training.saving as saving\n"
        "def save(*_):\n"
        "    print('saving', flush=True)\n"
        "    time.sleep(600)\n"
        "saving.save_model = save\n"
        "from nestor.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = [sys.executable, "-c", hang, "train", str(tmp_path / "config.toml")]
    for ending in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen(
            arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step"):
                process.send_signal(signal.SIGTERM)
            if line.startswith("saving"):
                break
        process.send_signal(ending)
        _, errors = process.communicate(timeout=60)
        # A shell reports a process that a signal ended as 128 + the signal: 130 for Ctrl-C.
        assert process.returncode == -ending
        if ending == signal.SIGINT:
            assert "Ctrl-C again stops at once" in errors
        assert list((config.folder / "checkpoints").glob(".*.tmp")), (
            "the unfinished checkpoint is left behind"
        )
        assert list_checkpoints(config.folder / "checkpoints") == [saved]

    from nestor.training.folder import newest_checkpoint, open_folder

    open_folder(config, "auto")
    assert not list((config.folder / "checkpoints").glob(".*.tmp"))
    assert newest_checkpoint(config.folder) == saved
