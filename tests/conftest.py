"""What every test runs under: no network, one thread a worker, GPU tests skipped where there is no GPU."""

import os
import subprocess
import sys
from importlib.util import find_spec

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from hypothesis import HealthCheck, settings

# Several workers share the cores: more threads than cores make every test slower, not faster.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# Times on a shared machine say nothing about an example, so hypothesis sets no deadline.
settings.register_profile(
    "nestor", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("nestor")


# Files that take longest come first: one that is begun last leaves the other workers idle.
LONGEST = (
    "test_distributed.py",
    "test_neural_memory_kernels.py",
    "test_fused_inputs.py",
    "test_linear_memory_kernels.py",
    "test_loop.py",
    "test_quickstart.py",
    "test_memory_streams.py",
    "test_registration.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from one random state, so that no test depends on the order of the others."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Token caches of tests stay out of the user's cache folder."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def run_interpreted():
    """Runs a test file as a program in Triton's interpreter, which is chosen before Triton is imported."""

    def run(file: str, *arguments: str) -> None:
        if find_spec("triton") is None:
            pytest.skip("needs Triton; pip install triton")
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, file, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    return run
