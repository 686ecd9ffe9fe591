"""One process or many: devices and wrapping through accelerate, and the few collectives the loop needs.

Every process makes its own lanes of the one global batch (`nestor.data.rank_lanes`), and every loss is
divided by the number of targets in the *global* batch. Summed over processes that is the loss, and the
gradient, that one process would compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
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
        from accelerate import Accelerator

        arguments: dict[str, Any] = {"cpu": True} if config.run.device == "cpu" else {}
        # Mixed precision is an autocast region of the loop, over weights that stay float32. The trackers are
        # accelerate's; wrapping is: DDP, or FSDP2 with one shard group per layer of the model.
        tracker = tracker_of(config)
        self.accelerator = Accelerator(
            mixed_precision="no",
            log_with=tracker,
            project_dir=str(config.folder) if tracker else None,
            kwargs_handlers=[_ddp_settings()],
            fsdp_plugin=_fsdp_plugin() if config.run.parallel == "fsdp2" else None,
            **arguments,
        )
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
        return str(self.device) if self.world == 1 else f"{self.world} x {self.device.type}"

    def prepare(
        self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
    ) -> tuple[nn.Module, list[Any]]:
        """Model and optimisers on the device, wrapped for several processes."""
        if self.accelerator.is_fsdp2:
            model, *prepared = self.accelerator.prepare(model, *optimizers)
            return model, [getattr(optimizer, "optimizer", optimizer) for optimizer in prepared]
        return self.accelerator.prepare(model), list(optimizers)

    def plain(self, model: nn.Module) -> nn.Module:
        """The model under its wrapping."""
        return self.accelerator.unwrap_model(model)

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """All weights, whole. With sharded parameters this is a collective."""
        if self.accelerator.is_fsdp2:
            return self.accelerator.get_state_dict(model)
        return self.plain(model).state_dict()

    def without_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Backward passes in here add to the local gradient only."""
        return self.accelerator.no_sync(model) if self.world > 1 else nullcontext()

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


def clip_gradient(model: nn.Module, limit: float) -> Tensor:
    """Scale the gradient to a norm of at most `limit` (0: leave it); returns its norm before."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit or float("inf"))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def _ddp_settings() -> Any:
    from accelerate import DistributedDataParallelKwargs

    # There are no buffers to keep equal, and gradients as views of the buckets save a copy of each.
    return DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)


def _fsdp_plugin() -> Any:
    from accelerate import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="FULL_STATE_DICT"
    )
