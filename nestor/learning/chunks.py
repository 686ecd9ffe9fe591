"""Reading one chunk of a stream, and the gradients of what is predicted in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import get_total_norm

from nestor.errors import ConfigError
from nestor.learning.readers import Reader
from nestor.learning.stream import Tensors
from nestor.models.state import State


class Chunk(NamedTuple):
    """Tokens int64 ``[C]`` of one stream, the token after each int64 ``[C]``, and how much it counts to have
    predicted that, float ``[C]``."""

    tokens: Tensor
    targets: Tensor
    weights: Tensor


class Learned(NamedTuple):
    """What came of a chunk.

    logits: ``[1, C, V]``; loss: the sum over tokens of weight times loss, a scalar; gradients: of it, by
    parameter; norm: of all gradients together, a scalar; after: the model's State after the chunk.
    """

    logits: Tensor
    loss: Tensor
    gradients: Tensors
    norm: Tensor
    after: State


class Step(Protocol):
    """Reads a chunk and differentiates."""

    def __call__(self, weights: Tensors, deltas: Mapping[str, Tensor], chunk: Chunk, start: State) -> Learned:
        """What came of a chunk, detached, valid until the next call.

        Args:
            weights: the model's own, all of them by name. deltas: what is added to some, the gradients of
                which are wanted. start: the model's State before the chunk.

        Raises:
            ConfigError: the loss does not depend on a parameter in `deltas`.
        """
        ...


class EagerStep:
    """One operation after another, for every model."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def __call__(self, weights: Tensors, deltas: Mapping[str, Tensor], chunk: Chunk, start: State) -> Learned:
        with torch.inference_mode(False):
            chunk = Chunk(*map(own, chunk))
            start = State(
                {i: {n: own(x) for n, x in layer.items()} for i, layer in start.layers.items()},
                own(start.clock),
            )
            logits, loss, gradients, norm, after = differentiate(
                lambda adapted: self._reader(adapted, chunk.tokens[None], start), weights, deltas, chunk
            )
            return Learned(logits, loss, gradients, norm, after.detach())


def differentiate(
    forward: Callable[[Tensors], tuple[Tensor, Any]],
    weights: Tensors,
    deltas: Mapping[str, Tensor],
    chunk: Chunk,
) -> tuple[Tensor, Tensor, Tensors, Tensor, Any]:
    """Logits, loss, gradients, their norm, and the rest of what `forward` gives beside logits."""
    with torch.enable_grad():
        leaves = {name: own(x).detach().requires_grad_() for name, x in deltas.items()}
        logits, rest = forward(adapted(weights, leaves))
        wide = torch.promote_types(logits.dtype, torch.float32)
        losses = F.cross_entropy(logits[0].to(wide), chunk.targets, reduction="none")
        loss = (losses * chunk.weights.to(wide)).sum()
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    gradients: Tensors = {}
    for name, g in zip(leaves, found, strict=True):
        if g is None:
            raise ConfigError(
                f"what the model predicts does not depend on {name!r}, which is in a level; leave it out"
            )
        gradients[name] = g
    return logits.detach(), loss.detach(), gradients, get_total_norm(found), rest


def adapted(weights: Tensors, deltas: Mapping[str, Tensor]) -> Tensors:
    """Weights with what was added to some of them: summed in the wider type, then in their own."""
    changed = {name: (weights[name] + delta).to(weights[name].dtype) for name, delta in deltas.items()}
    return {**weights, **changed}


def own(x: Tensor) -> Tensor:
    """A tensor that autograd can keep."""
    return x.clone() if x.is_inference() else x
