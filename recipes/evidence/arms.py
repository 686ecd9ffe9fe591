"""Memories of one matrix and of two that keep the same number of bytes from token to token.

What is counted is what the recurrence hands on: weights, and momentum where there is some. The weights at the
start of a chunk, which a stream that stops within a chunk keeps as well, are a copy. A layer of width d whose
linear memories have heads of width p keeps `d p` numbers. A memory with momentum keeps all twice, and one of
two layers keeps `2 d h` of hidden width h whatever its heads are, so at equal bytes

    linear                 heads of p
    linear with momentum   heads of p / 2
    deep                   hidden width p / 2, in heads of p / 2
    deep with momentum     hidden width p / 4, in heads of p / 4
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from nestor.errors import ConfigError


@dataclass(frozen=True)
class Arm:
    """A memory.

    Attributes:
        about: in words.
        deep: two layers instead of one matrix.
        momentum: with momentum and forgetting.
        settings: others of `nestor.layers.neural_memory.NeuralMemory`.
    """

    about: str
    deep: bool
    momentum: bool
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> str:
        """deep or linear."""
        return "deep" if self.deep else "linear"

    def width(self, linear_width: int) -> int:
        """Of a head, and of its hidden layer, where that of plain linear memories is given."""
        return linear_width // ((2 if self.deep else 1) * (2 if self.momentum else 1))

    def memory(self, dim: int, linear_width: int) -> dict[str, Any]:
        """Settings of `NestorConfig.memory` in a layer of width `dim`.

        Raises:
            ConfigError: the widths do not divide.
        """
        if dim % linear_width or linear_width % 4:
            raise ConfigError(
                f"a width of {dim} and linear heads of {linear_width}: the first must be a multiple of the "
                f"second, and that of 4"
            )
        return {
            "heads": dim // self.width(linear_width),
            "depth": 2 if self.deep else 1,
            "expansion": 1,
            "momentum": self.momentum,
            "forget": self.momentum,
            **self.settings,
        }


_PLAIN, _NORMED = {"norm": "none"}, {"norm": "residual_layernorm"}
ARMS = {
    "linear-attention": Arm(
        "one matrix to which v k^T is added (inner loss -<M k, v>)", False, False,
        {**_PLAIN, "inner_loss": "dot_product"},
    ),
    "linear": Arm("one matrix that descends ||M k - v||^2 (the delta rule, by chunks)", False, False, _PLAIN),
    "linear-momentum": Arm("the same with momentum and forgetting", False, True, _PLAIN),
    "linear-normed": Arm(
        "the same with momentum, forgetting, and k + LN(M k) for M k (Titans' linear memory)",
        False, True, _NORMED,
    ),
    "deep": Arm("two matrices, k + LN(MLP(k)), without momentum and forgetting", True, False, _NORMED),
    "deep-momentum": Arm("the same with momentum and forgetting (Titans' memory)", True, True, _NORMED),
}  # fmt: skip


def memory_bytes(model: Any) -> list[int]:
    """Bytes that the memory of each layer of a model hands on for one sequence."""
    like = torch.zeros(1)
    found = []
    for layer in model.layers:
        state = layer.mixer.fresh_state(1, like)
        counted = [part for name, part in state.items() if name.split(".")[0] in ("weights", "momentum")]
        found.append(sum(part.numel() * part.element_size() for part in counted))
    return found


def check_arms(names: tuple[str, ...]) -> None:
    """Raises ConfigError: a name is not in the table."""
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        raise ConfigError(f"there is no memory {unknown[0]!r} in this recipe; there are {', '.join(ARMS)}")
