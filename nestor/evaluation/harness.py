"""lm-evaluation-harness (EleutherAI) on a loaded model, through its Hugging Face interface.

The harness comes with the extra `nestor[eval]` and is imported only here. A byte tokenizer is given to it
in the shape that it knows, a `PreTrainedTokenizerFast` with the same ids.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nestor.data.tokenizers import ByteTokenizer
from nestor.errors import ConfigError, suggest
from nestor.evaluation.subjects import Subject


def require(tasks: Sequence[str]) -> None:
    """Raises ConfigError: the harness is not installed, or no task is named."""
    if find_spec("lm_eval") is None:
        raise ConfigError(
            "--suite lm-eval needs lm-evaluation-harness, which is not installed. "
            "Install the extra: pip install 'nestor[eval]'"
        )
    if not tasks:
        raise ConfigError("--suite lm-eval needs --tasks, for example --tasks arc_easy piqa")


def run_harness(
    subject: Subject,
    tasks: Sequence[str],
    *,
    batch_size: int = 8,
    limit: int | None = None,
    include_path: Path | None = None,
    max_length: int | None = None,
    seed: int = 0,
    items: bool = False,
) -> dict[str, Any]:
    """Results of the tasks, as JSON: metrics with standard errors, versions and settings of the harness.

    Args:
        include_path: folder with task files (.yaml) of your own.
        max_length: tokens of a request at most; default the model's limit, or 2,048 for one without.
        items: also what each item of a task scored, as `items`, in the order of the data, so that two models
            can be compared item by item (`by_item`).

    Raises:
        ConfigError: the harness is not installed, or a task is unknown.
    """
    require(tasks)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for task in tasks:
        if not manager.match_tasks([task]):
            raise ConfigError(
                f"there is no lm-eval task {task!r}. {suggest(task, manager.all_tasks)}".rstrip()
            )
    model = HFLM(
        pretrained=subject.model,
        tokenizer=hugging_face_tokenizer(subject.tokenizer),
        batch_size=batch_size,
        max_length=max_length or subject.limit or 2048,
    )
    found = simple_evaluate(
        model=model,
        tasks=list(tasks),
        limit=limit,
        task_manager=manager,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
        log_samples=items,
    )
    kept = {
        key: found[key]
        for key in ("results", "versions", "n-shot", "higher_is_better", "n-samples")
        if key in found
    }
    kept |= {"model": subject.describe(), "limit": limit, "seed": seed}
    if items:
        kept["items"] = {task: by_item(samples) for task, samples in found["samples"].items()}
    # The harness puts functions and arrays into its results; what JSON does not know is written as text.
    return json.loads(json.dumps(kept, default=str))


def by_item(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What each item of a task scored, by metric, in the order of the data.

    The harness gives a sample for each filter of an answer. Where a task has several, a score is named
    `metric,filter`, as in the harness's results.
    """
    several = len({sample["filter"] for sample in samples}) > 1
    items: dict[int, dict[str, Any]] = {}
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        item = items.setdefault(sample["doc_id"], {})
        for metric in sample["metrics"]:
            item[f"{metric},{sample['filter']}" if several else metric] = sample[metric]
    return list(items.values())


def hugging_face_tokenizer(tokenizer: Any) -> Any:
    """A tokenizer that transformers made; the byte tokenizer is saved and opened as its Hugging Face twin."""
    if not isinstance(tokenizer, ByteTokenizer):
        return tokenizer
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)


def print_results(found: Mapping[str, Mapping[str, Any]]) -> None:
    """A table of task, metric and value of each model on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("task")
    table.add_column("metric")
    for name in found:
        table.add_column(name, justify="right")
    first = next(iter(found.values()))["results"]
    for task, metrics in first.items():
        for metric, value in metrics.items():
            if not isinstance(value, (int, float)) or "_stderr" in metric or not metric.count(","):
                continue
            error = metric.replace(",", "_stderr,", 1)
            cells = []
            for result in found.values():
                mine = result["results"][task]
                spread = mine.get(error)
                cells.append(
                    f"{mine[metric]:.4f}" + (f" ± {spread:.4f}" if isinstance(spread, float) else "")
                )
            table.add_row(task, metric.partition(",")[0], *cells)
    Console().print(table)
