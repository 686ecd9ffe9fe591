"""The configuration of every Nestor model."""

from __future__ import annotations

import difflib
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from nestor.errors import ConfigError, suggest
from nestor.layers.continuum_settings import check_continuum
from nestor.layers.registry import feed_forward_names, mixer_names

NEEDS_WINDOW = {"sliding_attention", "memory_as_gate", "memory_as_layer", "lact"}
NEEDS_SEGMENT = {"memory_as_context"}


class NestorConfig(PreTrainedConfig):
    """What a Nestor model is made of. Each layer is a mixer and a feed-forward, named in two lists.

    Args:
        vocab_size: number of token ids.
        hidden_size: width `d` of the residual stream.
        num_hidden_layers: number of layers.
        num_attention_heads: query heads `H`; must divide `hidden_size`.
        num_key_value_heads: key and value heads; must divide `num_attention_heads`. None: as many as query
            heads.
        intermediate_size: inner width of the feed-forward. None: 8/3 of `hidden_size`, rounded up to 32.
        layer_types: mixer of each layer, by registry name. None: full attention everywhere.
        feed_forward_types: feed-forward of each layer, by registry name. None: SwiGLU everywhere.
        sliding_window: a query of windowed attention sees itself and `sliding_window - 1` tokens before it.
        persistent_tokens: learned key and value pairs that every query of every attention sees.
        segment_size: tokens in a segment of memory-as-context.
        memory: keyword arguments of the memory (heads, depth, expansion, chunk_size, ...). `kind` says which
            memory a layer of memories or a hybrid has: "titans", "moneta", "yaad", "memora", "omega", "atlas"
            or "atlas++".
        continuum: of feed-forwards called "continuum": `periods`, for each block, from the fastest to the
            slowest, how many tokens lie between its updates where the model learns from what it reads (None:
            never, for the last), and `wiring`, "sequential", "independent" or "nested".
        attention_conv_kernel: tokens seen by short convolutions of the queries, keys and values of layers
            that are attention alone, from 2 on, with the start of a memory; 0: none. Memories have
            `conv_kernel` in `memory`.
        qk_norm: normalise queries and keys of attention per head.
        rope_theta: base of the rotary embedding.
        rms_norm_eps: epsilon of the normalisations.
        initializer_range: standard deviation of the initial projection weights.
        tie_word_embeddings: the output projection is the embedding.
        tokenizer_name: tokenizer that the model was trained with; None if its files lie beside the weights.

    Raises:
        ConfigError: a value is impossible, or an argument looks like a misspelt one.
    """

    model_type = "nestor"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 260
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    intermediate_size: int | None = None
    layer_types: list[str] | None = None
    feed_forward_types: list[str] | None = None
    sliding_window: int | None = None
    persistent_tokens: int = 0
    segment_size: int | None = None
    memory: dict[str, Any] | None = None
    continuum: dict[str, Any] | None = None
    attention_conv_kernel: int = 0
    qk_norm: bool = False
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = 256
    eos_token_id: int | None = 257
    pad_token_id: int | None = 258
    tokenizer_name: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in kwargs:
            near = difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0.8)
            if near and not name.startswith("_"):
                raise ConfigError(f"unknown setting {name!r} of NestorConfig. {suggest(name, near)}")
        self._check_sizes()
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = -(-self.hidden_size * 8 // 96) * 32
        self.layer_types = list(self.layer_types or ["full_attention"] * self.num_hidden_layers)
        self.feed_forward_types = list(self.feed_forward_types or ["swiglu"] * self.num_hidden_layers)
        self.memory = dict(self.memory or {})
        self._check_heads()
        self._check_layers()
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        """Width `p` of an attention head."""
        return self.hidden_size // self.num_attention_heads

    def validate(self) -> None:
        """Check the values again, as Hugging Face asks before it saves. Its own list of layer types does not
        apply.

        Raises:
            ConfigError: a value is impossible.
        """
        self._check_sizes()
        self._check_heads()
        self._check_layers()

    def _check_sizes(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            _at_least(name, getattr(self, name), 1)
        for name in ("num_key_value_heads", "intermediate_size", "sliding_window", "segment_size"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        _at_least("persistent_tokens", self.persistent_tokens, 0)
        _at_least("attention_conv_kernel", self.attention_conv_kernel, 0)
        if self.attention_conv_kernel:
            _at_least("attention_conv_kernel", self.attention_conv_kernel, 2)
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or value <= 0:
                raise ConfigError(f"{name} is {value!r}; it must be a number above 0")

    def _check_heads(self) -> None:
        width, heads, groups = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        assert groups is not None
        if width % heads:
            raise ConfigError(
                f"hidden_size {width} does not divide into {heads} attention heads; "
                f"set num_attention_heads to a divisor such as {_nearest_divisor(width, heads)}"
            )
        if (width // heads) % 2:
            raise ConfigError(
                f"hidden_size {width} with {heads} heads gives heads of width {width // heads}; the rotary "
                f"embedding needs an even width. Halve num_attention_heads or change hidden_size"
            )
        if heads % groups:
            raise ConfigError(
                f"num_attention_heads {heads} does not divide into {groups} key-value heads; "
                f"set num_key_value_heads to a divisor such as {_nearest_divisor(heads, groups)}"
            )

    def _check_layers(self) -> None:
        for name, known in (("layer_types", mixer_names()), ("feed_forward_types", feed_forward_names())):
            kinds = getattr(self, name)
            if len(kinds) != self.num_hidden_layers:
                raise ConfigError(
                    f"{name} names {len(kinds)} layers, num_hidden_layers is {self.num_hidden_layers}; "
                    f"make them equal"
                )
            for kind in kinds:
                if kind not in known:
                    raise ConfigError(
                        f"{name} has {kind!r}; known are {', '.join(known)}. {suggest(kind, known)}".rstrip()
                    )
        _needs(self.layer_types, NEEDS_WINDOW, "sliding_window", self.sliding_window)
        _needs(self.layer_types, NEEDS_SEGMENT, "segment_size", self.segment_size)
        if "continuum" in (self.feed_forward_types or ()):
            assert self.intermediate_size is not None
            check_continuum(self.continuum or {}, self.intermediate_size)


# The names that a configuration takes as settings of its own.
OPTIONS = tuple(NestorConfig.__annotations__)


def _at_least(name: str, value: Any, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least {minimum}")


def _needs(layer_types: list[str] | None, kinds: set[str], name: str, value: int | None) -> None:
    asking = sorted(kinds & set(layer_types or ()))
    if asking and value is None:
        raise ConfigError(
            f"layer type {asking[0]!r} needs {name}; set it to a number of tokens, for example 256"
        )


def _nearest_divisor(total: int, wanted: int) -> int:
    return min((n for n in range(1, total + 1) if total % n == 0), key=lambda n: (abs(n - wanted), n))


AutoConfig.register(NestorConfig.model_type, NestorConfig, exist_ok=True)
