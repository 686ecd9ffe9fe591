"""The CUDA kernels of memories on a CPU, compiled as C++: see cuda_on_cpu.h."""

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
# Names that in_place_of_ptx.h has, and helpers of theirs.
REPLACED = (
    "shared_address", "remote", "pack", "store_tile", "tiles_ready", "load_matrices", "multiply_add",
    "begin_product", "end_products", "prepare", "prepared", "expect", "await", "fetch", "send", "sent",
    "bring", "push", "leave", "look",
)  # fmt: skip


def _ptx(start: str) -> str:
    """A statement of PTX that begins so, without operands."""
    return rf'asm volatile\(\s*"{start}[^;]*;"\s*::\s*:\s*"memory"\);'


ARRIVE, WAIT = r"barrier\.cluster\.arrive", r"barrier\.cluster\.wait"
STATEMENTS = {
    _ptx(rf"{ARRIVE}\.release\.aligned;\\n{WAIT}"): "{ cluster_arrive(); cluster_wait(); }",
    _ptx(ARRIVE): "cluster_arrive();",
    _ptx(WAIT): "cluster_wait();",
    _ptx(r"fence\.proxy"): "",
    r'asm volatile\(\s*"st\.shared::cluster\.f32[^;]*;"\s*::"r"\((.*?)\),\s*"f"\((\w+)\)\s*:\s*"memory"\);':
        r"*(float*)(arena.data() + \1) = \2;",
    r"extern __shared__ __align__\(1024\) char shared\[\];": "char* shared = block_memory();",
}  # fmt: skip
TYPES = {"long": "longs", "int": "ints", "float": "floats"}


def available() -> bool:
    """Whether there is a compiler."""
    return shutil.which("g++") is not None


def without(source: str, name: str) -> str:
    """The source without the functions of that name."""
    opening = rf"(?:template <[^\n]*>\n)?__device__ __forceinline__ [\w ]+?[ &*]{name}\([^{{;]*?\) \{{"
    while found := re.search(opening, source):
        depth, end = 1, found.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(source[end], 0)
            end += 1
        source = source[: found.start()] + source[end:]
    return source


def translate(folder: Path, name: str, definitions: dict[str, int], headers: tuple[str, ...]) -> str:
    """A kernel as C++, with a function `run` that takes its grid and arguments."""
    kernel = (folder / f"{name}.cu").read_text()
    tiles = (folder / "tiles.cuh").read_text()
    rest = "".join((folder / header).read_text() for header in headers) + kernel
    for function in REPLACED:
        tiles, rest = without(tiles, function), without(rest, function)
    # The types of arrivals come late in tiles.cuh, what stands for PTX needs them.
    arrival = re.search(r"struct Arrival \{.*?\};", tiles, re.DOTALL).group()
    place = tiles.index("__device__ __forceinline__ Packed packed(")
    byte = re.search(r"__device__ __forceinline__ u32 tile_byte\(.*?\n\}\n", tiles, re.DOTALL).group()
    tiles = tiles.replace(byte, "").replace(arrival, "")
    included = (FOLDER / "in_place_of_ptx.h").read_text()
    tiles = tiles[:place] + byte + arrival + "\n" + included + tiles[place:]
    return program(tiles + rest, name, definitions)


def program(code: str, name: str, definitions: dict[str, int]) -> str:
    """The kernel `name` of a source without PTX, with a function `run` that takes its grid and arguments."""
    for pattern, statement in STATEMENTS.items():
        code = re.sub(pattern, statement, code, flags=re.DOTALL)
    code = re.sub(r"//.*", "", code)

    signature = re.search(rf"{name}_kernel\((.*?)\) \{{", code, re.DOTALL).group(1)
    counts, arguments = dict.fromkeys(("pointers", *TYPES.values()), 0), []
    for part in signature.split(","):
        words = part.split()
        kind = "pointers" if "*" in part else TYPES[words[-2]]
        cast = f"({part[: part.rindex('*') + 1].strip()})" if "*" in part else ""
        arguments.append(f"{cast}{kind}[{counts[kind]}]")
        counts[kind] += 1
    defined = "".join(f"#define {key} {value}\n" for key, value in definitions.items())
    return f"""{defined}
#include "{FOLDER / "cuda_on_cpu.h"}"
{code}
static void** pointers; static const long* longs; static const int* ints; static const float* floats;
extern "C" bool run(int x, int y, int group, void** p, const long* l, const int* i, const float* f) {{
    pointers = p, longs = l, ints = i, floats = f;
    return run_grid(x, y, group, [] {{ {name}_kernel({", ".join(arguments)}); }});
}}
"""


@functools.cache
def build(folder: Path, name: str, definitions: tuple[tuple[str, int], ...], headers: tuple[str, ...]):
    """The compiled kernel's `run`."""
    return compiled(name, translate(folder, name, dict(definitions), headers))


def compiled(name: str, source: str):
    """Its `run`."""
    made = Path(tempfile.mkdtemp(prefix="nestor-emulation-"))
    try:
        (made / f"{name}.cpp").write_text(source)
        command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-o", str(made / "kernel.so")]
        subprocess.run([*command, str(made / f"{name}.cpp")], check=True, capture_output=True, text=True)
        run = ctypes.CDLL(str(made / "kernel.so")).run
    except subprocess.CalledProcessError as error:
        raise AssertionError(f"g++ fails on {name}:\n{error.stderr[:3000]}") from None
    finally:
        shutil.rmtree(made)
    run.restype = ctypes.c_bool
    return run


def _coefficients(call):
    """Leaves theta, eta, alpha (None: off) ``[M, N, C]``, and rows, ends, last and G from them, as
    kernels/coefficients.py has them; without the rows of m, which only its own backward reads."""
    from nestor.ops.neural_memory.coefficients import chunk_coefficients

    room = call.chunks * call.chunk

    def cells(gate):
        gate = torch.nn.functional.pad(gate.detach().float(), (0, 0, 0, room - call.tokens))
        return gate.transpose(1, 2).reshape(call.walks, call.chunks, call.chunk)

    there = torch.ones(call.batch, call.tokens, call.heads)
    if call.valid is not None:
        there = there * call.valid[..., None]
    gates = (call.theta, call.eta, call.alpha)
    leaves = [None if gate is None else cells(gate).requires_grad_() for gate in gates]
    found = chunk_coefficients(*leaves, cells(there).bool())
    A, G, none = found.A, found.G, torch.zeros_like(found.A)
    F, E_end = (none, none) if found.F is None else (found.F, found.E_end)
    F_end, m_end = (none[..., :1],) * 2 if found.F is None else (found.F_end, found.m_end)
    rows, ends = torch.stack((A, F, none), 2), torch.stack((found.G_end, E_end), 2)
    return leaves, rows, ends, torch.cat((found.A_end, F_end, m_end, none[..., :1]), -1), G


def coefficients(call, keep):
    """In the place of `Call.coefficients`."""
    _, *found = _coefficients(call)
    rows, ends, last, G = (x.detach().contiguous() for x in found)
    G = G.to(call.q.dtype)
    return rows, ends, last, G, G


def gate_gradients(call, out, rows, G, E, g_rows, g_G, g_ends, g_last, read):
    """In the place of `Call.gate_gradients`."""
    with torch.enable_grad():
        leaves, rows, ends, last, G = _coefficients(call)

        def along(x, grad):
            return (x * grad).sum()

        parts, count = (slice(0, 2), 3) if call.momentum else (slice(0, 1), 1)
        total = along(ends[:, :, parts], g_ends[..., parts, :])
        total = total + along(last[..., :count], g_last[..., :count])
        if read:
            total = total + along(rows[:, :, parts], g_rows[..., parts, :]) + along(G, g_G)
        present = [leaf for leaf in leaves if leaf is not None]
        found = iter(torch.autograd.grad(total, present))
    for leaf, into in zip(leaves, out, strict=True):
        if leaf is not None:
            grad = next(found).reshape(call.batch, call.heads, -1).transpose(1, 2)
            into.copy_(grad[:, : call.tokens])


def install(monkeypatch, slices: int = 1, lanes: int = 0) -> list[str]:
    """Let the operation take these kernels on the CPU; it returns a list to which names of those that run are
    appended. Gates become coefficients in PyTorch there, and not in Triton.

    slices (of the forward's walks): see `tiled._slices`; lanes: see `tiled.lanes`.
    """
    from nestor.ops.neural_memory.kernels import calls, tiled

    ran = []

    def prepare(name, programs, choices, tensors, strides, sizes, numbers, device):
        definitions = {key: int(value) for key, value in choices.items()} | {"WGMMA": 0}
        taken, group, headers = 1, 1, ()
        if name in tiled.WALK_TILES:
            taken = min(slices, choices["SPLIT"]) if name == "write" else 1
            definitions |= {"SLICES": taken}
            group, headers = choices["SPLIT"] // taken, ("cluster.cuh",)
        elif name == "decode":
            group = choices["SPLIT"]
        run = build(tiled.FOLDER, name, tuple(sorted(definitions.items())), headers)
        pointers = (ctypes.c_void_p * len(tensors))(*[0 if t is None else t.data_ptr() for t in tensors])
        longs, ints = (ctypes.c_long * len(strides))(*strides), (ctypes.c_int * len(sizes))(*sizes)
        floats = (ctypes.c_float * len(numbers))(*numbers)

        def queue(grid, changed=(), kept=tensors):
            for number, value in changed:
                ints[number] = value
            x, y = (*grid, 1)[:2]
            ran.append(name)
            assert run(x // taken, y, group, pointers, longs, ints, floats), f"{name} hangs"

        return queue

    monkeypatch.setattr(calls.Call, "coefficients", coefficients)
    monkeypatch.setattr(calls.Call, "gate_gradients", gate_gradients)
    monkeypatch.setattr(tiled, "prepare", prepare)
    monkeypatch.setattr(tiled, "lanes", lambda walks, split, device: lanes)
    monkeypatch.setattr(tiled, "covers", lambda device, dtype, chunk, width, hidden: chunk == width == 64)
    monkeypatch.setattr(tiled, "covers_decode", lambda device, width, hidden: width == 64)
    return ran


@functools.cache
def build_walk(definitions: tuple[tuple[str, int], ...], late: bool, tf32: bool):
    """`run` of the walk backward of self-modifying memories."""
    from nestor.ops.self_modifying.kernels import tiled

    code = (FOLDER / "instructions.h").read_text()
    code += "".join((tiled.FOLDER / source).read_text() for source in tiled.SOURCES[1:])
    threads = 32 * (tiled.slices(dict(definitions)) + 1)
    own = {"THREADS_OF_BLOCK": threads, "LATE": int(late), "TF32": int(tf32), "SHUFFLED": 1}
    return compiled("walk_backward", program(code, "walk_backward", {**dict(definitions), **own}))


def install_walk(monkeypatch, late: bool = False, tf32: bool = False) -> list[dict[str, int]]:
    """Let self-modifying memories take their kernel in CUDA on the CPU; it returns a list to which the
    definitions of each that runs are appended. late, tf32: see instructions.h; without tf32 Triton's walk
    forward rounds nothing either."""
    from nestor.ops.self_modifying.kernels import primitives, tiled

    ran = []
    if not tf32:
        monkeypatch.setattr(primitives, "rounded", lambda x: x)

    def prepare(chosen, tensors, integers, numbers, device):
        run = build_walk(tuple(sorted(chosen.items())), late, tf32)
        pointers = (ctypes.c_void_p * len(tensors))(*[0 if t is None else t.data_ptr() for t in tensors])
        ints, floats = (ctypes.c_int * len(integers))(*integers), (ctypes.c_float * len(numbers))(*numbers)

        def queue(grid):
            ran.append(chosen)
            assert run(grid[0], 1, 1, pointers, (ctypes.c_long * 0)(), ints, floats), "the walk hangs"

        return queue

    monkeypatch.setattr(tiled, "prepare", prepare)
    monkeypatch.setattr(tiled, "runs_on", lambda device: True)
    return ran
