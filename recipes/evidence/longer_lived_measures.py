"""What is measured of each way of reading: long documents, needles, zero-shot tasks, cost."""

from __future__ import annotations

import json
import lzma
import math
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from longer_lived_settings import Args, Arm, keep, kept
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from nestor.cli.loading import load_model
from nestor.data import open_corpus
from nestor.data.tasks.needle import NEEDLE_KINDS, needle
from nestor.data.tokenizers import encode_text
from nestor.errors import ConfigError
from nestor.evaluation.harness import run_harness
from nestor.evaluation.passages import encode_with_bytes
from nestor.evaluation.subjects import Subject
from nestor.evaluation.suites import device_name
from nestor.learning import Learner, Retrofit, WindowedDecoder, load_branches
from nestor.models.state import State, fingerprint, is_cache

# Tokens of one call, of the logits of which there must be room.
PIECE = 8192
#: Zero-shot tasks: by name, fields of an lm-eval task. Files have `query`, `choices` and `gold`, or `context`
#: and `continuation`.
TASKS: dict[str, dict[str, Any]] = {
    "arc_easy": {"doc_to_text": "{{query}}\nAnswer:"},
    "arc_challenge": {"doc_to_text": "{{query}}\nAnswer:"},
    "piqa": {"doc_to_text": "{{query}}Answer:"},
    "openbook_qa": {"doc_to_text": "{{query}}"},
    "lambada_openai": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": " {{continuation}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
}
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{gold}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}


class Texts:
    """Novels that no training had, to hide needles in."""

    def __init__(self, documents: list[str], tokenizer: Any) -> None:
        self.documents, self.tokenizer = documents, tokenizer

    def text(self, rng: np.random.Generator, n_tokens: int) -> str:
        """At least `n_tokens` tokens, from the beginning of a paragraph on."""
        size = 5 * n_tokens + 200
        while True:
            document = self.documents[int(rng.integers(len(self.documents)))]
            begin = document.find("\n", int(rng.integers(max(1, len(document) - size)))) + 1
            text = document[begin : begin + size]
            if len(encode_text(self.tokenizer, text)) >= n_tokens:
                return text
            size = min(2 * size, max(map(len, self.documents)))


@lru_cache(maxsize=2)
def long_document(path: Path, index: int, tokens: int, tokenizer: Any) -> tuple[list[int], NDArray]:
    """Ids of a document's beginning, one more than `tokens`, and the bytes of each."""
    text = next(text for number, text in enumerate(open_corpus(path)) if number == index)
    # More than enough characters: no tokenizer here makes tokens of more than 8 on average.
    ids, size = encode_with_bytes(tokenizer, text[: 8 * tokens])
    if len(ids) <= tokens:
        raise ConfigError(f"document {index} of {path} has {len(ids)} tokens; --tokens must be below that")
    return ids[: tokens + 1], size[: tokens + 1]


def draw(args: Args, variant: str, length: int, *, device: str = "cpu") -> None:
    """Needles of a kind and length, kept in the folder, the same for all."""
    del device
    path = args.out / "drawn" / f"{variant}-{length}.json"
    settings = {"depths": list(args.depths), "needles": args.needles, "model": args.model}
    if kept(path, settings) is not None:
        return
    from nestor.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(args.model)
    haystack = Texts(list(open_corpus(args.text("novels-valid"))), tokenizer)
    probes = []
    for depth in args.depths:
        # The same for a variant and length, whatever the others are.
        rng = np.random.default_rng([NEEDLE_KINDS.index(variant), length, round(1000 * depth)])
        for _ in range(args.needles):
            made = needle(haystack, rng, kind=variant, length=length, depth=depth)
            prompt, answer = (encode_text(tokenizer, text) for text in (made.prompt, made.answer))
            probes.append({"ids": prompt + answer, "start": len(prompt), "depth": depth, **made.meta})
    keep(path, settings, probes)


class Reader:
    """A way of reading, opened: a stream of tokens to logits, with what it has become handed on."""

    def __init__(self, args: Args, arm: Arm, device: str) -> None:
        self.args, self.arm = args, arm
        model, self.tokenizer = load_model(args.model, device, args.dtype)
        model.requires_grad_(False)
        self.weights = fingerprint(model)["weights"]
        self.own = sum(p.numel() for p in model.parameters())
        if arm.branch:
            load_branches(args.branch_file, model)
        model.requires_grad_(False)
        self.model = model
        self.decoder = WindowedDecoder(model, arm.window, arm.stride, forget=arm.forget)
        self.learner: Learner | None = None
        if arm.levels:
            retrofit = Retrofit(
                periods=args.periods, learning_rates=(args.rate,) * len(args.periods), optimizer="adam"
            )
            self.learner = Learner(self.decoder, retrofit.apply(self.decoder))

    def start(self) -> State:
        """What has read nothing."""
        return self.decoder.initial_state(1) if self.learner is None else self.learner.start()

    @torch.no_grad()
    def read(self, ids: Tensor, state: State, keep_logits: int = 0) -> tuple[Tensor, State]:
        """Logits of the last tokens (0: of all) of `[1, T]`, and what it has become."""
        if self.learner is not None:
            logits, state = self.learner.read(ids, state)
            return logits[:, -keep_logits:], state
        output = self.decoder(ids, past_key_values=state, logits_to_keep=keep_logits)
        assert isinstance(output.past_key_values, State) and output.logits is not None
        return output.logits, output.past_key_values

    def nats(self, ids: list[int]) -> tuple[Tensor, State]:
        """Of each token but the first, and what the text has made of it."""
        tokens = torch.tensor([ids], device=self.decoder.device)
        state, found = self.start(), []
        for begin in range(0, len(ids) - 1, PIECE):
            end = min(begin + PIECE, len(ids) - 1)
            logits, state = self.read(tokens[:, begin:end], state)
            found.append(F.cross_entropy(logits[0].float(), tokens[0, begin + 1 : end + 1], reduction="none"))
        return torch.cat(found), state

    def document(self, index: int) -> dict[str, Any]:
        """Bits and bytes of each stretch of a document."""
        path, bins = self.args.text("novels-heldout-long"), self.args.bins
        ids, size = long_document(path, index, self.args.tokens, self.tokenizer)
        nats, state = self.nats(ids)
        bits = nats.double().cpu().reshape(bins, -1).sum(1) / math.log(2)
        found = {"bits": bits.tolist(), "bytes": size[1:].reshape(bins, -1).sum(1).tolist()}
        if self.learner is not None:
            found["updates"] = {one.name: one.updates for one in self.learner.report(state)[0]}
            found["change"] = {one.name: one.change for one in self.learner.report(state)[0]}
        return found

    def needles(self, variant: str, length: int) -> dict[str, Any]:
        """Whether each needle's answer is the likeliest, token by token, and its bits."""
        path = self.args.out / "drawn" / f"{variant}-{length}.json"
        probes = json.loads(path.read_text())["result"]
        exact, bits = [], []
        for probe in probes:
            ids = torch.tensor([probe["ids"]], device=self.decoder.device)
            start, state = probe["start"], self.start()
            for begin in range(0, start - 1, PIECE):
                _, state = self.read(ids[:, begin : min(begin + PIECE, start - 1)], state, 1)
            logits, _ = self.read(ids[:, start - 1 : -1], state)
            logits, answer = logits[0].float(), ids[0, start:]
            exact.append(bool((logits.argmax(-1) == answer).all()))
            bits.append(float(F.cross_entropy(logits, answer, reduction="sum")) / math.log(2))
        return {"exact": exact, "bits": bits, "depths": [probe["depth"] for probe in probes]}

    def zeroshot(self, task: str) -> dict[str, Any]:
        """Items of a task that are right. Levels have learned from a long document before."""
        folder = task_files(self.args, task)
        with self._as_it_became() as model:
            found = run_harness(
                Subject(self.arm.name, model, self.tokenizer), [f"longer_lived_{task}"], items=True,
                batch_size=self.args.batch_size, limit=self.args.limit, include_path=folder,
            )  # fmt: skip
        items = found["items"][f"longer_lived_{task}"]
        return {metric: [float(item[metric]) for item in items] for metric in items[0]}

    @contextmanager
    def _as_it_became(self) -> Iterator[Any]:
        if self.learner is None:
            yield self.model
        else:
            with self.learner.applied(self._after_a_document):
                yield self.model

    @cached_property
    def _after_a_document(self) -> State:
        assert self.learner is not None
        path = self.args.text("novels-heldout-long")
        ids, _ = long_document(path, 0, self.args.tokens, self.tokenizer)
        return self.learner.study(torch.tensor([ids], device=self.decoder.device), self.learner.start())

    def cost(self) -> dict[str, Any]:
        """Tokens a second of reading, with logits, bytes, and parameters. The second of two runs counts."""
        path = self.args.text("novels-heldout-long")
        ids, _ = long_document(path, 0, self.args.cost_tokens, self.tokenizer)
        cuda = self.decoder.device.type == "cuda"
        for _ in range(2):
            if cuda:
                torch.cuda.reset_peak_memory_stats(self.decoder.device)
            began = time.perf_counter()
            nats, state = self.nats(ids)
            # To read a number waits for all work.
            float(nats.sum())
            seconds = time.perf_counter() - began
        # Kilobytes on Linux.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        layers = [(name, x.nbytes) for layer in state.layers.values() for name, x in layer.items()]
        return {
            "tokens_per_second": self.args.cost_tokens / seconds,
            "peak_bytes": torch.cuda.max_memory_allocated(self.decoder.device) if cuda else peak,
            "cache_bytes": sum(size for name, size in layers if is_cache(name)),
            "memory_bytes": sum(size for name, size in layers if not is_cache(name)),
            "learned_bytes": sum(x.nbytes for part in state.learned.values() for x in part.values()),
            "parameters": self.own,
            "added": sum(p.numel() for p in self.model.parameters()) - self.own,
        }

    def piece(self, part: str, path: Path, settings: dict[str, Any], *which: Any) -> None:
        """Measure and keep a piece."""
        result = getattr(self, {"documents": "document"}.get(part, part))(*which)
        place = f"{device_name(self.decoder.device)}, PyTorch {torch.__version__}"
        keep(path, settings, {**result, "weights": self.weights, "place": place})


def task_files(args: Args, task: str) -> Path:
    """A folder with the files of a task for lm-eval."""
    if task not in TASKS:
        raise ConfigError(f"no zero-shot task {task!r}; there are {', '.join(TASKS)}")
    source = args.data / "bench" / "zeroshot" / f"{task}.jsonl.xz"
    folder = (args.out / "tasks" / task).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    data, settings = folder / "items.jsonl", folder / "task.yaml"
    with lzma.open(source, "rt", encoding="utf-8") as lines:
        text = lines.read()
    for path, content in ((data, text), (settings, _task(task, data))):
        # Others may read the file that is there.
        if not path.is_file() or path.read_text(encoding="utf-8") != content:
            path.write_text(content, encoding="utf-8")
    return folder


def _task(task: str, data: Path) -> str:
    # JSON is YAML too.
    return json.dumps(
        {
            "task": f"longer_lived_{task}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            **({} if "output_type" in TASKS[task] else CHOICE),
            **TASKS[task],
        }
    )
