"""The models of the ablations, the rows that compare them, and what the papers report of the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from runs import Model

from nestor.errors import ConfigError, suggest
from nestor.models.presets import SIZES

#: Memories of Hope that make their own part: all that the paper's ablated model has.
ADAPTIVE = ("k", "v", "q", "eta", "alpha")
#: A horizon at which what is kept of a memory at a token is 1 in float32.
FOR_EVER = 1e12


@dataclass(frozen=True)
class Variant:
    """A model. Its feed-forward takes what a part left out leaves, so all have the same parameters."""

    preset: str
    about: str
    memory: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    plain_feed_forward: bool = False

    def model(self, size: str) -> Model:
        """The model at a size."""
        overrides = dict(self.overrides)
        if self.memory:
            overrides["memory"] = self.memory
        if self.plain_feed_forward:
            overrides |= {"feed_forward_types": ["swiglu"] * SIZES[size].layers, "continuum": None}
        return Model(self.preset, size, overrides)


def _hope(about: str, without: str = "", **choices: Any) -> Variant:
    """Hope with all its memories but one, and other choices."""
    plain = choices.pop("plain_feed_forward", False)
    adaptive = [name for name in ADAPTIVE if name != without]
    return Variant("hope", about, {"adaptive": adaptive, **choices}, plain_feed_forward=plain)


VARIANTS = {
    # The slowest first: momentum in self-modifying memories has no kernel, so its two models have fewer steps
    # one after another, and their own base.
    "hope-momentum": _hope(
        "Hope in chunks of 64 throughout, with a momentum that a gate keeps",
        projection_chunk_size=64,
        momentum="gated",
        recompute=True,
    ),
    "hope-64": _hope("Hope in chunks of 64 throughout", projection_chunk_size=64),
    "hope": _hope("Hope with a memory for queries too, as the paper's ablated model"),
    "hope-no-dgd": _hope("plain gradient descent: what a key held decays by the gate alone", dgd=False),
    "hope-no-retention": _hope("nothing is forgotten by itself", "alpha", horizon=FOR_EVER),
    "hope-no-continuum": _hope("one feed-forward instead of four blocks", plain_feed_forward=True),
    "hope-static-k": _hope("keys from a static projection", "k"),
    "hope-static-v": _hope("values from a static projection", "v"),
    "hope-static-q": _hope("queries from a static projection: the preset", "q"),
    "hope-towards-start": _hope(
        "forgets towards its learned start, with a horizon of 128", decay="initial", horizon=128.0
    ),
    "titans": Variant("titans-lmm", "the memory alone"),
    "titans-no-momentum": Variant("titans-lmm", "each step is that of its token", {"momentum": False}),
    "titans-no-decay": Variant("titans-lmm", "nothing is forgotten", {"forget": False}),
    "titans-no-convolution": Variant(
        "titans-lmm", "queries, keys and values of single tokens", {"conv_kernel": 0}
    ),
    "titans-linear": Variant("titans-lmm", "a memory of one matrix, with the same layer norm", {"depth": 1}),
    "titans-mag": Variant("titans-mag", "attention over a window, gated by the memory"),
    "titans-mag-no-persistent": Variant(
        "titans-mag", "the same without persistent tokens", overrides={"persistent_tokens": 0}
    ),
}


@dataclass(frozen=True)
class Comparison:
    """A row: a variant that lacks a part, and the model that has it.

    paper: perplexity of the paper's model without the part, None where it has none; `PAPER_FULL` has that of
        the whole.
    """

    table: str
    part: str
    variant: str
    base: str
    paper: float | None


#: Perplexities of the full models. Titans, arXiv 2501.00663, table 5: mean of Wikitext and LAMBADA, about
#: 400 M parameters. Nested Learning, arXiv 2512.24695, table 6: about 1.3 B parameters.
PAPER_FULL = {"Titans": 27.01, "Hope": 12.24}

COMPARISONS = (
    Comparison("Titans", "momentum", "titans-no-momentum", "titans", 28.98),
    Comparison("Titans", "decay", "titans-no-decay", "titans", 29.04),
    Comparison("Titans", "convolution", "titans-no-convolution", "titans", 28.73),
    Comparison("Titans", "depth (linear memory)", "titans-linear", "titans", 28.49),
    Comparison("Titans", "persistent tokens", "titans-mag-no-persistent", "titans-mag", 27.63),
    Comparison("Hope", "DGD", "hope-no-dgd", "hope", 13.41),
    Comparison("Hope", "momentum", "hope-64", "hope-momentum", 13.58),
    Comparison("Hope", "retention", "hope-no-retention", "hope", 13.71),
    Comparison("Hope", "continuum", "hope-no-continuum", "hope", 13.04),
    Comparison("Hope", "adaptive k", "hope-static-k", "hope", 13.77),
    Comparison("Hope", "adaptive v", "hope-static-v", "hope", 13.90),
    Comparison("Hope", "adaptive q", "hope-static-q", "hope", 12.19),
    Comparison("Hope", "a horizon of 4,096 towards zero", "hope-towards-start", "hope", None),
)  # fmt: skip

#: TNT, arXiv 2511.07343: perplexity of a Titans of 550 M parameters by the chunk that it is run with.
PAPER_CHUNK = 64
PAPER_CHUNKS = {8: 36.45, 16: 34.15, 32: 24.23, 64: 13.78, 128: 15.5, 256: 17.88, 512: 22.4}

#: The model of the chunk-size law.
CHUNKED = "titans"


def chunk_name(chunk: int, size: str) -> str:
    """What the model of the chunk-size law is called; at the chunk of its size it is the ablations'."""
    return CHUNKED if chunk == SIZES[size].chunk else f"chunk-{chunk}"


def chunk_model(chunk: int, size: str) -> Model:
    """The same as a model."""
    memory = {} if chunk == SIZES[size].chunk else {"memory": {"chunk_size": chunk}}
    return Model(VARIANTS[CHUNKED].preset, size, memory)


def variants_of(tables: Sequence[str]) -> list[str]:
    """The models of tables, in the order of `VARIANTS`."""
    needed = {name for one in COMPARISONS if one.table in tables for name in (one.variant, one.base)}
    return [name for name in VARIANTS if name in needed]


def check_tables(names: Sequence[str]) -> None:
    """Raises ConfigError: a name that is none of a table of comparisons."""
    known = [*PAPER_FULL, "chunks"]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"there is no table {name!r}; there are {', '.join(known)}. {suggest(name, known)}".rstrip()
            )
