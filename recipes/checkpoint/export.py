"""A trained model as it is shipped: matrices in bfloat16, which halves the folder; it opens in float32.

python recipes/checkpoint/export.py RUN/final FOLDER
"""

from __future__ import annotations

import json
import shutil
import sys
from datetime import date
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from nestor.files import write_json

COPIED = ("README.md", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
MOST = 15_000_000


def main(source: str, target: str) -> None:
    """Write the folder.

    Raises:
        SystemExit: it is larger than `MOST` bytes.
    """
    final, folder = Path(source), Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    weights = load_file(final / "model.safetensors")
    stored = {name: w.bfloat16() if w.dim() > 1 else w for name, w in weights.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    config = json.loads((final / "config.json").read_text(encoding="utf-8"))
    # What the model computes in; otherwise it would be the type of the first stored tensor.
    write_json(folder / "config.json", config | {"dtype": "float32"})
    training = json.loads((final / "training.json").read_text(encoding="utf-8"))
    training["date"] = date.today().isoformat()
    if torch.cuda.is_available():
        training["device"] = torch.cuda.get_device_name()
    write_json(folder / "training.json", training)
    for name in COPIED:
        if (final / name).is_file():
            shutil.copyfile(final / name, folder / name)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size:,} bytes")
    if size > MOST:
        sys.exit(f"that is more than {MOST:,}; train a smaller model")


if __name__ == "__main__":
    main(*sys.argv[1:])
