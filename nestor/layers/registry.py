"""Mixers and feed-forwards by name.

A model names its layers; the module that defines a name is imported when a model first asks for it, so a
model never pays for layers it does not use. A new built-in layer is one file plus one line in a table below;
a layer outside this package calls `register_mixer` or `register_feed_forward` before the model is built.
"""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from nestor.errors import ConfigError, suggest

if TYPE_CHECKING:
    # Only for the checker: a configuration reads the names without loading torch.
    from torch import nn

Factory = Callable[[Any, int], "nn.Module"]

MIXER_MODULES = {
    "full_attention": "nestor.layers.attention",
    "sliding_attention": "nestor.layers.attention",
    "neural_memory": "nestor.layers.neural_memory",
    "memory_as_context": "nestor.layers.memory_as_context",
    "memory_as_gate": "nestor.layers.memory_as_gate",
    "memory_as_layer": "nestor.layers.memory_as_layer",
    "tnt": "nestor.layers.tnt",
    "lact": "nestor.layers.lact",
    "ttt_linear": "nestor.layers.ttt",
    "ttt_mlp": "nestor.layers.ttt",
    "self_modifying": "nestor.layers.self_modifying",
    "kda": "nestor.layers.fla",
    "gated_deltanet": "nestor.layers.fla",
}
FEED_FORWARD_MODULES = {
    "swiglu": "nestor.layers.feed_forward",
    "continuum": "nestor.layers.continuum",
}

_mixers: dict[str, Factory] = {}
_feed_forwards: dict[str, Factory] = {}


def register_mixer(name: str) -> Callable[[Factory], Factory]:
    """Decorate `factory(config, layer_index) -> module` to make it the mixer called `name`."""
    return _register(_mixers, name)


def register_feed_forward(name: str) -> Callable[[Factory], Factory]:
    """Decorate `factory(config, layer_index) -> module` to make it the feed-forward called `name`."""
    return _register(_feed_forwards, name)


def build_mixer(name: str, config: Any, layer_index: int) -> "nn.Module":
    """Build the mixer `name` from any object that has the attributes of `NestorConfig`.

    Raises:
        ConfigError: no mixer has this name.
    """
    return _find(_mixers, MIXER_MODULES, "mixer", name)(config, layer_index)


def build_feed_forward(name: str, config: Any, layer_index: int) -> "nn.Module":
    """Build the feed-forward `name` from any object that has the attributes of `NestorConfig`.

    Raises:
        ConfigError: no feed-forward has this name.
    """
    return _find(_feed_forwards, FEED_FORWARD_MODULES, "feed-forward", name)(config, layer_index)


def mixer_names() -> list[str]:
    """Every mixer that can be named in a configuration."""
    return sorted({*MIXER_MODULES, *_mixers})


def feed_forward_names() -> list[str]:
    """Every feed-forward that can be named in a configuration."""
    return sorted({*FEED_FORWARD_MODULES, *_feed_forwards})


def _register(table: dict[str, Factory], name: str) -> Callable[[Factory], Factory]:
    def store(factory: Factory) -> Factory:
        table[name] = factory
        return factory

    return store


def _find(table: dict[str, Factory], modules: dict[str, str], kind: str, name: str) -> Factory:
    if name not in table and name in modules:
        import_module(modules[name])
    if name not in table:
        known = sorted({*modules, *table})
        raise ConfigError(
            f"unknown {kind} {name!r}; known: {', '.join(known)}. {suggest(name, known)}".rstrip()
        )
    return table[name]
