"""Several projections of one input."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def project_together(x: Tensor, projections: Sequence[nn.Module]) -> list[Tensor]:
    """What each of the projections makes of x ``[B, T, d]``.

    On a GPU, for more than one token, as one product: one launch, and one product for the gradient of x. Only
    of plain `nn.Linear` without biases and hooks; what stands in their place (adapters, quantised weights) is
    called.
    """
    if x.is_cuda and x.shape[1] > 1 and all(map(_plain, projections)):
        weights = [projection.weight for projection in projections]
        return list(F.linear(x, torch.cat(weights)).split([len(w) for w in weights], -1))  # type: ignore[arg-type]
    return [projection(x) for projection in projections]


def _plain(module: nn.Module) -> bool:
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    linear = type(module) is nn.Linear and module.bias is None and not hooked
    # Quantised and distributed weights are tensors of another class.
    return linear and type(module.weight) in (nn.Parameter, Tensor)
