"""The bare memory: pairs of vectors are written, in one pass or several, and asked for; no model is trained.

Two questions are put to memories of the same number of bytes (`arms.py`). Capacity: of N random pairs, how
many are read back, from well below to well above the rank of the linear memory; a read counts if the value
nearest to it, of the N, is its own. Relation: values are a fresh random function of keys of 8 numbers, which
is linear, a network of two layers, or a product of two linear functions less its mean; which share of the
values' variance is read, for keys that were written and for keys that were not.

Memories have the width that heads share, `WIDTH`; a head of p numbers of a key reads its own share of them.
Chunks are of one token, so every step is taken at the newest weights. Step size, momentum and forgetting are
constants, drawn at random within wide ranges, as often for every memory; those that do best on sequences of
their own are measured on others. Of two layers the width of heads (which costs no bytes) and the size of the
first layer's weights are drawn as well; the second layer begins at 0.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from arms import ARMS, Arm
from study import place
from sweep import Row
from torch import Tensor
from torch.nn import functional as F

from nestor.ops.neural_memory import MemorySpec, MemoryState, apply_network, neural_memory

#: Numbers of a key and of a value, and the head of the plain linear memory: its rank.
WIDTH = 64
#: Numbers of a key that values are a function of.
FEATURES = 8
#: Hidden units of the functions that are networks, and the standard deviation of what goes into them.
HIDDEN, GAIN = 16, 3.0
RELATIONS = ("linear", "network", "product")
#: Those that can be had without outer training, which is what the norm's parameters would need.
OPERATION_ARMS = ("linear-attention", "linear", "linear-momentum", "deep", "deep-momentum")
#: Widths of heads that memories of two layers may take, and sizes of their first layer's weights.
DEEP_WIDTHS, DEEP_SCALES = (16, 32, 64), (1.0, 3.0)
#: Seeds of what is drawn beside the pairs begin here: with one seed the same numbers would come again.
INITIALS, ORDERS = 100_000, 200_000
#: Tokens of all sequences that are written in one call, about.
AT_ONCE = 1 << 17


@dataclass(frozen=True)
class Choice:
    """What is tuned. `strength` is the share of a token's error that its step takes away at first; steps are
    multiplied by 1 - `keep`, for momentum repeats them."""

    width: int
    scale: float
    strength: float
    keep: float
    forget: float


@dataclass(frozen=True)
class Cell:
    """A question: `relation` "random" is that of capacity, and asks for no other keys."""

    relation: str
    pairs: int
    passes: int


@dataclass(frozen=True)
class Budget:
    """trials: choices that are tried; tuning, tested: sequences on which, and on which the best is measured;
    initials: draws of initial weights that both are dealt out to."""

    trials: int = 72
    tuning: int = 8
    tested: int = 32
    initials: int = 4


@dataclass(frozen=True)
class Pairs:
    """`keys` [B, N, features], `values` [B, N, WIDTH] of length 1 on average; `other_*` were not written."""

    keys: Tensor
    values: Tensor
    other_keys: Tensor
    other_values: Tensor


def draw_pairs(cell: Cell, count: int, seed: int, dtype: torch.dtype = torch.float32) -> Pairs:
    """`count` sequences; for each of them a relation of its own."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if cell.relation == "random":
        keys, values = normal(count, cell.pairs, WIDTH), F.normalize(normal(count, cell.pairs, WIDTH), dim=-1)
        none = keys.new_zeros(count, 0, WIDTH).to(dtype)
        return Pairs(keys.to(dtype), values.to(dtype), none, none)
    keys = F.normalize(normal(count, 2 * cell.pairs, FEATURES), dim=-1)
    one, two = normal(count, FEATURES, WIDTH), normal(count, FEATURES, WIDTH)
    if cell.relation == "linear":
        values = keys @ one
    elif cell.relation == "product":
        # Less its mean over keys of length 1, which no memory here has a bias for.
        values = (keys @ one) * (keys @ two) - (one * two).sum(1, keepdim=True) / FEATURES
    else:
        hidden = torch.tanh(GAIN * keys @ normal(count, FEATURES, HIDDEN))
        values = hidden @ normal(count, HIDDEN, WIDTH)
    values = values / values.square().sum(-1).mean(-1).sqrt()[:, None, None]
    parts = (part.to(dtype).split(cell.pairs, 1) for part in (keys, values))
    (keys, other_keys), (values, other_values) = parts
    return Pairs(keys, values, other_keys, other_values)


def shape(arm: Arm, width: int) -> tuple[int, list[tuple[int, int]]]:
    """Heads of that width, and `(in, out)` of their matrices."""
    hidden = arm.width(WIDTH)
    return WIDTH // width, [(width, hidden), (hidden, width)] if arm.deep else [(width, width)]


def state_bytes(arm: Arm, width: int) -> int:
    """Bytes in float32 of weights and momentum."""
    heads, matrices = shape(arm, width)
    return 4 * heads * sum(a * b for a, b in matrices) * (2 if arm.momentum else 1)


class Memory:
    """An arm with heads of some width and initial weights that the seed draws."""

    def __init__(self, arm: Arm, width: int, scale: float, seed: int, dtype: torch.dtype) -> None:
        self.arm, self.width = arm, width
        self.heads, matrices = shape(arm, width)
        generator = torch.Generator().manual_seed(INITIALS + seed)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator, dtype=torch.float64)

        # A function of 8 numbers is one of heads' keys only if no head loses any of them.
        self.spread = torch.linalg.qr(normal(self.heads, width, FEATURES))[0].to(dtype)
        self.initial = [torch.zeros(self.heads, a, b, dtype=dtype) for a, b in matrices]
        if arm.deep:
            self.initial[0] = (scale * normal(*self.initial[0].shape)).to(dtype)
        loss = arm.settings.get("inner_loss", "l2")
        self.spec = MemorySpec(chunk_size=1, activation="silu", norm="none", inner_loss=loss)

    def heads_of(self, keys: Tensor) -> Tensor:
        """`[B, N, H, p]`, each of length 1."""
        if keys.shape[-1] == WIDTH:
            return F.normalize(keys.unflatten(-1, (self.heads, self.width)), dim=-1)
        return torch.einsum("hpf,bnf->bnhp", self.spread, keys)

    def curvature(self, keys: Tensor) -> Tensor:
        """Of a token's loss in the initial weights of the last matrix: the mean square of what goes in."""
        rows = keys.flatten(0, 1).transpose(0, 1)
        if self.arm.deep:
            rows = F.silu(rows @ self.initial[0])
        return rows.square().sum(-1).mean()

    def write(
        self, keys: Tensor, values: Tensor, choices: Sequence[Choice], orders: Sequence[Tensor]
    ) -> MemoryState:
        """The state after all pairs in each of the orders; row b is written with `choices[b]`."""
        read = self.heads_of(keys)
        read, wanted = (
            torch.cat([whole[:, order] for order in orders], 1)
            for whole in (read, values.unflatten(-1, (self.heads, self.width)))
        )

        def gate(numbers: Sequence[float]) -> Tensor:
            return torch.tensor(numbers, dtype=keys.dtype)[:, None, None].expand(read.shape[:3])

        curvature = float(self.curvature(self.heads_of(keys)))
        theta = gate([one.strength * (1 - one.keep) / curvature for one in choices])
        eta = gate([one.keep for one in choices]) if self.arm.momentum else None
        alpha = gate([one.forget for one in choices]) if self.arm.momentum else None
        # Nothing is read on the way.
        return neural_memory(read, read, wanted, theta, eta, alpha, self.initial, spec=self.spec)[1]

    def read(self, keys: Tensor, state: MemoryState) -> Tensor:
        """`[B, N, WIDTH]`"""
        return apply_network(self.spec, self.heads_of(keys), state.weights).flatten(-2)


def recalled(read: Tensor, values: Tensor) -> Tensor:
    """`[B]`: the share of reads `[B, N, p]` to which their own value is the nearest in direction."""
    likeness = read @ F.normalize(values, dim=-1).transpose(1, 2)
    # A read of zeros, or of no numbers, is as near to all values and counts as none.
    others = likeness.masked_fill(torch.eye(read.shape[1], dtype=torch.bool), -torch.inf).amax(-1)
    return (likeness.diagonal(dim1=1, dim2=2) > others).double().mean(-1)


def explained(read: Tensor, values: Tensor) -> Tensor:
    """`[B]`: the share of the variance of values `[B, N, p]` that reads have; below 0 if they are worse than
    the mean, and no less than -1."""
    spread = (values - values.mean(1, keepdim=True)).square().sum((1, 2))
    missed = (read - values).square().sum((1, 2))
    return (1 - missed / spread).double().nan_to_num(-1.0).clamp(min=-1.0)


def draw_choices(arm: Arm, count: int, seed: int) -> list[Choice]:
    """`count` settings of an arm; those that it does not have are fixed. Strengths are between 0.001 and 2,
    one in each of as many equal parts of their logarithm as there are draws for a shape."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(arm.width(WIDTH), 1.0)]
    if arm.deep:
        shapes = [(width, scale) for width in DEEP_WIDTHS for scale in DEEP_SCALES]
    parts = -(-count // len(shapes))
    drawn = []
    for number in range(count):
        strength, keep, forget = torch.rand(3, generator=generator).tolist()
        strength = 1e-3 * 2000 ** ((number // len(shapes) + strength) / parts)
        if not arm.momentum:
            keep, forget = 0.0, 0.0
        else:
            keep, forget = 0.95 * keep, 1e-6 * 1e5**forget
        drawn.append(Choice(*shapes[number % len(shapes)], strength, keep, forget))
    return drawn


@torch.inference_mode()
def scores(arm: Arm, cell: Cell, pairs: Pairs, choices: Sequence[Choice], seed: int) -> tuple[Tensor, Tensor]:
    """`[choices, B]` of keys that were written and of others; of these "random" has none, so no numbers."""
    count, order = len(pairs.keys), torch.Generator().manual_seed(ORDERS + seed)
    orders = [torch.randperm(cell.pairs, generator=order) for _ in range(cell.passes)]
    rate = recalled if cell.relation == "random" else explained
    shown, others = torch.full((2, len(choices), count), float("nan"), dtype=torch.float64)
    for width, scale in sorted({(one.width, one.scale) for one in choices}):
        memory = Memory(arm, width, scale, seed, pairs.keys.dtype)
        alike = [i for i, one in enumerate(choices) if (one.width, one.scale) == (width, scale)]
        together = max(1, AT_ONCE // (count * cell.pairs * cell.passes))
        for start in range(0, len(alike), together):
            mine = alike[start : start + together]
            each = [choices[i] for i in mine for _ in range(count)]
            keys, values, other_keys, other_values = (
                part.repeat(len(mine), 1, 1)
                for part in (pairs.keys, pairs.values, pairs.other_keys, pairs.other_values)
            )
            state = memory.write(keys, values, each, orders)
            shown[mine] = rate(memory.read(keys, state), values).view(len(mine), count)
            if other_keys.shape[1]:
                read = memory.read(other_keys, state)
                others[mine] = rate(read, other_values).view(len(mine), count)
    return shown, others


def measure(name: str, cell: Cell, budget: Budget, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What an arm comes to; JSON. Choices are compared by other keys where there are some."""
    arm = ARMS[name]

    def result(tried: Sequence[Choice], count: int, seed: int) -> dict[str, Tensor]:
        parts = [
            scores(
                arm, cell, draw_pairs(cell, count // budget.initials, seed + part, dtype), tried, seed + part
            )
            for part in range(budget.initials)
        ]
        shown, others = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        return {"shown": shown} if cell.relation == "random" else {"shown": shown, "others": others}

    choices = draw_choices(arm, budget.trials, seed=1)
    by = list(result(choices, budget.tuning, 1000).values())[-1].mean(1)
    best = choices[int(by.argmax())]
    found = {key: value[0].tolist() for key, value in result([best], budget.tested, 2000).items()}
    return {
        "arm": name, "family": arm.family, "cell": asdict(cell), "choice": asdict(best),
        "tuning": float(by.max()), "bytes": state_bytes(arm, best.width), **found,
    }  # fmt: skip


def cells(pairs: Sequence[int], function_pairs: Sequence[int], passes: Sequence[int]) -> list[Cell]:
    """All questions."""
    random = [Cell("random", count, times) for times in passes for count in pairs]
    return random + [
        Cell(relation, count, times) for relation in RELATIONS for times in passes for count in function_pairs
    ]


@dataclass(frozen=True)
class Trial:
    """A question to an arm, as `sweep.Sweep` keeps it. It tunes itself, and has no learning rate."""

    arm: str
    cell: Cell
    budget: Budget
    learning_rate: float = 0.0

    def settings(self) -> dict[str, Any]:
        """The same as JSON."""
        return {"arm": self.arm, "cell": asdict(self.cell), "budget": asdict(self.budget)}


def make(trial: Trial, name: str, device: str) -> dict[str, Any]:
    """For a Sweep. It is computed on the CPU, whatever the device: chunks of one token have no kernels."""
    begin = time.perf_counter()
    found = measure(trial.arm, trial.cell, trial.budget)
    return {**found, "place": place("cpu"), "seconds": round(time.perf_counter() - begin, 1)}


def line(result: dict[str, Any]) -> str:
    """For a Sweep: a result in a few words."""
    means = [f"{key} {np.mean(result[key]):.3f}" for key in ("shown", "others") if key in result]
    return f"{', '.join(means)}, {result['seconds']} s"


def rows(asked: Sequence[Cell], budget: Budget) -> list[Row]:
    """All arms for all questions."""
    found = []
    for cell in asked:
        for name in OPERATION_ARMS:
            trial = Trial(name, cell, budget)
            found.append(Row(f"{cell.relation}-{cell.pairs}-{cell.passes}-{name}", trial, {0: trial}))
    return found
