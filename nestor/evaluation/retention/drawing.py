"""Plots and tables of the retention suite, from the results as they stand in the JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nestor.evaluation.figures import Figure, file_name
from nestor.evaluation.plots import Axes, Mark, Point, Series, curves, heatmap, scatter
from nestor.evaluation.report import Section, number, percent, with_interval

_SHOWN = 6


def retention_figures(
    results: Mapping[str, Mapping[str, Any]], models: Sequence[Mapping[str, Any]]
) -> list[Figure]:
    """For each model recall over the gap, recall against old knowledge lost, the trials, and two matrices."""
    del models
    figures = []
    for name, result in results.items():
        stem = f"retention-{file_name(name)}"
        chosen = _main_arms(result["arms"])
        figures.append(Figure(f"{stem}-gap", _over_gap(name, result, chosen), _GAP_CAPTION))
        figures.append(Figure(f"{stem}-pareto", _pareto(name, result), _PARETO_CAPTION))
        if any(arm["tuning"]["trials"] for arm in result["arms"].values()):
            figures.append(Figure(f"{stem}-trials", _trials(name, result), _TRIALS_CAPTION))
        for arm in [a for a in chosen if result["arms"][a]["levels"]][:3]:
            grid = result["arms"][arm]["matrix"]
            figures.append(
                Figure(
                    f"{stem}-matrix-{file_name(arm)}",
                    heatmap(
                        grid,
                        rows=[str(i + 1) for i in range(len(grid))],
                        columns=[*(str(i + 1) for i in range(len(grid))), "end"],
                        title=f"{name}: {arm}",
                        x="asked just after session",
                        y="facts of session",
                        label="right among the candidates",
                        alt=f"Share of right answers of {arm} by session asked about and session just read.",
                    ),
                    f"Each row is a session's facts; chance is {100 * result['chance']:.0f} %. The last "
                    f"column is after the last gap.",
                )
            )
    return figures


_GAP_CAPTION = (
    "The same facts asked with the context closed and learning off, right after their session and after "
    "other text. Bands are 95 % intervals over seeds and facts."
)
_PARETO_CAPTION = (
    "Up is better, left is better: what is still known of the stream, against what it cost of old knowledge. "
    "Bars are 95 % intervals."
)
_TRIALS_CAPTION = (
    "The tuning stream: every step that was tried, from the least to the greatest. The one with the highest "
    "recall left of the limit was taken."
)


def _main_arms(arms: Mapping[str, Any]) -> list[str]:
    """At most six, the continuum with the most levels first."""
    several = [name for name in arms if name.startswith("continuum-")]
    order = [*several[-1:], "single-fast", "single-slow", "equal-periods", "frozen", "in-context"]
    found = [name for one in order for name in arms if name == one or name.startswith(f"{one} ")]
    return list(dict.fromkeys([*found, *arms]))[:_SHOWN]


def _over_gap(name: str, result: Mapping[str, Any], chosen: Sequence[str]) -> Any:
    gaps = [gap * result["c_max"] for gap in result["gaps"]]
    series = [Series(arm, gaps, *_columns(result["arms"][arm]["recall_by_gap"])) for arm in chosen]
    marks = [Mark(result["chance"], "chance", None, horizontal=True)]
    axes = Axes(
        f"{name}: recall of facts over the gap", "other text since the session (tokens)",
        "right among the candidates", log_x=False, y_range=(-0.03, 1.05), percent=True, marks=marks,
    )  # fmt: skip
    return curves(series, axes, f"Recall of {name} against the length of the gap, a curve for each arm.")


def _pareto(name: str, result: Mapping[str, Any]) -> Any:
    points = [
        Point(
            arm,
            100 * (row["old_loss"]["estimate"] or 0.0),
            row["recall"]["estimate"],
            _scaled(row["old_loss"]),
            (row["recall"]["low"], row["recall"]["high"]),
        )
        for arm, row in result["arms"].items()
    ]
    marks = [
        Mark(result["chance"], "chance", None, horizontal=True),
        Mark(100 * result["old_limit"], f"limit of {100 * result['old_limit']:g} %"),
    ]
    axes = Axes(
        f"{name}: recall against old knowledge lost", "rise of the bits of old text (%)",
        "right after the gap", log_x=False, y_range=(-0.03, 1.05), percent=True, marks=marks,
    )  # fmt: skip
    return scatter(points, axes, f"Recall of each arm of {name} against what it lost of old knowledge.")


def _scaled(interval: Mapping[str, Any]) -> tuple[float | None, float | None]:
    return tuple(None if interval[k] is None else 100 * interval[k] for k in ("low", "high"))  # type: ignore[return-value]


def _trials(name: str, result: Mapping[str, Any]) -> Any:
    series = []
    for arm, row in result["arms"].items():
        trials = [t for t in row["tuning"]["trials"] if t["old_loss"] is not None]
        if trials:
            # A loss of 0 or below has no place on a logarithmic axis; a ten-thousandth stands for it.
            x = [max(100 * t["old_loss"], 1e-2) for t in trials]
            series.append(Series(arm, x, [t["recall"] for t in trials]))
    marks = [
        Mark(result["chance"], "chance", None, horizontal=True),
        Mark(100 * result["old_limit"], f"limit of {100 * result['old_limit']:g} %"),
    ]
    axes = Axes(
        f"{name}: what each step gives", "rise of the bits of old text (%, log scale)", "right after the gap",
        y_range=(-0.03, 1.05), percent=True, marks=marks,
    )  # fmt: skip
    return curves(series, axes, "Recall against old knowledge lost on the tuning stream, by step.")


def _columns(intervals: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[Any], list[Any]]:
    return tuple([one[key] for one in intervals] for key in ("estimate", "low", "high"))  # type: ignore[return-value]


def headline(model: Mapping[str, Any]) -> dict[str, str]:
    """Of the summary: the decision in a word or two, and recall of the arms that it is about."""
    found = {}
    for optimizer, decision in model["decisions"].items():
        word = {True: "supported", False: "not supported", None: "not decided"}[decision["supported"]]
        found[f"retention claim ({optimizer})"] = word
    for arm in _main_arms(model["arms"])[:4]:
        found[f"retention: {arm}"] = with_interval(model["arms"][arm]["recall"], as_percent=True)
    return found


def retention_tables(section: Section, part: Mapping[str, Any]) -> None:
    """The decision in words, and the reporting sheet."""
    for name, model in part["models"].items():
        section.heading(name)
        _explain(section, model)
        for optimizer, decision in model["decisions"].items():
            section.text(f"Decision with {optimizer}: {decision['words']}")
            rows = [
                [
                    f"({c['condition']}) {c['claim']}",
                    {True: "yes", False: "no", None: "-"}[c["holds"]],
                    c["words"],
                ]
                for c in decision["conditions"]
            ]
            section.table(
                ["condition", "holds", "found"], rows, "The rule was fixed beforehand.", left=(0, 1, 2)
            )
        _sheet(section, model)
        _costs(section, model)
        _places(section, model)


def _explain(section: Section, model: Mapping[str, Any]) -> None:
    gap = model["endpoint"] * model["c_max"]
    section.text(
        f"Facts that nobody knew are read in sessions of text; then the context is closed and the model is "
        f"asked with learning off. The endpoint is the share of right answers among the candidates (chance "
        f"{100 * model['chance']:.0f} %) after {gap:,} tokens of other text, at a rise of old text's bits "
        f"of at most {100 * model['old_limit']:g} %. {_tuned(model['arms'])} Intervals resample seeds, and "
        f"facts within each."
    )


def _tuned(arms: Mapping[str, Any]) -> str:
    """Where learning rates come from."""
    chosen = "step was chosen on another stream after the same number of trials."
    learning = [name for name, row in arms.items() if row["tuning"]["rates"]]
    given = [name for name in learning if arms[name]["tuning"]["step"] is None]
    if not given:
        return f"Each arm's {chosen}"
    text = f"Learning rates of {', '.join(given)} were given."
    return text if len(given) == len(learning) else f"{text} Of the other arms the {chosen}"


def _sheet(section: Section, model: Mapping[str, Any]) -> None:
    arms = model["arms"]
    columns = ["arm", "at once", "after the gap", "at the end", "forgotten", "BWT", "FWT"]
    columns += ["half-life (tokens)"]
    rows = [
        [
            name,
            with_interval(row["recall_by_gap"][0], as_percent=True),
            with_interval(row["recall"], as_percent=True),
            percent(row["accuracy"]),
            percent(row["forgetting"]),
            percent(row["backward"]),
            with_interval(row["forward_transfer"], as_percent=True),
            f"{row['half_life']['tokens']:,.0f}"
            if row["half_life"]["tokens"]
            else row["half_life"]["reason"],
        ]
        for name, row in arms.items()
    ]
    section.table(
        columns, rows,
        "Right among the candidates. FWT is what is right of a session just before it is read, less chance: "
        "above 0, answers leak.",
        left=(0, 7),
    )  # fmt: skip
    columns = ["arm", "held-out wording", "reversed", "untaught", "false recall", "exact", "margin (nats)"]
    rows = [
        [
            name,
            *(with_interval(row[key], as_percent=True) for key in ("held_out", "reversed", "untaught")),
            with_interval(row["false_recall"], as_percent=True),
            with_interval(row["exact"], as_percent=True),
            with_interval(row["margin"], digits=2),
        ]
        for name, row in arms.items()
    ]
    section.table(
        columns, rows,
        "After the gap. Untaught entities must stay at chance; false recall is a taught value given to them "
        "by greedy decoding; exact counts stated wordings that greedy decoding completes.",
    )  # fmt: skip
    stated = [str(r["repeats"]) for r in next(iter(arms.values()))["by_repeats"]]
    columns = [
        "arm",
        *(f"stated {r}: {what}" for r in stated for what in ("at once", "exact", "after the gap")),
    ]
    rows = [
        [name]
        + [percent(r[key]) for r in row["by_repeats"] for key in ("at_once", "exact_at_once", "recall")]
        for name, row in arms.items()
    ]
    section.table(columns, rows, "By how often a fact was stated.")


def _costs(section: Section, model: Mapping[str, Any]) -> None:
    columns = ["arm", "step", "old text, rise of bits", "old items lost", "tokens", "again"]
    columns += ["updates (change)", "time over frozen", "state (MB)"]
    rows = []
    for name, row in model["arms"].items():
        levels = ", ".join(f"{one['updates']} ({one['change']:.1e})" for one in row["levels"]) or "-"
        loss = {key: None if value is None else 100 * value for key, value in row["old_loss"].items()
                if key in ("estimate", "low", "high")}  # fmt: skip
        given = ", ".join(f"{rate['learning_rate']:.3g}" for rate in row["tuning"]["rates"])
        given = f"rates {given}" if given else "-"
        step = given if row["tuning"]["step"] is None else f"{row['tuning']['step']:.2g}"
        rows.append(
            [
                name,
                f"{step} of {row['tuning']['rates_of']}" if row["tuning"]["rates_of"] else step,
                with_interval(loss, digits=2) + " %",
                percent(row["old_items_lost"], 1),
                f"{row['tokens']:,}",
                f"{row['tokens_again']:,}",
                levels,
                number(row["time_over_frozen"], 1),
                number(row["state_bytes"] / 1e6, 1),
            ]
        )
    section.table(
        columns, rows, "What it cost. Steps are shares of the norm of a level's weights.", left=(0, 6)
    )
    rows = [
        [
            f"{row['arm']} minus {row['baseline']}",
            with_interval(row["at_once"], as_percent=True),
            with_interval(row["recall"], as_percent=True),
            with_interval(row["old_loss"], digits=4),
        ]
        for row in model["differences"]
    ]
    if rows:
        section.table(
            ["difference", "at once", "after the gap", "rise of old text's bits (share)"], rows,
            "Paired differences on the same facts and passages.",
        )  # fmt: skip


def _places(section: Section, model: Mapping[str, Any]) -> None:
    rows = [
        [name, level, percent(lost["all"], 1), percent(lost["early"], 1), percent(lost["late"], 1)]
        for name, row in model["arms"].items()
        for level, lost in row["localisation"].items()
    ]
    if rows:
        section.table(
            ["arm", "level restored", "recall lost", "first half of the sessions", "last half"],
            rows,
            "Where it is kept: recall at the end that is lost when one level is as it was before. If "
            "restoring slow levels costs nothing, they keep nothing.",
            left=(0, 1),
        )
    rows = [
        [
            name,
            back["level"],
            *(with_interval(back[key], as_percent=True) for key in ("before", "restored", "after")),
            with_interval(back["recovered"], as_percent=True),
        ]
        for name, row in model["arms"].items()
        if (back := row["loop_back"])
    ]
    if rows:
        section.table(
            ["arm", "level restored", "before", "right after", "after related text", "recovered"],
            rows,
            f"Loop-back: recall at the end, with the fastest level as it was before, and after all levels "
            f"have read {model['c_max']:,} tokens of sentences of the same kinds, of other entities and "
            f"values. What comes back without the facts was kept by slower levels.",
            left=(0, 1),
        )
