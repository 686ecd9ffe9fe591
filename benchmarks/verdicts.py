"""What the sections of the bars say, a line each: what was wanted, what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

# Speed over that of KDA at each shape, and over titans-pytorch's everywhere.
OVER_KDA = {"8x4096": 1.0, "2x16384": 1.0, "1x65536": 0.7}
TNT_OVER_KDA = {"1x65536": 1.0}
OVER_TITANS = 6.0
# Speed of the self-modifying memory over that of the memory.
OVER_MEMORY = 0.5
# Speed of titans-mag over the transformer's; from 16k on it has to be the faster one.
OVER_TRANSFORMER = {"4096": 0.7, "16384": 1.0, "65536": 1.0}
SCALING = 1.85


class Verdict(NamedTuple):
    """A bar, what is wanted, what was measured, and whether that is enough."""

    bar: str
    wanted: str
    measured: str
    met: bool


def verdicts(result: dict[str, Any]) -> list[Verdict]:
    """The bars of the sections that the result has."""
    tables = (_shapes, _growth, _first_call, _users, _training)
    return [line for table in tables for line in table(result)]


def _least(bar: str, wanted: float, value: float) -> Verdict:
    return Verdict(bar, f"at least {wanted:g}", f"{value:.2f}", value >= wanted)


def _most(bar: str, wanted: float, value: float, unit: str = "") -> Verdict:
    return Verdict(bar, f"at most {wanted:g}{unit}", f"{value:.2f}{unit}", value <= wanted)


def _shapes(result: dict[str, Any]) -> Iterator[Verdict]:
    for shape, found in result.get("shapes", {}).items():
        own = found.get("neural_memory", {})
        if "speed_over_kda" in own and shape in OVER_KDA:
            yield _least(f"{shape}: speed over KDA", OVER_KDA[shape], own["speed_over_kda"])
        tnt = found.get("tnt", {})
        if "speed_over_kda" in tnt and shape in TNT_OVER_KDA:
            yield _least(f"{shape}: TNT's speed over KDA", TNT_OVER_KDA[shape], tnt["speed_over_kda"])
        modifying = found.get("self_modifying", {})
        if "speed_over_neural_memory" in modifying and shape.endswith("x4096"):
            ratio = modifying["speed_over_neural_memory"]
            yield _least(f"{shape}: self-modifying memory's speed over the memory's", OVER_MEMORY, ratio)
        if "speed_over_titans-pytorch-x4" in own:
            ratio = own["speed_over_titans-pytorch-x4"]
            yield _least(f"{shape}: speed over titans-pytorch", OVER_TITANS, ratio)
        if "peak_over_kda" in own:
            yield _most(f"{shape}: peak memory over KDA's", 1.0, own["peak_over_kda"])


def _growth(result: dict[str, Any]) -> Iterator[Verdict]:
    for length, found in result.get("growth", {}).items():
        if length.isdigit():
            bar = f"T = {length}: time a token over that at the shortest T"
            if "token_time_over_first" in found:
                yield _most(bar, 1.1, found["token_time_over_first"])
            else:
                yield Verdict(bar, "at most 1.1", found.get("failure", "not measured"), False)


def _first_call(result: dict[str, Any]) -> Iterator[Verdict]:
    found = result.get("first_call", {})
    for name, limit in (("cold", 60.0), ("warm", 5.0)):
        if name in found:
            yield _most(f"first call, caches {name}", limit, found[name]["first"], " s")


def _users(result: dict[str, Any]) -> Iterator[Verdict]:
    section = result.get("users", {})
    for read, found in section.items():
        if read.isdigit():
            how = "graph" if "time_over_copy" in found.get("graph", {}) else "eager"
            if "time_over_copy" in found.get(how, {}):
                bar = f"a token after {read}, time over a copy of the state ({how})"
                yield _most(bar, 1.5, found[how]["time_over_copy"])
    for how in ("graph", "eager"):
        if f"{how}_last_over_first" in section:
            yield _most(f"a token after much reading over one after little ({how})", 1.1,
                        section[f"{how}_last_over_first"])  # fmt: skip


def _training(result: dict[str, Any]) -> Iterator[Verdict]:
    for context, models in result.get("captured", {}).items():
        memory = models.get("titans-mag", {}) if context.isdigit() else {}
        if "speed_over_transformer" in memory and context in OVER_TRANSFORMER:
            how = "captured" if memory["captured"] else "compiled, recomputed"
            bar = f"T = {context}, {how}: titans-mag's speed over the transformer's"
            yield _least(bar, OVER_TRANSFORMER[context], memory["speed_over_transformer"])
    for processes, contexts in result.get("training", {}).items():
        if not processes.isdigit():
            continue
        for context, models in contexts.items():
            memory = models.get("titans-mag", {})
            where = f"T = {context}, {processes} process{'es' if processes != '1' else ''}"
            if "speed_over_transformer" in memory and context in OVER_TRANSFORMER:
                bar = f"{where}: titans-mag's speed over the transformer's"
                yield _least(bar, OVER_TRANSFORMER[context], memory["speed_over_transformer"])
            for name, one in models.items():
                if "scaling" in one:
                    yield _least(f"{where}: {name}'s speed over one process's", SCALING, one["scaling"])
