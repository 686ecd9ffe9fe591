"""A text in pieces that a model reads one after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def windows(ids: Sequence[int], context: int) -> Iterator[list[int]]:
    """Pieces of at most `context` tokens, at least 2; each begins with the last token of the one before, so
    that every token but the first is predicted once."""
    for begin in range(0, len(ids) - 1, context - 1):
        yield list(ids[begin : begin + context])
