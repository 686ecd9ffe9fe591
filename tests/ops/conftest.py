"""Random problems for the neural memory, and an oracle that computes them token by token.

The oracle shares nothing with the package: it writes the memory network and the inner loss out, takes the
inner gradient from autograd, and handles masks, resets and anchors with plain branches, a sequence at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import module_from_spec, spec_from_file_location
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nestor.ops.neural_memory import MemorySpec, MemoryState, neural_memory

PER_TOKEN = ("q", "k", "v", "theta", "eta", "alpha", "mask", "resets", "omega", "delta", "step")


def map_state_(state: MemoryState, change: Callable[[Tensor], Tensor]) -> MemoryState:
    """The state with every tensor changed."""
    parts = [x if x is None else change(x) if isinstance(x, Tensor) else tuple(map(change, x)) for x in state]
    return MemoryState(*parts)


@dataclass(frozen=True)
class Problem:
    """Every argument of `neural_memory`. Its tensors are leaves, so that each can have a gradient."""

    spec: MemorySpec
    q: Tensor
    k: Tensor
    v: Tensor
    theta: Tensor
    eta: Tensor | None
    alpha: Tensor | None
    initial: tuple[Tensor, ...]
    gamma: Tensor | None = None
    beta: Tensor | None = None
    state: MemoryState | None = None
    start: MemoryState | None = None
    mask: Tensor | None = None
    resets: Tensor | None = None
    omega: Tensor | None = None
    delta: Tensor | None = None
    step: Tensor | None = None

    def replace(self, **changes: Any) -> "Problem":
        """The problem with other fields, or with other choices of its spec."""
        own = {name: value for name, value in changes.items() if name in self.__dataclass_fields__}
        choices = {name: value for name, value in changes.items() if name not in own}
        return replace(self, spec=replace(own.pop("spec", self.spec), **choices), **own)

    def tokens(self, at: Any) -> "Problem":
        """The problem on the tokens `at` (a slice or an index) of every sequence."""
        present = [n for n in PER_TOKEN if getattr(self, n) is not None]
        return replace(self, **{n: getattr(self, n)[:, at] for n in present})

    def row(self, b: int) -> "Problem":
        """Sequence b alone, as a batch of one."""
        own = {n: getattr(self, n)[b : b + 1] for n in PER_TOKEN if getattr(self, n) is not None}
        state = self.state
        if state is not None:
            state = map_state_(state, lambda x: x[b : b + 1])
        return replace(self, state=state, **own)

    def run(self, backend: str = "chunked", **changes: Any) -> Any:
        p = self.replace(**changes) if changes else self
        return neural_memory(
            p.q, p.k, p.v, p.theta, p.eta, p.alpha, p.initial, spec=p.spec, gamma=p.gamma, beta=p.beta,
            omega=p.omega, delta=p.delta, step=p.step, state=p.state, start=p.start, mask=p.mask,
            resets=p.resets, backend=backend,
        )  # fmt: skip

    def leaves(self) -> dict[str, Tensor]:
        names = (*PER_TOKEN[:6], "gamma", "beta", "omega", "delta", "step")
        found = {n: getattr(self, n) for n in names}
        found |= {f"initial {i}": w for i, w in enumerate(self.initial)}
        for name in ("state", "start"):
            state = getattr(self, name)
            if state is not None:
                for part in ("weights", "momentum", "anchor", "pending", "halo"):
                    found |= {f"{name} {part} {i}": w for i, w in enumerate(getattr(state, part))}
                found[f"{name} pooled"] = state.pooled
        return {name: tensor for name, tensor in found.items() if tensor is not None}


def draw_problem_(
    seed: int = 0,
    *,
    batch: int = 2,
    length: int = 9,
    heads: int = 2,
    width: int = 3,
    hidden: int = 5,
    depth: int = 2,
    momentum: bool = True,
    forget: bool = True,
    with_state: bool = False,
    with_start: bool = False,
    masked: float = 0.0,
    reset: float = 0.0,
    step: float = 0.3,
    omega: str = "none",
    delta: str = "none",
    with_step: bool = False,
    dtype: torch.dtype = torch.float64,
    **choices: Any,
) -> Problem:
    """A random problem: gates uniform in (0, 1), the write step in (0, step), hidden width unlike p.

    omega: gates of the window by "token" or "offset". delta: loss thresholds by "token" or "channel".
    """
    spec = MemorySpec(**{"chunk_size": 4, **choices})
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        return x.to(dtype).requires_grad_()

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        x = torch.rand(*shape, generator=generator, dtype=torch.float64) * (high - low) + low
        return x.to(dtype).requires_grad_()

    place = (batch, length, heads)
    widths = [width] + [hidden] * (depth - 1) + [width]
    shapes = list(pairwise(widths))
    if spec.network == "gated":
        shapes = [(width, hidden), (hidden, width), (width, hidden)]
    extra = {"head": (), "matrix": (len(shapes),), "channel": (width,)}

    def fast(rows: int) -> tuple[Tensor, ...]:
        return tuple(normal(rows, heads, a, b, scale=0.5) for a, b in shapes)

    q, k, v = (normal(batch, length, heads, width) for _ in range(3))
    theta, eta = uniform(*place, *extra[spec.step_sizes], high=step), uniform(*place)
    alpha = uniform(*place, *extra[spec.forget_gates])
    positive = spec.retention in ("softmax", "bregman_logit")
    initial = tuple(
        uniform(heads, a, b, low=0.1, high=0.9) if positive else normal(heads, a, b, scale=0.5)
        for a, b in shapes
    )
    norm = (normal(heads, width), normal(heads, width)) if spec.norm == "residual_layernorm" else (None, None)
    state = start = None
    if with_state:
        phase = torch.randint(0, spec.chunk_size, (batch,), generator=generator)
        state = MemoryState(fast(batch), fast(batch) if momentum else (), fast(batch), phase)
        before = (batch, heads, spec.window - 1)
        if spec.granularity == "chunk":
            state = state._replace(pending=fast(batch))
        if spec.pools:
            state = state._replace(pooled=uniform(batch, heads, 4))
        if spec.window > 1:
            entries = {"none": 0, "token": 1, "channel": width}[delta]
            limits = (uniform(*before, entries, low=0.3, high=2.0),) if entries else ()
            halo = (normal(*before, width), normal(*before, width), uniform(*before), *limits)
            state = state._replace(halo=halo)
    if with_start:
        weights = fast(1)
        start = MemoryState(weights, fast(1) if momentum else (), weights, torch.zeros(1, dtype=torch.int64))
    mask = torch.rand(batch, length, generator=generator) >= masked if masked else None
    resets = torch.rand(batch, length, generator=generator) < reset if reset else None
    return Problem(
        spec, q, k, v, theta, eta if momentum else None, alpha if forget else None, initial, *norm,
        state=state, start=start, mask=mask, resets=resets,
        omega={"none": None, "token": uniform(*place), "offset": uniform(*place, spec.window)}[omega],
        delta=None if delta == "none" else uniform(
            *place, *((width,) if delta == "channel" else ()), low=0.3, high=2.0
        ),
        step=uniform(*place) if with_step else None,
    )  # fmt: skip


def memory_function_(
    spec: MemorySpec, x: Tensor, weights: Any, gamma: Tensor | None, beta: Tensor | None
) -> Tensor:
    """f(x; W) for x ``[..., p]`` and weights ``[..., in, out]``, written out (spec sections 2.1 and 2.3)."""
    z = x
    for layer, w in enumerate(weights):
        z = (z.unsqueeze(-2) @ w).squeeze(-2)
        if layer + 1 < len(weights):
            z = z * (torch.special.ndtr(z) if spec.activation == "gelu" else torch.sigmoid(z))
    if spec.norm == "none":
        return z
    if spec.norm == "residual":
        return x + z
    mean = z.mean(-1, keepdim=True)
    variance = ((z - mean) ** 2).mean(-1, keepdim=True)
    return x + gamma * (z - mean) / torch.sqrt(variance + spec.norm_eps) + beta


def loss_value_(spec: MemorySpec, f: Tensor, v: Tensor) -> Tensor:
    if spec.inner_loss == "l2":
        return spec.loss_scale / 2 * ((f - v) ** 2).sum()
    return -spec.loss_scale * (f * v).sum()


def oracle_(p: Problem) -> tuple[Tensor, MemoryState]:
    """What `neural_memory` must return, by the definition of spec section 1.1."""
    spec = p.spec
    batch, length = p.q.shape[:2]
    begin = p.start or MemoryState.fresh(p.initial, 1, p.eta is not None)
    rows, outputs = [], []
    for b in range(batch):
        at, row = (0, begin) if p.state is None else (b, p.state)
        W, S, anchor = ([w[at] for w in part] for part in row[:3])
        phase, y = int(row.phase[at]), []
        for t in range(length):
            if p.mask is not None and not p.mask[b, t]:
                y.append(torch.zeros_like(p.q[b, t]))
                continue
            if p.resets is not None and p.resets[b, t]:
                W, S, anchor = [w[0] for w in begin[0]], [s[0] for s in begin[1]], [w[0] for w in begin[0]]
                phase = 0
            kept = 1 if p.alpha is None else 1 - p.alpha[b, t][:, None, None]
            if spec.decay == "initial":
                target = p.initial
            else:
                target = [torch.zeros_like(w) for w in p.initial]
            decayed = [[m + kept * (w - m) for w, m in zip(x, target, strict=True)] for x in (W, anchor)]
            outer = torch.is_grad_enabled()
            with torch.enable_grad():
                point = anchor if spec.grad_at == "pre_decay" else decayed[1]
                point = [w if outer and w.requires_grad else w.detach().requires_grad_() for w in point]
                loss = loss_value_(spec, memory_function_(spec, p.k[b, t], point, p.gamma, p.beta), p.v[b, t])
                g = torch.autograd.grad(loss, point, create_graph=outer)
            move = [-p.theta[b, t][:, None, None] * x for x in g]
            if p.eta is not None:
                S = [p.eta[b, t][:, None, None] * s + x for s, x in zip(S, move, strict=True)]
                move = S
            before, W = W, [w + x for w, x in zip(decayed[0], move, strict=True)]
            read = {"inclusive": W, "exclusive": before, "chunk_start": anchor}[spec.read_mode]
            y.append(memory_function_(spec, p.q[b, t], read, p.gamma, p.beta))
            phase += 1
            if phase == spec.chunk_size:
                anchor, phase = W, 0
        outputs.append(torch.stack(y))
        rows.append((W, S, anchor, phase))

    def stacked(part: int) -> tuple[Tensor, ...]:
        return tuple(torch.stack(layer) for layer in zip(*(row[part] for row in rows), strict=True))

    after = MemoryState(stacked(0), stacked(1), stacked(2), torch.tensor([row[3] for row in rows]))
    return torch.stack(outputs), after


def assert_close_(actual: Any, expected: Any, tolerance: float = 1e-10, what: str = "") -> None:
    """Maximal difference relative to the largest expected value; works on tensors and on nested tuples."""
    if isinstance(expected, Tensor):
        assert actual.shape == expected.shape, what
        if expected.numel() == 0:
            return
        error = float((actual.detach().double() - expected.detach().double()).abs().max())
        scale = float(expected.detach().double().abs().max()) + 1e-3
        assert error <= tolerance * scale, f"{what}: error {error:.3g} at scale {scale:.3g}"
        return
    assert len(actual) == len(expected), what
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_close_(a, e, tolerance, f"{what}[{i}]")


def flat_(result: tuple[Tensor, MemoryState]) -> list[Tensor]:
    y, after = result
    pooled = () if after.pooled is None else (after.pooled,)
    return [y, *after.weights, *after.momentum, *after.anchor, *after.pending, *pooled, *after.halo]


def gradients_(p: Problem, run: Callable[[Problem], tuple[Tensor, MemoryState]]) -> dict[str, Tensor]:
    """Gradients of a fixed random functional of output and final state, with respect to every leaf."""
    leaves = p.leaves()
    generator = torch.Generator().manual_seed(1)
    total = 0.0
    for x in flat_(run(p)):
        total = total + (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    zipped = zip(leaves.items(), found, strict=True)
    return {name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in zipped}


# Helpers come as fixtures, since test modules do not import each other; hypothesis needs session scope.


@pytest.fixture(scope="session")
def draw_problem():
    return draw_problem_


@pytest.fixture(scope="session")
def memory_function():
    return memory_function_


@pytest.fixture(scope="session")
def loss_value():
    return loss_value_


@pytest.fixture(scope="session")
def oracle():
    return oracle_


@pytest.fixture(scope="session")
def assert_close():
    return assert_close_


@pytest.fixture(scope="session")
def gradients():
    return gradients_


@pytest.fixture(scope="session")
def map_state():
    return map_state_


@pytest.fixture(scope="session")
def flat():
    return flat_


@pytest.fixture(scope="session")
def emulation():
    """The module that compiles CUDA kernels for the CPU."""
    place = Path(__file__).parent / "emulation" / "__init__.py"
    spec = spec_from_file_location("emulation", place)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    if not module.available():
        pytest.skip("needs g++")
    return module
