import json
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from nestor.errors import FileFormatError
from nestor.training.checkpoint import (
    clean_unfinished,
    list_checkpoints,
    prune,
    random_state,
    read_random_state,
    read_trainer,
    save_checkpoint,
    set_random_state,
    write_random_states,
)


def write_one(folder, text="x"):
    (folder / "model.safetensors").write_text(text)


def test_a_checkpoint_appears_whole_and_can_be_replaced(tmp_path):
    save_checkpoint(tmp_path, 5, write_one, {"data": 1})
    save_checkpoint(tmp_path, 5, lambda folder: write_one(folder, "longer"), {"data": 2})
    (folder,) = list_checkpoints(tmp_path)
    assert read_trainer(folder)["data"] == 2 and (folder / "model.safetensors").read_text() == "longer"
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-000005"]


def test_a_failed_save_leaves_nothing(tmp_path):
    def fail(folder):
        write_one(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 5, fail, {})
    assert list(tmp_path.iterdir()) == []


def test_a_process_killed_while_saving_leaves_the_checkpoint_before(tmp_path):
    save_checkpoint(tmp_path, 5, write_one, {})
    program = (
        "import os, signal, sys, pathlib\n"
        "from nestor.training.checkpoint import save_checkpoint\n"
        "def write(folder):\n"
        "    (folder / 'model.safetensors').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "save_checkpoint(pathlib.Path(sys.argv[1]), 10, write, {})\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-000005"]
    assert clean_unfinished(tmp_path) == 1
    assert os.listdir(tmp_path) == ["step-000005"]


def test_a_checkpoint_that_was_being_replaced_gets_its_place_back(tmp_path):
    folder = save_checkpoint(tmp_path, 5, write_one, {})
    os.rename(folder, tmp_path / ".step-000005.77.old")
    clean_unfinished(tmp_path)
    assert list_checkpoints(tmp_path) == [folder]


def test_a_damaged_checkpoint_is_refused_with_the_file(tmp_path):
    folder = save_checkpoint(tmp_path, 5, write_one, {})
    (folder / "model.safetensors").write_text("")
    with pytest.raises(FileFormatError, match=r"model\.safetensors has 0 bytes, 1 were written.*Remove"):
        read_trainer(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileFormatError, match=r"model\.safetensors is missing"):
        read_trainer(folder)
    (folder / "trainer.json").write_text("{")
    with pytest.raises(FileFormatError, match=r"trainer\.json cannot be read"):
        read_trainer(folder)
    (folder / "trainer.json").write_text(json.dumps({"format_version": 99, "files": {}}))
    with pytest.raises(FileFormatError, match="checkpoint format 99"):
        read_trainer(folder)


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    for step in (1, 2, 3, 10, 1_000_000):
        save_checkpoint(tmp_path, step, write_one, {})
    prune(tmp_path, 2, 2)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == [
        "step-000002",
        "step-000010",
        "step-1000000",
    ]


def test_generators_continue_where_they_were(tmp_path):
    for draw in (torch.rand, np.random.rand):
        draw(3)
    np.random.randn()  # leaves a second Gaussian in store
    path = tmp_path / "rng.safetensors"
    write_random_states(path, [random_state()])
    expected = torch.rand(3), np.random.randn(3), random.random()
    state = read_random_state(path, 0)
    assert state is not None and read_random_state(path, 1) is None
    set_random_state(state)
    got = torch.rand(3), np.random.randn(3), random.random()
    assert torch.equal(expected[0], got[0]) and (expected[1] == got[1]).all() and expected[2] == got[2]
