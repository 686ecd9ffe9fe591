"""The one decoder: a stack of layers named by the configuration, for Hugging Face's interfaces."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from nestor.errors import ConfigError, NestorError, ShapeError, StateMismatchError
from nestor.layers.norm import RMSNorm
from nestor.layers.registry import build_feed_forward, build_mixer
from nestor.layers.span import Span
from nestor.layers.writes import record_writes
from nestor.models.configuration import NestorConfig
from nestor.models.generation import StatefulGeneration
from nestor.models.loss import hidden_loss, next_token_loss, next_token_targets
from nestor.models.padding import Padding
from nestor.models.state import LayerState, State
from nestor.ops.neural_memory.layout import shared_grids

#: What transformers marks parameters with that are loaded, and modules that it is done with.
LOADED = "_is_hf_initialized"


class Block(GradientCheckpointingLayer):
    """A layer: `x + mixer(norm(x))`, then `x + feed_forward(norm(x))`.

    A feed-forward with `own_residual` takes the residual stream as it is and returns the next one.
    """

    def __init__(self, config: NestorConfig, index: int) -> None:
        super().__init__()
        assert config.layer_types is not None and config.feed_forward_types is not None
        self.mixer_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = build_mixer(config.layer_types[index], config, index)
        feed_forward = build_feed_forward(config.feed_forward_types[index], config, index)
        self.feed_forward_norm: RMSNorm | None = None
        if not getattr(feed_forward, "own_residual", False):
            self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = feed_forward

    def forward(self, x: Tensor, state: LayerState | None, span: Span) -> tuple[Tensor, LayerState]:
        """`[B, T, d]` and the layer's state, to the same."""
        mixed, state = self.mixer(self.mixer_norm(x), state, span)
        x = x + mixed
        if self.feed_forward_norm is None:
            return self.feed_forward(x), state
        return x + self.feed_forward(self.feed_forward_norm(x)), state


class NestorForCausalLM(StatefulGeneration, PreTrainedModel, GenerationMixin):
    """A language model that is a pure function `(parameters, State, tokens) -> (logits, State)`.

    Everything that changes while it reads is in the State that `forward` returns as `past_key_values`;
    parameters never change in a call.
    """

    config_class = NestorConfig
    config: NestorConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}
    _supports_sdpa = True
    _supports_flex_attn = True

    def __init__(self, config: NestorConfig) -> None:
        super().__init__(config)
        if config._attn_implementation not in (None, "sdpa", "flex_attention"):
            raise ConfigError(
                f"attn_implementation is {config._attn_implementation!r}; "
                f"Nestor has 'sdpa' and 'flex_attention'"
            )
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.embed_tokens = value

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif hasattr(module, "initialize"):
            loaded = [(p, p.clone()) for p in module.parameters() if getattr(p, LOADED, False)]
            module.initialize(std)
            for parameter, value in loaded:
                parameter.copy_(value)

    def _initialize_weights(self, module: nn.Module, *options: Any) -> None:
        # Transformers takes a module for loaded if all parameters of its own are, even if it has none. Its
        # parts would then keep the start of any linear layer, or what lay in memory before.
        if not hasattr(module, "initialize"):
            super()._initialize_weights(module, *options)
        elif not getattr(module, LOADED, False):
            if not all(getattr(p, LOADED, False) for p in module.parameters()):
                self._init_weights(module)
            setattr(module, LOADED, True)

    def initial_state(self, batch_size: int) -> State:
        """The State of rows that have read nothing, with every tensor in place.

        Unlike `State.empty` it can be stacked with the States of rows that have read something.
        """
        pad = torch.zeros(batch_size, 1, dtype=torch.int64, device=self.device)
        with torch.no_grad():
            return self(
                pad, attention_mask=torch.zeros_like(pad), use_cache=True, logits_to_keep=1
            ).past_key_values

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: State | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        resets: Tensor | None = None,
        shift_labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        loss_only: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Read tokens, from the start of a stream or from where a State left off.

        Args:
            input_ids: `[B, T]` int64. With a State, the new tokens only.
            attention_mask: `[B, T]`, 0 at padding, which may be anywhere in a row and is never read. A longer
                mask, as it grows in generation, counts by its last T columns. Logits at padding are zero.
            labels: `[B, T]` int64, as `input_ids`; the loss is on the next token of the row. -100, padding,
                and the first token of a document that starts inside the call are not predicted.
            past_key_values: the State before these tokens; None: they start their streams.
            inputs_embeds: `[B, T, d]`, in place of `input_ids`.
            use_cache: return the State after these tokens (default: the configuration's `use_cache`).
            logits_to_keep: last positions to compute logits for, 0 for all, or a 1-D tensor of positions.
            resets: `[B, T]` bool, the token starts a new document: the row forgets what came before.
            shift_labels: `[B, T]` int64 targets of each position, already shifted; -100 is ignored.
            loss_weights: `[B, T]` float, how much the loss on each of `shift_labels` counts; None: equally.
            num_items_in_batch: divide the summed loss by this number instead of taking the mean.
            loss_only: return no logits, which a GPU can then do without (`nestor.ops.linear_cross_entropy`).
            output_hidden_states: return the residual stream before each layer and after the last norm.

        Returns:
            Loss (float32), logits `[B, kept, vocab_size]` (None with `loss_only`), State, hidden states.

        Raises:
            ShapeError: inputs do not fit each other or the vocabulary.
            StateMismatchError: the State has other rows or layers than this call.
            ConfigError: attention weights are asked for.
        """
        if output_attentions:
            raise ConfigError("output_attentions is not supported: attention weights are never formed")
        x = self._embed(input_ids, inputs_embeds)
        batch, length, _ = x.shape
        self._check_state(past_key_values, batch)
        for name, value in (
            ("labels", labels),
            ("shift_labels", shift_labels),
            ("loss_weights", loss_weights),
            ("resets", resets),
        ):
            if value is not None and tuple(value.shape) != (batch, length):
                raise ShapeError(
                    f"{name} has shape {list(value.shape)}, the tokens {[batch, length]}; make them equal"
                )
        keep_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if not keep_all and (labels is not None or shift_labels is not None):
            raise ShapeError(
                f"logits_to_keep is {logits_to_keep!r}, but a loss needs all logits; leave it out"
            )
        if loss_only and labels is None and shift_labels is None:
            raise ShapeError("loss_only is set, but there is nothing to predict; give labels or shift_labels")

        padding = Padding.build(attention_mask, batch, length)
        ordered_resets = None if resets is None else padding.justify(resets.bool())
        span = Span.build(
            None if past_key_values is None else past_key_values.clock,
            batch,
            length,
            x.device,
            lengths=padding.lengths,
            resets=ordered_resets,
        )
        x = padding.justify(x)
        layers: dict[int, LayerState] = {}
        hidden: list[Tensor] = []
        with nullcontext() if torch.compiler.is_compiling() else shared_grids():
            for index, layer in enumerate(self.layers):
                if output_hidden_states:
                    hidden.append(padding.restore(x))
                x, layers[index] = layer(
                    x, None if past_key_values is None else past_key_values.layers.get(index), span
                )
        x = padding.restore(self.norm(x))

        if labels is not None and shift_labels is None:
            shift_labels = padding.restore(next_token_targets(padding.justify(labels), span), fill=-100)
        elif shift_labels is not None:
            shift_labels = padding.ignore(shift_labels)
        loss = logits = None
        if loss_only:
            loss = hidden_loss(x, self.lm_head, shift_labels, num_items_in_batch, loss_weights)
        else:
            kept = x
            if isinstance(logits_to_keep, Tensor):
                kept = x[:, logits_to_keep]
            elif logits_to_keep:
                kept = x[:, -logits_to_keep:]
            logits = self.lm_head(kept)
            if shift_labels is not None:
                loss = next_token_loss(logits, shift_labels, num_items_in_batch, loss_weights)
        keep_state = self.config.use_cache if use_cache is None else use_cache
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=State(layers, span.clock_after()) if keep_state else None,
            hidden_states=(*hidden, x) if output_hidden_states else None,
        )
        return output.to_tuple() if return_dict is False else output

    @torch.no_grad()
    def write_strength(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: State | None = None,
    ) -> Tensor:
        """How hard the memories write each token: float32 `[B, T]`, 0 at padding.

        The write step times the norm of the inner gradient (`nestor.layers.writes`), the mean over the heads
        of a memory and over the layers with one. Arguments as in `forward`; the State given does not change.

        Raises:
            NestorError: no layer of the model has a memory.
        """
        with record_writes() as writes:
            self(
                input_ids, attention_mask, past_key_values=past_key_values, use_cache=False, logits_to_keep=1
            )
        if not writes:
            raise NestorError(
                f"no layer of this model has a memory (layer_types is {self.config.layer_types}); "
                f"write strength is that of a memory, as in the titans presets"
            )
        strength = torch.stack([write.mean(dim=2) for write in writes]).mean(dim=0)
        return Padding.build(attention_mask, *input_ids.shape).restore(strength)

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ShapeError("give either input_ids or inputs_embeds, not both and not neither")
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        assert tokens is not None
        dims = 2 if inputs_embeds is None else 3
        if tokens.dim() != dims or tokens.shape[0] == 0 or tokens.shape[1] == 0:
            wanted = "[batch, length]" if dims == 2 else f"[batch, length, {self.config.hidden_size}]"
            raise ShapeError(
                f"the tokens have shape {list(tokens.shape)}; give {wanted} with at least one token"
            )
        if inputs_embeds is not None:
            return inputs_embeds
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            # On a GPU this check would wait for the device; there an id outside fails inside the embedding.
            low, high = int(tokens.min()), int(tokens.max())
            size = self.embed_tokens.num_embeddings
            if low < 0 or high >= size:
                raise ShapeError(
                    f"token ids span {low} to {high}, but the vocabulary has ids 0 to {size - 1}; "
                    f"use the tokenizer that the model was trained with"
                )
        return self.embed_tokens(tokens)

    def _check_state(self, state: Any, batch: int) -> None:
        if state is None:
            return
        if not isinstance(state, State):
            raise StateMismatchError(
                f"past_key_values is a {type(state).__name__}; a Nestor model takes a nestor.State, "
                f"as its forward returns"
            )
        if state.learned:
            raise StateMismatchError(
                "this State has learned weights of its own, which a plain call would leave out; read it with "
                "the nestor.learning.Learner that made it, or use a model that `nestor learn --export` writes"
            )
        if state.batch_size != batch:
            raise StateMismatchError(
                f"the State has {state.batch_size} rows, the tokens {batch}; use State.select or State.stack"
            )
        if state.layers and set(state.layers) != set(range(len(self.layers))):
            raise StateMismatchError(
                f"the State has layers {sorted(state.layers)}, the model 0 to {len(self.layers) - 1}; "
                f"it comes from another model"
            )
        if state.device != self.embed_tokens.weight.device and self.embed_tokens.weight.device.type != "meta":
            raise StateMismatchError(
                f"the State is on {state.device}, the model on {self.embed_tokens.weight.device}; "
                f"use State.to"
            )


AutoModelForCausalLM.register(NestorConfig, NestorForCausalLM, exist_ok=True)
