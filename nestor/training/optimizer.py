"""Which parameters go to which optimiser, and optimiser state by parameter name.

PyTorch's own AdamW and Muon are used as they are, AdaMuon and M3 are those of `orthogonal.py`. Two of them
may run side by side (all but AdamW update matrices only), so everything here speaks of a list of optimisers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nestor.errors import ConfigError, FileFormatError
from nestor.training.config import OptimizerConfig
from nestor.training.distributed import whole
from nestor.training.orthogonal import M3, AdaMuon

# A matrix narrower than this maps to a few numbers per head (gates); orthogonalising its update would give
# each of them the same weight, whatever its gradient says.
NARROWEST_FOR_MUON = 32

# Scales and shifts that have a row per head, so that their shape does not tell them from weights.
_SCALE = re.compile(r"(^|[._])(norm|gamma|beta|bias)([._]|$)")


def build_optimizers(model: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """The optimisers of a model, every trainable parameter in exactly one of them.

    AdamW (Loshchilov & Hutter 2019) decays weights of two and more dimensions and no others. With `muon`
    (Jordan et al. 2024), `adamuon` (Si et al. 2025) or `m3` (Behrouz et al. 2025), the weights of hidden
    linear layers go to that; embeddings, the output projection, gates, vectors and the initial weights of
    memories (three dimensions) stay with AdamW. Updates of hidden matrices are scaled to AdamW's root mean
    square, 0.2, so that one learning rate serves both (Liu et al. 2025): Muon's by what it is if all singular
    values are 1, those of AdaMuon and M3, which are divided element by element, by what it is.

    Raises:
        ConfigError: nothing can be trained.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not named:
        raise ConfigError("the model has no trainable parameter; every one has requires_grad off")
    hidden = hidden_matrices(model) if config.name != "adamw" else set()
    rest = [(name, parameter) for name, parameter in named if name not in hidden]
    groups = [
        {"params": [p for name, p in rest if decays(name, p)], "weight_decay": config.weight_decay},
        {"params": [p for name, p in rest if not decays(name, p)], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if groups := [group for group in groups if group["params"]]:
        fused = named[0][1].is_cuda
        optimizers.append(
            torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
        )
    if hidden:
        optimizers.append(_of_matrices([p for name, p in named if name in hidden], config))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def _of_matrices(matrices: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser of the hidden matrices."""
    lr, momentum, second = config.muon_lr or config.lr, config.muon_momentum, config.betas[1]
    if config.name == "muon":
        return torch.optim.Muon(
            matrices,
            lr=lr,
            weight_decay=config.weight_decay,
            momentum=momentum,
            adjust_lr_fn="match_rms_adamw",
        )
    shared: dict[str, Any] = {"lr": lr, "weight_decay": config.weight_decay, "eps": config.eps}
    if config.name == "adamuon":
        return AdaMuon(matrices, betas=(momentum, second), **shared)
    return M3(
        matrices,
        betas=(momentum, second, config.m3_slow_momentum),
        slow_period=config.m3_slow_period,
        slow_weight=config.m3_slow_weight,
        v_source=config.m3_v_source,
        **shared,
    )


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay acts on a parameter: on weights, not on norms, scales, biases and vectors."""
    return parameter.dim() >= 2 and not _SCALE.search(name)


def hidden_matrices(model: Any) -> set[str]:
    """Names of the parameters for Muon and its kin: weights of linear layers from hidden to hidden."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    outer = set() if output is None else set(map(id, output.parameters()))
    outer |= {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    linear = {
        id(module.weight)
        for name, module in model.named_modules()
        # A gate's projection has a row and a bias per head; that of a gated feed-forward is hidden to hidden.
        if isinstance(module, nn.Linear)
        and not ("gate" in name.rpartition(".")[2] and module.bias is not None)
    }
    return {
        name
        for name, parameter in model.named_parameters()
        if id(parameter) in linear - outer
        and parameter.requires_grad
        and min(parameter.shape) >= NARROWEST_FOR_MUON
    }


def set_lr(optimizers: Sequence[torch.optim.Optimizer], factor: float) -> None:
    """Every learning rate to `factor` of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


def optimizer_state(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """State of all optimisers as tensors named `parameter/key`, whole and on the CPU.

    With sharded parameters this is a collective: every process calls it and gets the same.
    """
    return {
        f"{name}/{key}": whole(value if isinstance(value, Tensor) else torch.tensor(value)).cpu()
        for optimizer, name, parameter in _parameters(model, optimizers)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_state(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    state: dict[str, Tensor],
    waiting: Collection[str] = (),
) -> None:
    """Put back what `optimizer_state` gave.

    waiting: parameters that may not have been updated yet (`nestor.training.pace`).

    Raises:
        FileFormatError: another parameter has no state, or a state no parameter.
    """
    by_name: dict[str, dict[str, Tensor]] = {}
    for entry, tensor in state.items():
        name, _, key = entry.rpartition("/")
        by_name.setdefault(name, {})[key] = tensor
    known = [name for _, name, _ in _parameters(model, optimizers)]
    stray = sorted((set(by_name) ^ set(known)) - (set(waiting) & set(known))) if by_name else []
    if stray:
        raise FileFormatError(
            f"the saved optimiser state and the model differ in {len(stray)} parameters, first {stray[0]!r}; "
            "the checkpoint is of another model or optimiser"
        )
    for optimizer in optimizers:
        whole = optimizer.state_dict()
        mine = [
            (name, parameter)
            for owner, name, parameter in _parameters(model, [optimizer])
            if owner is optimizer
        ]
        whole["state"] = {
            index: {key: _like(value, parameter) for key, value in by_name[name].items()}
            for index, (name, parameter) in enumerate(mine)
            if name in by_name
        }
        optimizer.load_state_dict(whole)


def _parameters(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> Iterator[tuple[torch.optim.Optimizer, str, nn.Parameter]]:
    """Every parameter of every optimiser in its order, with its name in the model."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield optimizer, names[id(parameter)], parameter


def _like(value: Tensor, parameter: Any) -> Tensor:
    """A copy of a whole tensor, sharded as its parameter is (scalars such as the step count never are)."""
    if not hasattr(parameter, "device_mesh") or value.dim() == 0:
        return value.clone()
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
