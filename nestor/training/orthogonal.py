"""Optimisers of matrices that orthogonalise: M3 and AdaMuon, as `torch.optim.Optimizer`.

PyTorch has Muon itself. What these keep is float32 (float64 for such parameters), whatever the parameters
are. Sharded parameters (FSDP2) have sharded slots; only what is orthogonalised is gathered, one matrix at a
time, and every process orthogonalises it for itself and takes its part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from nestor.errors import ConfigError, ShapeError, suggest
from nestor.ops.multi_scale_muon import ACCUMULATE, M3_SLOTS, V_SOURCES, m3_step, match_rms
from nestor.ops.neural_memory.muon import QUINTIC, newton_schulz

Slots = dict[str, Tensor]
# From a gradient, slots and the number of the step, counted from 1, to an update and the slots after.
Rule = Callable[[Tensor, Slots, int], tuple[Tensor, Slots]]


class MatrixOptimizer(torch.optim.Optimizer):
    """What M3 and AdaMuon share: steps with decoupled weight decay, and slots that stay wide.

    Raises:
        ShapeError: a parameter that is no matrix.
    """

    #: What is kept of each parameter, beside the number of its steps.
    slots: tuple[str, ...] = ()

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        for name, value in defaults.items():
            if name in ("lr", "eps", "weight_decay") and not value >= 0:
                raise ConfigError(f"{name} is {value}; it must be at least 0")
        if defaults["newton_schulz_steps"] < 1:
            raise ConfigError(f"newton_schulz_steps is {defaults['newton_schulz_steps']}; give at least 1")
        for i, beta in enumerate(defaults["betas"]):
            if not 0 <= beta < 1:
                raise ConfigError(f"betas[{i}] is {beta}; it must be at least 0 and below 1")
        super().__init__(params, defaults)
        for parameter in _parameters(self):
            if parameter.dim() != 2:
                raise ShapeError(
                    f"{type(self).__name__} got a parameter of shape {list(parameter.shape)}; it takes "
                    f"matrices, give vectors and what has more dimensions to AdamW"
                )

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """As of PyTorch, but slots stay wide where parameters are narrow."""
        super().load_state_dict(dict(state_dict))
        for index, parameter in enumerate(_parameters(self)):
            for name in self.slots:
                if name in state_dict["state"].get(index, {}):
                    saved = state_dict["state"][index][name]
                    self.state[parameter][name] = saved.to(parameter.device, _wide(parameter)).clone()

    def _advance(self, rule_of: Callable[[dict[str, Any]], Rule]) -> None:
        for group in self.param_groups:
            rule = rule_of(group)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                kept = self.state[parameter]
                if not kept:
                    # On the CPU, where reading it does not wait for a device.
                    kept["step"] = torch.zeros(())
                    kept.update(
                        {name: torch.zeros_like(parameter, dtype=_wide(parameter)) for name in self.slots}
                    )
                kept["step"] += 1
                update, after = rule(parameter.grad.to(_wide(parameter)), kept, int(kept["step"]))
                kept.update(after)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_((group["lr"] * update).to(parameter.dtype))


class M3(MatrixOptimizer):
    """Multi-scale momentum Muon (arXiv 2512.24695, algorithm 1; see `nestor.ops.multi_scale_muon`).

    Args:
        params: matrices.
        lr: with `match_rms` in AdamW's units; without, of another size than AdamW's and Muon's, as the
            division by second moments of gradients makes steps large where gradients are small.
        betas: what stays from step to step of the fast momentum and of the second moments, and from block
            to block of the slow momentum.
        slow_period: f, steps of a block; the slow momentum is that much late. math.inf: never.
        slow_weight: alpha, how much the slow direction counts beside the fast one.
        accumulate: "decay", or "paper": sums that never decay, as printed.
        v_source: second moments are of the "gradient", as printed, or of the "orthogonal" fast momentum; or
            "none". With "none" and slow_weight 0 this is Muon without Nesterov's momentum.
        newton_schulz_steps: of Muon's quintic polynomial; the paper names neither.
        match_rms: scale each update to AdamW's root mean square. The paper does not; its own steps depend on
            the size of gradients (ten times the loss, a tenth of the step) and are huge at first.
        weight_decay: decoupled, times lr.

    Raises:
        ConfigError: an impossible setting. ShapeError: a parameter that is no matrix.
    """

    slots = M3_SLOTS

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.95, 0.95, 0.9),
        *,
        slow_period: float = 10,
        slow_weight: float = 0.3,
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        accumulate: str = "decay",
        v_source: str = "gradient",
        newton_schulz_steps: int = 5,
        match_rms: bool = True,
    ) -> None:
        for name, value, known in (("accumulate", accumulate, ACCUMULATE), ("v_source", v_source, V_SOURCES)):
            if value not in known:
                raise ConfigError(
                    f"{name} is {value!r}; known are {', '.join(known)}. {suggest(value, known)}".rstrip()
                )
        if not (slow_period >= 1 and (math.isinf(slow_period) or float(slow_period).is_integer())):
            raise ConfigError(f"slow_period is {slow_period}; give a whole number of steps, at least 1")
        if not slow_weight >= 0:
            raise ConfigError(f"slow_weight is {slow_weight}; it must be at least 0")
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "slow_period": slow_period,
            "slow_weight": slow_weight,
            "eps": eps,
            "weight_decay": weight_decay,
            "accumulate": accumulate,
            "v_source": v_source,
            "newton_schulz_steps": newton_schulz_steps,
            "match_rms": match_rms,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every matrix that has a gradient."""
        loss = _evaluate(closure)
        self._advance(_m3_rule)
        return loss


class AdaMuon(MatrixOptimizer):
    """Muon with element-wise second moments of the orthogonalised momentum (Si et al., arXiv 2507.11005).

    ``M = b1 M + g``, ``O = NS(sign(M))``, ``V = b2 V + (1 - b2) O^2``, and the step is
    ``O / (sqrt(V) + eps)`` scaled to a root mean square of 0.2, that of AdamW. V needs no correction, for the
    scaling undoes it.

    Args:
        params: matrices. lr: in AdamW's units. betas: b1 and b2, one number in the paper.
        sign: orthogonalise the signs of the momentum, as from the paper's second version on; False: the
            momentum itself, its first.
        newton_schulz_steps: of Muon's quintic polynomial. weight_decay: decoupled, times lr.

    Raises:
        ConfigError: an impossible setting. ShapeError: a parameter that is no matrix.
    """

    slots = ("momentum", "second_momentum")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        *,
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        sign: bool = True,
        newton_schulz_steps: int = 5,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "sign": sign,
            "newton_schulz_steps": newton_schulz_steps,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every matrix that has a gradient."""
        loss = _evaluate(closure)
        self._advance(_adamuon_rule)
        return loss


def _m3_rule(group: dict[str, Any]) -> Rule:
    def rule(g: Tensor, slots: Slots, step: int) -> tuple[Tensor, Slots]:
        update, after = m3_step(
            g,
            slots,
            step,
            betas=group["betas"],
            slow_period=group["slow_period"],
            slow_weight=group["slow_weight"],
            eps=group["eps"],
            accumulate=group["accumulate"],
            v_source=group["v_source"],
            orthogonalize=lambda x: orthogonal(x, group["newton_schulz_steps"]),
        )
        return match_rms(update) if group["match_rms"] else update, after

    return rule


def _adamuon_rule(group: dict[str, Any]) -> Rule:
    beta1, beta2 = group["betas"]

    def rule(g: Tensor, slots: Slots, step: int) -> tuple[Tensor, Slots]:
        momentum = beta1 * slots["momentum"] + g
        direction = orthogonal(momentum.sign() if group["sign"] else momentum, group["newton_schulz_steps"])
        second = beta2 * slots["second_momentum"] + (1 - beta2) * direction * direction
        update = direction / (second.sqrt() + group["eps"])
        return match_rms(update), {"momentum": momentum, "second_momentum": second}

    return rule


def orthogonal(x: Any, steps: int) -> Any:
    """Newton-Schulz of a matrix, which may be sharded: then of the whole one, and sharded alike."""
    if not hasattr(x, "full_tensor"):
        return newton_schulz(x, (QUINTIC,) * steps)
    from torch.distributed.tensor import DTensor, Replicate

    whole = newton_schulz(x.full_tensor(), (QUINTIC,) * steps)
    mesh = x.device_mesh
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, x.placements)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """In the order in which a state dict numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _wide(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _evaluate(closure: Callable[[], Any] | None) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
