"""What Hugging Face's `generate` needs to know about models whose cache is a State."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.utils import GenerationMode

from nestor.errors import ConfigError, ShapeError
from nestor.models.state import State


class StatefulGeneration(GenerationMixin):
    """Greedy search, sampling and beam search that start from nothing or from a State.

    A State that is handed in as `past_key_values` already holds the text before `input_ids`, which are new
    tokens only; it is not changed, and the State after generation comes back with
    `return_dict_in_generate=True`. As with every Hugging Face cache, the last token generated has not been
    read yet. Prompts may be padded on either side, where the model reads padding.
    """

    _is_stateful = True
    _supported_generation_modes = [
        GenerationMode.GREEDY_SEARCH,
        GenerationMode.SAMPLE,
        GenerationMode.BEAM_SEARCH,
        GenerationMode.BEAM_SAMPLE,
    ]

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        if generation_config.cache_implementation is not None:
            raise ConfigError(
                f"cache_implementation is {generation_config.cache_implementation!r}; "
                f"a Nestor model keeps a nestor.State and has no other cache. Leave it out"
            )
        state = model_kwargs.get("past_key_values")
        if state is not None and not isinstance(state, State):
            raise ConfigError(
                f"past_key_values is a {type(state).__name__}; generate continues from a nestor.State"
            )
        mask = model_kwargs.get("attention_mask")
        if mask is not None and not bool(mask.any(dim=1).all()):
            raise ShapeError("a prompt is all padding; there is nothing to continue")
        if generation_config.prefill_chunk_size is None:
            return
        if mask is not None and not bool(mask[:, -1].all()):
            raise ConfigError(
                "prefill_chunk_size does not go with right padding; pad the prompts on the left"
            )
        if state is None:
            rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
            model_kwargs["past_key_values"] = State.empty(rows, device=self.device)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **model_kwargs,
        )
        state = model_kwargs.get("past_key_values")
        if isinstance(state, State) and expand_size > 1:
            rows = torch.arange(state.batch_size, device=state.device).repeat_interleave(expand_size)
            model_kwargs["past_key_values"] = state.select(rows)
        return input_ids, model_kwargs

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: State | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        resets: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of the next forward call. A prompt padded on the right is moved to the right end."""
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        tokens_name = "input_ids" if inputs.get("inputs_embeds") is None else "inputs_embeds"
        tokens = inputs[tokens_name]
        length = tokens.shape[1]
        if resets is not None and (is_first_iteration or not kwargs.get("use_cache")):
            later = resets.new_zeros(resets.shape[0], max(0, length - resets.shape[1]))
            inputs["resets"] = torch.cat((resets, later), dim=1)
        mask = inputs.get("attention_mask")
        if mask is None or mask.shape[1] < length:
            return inputs
        mask = mask[:, -length:]
        inputs["attention_mask"] = mask
        if length == 1 or bool(mask[:, -1].all()):
            return inputs
        # The logits of the last column choose the next token, so the last real token has to stand there.
        order = mask.long().argsort(dim=1, stable=True)
        for name in (tokens_name, "attention_mask", "resets"):
            value = inputs.get(name)
            if value is not None:
                index = order.reshape(*order.shape, *[1] * (value.dim() - 2))
                inputs[name] = value.gather(1, index.expand(-1, -1, *value.shape[2:]))
        return inputs

    def _reorder_cache(self, past_key_values: State, beam_idx: Tensor) -> State:
        return past_key_values.select(beam_idx)
