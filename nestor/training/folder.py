"""The run folder: what may be in it at the start, and what is left in it at the end.

config.toml       the configuration
metrics.jsonl     one line of numbers per log step and validation
checkpoints/      see `nestor.training.checkpoint`
logs/             the experiment tracker's files
final/            the trained model, its tokenizer, and how it was trained
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from nestor.errors import ConfigError
from nestor.files import write_json, write_text
from nestor.training.checkpoint import clean_unfinished, list_checkpoints, whole_folder
from nestor.training.config import TrainConfig, load_config

Resume = Literal["auto", "force", "never"]


def open_folder(config: TrainConfig, resume: Resume) -> None:
    """Make the run folder of `config`, or check that it holds a run of this configuration.

    Raises:
        ConfigError: it holds a run of another configuration, or something else.
    """
    folder = config.folder
    saved = folder / "config.toml"
    if not saved.exists() and folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no run (no config.toml); choose another run.out")
    if resume == "never":
        for entry in (folder / "checkpoints", folder / "final", folder / "logs"):
            shutil.rmtree(entry, ignore_errors=True)
        (folder / "metrics.jsonl").unlink(missing_ok=True)
    elif resume == "auto" and saved.exists():
        _check_same(load_config(saved), config)
    clean_unfinished(folder / "checkpoints")
    clean_unfinished(folder)
    write_text(saved, config.to_toml())


def newest_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint of a run folder."""
    found = list_checkpoints(folder / "checkpoints")
    return found[-1] if found else None


def write_final(folder: Path, save_model: Callable[[Path], None], summary: Mapping[str, Any]) -> Path:
    """Make `folder/final`, whole or not at all: `save_model` puts model and tokenizer into the folder it is
    given, beside which come training.json and README.md."""
    final = folder / "final"
    with whole_folder(final, folder / ".final.tmp") as unfinished:
        save_model(unfinished)
        write_json(unfinished / "training.json", summary)
        write_text(unfinished / "README.md", model_card(summary))
    return final


def model_card(summary: Mapping[str, Any]) -> str:
    """README of a model folder, with the header that the Hugging Face hub reads."""
    measured = [
        f"- {key.replace('_', ' ')}: {value:.4f}"
        for key, value in summary["metrics"].items()
        if key.startswith("valid") and isinstance(value, float)
    ]
    return f"""\
---
library_name: nestor
pipeline_tag: text-generation
---
# {summary["name"]}

A Nestor model of {summary["parameters"]:,} parameters, trained for {summary["steps"]:,} steps on
{summary["tokens"]:,} tokens. `training.json` has every setting and measurement.

{chr(10).join(measured)}

```python
import nestor
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH/TO/THIS/FOLDER")
```
"""


def _check_same(old: TrainConfig, new: TrainConfig) -> None:
    differences = old.differences(new)
    if differences:
        listed = "; ".join(f"{key} was {was!r} and is {now!r}" for key, (was, now) in differences.items())
        raise ConfigError(
            f"{new.folder} holds a run of another configuration: {listed}. Choose another run.out, continue "
            "it under the new settings with --resume, or remove it with --restart"
        )
