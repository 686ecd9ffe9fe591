"""What is measured: a model with its tokenizer and a name, and how far its attention can look back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nestor.data.tokenizers import tokenizer_identity
from nestor.errors import ConfigError

# Layers whose attention is a sliding window, and those whose attention ends at a segment's edge.
_WINDOWED = {"sliding_attention", "memory_as_gate", "memory_as_layer", "lact"}
_SEGMENTED = {"memory_as_context"}
_FULL = {"full_attention"}
# Tokens that are read together where neither the model nor anybody else says.
_CONTEXT = 2048


@dataclass(frozen=True)
class Reach:
    """How far back information can travel through attention alone, in tokens; None: without limit.

    `window` is what one layer sees, itself included. Stacked windows add up: through n layers of window w
    a token depends on the n (w - 1) tokens before it, so `tokens` = n (w - 1) + 1. What a model knows from
    beyond that, it knows from its memory.
    """

    window: int | None
    tokens: int | None


@dataclass(frozen=True)
class Subject:
    """One model of an evaluation.

    reopen: opens the same on another device, in another process, so it must be picklable; for workers alone.
    """

    name: str
    model: Any
    tokenizer: Any
    path: str = ""
    reopen: Callable[[str], Subject] | None = None

    def again(self) -> Callable[[str], Subject]:
        """`reopen`. Raises ConfigError: it was not given."""
        if self.reopen is None:
            raise ConfigError(
                f"workers open the model {self.name!r} themselves; give its Subject `reopen`, or one worker"
            )
        return self.reopen

    @property
    def stateful(self) -> bool:
        """True if the model reads on without limit from a State."""
        return getattr(self.model.config, "model_type", None) == "nestor"

    @property
    def limit(self) -> int | None:
        """The most tokens that the model can read, in one call or from its cache; None: no limit."""
        if self.stateful or getattr(self.model, "endless", False):
            return None
        for field in ("max_position_embeddings", "n_positions", "n_ctx"):
            value = getattr(self.model.config, field, None)
            if isinstance(value, int) and value > 0:
                return value
        return None

    def context(self, wanted: int | None = None) -> int:
        """Tokens that are read together: as many as are wanted, or 2,048, and no more than the model can."""
        most = wanted or _CONTEXT
        return most if self.limit is None else min(most, self.limit)

    @property
    def prefix(self) -> list[int]:
        """Tokens in front of every text: a model of another library gets its beginning-of-text token,
        which it was trained with; Nestor's token streams feed none."""
        begin = None if self.stateful else getattr(self.tokenizer, "bos_token_id", None)
        return [] if begin is None else [int(begin)]

    @property
    def reach(self) -> Reach:
        """The model's own `attention_reach`, or that of its configuration."""
        own = getattr(self.model, "attention_reach", None)
        return attention_reach(self.model.config) if own is None else Reach(*own)

    def describe(self) -> dict[str, Any]:
        """Name, size, configuration, tokenizer, reach: all JSON."""
        config = self.model.config
        return {
            "name": self.name,
            "path": self.path,
            "class": type(self.model).__name__,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "dtype": str(getattr(self.model, "dtype", "")).removeprefix("torch."),
            "device": str(self.model.device),
            "tokenizer": tokenizer_identity(self.tokenizer),
            "vocab_size": config.vocab_size,
            "stateful": self.stateful,
            "context_limit": self.limit,
            "attention_window": self.reach.window,
            "attention_reach": self.reach.tokens,
            "config": config.to_dict() if hasattr(config, "to_dict") else {},
        }


def attention_reach(config: Any) -> Reach:
    """The reach of a configuration with `layer_types`, `sliding_window` and `segment_size`.

    A segment is attended as a whole and nothing beyond it, so segmented layers alone do not add up; between
    windows, which cross the edges of segments, they do.
    """
    kinds = list(getattr(config, "layer_types", None) or ["full_attention"])
    if _FULL & set(kinds):
        return Reach(None, None)
    window = getattr(config, "sliding_window", None) or 1
    segment = getattr(config, "segment_size", None) or 1
    windowed = sum(kind in _WINDOWED for kind in kinds)
    segmented = sum(kind in _SEGMENTED for kind in kinds)
    # A key of attention alone may have a few tokens before it in it.
    before = max(0, getattr(config, "attention_conv_kernel", 0) - 1)
    convolved = kinds.count("sliding_attention") * before
    widest = max(window + (before if convolved else 0) if windowed else 1, segment if segmented else 1)
    steps = windowed * (window - 1) + (segmented if windowed else min(segmented, 1)) * (segment - 1)
    return Reach(widest, convolved + steps + 1)


def same_tokenizer(subjects: Sequence[Subject]) -> bool:
    """True if all subjects cut text into the same ids."""
    return len({tokenizer_identity(subject.tokenizer) for subject in subjects}) == 1


def check_names(subjects: Sequence[Subject]) -> None:
    """Raises ConfigError: no model, or two of one name."""
    names = [subject.name for subject in subjects]
    if not names:
        raise ConfigError("no model to evaluate; name at least one folder")
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise ConfigError(f"two models are named {double[0]!r}; give each its own name with --name")
