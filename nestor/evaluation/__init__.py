"""Evaluation: suites, metrics, statistics, plots and the report."""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "Interval": "statistics",
    "Plot": "plots",
    "Report": "report",
    "Settings": "suites",
    "Subject": "subjects",
    "attention_reach": "subjects",
    "compare_mqar": "mqar",
    "compare_needle": "needle",
    "compare_perplexity": "perplexity",
    "compare_recall": "recall",
    "compare_remembrance": "remembrance",
    "cut_passages": "passages",
    "draw_documents": "recall",
    "draw_needles": "needle",
    "evaluate": "suites",
    "make_layout": "perplexity",
    "measure_mqar": "mqar",
    "measure_needle": "needle",
    "measure_perplexity": "perplexity",
    "measure_recall": "recall",
    "measure_remembrance": "remembrance",
    "write_results": "suites",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"nestor.evaluation.{_EXPORTS[name]}"), name)
