"""PyTorch operators of functions, so that torch.compile and CUDA graphs take them whole."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def _on_the_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, run with the device of its first argument as the current one: kernels go there."""

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        with torch.cuda.device_of(arguments[0]):
            return function(*arguments)

    return run


class Operator:
    """An operator of the namespace ``nestor``, called like the function that it is made of."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = f"nestor::{name}"
        schema = torch.library.infer_schema(function, mutates_args=())
        tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
        torch.library.define(self.name, schema, tags=tags)
        torch.library.impl(self.name, "default", _on_the_device(function))
        self.overload = getattr(torch.ops.nestor, name).default

    def __call__(self, *arguments: Any) -> Any:
        return self.overload(*arguments)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The shapes of what it returns."""
        return torch.library.register_fake(self.name, function)

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """As `torch.library.register_autograd`, of a backward that is not differentiable itself."""

        @functools.wraps(backward)
        def once(ctx: Any, *gradients: Any) -> Any:
            if torch.is_grad_enabled():
                raise RuntimeError(
                    f"{self.name} has no second derivative, which create_graph=True asks for; "
                    f"leave it out, or compute on a CPU or in float64, where kernels are not used"
                )
            return backward(ctx, *gradients)

        torch.library.register_autograd(self.name, once, setup_context=setup_context)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Make a function of tensors, which changes none of them, the operator ``nestor::name``.

    `torch.library.custom_op` does the same, and imports torch._dynamo, seconds of work, at the first call.
    """
    return lambda function: Operator(name, function)
