"""What the setting `continuum` of a configuration may be. Known without torch, for a configuration is read
without loading layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nestor.errors import ConfigError, suggest

WIRINGS = ("sequential", "independent", "nested")
SETTINGS = ("periods", "wiring")


def check_continuum(
    settings: Mapping[str, Any], intermediate_size: int
) -> tuple[tuple[int | None, ...], str]:
    """Periods, from the shortest to the longest (None: never, last), and wiring of the configuration.

    Raises:
        ConfigError: unknown settings, periods that do not rise, or a width that does not divide into blocks.
    """
    for name in settings:
        if name not in SETTINGS:
            raise ConfigError(
                f"continuum has {name!r}; known are {', '.join(SETTINGS)}. {suggest(name, SETTINGS)}".rstrip()
            )
    periods = tuple(settings.get("periods") or ())
    if not periods:
        raise ConfigError(
            "feed-forward type 'continuum' needs continuum={'periods': [...]}, tokens from update to "
            "update of each block, for example [64, 512, 4096, None]"
        )
    finite = [period for period in periods if period is not None]
    counts = all(type(period) is int and period > 0 for period in finite)
    if (
        not finite
        or not counts
        or finite != sorted(set(finite))
        or periods[len(finite) :] not in ((), (None,))
    ):
        raise ConfigError(
            f"continuum has periods {list(periods)}; give rising numbers of tokens, the last may be None: "
            f"the block that never learns from the stream"
        )
    wiring = settings.get("wiring", "sequential")
    check_blocks(len(periods), wiring, intermediate_size)
    return periods, wiring


def check_blocks(blocks: int, wiring: str, intermediate_size: int) -> None:
    """Raises ConfigError for an unknown wiring, or a width that does not divide into so many blocks."""
    if wiring not in WIRINGS:
        raise ConfigError(
            f"wiring is {wiring!r}; known are {', '.join(WIRINGS)}. {suggest(str(wiring), WIRINGS)}".rstrip()
        )
    if blocks < 1 or intermediate_size % blocks:
        raise ConfigError(
            f"intermediate_size is {intermediate_size} and the continuum has {blocks} blocks; make it a "
            f"multiple of their number"
        )
