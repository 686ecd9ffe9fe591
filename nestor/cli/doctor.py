"""`nestor doctor`: what is installed, where it runs, and whether every operation is right here."""

import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Annotated, Any

import tyro

from nestor.cli.loading import pick_device

PACKAGES = (
    "nestor", "torch", "transformers", "tokenizers", "accelerate", "safetensors", "datasets", "numpy",
    "triton", "flash-linear-attention", "liger-kernel", "lm-eval", "wandb", "peft",
)  # fmt: skip
OPTIONAL = {"triton", "flash-linear-attention", "liger-kernel", "lm-eval", "wandb", "peft"}


@dataclass
class Args:
    """Show versions, devices and backends, and check every operation against its reference.

    The exit status is 1 if a check fails.

    Examples:
      nestor doctor
      nestor doctor --device cpu
      nestor doctor --json > doctor.json
    """

    device: str = "auto"
    """Where to check the operations: cpu, cuda, cuda:1 ...; auto takes a GPU if there is one."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object instead of tables."""


def run(args: Args) -> int:
    """Print the findings; 0 if every check holds, else 1."""
    findings = examine(args.device)
    if args.json:
        print(json.dumps(findings, indent=2))
    else:
        show(findings)
    return 0 if all(check["ok"] for check in findings["checks"]) else 1


def examine(device: str = "auto") -> dict[str, Any]:
    """Versions, devices, memory, and the self-checks of the operations on `device`, as plain values."""
    place = pick_device(device)

    from nestor.cli.checks import check_operations

    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "devices": _devices(),
        "checked_on": str(place),
        "checks": [asdict(check) for check in check_operations(place)],
    }


def show(findings: dict[str, Any]) -> None:
    """Print the findings of `examine` as tables."""
    from rich.console import Console

    console = Console()
    console.print("versions", style="bold")
    for name, version in findings["versions"].items():
        note = version or ("not installed (optional)" if name in OPTIONAL else "MISSING")
        console.print(f"  {name:<24}{note}", highlight=False)
    console.print("\ndevices", style="bold")
    for device in findings["devices"]:
        console.print(f"  {device['name']:<24}{device['description']}", highlight=False)

    console.print(f"\noperations on {findings['checked_on']}, each against its reference", style="bold")
    for c in findings["checks"]:
        verdict = "[green]ok[/green]" if c["ok"] else "[bold red]FAILED[/bold red]"
        console.print(
            f"  {c['name']:<40}{c['backend']:<12}error {c['error']:.1e} of {c['tolerance']:.0e} allowed,"
            f" {c['seconds']:.2f} s  {verdict}",
            highlight=False,
            soft_wrap=True,
        )
    for operation, reason in {c["name"].partition(",")[0]: c["reason"] for c in findings["checks"]}.items():
        console.print(f"  {operation}: {reason}", highlight=False, markup=False, soft_wrap=True)
    failed = [c["name"] for c in findings["checks"] if not c["ok"]]
    if failed:
        print(
            f"nestor doctor: wrong on this machine: {'; '.join(failed)}. "
            "Please report it with the output of `nestor doctor --json`.",
            file=sys.stderr,
        )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    import torch

    total, free = _memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    description = f"{cores} cores, {torch.get_num_threads()} threads"
    if total and free:
        description += f", {free / 2**30:.1f} of {total / 2**30:.1f} GiB memory free"
    devices: list[dict[str, Any]] = [
        {
            "name": "cpu",
            "description": description,
            "cores": cores,
            "threads": torch.get_num_threads(),
            "memory_bytes": total,
            "free_bytes": free,
        }
    ]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        devices.append(
            {
                "name": f"cuda:{index}",
                "description": f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB memory free",
                "memory_bytes": total,
                "free_bytes": free,
            }
        )
    return devices


def _memory() -> tuple[int | None, int | None]:
    """Total and available memory in bytes, where the system tells (Linux)."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            rows = dict(line.split(":", 1) for line in file)
        return tuple(int(rows[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))  # type: ignore[return-value]
    except (OSError, KeyError, ValueError):
        return None, None
