"""Formal languages against their definitions by brute force; how strings are drawn; what counts as right."""

import re
from collections import Counter
from itertools import product

import numpy as np
import pytest

from nestor.data.tasks.formal_languages import (
    END,
    LANGUAGES,
    NOTATION,
    EqualBlocks,
    FormalBatch,
    distinct_strings,
    draw_strings,
    formal_batch,
    formal_language,
)
from nestor.errors import ConfigError, DataError, ShapeError


def balanced(text, pair):
    """Whether the brackets of one kind cancel when neighbours are struck out again and again."""
    text = "".join(symbol for symbol in text if symbol in pair)
    while pair in text:
        text = text.replace(pair, "")
    return not text


# Membership by definition, and how much longer than a prefix its shortest continuation to a string may be.
MEMBERS = {
    "parity": (lambda s: s.count("1") % 2 == 0, lambda n: n + 1),
    "aa": (lambda s: re.fullmatch("(aa)*", s) is not None, lambda n: n + 2),
    "abab": (lambda s: re.fullmatch("(abab)*", s) is not None, lambda n: n + 4),
    "anbn": (lambda s: len(s) > 0 and s == "a" * (len(s) // 2) + "b" * (len(s) // 2), lambda n: 2 * n + 2),
    "anbncn": (
        lambda s: len(s) > 0 and s == "".join(c * (len(s) // 3) for c in "abc"),
        lambda n: 3 * n + 3,
    ),
    "shuffle-2": (lambda s: balanced(s, "()") and balanced(s, "[]"), lambda n: 2 * n),
}
# Symbols of the longest strings that are tried, so that there are at most about 100,000.
LONGEST = {"parity": 11, "aa": 24, "abab": 12, "anbn": 12, "anbncn": 8, "shuffle-2": 7}
# Symbols of the longest strings of blocks (a^i b^j c^k), which are tried as well.
BLOCKS = 18


def every_string(symbols, length):
    return ("".join(parts) for parts in product(symbols, repeat=length))


def blocks(symbols, longest):
    """Strings of one block of each symbol, in their order."""
    for counts in product(range(longest + 1), repeat=len(symbols)):
        if sum(counts) <= longest:
            yield "".join(symbol * count for symbol, count in zip(symbols, counts, strict=True))


@pytest.mark.parametrize("name", LANGUAGES)
def test_the_language_and_its_legal_symbols_are_those_of_its_definition(name) -> None:
    language, (member, reach) = formal_language(name), MEMBERS[name]
    counts = isinstance(language, EqualBlocks)
    candidates = {text for n in range(LONGEST[name] + 1) for text in every_string(language.symbols, n)}
    if counts:
        candidates |= set(blocks(language.symbols, BLOCKS))
    strings = {text for text in candidates if member(text)}
    assert len(strings - {""}) > 2
    prefixes = {text[:end] for text in strings for end in range(len(text) + 1)}
    checked = 0
    for text in sorted(candidates):
        assert language.accepts(text) == (text in strings), text
        # Only of prefixes whose shortest continuations are among the strings tried.
        if text not in prefixes or reach(len(text) + 1) > (BLOCKS if counts else LONGEST[name]):
            continue
        expected = {s for s in language.symbols if text + s in prefixes} | ({END} if member(text) else set())
        row = language.legal_sets(text)[-1]
        assert {(END + language.symbols)[i] for i in np.flatnonzero(row)} == expected, text
        checked += 1
    assert checked > 4
    for length in range(1, LONGEST[name] + 1):
        assert language.possible(length) == any(len(text) == length for text in strings)


@pytest.mark.parametrize("name", ["parity", "shuffle-2"])
def test_strings_of_a_length_are_equally_likely(name) -> None:
    language, member, rng = formal_language(name), MEMBERS[name][0], np.random.default_rng(0)
    all_strings = [text for text in every_string(language.symbols, 6) if member(text)]
    assert len(all_strings) == {"parity": 32, "shuffle-2": 70}[name]
    found = Counter(language.draw(rng, 6) for _ in range(100 * len(all_strings)))
    assert set(found) == set(all_strings)
    # Of 100 expected, 10 is a standard deviation.
    assert min(found.values()) > 60 and max(found.values()) < 140


@pytest.mark.parametrize("name", LANGUAGES)
def test_drawn_strings_are_members_of_uniform_length_and_follow_from_the_seed(name) -> None:
    language = formal_language(name)
    drawn = draw_strings(language, np.random.default_rng(3), (2, 20), 2000)
    assert drawn == draw_strings(language, np.random.default_rng(3), (2, 20), 2000)
    assert all(MEMBERS[name][0](text) for text in drawn)
    lengths = Counter(map(len, drawn))
    possible = [length for length in range(2, 21) if language.possible(length)]
    assert sorted(lengths) == possible
    expected = 2000 / len(possible)
    assert all(abs(count - expected) < 5 * expected**0.5 for count in lengths.values())
    once = distinct_strings(language, np.random.default_rng(3), (22, 60), 50)
    assert len(set(once)) == len(once) == (len([n for n in range(22, 61) if language.possible(n)][:50])
                                           if language.single else 50)  # fmt: skip
    assert all(22 <= len(text) <= 60 and language.accepts(text) for text in once)


def test_fewer_strings_where_there_are_no_more() -> None:
    assert sorted(distinct_strings(formal_language("parity"), np.random.default_rng(0), (2, 3), 100)) == [
        "00", "000", "011", "101", "11", "110",
    ]  # fmt: skip


@pytest.mark.parametrize("name", LANGUAGES)
def test_an_oracle_solves_every_string_and_a_constant_none(name) -> None:
    language = formal_language(name)
    strings = distinct_strings(language, np.random.default_rng(1), (2, 40), 100)
    batch = formal_batch(language, strings)
    # The oracle knows strings only: it reads each prefix as a machine would.
    oracle = np.zeros_like(batch.legal)
    for row, text in enumerate(strings):
        state = language.start()
        for place, symbol in enumerate([*text, None]):
            for legal in language.legal(state):
                oracle[row, place, (END + language.symbols).index(legal)] = True
            state = None if symbol is None else language.step(state, symbol)
    assert batch.solved(oracle).all()
    for constant in product([False, True], repeat=language.vocab_size):
        # Only strings of zeros alone have the same set at all places.
        solved = batch.solved(np.broadcast_to(np.array(constant), batch.legal.shape))
        assert all(set(strings[row]) == {"0"} for row in np.flatnonzero(solved)) and solved.mean() < 0.05
    # What follows from the last symbol alone is not enough either, but for the shortest strings of some.
    table = {}
    for row, text in enumerate(strings):
        for place, symbol in enumerate(END + text):
            table.setdefault(symbol, Counter())[batch.legal[row, place].tobytes()] += 1
    usual = {symbol: np.frombuffer(sets.most_common(1)[0][0], bool) for symbol, sets in table.items()}
    guessed = np.zeros_like(batch.legal)
    for row, text in enumerate(strings):
        for place, symbol in enumerate(END + text):
            guessed[row, place] = usual[symbol]
    assert batch.solved(guessed).mean() < 0.2


def test_one_wrong_place_spoils_a_string_and_padding_does_not_count() -> None:
    batch = formal_batch(formal_language("aa"), ["aa", "aaaa"])
    wide = formal_batch(formal_language("aa"), ["aa", "aaaa"], 9)
    assert wide.ids.shape == (2, 9) and (wide.ids[:, :5] == batch.ids).all() and not wide.counted[:, 5:].any()
    with pytest.raises(ShapeError, match="rows have 4 tokens, and the longest string needs 5"):
        formal_batch(formal_language("aa"), ["aa", "aaaa"], 4)
    assert batch.ids.tolist() == [[0, 1, 1, 0, 0], [0, 1, 1, 1, 1]]
    assert batch.counted.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert batch.legal[1].tolist() == [[True, True], [False, True], [True, True], [False, True], [True, True]]
    named = batch.legal.copy()
    named[0, 3:] = ~named[0, 3:]
    assert batch.solved(named).tolist() == [True, True]
    named[1, 3, 0] ^= True
    assert batch.solved(named).tolist() == [True, False]
    assert isinstance(batch, FormalBatch)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"no formal language 'pairity'.*Did you mean 'parity'"):
        formal_language("pairity")
    with pytest.raises(ConfigError, match="no string of abab has 5 to 7 symbols"):
        draw_strings(formal_language("abab"), np.random.default_rng(0), (5, 7), 1)
    with pytest.raises(DataError, match=r"'aba' begins no string of anbn; after 'ab' there may be \$"):
        formal_language("anbn").legal_sets("aba")
    assert set(NOTATION) == set(LANGUAGES)
