"""A report as one HTML file: text, tables, plots, samples, settings and commands in sections.

    report = Report("Two models on one text", subtitle="3 May 2026, CPU")
    report.section("Summary").facts([("recall at 1,024 bytes", "93 %", "transformer: 0 %")])
    report.section("Plots").plot(plot, "What one should see in it.")
    report.write("report.html")

The file refers to nothing outside of itself: styles are inline, pictures are data URLs, and there is no
script. All text is escaped, whatever it is: samples come from models and names from users.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nestor.errors import DataError
from nestor.evaluation.plots import Plot
from nestor.evaluation.template import PAGE
from nestor.files import write_text

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Section:
    """A titled part of a report; every method adds one block and returns the section."""

    def __init__(self, title: str, identifier: str) -> None:
        self.title = title
        self.id = identifier
        self.blocks: list[dict[str, Any]] = []

    def text(self, text: str, *, note: bool = False) -> Section:
        """A paragraph; `note` sets it apart from the argument."""
        return self._add("text", text=text, note=note)

    def heading(self, text: str) -> Section:
        """A heading inside the section."""
        return self._add("heading", text=text)

    def facts(self, facts: Sequence[tuple[str, str] | tuple[str, str, str]]) -> Section:
        """Figures that stand out: (label, value) or (label, value, detail)."""
        named = [{"label": f[0], "value": f[1], "detail": f[2] if len(f) > 2 else ""} for f in facts]
        return self._add("facts", facts=named)

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[Any]],
        caption: str = "",
        *,
        left: Sequence[int] = (0,),
    ) -> Section:
        """A table; columns whose numbers are in `left` are set flush left, the others flush right.

        Raises:
            DataError: a row has more or fewer cells than there are columns.
        """
        for row in rows:
            if len(row) != len(columns):
                raise DataError(f"a row of {len(row)} cells does not fit {len(columns)} columns: {list(row)}")
        heads = [{"name": name, "left": number in left} for number, name in enumerate(columns)]
        return self._add(
            "table", columns=heads, rows=[[str(c) for c in row] for row in rows], caption=caption
        )

    def plot(self, plot: Plot, caption: str = "") -> Section:
        """A picture, in its dark variant where the reader's page is dark."""
        light, dark = (base64.b64encode(png).decode("ascii") for png in (plot.light, plot.dark))
        return self._add("plot", light=light, dark=dark, alt=plot.alt, caption=caption)

    def sample(
        self,
        parts: Sequence[tuple[str, str]] | Mapping[str, str],
        title: str = "",
        *,
        right: bool | None = None,
    ) -> Section:
        """Labelled pieces of text (question, answer ...); `right` marks it as right or wrong."""
        pairs = list(parts.items()) if isinstance(parts, Mapping) else list(parts)
        mark = "" if right is None else "right" if right else "wrong"
        return self._add("sample", parts=pairs, title=title, mark=mark)

    def settings(self, title: str, settings: Mapping[str, Any], *, open: bool = False) -> Section:
        """A nested mapping as a table that folds; inner names are joined with dots."""
        return self._add("settings", title=title, settings=flatten(settings), open=open)

    def commands(self, commands: Sequence[tuple[str, str]]) -> Section:
        """(what it does, command line) pairs."""
        return self._add("commands", commands=list(commands))

    def _add(self, kind: str, **values: Any) -> Section:
        self.blocks.append({"kind": kind, **values})
        return self


class Report:
    """Sections in the order of their first mention; `section` of a title that is there returns it."""

    def __init__(self, title: str, subtitle: str = "", footer: str = "") -> None:
        self.title = title
        self.subtitle = subtitle
        self.footer = footer
        self.sections: list[Section] = []

    def section(self, title: str) -> Section:
        for section in self.sections:
            if section.title == title:
                return section
        base = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
        taken = {section.id for section in self.sections}
        identifier, number = base, 2
        while identifier in taken:
            identifier, number = f"{base}-{number}", number + 1
        self.sections.append(Section(title, identifier))
        return self.sections[-1]

    def render(self) -> str:
        """The page as HTML text."""
        from jinja2 import Environment, StrictUndefined

        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
        page = environment.from_string(PAGE).render(
            title=self.title, subtitle=self.subtitle, footer=self.footer, sections=self.sections
        )
        return printable(page)

    def write(self, path: str | Path) -> Path:
        """Write the page, atomically; returns the path."""
        write_text(path, self.render())
        return Path(path)


def printable(text: str) -> str:
    """`text` with a replacement character for every control character but tab and line end: models of bytes
    write them, and neither a page nor a terminal should take them at their word."""
    return _CONTROLS.sub("\ufffd", text)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """`{"a": {"b": 1}}` to `[("a.b", "1")]`; lists are written as JSON, strings as they are."""
    rows: list[tuple[str, str]] = []
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            rows += flatten(value, f"{key}.")
        else:
            rows.append((key, value if isinstance(value, str) else json.dumps(value, default=str)))
    return rows


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table; None is a dash."""
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 0) -> str:
    """A proportion in percent; None is a dash."""
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def with_interval(interval: Mapping[str, Any] | None, *, digits: int = 3, as_percent: bool = False) -> str:
    """`1.234 [1.200, 1.270]`, or without brackets where there is no interval."""
    if interval is None or interval["estimate"] is None:
        return "-"
    scale, places = (100, 0) if as_percent else (1, digits)
    unit = " %" if as_percent else ""
    text = f"{scale * interval['estimate']:.{places}f}{unit}"
    if interval["low"] is None:
        return text
    return f"{text} [{scale * interval['low']:.{places}f}, {scale * interval['high']:.{places}f}]"
