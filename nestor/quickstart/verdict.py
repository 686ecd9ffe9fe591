"""What the figures say, in sentences. Every sentence is chosen by the figures, in either direction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nestor.evaluation.report import with_interval

Interval = Mapping[str, Any]


def verdict(result: Mapping[str, Any]) -> list[str]:
    """Sentences about a quickstart's result: recall and bits per byte beyond the reach, and lasting memory.

    Args:
        result: with `evaluation` (which has `models` and `beyond_reach`) and `memory`.
    """
    evaluation = result["evaluation"]
    first, second = (model["name"] for model in evaluation["models"])
    beyond = evaluation["beyond_reach"]
    if beyond is None:
        sentences = ["Nothing was measured beyond what attention reaches, so nothing is said of memory."]
    else:
        sentences = [recall_sentence(beyond, first, second), bits_sentence(beyond, first, second)]
    return [*sentences, *memory_sentences(result["memory"])]


def recall_sentence(beyond: Mapping[str, Any], first: str, second: str) -> str:
    """Who recalls facts from beyond the reach. Apart are intervals that do not overlap."""
    one, other = beyond["recall"][first], beyond["recall"][second]
    told = (
        f"Asked for a fact that lies {beyond['distance']:,} tokens back, where no attention reaches, "
        f"{second} answers {with_interval(other, as_percent=True)} of {other['n']} questions exactly and "
        f"{first} {with_interval(one, as_percent=True)}"
    )
    if other["low"] > one["high"]:
        return f"{told}: the intervals are apart, {second} remembers what attention cannot see."
    if one["low"] > other["high"]:
        return f"{told}: the intervals are apart, and it is {first} that recalls more."
    return f"{told}: the intervals overlap, so this run shows no difference in recall."


def bits_sentence(beyond: Mapping[str, Any], first: str, second: str) -> str:
    """Who predicts text beyond the reach better, from the paired difference on the same text."""
    one, other = (with_interval(beyond["bits_per_byte"][name]) for name in (first, second))
    difference = beyond["bits_difference"]
    told = f"On text beyond the reach {second} needs {other} bits a byte and {first} {one}"
    if difference["low"] is None:
        return f"{told}; too little was read for an interval of their difference."
    if difference["high"] < 0:
        fewer = {"estimate": -difference["estimate"], "low": -difference["high"], "high": -difference["low"]}
        return f"{told}: {with_interval(fewer)} fewer on the same text, more than chance."
    if difference["low"] > 0:
        return f"{told}: {with_interval(difference)} more on the same text; its memory does not help there."
    return f"{told}; the paired difference, {with_interval(difference)}, may be zero."


def memory_sentences(memory: Mapping[str, Any]) -> list[str]:
    """What new processes answered from saved memories, and after /forget."""
    name = memory["remembering"]
    asked = memory["asked"][name]
    total = len(asked["answers"])
    sentences = [
        f"A new process that loaded the saved memory of {name} ({_kilobytes(memory['memory_bytes'][name])}) "
        f"and never saw the text answered {_count(asked['right'], total)}"
        + "".join(
            f"; {other} with its saved State answered {_count(row['right'], total)}"
            for other, row in memory["asked"].items()
            if other != name
        )
        + "."
    ]
    after, file_left = memory["after_forget"]["right"], memory["forget"]["file_left"]
    told = f"After /forget it answered {_count(after, total)}"
    if file_left:
        sentences.append(f"{told}, but the memory file is still there: it was not forgotten.")
    elif after < asked["right"]:
        sentences.append(f"{told}: what it knew was in the memory, not in the weights.")
    elif after == asked["right"] == 0:
        sentences.append(f"{told}, as before it: there was nothing to forget.")
    else:
        sentences.append(f"{told}, no fewer than before, so the answers did not come from the memory.")
    if not memory["weights_unchanged"]:
        sentences.append("The file of the weights changed meanwhile, which it must not.")
    return sentences


def _count(right: int, total: int) -> str:
    if total and right in (0, total):
        return f"{'all' if right else 'none'} of {total} questions"
    return f"{right} of {total} questions"


def _kilobytes(size: int) -> str:
    return f"{size / 1000:,.0f} kB"
