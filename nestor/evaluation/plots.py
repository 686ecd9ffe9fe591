"""Plots of the suites: matplotlib without a display, one style, PNG bytes in a light and a dark variant.

Colours are those of Okabe and Ito, which stay apart for colour-blind readers; every series also has a
marker and a dash pattern of its own, so that a black-and-white print can be read. Intervals are bands.
Nothing here touches pyplot's global state: a figure is made, rendered and dropped.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MultipleLocator, NullFormatter

from nestor.errors import DataError
from nestor.files import atomic_write

DPI = 160
# Height of a line of names, as a share of the axes.
_ROW = 0.07
# Okabe and Ito, "Color Universal Design" (2008); black and yellow vanish on one of the grounds.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)), (0, (1, 1)), (0, (8, 3)))


@dataclass(frozen=True)
class Theme:
    ground: str
    ink: str
    faint: str
    colours: tuple[str, ...] = COLOURS
    heat: str = "cividis"


LIGHT = Theme(ground="#ffffff", ink="#1f2328", faint="#d5d9de")
# Brighter blue and vermilion: the two of the light palette are dim on a dark ground.
DARK = Theme(
    ground="#161b22",
    ink="#e6edf3",
    faint="#333b45",
    colours=("#4da3e0", "#f0834a", "#2fc79a", "#dd97bd", "#8fd0f5", "#f0b83a"),
)


@dataclass(frozen=True)
class Plot:
    """One picture: PNG bytes for a light page, PNG bytes for a dark one, and words for who cannot see it."""

    light: bytes
    dark: bytes
    alt: str

    def write(self, path: str | Path) -> Path:
        """Write the light picture to `path`, atomically; returns the path."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target) as temporary:
            Path(temporary).write_bytes(self.light)
        return target


@dataclass(frozen=True)
class Series:
    """A curve: x and y, and the ends of the interval at each x (None where there is none)."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    steps: Sequence[float] | None = None
    """Edges of the bins [len(x) + 1]; given, the curve is drawn as steps over them instead of points at x."""
    of: int | None = None
    """Number of the series that this one is compared with: drawn dotted in its colour, without points."""


@dataclass(frozen=True)
class Mark:
    """A vertical (or, with `horizontal`, a horizontal) line with its name.

    `series` is the number of the curve whose colour it takes; None draws it in ink.
    """

    value: float
    label: str
    series: int | None = None
    horizontal: bool = False


@dataclass(frozen=True)
class Point:
    """A point with its name, and the ends of its intervals (None where there is none)."""

    name: str
    x: float
    y: float
    x_ends: tuple[float | None, float | None] = (None, None)
    y_ends: tuple[float | None, float | None] = (None, None)


@dataclass(frozen=True)
class Axes:
    """Labels (with units) and scales of a curve plot."""

    title: str
    x: str
    y: str
    log_x: bool = True
    y_range: tuple[float, float] | None = None
    percent: bool = False
    marks: Sequence[Mark] = field(default_factory=tuple)


def curves(series: Sequence[Series], axes: Axes, alt: str = "") -> Plot:
    """Curves with bands, and marks.

    Raises:
        DataError: no series, or one whose x and y differ in length.
    """
    if not series:
        raise DataError("a plot needs at least one series")
    for item in series:
        if len(item.x) != len(item.y):
            raise DataError(f"series {item.name!r} has {len(item.x)} x and {len(item.y)} y values")
    return _both(lambda theme: _draw_curves(series, axes, theme), alt or axes.title)


def scatter(points: Sequence[Point], axes: Axes, alt: str = "") -> Plot:
    """Points with their intervals, and marks.

    Raises:
        DataError: no points.
    """
    if not points:
        raise DataError("a plot needs at least one point")
    return _both(lambda theme: _draw_curves(points, axes, theme), alt or axes.title)


def heatmap(
    values: Sequence[Sequence[float | None]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    x: str,
    y: str,
    label: str,
    alt: str = "",
) -> Plot:
    """A grid of proportions 0..1, each cell with its number; None is drawn as an empty cell.

    Args:
        values: [len(rows)][len(columns)].
    """
    if len(values) != len(rows) or any(len(row) != len(columns) for row in values):
        raise DataError(f"a heatmap of {len(rows)} rows and {len(columns)} columns needs as many values")
    grid = np.array([[np.nan if v is None else v for v in row] for row in values], dtype=np.float64)
    return _both(lambda theme: _draw_heatmap(grid, rows, columns, (title, x, y, label), theme), alt or title)


def _both(draw: Callable[[Theme], Figure], alt: str) -> Plot:
    return Plot(light=_png(draw(LIGHT)), dark=_png(draw(DARK)), alt=alt)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    # Without the software tag the same numbers give the same bytes.
    figure.savefig(
        buffer, format="png", dpi=DPI, facecolor=figure.get_facecolor(), metadata={"Software": None}
    )
    return buffer.getvalue()


def _figure(title: str, theme: Theme, size: tuple[float, float]) -> tuple[Figure, Any]:
    figure = Figure(figsize=size, facecolor=theme.ground, layout="constrained")
    ax = figure.add_subplot()
    ax.set_facecolor(theme.ground)
    ax.set_title(title, color=theme.ink, fontsize=12, fontweight="bold", loc="left", pad=10)
    for spine in ax.spines.values():
        spine.set_color(theme.faint)
    ax.tick_params(colors=theme.ink, labelsize=9.5)
    return figure, ax


def _draw_curves(series: Sequence[Series | Point], axes: Axes, theme: Theme) -> Figure:
    figure, ax = _figure(axes.title, theme, (7.6, 4.4))
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, color=theme.faint, linewidth=0.6, alpha=0.8)
    ax.set_axisbelow(True)
    for number, item in enumerate(series):
        if isinstance(item, Point):
            _draw_point(ax, item, number, theme)
        else:
            _draw_series(ax, item, number, theme)
    ax.set_xlabel(axes.x, color=theme.ink, fontsize=10.5)
    ax.set_ylabel(axes.y, color=theme.ink, fontsize=10.5)
    if axes.log_x:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
        ax.xaxis.set_minor_formatter(NullFormatter())
    else:
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
        low, high = ax.get_xlim()
        if high >= 10_000:
            # Thousands are 1,024: other places than multiples of a power of two have no short names.
            ax.xaxis.set_major_locator(MultipleLocator(2 ** round(np.log2((high - low) / 8))))
    if axes.percent:
        ax.set_yticks(np.linspace(0, 1, 6))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    if axes.y_range is not None:
        ax.set_ylim(*axes.y_range)
    _draw_marks(ax, axes.marks, theme)
    handles = ax.get_legend_handles_labels()[0]
    if handles:
        figure.legend(
            loc="outside lower center",
            # Four entries make two rows of two: a curve stands above its dotted companion.
            ncols=min(2 if len(handles) == 4 else 3, len(handles)),
            frameon=False,
            labelcolor=theme.ink,
            fontsize=9.5,
            handlelength=3,
        )
    return figure


def _draw_series(ax: Any, item: Series, number: int, theme: Theme) -> None:
    colour = theme.colours[number % len(theme.colours)]
    dash = DASHES[number % len(DASHES)]
    y = _floats(item.y)
    low = _floats(item.low) if item.low is not None else None
    high = _floats(item.high) if item.high is not None else None
    if item.steps is not None:
        edges = np.asarray(item.steps, dtype=np.float64)
        ax.stairs(y, edges, baseline=None, color=colour, linewidth=2, linestyle=dash, label=item.name)
        if low is not None and high is not None:
            # A band over bins: each value holds from its left edge to its right one.
            corners = np.repeat(edges, 2)[1:-1]
            ax.fill_between(
                corners, np.repeat(low, 2), np.repeat(high, 2), color=colour, alpha=0.18, linewidth=0
            )
        return
    x = np.asarray(item.x, dtype=np.float64)
    if item.of is not None:
        colour = theme.colours[item.of % len(theme.colours)]
        ax.plot(x, y, color=colour, linewidth=1.3, linestyle=(0, (1, 2)), label=item.name)
        return
    marker = MARKERS[number % len(MARKERS)]
    (line,) = ax.plot(x, y, color=colour, linewidth=2, linestyle=dash, marker=marker, label=item.name)
    line.set(markersize=5.5, markeredgecolor=theme.ground, markeredgewidth=0.8)
    if low is not None and high is not None:
        ax.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def _draw_point(ax: Any, item: Point, number: int, theme: Theme) -> None:
    # From the seventh on, other shapes go with the same colours.
    turn = number // len(MARKERS)
    colour, marker = theme.colours[number % len(theme.colours)], MARKERS[(number + turn) % len(MARKERS)]
    for ends, horizontal in ((item.x_ends, True), (item.y_ends, False)):
        if ends[0] is not None and ends[1] is not None:
            x, y = (ends, (item.y, item.y)) if horizontal else ((item.x, item.x), ends)
            ax.plot(x, y, color=colour, linewidth=1.2, alpha=0.6)
    ax.plot(
        [item.x], [item.y], linestyle="", color=colour, marker=marker, markersize=8,
        markeredgecolor=theme.ground, label=item.name,
    )  # fmt: skip


def _draw_marks(ax: Any, marks: Sequence[Mark], theme: Theme) -> None:
    """Lines with their names in a free band above the curves, a row for each vertical line."""
    for mark in (mark for mark in marks if mark.horizontal):
        colour = theme.ink if mark.series is None else theme.colours[mark.series % len(theme.colours)]
        ax.axhline(mark.value, color=colour, linewidth=1.1, linestyle=(0, (1, 2)), label=mark.label)
    vertical = sorted((mark for mark in marks if not mark.horizontal), key=lambda mark: mark.value)
    if not vertical:
        return
    ticks = ax.get_yticks()
    low, high = ax.get_ylim()
    band = _ROW * len(vertical) + 0.01
    ax.set_ylim(low, low + (high - low) / (1 - band))
    ax.set_yticks([tick for tick in ticks if low <= tick <= high])
    # A line at the right edge has its name on its left.
    middle = ax.transAxes.inverted()
    for row, mark in enumerate(vertical):
        colour = theme.ink if mark.series is None else theme.colours[mark.series % len(theme.colours)]
        ax.axvline(mark.value, color=colour, linewidth=1.3, linestyle=(0, (3, 2)))
        place = middle.transform(ax.transData.transform((mark.value, low)))[0]
        ax.annotate(
            mark.label,
            xy=(mark.value, 0.985 - _ROW * row),
            xycoords=("data", "axes fraction"),
            xytext=(4 if place < 0.7 else -4, 0),
            textcoords="offset points",
            color=colour,
            fontsize=9,
            va="top",
            ha="left" if place < 0.7 else "right",
            bbox={"facecolor": theme.ground, "edgecolor": "none", "alpha": 0.75, "pad": 1.2},
        )


def _draw_heatmap(
    grid: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    words: tuple[str, str, str, str],
    theme: Theme,
) -> Figure:
    title, x, y, label = words
    height = 1.7 + 0.42 * max(3, len(rows))
    figure, ax = _figure(title, theme, (min(11.0, 3.2 + 0.75 * max(4, len(columns))), height))
    colours = matplotlib.colormaps[theme.heat].with_extremes(bad=theme.faint)
    image = ax.imshow(np.ma.masked_invalid(grid), cmap=colours, vmin=0, vmax=1, aspect="auto")
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows)
    ax.set_xlabel(x, color=theme.ink, fontsize=10.5)
    ax.set_ylabel(y, color=theme.ink, fontsize=10.5)
    ax.tick_params(length=0)
    for (i, j), value in np.ndenumerate(grid):
        if np.isfinite(value):
            # White on the dark half of cividis, near-black on the bright half.
            ax.text(
                j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=9,
                color="#ffffff" if value < 0.55 else "#14171a",
            )  # fmt: skip
    bar = figure.colorbar(image, ax=ax, format=FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    bar.set_label(label, color=theme.ink, fontsize=10)
    bar.ax.tick_params(colors=theme.ink, labelsize=9)
    bar.outline.set_edgecolor(theme.faint)
    return figure


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def short_count(value: float) -> str:
    """512 -> '512', 4096 -> '4k', 65536 -> '64k', 1.5 -> '1.5'; thousands are 1,024 as lengths of text
    are.
    """
    if value >= 1024 and float(value / 1024).is_integer():
        return f"{value / 1024:.0f}k"
    if value >= 10_000:
        return f"{value / 1024:.3g}k"
    return f"{value:g}"
