"""A chunk's step in fixed shapes, which on a GPU is captured once as a CUDA graph and then replayed.

One operation after another, a small model's chunk takes several times as long to launch as to compute. A
graph takes one launch, but it computes with the shapes and at the addresses with which it was captured. So
all that a chunk begins with is copied into tensors that stay where they are; keys and values of earlier
tokens have places for more tokens than were read, and the attention mask hides those that are not filled.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from nestor.errors import ConfigError
from nestor.learning.chunks import Chunk, EagerStep, Learned, Step, differentiate
from nestor.learning.readers import CacheReader, Reader
from nestor.learning.stream import Tensors
from nestor.models.state import State

#: Kinds of models for which the tests compare both steps.
MODELS = ("gpt_neox", "llama", "mistral", "qwen2", "qwen3")
#: Places of earlier tokens at first. They double when a context needs more, and the step is captured again.
PLACES = 1024


def step_of(reader: Reader, length: int, capture: bool | None) -> Step:
    """The step of a Learner.

    Args:
        length: tokens of a whole chunk. capture: as for a Learner.

    Raises:
        ConfigError: a capture is asked for, and the model has no step in fixed shapes.
    """
    why = obstacle(reader)
    if capture and why is not None:
        raise ConfigError(f"capture is True, but {why}; leave it out to learn one operation after another")
    if isinstance(reader, CacheReader) and why is None:
        on_gpu = reader.model.device.type == "cuda"
        if on_gpu if capture is None else capture:
            return GraphedStep(reader, length)
    return EagerStep(reader)


def obstacle(reader: Reader) -> str | None:
    """Why a model has no step in fixed shapes; None: it has."""
    if not isinstance(reader, CacheReader):
        return "Nestor's own models have no step in fixed shapes, nor has a WindowedDecoder"
    model: PreTrainedModel = reader.model
    if model.config.model_type not in MODELS:
        return f"the model is a {model.config.model_type!r}, and captured are {', '.join(MODELS)}"
    attention = model.config._attn_implementation
    if attention not in ("sdpa", "eager"):
        return f"the model's attention {attention!r} takes no mask of its own; load it with 'sdpa'"
    rotary = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rotary in ("dynamic", "longrope"):
        return f"rotary embeddings of type {rotary!r} depend on the length that was read"
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) > 1:
        return f"the model is spread over {', '.join(sorted(devices))}"
    return None


class GraphedStep:
    """The step of a Hugging Face decoder in fixed shapes, for chunks of at most `length` tokens.

    On a GPU it is captured at the first chunk, and again when a context grows beyond its places or the
    model's parameters lie elsewhere than before. Weights that change in place count. One thread may use it at
    a time.
    """

    def __init__(self, reader: CacheReader, length: int) -> None:
        self._reader, self._length = reader, length
        self._program: _Program | None = None
        # The clock of the last State given out, and what it says: to read it would wait for the device.
        self._clock: Tensor | None = None
        self._read = 0

    def __call__(self, weights: Tensors, deltas: Mapping[str, Tensor], chunk: Chunk, start: State) -> Learned:
        count = len(chunk.tokens)
        read = self._read if start.clock is self._clock else int(start.clock)
        with torch.inference_mode(False), torch.no_grad():
            earlier = _earlier(start, read)
            program = self._fitting(weights, deltas, read)
            program.load(deltas, chunk, earlier, start.clock)
            logits, loss, gradients, norm, new = program.run()
            pairs = zip(earlier, new, strict=True)
            caches = [torch.cat((old, own[:, :, :count]), dim=2).transpose(1, 2) for old, own in pairs]
            layers = {
                index: {"keys.cache": keys, "values.cache": values}
                for index, (keys, values) in enumerate(zip(caches[::2], caches[1::2], strict=True))
            }
            after = State(layers, start.clock + count)
            self._clock, self._read = after.clock, read + count
            # The next chunk's logits come to lie where these are; gradients and scalars the caller uses up.
            return Learned(logits[:, :count].clone(), loss, gradients, norm, after)

    def _fitting(self, weights: Tensors, deltas: Mapping[str, Tensor], read: int) -> _Program:
        """The program for these weights and for this many tokens before the chunk."""
        before = self._program
        if before is not None and before.fits(weights, read):
            return before
        places = PLACES if before is None else before.places
        while places < read:
            places *= 2
        if before is not None and before.device.type == "cuda":
            # It may still run, and its memory is wanted for the next.
            torch.cuda.synchronize(before.device)
        self._program = before = None
        self._program = _Program(self._reader, weights, deltas, self._length, places)
        return self._program


class _Program:
    """Tensors at fixed addresses, and the work between them."""

    def __init__(
        self, reader: CacheReader, weights: Tensors, deltas: Mapping[str, Tensor], length: int, places: int
    ) -> None:
        self._model, self._weights, self.places = reader.model, weights, places
        self.device = reader.model.device
        self._deltas = {name: torch.zeros_like(delta) for name, delta in deltas.items()}
        ids = torch.zeros(2, length, dtype=torch.int64, device=self.device)
        self._chunk = Chunk(ids[0], ids[1], torch.zeros(length, dtype=torch.float64, device=self.device))
        self._clock = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._past = [
            torch.zeros(1, shape[1], places, shape[3], dtype=dtype, device=self.device)
            for keys, values, dtype in reader.shapes
            for shape in (keys, values)
        ]
        self._filled = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        if self.device.type == "cuda":
            with self._on_device():
                self._capture()

    def fits(self, weights: Tensors, read: int) -> bool:
        """Whether it reads these weights, in place, and has room for this many tokens before the chunk."""

        # What is kept here keeps its memory, so that nothing else can have come to lie there.
        def addresses(tensors: Tensors) -> list[int]:
            return [tensor.data_ptr() for tensor in tensors.values()]

        return read <= self.places and addresses(weights) == addresses(self._weights)

    def load(self, deltas: Mapping[str, Tensor], chunk: Chunk, earlier: list[Tensor], clock: Tensor) -> None:
        """Copy in what a chunk begins with. earlier: keys and values of each layer `[1, H, read, p]`."""
        torch._foreach_copy_(list(self._deltas.values()), [deltas[name] for name in self._deltas])
        count, read = len(chunk.tokens), earlier[0].shape[2]
        # A chunk that is not whole is filled up with whatever is there, which counts nothing.
        self._chunk.weights.zero_()
        for fixed, given in zip(self._chunk, chunk, strict=True):
            fixed[:count].copy_(given)
        self._clock.copy_(clock)
        if read:
            torch._foreach_copy_([past[:, :, :read] for past in self._past], earlier)
        if self._filled > read:
            # Hidden, but were it not finite, no mask would keep it from the sum over values.
            torch._foreach_zero_([past[:, :, read : self._filled] for past in self._past])
        self._filled = read

    def run(self) -> tuple[Tensor, Tensor, Tensors, Tensor, list[Tensor]]:
        """Logits, loss, gradients, their norm, and the chunk's keys and values by layer `[1, H, C, p]`."""
        if self._graph is None:
            return self._work()
        with self._on_device():
            self._graph.replay()
        return self._results

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _capture(self) -> None:
        # Libraries set themselves up in the first runs, which a graph must not hold.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._results = self._work()
        self._graph = graph

    def _work(self) -> tuple[Tensor, Tensor, Tensors, Tensor, list[Tensor]]:
        return differentiate(self._forward, self._weights, self._deltas, self._chunk)

    def _forward(self, weights: Tensors) -> tuple[Tensor, list[Tensor]]:
        """Logits ``[1, C, V]``, and the chunk's own keys and values."""
        layers = [_Past(*pair) for pair in zip(self._past[::2], self._past[1::2], strict=True)]
        positions = self._clock + torch.arange(len(self._chunk.tokens), device=self.device)
        options: dict[str, Any] = {
            "past_key_values": Cache(layers=list(layers)),
            "use_cache": True,
            "position_ids": positions[None],
            "attention_mask": self._masks(positions),
        }
        output = functional_call(self._model, weights, (self._chunk.tokens[None],), options)
        return output.logits, [tensor for layer in layers for tensor in layer.own]

    def _masks(self, positions: Tensor) -> Tensor | dict[str, Tensor]:
        """What is added to scores `[1, 1, C, places + C]`; by kind of layer where a model has several."""
        config: Any = self._model.config
        places = torch.arange(self.places, device=self.device)
        keys = torch.cat((places, positions))
        filled = torch.cat((places < self._clock, torch.ones_like(positions, dtype=torch.bool)))
        seen = filled & (keys <= positions[:, None])
        window = getattr(config, "sliding_window", None)
        near = seen if window is None else seen & (keys > positions[:, None] - window)
        if config.model_type in ("qwen2", "qwen3"):
            return {"full_attention": self._added(seen), "sliding_attention": self._added(near)}
        return self._added(near if config.model_type == "mistral" else seen)

    def _added(self, seen: Tensor) -> Tensor:
        dtype = self._past[0].dtype
        hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=self.device)
        return torch.where(seen, torch.zeros_like(hidden), hidden)[None, None]


class _Past(DynamicLayer):
    """Keys and values `[1, H, places, p]` to which those of a chunk are appended; `own` are the chunk's."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.dtype, self.device = keys.dtype, keys.device
        self.own: tuple[Tensor, ...] = ()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        # Not as views of what is returned, which they would keep in memory.
        self.own = (key_states.detach(), value_states.detach())
        return super().update(key_states, value_states, *args, **kwargs)


def _earlier(state: State, read: int) -> list[Tensor]:
    """Keys and values of the tokens that one stream has read, by layer `[1, H, read, p]`."""
    caches = [layer[name] for layer in state.layers.values() for name in ("keys.cache", "values.cache")]
    return [cache[:, cache.shape[1] - read :].transpose(1, 2) for cache in caches]
