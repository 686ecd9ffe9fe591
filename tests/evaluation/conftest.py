"""Real text, tiny models, and a model that copies what it can find in what it read last."""

from types import SimpleNamespace

import pytest
import torch

import nestor
from nestor.data import load_tokenizer, open_corpus, tokenize
from nestor.data.tasks import CorpusHaystack
from nestor.evaluation import Subject


class Copier(torch.nn.Module):
    """Predicts the byte that followed the longest earlier occurrence of the last bytes it read.

    It looks back over `window` bytes, itself included, at any sharpness: a prediction has probability
    nearly 1. Its cache is a list that every call changes in place, as caches of other libraries are.
    """

    def __init__(self, window=10**9, shortest=4):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=260, model_type="copier", layer_types=["full_attention"])
        self.device = torch.device("cpu")
        self.window, self.shortest = window, shortest
        self.calls = []

    def forward(self, input_ids, past_key_values=None, use_cache=True):
        rows = [[] for _ in input_ids] if past_key_values is None else past_key_values
        self.calls.append(tuple(input_ids.shape))
        logits = torch.zeros(*input_ids.shape, 260)
        for row, (read, ids) in enumerate(zip(rows, input_ids.tolist(), strict=True)):
            for place, token in enumerate(ids):
                read.append(token)
                logits[row, place, self.predict(bytes(b % 256 for b in read[-self.window :]))] = 40.0
        return SimpleNamespace(logits=logits, past_key_values=rows)

    def predict(self, seen):
        for length in range(min(40, len(seen) - 1), self.shortest - 1, -1):
            found = seen[:-1].rfind(seen[-length:])
            if found >= 0:
                return seen[found + length]
        return 0


class Guesser(torch.nn.Module):
    """Knows how an answer looks and nothing else: ` `, digits that are all as likely, `.`."""

    def __init__(self, digits):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=260, model_type="guesser", layer_types=["full_attention"])
        self.device = torch.device("cpu")
        self.digits = digits

    def forward(self, input_ids, past_key_values=None, use_cache=True):
        before = past_key_values if past_key_values is not None else input_ids[:, :0]
        seen = torch.cat([before, input_ids], dim=1)
        logits = torch.full((*seen.shape, 260), -60.0)
        for row, text in enumerate("".join(chr(b) for b in ids) for ids in seen.tolist()):
            for place in range(len(text)):
                logits[row, place, self.likely(text[: place + 1])] = 0.0
        return SimpleNamespace(logits=logits[:, before.shape[1] :], past_key_values=seen)

    def likely(self, text):
        tail = text[text.rfind(" is") + 3 :]
        if not tail:
            return [ord(" ")]
        if len(tail) - 1 == self.digits:
            return [ord(".")]
        return list(b"123456789" if len(tail) == 1 and self.digits > 1 else b"0123456789")


@pytest.fixture(scope="session")
def words():
    return load_tokenizer("bytes")


@pytest.fixture(scope="session")
def book(words, tmp_path_factory):
    """Haystack of held-out text."""
    corpus = open_corpus("classics", split="valid")
    return CorpusHaystack(tokenize(corpus, words, cache_dir=tmp_path_factory.mktemp("tokens")), words)


def tiny(preset="transformer", seed=0, **overrides):
    torch.manual_seed(seed)
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}
    config = nestor.preset(preset, "quick", **(settings | {"intermediate_size": 32} | overrides))
    return nestor.NestorForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def make_tiny():
    return tiny


@pytest.fixture(scope="session")
def models(words):
    """A full-attention transformer and a Titans model, as subjects."""
    titans = tiny("titans-mag", 1, sliding_window=16, memory={"chunk_size": 8})
    return [Subject("full", tiny(), words), Subject("titans", titans, words)]


@pytest.fixture(scope="session")
def foreign(words):
    """A model of another library, of limited context, whose cache is changed in place."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    return Subject("llama", LlamaForCausalLM(config).eval().requires_grad_(False), words)


@pytest.fixture
def copier():
    return Copier


@pytest.fixture
def guesser():
    return Guesser
