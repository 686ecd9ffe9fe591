"""Regressions with gradients in orthogonal subspaces, learned one after another (arXiv 2512.24695, eq. 45).

Task i is L_i(W) = E |W x - A x|^2 with x in a subspace of its own, so that its gradient is zero on all
others. Plain gradient descent therefore never forgets. Whatever else an optimiser makes of present and past
gradients may move W in the subspaces of tasks that are over. The rate falls to zero within each task, so that
steps of a size that does not depend on the gradient's come to rest. Losses are shares of that of W = 0.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from nestor.ops.delta_gradient import delta_momentum_step
from nestor.training import M3, AdaMuon

WIDTH, TASKS, STEPS, BATCH = 32, 4, 100, 16
SEEDS, TUNING_SEED = (1, 2, 3), 0
RATES = tuple(2.0**-k for k in range(9))

# Of a gradient and a rate.
Step = Callable[[Tensor, float], None]


def _of(make: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[Tensor], Step]:
    def begin(w: Tensor) -> Step:
        optimizer = make([w], lr=1.0, **options)

        def step(g: Tensor, rate: float) -> None:
            w.grad = g
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()

        return step

    return begin


def _delta_momentum(w: Tensor) -> Step:
    m = torch.zeros_like(w)

    def step(g: Tensor, rate: float) -> None:
        # The rate outside, as in the others: a rate that falls does not scale what is remembered.
        m.copy_(delta_momentum_step(m, g, 1.0))
        w.data.add_(m, alpha=rate)

    return step


#: Each with the largest rate of its grid.
SUBJECTS: dict[str, tuple[Callable[[Tensor], Step], float]] = {
    "sgd": (_of(torch.optim.SGD), 32.0),
    "momentum": (_of(torch.optim.SGD, momentum=0.9), 4.0),
    "delta momentum": (_delta_momentum, 4.0),
    "adamw": (_of(torch.optim.AdamW, weight_decay=0.0), 0.5),
    "muon": (_of(torch.optim.Muon, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"), 0.5),
    "adamuon": (_of(AdaMuon, weight_decay=0.0), 0.5),
    "m3": (_of(M3, weight_decay=0.0), 0.5),
    "m3-fast": (_of(M3, weight_decay=0.0, slow_weight=0.0), 0.5),
}


def learn(begin: Callable[[Tensor], Step], rate: float, seed: int) -> list[list[float]]:
    """Loss of every task ``[TASKS][TASKS]`` after each has been learned, over that of W = 0."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    bases = torch.linalg.qr(draw(WIDTH, WIDTH)).Q.view(WIDTH, TASKS, -1).unbind(1)
    wanted = draw(WIDTH, WIDTH)
    w = torch.nn.Parameter(torch.zeros(WIDTH, WIDTH))
    step = begin(w)
    losses = []
    for basis in bases:
        for number in range(STEPS):
            x = draw(BATCH, basis.shape[1]) @ basis.T
            g = 2 * (x @ (w.detach() - wanted).T).T @ x / (BATCH * WIDTH)
            step(g, rate * (1 - number / STEPS))
        losses.append(
            [float(((w.detach() - wanted) @ b).square().sum() / (wanted @ b).square().sum()) for b in bases]
        )
    return losses


def measures(losses: list[list[float]]) -> dict[str, float]:
    """learned: mean loss of the tasks when just learned; final: at the end; forgotten: by how much it rose
    since, of all but the last."""
    last = losses[-1]
    return {
        "learned": statistics.mean(losses[i][i] for i in range(TASKS)),
        "final": statistics.mean(last),
        "forgotten": statistics.mean(last[i] - losses[i][i] for i in range(TASKS - 1)),
    }


def run() -> dict[str, Any]:
    """By optimiser: the rate of the least final loss on the tuning seed, and means over other seeds."""
    result: dict[str, Any] = {}
    for name, (begin, largest) in SUBJECTS.items():
        rates = [largest * rate for rate in RATES]
        tuned = {rate: measures(learn(begin, rate, TUNING_SEED))["final"] for rate in rates}
        # A loss that is no number is above every other.
        rate = min(rates, key=lambda r, tuned=tuned: tuned[r] if tuned[r] == tuned[r] else float("inf"))
        found = [measures(learn(begin, rate, seed)) for seed in SEEDS]
        result[name] = {
            "rate": rate,
            "at_edge": rate in (rates[0], rates[-1]),
            **{key: statistics.mean(one[key] for one in found) for key in found[0]},
            "finals": [one["final"] for one in found],
        }
    return result


def table(result: dict[str, Any]) -> Table:
    """Shares of the loss of W = 0."""
    made = Table("optimiser", "rate", "just learned", "all, at the end", "forgotten")
    for name, row in result.items():
        edge = " (edge of the grid)" if row["at_edge"] else ""
        made.add_row(
            name, f"{row['rate']:g}{edge}", *(f"{row[key]:.2g}" for key in ("learned", "final", "forgotten"))
        )
    return made
