"""A running exchange with a model whose State goes on: only new tokens are ever fed.

What the State has read after a turn is exactly the turn: the user's text, every token of the answer
including the last one (which `generate` samples but does not feed), and what closes the turn.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from nestor.data.tokenizers import StreamDecoder, encode_text
from nestor.errors import ConfigError, DataError
from nestor.models.state import State

OnText = Callable[[str], None]


class TokenStream(BaseStreamer):
    """Hands text to `on_text` as the tokens come; a character cut between tokens waits for its rest."""

    def __init__(self, tokenizer: Any, on_text: OnText) -> None:
        self.decoder = StreamDecoder(tokenizer)
        self.on_text = on_text
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        if not self.prompt_seen:  # the first call brings the prompt
            self.prompt_seen = True
            return
        text = self.decoder.push(value.flatten().tolist())
        if text:
            self.on_text(text)

    def end(self) -> None:
        text = self.decoder.finish()
        if text:
            self.on_text(text)


class StopAfterLine(StoppingCriteria):
    """Stop at the first line break that follows some text. For one answer: it begins with the first token
    that this sees."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.start: int | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if self.start is None:
            self.start = input_ids.shape[1] - 1
        done = [
            "\n" in self.tokenizer.decode(row[-1:]) and bool(self.tokenizer.decode(row).strip())
            for row in input_ids[:, self.start :].tolist()
        ]
        return torch.tensor(done, device=input_ids.device)


def encode_prompt(tokenizer: Any, text: str, *, opening: bool) -> list[int]:
    """Token ids of `text`; the opening of a stream gets the special tokens of its tokenizer.

    Raises DataError for text that is not Unicode and for a prompt of no tokens.
    """
    _check_unicode(text)
    ids = list(tokenizer(text)["input_ids"]) if opening else encode_text(tokenizer, text)
    if not ids and opening and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise DataError("the prompt is empty; give some text to go on from.")
    return ids


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"the text is not UTF-8 at character {error.start}; convert it first.") from error


@torch.no_grad()
def extend(
    model: Any,
    ids: list[int],
    state: State | None,
    arguments: dict[str, Any],
    tail: Callable[[list[int]], list[int]],
) -> tuple[list[int], State]:
    """Feed `ids` after `state`, generate, feed what `generate` left out, and return (answer, State).

    `tail(answer)` gives the tokens that close the turn after the answer. `state` itself stays as it is.
    """
    require_state(model)
    prompt = torch.tensor([ids], device=model.device)
    if state is not None:
        arguments = arguments | {"past_key_values": state}
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        use_cache=True,
        return_dict_in_generate=True,
        **arguments,
    )
    answer = output.sequences[0, len(ids) :].tolist()
    if arguments.get("num_beams", 1) == 1:
        after, unread = output.past_key_values, answer[-1:]
    else:  # the States that a beam search ends with are those of the beams, in their order
        after, unread = state, ids + answer
    rest = torch.tensor([unread + tail(answer)], device=model.device)
    return answer, model(rest, past_key_values=after, use_cache=True).past_key_values.detach()


def require_state(model: Any) -> None:
    """Raise ConfigError for a model of another library, whose cache is no State."""
    if model.config.model_type != "nestor":
        raise ConfigError(
            f"a {model.config.model_type!r} model has no State to save or to go on from; use a Nestor model."
        )


@dataclass(frozen=True)
class Turn:
    """The last turn: the State before it (None at the start) and every token it fed."""

    before: State | None
    ids: list[int]


class Conversation:
    """Turns with one model over one State (batch of 1), which is replaced, never changed, by a turn."""

    def __init__(self, model: Any, tokenizer: Any, state: State | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.state = state
        self.last: Turn | None = None

    def reply(self, text: str, arguments: dict[str, Any], on_text: OnText) -> str:
        """Feed one user turn and return the answer, which goes to `on_text` as it comes.

        If this is interrupted, the State is still the one before the turn.
        """
        ids, closing = self._wrap(text)
        arguments = dict(arguments)
        if arguments.get("num_beams", 1) == 1:
            arguments["streamer"] = TokenStream(self.tokenizer, on_text)
        if not self._has_template():
            arguments["stopping_criteria"] = [StopAfterLine(self.tokenizer)]
        answer, state = self._extend(ids, arguments, lambda a: self._close(a, closing))
        self.last = Turn(self.state, ids + answer + self._close(answer, closing))
        self.state = state
        reply = self.tokenizer.decode(answer, skip_special_tokens=True)
        if "streamer" not in arguments:
            on_text(reply)
        return reply

    def replace(self, state: State | None) -> None:
        """Go on from another State (None: from nothing); the last turn is no longer known."""
        self.state = state
        self.last = None

    @torch.no_grad()
    def surprise(self) -> list[tuple[str, float]]:
        """Pieces of text of the last turn, and how hard each was written (its strongest token).

        Raises ConfigError before the first turn, and for a model without a memory.
        """
        if self.last is None:
            raise ConfigError("there is no turn yet to show; say something first.")
        ids = torch.tensor([self.last.ids], device=self.model.device)
        strength = self.model.write_strength(ids, past_key_values=self.last.before)[0].tolist()
        decoder, pieces, pending = StreamDecoder(self.tokenizer), [], 0.0
        for token, value in zip(self.last.ids, strength, strict=True):
            pending = max(pending, value)
            piece = decoder.push([token])
            if piece:
                pieces.append((piece, pending))
                pending = 0.0
        return pieces

    @property
    def read(self) -> int:
        """Tokens that the open context has."""
        return 0 if self.state is None else int(self.state.clock[0])

    def described(self) -> str:
        """What the memory holds, in words."""
        return f"it has read {self.read:,} tokens" if self.read else "it has read nothing yet"

    def _extend(
        self, ids: list[int], arguments: dict[str, Any], tail: Callable[[list[int]], list[int]]
    ) -> tuple[list[int], State]:
        return extend(self.model, ids, self.state, arguments, tail)

    def _has_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def _wrap(self, text: str) -> tuple[list[int], str]:
        """Tokens that open an answer to `text`, and the text that closes the answer."""
        if not self._has_template():
            return encode_prompt(self.tokenizer, text + "\n", opening=not self.read), "\n"

        _check_unicode(text)

        def render(messages: list[tuple[str, str]], **options: bool) -> str:
            turns = [{"role": role, "content": content} for role, content in messages]
            return self.tokenizer.apply_chat_template(turns, tokenize=False, **options)

        # A template renders whole conversations. What it puts around a later turn is what a stand-in
        # conversation gains by that turn.
        stand_in = [("user", "question"), ("assistant", "<answer>")]
        past = render(stand_in)
        closing = past.rpartition("<answer>")[2]
        if not self.read:
            rendered = render([("user", text)], add_generation_prompt=True)
        else:
            rendered = render([*stand_in, ("user", text)], add_generation_prompt=True).removeprefix(past)
        return encode_text(self.tokenizer, rendered), closing

    def _close(self, answer: list[int], closing: str) -> list[int]:
        """The tokens of `closing` that the answer does not end with already."""
        if not self._has_template():
            ended = self.tokenizer.decode(answer[-1:]).endswith(closing)
            return [] if ended else encode_text(self.tokenizer, closing)
        end = self.tokenizer.decode(answer[-1:], skip_special_tokens=False)
        return encode_text(self.tokenizer, closing.removeprefix(end))
