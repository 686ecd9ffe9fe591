"""Needles lie at the depth they are said to, in texts of the length they are said to."""

import pytest

from nestor.errors import ConfigError
from nestor.evaluation import Subject, compare_needle, draw_needles, measure_needle

LENGTHS, DEPTHS = [420, 900], [0.0, 0.5, 1.0]


@pytest.fixture(scope="module")
def probes(book):
    return draw_needles(book, LENGTHS, 2, depths=DEPTHS)


def test_length_depth_and_answer_are_as_ordered(probes, words):
    assert len(probes) == 3 * 2 * 3 * 2
    for probe in probes:
        text = words.decode(probe.ids.tolist())
        assert text.endswith(probe.question + probe.answer) and text.count(probe.value) == 2
        assert probe.length - 120 < len(probe.ids) <= probe.length
        prompt = words.decode(probe.ids[: probe.start].tolist()).removesuffix(probe.question)
        statement = next(line for line in prompt.splitlines(True) if f" is {probe.value}." in line)
        before = prompt.index(statement)
        depth = before / (len(prompt) - len(statement))
        # The place is that of the nearest break of a line or clause, and the probe tells it.
        assert depth == pytest.approx(probe.real_depth, abs=0.01)
        assert depth == pytest.approx(probe.depth, abs=0.35)
        assert (before == 0) == (probe.depth == 0) and prompt.endswith(statement) == (probe.depth == 1)


def test_depths_are_met_on_average(probes):
    for depth in DEPTHS:
        met = [probe.real_depth for probe in probes if probe.depth == depth]
        assert sum(met) / len(met) == pytest.approx(depth, abs=0.07)


def test_the_same_seed_gives_the_same_needles_whatever_else_is_measured(book, probes):
    alone = draw_needles(book, [900], 2, depths=[0.5], variants=["word"])
    same = [p for p in probes if (p.variant, p.length, p.depth) == ("word", 900, 0.5)]
    assert [p.ids.tolist() for p in alone] == [p.ids.tolist() for p in same]
    other = draw_needles(book, [900], 2, depths=[0.5], variants=["word"], seeds=(1,))
    assert [p.value for p in other] != [p.value for p in alone]


def test_a_copier_finds_all_and_a_blind_one_only_what_is_near(probes, words, copier):
    found = measure_needle(Subject("c", copier(), words), probes)
    assert all(cell["exact_match"]["estimate"] == 1.0 for cell in found["overall"].values())
    assert [len(found["grid"][v]) for v in ("passkey", "number", "word")] == [3, 3, 3]
    blind = measure_needle(Subject("b", copier(140), words), probes)
    for variant in blind["variants"]:
        for depth, row in zip(DEPTHS, blind["grid"][variant], strict=True):
            assert [cell["n"] for cell in row] == [2, 2]
            if depth == 1.0:
                assert [cell["exact_match"]["estimate"] for cell in row] == [1.0, 1.0]
            elif depth == 0.0:
                assert [cell["exact_match"]["estimate"] for cell in row] == [0.0, 0.0]
    (difference,) = compare_needle(["c", "b"], [found, blind])
    right = sum(blind["exact"])
    assert difference["exact_match"]["estimate"] == pytest.approx(right / len(probes) - 1)
    assert [s["length"] for s in found["samples"]] == [900] * 3 and all(s["right"] for s in found["samples"])


def test_texts_beyond_a_limited_context_are_left_out(probes, foreign):
    result = measure_needle(foreign, probes)
    assert all(cell["n"] == 0 and cell["exact_match"] is None for r in result["grid"]["word"] for cell in r)
    assert result["samples"] == [] and "at most 256" in result["notes"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variants": ["passky"]}, "Did you mean 'passkey'"),
        ({"depths": [1.5]}, "must lie in 0..1"),
        ({"lengths": [20]}, "alone take"),
        ({"lengths": []}, "at least 1"),
        ({"count": 0}, "at least 1"),
    ],
)
def test_impossible_needles_are_refused(book, arguments, message):
    with pytest.raises(ConfigError, match=message):
        draw_needles(book, **({"lengths": [300], "count": 1} | arguments))
