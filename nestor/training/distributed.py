"""One process or many: devices and wrapping through accelerate, and the few collectives the loop needs.

Every process makes its own lanes of the one global batch (`nestor.data.rank_lanes`), and every loss is
divided by the number of targets in the *global* batch. Summed over processes that is the loss, and the
gradient, that one process would compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nestor.data import rank_lanes
from nestor.errors import ConfigError
from nestor.training.config import TrainConfig


class Processes:
    """The processes of a run, of which this is one.

    Attributes:
        rank, world: number of this process, and of all.
        device: where this process computes.
        lanes: lanes of the global batch that this process makes.
    """

    def __init__(self, config: TrainConfig) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        arguments: dict[str, Any] = {"cpu": True} if config.run.device == "cpu" else {}
        # Mixed precision is an autocast region of the loop, over weights that stay float32.
        tracker = tracker_of(config)
        self.accelerator = Accelerator(
            mixed_precision="no",
            log_with=tracker,
            project_dir=str(config.folder) if tracker else None,
            kwargs_handlers=[
                DistributedDataParallelKwargs(
                    # Gradients as views of the buckets save a copy of each.
                    gradient_as_bucket_view=True,
                    # Where a State is handed on it can be that no row begins with a memory's learned start.
                    find_unused_parameters=config.run.state_mode != "reset",
                )
            ],
            **arguments,
        )
        self.sharded = config.run.parallel == "fsdp2"
        self.rank = self.accelerator.process_index
        self.world = self.accelerator.num_processes
        self.device = self.accelerator.device
        self.is_main = self.accelerator.is_main_process
        parts = self.world * config.run.accumulation
        lanes = config.data.batch_size
        if lanes % parts:
            raise ConfigError(
                f"data.batch_size is {lanes}; it must be a multiple of {parts} "
                f"({self.world} processes x run.accumulation {config.run.accumulation})"
            )
        if config.run.state_mode == "pass" and lanes // parts < 2:
            raise ConfigError(
                f"run.state_mode 'pass' needs at least 2 lanes in each of {parts} parts; "
                f"data.batch_size is {lanes}"
            )
        if config.run.parallel == "fsdp2" and self.world == 1:
            raise ConfigError(
                "run.parallel is 'fsdp2' and there is one process; start several with "
                "`torchrun --nproc-per-node N -m nestor train ...`, or leave run.parallel at 'ddp'"
            )
        self.lanes = rank_lanes(lanes, self.rank, self.world)

    def __str__(self) -> str:
        if self.world == 1:
            return str(self.device)
        return f"{self.world} x {self.device.type}" + (", sharded" if self.sharded else "")

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model on the device, as a replica or sharded. Optimisers are made from it afterwards."""
        if not self.sharded:
            return self.accelerator.prepare(model)
        return shard(model.to(self.device), self.device.type, self.world)

    def plain(self, model: nn.Module) -> Any:
        """The model under its wrapping."""
        return self.accelerator.unwrap_model(model)

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """All weights, whole; tied ones are one tensor. With sharded weights this is a collective."""
        gathered: dict[int, Tensor] = {}
        weights = {}
        for name, tensor in self.plain(model).state_dict(keep_vars=True).items():
            if id(tensor) not in gathered:
                gathered[id(tensor)] = whole(tensor)
            weights[name] = gathered[id(tensor)]
        return weights

    @contextmanager
    def without_sync(self, model: Any) -> Iterator[None]:
        """Backward passes in here add to the gradient of this process only."""
        if self.sharded:
            model.set_requires_gradient_sync(False)
            yield
            model.set_requires_gradient_sync(True)
        else:
            with self.accelerator.no_sync(model):
                yield

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes."""
        return self.accelerator.reduce(tensor, "sum") if self.world > 1 else tensor

    def maximum(self, tensor: Tensor) -> Tensor:
        """The greatest over processes, in place; on a GPU the result arrives when the device gets to it."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """`value` of every process, in order of rank. Tensors in it arrive on the CPU."""
        if self.world == 1:
            return [value]
        everyone: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(everyone, value)
        return everyone

    def wait(self) -> None:
        """Until every process is here."""
        self.accelerator.wait_for_everyone()


def tracker_of(config: TrainConfig) -> str | None:
    """The configured tracker if it is installed, else None."""
    import importlib.util

    name = config.run.tracker
    return name if name != "none" and importlib.util.find_spec(name) is not None else None


def shard(model: nn.Module, device_type: str, world: int) -> nn.Module:
    """FSDP2: each layer's parameters in equal parts over the processes, gathered while the layer computes.

    Layers are the modules that the model class names in `_no_split_modules`; what is left, embeddings and the
    last norm, is one more group. This is `fully_shard` directly: accelerate applies it on GPUs only, and an
    equality that cannot be tested on a CPU would not be tested.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device_type, (world,))
    layers = set(getattr(model, "_no_split_modules", None) or ())
    for module in list(model.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def whole(tensor: Any) -> Tensor:
    """A tensor with all its parts, if it is sharded."""
    return tensor.full_tensor().detach() if hasattr(tensor, "full_tensor") else tensor.detach()


def clip_gradient(model: nn.Module, limit: float) -> Tensor:
    """Scale the gradient to a norm of at most `limit` (0: leave it); returns its norm before."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    return whole(torch.nn.utils.clip_grad_norm_(parameters, limit or float("inf")))
