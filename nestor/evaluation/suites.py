"""Run suites over models, and write what comes out: results.json, PNG plots and report.html in one folder."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from nestor.data import open_corpus, shipped_corpora, tokenize
from nestor.data.tasks import CorpusHaystack, FactSpec, FillerText
from nestor.errors import ConfigError, suggest
from nestor.evaluation import mqar, needle, perplexity, recall, remembrance
from nestor.evaluation.passages import cut_passages
from nestor.evaluation.retention.settings import RetentionSettings
from nestor.evaluation.scoring import PIECE, Bar
from nestor.evaluation.subjects import Subject, check_names, same_tokenizer
from nestor.files import write_json
from nestor.jobs import Workers

FORMAT = 1
#: Those that "all" stands for: they read each text once or twice, and change nothing.
READING = ("perplexity", "recall", "needle")
#: Remembrance reads a text about log2 of its length times, and retention trains.
ASKED_FOR = ("remembrance", "retention")
SUITES = (*READING, *ASKED_FOR)
RECALL_TASKS = ("facts", "mqar")
_DEFAULT_LENGTH = 4096


@dataclass(frozen=True)
class Settings:
    """Everything that a result depends on besides the models. Lengths are in tokens."""

    suites: tuple[str, ...] = READING
    lengths: tuple[int, ...] = ()
    """Context lengths (perplexity), distances (recall), text lengths (needle); one number is the greatest.
    Remembrance is of the greatest alone."""
    seeds: tuple[int, ...] = (0,)
    repeats: int | None = None
    """Samples for each seed: passages, questions a distance, needles a cell. None: 16, 32 and 4."""
    corpus: tuple[str, ...] = ("classics",)
    split: str | None = None
    """Part of the corpus; None: the held-out part of a shipped corpus, all of any other."""
    batch_size: int = 16
    piece: int = PIECE
    scale: str = "log"
    by_context: bool = True
    """Measure perplexity by context length too, which reads about as much text again as by position."""
    recall_tasks: tuple[str, ...] = RECALL_TASKS
    facts: int = 4
    digits: int = 4
    templates: tuple[str, ...] = ("key",)
    pairs: int = 8
    variants: tuple[str, ...] = needle.VARIANTS
    depths: tuple[float, ...] = needle.DEPTHS
    train_length: int | None = None
    """Tokens of a training segment; the default greatest length is 16 times this."""
    retention: RetentionSettings = field(default_factory=RetentionSettings)

    def check(self) -> None:
        """Raises ConfigError for a setting that is unknown or out of range."""
        for kind, given, known in (
            ("suite", self.suites, SUITES),
            ("recall task", self.recall_tasks, RECALL_TASKS),
        ):
            for name in given:
                if name not in known:
                    raise ConfigError(
                        f"there is no {kind} {name!r}; there are {', '.join(known)}. "
                        f"{suggest(name, known)}".rstrip()
                    )
            if not given:
                raise ConfigError(f"no {kind} is named; choose from {', '.join(known)}")
        for name, values in (
            ("lengths", self.lengths),
            ("repeats", () if self.repeats is None else (self.repeats,)),
            ("batch-size", (self.batch_size,)),
            ("piece", (self.piece,)),
            ("facts", (self.facts,)),
            ("pairs", (self.pairs,)),
        ):
            if any(value < 1 for value in values):
                raise ConfigError(f"--{name} is {min(values)}; it must be at least 1")
        if not self.seeds or min(self.seeds) < 0:
            raise ConfigError(f"--seeds are {list(self.seeds)}; give at least one, and none below 0")
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(
                f"--seeds are {list(self.seeds)}; a seed given twice would count its samples twice"
            )
        if "retention" in self.suites:
            self.retention.check()

    @property
    def longest(self) -> int:
        """The greatest length asked for, or 16 training lengths."""
        return (
            max(self.lengths)
            if self.lengths
            else 16 * self.train_length
            if self.train_length
            else _DEFAULT_LENGTH
        )


def evaluate(
    subjects: Sequence[Subject],
    settings: Settings,
    *,
    name: str = "evaluation",
    bar: Bar | None = None,
    folder: Path | None = None,
    workers: Workers | None = None,
) -> dict[str, Any]:
    """Run the suites over the models; the result is JSON, with every setting and version in it.

    All models read the same documents: the same tokens if they share a tokenizer, else the same text cut
    by bytes. Into `folder` go the finished runs of the retention suite, and are not made again; `workers`
    make many of them at the same time.

    Raises:
        ConfigError, DataError: a setting, or a corpus that is too short for it.
    """
    settings.check()
    check_names(subjects)
    bar = bar or (lambda title: nullcontext(None))
    runs: dict[str, Callable[[Sequence[Subject], Settings, Bar], dict[str, Any]]] = {
        "perplexity": _perplexity,
        "recall": _recall,
        "needle": _needle,
        "remembrance": _remembrance,
        "retention": lambda models, chosen, bars: _retention(models, chosen, bars, folder, workers),
    }
    results: dict[str, Any] = {}
    for suite in dict.fromkeys(settings.suites):
        results |= runs[suite](subjects, settings, bar)
    return {
        "format": "nestor-eval",
        "version": FORMAT,
        "name": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "device": device_name(subjects[0].model.device),
        "settings": json.loads(json.dumps(asdict(settings) | {"longest": settings.longest})),
        "models": [subject.describe() for subject in subjects],
        "results": results,
    }


def write_results(
    result: dict[str, Any], folder: str | Path, commands: Sequence[tuple[str, str]] = ()
) -> Path:
    """Write results.json, plots/*.png and report.html into `folder`; returns the path of the report."""
    from nestor.evaluation.summary import build_report, figures_of

    folder = Path(folder)
    figures = figures_of(result)
    report = build_report(result, figures, commands)
    write_json(folder / "results.json", result)
    for figure in figures:
        figure.plot.write(folder / "plots" / f"{figure.name}.png")
    return report.write(folder / "report.html")


def versions() -> dict[str, str]:
    """Versions of what a number may depend on."""
    found = {"python": platform.python_version()}
    for package in ("nestor", "torch", "transformers", "tokenizers", "numpy", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device_name(device: Any) -> str:
    """The device in words: the GPU's name, or the CPU with its threads."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device} ({platform.machine()} {sys.platform}, {threads} thread{'s' if threads > 1 else ''})"


def _perplexity(subjects: Sequence[Subject], settings: Settings, bar: Bar) -> dict[str, Any]:
    unit = "tokens" if same_tokenizer(subjects) else "bytes"
    longest = settings.longest
    contexts: list[int] | None = None if settings.by_context else []
    if settings.by_context and len(settings.lengths) > 1:
        contexts = [length for length in sorted(set(settings.lengths)) if length <= longest // 2]
    layout = perplexity.make_layout(longest, contexts=contexts, scale=settings.scale, unit=unit)
    corpus = _corpus(settings)
    passages = cut_passages(
        corpus,
        [subject.tokenizer for subject in subjects],
        layout.length,
        settings.repeats or 16,
        seeds=settings.seeds,
        unit=unit,
        label=corpus.label,
    )
    found = {}
    for subject in subjects:
        with bar(f"perplexity: {subject.name}") as progress:
            found[subject.name] = perplexity.measure_perplexity(
                subject,
                passages,
                layout,
                batch_size=settings.batch_size,
                piece=settings.piece,
                resample_seed=settings.seeds[0],
                progress=progress,
            )
    differences = perplexity.compare_perplexity(
        list(found), list(found.values()), resample_seed=settings.seeds[0]
    )
    return {"perplexity": {"models": found, "differences": differences}}


def _recall(subjects: Sequence[Subject], settings: Settings, bar: Bar) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if "facts" in settings.recall_tasks:
        out["recall"] = _facts(subjects, settings, bar)
    if "mqar" in settings.recall_tasks:
        found = {}
        for subject in subjects:
            length = settings.longest if subject.limit is None else min(settings.longest, subject.limit)
            with bar(f"associative recall: {subject.name}") as progress:
                found[subject.name] = mqar.measure_mqar(
                    subject,
                    document_length=length,
                    count=max(1, (settings.repeats or 32) // 4),
                    n_pairs=settings.pairs,
                    seeds=settings.seeds,
                    batch_size=settings.batch_size,
                    piece=settings.piece,
                    resample_seed=settings.seeds[0],
                    progress=progress,
                )
        differences = mqar.compare_mqar(list(found), list(found.values()), resample_seed=settings.seeds[0])
        out["mqar"] = {"models": found, "differences": differences}
    return out


def _facts(subjects: Sequence[Subject], settings: Settings, bar: Bar) -> dict[str, Any]:
    if len(settings.lengths) > 1:
        distances = sorted(set(settings.lengths))
    else:
        distances = recall.doubling_distances(settings.longest, min(16, settings.longest))
    spec = FactSpec(settings.templates, settings.digits)
    count = settings.repeats or 32
    found = {}
    for subject, haystack in zip(subjects, _haystacks(subjects, settings), strict=True):
        documents = recall.draw_documents(
            haystack, distances, count, seeds=settings.seeds, n_facts=settings.facts, spec=spec
        )
        with bar(f"recall of facts: {subject.name}") as progress:
            found[subject.name] = recall.measure_recall(
                subject,
                documents,
                batch_size=settings.batch_size,
                piece=settings.piece,
                resample_seed=settings.seeds[0],
                progress=progress,
            )
    return _paired(subjects, found, partial(recall.compare_recall, resample_seed=settings.seeds[0]))


def _needle(subjects: Sequence[Subject], settings: Settings, bar: Bar) -> dict[str, Any]:
    lengths = sorted(set(settings.lengths))
    if len(lengths) < 2:
        lengths = recall.doubling_distances(settings.longest, min(256, settings.longest))
    found = {}
    for subject, haystack in zip(subjects, _haystacks(subjects, settings), strict=True):
        probes = needle.draw_needles(
            haystack,
            lengths,
            settings.repeats or 4,
            depths=settings.depths,
            variants=settings.variants,
            seeds=settings.seeds,
        )
        with bar(f"needle: {subject.name}") as progress:
            found[subject.name] = needle.measure_needle(
                subject, probes, batch_size=settings.batch_size, piece=settings.piece, progress=progress
            )
    return {"needle": _paired(subjects, found, needle.compare_needle)}


def _remembrance(subjects: Sequence[Subject], settings: Settings, bar: Bar) -> dict[str, Any]:
    corpus = _corpus(settings)
    passages = cut_passages(
        corpus,
        [subject.tokenizer for subject in subjects],
        settings.longest,
        settings.repeats or 16,
        seeds=settings.seeds,
        label=corpus.label,
    )
    found = {}
    for subject in subjects:
        with bar(f"remembrance: {subject.name}") as progress:
            found[subject.name] = remembrance.measure_remembrance(
                subject,
                passages,
                settings.longest,
                batch_size=settings.batch_size,
                piece=settings.piece,
                resample_seed=settings.seeds[0],
                progress=progress,
            )
    compare = partial(remembrance.compare_remembrance, resample_seed=settings.seeds[0])
    return {"remembrance": _paired(subjects, found, compare)}


def _paired(
    subjects: Sequence[Subject], found: dict[str, Any], compare: Callable[[list[str], list[Any]], Any]
) -> dict[str, Any]:
    """Results by model with their differences. Texts are drawn and cut by tokens: of different tokenizers
    they differ, and nothing is paired."""
    paired = same_tokenizer(subjects)
    differences = compare(list(found), list(found.values())) if paired else []
    return {"models": found, "differences": differences, "paired": paired}


def _retention(
    subjects: Sequence[Subject], settings: Settings, bar: Bar, folder: Path | None, workers: Workers | None
) -> dict[str, Any]:
    from nestor.evaluation.retention.suite import measure_retention

    # Old text is the held-out part of a corpus, so the stream is filled from the other.
    shipped = all(name in shipped_corpora() for name in settings.corpus)
    corpus = open_corpus(list(settings.corpus), split=settings.split or ("train" if shipped else "all"))
    filler = FillerText(corpus)
    found = {
        subject.name: measure_retention(
            subject,
            filler,
            settings.retention,
            seeds=settings.seeds,
            batch_size=settings.batch_size,
            folder=None if folder is None else folder / "retention",
            bar=bar,
            workers=workers,
        )
        for subject in subjects
    }
    return {"retention": {"models": found, "differences": []}}


def _corpus(settings: Settings) -> Any:
    names = list(settings.corpus)
    split = settings.split
    if split is None:
        split = "valid" if names and all(one in shipped_corpora() for one in names) else "all"
    return open_corpus(names, split=split)


def _haystacks(subjects: Sequence[Subject], settings: Settings) -> list[CorpusHaystack]:
    corpus = _corpus(settings)
    return [CorpusHaystack(tokenize(corpus, s.tokenizer), s.tokenizer) for s in subjects]
