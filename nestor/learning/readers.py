"""How a Learner runs a model: with other weights, from a State to the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import DynamicCache, PreTrainedModel

from nestor.errors import ConfigError
from nestor.learning.windowed import WindowedDecoder
from nestor.models.decoder import NestorForCausalLM
from nestor.models.state import State


class Reader(Protocol):
    """A model as a function of weights, a State of one stream, and tokens int64 ``[1, T]``."""

    def initial_state(self, batch_size: int) -> State:
        """The State of streams that have read nothing."""
        ...

    def __call__(self, weights: Mapping[str, Tensor], ids: Tensor, state: State) -> tuple[Tensor, State]:
        """Logits ``[1, T, V]`` and the State after the tokens. weights: all, by name."""
        ...

    def generate(self, ids: Tensor, state: State, options: Mapping[str, Any]) -> Tensor:
        """Tokens ``[1, n]`` that follow the tokens ``[1, T]`` after a State, with the model's own weights."""
        ...


class StateReader:
    """A model that takes and gives a State itself: Nestor's, or a WindowedDecoder."""

    def __init__(self, model: NestorForCausalLM | WindowedDecoder) -> None:
        self.model = model

    def initial_state(self, batch_size: int) -> State:
        return self.model.initial_state(batch_size).detach()

    def __call__(self, weights: Mapping[str, Tensor], ids: Tensor, state: State) -> tuple[Tensor, State]:
        options = {"past_key_values": state, "use_cache": True}
        output = functional_call(self.model, dict(weights), (ids,), options)
        return output.logits, output.past_key_values

    def generate(self, ids: Tensor, state: State, options: Mapping[str, Any]) -> Tensor:
        mask = torch.ones_like(ids)
        model: Any = self.model
        made = model.generate(ids, attention_mask=mask, past_key_values=state, **options)
        return made[:, ids.shape[1] :]


class CacheReader:
    """A Hugging Face decoder that keeps keys and values of each layer in a `DynamicCache`.

    State, by layer: `keys.cache`, `values.cache` `[B, T, H, p]`, of which the last `clock` tokens count.

    Attributes:
        shapes: by layer, of keys and of values as the model keeps them, `[B, H, T, p]`, and their dtype.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        with torch.no_grad():
            cache: Any = getattr(model(ids, use_cache=True), "past_key_values", None)
        layers = cache.layers if isinstance(cache, DynamicCache) else []
        pairs: list[Any] = [
            (getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers
        ]
        if not pairs or any(not isinstance(x, Tensor) or x.dim() != 4 for pair in pairs for x in pair):
            raise ConfigError(
                f"a {type(model).__name__} does not keep keys and values of all its layers while it reads; a "
                f"Learner takes Nestor's models, and decoders that do"
            )
        self.shapes = [(keys.shape, values.shape, keys.dtype) for keys, values in pairs]

    def initial_state(self, batch_size: int) -> State:
        def empty(shape: torch.Size, dtype: torch.dtype) -> Tensor:
            return torch.zeros(batch_size, 0, shape[1], shape[3], dtype=dtype, device=self.model.device)

        layers = {
            index: {"keys.cache": empty(keys, dtype), "values.cache": empty(values, dtype)}
            for index, (keys, values, dtype) in enumerate(self.shapes)
        }
        return State(layers, State.empty(batch_size, self.model.device).clock)

    def __call__(self, weights: Mapping[str, Tensor], ids: Tensor, state: State) -> tuple[Tensor, State]:
        options: dict[str, Any] = {"past_key_values": _cache(state), "use_cache": True}
        output = functional_call(self.model, dict(weights), (ids,), options)
        layers = {
            index: {
                "keys.cache": layer.keys.transpose(1, 2),
                "values.cache": layer.values.transpose(1, 2),
            }
            for index, layer in enumerate(output.past_key_values.layers)
        }
        return output.logits, State(layers, state.clock + ids.shape[1])

    def generate(self, ids: Tensor, state: State, options: Mapping[str, Any]) -> Tensor:
        # Generation wants an id for each token of the cache, which it then leaves out.
        read = ids.new_full((1, int(state.clock)), self.model.config.bos_token_id or 0)
        ids = torch.cat((read, ids), 1)
        model: Any = self.model
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=_cache(state), **options
        )
        return made[:, ids.shape[1] :]


def _cache(state: State) -> DynamicCache:
    """Keys and values of a State of one stream."""
    cache, read = DynamicCache(), int(state.clock)
    if read:
        for index, layer in state.layers.items():
            keys, values = (layer[f"{name}.cache"][:, -read:].transpose(1, 2) for name in ("keys", "values"))
            cache.update(keys, values, index)
    return cache


def reader_of(model: nn.Module) -> Reader:
    """How to run a model.

    Raises:
        ConfigError: a Learner has no use for such a model; the message says why.
    """
    if isinstance(model, (NestorForCausalLM, WindowedDecoder)):
        return StateReader(model)
    if isinstance(model, PreTrainedModel) and model.can_generate():
        return CacheReader(model)
    raise ConfigError(
        f"a {type(model).__name__} is no causal language model of Nestor or of Hugging Face; "
        f"load one with AutoModelForCausalLM"
    )
