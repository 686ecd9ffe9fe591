"""Memories that share a period, and with it keys and gates, as one stack of matrices.

Linear memories ``[p, o]`` stand beside each other in one matrix ``[m, p, sum of o]``. Networks of two
matrices have the first ones beside each other, ``[m, p, r h]``, and the second ones along an axis, ``[m, r,
h, p]``. Sequences and heads are the one axis m.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nestor.ops.heads import to_unit
from nestor.ops.neural_memory.networks import Mlp
from nestor.ops.self_modifying.gates import bounded, gradient_size
from nestor.ops.self_modifying.spec import SelfModifyingSpec

Stack = list[Tensor]  # one or two tensors, as above


class Inner(NamedTuple):
    """The inner gradients of a chunk. Per matrix of the stack: inputs of unit length ``[..., C, i]``, and
    errors ``[..., C, o]`` of which the gradient of a token is ``input^T error``. size: the norm of a token's
    gradient over all memories, ``[m, C]``; None unless something looks at it."""

    inputs: list[Tensor]
    errors: list[Tensor]
    size: Tensor | None


@dataclass(frozen=True)
class Group:
    """names: of the memories. widths: of their outputs. depth: 1 or 2 matrices each."""

    spec: SelfModifyingSpec
    names: tuple[str, ...]
    widths: tuple[int, ...]
    depth: int

    @classmethod
    def of(cls, spec: SelfModifyingSpec, memories: Mapping[str, tuple[Tensor, ...]], mem: bool) -> "Group":
        """The group of "mem", or of all other memories (which may be none)."""
        names = tuple(name for name in memories if (name == "mem") == mem)
        depth = len(memories["mem"])
        return cls(spec, names, tuple(memories[name][0].shape[-1] for name in names), depth)

    def join(self, memories: Mapping[str, tuple[Tensor, ...]]) -> Stack:
        """From matrices ``[m, in, out]`` by name."""
        if not self.names or not memories:
            return []
        stack = [torch.cat([memories[name][0] for name in self.names], -1)]
        if self.depth == 2:
            stack.append(torch.stack([memories[name][1] for name in self.names], 1))
        return stack

    def split(self, stack: Stack) -> dict[str, tuple[Tensor, ...]]:
        """Reverse of `join`."""
        if not stack:
            return {}
        parts = [stack[0].split(self.widths, -1)]
        if self.depth == 2:
            parts.append(stack[1].unbind(1))
        return dict(zip(self.names, zip(*parts, strict=True), strict=True))

    def value(self, stack: Stack, name: str, x: Tensor) -> Tensor:
        """M(x) of one memory for rows x ``[m, C, p]``."""
        own = self.split(stack)[name]
        z = Mlp(self.spec.activation, self.depth).value(x, lambda layer, z: torch.matmul(z, own[layer]))
        return z if self.depth == 1 else x + z

    @property
    def sized(self) -> bool:
        """Whether something looks at the size of gradients: reports of writes, or a cap."""
        return self.names == ("mem",) or self.spec.step_cap == "soft"

    def inner(self, stack: Stack, k: Tensor, v: Tensor) -> Inner:
        """The gradients of all memories at the stack, for keys and values ``[m, C, p]``."""
        if self.depth == 1:
            if self.spec.targets == "bounded":
                errors = -self._bounded(torch.matmul(v, stack[0]))
                if self.spec.inner_loss == "l2":
                    errors = errors + torch.matmul(k, stack[0])
            else:
                errors = torch.matmul(self.difference(k, v), stack[0])
            if self.spec.targets == "value":
                errors = errors - torch.cat([v] * len(self.names), -1)
            if not self.sized:
                return Inner([k], [errors], None)
            return Inner([k], [errors], gradient_size(k.square().sum(-1) * errors.square().sum(-1)))
        return self._of_networks(stack, k, v)

    def _bounded(self, targets: Tensor) -> Tensor:
        """Targets of linear memories ``[m, C, sum of o]``, each memory's bounded."""
        return torch.cat([bounded(x) for x in targets.split(self.widths, -1)], -1)

    def difference(self, k: Tensor, v: Tensor) -> Tensor:
        """The row whose product with a linear memory is its error, but for targets that are v itself."""
        if self.spec.targets == "value":
            return k if self.spec.inner_loss == "l2" else torch.zeros_like(k)
        return k - v if self.spec.inner_loss == "l2" else -v

    def _of_networks(self, stack: Stack, k: Tensor, v: Tensor) -> Inner:
        network = Mlp(self.spec.activation, 2)

        def product(layer: int, x: Tensor) -> Tensor:
            if layer == 1:
                return torch.matmul(x, stack[1])
            return torch.matmul(x, stack[0]).unflatten(-1, (len(self.names), -1)).transpose(1, 2)

        k_rows, target = k.unsqueeze(1), v.unsqueeze(1)
        if self.spec.targets != "value":
            target = target + network.value(v, product)
        if self.spec.targets == "bounded":
            target = bounded(target)

        def of_output(z: Tensor) -> Tensor:
            return k_rows + z - target if self.spec.inner_loss == "l2" else (-target).expand_as(z)

        found = network.gradient(k, product, lambda layer, x: torch.matmul(x, stack[1].mT), of_output)
        hidden = found.inputs[1]  # [m, r, C, h]
        length = hidden.square().sum(-1)
        squares = [
            k.square().sum(-1).unsqueeze(1) * found.deltas[0].square().sum(-1),
            length * found.deltas[1].square().sum(-1),
        ]
        # An input is its unit vector times this length; the gradient keeps the length, the decay does not.
        scale = torch.sqrt(length + self.spec.norm_eps).unsqueeze(-1)
        errors = [found.deltas[0].transpose(1, 2).flatten(-2), found.deltas[1] * scale]
        inputs = [k, to_unit(hidden, self.spec.norm_eps)]
        return Inner(inputs, errors, gradient_size(torch.stack(squares).sum((0, 2))))
