"""The retention suite over one model: every arm tuned, run on every seed, compared, and decided upon."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from nestor.data.tasks import FillerText
from nestor.evaluation.figures import file_name
from nestor.evaluation.retention import measures
from nestor.evaluation.retention.arms import (
    Arm,
    Rate,
    arms_of,
    given_rates,
    levels_of,
    make_student,
    rates_for,
    unit_steps,
)
from nestor.evaluation.retention.decision import decide
from nestor.evaluation.retention.keeping import Kept
from nestor.evaluation.retention.old import OldKnowledge, old_passages
from nestor.evaluation.retention.run import TokenStream, make_stream, run_arm
from nestor.evaluation.retention.settings import ENDPOINT, FEWEST_UPDATES, RetentionSettings
from nestor.evaluation.retention.tuning import Trial, as_json, choose, tune
from nestor.evaluation.scoring import Progress
from nestor.evaluation.subjects import Subject
from nestor.models.state import fingerprint

FORMAT = 1
# Items of old knowledge below which their loss is coarse (spec i.3).
_FEWEST_ITEMS = 500


# Opens a progress bar of that title, which counts tokens.
Bar = Callable[[str], AbstractContextManager[Progress | None]]


def measure_retention(
    subject: Subject,
    filler: FillerText,
    settings: RetentionSettings,
    *,
    seeds: Sequence[int] = (0,),
    batch_size: int = 16,
    folder: Path | None = None,
    corpus: Mapping[str, Any] | None = None,
    bar: Bar | None = None,
) -> dict[str, Any]:
    """Measure one model. The result is JSON.

    Args:
        filler: ordinary text. folder: where finished arms are kept and found again; None: nowhere.
        corpus: what the filler's content depends on, for the same.

    Raises:
        ConfigError: settings that do not fit the model. NonFiniteError: no learning rate of an arm is of use.
    """
    settings.check()
    suite = _Suite(subject, filler, settings, batch_size, folder, corpus or {}, bar)
    arms = arms_of(settings)
    for arm in arms:
        if arm.learns:
            levels_of(arm, subject.model, [Rate(0.0, 1.0)] * len(arm.periods), settings, seed=0)
    records: dict[str, list[Any]] = {}
    tuned: dict[str, dict[str, Any]] = {}
    for arm in arms:
        tuned[arm.name] = suite.tuned(arm, tuned)
        records[arm.name] = [suite.record(arm, tuned[arm.name], seed) for seed in seeds]
    return {
        "chance": settings.chance,
        "c_max": settings.slowest,
        "endpoint": ENDPOINT,
        "gaps": list(settings.gaps),
        "old_limit": settings.old_limit,
        "seeds": list(seeds),
        "context": suite.context,
        "arms": {
            arm.name: summarise(arm, records[arm.name], tuned[arm.name], settings, records.get("frozen"))
            for arm in arms
        },
        "decisions": _decisions(arms, records, settings),
        "differences": _differences(arms, records),
        "notes": _notes(subject, suite, arms, records, settings, seeds),
    }


class _Suite:
    """One model with its streams, old text, and what is finished."""

    def __init__(
        self,
        subject: Subject,
        filler: FillerText,
        settings: RetentionSettings,
        batch_size: int,
        folder: Path | None,
        corpus: Mapping[str, Any],
        bar: Bar | None,
    ) -> None:
        self.subject, self.settings = subject, settings
        self._filler, self._batch_size, self._bar = (
            filler,
            batch_size,
            bar or (lambda title: nullcontext(None)),
        )
        limit = subject.limit or 2048
        self.context = min(settings.context or 2048, limit)
        passages = (settings.old_passages, settings.old_length)
        self.old = OldKnowledge(subject, old_passages(subject, settings.old, *passages), batch_size)
        self._fisher = lambda: old_passages(subject, settings.old, *passages, use="fisher")
        # Arms, optimisers or seeds that are added later, and another limit, leave what is finished as it is.
        free = {"arms", "optimizers", "old_limit"}
        if not settings.learning_rates:
            free |= {"learning_rates", "largest_update"}
        shared = {k: v for k, v in asdict(settings).items() if k not in free}
        depends = {
            "format": FORMAT,
            "settings": shared,
            "corpus": corpus,
            "model": fingerprint(subject.model),
            "tokenizer": subject.describe()["tokenizer"],
        }
        self._kept = Kept(None if folder is None else folder / file_name(subject.name), depends)
        self._streams: dict[tuple[int, str], TokenStream] = {}

    def tuned(self, arm: Arm, others: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """The trials of an arm and the learning rates that they chose, or those that are given, as JSON."""
        if not arm.learns:
            return {"trials": [], "step": None, "rates": [], "rates_of": ""}
        if arm.rates_of:
            return {**others[arm.rates_of], "trials": [], "rates_of": arm.rates_of}
        if given := given_rates(arm, self.settings):
            return {"trials": [], "step": None, "rates": [asdict(rate) for rate in given], "rates_of": ""}
        tried = self._kept.get(f"{_piece(arm)}-tuning", lambda: self._tune(arm))
        best = choose([Trial(**trial) for trial in tried["trials"]], self.settings.old_limit)
        rates = [asdict(rate) for rate in rates_for(best.step, tried["units"])]
        return {"trials": tried["trials"], "step": best.step, "rates": rates, "rates_of": ""}

    def record(self, arm: Arm, tuned: Mapping[str, Any], seed: int) -> Any:
        """What came of an arm on a seed's stream."""
        rates = [Rate(**rate) for rate in tuned["rates"]]
        step = "" if tuned["step"] is None else f"-step-{tuned['step']:g}"
        name = f"{_piece(arm)}{step}-seed-{seed}"
        return self._kept.get(name, lambda: self._run(arm, rates, seed, f"{arm.name}, seed {seed}"))

    def _tune(self, arm: Arm) -> dict[str, Any]:
        ids = self._stream(0, "tuning").ids
        units = unit_steps(arm, self.subject.model, ids, self.settings, self.context)

        def run(step: float) -> Any:
            return self._run(arm, rates_for(step, units), 0, f"{arm.name}, trying {step:g}", "tuning")

        return {"trials": as_json(tune(run, self.settings)), "units": units}

    def _run(
        self, arm: Arm, rates: Sequence[Rate], seed: int, title: str, stream: str = "test"
    ) -> dict[str, Any]:
        texts = self._stream(seed, stream)
        with self._bar(f"retention: {self.subject.name}, {title}") as progress:
            old = self._fisher() if arm.pull else ()
            student = make_student(
                arm,
                self.subject.model,
                rates,
                self.settings,
                self.context,
                old=old,
                seed=seed,
                progress=progress,
            )
            return run_arm(
                self.subject, student, texts, self.settings, self.old, endpoint_only=stream == "tuning",
                batch_size=self._batch_size,
            )  # fmt: skip

    def _stream(self, seed: int, stream: str) -> TokenStream:
        if (seed, stream) not in self._streams:
            made = make_stream(self.settings, self._filler, self.subject.tokenizer, seed, stream)
            self._streams[seed, stream] = made
        return self._streams[seed, stream]


def _piece(arm: Arm) -> str:
    """The arm as files of pieces call it, whatever other optimisers are run."""
    return f"{arm.base}-{'x'.join(map(str, arm.periods))}-{arm.optimizer}" if arm.learns else arm.base


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
        "matrix": _mean_matrix(tables),
        "half_life": life._asdict(),
        "old_loss": loss.as_dict(),
        "old_bits_per_byte": {"before": before, "after": after},
        "old_items": int(sum(records[0]["old"]["items"])),
        "old_items_lost": float(np.mean([measures.old_items_lost(record) for record in records])),
        "localisation": _localisation(records),
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


def _notes(
    subject: Subject,
    suite: _Suite,
    arms: Sequence[Arm],
    records: Mapping[str, Sequence[Any]],
    settings: RetentionSettings,
    seeds: Sequence[int],
) -> list[str]:
    notes = []
    if len(seeds) < 5:
        notes.append(
            f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}: the protocol wants at least 5, and fewer say "
            f"little about other streams"
        )
    updates = [
        level["updates"]
        for arm in arms
        for level in records[arm.name][0]["levels"]
        if level["period"] == settings.slowest
    ]
    if updates and min(updates) < FEWEST_UPDATES:
        notes.append(
            f"levels of period {settings.slowest} made {min(updates)} updates; below {FEWEST_UPDATES} they "
            f"are more a constant than a memory: read more sessions, or give shorter periods"
        )
    items = int(suite.old.items.sum())
    if items < _FEWEST_ITEMS:
        notes.append(f"{items} tokens of old text were known before; {_FEWEST_ITEMS} are wanted")
    if "in-context" in records and subject.limit is not None:
        tokens = max(len(text) for seed in seeds for text in suite._stream(seed, "test").texts)
        if tokens + len(subject.prefix) > subject.limit:
            notes.append(
                f"{subject.name} takes {subject.limit} tokens and a session has up to {tokens}: the "
                f"in-context arm sees its last part alone"
            )
    if settings.old == ("self",):
        notes.append("old text is what the unchanged model writes itself")
    return notes
