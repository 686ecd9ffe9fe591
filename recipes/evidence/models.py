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
    """A row of a table.

    windowed: its attention sees the window of the memory models of its size. recomputed: backward computes
    the inside of chunks again, without which such a memory takes some 30 GiB at the size 5m.
    """

    preset: str
    about: str
    group: str
    windowed: bool = False
    recomputed: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)

    def model(self, size: str) -> Model:
        """The model at a size."""
        window = {"sliding_window": SIZES[size].window} if self.windowed else {}
        memory = {"memory": self.overrides.get("memory", {}) | {"recompute": True}} if self.recomputed else {}
        return Model(self.preset, size, window | self.overrides | memory)


#: Plots show the models of a group together, with the transformer.
ATTENTION, TITANS, MIRAS, OTHERS = "attention", "Titans", "MIRAS and ATLAS", "other memories"

# Presets of MIRAS have chunks of 16: outside of kernels four times as many steps, one after another.
CHUNKS = {"memory": {"chunk_size": 64}}

MODELS = {
    "transformer": Entry("transformer", "softmax attention with rotary positions", ATTENTION),
    "transformer-conv": Entry(
        "transformer",
        "the same with short convolutions, and the start that memories have with them",
        ATTENTION,
        overrides={"attention_conv_kernel": 4},
    ),
    "sliding-window": Entry(
        "transformer", "the transformer over a window, that of the memory models", ATTENTION, windowed=True
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
    "moneta": Entry(
        "moneta",
        "an l_p loss and an l_q retention (MIRAS), in chunks of 64",
        MIRAS,
        recomputed=True,
        overrides=CHUNKS,
    ),
    "yaad": Entry("yaad", "a Huber loss (MIRAS), in chunks of 64", MIRAS, recomputed=True, overrides=CHUNKS),
    "memora": Entry(
        "memora", "weights of a softmax (MIRAS), in chunks of 64", MIRAS, recomputed=True, overrides=CHUNKS
    ),
    "atlas": Entry("atlas", "a window of tokens in each step, orthogonalised steps", MIRAS, recomputed=True),
    "ttt-linear": Entry("ttt-linear", "a linear memory with a layer norm (TTT)", OTHERS),
    "ttt-mlp": Entry("ttt-mlp", "a memory of two layers with a layer norm (TTT)", OTHERS),
    "kda": Entry("kda", "Kimi Delta Attention, a linear memory under the gated delta rule", OTHERS),
    "hope": Entry("hope", "memories that make their own keys and values, and blocks for levels", OTHERS),
}


#: What takes longest begins first, so that none of it is left for the end: models without kernels of their
#: own, those whose steps are not captured as a graph, and those with many small steps.
SLOWEST = ("atlas", "moneta", "yaad", "memora", "kda", "titans-mac", "tnt", "lact")


def slowest_first(names: Sequence[str]) -> list[str]:
    """Names in the order in which their runs begin."""
    return sorted(names, key=lambda name: SLOWEST.index(name) if name in SLOWEST else len(SLOWEST))


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
