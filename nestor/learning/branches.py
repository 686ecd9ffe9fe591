"""Neural memories beside the attention of a decoder that is already trained, and their file.

A file holds the branches' own weights, with what the model was that they were made for. Nothing of the model
itself is in it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from nestor.errors import ConfigError, FileFormatError, StateMismatchError
from nestor.files import read_tensors, write_tensors
from nestor.layers.memory_branch import MemoryBranch
from nestor.models.state import LayerState, fingerprint

FORMAT = "nestor-branches"
FORMAT_VERSION = 1
# Llama, Qwen, SmolLM, Mistral: `self_attn`; GPT-NeoX: `attention`.
ATTENTION = re.compile(r"^(?:.*\.|)layers\.(\d+)\.(?:self_attn|attention)$")


class WindowCache(DynamicCache):
    """Keys and values of a window, and by layer what its memory has become."""

    def __init__(self, memories: dict[int, LayerState] | None = None) -> None:
        super().__init__()
        self.memories = dict(memories or {})


class BesideAttention(nn.Module):
    """Trained attention and a memory, both of the same normalised input; the sum of their outputs."""

    def __init__(self, attention: nn.Module, branch: MemoryBranch, index: int) -> None:
        super().__init__()
        self.attention, self.branch, self.index = attention, branch, index

    def forward(self, hidden_states: Tensor, *args: Any, **options: Any) -> tuple[Any, ...]:
        """As the attention. The memory's state is that of a `WindowCache`; without one it begins anew.

        Raises:
            ConfigError: another cache that has read something, of which the memory knows nothing; or without
                a `WindowCache`, padding or several texts in a row, which would go into one memory.
        """
        cache = options.get("past_key_values", options.get("layer_past"))
        ours = cache if isinstance(cache, WindowCache) else None
        if isinstance(cache, Cache) and ours is None and cache.get_seq_length(self.index):
            raise ConfigError(
                "a model with memory branches reads on through nestor.learning.WindowedDecoder, which keeps "
                "their state; by itself it reads one text from its beginning in one call"
            )
        if ours is None:
            _check_one_text(options.get("position_ids"), options.get("attention_mask"))
        attended, *rest = self.attention(hidden_states, *args, **options)
        before = None if ours is None else ours.memories.get(self.index)
        remembered, after = self.branch(hidden_states, before)
        if ours is not None:
            ours.memories[self.index] = after
        return attended + remembered, *rest


def _check_one_text(positions: Tensor | None, mask: Any) -> None:
    """Raises ConfigError: rows that are more, or less, than one text from end to end."""
    packed = positions is not None and bool((positions.diff(dim=-1) != 1).any())
    if packed or _hides(mask):
        raise ConfigError(
            "a model with memory branches reads one text in each row, without padding; give texts of one "
            "length, and packed ones row by row"
        )


def _hides(mask: Any) -> bool:
    """Whether some token does not see itself, or not the one before it: padding, or another text's end."""
    if not isinstance(mask, Tensor):
        return False
    if mask.dim() < 4:
        return not bool(mask.all())
    near = torch.cat([mask.diagonal(offset, -2, -1).flatten() for offset in (0, -1)])
    return not bool((near if near.dtype == torch.bool else near == 0).all())


@dataclass(frozen=True)
class Branches:
    """Where memories are added, and of which kind.

    Attributes:
        layers: by index; none: `count` of them, with equal distances.
        memory: settings of `NeuralMemory`, such as `heads` (as many as the attention has, unless given),
            `depth`, `expansion` and `chunk_size`.
        seed: of the initial weights.
    """

    layers: tuple[int, ...] = ()
    count: int = 4
    memory: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def attach(self, model: nn.Module) -> Attached:
        """Put the branches into the model, in place; until they are trained it gives what it gave.

        Raises:
            ConfigError: a model whose attention is not found or that has branches, a layer that it has not,
                or a setting that no memory has.
        """
        _check_free(model)
        places = _places(model)
        layers = self.layers or tuple(len(places) * (i + 1) // (self.count + 1) for i in range(self.count))
        if not layers or len(set(layers)) < len(layers) or not set(layers) <= set(places):
            raise ConfigError(
                f"branches are to be beside layers {list(layers)} of {len(places)}; give some, each once"
            )
        config: Any = model.config
        source = fingerprint(model)
        settings = {"heads": config.num_attention_heads, **self.memory}
        found = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for index in sorted(layers):
                try:
                    branch = MemoryBranch(config.hidden_size, **settings)
                except TypeError as error:
                    raise ConfigError(f"memory is {self.memory}; {error}") from error
                # Layers of one model can be on several devices.
                like = next(model.get_submodule(places[index]).parameters())
                dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
                found[index] = branch.to(like.device, dtype)
        for index, branch in found.items():
            model.set_submodule(
                places[index], BesideAttention(model.get_submodule(places[index]), branch, index)
            )
        return Attached(found, self, source)


@dataclass(frozen=True)
class Attached:
    """Branches that a model has now, by layer; source: `fingerprint` of the model without them."""

    modules: dict[int, MemoryBranch]
    settings: Branches
    source: dict[str, Any]

    def parameters(self) -> dict[str, nn.Parameter]:
        """By layer and name, as in the file."""
        return {
            f"{index}.{name}": parameter
            for index, module in self.modules.items()
            for name, parameter in module.named_parameters()
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the branches' weights to one safetensors file, atomically."""
        header = {"version": FORMAT_VERSION, "settings": asdict(self.settings), "source": self.source}
        tensors = {name: parameter.detach() for name, parameter in self.parameters().items()}
        write_tensors(path, tensors, {FORMAT: json.dumps(header)})


def load_branches(path: str | os.PathLike[str], model: nn.Module) -> Attached:
    """Give a model the branches of a file, which were made for it.

    Raises:
        DataError: there is no such file. FileFormatError: it is truncated, or holds no branches.
        StateMismatchError: they were made for another model, or for one of other weights or another dtype.
        ConfigError: the model has branches.
    """
    _check_free(model)
    tensors, metadata = read_tensors(path)
    name = os.fspath(path)
    try:
        header = json.loads(metadata[FORMAT])
        version, source = header["version"], header["source"]
        fields = dict(header["settings"])
        settings = Branches(**{**fields, "layers": tuple(fields["layers"])})
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"{name} is no file of memory branches that Nestor saved") from error
    if version != FORMAT_VERSION:
        raise FileFormatError(f"{name} has format {version}; this version of Nestor reads {FORMAT_VERSION}")
    differences = list(_differences(source, json.loads(json.dumps(fingerprint(model)))))
    if differences:
        raise StateMismatchError(f"{name} has the branches of another model: {'; '.join(differences)}")
    attached = settings.attach(model)
    wanted = attached.parameters()
    if {key: x.shape for key, x in tensors.items()} != {key: x.shape for key, x in wanted.items()}:
        raise FileFormatError(f"{name} has other tensors than its settings ask for")
    with torch.no_grad():
        for key, parameter in wanted.items():
            parameter.copy_(tensors[key])
    return attached


def _check_free(model: nn.Module) -> None:
    if any(isinstance(module, BesideAttention) for module in model.modules()):
        raise ConfigError("the model has memory branches; load it anew to give it others")


def _places(model: nn.Module) -> dict[int, str]:
    """By layer, the name of its attention. Raises ConfigError: it is not found."""
    found = [(match, name) for name, _ in model.named_modules() if (match := ATTENTION.match(name))]
    places = {int(match.group(1)): name for match, name in found}
    if not places or len(places) < len(found) or sorted(places) != list(range(len(places))):
        raise ConfigError(
            f"a {type(model).__name__} has no attention called layers.N.self_attn or layers.N.attention in "
            f"each layer of one stack; memory branches are for decoders like Llama, Qwen and GPT-NeoX"
        )
    return places


def _differences(saved: dict[str, Any], model: dict[str, Any]) -> Iterator[str]:
    first, second = saved["architecture"], model["architecture"]
    for name in sorted({*first, *second}):
        if first.get(name) != second.get(name):
            yield f"{name} is {first.get(name)!r} in the file and {second.get(name)!r} in the model"
    if saved["weights"] != model["weights"]:
        yield "its weights, or their dtype, are others"
