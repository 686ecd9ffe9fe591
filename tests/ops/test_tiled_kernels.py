"""What the CUDA kernels are given: numbers of arguments and definitions, checked without a GPU."""

import importlib.util
import re

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

KERNELS = ("write", "read", "read_backward", "write_backward", "write_gradients")
CHOICES = (
    "ACTIVATION", "NORM", "LOSS", "MOMENTUM", "TARGET", "HAS_RESETS", "HAS_OPEN", "SAVE", "READS", "KEEP",
    "SPLIT", "WGMMA", "SLICES", "READ", "FORGET", "EXACT",
)  # fmt: skip


def parameters(name):
    """Pointers, 64-bit and 32-bit integers and floats of a kernel, and the choices that its sources read."""
    from nestor.ops.neural_memory.kernels.tiled import FOLDER, WALK_TILES

    source = (FOLDER / f"{name}.cu").read_text()
    signature = re.search(rf"{name}_kernel\((.*?)\) \{{", source, re.DOTALL).group(1)
    kinds = []
    for part in signature.split(","):
        words = part.split()
        kinds.append("pointer" if "*" in part else words[-2])
    names = ("tiles.cuh", "cluster.cuh") if name in WALK_TILES else ("tiles.cuh",)
    shared = "".join((FOLDER / n).read_text() for n in names)
    # The loss's functions are there only where there is a loss.
    shared = re.sub(r"#ifdef LOSS.*?#endif", "", shared, flags=re.DOTALL)
    code = re.sub(r"//.*", "", shared + source)
    return kinds, {choice for choice in CHOICES if re.search(rf"\b{choice}\b", code)}


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize(("momentum", "lanes"), [(False, 0), (True, 0), (True, 2)])
def test_each_kernel_gets_what_its_source_declares(monkeypatch, momentum, lanes, resets) -> None:
    from nestor.ops.neural_memory.kernels import calls, tiled, walk

    seen = {}

    def prepare(name, programs, choices, tensors, strides, sizes, numbers, device):
        kinds = ["pointer"] * len(tensors) + ["long"] * len(strides) + ["int"] * len(sizes)
        kinds += ["float"] * len(numbers)

        def queue(grid, changed=()):
            assert all(number < len(sizes) for number, _ in changed)
            seen.setdefault(name, []).append((kinds, set(choices), grid))

        return queue

    def coefficients(self, keep):
        m, n, c = self.walks, self.chunks, self.chunk
        return (
            self.zeros(m, n, 3, c),
            self.zeros(m, n, 2, c),
            self.zeros(m, n, 4),
            *[self.zeros(m, n, c, c)] * 2,
        )

    monkeypatch.setattr(tiled, "covers", lambda *about: True)
    monkeypatch.setattr(tiled, "prepare", prepare)
    monkeypatch.setattr(tiled, "lanes", lambda *about: lanes)
    monkeypatch.setattr(calls.Call, "coefficients", coefficients)
    monkeypatch.setattr(calls.Call, "gate_gradients", lambda self, *arguments: None)

    batch, tokens, heads, hidden = 2, 70, 3, 128
    q, k, v = (torch.randn(batch, tokens, heads, 64, dtype=torch.bfloat16) for _ in range(3))
    gates = [torch.rand(batch, tokens, heads) for _ in range(3)]
    parts = 4 if momentum else 2
    state = torch.randn(batch * heads, parts, 64 * hidden)
    targets, norm = torch.randn(heads, 2, 64 * hidden), torch.ones(heads, 64)
    flags = torch.zeros(batch, 2, dtype=torch.uint8) if resets else None
    start = state[:heads] if resets else None
    opened = torch.ones(batch, dtype=torch.int32)
    inputs = calls.Inputs(
        q, k, v, gates[0], gates[1] if momentum else None, gates[2], targets, start, norm, norm, None, flags,
        opened,
    )  # fmt: skip
    whole = walk._Walk(inputs, 64, hidden, 0, 2, 0, True, 1e-6, 0.03, 1.0)
    y, final, anchor, checkpoints, z, r = whole.forward(state, True)
    assert y.shape == q.shape and final.shape == state.shape
    grads = whole.backward(checkpoints, z, r, torch.randn_like(q), final, anchor)
    assert [g.shape for g in grads[:3]] == [q.shape] * 3 and grads[7].shape == targets.shape

    assert set(seen) == set(KERNELS)
    for name, launches in seen.items():
        kinds, wanted = parameters(name)
        for given, choices, _ in launches:
            assert given == kinds, name
            assert wanted <= choices | {"WGMMA", "SLICES"}, name
    programs = batch * heads * hidden // 64
    assert [grid for _, _, grid in seen["write_backward"]] == [(programs // (lanes or 1),)] * (lanes or 1)


@pytest.mark.parametrize("momentum", [False, True])
def test_decoding_gets_what_its_source_declares(monkeypatch, momentum) -> None:
    from nestor.ops.neural_memory.kernels import decode, tiled

    seen = []

    def prepare(name, programs, choices, tensors, strides, sizes, numbers, device):
        kinds = ["pointer"] * len(tensors) + ["long"] * len(strides) + ["int"] * len(sizes)
        kinds += ["float"] * len(numbers)
        return lambda grid: seen.append((name, kinds, set(choices), grid))

    monkeypatch.setattr(tiled, "covers_decode", lambda *about: True)
    monkeypatch.setattr(tiled, "prepare", prepare)
    batch, heads, hidden = 2, 3, 128
    q = torch.randn(batch, 1, heads, 64)
    gate = torch.rand(batch, 1, heads)
    w1, w2 = torch.randn(batch, heads, 64, hidden), torch.randn(batch, heads, hidden, 64)
    s1, s2 = (w1, w2) if momentum else (None, None)
    norm = torch.ones(heads, 64)
    decode.memory_decode(
        q, q, q, gate, gate if momentum else None, gate, torch.zeros(batch, dtype=torch.int64),
        w1, w2, s1, s2, w1, w2, w1[0], w2[0], norm, norm, 64, 0, 2, 0, 0, 1e-6, 0.03, 1.0,
    )  # fmt: skip
    ((name, given, choices, grid),) = seen
    kinds, wanted = parameters("decode")
    assert name == "decode" and given == kinds and wanted <= choices | {"WGMMA"}
    assert grid == (batch * heads * hidden // 64,)


def test_shared_memory_has_room_for_every_choice() -> None:
    from nestor.ops.neural_memory.kernels.tiled import SMALL, TILE, TILES, WALK_TILES

    room, tile = 227 * 1024, TILE * TILE * 2
    for name in TILES:
        assert sum(TILES[name]) * tile + SMALL <= room, name
    for name, (once, each) in WALK_TILES.items():
        slices = 2 if name == "write" else 1
        assert (sum(once) + slices * sum(each)) * tile + SMALL <= room, name
