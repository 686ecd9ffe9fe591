"""Training: configuration, the loop, checkpoints, distribution."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nestor.training.config import TrainConfig, load_config, shipped_configs
    from nestor.training.loop import RunResult, train
    from nestor.training.orthogonal import M3, AdaMuon

_EXPORTS = {
    "AdaMuon": "nestor.training.orthogonal",
    "M3": "nestor.training.orthogonal",
    "RunResult": "nestor.training.loop",
    "TrainConfig": "nestor.training.config",
    "load_config": "nestor.training.config",
    "shipped_configs": "nestor.training.config",
    "train": "nestor.training.loop",
}

__all__ = ["AdaMuon", "M3", "RunResult", "TrainConfig", "load_config", "shipped_configs", "train"]


def __getattr__(name: str) -> Any:
    # Listing configurations must not wait for torch.
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
