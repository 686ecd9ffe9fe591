"""The model of a run: built from a preset, opened from a folder, written to one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nestor.data import ByteTokenizer
from nestor.errors import ConfigError, FileFormatError, suggest
from nestor.training.config import TrainConfig


def build_model(config: TrainConfig, tokenizer: Any, checkpoint: Path | None) -> Any:
    """The model on the CPU: the one of a checkpoint, else the saved one to start from, else a new preset.

    Raises:
        ConfigError: unknown preset, size or setting, no model in the folder, or settings that its weights do
            not fit.
        FileFormatError: a model folder cannot be read.
    """
    dtype = torch.float64 if config.run.precision == "fp64" else torch.float32
    if checkpoint is not None:
        return open_model(checkpoint, dtype)
    if config.model.path:
        folder = Path(config.model.path).expanduser()
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"model.path is {config.model.path!r}; it must be a folder with config.json and weights"
            )
        return open_model(folder, dtype, config.model.overrides)

    from nestor.models import NestorForCausalLM, preset

    settings = {
        "vocab_size": len(tokenizer),
        "bos_token_id": getattr(tokenizer, "bos_token_id", None),
        "eos_token_id": getattr(tokenizer, "eos_token_id", None),
        "pad_token_id": getattr(tokenizer, "pad_token_id", None),
        "tokenizer_name": ByteTokenizer.name if isinstance(tokenizer, ByteTokenizer) else None,
    }
    architecture = preset(config.model.preset, config.model.size, **(settings | config.model.overrides))
    model: Any = NestorForCausalLM(architecture)
    return model.to(dtype)


def open_model(folder: Path, dtype: torch.dtype, overrides: Mapping[str, Any] | None = None) -> Any:
    """A saved model. Only safetensors are read.

    overrides: settings of `NestorConfig` that replace the saved ones; `memory` is merged into the saved one.

    Raises:
        FileFormatError: it cannot be read.
        ConfigError: an unknown setting, or one that the saved weights do not fit.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    import nestor  # noqa: F401  (registers the Nestor models with the Auto classes)

    logging.disable_progress_bar()
    loader: Any = AutoModelForCausalLM
    changed: dict[str, Any] = {}
    if overrides:
        changed = {"config": _changed_config(folder, overrides), "ignore_mismatched_sizes": True}
    try:
        model, loading = loader.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **changed
        )
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileFormatError(f"{folder} does not hold a model that can be read: {reason}") from error
    if overrides:
        _check_weights_fit(folder, overrides, loading)
    check_complete(str(folder), loading["missing_keys"])
    for parameter in model.parameters():
        # In a mapped file tensors lie at any address, and on a CPU the rounding of a matrix product depends
        # on how its operands are aligned; fresh memory is always aligned alike.
        parameter.data = parameter.data.clone()
    return model


def check_complete(name: str, missing: Iterable[str]) -> None:
    """Raises FileFormatError: a model's files lack some of its weights."""
    lacking = sorted(missing)
    if lacking:
        others = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise FileFormatError(
            f"the weights in {name} lack {lacking[0]}{others}, which would start anew; get all files of the "
            f"model, or save it again."
        )


def _changed_config(folder: Path, overrides: Mapping[str, Any]) -> Any:
    """The saved configuration with settings replaced."""
    from transformers import AutoConfig

    from nestor.models.configuration import OPTIONS, NestorConfig

    saved = AutoConfig.from_pretrained(folder)
    if not isinstance(saved, NestorConfig):
        raise ConfigError(f"{folder} holds a {type(saved).__name__}; model.overrides are of Nestor models")
    for name in overrides:
        if name not in OPTIONS:
            raise ConfigError(
                f"unknown setting {name!r} in model.overrides. {suggest(name, OPTIONS)}".rstrip()
            )
    settings = {name: getattr(saved, name) for name in OPTIONS} | dict(overrides)
    settings["memory"] = {**(saved.memory or {}), **(overrides.get("memory") or {})}
    return NestorConfig(**settings)


def _check_weights_fit(folder: Path, overrides: Mapping[str, Any], loading: Mapping[str, Any]) -> None:
    for kind in ("mismatched_keys", "missing_keys", "unexpected_keys"):
        for key in loading[kind]:
            name = key[0] if isinstance(key, tuple) else key
            raise ConfigError(
                f"the weights in {folder} do not fit model.overrides {dict(overrides)!r}: {name} would be "
                f"another. Change only what has no weights, such as a memory's chunk sizes"
            )


def save_model(model: nn.Module, folder: Path, weights: dict[str, Tensor]) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` opens."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(folder, state_dict=weights)  # type: ignore[operator]
