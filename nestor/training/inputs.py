"""The data of a run: from `DataConfig` to the streams that training and validation read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nestor.data import LaneStream, Mixture, TokenStream, load_tokenizer, open_corpus, tokenize
from nestor.data.tasks import CorpusHaystack, FactSpec, MqarTask, RecallTask, TaskStream
from nestor.data.tokenized import TokenizedCorpus
from nestor.errors import ConfigError, DataError, suggest
from nestor.training.config import DataConfig, SourceConfig, TrainConfig
from nestor.training.distributed import Processes

FACT_OPTIONS = ("templates", "digits", "held_out")


def open_tokenizer(data: DataConfig, model_path: str) -> Any:
    """The tokenizer of a run: the one it names, or, when it starts from a saved model and leaves `bytes`, the
    one saved with that model."""
    if model_path and data.tokenizer == "bytes":
        try:
            return load_tokenizer(model_path)
        except DataError:
            pass
    return load_tokenizer(data.tokenizer)


def train_stream(data: DataConfig, tokenizer: Any, seed: int, lanes: Sequence[int]) -> LaneStream:
    """The mixture of all sources, of which this process makes `lanes`.

    Raises:
        DataError: no text, or less than one segment.
        ConfigError: a source cannot get a lane, or a task has an impossible option.
    """
    split = "all" if data.valid else "train"
    makers = [
        (source.weight, _maker(source, data, tokenizer, seed + i, split))
        for i, source in enumerate(data.sources)
    ]
    if len(makers) == 1:
        return makers[0][1](data.batch_size, lanes)
    return Mixture(makers, data.batch_size, data.sequence_length, lanes=lanes)


def valid_stream(config: TrainConfig, tokenizer: Any, processes: Processes) -> tuple[LaneStream, int]:
    """Held-out batches in a fixed order, and how many there are: at most `batches`, at most one epoch.

    It is the text that is measured; a run that trains on tasks alone is measured on other documents of them.

    Raises:
        DataError: the held-out part is shorter than one segment.
    """
    data, seed, batches = config.data, config.run.seed, config.run.eval_batches
    rank, world = processes.rank, processes.world
    length = data.sequence_length
    sources = data.valid or tuple(source for source in data.sources if source.text and not source.task)
    if not sources or all(source.task for source in sources):
        chosen = (sources or data.sources)[0]
        count = max(data.batch_size // world, 1) * world
        lanes = range(rank * count // world, (rank + 1) * count // world)
        return _maker(chosen, data, tokenizer, seed + 7919, "valid")(count, lanes), batches
    texts = [source for source in sources if source.text and not source.task]
    corpus = _corpus(
        SourceConfig(text=tuple(name for source in texts for name in source.text), field=texts[0].field),
        data,
        tokenizer,
        "all" if data.valid else "valid",
    )
    if corpus.n_tokens < length * world:
        raise DataError(
            f"the held-out text has {corpus.n_tokens} tokens, less than {world} segments of {length}; raise "
            "data.valid_fraction, name held-out text as data.valid, or set run.eval_every to 0"
        )
    count = min(data.batch_size // world, corpus.n_tokens // (length * world)) * world
    count = max(count, world)
    lanes = range(rank * count // world, (rank + 1) * count // world)
    stream = TokenStream(
        corpus,
        count,
        length,
        eos=getattr(tokenizer, "eos_token_id", None),
        seed=seed,
        shuffle=False,
        lanes=lanes,
    )
    return stream, min(batches, max(1, corpus.n_tokens // (count * length)))


def _maker(
    source: SourceConfig, data: DataConfig, tokenizer: Any, seed: int, split: str
) -> Callable[[int, Sequence[int]], LaneStream]:
    """What builds the stream of a source, given its lanes."""
    eos = getattr(tokenizer, "eos_token_id", None)
    length = data.sequence_length
    if not source.task:
        corpus = _corpus(source, data, tokenizer, split)
        return lambda count, lanes: TokenStream(corpus, count, length, eos=eos, seed=seed, lanes=lanes)
    task = (
        _recall(source, data, tokenizer, split) if source.task == "recall" else _mqar(source, data, tokenizer)
    )
    return lambda count, lanes: TaskStream(task, count, length, eos=eos, seed=seed, lanes=lanes)


def _corpus(source: SourceConfig, data: DataConfig, tokenizer: Any, split: str) -> TokenizedCorpus:
    corpus = open_corpus(source.text, field=source.field, split=split, valid_fraction=data.valid_fraction)
    return tokenize(corpus, tokenizer)


def _recall(source: SourceConfig, data: DataConfig, tokenizer: Any, split: str) -> RecallTask:
    text = source if source.text else next(one for one in data.sources if one.text and not one.task)
    options = _checked_options("recall", RecallTask, source.options, ("haystack", "spec"), FACT_OPTIONS)
    facts = {key: options.pop(key) for key in FACT_OPTIONS if key in options}
    if isinstance(facts.get("templates"), str):
        facts["templates"] = [facts["templates"]]
    if "templates" in facts:
        facts["templates"] = tuple(facts["templates"])
    options.setdefault("document_length", data.sequence_length)
    haystack = CorpusHaystack(_corpus(text, data, tokenizer, split), tokenizer)
    return RecallTask(haystack, spec=FactSpec(**facts), **options)


def _mqar(source: SourceConfig, data: DataConfig, tokenizer: Any) -> MqarTask:
    options = _checked_options("mqar", MqarTask, source.options, ())
    defaults = {"vocab_size": min(256, len(tokenizer)), "n_pairs": 8, "document_length": data.sequence_length}
    return MqarTask(**(defaults | options))


def _checked_options(
    name: str, task: type, options: Mapping[str, Any], hidden: Sequence[str], more: Sequence[str] = ()
) -> dict[str, Any]:
    known = [key for key in inspect.signature(task).parameters if key not in hidden] + list(more)
    for key in options:
        if key not in known:
            hint = suggest(key, known) or f"There are {', '.join(known)}."
            raise ConfigError(f"the task {name!r} has no option {key!r}. {hint}")
    options = dict(options)
    if "distances" in options:
        pair = list(options["distances"]) if isinstance(options["distances"], (list, tuple)) else []
        if len(pair) not in (1, 2):
            raise ConfigError(
                f"distances of task {name!r} are {options['distances']!r}; give [least, greatest] or [least]"
            )
        options["distances"] = (pair[0], pair[1] if len(pair) == 2 else None)
    return options
