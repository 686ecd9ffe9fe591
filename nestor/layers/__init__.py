"""Layers: `nn.Module`s on the operations of `nestor.ops`. They know no Hugging Face.

A mixer is a module with

    forward(x: [B, T, d], state: LayerState | None = None, span: Span | None = None) -> ([B, T, d],
    LayerState)

`state` None is a fresh sequence. A mixer never changes the state it is given, treats T = 1 like any other T,
and gives the same outputs, to rounding, wherever a stream is cut into calls. `span` None means that all
tokens are valid and none starts a document.

`LayerState` is a dictionary of tensors, batch axis first. A key with a dot-separated part `cache` (such as
`cache.key` or `attention.cache.key`) holds a growing cache `[B, n, ...]`: right-aligned, most recent entry
last, entries that are not valid on the left and never read. Only such tensors may differ between two states
of one model in an axis other than the batch; stacking states pads them on the left.

A module with a method `initialize(std)` sets its own parameters, after those of its children, when a model
draws its initial weights. It uses `torch.nn.init` only, which a model that loads a checkpoint intercepts.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nestor.layers.attention import Attention, attend
    from nestor.layers.feed_forward import SwiGLU
    from nestor.layers.norm import RMSNorm
    from nestor.layers.registry import build_feed_forward, build_mixer, register_feed_forward, register_mixer
    from nestor.layers.rotary import rotate
    from nestor.layers.span import Span

_EXPORTS = {
    "Attention": "nestor.layers.attention",
    "attend": "nestor.layers.attention",
    "SwiGLU": "nestor.layers.feed_forward",
    "RMSNorm": "nestor.layers.norm",
    "build_feed_forward": "nestor.layers.registry",
    "build_mixer": "nestor.layers.registry",
    "register_feed_forward": "nestor.layers.registry",
    "register_mixer": "nestor.layers.registry",
    "rotate": "nestor.layers.rotary",
    "Span": "nestor.layers.span",
    "NeuralMemory": "nestor.layers.neural_memory",
    "MemoryAsContext": "nestor.layers.memory_as_context",
    "MemoryAsGate": "nestor.layers.memory_as_gate",
    "MemoryAsLayer": "nestor.layers.memory_as_layer",
    "TNT": "nestor.layers.tnt",
    "TTT": "nestor.layers.ttt",
    "Miras": "nestor.layers.miras",
    "Atlas": "nestor.layers.atlas",
    "LaCT": "nestor.layers.lact",
    "SelfModifyingMemory": "nestor.layers.self_modifying",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
