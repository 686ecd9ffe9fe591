"""The retention suite over one model: every arm tuned, run on every seed, compared, and decided upon."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from nestor.data.tasks import FillerText
from nestor.evaluation.retention import measures
from nestor.evaluation.retention.arms import Arm, Rate, arms_of, levels_of
from nestor.evaluation.retention.decision import decide
from nestor.evaluation.retention.parallel import make_pieces
from nestor.evaluation.retention.pieces import Pieces
from nestor.evaluation.retention.settings import ENDPOINT, FEWEST_UPDATES, RetentionSettings
from nestor.evaluation.scoring import Bar
from nestor.evaluation.statistics import LEVEL
from nestor.evaluation.subjects import Subject
from nestor.jobs import Workers

# Items of old knowledge below which their loss is coarse (spec i.3).
_FEWEST_ITEMS = 500


def measure_retention(
    subject: Subject,
    filler: FillerText,
    settings: RetentionSettings,
    *,
    seeds: Sequence[int] = (0,),
    batch_size: int = 16,
    folder: Path | None = None,
    bar: Bar | None = None,
    workers: Workers | None = None,
) -> dict[str, Any]:
    """Measure one model. The result is JSON.

    Args:
        filler: ordinary text. folder: where finished pieces are kept and found again; None: nowhere.
        workers: processes that make the pieces, for a subject that can be opened again.

    Raises:
        ConfigError: settings that do not fit the model. NonFiniteError: no learning rate of an arm is of use.
        JobError: runs of workers failed.
    """
    settings.check()
    for arm in arms_of(settings):
        if arm.learns:
            levels_of(arm, subject.model, [Rate(0.0, 1.0)] * len(arm.periods), settings, seed=0)
    with ExitStack() as stack:
        several = workers is not None and workers.count > 1
        if several and folder is None:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="nestor-retention-")))
        pieces = Pieces(subject, filler, settings, batch_size=batch_size, folder=folder, bar=bar)
        arms = list(pieces.arms.values())
        if workers is not None and several:
            make_pieces(pieces, seeds, workers)
        tuned = {arm.name: pieces.tuned(arm) for arm in arms}
        records = {arm.name: [pieces.record(arm, seed) for seed in seeds] for arm in arms}
    return {
        "chance": settings.chance,
        "c_max": settings.slowest,
        "endpoint": ENDPOINT,
        "gaps": list(settings.gaps),
        "old_limit": settings.old_limit,
        "seeds": list(seeds),
        "context": pieces.context,
        "arms": {
            arm.name: summarise(arm, records[arm.name], tuned[arm.name], settings, records.get("frozen"))
            for arm in arms
        },
        "decisions": _decisions(arms, records, settings),
        "differences": _differences(arms, records),
        "notes": _notes(pieces, records, seeds),
    }


def summarise(
    arm: Arm,
    records: Sequence[Any],
    tuned: Mapping[str, Any],
    settings: RetentionSettings,
    frozen: Sequence[Any] | None,
) -> dict[str, Any]:
    """The reporting sheet of one arm (spec i.7)."""

    def share(what: str, gap: int | str, kind: str = "seen") -> dict[str, Any]:
        return measures.seeds_interval(measures.pooled(records, what, gap=gap, kind=kind)).as_dict()

    tables = [measures.retention_matrix(record) for record in records]
    transfers = [measures.transfer(*table) for table in tables]
    by_gap = [share("correct", gap) for gap in settings.gaps]
    first = by_gap[0]
    learned = first["estimate"] == 1.0 or (first["low"] is not None and first["low"] > settings.chance)
    life = measures.half_life(
        [gap * settings.slowest for gap in settings.gaps],
        [row["estimate"] for row in by_gap],
        settings.chance,
        learned=bool(learned),
    )
    loss = measures.seeds_interval([measures.old_loss(record) for record in records])
    before, after = np.mean([measures.old_bits(record) for record in records], axis=0).tolist()
    seconds = float(np.mean([record["seconds"] for record in records]))
    return {
        "base": arm.base,
        "optimizer": arm.optimizer,
        "periods": list(arm.periods),
        "tuning": dict(tuned),
        "tokens": records[0]["tokens"],
        "tokens_again": records[0]["tokens_again"],
        "levels": _levels(records),
        "recall_by_gap": by_gap,
        "recall": share("correct", ENDPOINT),
        "recall_by_seed": [float(v.mean()) for v in measures.pooled(records, "correct", gap=ENDPOINT)],
        "margin": share("margin", ENDPOINT),
        "exact": share("exact", ENDPOINT),
        "exact_at_once": share("exact", 0),
        "held_out": share("correct", ENDPOINT, "held_out"),
        "reversed": share("correct", ENDPOINT, "reversed"),
        "untaught": share("correct", ENDPOINT, "untaught"),
        "false_recall": share("recalled", ENDPOINT, "untaught"),
        "at_once": {kind: share("correct", 0, kind) for kind in ("seen", "held_out", "reversed", "untaught")},
        "by_repeats": _by_repeats(records),
        **{name: float(np.mean([getattr(t, name) for t in transfers])) for name in measures.Transfer._fields},
        "forgetting_by_session": np.mean(
            [[max(v for v in row if v is not None) - e for row, e in zip(*t, strict=True)] for t in tables],
            axis=0,
        ).tolist(),
        "forward_transfer": measures.forward_transfer(records, settings.chance).as_dict(),
        "matrix": _mean_matrix(tables),
        "half_life": life._asdict(),
        "old_loss": loss.as_dict(),
        "old_bits_per_byte": {"before": before, "after": after},
        "old_items": int(sum(records[0]["old"]["items"])),
        "old_items_lost": float(np.mean([measures.old_items_lost(record) for record in records])),
        "localisation": _localisation(records),
        "loop_back": _loop_back(records),
        "seconds": seconds,
        "time_over_frozen": _over(seconds, frozen) if arm.learns else None,
        "state_bytes": records[0]["state_bytes"],
    }


def _over(seconds: float, frozen: Sequence[Any] | None) -> float | None:
    plain = float(np.mean([record["seconds"] for record in frozen])) if frozen else 0.0
    return seconds / plain if plain > 0 else None


def _levels(records: Sequence[Any]) -> list[dict[str, Any]]:
    """Of the first seed, with the change as a mean over seeds."""
    found = []
    for number, level in enumerate(records[0]["levels"]):
        change = float(np.mean([record["levels"][number]["change"] for record in records]))
        found.append({**level, "change": change})
    return found


def _by_repeats(records: Sequence[Any]) -> list[dict[str, Any]]:
    """Right just after the session and after the gap, by how often a fact was stated."""
    stated = np.concatenate([np.concatenate(record["repeats"]) for record in records])
    once, later = (np.concatenate(measures.pooled(records, "correct", gap=gap)) for gap in (0, ENDPOINT))
    exact = np.concatenate(measures.pooled(records, "exact", gap=0))
    return [
        {
            "repeats": int(r),
            "n": int((stated == r).sum()),
            "at_once": float(once[stated == r].mean()),
            "recall": float(later[stated == r].mean()),
            "exact_at_once": float(exact[stated == r].mean()),
        }
        for r in np.unique(stated)
    ]


def _mean_matrix(tables: Sequence[tuple[Any, Any]]) -> list[list[float | None]]:
    """Means over seeds of `R[i][j]`, with the end as the last column."""
    count = len(tables[0][1])
    return [
        [
            None if tables[0][0][i][j] is None else float(np.mean([matrix[i][j] for matrix, _ in tables]))
            for j in range(count)
        ]
        + [float(np.mean([end[i] for _, end in tables]))]
        for i in range(count)
    ]


def _localisation(records: Sequence[Any]) -> dict[str, dict[str, float]]:
    """By level, recall at the end that is lost when the level is restored: of all sessions, the first and the
    last half of them."""
    found = {}
    for level in records[0]["localisation"]:
        lost = []
        for record in records:
            whole = [v.mean() for v in measures.answers(record, "correct", gap="end")]
            without = [float(np.mean(v)) for v in record["localisation"][level]]
            lost.append([a - b for a, b in zip(whole, without, strict=True)])
        mean = np.mean(lost, axis=0)
        half = -(-len(mean) // 2)
        found[level] = {
            "all": float(mean.mean()), "early": float(mean[:half].mean()), "late": float(mean[-half:].mean()),
        }  # fmt: skip
    return found


def _loop_back(records: Sequence[Any]) -> dict[str, Any]:
    """Recall at the end, then with the fastest level restored, then after the related text, and what that
    text brought back; empty for an arm without several levels."""
    if not records[0]["loop_back"]:
        return {}
    level = records[0]["loop_back"]["level"]
    steps = {
        "before": measures.pooled(records, "correct", gap="end"),
        "restored": [np.concatenate(record["localisation"][level]).astype(float) for record in records],
        "after": [np.concatenate(record["loop_back"]["correct"]).astype(float) for record in records],
    }
    steps["recovered"] = [b - a for a, b in zip(steps["restored"], steps["after"], strict=True)]
    return {
        "level": level,
        "tokens": records[0]["loop_back"]["tokens"],
        **{name: measures.seeds_interval(values).as_dict() for name, values in steps.items()},
    }


def _decisions(
    arms: Sequence[Arm], records: Mapping[str, Sequence[Any]], settings: RetentionSettings
) -> dict[str, Any]:
    """By optimiser; arms that do not learn take part in each."""
    found = {}
    for optimizer in settings.optimizers:
        found[optimizer] = decide(
            {arm.base: records[arm.name] for arm in arms if arm.optimizer in ("", optimizer)},
            settings.old_limit,
        )
    return found


def _differences(arms: Sequence[Arm], records: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Paired differences of every arm from the continuum with the most levels of the same optimiser."""
    found = []
    for arm in arms:
        mine = [a for a in arms if a.base.startswith("continuum-") and a.optimizer == arm.optimizer]
        if not arm.learns:
            mine = [a for a in arms if a.base.startswith("continuum-")]
        if not mine or arm is mine[-1]:
            continue
        best = mine[-1]
        row: dict[str, Any] = {"arm": arm.name, "baseline": best.name}
        for name, gap in (("at_once", 0), ("recall", ENDPOINT)):
            pairs = zip(
                measures.pooled(records[arm.name], "correct", gap=gap),
                measures.pooled(records[best.name], "correct", gap=gap),
                strict=True,
            )
            row[name] = measures.seeds_interval([a - b for a, b in pairs]).as_dict()
        losses = [
            measures.old_loss(a) - measures.old_loss(b)
            for a, b in zip(records[arm.name], records[best.name], strict=True)
        ]
        row["old_loss"] = measures.seeds_interval(losses).as_dict()
        found.append(row)
    return found


def _leaks(records: Mapping[str, Sequence[Any]], chance: float) -> list[str]:
    """A note on each arm that knows facts before it reads them, at 95 % for all arms together."""
    level = 1 - (1 - LEVEL) / len(records)
    notes = []
    for name, runs in records.items():
        found = measures.forward_transfer(runs, chance, level)
        if found.low is not None and found.low > 0:
            notes.append(
                f"{name} knows facts before it has read them, {100 * (found.estimate or 0.0):.0f} points "
                f"above chance: answers leak into what it reads or is shown, and its recall says nothing"
            )
    return notes


def _notes(pieces: Pieces, records: Mapping[str, Sequence[Any]], seeds: Sequence[int]) -> list[str]:
    subject, settings = pieces.subject, pieces.settings
    notes = _leaks(records, settings.chance)
    if len(seeds) < 5:
        notes.append(
            f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}: the protocol wants at least 5, and fewer say "
            f"little about other streams"
        )
    updates = [
        level["updates"]
        for runs in records.values()
        for level in runs[0]["levels"]
        if level["period"] == settings.slowest
    ]
    if updates and min(updates) < FEWEST_UPDATES:
        notes.append(
            f"levels of period {settings.slowest} made {min(updates)} updates; below {FEWEST_UPDATES} they "
            f"are more a constant than a memory: read more sessions, or give shorter periods"
        )
    items = int(pieces.old.items.sum())
    if items < _FEWEST_ITEMS:
        notes.append(f"{items} tokens of old text were known before; {_FEWEST_ITEMS} are wanted")
    if "in-context" in records and subject.limit is not None:
        tokens = max(len(text) for seed in seeds for text in pieces.stream(seed).texts)
        if tokens + len(subject.prefix) > subject.limit:
            notes.append(
                f"{subject.name} takes {subject.limit} tokens and a session has up to {tokens}: the "
                f"in-context arm sees its last part alone"
            )
    if settings.old == ("self",):
        notes.append("old text is what the unchanged model writes itself")
    return notes
