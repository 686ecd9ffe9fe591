"""The walk over the chunks of a call as one C++ function for CPUs; `native.cpp` holds it.

It takes and gives what `scan.walk` does, in the same equations. One thread walks one sequence and head with
its weights in the core's cache, where the PyTorch form reads and writes them from memory at every product.
"""

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestor.errors import ConfigError
from nestor.ops.compilation import CompilationError, load_library
from nestor.ops.neural_memory.chunked import ChunkState, Layers, Norm, Tokens
from nestor.ops.neural_memory.functions import NORMS
from nestor.ops.neural_memory.scan import Plan, apply_walk, unpack
from nestor.ops.neural_memory.spec import MemorySpec

SOURCE = Path(__file__).with_name("native.cpp")
REALS = {torch.float32: "float", torch.float64: "double"}
ACTIVATIONS = ("gelu", "silu")
LOSSES = ("l2", "dot_product")
MAX_DEPTH = 4
PROCESS = os.getpid()


def unsupported(spec: MemorySpec, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why the C++ form cannot compute these choices on this device in this dtype; None: it can."""
    if device.type != "cpu":
        return f"the C++ form runs on a cpu, not on {device.type}"
    for name, value, known in (
        ("activation", spec.activation, ACTIVATIONS),
        ("norm", spec.norm, NORMS),
        ("inner_loss", spec.inner_loss, LOSSES),
        ("read_mode", spec.read_mode, ("inclusive", "exclusive")),
        ("grad_at", spec.grad_at, ("pre_decay",)),
    ):
        if value not in known:
            return f"the C++ form does not cover {name}={value!r}"
    try:
        _library(dtype)
    except CompilationError as error:
        return f"the C++ form cannot be compiled: {error}"
    return None


def native_walk(
    plan: Plan, tokens: Tokens, norm: Norm, start: Layers, state: ChunkState
) -> tuple[Tensor, Tensor, Layers, Layers]:
    """`scan.walk` for CPU tensors and choices that are not `unsupported`."""
    return apply_walk(_NativeWalk, plan, tokens, norm, start, state)


@functools.cache
def _library(dtype: torch.dtype) -> ctypes.CDLL:
    library = load_library(SOURCE, f"REAL={REALS[dtype]}")
    for name in ("nestor_problem_size", "nestor_states_size", "nestor_tape_size"):
        getattr(library, name).restype = ctypes.c_int64
    if library.nestor_problem_size() != ctypes.sizeof(_Problem):
        raise CompilationError("native.cpp and native.py disagree about a structure; reinstall nestor")
    return library


_TOKENS = (*"qkv", "theta", "eta", "alpha")
_Layered = ctypes.c_void_p * MAX_DEPTH


class _Problem(ctypes.Structure):
    """`Problem` of native.cpp."""

    _fields_ = (
        [
            (name, ctypes.c_int64)
            for name in (
                "sequences",
                "chunks",
                "tokens",
                "depth",
                "threads",
                "activation",
                "norm",
                "loss",
                "exclusive",
            )
        ]
        + [("widths", ctypes.c_int64 * (MAX_DEPTH + 1))]
        + [(name, ctypes.c_double) for name in ("norm_eps", "loss_scale")]
        + [(name, ctypes.c_void_p) for name in ("resets", "closes", "valid", *_TOKENS)]
        + [(name, ctypes.c_void_p) for name in ("gamma", "beta")]
        + [(name, _Layered) for name in ("start", "stacks", "anchor", "targets")]
        + [(name, ctypes.c_void_p) for name in ("states", "tape", "y", "surprise")]
        + [(name, _Layered) for name in ("final_stacks", "final_anchor")]
        + [("g_y", ctypes.c_void_p), ("g_final_stacks", _Layered), ("g_final_anchor", _Layered)]
        + [(f"g_{name}", ctypes.c_void_p) for name in _TOKENS]
        + [(f"g_{name}", ctypes.c_void_p) for name in ("gamma", "beta")]
        + [(f"g_{name}", _Layered) for name in ("start", "stacks", "anchor", "targets")]
    )


class _Call:
    """A problem and the tensors that it points to."""

    def __init__(self, plan: Plan, tensors: tuple[Tensor | None, ...]) -> None:
        contiguous = [None if t is None else t.contiguous() for t in tensors]
        tokens, norm, start, state = unpack(plan, Tokens, contiguous)
        self.tokens, self.state = tokens, state
        self.dtype, self.library = tokens.q.dtype, _library(tokens.q.dtype)
        sequences, chunks, length, width = tokens.q.shape
        widths = [width, *(w.shape[-1] for w in state.anchor)]
        self.problem = _Problem(
            sequences, chunks, length, plan.depth, _threads(),
            ACTIVATIONS.index(plan.spec.activation), NORMS.index(plan.spec.norm),
            LOSSES.index(plan.spec.inner_loss), plan.spec.read_mode == "exclusive",
            (ctypes.c_int64 * (MAX_DEPTH + 1))(*widths), plan.spec.norm_eps, plan.spec.loss_scale,
        )  # fmt: skip
        self._kept: list[Any] = []
        self._dtypes = (self.dtype, torch.bool, torch.uint8)
        self.point(resets=_flags(plan.resets, sequences), closes=_flags(plan.closes, sequences))
        self.point(valid=tokens.valid, **{name: getattr(tokens, name) for name in _TOKENS})
        self.point(gamma=norm.gamma, beta=norm.beta, start=start, stacks=state.stacks, anchor=state.anchor)
        self.point(targets=state.targets)

    def point(self, **tensors: Any) -> None:
        """Set fields to tensors, or to lists of one for each layer."""
        for name, value in tensors.items():
            self._kept.append(value)
            for tensor in value if isinstance(value, list) else [value]:
                if tensor is not None and (tensor.device.type != "cpu" or tensor.dtype not in self._dtypes):
                    raise ConfigError(
                        f"{name} is {tensor.dtype} on {tensor.device}; like q, all tensors of a call must be "
                        f"{self.dtype} on the cpu."
                    )
            if isinstance(value, list):
                setattr(self.problem, name, _Layered(*(t.data_ptr() for t in value)))
            elif value is not None:
                setattr(self.problem, name, value.data_ptr())

    def empty(self, size: int) -> Tensor:
        """Room for `size` numbers for each sequence and chunk."""
        return torch.empty(self.problem.sequences, self.problem.chunks, size, dtype=self.dtype, device="cpu")

    def run(self, backward: bool) -> None:
        if self.library.nestor_scan(ctypes.byref(self.problem), int(backward)):
            raise MemoryError("not enough memory for the working space of the neural memory.")


class _NativeWalk(torch.autograd.Function):
    """Inputs after the plan: those of `scan.apply_walk`."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, keep_tape: bool, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        call = _Call(plan, tensors)
        q, state = call.tokens.q, call.state
        outputs = _like(q)
        surprise = q.new_empty(q.shape[:-1] if plan.surprise else (0,))
        stacks, anchor = ([_like(t) for t in layers] for layers in (state.stacks, state.anchor))
        states = tape = None
        if keep_tape:
            states = call.empty(call.library.nestor_states_size(ctypes.byref(call.problem)))
            if not plan.spec.recompute:
                tape = call.empty(call.library.nestor_tape_size(ctypes.byref(call.problem)))
        call.point(y=outputs, final_stacks=stacks, final_anchor=anchor, states=states, tape=tape)
        call.point(surprise=surprise if plan.surprise else None)
        call.run(backward=False)
        ctx.plan = plan
        ctx.save_for_backward(states, tape, *tensors)
        ctx.mark_non_differentiable(surprise)
        return outputs, surprise, *stacks, *anchor

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, g_outputs: Tensor, g_surprise: Tensor, *g_final: Tensor
    ) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        states, tape, *tensors = ctx.saved_tensors
        call = _Call(plan, tuple(tensors))
        g_final = tuple(g.contiguous() for g in g_final)
        call.point(g_y=g_outputs.contiguous(), states=states, tape=tape)
        call.point(g_final_stacks=list(g_final[: plan.depth]), g_final_anchor=list(g_final[plan.depth :]))
        grads = tuple(None if t is None or t.dtype == torch.bool else _like(t) for t in tensors)
        inputs, norm, start, state = unpack(plan, Tokens, grads)
        call.point(**{f"g_{name}": getattr(inputs, name) for name in _TOKENS})
        call.point(g_gamma=norm.gamma, g_beta=norm.beta, g_start=start, g_stacks=state.stacks)
        call.point(g_anchor=state.anchor, g_targets=state.targets)
        call.run(backward=True)
        return (None, None, *grads)


def _threads() -> int:
    """Threads of PyTorch; one in a forked process, which has none of its parent's."""
    return torch.get_num_threads() if os.getpid() == PROCESS else 1


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _flags(masks: list[Any], sequences: int) -> Tensor:
    """uint8 ``[N, m]`` from masks as in `Plan`."""
    if not any(isinstance(mask, Tensor) for mask in masks):
        return torch.tensor([bool(mask) for mask in masks], dtype=torch.uint8, device="cpu")[:, None].repeat(
            1, sequences
        )
    flags = torch.zeros(len(masks), sequences, dtype=torch.uint8, device="cpu")
    for row, mask in zip(flags, masks, strict=True):
        row.copy_(mask.flatten()) if isinstance(mask, Tensor) else row.fill_(bool(mask))
    return flags
