"""Run the tests that need a GPU, and keep what came out: how many of each file passed, on what.

    python benchmarks/gpu_tests.py                           # all of tests/
    python benchmarks/gpu_tests.py -n 4 -- tests/layers      # some files or folders, and arguments of pytest

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
        if report.when == "call" or not report.passed:
            self._count(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be read."""
        if report.failed:
            self._count(report)

    def _count(self, report: pytest.TestReport | pytest.CollectReport) -> None:
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
                "failures": [one for one in self.failed if one.split("::")[0] == name],
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
    at = arguments.index("--") if "--" in arguments else len(arguments)
    options, paths = arguments[:at], arguments[at + 1 :] or [str(ROOT / "tests")]
    status = pytest.main(["-m", "gpu", "-p", "no:cacheprovider", *options, *paths], plugins=[recorder])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return int(status)
    kept = json.loads(OUTPUT.read_text(encoding="utf-8")) if OUTPUT.is_file() else {}
    kept = {name: one for name, one in (kept | recorder.about()).items() if (ROOT / name).is_file()}
    write_json(OUTPUT, dict(sorted(kept.items())))
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
