"""What is measured: layers with one interface, whole models, and a step of each."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import torch
from settings import PEER, Settings
from torch import Tensor, nn

import nestor
from nestor.layers.attention import Attention
from nestor.layers.memory_as_gate import MemoryAsGate
from nestor.layers.neural_memory import NeuralMemory


@dataclasses.dataclass
class Layer:
    """A mixer layer with one interface: ``call(x, state) -> (y, state)`` for x ``[B, T, d]``."""

    module: nn.Module
    call: Callable[[Tensor, Any], tuple[Tensor, Any]]


def nestor_layer(module: nn.Module) -> Layer:
    return Layer(module, lambda x, state: module(x, state))


def build_memory(s: Settings, **settings: Any) -> NeuralMemory:
    return NeuralMemory(s.dim, s.heads, depth=2, expansion=s.expansion, chunk_size=s.chunk, **settings)


def build_titans_pytorch(s: Settings) -> Layer:
    """titans-pytorch 0.5.5, which updates its memory per chunk.

    Its gradients are all taken at the first weights (`batch_size=None`, its default), so that one scan covers
    the whole sequence. The largest step is 1e-2 in place of 1; it changes values, not the work that is done.
    One repair: heads are given as views of one parameter, which no optimizer can step; here each has its own.
    """
    sys.path.append(str(s.titans_pytorch))
    from titans_pytorch.neural_memory import NeuralMemory as PeerMemory

    module = PeerMemory(
        s.dim,
        chunk_size=s.chunk,
        heads=s.heads,
        dim_head=s.dim // s.heads,
        default_step_transform_max_lr=1e-2,
        default_model_kwargs={"depth": 2, "expansion_factor": float(s.expansion)},
    )
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous()
    return Layer(module, lambda x, state: module(x, state=state))


LAYERS: dict[str, Callable[[Settings], Layer]] = {
    "full_attention": lambda s: nestor_layer(Attention(s.dim, s.heads)),
    "sliding_attention": lambda s: nestor_layer(Attention(s.dim, s.heads, window=s.window)),
    "neural_memory": lambda s: nestor_layer(build_memory(s)),
    "memory_as_gate": lambda s: nestor_layer(
        MemoryAsGate(Attention(s.dim, s.heads, window=s.window), build_memory(s, output_gate=False))
    ),
    PEER: build_titans_pytorch,
}


def build_layer(name: str, s: Settings) -> Layer:
    torch.manual_seed(0)
    layer = LAYERS[name](s)
    layer.module.to(s.device)
    return layer


def layer_step(layer: Layer, s: Settings, tokens: int, batch: int) -> Callable[[], None]:
    """Forward and backward of one call, to every parameter and the input."""
    x = torch.randn(batch, tokens, s.dim, device=s.device, requires_grad=True)
    upstream = torch.randn(batch, tokens, s.dim, device=s.device)

    def step() -> None:
        with s.autocast():
            y, _ = layer.call(x, None)
        y.backward(upstream.to(y.dtype))
        layer.module.zero_grad(set_to_none=True)
        x.grad = None

    return step


def layer_decode(layer: Layer, s: Settings) -> Callable[[], None]:
    """`decode_tokens` calls on one token each, from the state that one call on `tokens` tokens leaves."""
    with torch.no_grad(), s.autocast():
        _, start = layer.call(torch.randn(s.batch, s.tokens, s.dim, device=s.device), None)
    token = torch.randn(s.batch, 1, s.dim, device=s.device)

    @torch.no_grad()
    def decode() -> None:
        state = start
        with s.autocast():
            for _ in range(s.decode_tokens):
                _, state = layer.call(token, state)

    return decode


def build_model(name: str, s: Settings, **settings: Any) -> nestor.NestorForCausalLM:
    return nestor.NestorForCausalLM(nestor.preset(name, s.size, vocab_size=s.vocabulary, **settings))


class _Stateless(nn.Module):
    """titans-pytorch's memory in the place of a mixer of the decoder, for training."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, state: None, span: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self.module(x)[0], {}


def build_peer_model(s: Settings) -> nn.Module:
    """The titans-lmm of this size with titans-pytorch's memories; the feed-forward equals their sizes."""
    own = build_model("titans-lmm", s)
    memory, width = own.config.memory, own.config.hidden_size
    shape = dataclasses.replace(
        s, dim=width, heads=memory["heads"], expansion=memory["expansion"], chunk=memory["chunk_size"]
    )
    layer = own.layers[0]
    spare = size_of(layer.mixer) - size_of(build_titans_pytorch(shape).module)
    inner = own.config.intermediate_size + round(spare / (3 * width) / 8) * 8
    model = build_model("titans-lmm", s, intermediate_size=inner)
    for block in model.layers:
        block.mixer = _Stateless(build_titans_pytorch(shape).module)
    return model


def size_of(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def model_step(name: str, s: Settings) -> tuple[nn.Module, Callable[[], None]]:
    """A model and its training step on random tokens."""
    torch.manual_seed(0)
    model = (build_peer_model(s) if name == PEER else build_model(name, s)).to(s.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(0, s.vocabulary, (s.batch, s.tokens), device=s.device)

    def step() -> None:
        with s.autocast():
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return model, step
