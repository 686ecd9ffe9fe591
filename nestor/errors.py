"""The errors that Nestor raises on purpose. Each says the value seen, the value wanted and what to do."""

import difflib
from collections.abc import Iterable


class NestorError(Exception):
    """Base of all errors that describe a mistake in what the user gave, not in the program."""


class ConfigError(NestorError, ValueError):
    """A setting is unknown, impossible, or does not fit another."""


class DataError(NestorError, ValueError):
    """A corpus is missing, empty, unreadable, or too short."""


class FileFormatError(NestorError, ValueError):
    """A file is truncated, or was not written by Nestor."""


class StateMismatchError(NestorError, ValueError):
    """A State belongs to another model."""


class ShapeError(NestorError, ValueError):
    """A tensor has a shape, dtype or device that does not fit."""


class LockedError(NestorError, RuntimeError):
    """Another process holds the run folder or the memory file."""


class NonFiniteError(NestorError, RuntimeError):
    """A loss or gradient became infinite or NaN."""


class JobError(NestorError, RuntimeError):
    """Of many runs some failed; the others are finished."""


def suggest(word: str, choices: Iterable[str]) -> str:
    """The words "Did you mean 'x'?" for the nearest of `choices`, or an empty string if none is near."""
    near = difflib.get_close_matches(str(word), [str(c) for c in choices], n=1, cutoff=0.5)
    return f"Did you mean {near[0]!r}?" if near else ""
