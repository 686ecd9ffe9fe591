"""A Hugging Face decoder that reads without end: attention over a window, memory beyond it."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from nestor.errors import ConfigError, ShapeError, StateMismatchError
from nestor.layers.substate import join_states, part_of
from nestor.learning.branches import BesideAttention, WindowCache
from nestor.models.generation import StatefulGeneration
from nestor.models.loss import hidden_loss
from nestor.models.state import LayerState, State, is_cache


class _Place(NamedTuple):
    """Where in its windows a row is: keys of earlier tokens that the next one sees, tokens until some of them
    go, and whether some go now."""

    cached: int
    room: int
    cut: bool


class WindowedDecoder(StatefulGeneration, PreTrainedModel, GenerationMixin):
    """`(parameters, State, tokens) -> (logits, State)` of a decoder of limited context.

    Keys and values are kept for at most `window` tokens. When there are as many, `stride` of them go. With a
    stride of the whole window each window is read as a text of its own. With a smaller one the oldest go, but
    for the first `sinks` of the text, on which trained attention leans (arXiv 2309.17453); keys that stay are
    turned back, so that positions are always within the window. Memory branches (`nestor.learning.Branches`)
    of the model keep what they know, from window to window. `generate` takes prompts of one length, without
    padding.

    State, by layer: `keys.cache` (as they were read, before any turn), `values.cache` `[B, n, H, p]`, and
    `memory.*` of a branch. Rows of a batch do not touch each other; all must be at the same place of their
    windows.

    Args:
        model: of Hugging Face, with rotary positions; it is used as it is, not copied.
        window: tokens; None: the model's context.
        stride: None: the window. sinks: with a smaller stride, first tokens that stay.
        forget: whether memories begin anew with each window, for comparison; with windows read one by one.

    Raises:
        ConfigError: a window beyond the model's context, a stride beyond the window, or one below it for a
            model whose positions do not allow that.
    """

    #: Texts may be longer than the configuration's positions (`nestor.evaluation.Subject`).
    endless = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(
        self,
        model: PreTrainedModel,
        window: int | None = None,
        stride: int | None = None,
        *,
        sinks: int = 4,
        forget: bool = False,
    ) -> None:
        super().__init__(model.config)
        context = getattr(model.config, "max_position_embeddings", None)
        window = window or context
        if not window or (context and window > context) or not 1 <= (stride or window) <= window:
            raise ConfigError(
                f"window is {window} and stride {stride}, for a model with a context of {context}; give a "
                f"window within the context, and a stride within the window"
            )
        self.model, self.window, self.stride = model, window, stride or window
        self.sinks, self.forget = sinks if self.stride < window else 0, forget
        if self.stride < window:
            if forget:
                raise ConfigError(f"forget goes with windows read one by one, not with a stride of {stride}")
            if not 0 <= sinks <= window - self.stride:
                raise ConfigError(f"sinks are {sinks}; {window - self.stride} tokens stay at most")
        # By device and dtype, which a model can change.
        self._known_shapes: dict[tuple[torch.device, torch.dtype], Any] = {}
        self.generation_config = model.generation_config
        self.eval()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.model.get_output_embeddings()

    @property
    def branches(self) -> dict[int, BesideAttention]:
        """Layers with a memory, by index."""
        return {x.index: x for x in self.model.modules() if isinstance(x, BesideAttention)}

    @property
    def attention_reach(self) -> tuple[int, int]:
        """Tokens that one layer sees, and all of them together (`Subject.reach`), beside the sinks."""
        layers = self.config.get_text_config().num_hidden_layers if self.stride < self.window else 1
        return self.window, layers * (self.window - 1) + 1

    @property
    def state_settings(self) -> dict[str, Any]:
        """What gives a State its meaning beside the model (`nestor.models.state.fingerprint`)."""
        return {name: getattr(self, name) for name in ("window", "stride", "sinks", "forget")}

    def initial_state(self, batch_size: int) -> State:
        """The State of rows that have read nothing, with every tensor in place."""
        shapes, hidden = self._shapes(self.device, self.dtype)
        layers: dict[int, LayerState] = {
            index: {
                name: torch.zeros(batch_size, 0, *shape, dtype=dtype, device=self.device)
                for name, shape, dtype in pair
            }
            for index, pair in shapes.items()
        }
        for index, layer in self.branches.items():
            layers[index] |= join_states(memory=layer.branch.fresh_state(batch_size, hidden))
        return State(layers, State.empty(batch_size, self.device).clock)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: State | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        shift_labels: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """Read tokens, from the start of a stream or from where a State left off.

        Args:
            input_ids: int64 `[B, T]`. attention_mask: without zeros; padding cannot be read.
            logits_to_keep: last positions to compute logits for; 0: all.
            shift_labels: int64 `[B, T]`, the target of each position, -100 for none; given, the mean loss is
                returned and no logits; 0 where no position has one.

        Raises:
            ShapeError: padding, no token, or rows at different places of their windows.
            StateMismatchError: a State of another number of rows or another window, or one that has read and
                holds nothing.
            ConfigError: the model kept no keys or memories of what it read.
        """
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ShapeError("attention_mask has zeros; give texts of one length, without padding")
        batch, length = input_ids.shape
        if not length:
            raise ShapeError("there must be at least one token of each row")
        state = State.empty(batch, input_ids.device) if past_key_values is None else past_key_values
        if state.batch_size != batch:
            raise StateMismatchError(f"the State has {state.batch_size} rows, the tokens {batch}")
        clocks: list[int] = state.clock.tolist()
        if any(clocks) and not state.layers:
            raise StateMismatchError(f"the State has read {clocks} tokens and holds nothing of them")
        count = None if shift_labels is None else (shift_labels != -100).sum().clamp(min=1)
        keep = logits_to_keep or length
        found, losses, read = [], [], 0
        while read < length:
            place = self._place(clocks)
            cached, end = place.cached, min(length, read + place.room)
            lasting = [] if self.forget and not cached else list(self.branches)
            cache, read_keys = self._opened(state, place, lasting)
            positions = torch.arange(cached, cached + end - read, device=input_ids.device)
            options = {"past_key_values": cache, "position_ids": positions[None], "use_cache": True}
            part = input_ids[:, read:end]
            if shift_labels is None:
                # Hugging Face's 0 means all.
                wanted = max(0, keep - (length - end))
                logits = self.model(part, logits_to_keep=max(1, min(wanted, end - read)), **options).logits
                found += [logits] if wanted else []
            else:
                losses.append(self._loss(part, shift_labels[:, read:end], count, options))
            self._check_read(cache, cached + end - read)
            layers = _closed(cache)
            for index, first in read_keys.items():
                layers[index]["keys.cache"] = torch.cat((first, layers[index]["keys.cache"][:, cached:]), 1)
            clocks = [clock + end - read for clock in clocks]
            state = State(layers, state.clock + (end - read))
            read = end
        after: Any = state if use_cache is not False else None
        return CausalLMOutputWithPast(
            loss=None if count is None else torch.stack(losses).sum(),
            logits=torch.cat(found, 1) if found else None,
            past_key_values=after,
        )

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
    ) -> Tensor:
        # Hugging Face takes each padding token of a prompt for padding, and texts can have that token.
        return torch.ones(inputs_tensor.shape[:2], dtype=torch.int64, device=inputs_tensor.device)

    def _place(self, clocks: list[int]) -> _Place:
        window, stride = self.window, self.stride
        places = set()
        for clock in clocks:
            since = (clock - window) % stride
            begun = _Place(clock, window - clock, False)
            cut = not since and stride < window
            places.add(begun if clock < window else _Place(window - stride + since, stride - since, cut))
        if len(places) > 1:
            raise ShapeError(
                f"rows have read {clocks} tokens, and so are at different places of their windows of "
                f"{window}; read them one by one"
            )
        return places.pop()

    def _opened(
        self, state: State, place: _Place, branches: list[int]
    ) -> tuple[WindowCache, dict[int, Tensor]]:
        """The keys and values of a State that stay, and its memories; where keys are turned, as they were."""
        memories = {index: part_of(state.layers.get(index), "memory") for index in branches}
        cache = WindowCache({index: memory for index, memory in memories.items() if memory})
        cached, cut = place.cached, place.cut
        stored = self.window if cut or not cached else cached
        slid = self.stride < self.window and bool((state.clock >= self.window).any())
        turn = self._turn(state.clock, cached) if slid else None
        read_keys: dict[int, Tensor] = {}
        for index, layer in state.layers.items():
            keys, values = (layer[f"{name}.cache"] for name in ("keys", "values"))
            more = keys.shape[1] - stored
            # Keys that no token will see may be gone already. `State.stack` puts zeros in front.
            if (more < 0 and (cached or keys.shape[1])) or bool(keys[:, : max(0, more)].any()):
                raise StateMismatchError(
                    f"the State has {keys.shape[1]} keys where {stored} are wanted; it is of another window"
                )
            if not cached:
                continue
            keys, values = keys[:, -stored:], values[:, -stored:]
            if cut:
                last = stored - cached + self.sinks
                keys, values = (torch.cat((x[:, : self.sinks], x[:, last:]), 1) for x in (keys, values))
            now = keys.transpose(1, 2)
            if turn is not None:
                read_keys[index], now = keys, _turned(now, *turn)
            cache.update(now, values.transpose(1, 2), index)
        return cache, read_keys

    def _turn(self, clock: Tensor, cached: int) -> tuple[Tensor, Tensor]:
        """The rotation `[B, 1, n, p]` from where each key was read to where it is now.

        A State has keys as they were read. If each cut turned them anew, what they lose in half precision
        would add up.
        """
        self._check_turns()
        index = torch.arange(cached, device=clock.device)
        token = clock[:, None] - cached + index
        cuts, before = (((x - self.window) // self.stride + 1).clamp(min=0) for x in (clock[:, None], token))
        moved = (cuts - before) * self.stride
        moved = torch.where(index < self.sinks, 0, moved)
        pair = _rotation(self.model.base_model.rotary_emb, moved, self.dtype)
        assert pair is not None
        cos, sin = pair
        return cos[:, None], sin[:, None]

    def _check_read(self, cache: WindowCache, length: int) -> None:
        """Raises ConfigError: the cache has not the keys of so many tokens, and every memory."""
        lengths = {cache.get_seq_length(index) for index in range(len(cache.layers))}
        layers = self.config.get_text_config().num_hidden_layers
        if (
            len(cache.layers) < layers
            or lengths != {length}
            or not self.branches.keys() <= cache.memories.keys()
        ):
            raise ConfigError(
                f"a {type(self.model).__name__} kept keys of {len(cache.layers)} layers of {layers}, and "
                f"{len(cache.memories)} memories of {len(self.branches)}; it has to keep all of them. "
                f"Gradient checkpointing in training mode keeps none: switch it off, or call model.eval()"
            )

    def _loss(self, ids: Tensor, targets: Tensor, count: Any, options: dict[str, Any]) -> Tensor:
        """The summed loss over `count`."""
        if not self._plain_head:
            raise ConfigError(
                f"the logits of a {type(self.model).__name__} are not its head's; take the loss of its logits"
            )
        hidden = self.model.base_model(ids, **options).last_hidden_state
        return hidden_loss(hidden, self.get_output_embeddings(), targets, count)

    def _shapes(
        self, device: torch.device, dtype: torch.dtype
    ) -> tuple[dict[int, list[tuple[str, tuple[int, int], torch.dtype]]], Tensor]:
        """By layer, of keys and values, name, heads, width and dtype; and a hidden state, for its dtype."""
        if (device, dtype) in self._known_shapes:
            return self._known_shapes[device, dtype]
        cache, ids = WindowCache(), torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        with torch.inference_mode(False), torch.no_grad():
            hidden = self.model.base_model(ids, past_key_values=cache, use_cache=True).last_hidden_state
        shapes = {
            index: [(name, (x.shape[2], x.shape[3]), x.dtype) for name, x in layer.items() if is_cache(name)]
            for index, layer in _closed(cache).items()
        }
        self._known_shapes[device, dtype] = shapes, hidden
        return shapes, hidden

    def _check_turns(self) -> None:
        """Raises ConfigError: the model's keys are not rotated as its rotation says."""
        if self._turns:
            return
        raise ConfigError(
            f"stride is {self.stride}, below the window, but keys of a {type(self.model).__name__} cannot be "
            f"turned to other positions; leave it out to read window by window"
        )

    @cached_property
    def _turns(self) -> bool:
        """Whether a rotation by a stride is what makes keys of one place those of another, in each layer."""
        rotary = getattr(self.model.base_model, "rotary_emb", None)
        place = torch.tensor([[self.stride]], device=self.device)
        with torch.inference_mode(False), torch.no_grad():
            if rotary is None or (pair := _rotation(rotary, place, self.dtype)) is None:
                return False
            there, here = self._keys_of_one(place), self._keys_of_one(torch.zeros_like(place))
            return all(_is_turn(x, y, *pair) for x, y in zip(there, here, strict=True))

    def _keys_of_one(self, position: Tensor) -> list[Tensor]:
        """Keys of each layer for one token, which depend on its position alone: it sees only itself."""
        cache = WindowCache()
        self.model.base_model(
            torch.ones_like(position), past_key_values=cache, position_ids=position, use_cache=True
        )
        return [layer["keys.cache"].transpose(1, 2) for layer in _closed(cache).values()]

    @cached_property
    def _plain_head(self) -> bool:
        """Whether logits are those of the output embedding, not scaled or capped."""
        ids = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        with torch.no_grad():
            head = self.get_output_embeddings()(self.model.base_model(ids).last_hidden_state)
            return torch.equal(head, self.model(ids).logits)


def _rotation(rotary: nn.Module, places: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines `[..., p]` of places, at least in float32; None: the module gives no rotation."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    try:
        cos, sin = rotary(torch.zeros(1, device=places.device, dtype=wide), places)
    except (TypeError, AttributeError):
        # One with a rotation for each type of layer, which it wants to be told.
        return None
    # Some scale attention by what they give, and a cut must not scale keys again.
    return (cos, sin) if torch.allclose(cos**2 + sin**2, torch.ones_like(cos), rtol=0, atol=1e-4) else None


def _is_turn(there: Tensor, here: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether keys of one place are those of another, turned, but for rounding."""
    # Hugging Face's rotary angles are of float32.
    rounding = max(torch.finfo(x).eps for x in (here.dtype, torch.float32))
    turned, here = _turned(there.to(cos.dtype), cos, sin), here.to(cos.dtype)
    return torch.allclose(turned, here, rtol=0, atol=4 * rounding * float(here.abs().max()))


def _turned(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Keys `[B, H, T, p]` at earlier positions: the first entries of each, in two halves, are rotated."""
    width = cos.shape[-1]
    part, rest = keys[..., :width].to(cos.dtype), keys[..., width:]
    first, second = part.chunk(2, -1)
    turned = part * cos - torch.cat((-second, first), -1) * sin
    return torch.cat((turned.to(keys.dtype), rest), -1)


def _closed(cache: WindowCache) -> dict[int, LayerState]:
    layers: dict[int, LayerState] = {}
    for index, layer in enumerate(cache.layers):
        # As DynamicCache has them once something was read.
        kept: Any = layer
        keys, values = kept.keys, kept.values
        layers[index] = {"keys.cache": keys.transpose(1, 2), "values.cache": values.transpose(1, 2)}
        if index in cache.memories:
            layers[index] |= join_states(memory=cache.memories[index])
    return layers
