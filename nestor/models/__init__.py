"""Models: configuration, the one decoder, State, presets, and their registration with Hugging Face."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nestor.models.configuration import NestorConfig
    from nestor.models.decoder import NestorForCausalLM
    from nestor.models.presets import count_parameters, list_presets, preset
    from nestor.models.state import State

_EXPORTS = {
    "NestorConfig": "nestor.models.configuration",
    "NestorForCausalLM": "nestor.models.decoder",
    "State": "nestor.models.state",
    "count_parameters": "nestor.models.presets",
    "list_presets": "nestor.models.presets",
    "preset": "nestor.models.presets",
}

__all__ = ["NestorConfig", "NestorForCausalLM", "State", "count_parameters", "list_presets", "preset"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
