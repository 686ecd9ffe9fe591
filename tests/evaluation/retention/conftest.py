"""A tiny model, text, and a stream of two facts for the retention suite."""

import pytest
import torch

import nestor
from nestor.data.tasks import FillerText, Session, SessionFact
from nestor.evaluation import Subject
from nestor.evaluation.retention.old import OldKnowledge, old_passages
from nestor.evaluation.retention.run import TokenStream
from nestor.evaluation.retention.settings import RetentionSettings
from nestor.models.state import State


@pytest.fixture(scope="session")
def small():
    return RetentionSettings(
        sessions=2, facts=2, repeats=(1, 2), relations=1, distractors=1, filler=0, gaps=(0, 4),
        periods=(32, 64), trials=2, old_passages=3, old_length=24, fixed=0.0, context=129, rank=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def filler():
    return FillerText(["Rain fell on the roof, and nothing moved. A door closed.\n" * 60])


@pytest.fixture(scope="module")
def subject(words):
    torch.manual_seed(4)
    config = nestor.preset(
        "transformer", "quick", hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, initializer_range=0.2,
    )  # fmt: skip
    return Subject("tiny", nestor.NestorForCausalLM(config).eval().requires_grad_(False), words)


@pytest.fixture(scope="module")
def old(subject):
    return OldKnowledge(subject, old_passages(subject, ("self",), 3, 24))


@pytest.fixture(scope="session")
def two_facts():
    """`two_facts(words, times, gap)`: a stream."""
    return draw_two_facts


def draw_two_facts(words, times=20, gap=256):
    """A stream of one session that states two facts many times, and a gap of other text."""
    facts = (
        SessionFact("Zuv", "emblem", "oak", (0,) * times, ("ivy",), ("Kib",)),
        SessionFact("Kib", "fear", "ivy", (1,) * times, ("oak",), ("Zuv",)),
    )
    untaught = (SessionFact("Wod", "emblem", "oak", (), ("ivy",), ()),)
    lines = [fact.statements[n] for n in range(times) for fact in facts]
    session = Session(facts, untaught, tuple(lines))
    after = words.encode("It rained. " * 40)[: gap + 1]
    return TokenStream([session], [words.encode(session.text)], [[after]], after)


@pytest.fixture(scope="session")
def same():
    """`same(one, other)` asserts that two States have learned the same."""
    return assert_same


def assert_same(one: State, other: State):
    assert set(one.learned) == set(other.learned)
    for part, tensors in one.learned.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, other.learned[part][name]), (part, name)
