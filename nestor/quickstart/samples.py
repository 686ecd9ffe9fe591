"""Text that the models write, all from the same beginning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from nestor.data import encode_text, open_corpus, tokenize
from nestor.data.tasks import CorpusHaystack
from nestor.data.tasks.haystack import exact_tokens
from nestor.evaluation import Settings, Subject

_PROMPT, _WRITTEN = 128, 240
TEMPERATURE = 0.8


def write_samples(subjects: Sequence[Subject], settings: Settings) -> list[dict[str, Any]]:
    """`{"model", "prompt", "text"}` of each model: a held-out beginning, and what the model makes of it."""
    tokenizer, seed = subjects[0].tokenizer, settings.seeds[0]
    haystack = CorpusHaystack(
        tokenize(open_corpus(list(settings.corpus), split=settings.split), tokenizer), tokenizer
    )
    # Its last token is a line end, after which a model might begin something else.
    prompt = tokenizer.decode(exact_tokens(haystack, np.random.default_rng((seed, 0x7E47)), _PROMPT)[:-1])
    found = []
    for subject in subjects:
        torch.manual_seed(seed)
        ids = torch.tensor([encode_text(subject.tokenizer, prompt)], device=subject.model.device)
        output = subject.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=_WRITTEN,
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=0,
            pad_token_id=subject.tokenizer.pad_token_id,
        )
        text = subject.tokenizer.decode(output[0, ids.shape[1] :].tolist())
        found.append({"model": subject.name, "prompt": prompt, "text": text})
    return found
