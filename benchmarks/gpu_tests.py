"""Run the tests that need a GPU, and keep what came out: how many of each file passed, on what.

    python benchmarks/gpu_tests.py                       # all of tests/
    python benchmarks/gpu_tests.py tests/layers -n 4     # some, with further arguments of pytest

A file that is run again replaces what was kept of it in benchmarks/results/gpu-tests.json, so that tests can
be run in parts, as long as these are of whole files.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from nestor.evaluation.suites import device_name, versions
from nestor.files import write_json

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "benchmarks" / "results" / "gpu-tests.json"


class Recorder:
    """A plugin of pytest that counts outcomes by file and keeps the names of what failed."""

    def __init__(self) -> None:
        self.files: dict[str, Counter[str]] = defaultdict(Counter)
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of a test's three phases the call counts, and those before and after it if they say otherwise."""
        if report.when != "call" and report.passed:
            return
        self.files[report.nodeid.split("::")[0]][report.outcome] += 1
        if report.failed:
            self.failed.append(report.nodeid)

    def about(self) -> dict[str, Any]:
        """What is kept of each file."""
        date = datetime.now(UTC).date().isoformat()
        where = {"device": device_name("cuda"), "versions": versions(), "date": date}
        return {
            name: {
                **dict(sorted(counts.items())),
                "failures": [one for one in self.failed if one.startswith(f"{name}::")],
                **where,
            }
            for name, counts in self.files.items()
        }


def main(arguments: list[str]) -> int:
    """Run pytest, write what came out and return pytest's exit status."""
    if not torch.cuda.is_available():
        print("gpu_tests.py: there is no GPU here, and all tests would be skipped", file=sys.stderr)
        return 2
    recorder = Recorder()
    paths = [] if any("tests" in one for one in arguments) else [str(ROOT / "tests")]
    status = pytest.main(["-m", "gpu", "-p", "no:cacheprovider", *paths, *arguments], plugins=[recorder])
    kept = json.loads(OUTPUT.read_text(encoding="utf-8")) if OUTPUT.is_file() else {}
    write_json(OUTPUT, dict(sorted((kept | recorder.about()).items())))
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
