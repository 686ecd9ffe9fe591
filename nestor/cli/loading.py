"""What several commands share: opening a model with its tokenizer, devices, and the sampling options."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nestor.errors import ConfigError, DataError, FileFormatError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from nestor.evaluation.subjects import Subject

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass
class Sampling:
    """How the next token is chosen; the names are those of Hugging Face's `generate`."""

    max_new_tokens: int = 256
    """Stop after this many tokens."""
    do_sample: bool = True
    """Draw from the distribution; --no-do-sample always takes the likeliest token (greedy)."""
    temperature: float = 0.8
    """Divide the logits by this: below 1 is safer, above 1 wilder."""
    top_k: int | None = None
    """Keep the k likeliest tokens."""
    top_p: float | None = None
    """Keep the likeliest tokens that together have this probability."""
    min_p: float | None = None
    """Drop tokens less likely than this fraction of the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that were already there less likely."""
    num_beams: int = 1
    """Beam search with this many beams."""
    seed: int | None = None
    """Makes the samples repeatable."""

    def generation_arguments(self) -> dict[str, Any]:
        """The keyword arguments for `model.generate`. Raises ConfigError for a value out of range."""
        checks: list[tuple[str, Any, bool, str]] = [
            ("max-new-tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, self.temperature > 0, "above 0 (greedy is --no-do-sample)"),
            ("top-k", self.top_k, self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top-p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min-p", self.min_p, self.min_p is None or 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition-penalty", self.repetition_penalty, self.repetition_penalty > 0, "above 0"),
            ("num-beams", self.num_beams, self.num_beams >= 1, "at least 1"),
        ]
        for name, value, good, wanted in checks:
            if not good or (isinstance(value, float) and not math.isfinite(value)):
                raise ConfigError(f"--{name} is {value}; it must be {wanted}.")
        arguments: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.do_sample,
            "num_beams": self.num_beams,
            "repetition_penalty": self.repetition_penalty,
        }
        if self.do_sample:
            # Hugging Face keeps the 50 likeliest tokens unless told otherwise; 0 keeps all.
            arguments |= {"temperature": self.temperature, "top_k": self.top_k or 0}
            arguments |= {n: v for n, v in (("top_p", self.top_p), ("min_p", self.min_p)) if v is not None}
        return arguments


def pick_device(name: str) -> "torch.device":
    """The device called `name`; "auto" is a GPU if there is one. Raises ConfigError if it is not there."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        have = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device {name!r} cannot be used ({reason}). There is {', '.join(have)}."
        ) from error
    return device


def load_model(
    name: str, device: str = "auto", dtype: Dtype = "auto", tokenizer: str | None = None
) -> "tuple[PreTrainedModel, Any]":
    """The causal model in a folder or on the Hugging Face hub, in evaluation mode, and its tokenizer.

    dtype "auto" is the one the weights were saved in. Only safetensors are read and no code that comes
    with a model is run. Raises DataError if there is no such model, FileFormatError if it cannot be read.
    """
    _check_name(name)
    place = pick_device(device)

    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    import nestor  # noqa: F401  (registers the Nestor models with the Auto classes)
    from nestor.data.tokenizers import check_vocabulary, load_tokenizer
    from nestor.training.model import check_complete

    logging.disable_progress_bar()
    loader: Any = AutoModelForCausalLM
    try:
        model, loading = loader.from_pretrained(
            name,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise FileFormatError(f"the weights in {name} are truncated or damaged ({error}).") from error
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        if Path(name).is_dir():
            raise FileFormatError(f"{name} does not hold a model that can be read: {reason}") from error
        raise DataError(
            f"{name!r} is no folder here, and was not found on the Hugging Face hub: {reason}"
        ) from error
    check_complete(name, loading["missing_keys"])
    words = load_tokenizer(tokenizer or name)
    check_vocabulary(words, model.config.vocab_size)
    return model.to(place).eval(), words


@dataclass(frozen=True)
class Opener:
    """Opens a model to be measured, here or in another process. Raises as `load_model`."""

    name: str
    path: str
    dtype: Dtype = "auto"
    tokenizer: str | None = None

    def __call__(self, device: str) -> "Subject":
        """The model on that device, with its tokenizer and name."""
        from nestor.evaluation.subjects import Subject

        model, tokenizer = load_model(self.path, device, self.dtype, self.tokenizer)
        return Subject(self.name, model, tokenizer, self.path, reopen=self)


def _check_name(name: str) -> None:
    path = Path(name)
    if path.is_dir():
        if (path / "config.json").is_file():
            return
        inner = [p.parent for p in sorted(path.glob("*/config.json"))]
        inner += [p.parent for p in sorted(path.glob("checkpoints/*/config.json"))]
        hint = f"Did you mean {inner[0]}?" if inner else "It should have config.json and model.safetensors."
        raise DataError(f"the folder {name} holds no model. {hint}")
    if path.exists():
        raise DataError(f"{name} is a file; give the folder that holds config.json and model.safetensors.")
    if not _HUB_ID.fullmatch(name):
        raise DataError(
            f"there is no folder {name}. Give one that holds a model, or the id of a model on the hub."
        )
