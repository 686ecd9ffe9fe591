"""State: everything that changes while a model reads."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestor.errors import FileFormatError, ShapeError, StateMismatchError
from nestor.files import read_metadata, read_tensors, write_tensors

FORMAT = "nestor-state"
FORMAT_VERSION = 1
LayerState = dict[str, Tensor]

# Settings that give a State its shape or its meaning. A model that differs in one cannot read it.
ARCHITECTURE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "layer_types",
    "feed_forward_types",
    "sliding_window",
    "persistent_tokens",
    "segment_size",
    "memory",
    "continuum",
    "qk_norm",
    "rope_theta",
    "rms_norm_eps",
    "tie_word_embeddings",
)
#: Others, which are off by default.
OPTIONAL = ("attention_conv_kernel",)


@dataclass
class State:
    """What a batch of streams has become: per layer its tensors, per row its clock.

    A forward call returns a new State and leaves the one it was given as it was. `generate` takes and returns
    it as `past_key_values`; input ids that come with a State are the new tokens only.

    Attributes:
        layers: by layer index, the tensors of that layer, batch axis first (see `nestor.layers`).
        clock: `[B]` int64, tokens each row has read since its last document start.
        learned: by part, tensors of what rows have learned (see `nestor.learning`), batch axis first. A model
            reads such a State through a `Learner` alone.
    """

    layers: dict[int, LayerState]
    clock: Tensor
    learned: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    # Read by Hugging Face's generate, which marks the caches that its caller handed in.
    _is_user_defined: bool = field(default=False, init=False, repr=False, compare=False)
    is_compileable = False
    is_croppable = False

    @classmethod
    def empty(cls, batch_size: int, device: torch.device | str = "cpu") -> State:
        """The State of rows that have read nothing. Layers start from their initial state."""
        return cls({}, torch.zeros(batch_size, dtype=torch.int64, device=device))

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return len(self.clock)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.clock.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        parts = [*self.layers.values(), *self.learned.values()]
        tensors = [tensor for part in parts for tensor in part.values()]
        return sum(tensor.nbytes for tensor in [self.clock, *tensors])

    def select(self, rows: Tensor | Sequence[int]) -> State:
        """The State of the given rows, in this order; a row may occur more than once."""
        index = torch.as_tensor(rows, device=self.device)
        if index.dtype == torch.bool:
            raise ShapeError("select wants row numbers, not a mask; use mask.nonzero()[:, 0]")
        index = index.to(torch.int64).reshape(-1)
        outside = [row for row in index.tolist() if not -self.batch_size <= row < self.batch_size]
        if outside:
            raise ShapeError(f"row {outside[0]} of a State with {self.batch_size} rows")
        index = index % self.batch_size if self.batch_size else index
        return self._map(lambda tensor: tensor.index_select(0, index))

    @classmethod
    def stack(cls, states: Iterable[State]) -> State:
        """One State with the rows of all of these, which may be at different positions.

        Raises:
            StateMismatchError: the States are of different models.
        """
        states = list(states)
        if not states:
            raise ShapeError("stack wants at least one State")
        started = [state for state in states if state.layers]
        if started and len(started) < len(states):
            raise StateMismatchError(
                "a State that has read nothing cannot be stacked with one that has; "
                "start from model.initial_state"
            )
        layers = _stack_parts(
            [state.layers for state in states],
            "the States to stack have different layers; they come from different models",
        )
        learned = _stack_parts(
            [state.learned for state in states], "the States to stack have learned on different levels"
        )
        return cls(layers, torch.cat([state.clock for state in states]), learned)

    def to(self, device: torch.device | str) -> State:
        """The State on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def detach(self) -> State:
        """The State without its autograd history."""
        return self._map(Tensor.detach)

    def clone(self) -> State:
        """A copy that shares no memory."""
        return self._map(Tensor.clone)

    def save(
        self, path: str | os.PathLike[str], model: nn.Module, notes: Mapping[str, Any] | None = None
    ) -> None:
        """Write the State of `model` to one safetensors file, atomically.

        The header records the format version, the architecture, a digest of the weights, how much was read,
        and `notes`, any JSON, for `read_notes`.
        """
        header = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "nestor_version": _version(),
            "tokens_read": self.clock.tolist(),
            "fingerprint": fingerprint(model),
            "notes": dict(notes or {}),
        }
        tensors = {f"layers.{i}.{name}": t for i, layer in self.layers.items() for name, t in layer.items()}
        tensors |= {f"learned/{i}/{name}": t for i, part in self.learned.items() for name, t in part.items()}
        write_tensors(path, {"clock": self.clock, **tensors}, {FORMAT: json.dumps(header)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module) -> State:
        """Read a State for `model`, onto its device.

        Raises:
            FileFormatError: the file is truncated, or not a State.
            StateMismatchError: it is the State of another model; the message says what differs.
        """
        tensors, metadata = read_tensors(path)
        header = _header(path, metadata)
        _check_fingerprint(path, header["fingerprint"], fingerprint(model))
        clock = tensors.pop("clock", None)
        layers: dict[int, LayerState] = {}
        learned: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith("learned/") and key.count("/") >= 2:
                _, level, name = key.split("/", 2)
                learned.setdefault(level, {})[name] = tensor
                continue
            part, _, rest = key.partition(".")
            index, _, name = rest.partition(".")
            if part != "layers" or not index.isdigit() or not name:
                raise FileFormatError(f"{os.fspath(path)} has a tensor {key!r} that no State has")
            layers.setdefault(int(index), {})[name] = tensor
        if clock is None:
            raise FileFormatError(f"{os.fspath(path)} has no clock; it is not a whole State")
        device = next(model.parameters()).device
        return cls(dict(sorted(layers.items())), clock, learned).to(device)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: input ids that come with a State are new, so Hugging Face's generate must not cut any off."""
        return 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take over the rows that beam search chose, in place."""
        chosen = self.select(beam_idx)
        self.layers, self.clock, self.learned = chosen.layers, chosen.clock, chosen.learned

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row, in place."""
        self.reorder_cache(torch.arange(self.batch_size, device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows, in place."""
        self.reorder_cache(indices)

    def _map(self, function: Any) -> State:
        def mapped(parts: dict[Any, LayerState]) -> dict[Any, LayerState]:
            return {i: {name: function(t) for name, t in part.items()} for i, part in parts.items()}

        return State(mapped(self.layers), function(self.clock), mapped(self.learned))


def read_notes(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a State was saved with besides its tensors, which are not read.

    Raises:
        DataError: there is no such file. FileFormatError: it is truncated, or not a State.
    """
    notes = _header(path, read_metadata(path)).get("notes", {})
    if not isinstance(notes, dict):
        raise FileFormatError(f"{os.fspath(path)} has notes that are no object")
    return notes


def is_cache(name: str) -> bool:
    """Whether the layer tensor of this name is a right-aligned cache, which may differ in length."""
    return "cache" in name.split(".")


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What a State has to match: the architecture, and a digest of all weights, names and dtypes included.

    A model with settings outside its configuration that a State depends on has them as `state_settings`.
    """
    config = getattr(model, "config", None)
    architecture = {name: getattr(config, name, None) for name in ARCHITECTURE}
    # Not named where they are off, so that digests and files of older versions stay those of the same model.
    architecture |= {name: value for name in OPTIONAL if (value := getattr(config, name, None))}
    architecture |= getattr(model, "state_settings", {})
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)};".encode())
        flat = weight.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return {"architecture": architecture, "weights": digest.hexdigest()}


def _stack_parts(states: list[dict[Any, LayerState]], difference: str) -> dict[Any, LayerState]:
    """Each tensor of each part with the rows of all States, which must have the same."""
    names = {part: set(tensors) for part, tensors in states[0].items()}
    if any({part: set(tensors) for part, tensors in parts.items()} != names for parts in states[1:]):
        raise StateMismatchError(difference)
    return {
        part: {name: _join(name, [parts[part][name] for parts in states]) for name in tensors}
        for part, tensors in states[0].items()
    }


def _join(name: str, tensors: list[Tensor]) -> Tensor:
    if is_cache(name):
        longest = max(tensor.shape[1] for tensor in tensors)
        tensors = [F.pad(t, (0, 0) * (t.dim() - 2) + (longest - t.shape[1], 0)) for t in tensors]
    shapes = {tuple(tensor.shape[1:]) for tensor in tensors}
    if len(shapes) > 1:
        raise StateMismatchError(f"the States to stack differ in {name}: {sorted(map(list, shapes))} a row")
    return torch.cat(tensors)


def _header(path: str | os.PathLike[str], metadata: dict[str, str]) -> dict[str, Any]:
    try:
        header = json.loads(metadata[FORMAT])
        version, _ = header["format_version"], header["fingerprint"]["architecture"]
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"{os.fspath(path)} is not a State that Nestor saved") from error
    if version != FORMAT_VERSION:
        raise FileFormatError(
            f"{os.fspath(path)} has State format {version}; this version of Nestor reads {FORMAT_VERSION}. "
            f"Open it with the version that wrote it ({header.get('nestor_version')})"
        )
    return header


def _check_fingerprint(path: str | os.PathLike[str], stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    # Compared as JSON shows them, so that tuples and lists are one.
    model = json.loads(json.dumps(wanted["architecture"]))
    saved = stored["architecture"]
    differences = [
        f"{name} is {saved.get(name)!r} in the file and {model.get(name)!r} in the model"
        for name in sorted({*saved, *model})
        if saved.get(name) != model.get(name)
    ]
    if differences:
        raise StateMismatchError(f"{os.fspath(path)} is the State of another model: {'; '.join(differences)}")
    if stored.get("weights") != wanted["weights"]:
        raise StateMismatchError(
            f"{os.fspath(path)} is the State of a model of the same architecture with other weights (or "
            f"another dtype); load the checkpoint and dtype it was made with"
        )


def _version() -> str:
    from nestor import __version__

    return __version__
