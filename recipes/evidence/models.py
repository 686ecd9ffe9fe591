"""The models that the evidence compares, by name: a preset each, all of the same non-embedding parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from runs import Model

from nestor.errors import ConfigError, suggest
from nestor.models.presets import SIZES


@dataclass(frozen=True)
class Entry:
    """A row of a table. windowed: its attention sees the window of the memory models of its size."""

    preset: str
    about: str
    group: str
    windowed: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)

    def model(self, size: str) -> Model:
        """The model at a size."""
        window = {"sliding_window": SIZES[size].window} if self.windowed else {}
        return Model(self.preset, size, window | self.overrides)


#: Plots show the models of a group together, with the transformer.
ATTENTION, TITANS, MIRAS, OTHERS = "attention", "Titans", "MIRAS and ATLAS", "other memories"

MODELS = {
    "transformer": Entry("transformer", "softmax attention with rotary positions", ATTENTION),
    "sliding-window": Entry(
        "transformer", "the same over a window, that of the memory models", ATTENTION, windowed=True
    ),
    "hope-attention": Entry(
        "hope-attention", "attention, and a feed-forward of blocks for levels (Nested Learning)", ATTENTION
    ),
    "lact": Entry("lact", "attention over a window and a wide memory that learns once a window", ATTENTION),
    "titans-lmm": Entry("titans-lmm", "the neural memory alone", TITANS),
    "titans-mac": Entry("titans-mac", "attention in segments, on what the memory recalls for them", TITANS),
    "titans-mag": Entry("titans-mag", "attention over a window, gated by the memory", TITANS),
    "titans-mal": Entry("titans-mal", "attention over a window of what the memory puts out", TITANS),
    "tnt": Entry("tnt", "a global memory and local ones that start anew every window", TITANS),
    "moneta": Entry("moneta", "an l_p loss and an l_q retention (MIRAS)", MIRAS),
    "yaad": Entry("yaad", "a Huber loss (MIRAS)", MIRAS),
    "memora": Entry("memora", "weights of a softmax (MIRAS)", MIRAS),
    "atlas": Entry("atlas", "a window of tokens in each step, orthogonalised steps", MIRAS),
    "ttt-linear": Entry("ttt-linear", "a linear memory with a layer norm (TTT)", OTHERS),
    "ttt-mlp": Entry("ttt-mlp", "a memory of two layers with a layer norm (TTT)", OTHERS),
    "kda": Entry("kda", "Kimi Delta Attention, a linear memory under the gated delta rule", OTHERS),
    "hope": Entry("hope", "memories that make their own keys and values, and blocks for levels", OTHERS),
}


def check_models(names: Sequence[str]) -> None:
    """Raises ConfigError: a name that is not in the table."""
    for name in names:
        if name not in MODELS:
            raise ConfigError(
                f"there is no model {name!r} in this recipe; there are {', '.join(MODELS)}. "
                f"{suggest(name, MODELS)}".rstrip()
            )


def check_size(size: str) -> None:
    """Raises ConfigError: a size that presets lack."""
    if size not in SIZES:
        raise ConfigError(f"--size is {size!r}; it is one of {', '.join(SIZES)}. {suggest(size, SIZES)}")


def obstacle(name: str, device: str) -> str:
    """Why a model cannot run there; empty if it can."""
    if MODELS[name].preset != "kda":
        return ""
    from nestor.layers.fla import load_kernels

    if not device.startswith("cuda"):
        return f"it needs a GPU, and the device is {device}"
    try:
        load_kernels("kda")
    except ConfigError as error:
        return str(error)
    return ""
