"""Nestor: language models that keep learning.

`import nestor` makes Hugging Face's Auto classes know Nestor's models. It loads neither torch nor
transformers: names are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nestor.models.registration import register_with_hugging_face

if TYPE_CHECKING:
    from nestor.layers.attention import Attention
    from nestor.layers.memory_as_context import MemoryAsContext
    from nestor.layers.memory_as_gate import MemoryAsGate
    from nestor.layers.memory_as_layer import MemoryAsLayer
    from nestor.layers.neural_memory import NeuralMemory
    from nestor.models.configuration import NestorConfig
    from nestor.models.decoder import NestorForCausalLM
    from nestor.models.presets import count_parameters, list_presets, preset
    from nestor.models.state import State

__version__ = "0.1.0"

_EXPORTS = {
    "Attention": "nestor.layers.attention",
    "MemoryAsContext": "nestor.layers.memory_as_context",
    "MemoryAsGate": "nestor.layers.memory_as_gate",
    "MemoryAsLayer": "nestor.layers.memory_as_layer",
    "NeuralMemory": "nestor.layers.neural_memory",
    "NestorConfig": "nestor.models.configuration",
    "NestorForCausalLM": "nestor.models.decoder",
    "State": "nestor.models.state",
    "count_parameters": "nestor.models.presets",
    "list_presets": "nestor.models.presets",
    "preset": "nestor.models.presets",
}

__all__ = sorted(["__version__", *_EXPORTS])

register_with_hugging_face()


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
