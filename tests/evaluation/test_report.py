"""The report holds all it shows, escapes all it is given, and its plots are pictures."""

import re
import struct

import pytest

from nestor.errors import DataError
from nestor.evaluation.figures import file_name, reach_marks
from nestor.evaluation.plots import Axes, Mark, Series, curves, heatmap, short_count
from nestor.evaluation.report import Report, flatten, with_interval
from nestor.evaluation.statistics import wilson_interval


def size(png):
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and png[-8:-4] == b"IEND"
    return struct.unpack(">II", png[16:24])


@pytest.fixture
def plot():
    marks = [Mark(30, "reach"), Mark(0.5, "chance", horizontal=True)]
    return curves(
        [
            Series("a", [16, 32, 64], [0.1, 0.5, None], [0.0, 0.4, None], [0.2, 0.6, None]),
            Series("b", [16, 32, 64], [0.2, 0.2, 0.2], of=0),
            Series("c", [8, 16], [0.3, 0.4], [0.2, 0.3], [0.4, 0.5], steps=[8, 16, 32]),
        ],
        Axes("Title", "x", "y", percent=True, marks=marks),
    )


def test_plots_are_pictures_that_differ_only_where_the_numbers_do(plot):
    assert size(plot.light) == size(plot.dark) == (1216, 704) and plot.light != plot.dark
    one, same, other = (
        heatmap([[v, None]], rows=["r"], columns=["a", "b"], title="t", x="x", y="y", label="l")
        for v in (0.2, 0.2, 0.9)
    )
    assert one.light == same.light != other.light


def test_a_plot_of_nothing_or_of_uneven_series_is_refused():
    with pytest.raises(DataError, match="at least one"):
        curves([], Axes("t", "x", "y"))
    with pytest.raises(DataError, match="2 x and 1 y"):
        curves([Series("a", [1, 2], [1])], Axes("t", "x", "y"))
    with pytest.raises(DataError, match="as many values"):
        heatmap([[1.0]], rows=["r"], columns=["a", "b"], title="t", x="x", y="y", label="l")


def test_the_page_is_one_file_and_escapes_what_it_is_given(plot, tmp_path):
    evil = '<script>alert(1)</script> "&'
    report = Report(evil, subtitle=evil, footer=evil)
    section = report.section(evil).text(evil).heading(evil).facts([(evil, evil, evil)])
    section.table([evil, "n"], [[evil, 3]], evil).plot(plot, evil).sample({evil: evil}, evil, right=False)
    section.settings(evil, {evil: {"inner": [1, evil]}}).commands([(evil, evil)])
    assert report.section(evil) is section and report.section("Other").id == "other"
    page = report.write(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and page.count("&lt;script&gt;") >= 14
    assert not re.search(r"""(src|href|srcset)=["'](?!data:image/png;base64,|#)""", page)
    assert "@import" not in page and not re.search(r"url\((?!data:)", page)
    assert "default-src 'none'" in page and page.count("data:image/png;base64,") == 2
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_row_that_does_not_fit_its_columns_is_refused():
    with pytest.raises(DataError, match="does not fit 2 columns"):
        Report("t").section("s").table(["a", "b"], [["1"]])


def test_numbers_are_written_with_their_intervals():
    interval = wilson_interval(3, 10).as_dict()
    assert with_interval(interval, as_percent=True) == "30 % [11, 60]"
    assert with_interval(interval) == "0.300 [0.108, 0.603]"
    assert with_interval(wilson_interval(0, 0).as_dict()) == with_interval(None) == "-"
    assert flatten({"a": {"b": 1, "c": "x"}, "d": [1, None]}) == [
        ("a.b", "1"),
        ("a.c", "x"),
        ("d", "[1, null]"),
    ]
    assert [short_count(v) for v in (512, 4096, 65536, 1.5, 12000)] == ["512", "4k", "64k", "1.5", "11.7k"]
    assert file_name("runs/a b") == "runs-a-b" and file_name("..") == "model"


def test_marks_are_shared_where_the_models_are_alike():
    def model(name, window, reach):
        return {"name": name, "attention_window": window, "attention_reach": reach}

    assert [m.label for m in reach_marks([model("a", 64, 253), model("b", 64, 253)])] == [
        "attention window 64",
        "attention reach 253",
    ]
    labels = [m.label for m in reach_marks([model("a", 64, 253), model("b", 64, 64)])]
    assert labels == ["attention window 64", "attention reach 253 (a)", "attention reach 64 (b)"]
    assert reach_marks([model("a", None, None), model("b", 1, 1)]) == []
