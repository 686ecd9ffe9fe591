"""What changes weights while a model reads: levels, each with a period of its own, on one token clock."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nestor.learning.assignment import (
        assign_levels,
        continuum_blocks,
        continuum_levels,
        feed_forward_weights,
    )
    from nestor.learning.branches import Attached, Branches, load_branches
    from nestor.learning.learner import Learner, LevelReport, Reading
    from nestor.learning.levels import Level
    from nestor.learning.retrofit import Retrofit
    from nestor.learning.unrolled import Unrolled, unrolled_loss
    from nestor.learning.windowed import WindowedDecoder

_EXPORTS = {
    "Attached": "nestor.learning.branches",
    "Branches": "nestor.learning.branches",
    "Learner": "nestor.learning.learner",
    "Level": "nestor.learning.levels",
    "LevelReport": "nestor.learning.learner",
    "Reading": "nestor.learning.learner",
    "Retrofit": "nestor.learning.retrofit",
    "Unrolled": "nestor.learning.unrolled",
    "WindowedDecoder": "nestor.learning.windowed",
    "assign_levels": "nestor.learning.assignment",
    "continuum_blocks": "nestor.learning.assignment",
    "continuum_levels": "nestor.learning.assignment",
    "feed_forward_weights": "nestor.learning.assignment",
    "load_branches": "nestor.learning.branches",
    "unrolled_loss": "nestor.learning.unrolled",
}

__all__ = [
    "Attached",
    "Branches",
    "Learner",
    "Level",
    "LevelReport",
    "Reading",
    "Retrofit",
    "Unrolled",
    "WindowedDecoder",
    "assign_levels",
    "continuum_blocks",
    "continuum_levels",
    "feed_forward_weights",
    "load_branches",
    "unrolled_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
