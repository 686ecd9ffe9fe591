"""The layers with a memory, tiny and in float64, and readers that cut, pad and pack what they read."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nestor.layers.attention import Attention
from nestor.layers.lact import LaCT
from nestor.layers.memory_as_context import MemoryAsContext
from nestor.layers.memory_as_gate import MemoryAsGate
from nestor.layers.memory_as_layer import MemoryAsLayer
from nestor.layers.neural_memory import memory_from_config
from nestor.layers.self_modifying import SelfModifyingMemory
from nestor.layers.span import Span
from nestor.layers.tnt import FIXED, TNT
from nestor.layers.ttt import TTT

DIM, HEADS, WINDOW, SEGMENT, CHUNK = 8, 2, 5, 8, 4
KINDS = (
    "neural_memory",
    "memory_as_context",
    "memory_as_gate",
    "memory_as_gate_product",
    "memory_as_layer",
    "tnt",
    "ttt",
    "moneta",
    "yaad",
    "memora",
    "omega",
    "atlas",
    "atlas++",
    "memory_as_gate_atlas",
    "memory_as_layer_yaad",
    "memory_as_context_memora",
    "lact",
    "self_modifying",
)


# Settings of the other members of the family, and how much larger their largest step is.
FAMILY = {
    "titans": ({}, 1),
    "moneta": ({"rank": 3}, 10),
    "yaad": ({"rank": 3}, 1),
    "memora": ({"rank": 3}, 1),
    "omega": ({"key_width": 3, "window": 3}, 10),
    "atlas": ({"key_width": 3, "window": 3}, 10),
    "atlas++": ({"key_width": 3, "window": 3}, 10),
}


def member_of_family(member, arguments):
    """The memory of this kind, with those of the arguments that it takes."""
    own, factor = FAMILY[member]
    arguments = {**arguments, **own, "max_step": factor * arguments["max_step"]}
    if member != "titans":
        arguments.pop("momentum", None)
    if member == "memora":
        arguments.pop("read_mode", None)
    if member == "atlas++":
        arguments.pop("depth", None)
    config = SimpleNamespace(hidden_size=DIM, num_attention_heads=HEADS, rms_norm_eps=1e-6)
    return memory_from_config(config, {"kind": member, **arguments})


def self_modifying(arguments):
    """With those of the arguments that it takes; of three layers it has two."""
    chunk, read = arguments["chunk_size"], arguments.get("read_mode")
    return SelfModifyingMemory(
        DIM,
        HEADS,
        depth=min(arguments.get("depth", 1), 2),
        expansion=1.5,
        chunk_size=chunk,
        projection_chunk_size=2 if chunk % 2 == 0 else chunk,
        momentum="gated" if arguments.get("momentum") else "none",
        conv_kernel=arguments.get("conv_kernel", 4),
        read_mode="anchor" if read == "chunk_start" else "running",
        max_step=arguments["max_step"],
        step_bias=arguments["step_bias"],
        horizon=10.0,
    )


def build(kind, *, persistent=3, segment=SEGMENT, window=WINDOW, **memory):
    """A layer with weights so large, and gates so open, that a wrong token or a lost write shows."""
    torch.manual_seed(2)
    # A query sees three tokens by itself; Memora reads nothing else of its own chunk.
    chunk = 3 if kind == "memora" else CHUNK
    arguments = {"chunk_size": chunk, "expansion": 1.5, "max_step": 0.6, "step_bias": 1.0, **memory}
    kind, _, member = kind.rpartition("_") if kind.rpartition("_")[2] in FAMILY else (kind, "", "titans")
    alone = kind in ("", "neural_memory", "memory_as_layer", "tnt")
    arguments["output_gate"] = arguments.get("output_gate", alone)
    if kind == "tnt":
        arguments |= FIXED
    inner = member_of_family(member, arguments)
    if kind in ("", "neural_memory"):
        layer = inner
    elif kind == "memory_as_context":
        layer = MemoryAsContext(inner, segment, HEADS, 1, persistent)
    elif kind == "ttt":
        layer = TTT(DIM, HEADS, depth=2, expansion=1.5, chunk_size=arguments["chunk_size"], base_step=8.0)
    elif kind == "lact":
        attention = Attention(DIM, HEADS, window=max(window, arguments["chunk_size"]))
        layer = LaCT(attention, HEADS, chunk_size=arguments["chunk_size"], expansion=1.5, base_step=0.5)
    elif kind == "self_modifying":
        layer = self_modifying(arguments)
    elif kind == "tnt":
        layer = TNT(inner, (1, 3), shard_size=segment)
    elif kind == "memory_as_layer":
        layer = MemoryAsLayer(Attention(DIM, HEADS, 1, window=window), inner, persistent)
    else:
        combine = "product" if kind.endswith("product") else "mix"
        layer = MemoryAsGate(Attention(DIM, HEADS, 1, window=window), inner, persistent, combine)
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.5)
    return layer.double()


def read(layer, x, *, cuts=(), lengths=None, resets=None, state=None, clock=None):
    """Read `[B, T, d]` in the pieces that `cuts` make: outputs, state and clock after the last.

    lengths `[B]` and resets `[B, T]` are of the whole; padding comes last in every piece.
    """
    batch, length = x.shape[:2]
    edges = [0, *sorted(cuts), length]
    outputs = []
    for start, stop in pairwise(edges):
        valid = None if lengths is None else (lengths - start).clamp(0, stop - start)
        marks = None if resets is None else resets[:, start:stop]
        span = Span.build(clock, batch, stop - start, "cpu", valid, marks)
        y, state = layer(x[:, start:stop], state, span)
        clock = span.clock_after()
        outputs.append(y)
    return torch.cat(outputs, 1), state, clock


def is_cache(name):
    return "cache" in name.split(".")


def rows_of(state, rows):
    """The state of some rows of a batch."""
    return {name: tensor[rows] for name, tensor in state.items()}


def assert_same_state(state, expected, clock, tolerance=1e-9):
    """Equal in all that later tokens can see: of a cache, the last `clock` entries of each row."""
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        other = state[name]
        if is_cache(name):
            kept = min(tensor.shape[1], other.shape[1])
            older = torch.arange(kept - 1, -1, -1) >= clock[:, None]
            tensor, other = (
                c[:, c.shape[1] - kept :].masked_fill(older[..., None, None], 0) for c in (tensor, other)
            )
        torch.testing.assert_close(
            other, tensor, rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}"
        )


@pytest.fixture(params=KINDS)
def kind(request):
    """The name of each layer in turn."""
    return request.param


@pytest.fixture
def layer(kind):
    """Each layer in turn."""
    return build(kind)


# Helpers come as fixtures, since test modules do not import each other; hypothesis needs session scope.


@pytest.fixture(scope="session")
def build_layer():
    """`build_layer(kind, persistent=..., segment=..., window=..., **memory)`."""
    return build


@pytest.fixture(scope="session")
def read_pieces():
    """`read_pieces(layer, x, cuts=..., lengths=..., resets=..., state=..., clock=...)`."""
    return read


@pytest.fixture(scope="session")
def same_state():
    """`same_state(state, expected, clock)` asserts equality of all that can be seen."""
    return assert_same_state


@pytest.fixture(scope="session")
def select_rows():
    """`select_rows(state, rows)`."""
    return rows_of
