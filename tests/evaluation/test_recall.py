"""Facts are where the distances say, and a model gets what its knowledge is worth."""

import math

import numpy as np
import pytest

from nestor.data.tasks import FactSpec, MqarTask
from nestor.data.tasks.words import HELD_OUT_NAMES
from nestor.errors import ConfigError, DataError
from nestor.evaluation import Subject, compare_recall, draw_documents, measure_mqar, measure_recall
from nestor.evaluation.mqar import compare_mqar
from nestor.evaluation.recall import doubling_distances

DISTANCES = [16, 40, 200, 700]
# Of `The key of {name} is 1234.\n` with the longest name, and of the question with its answer.
LONGEST = 40


def test_the_statement_ends_exactly_the_distance_before_the_question(book, words):
    for document in draw_documents(book, DISTANCES, 6, seeds=(0, 3), n_facts=3):
        ids = document.ids.tolist()
        assert len(ids) == document.stated + DISTANCES[-1]
        assert words.decode(ids[: document.stated]).endswith("\n" + document.fact.statement)
        assert document.fact.value not in words.decode(ids[document.stated :])
        # A question begins a line at each of its places.
        assert all(ids[document.stated + d - 1] == 10 for d in DISTANCES)


def test_the_other_facts_surround_the_one_that_is_asked(book, words):
    documents = draw_documents(book, DISTANCES, 40, n_facts=3)
    assert len({document.stated for document in documents}) == 1
    after = [words.decode(d.ids[d.stated :].tolist()).count("The key of") for d in documents]
    # The target is the first, second and third of the facts about equally often; none is lost.
    assert min(after.count(n) for n in range(3)) >= 6 and len(after) == 40
    for document in documents:
        text = words.decode(document.ids.tolist())
        assert text.count("The key of") == 3
        assert document.unstated.name != document.fact.name and document.unstated.question not in text
        assert document.fact.name in HELD_OUT_NAMES


def test_the_same_arguments_give_the_same_documents_and_seeds_give_others(book):
    def texts(**arguments):
        return [d.ids.tolist() for d in draw_documents(book, DISTANCES, 2, **arguments)]

    assert texts(seeds=(0, 1)) == texts(seeds=(0, 1)) == texts(seeds=(0,)) + texts(seeds=(1,))
    assert texts(seeds=(0,)) != texts(seeds=(1,))


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_model_that_copies_the_fact_is_always_right(book, words, copier, batch_size):
    documents = draw_documents(book, DISTANCES, 8, n_facts=3)
    result = measure_recall(Subject("c", copier(), words), documents, batch_size=batch_size, piece=128)
    for row in result["distances"]:
        assert row["n"] == 8 and row["exact_match"]["estimate"] == row["byte_accuracy"]["estimate"] == 1.0
        assert row["answer_bits"]["estimate"] < 1e-6 < row["unstated_bits"]["estimate"]
    assert result["control"] == {"asked": 32, "right": 0}
    assert [s["distance"] for s in result["samples"]] == DISTANCES and all(
        s["right"] and s["given"] == s["wanted"] for s in result["samples"]
    )


def test_a_model_that_cannot_look_back_so_far_is_never_right(book, words, copier):
    documents = draw_documents(book, DISTANCES, 8, n_facts=3)
    # To copy, the whole statement and what follows it must lie in the window.
    near = measure_recall(Subject("c", copier(200 + 2 * LONGEST), words), documents)
    far = measure_recall(Subject("c", copier(200), words), documents)
    assert [row["exact_match"]["estimate"] for row in near["distances"]] == [1, 1, 1, 0]
    assert [row["exact_match"]["estimate"] for row in far["distances"]] == [1, 1, 0, 0]
    assert [s["right"] for s in far["samples"]] == [True, True, False, False]
    (difference,) = compare_recall(["far", "near"], [far, near])
    by_distance = {row["distance"]: row["exact_match"] for row in difference["distances"]}
    assert by_distance[200]["estimate"] == 1.0 and by_distance[200]["low"] > 0.5
    assert by_distance[700]["estimate"] == 0.0 and by_distance[700]["low"] < 0 < by_distance[700]["high"]
    bits = {row["distance"]: row["answer_bits"] for row in difference["distances"]}
    assert bits[200]["estimate"] < -50


def test_a_model_that_knows_only_the_form_needs_the_bits_of_a_guess(book, words, guesser):
    documents = draw_documents(book, [30], 6, spec=FactSpec(digits=3))
    result = measure_recall(Subject("g", guesser(3), words), documents, batch_size=3)
    (row,) = result["distances"]
    assert result["guess_bits"] == pytest.approx(math.log2(900))
    assert row["answer_bits"]["estimate"] == row["unstated_bits"]["estimate"] == pytest.approx(math.log2(900))


def test_guessing_one_digit_is_right_as_often_as_chance(book, words, guesser):
    class Four(guesser):
        def likely(self, text):
            tail = text[text.rfind(" is") + 3 :]
            return [ord(" 4."[min(len(tail), 2)])]

    documents = draw_documents(book, [17], 200, spec=FactSpec(digits=1))
    result = measure_recall(Subject("g", Four(1), words), documents, batch_size=200)
    (row,) = result["distances"]
    asked_for_four = np.mean([document.fact.value == "4" for document in documents])
    assert row["exact_match"]["estimate"] == asked_for_four and result["guess_bits"] == math.log2(10)
    # Three standard errors of 200 draws about a tenth.
    assert abs(asked_for_four - 0.1) < 0.064 and 5 <= result["control"]["right"] <= 40


def test_distances_beyond_a_limited_context_are_left_out(book, foreign, models):
    documents = draw_documents(book, [16, 64, 400], 3)
    result = measure_recall(foreign, documents)
    assert [row["n"] for row in result["distances"]] == [3, 3, 0]
    assert result["distances"][2]["exact_match"] is None and "at most 256 tokens" in result["notes"][0]
    other = measure_recall(models[0], documents)
    (difference,) = compare_recall(["a", "b"], [other, result])
    assert [row["distance"] for row in difference["distances"]] == [16, 64]


def test_impossible_distances_are_refused(book):
    for distances, count in (([0, 4], 1), ([], 1), ([8], 0)):
        with pytest.raises(ConfigError, match="must be at least 1"):
            draw_documents(book, distances, count)
    with pytest.raises(ConfigError, match="names"):
        draw_documents(book, [10], 1, n_facts=500)
    assert doubling_distances(100) == [16, 32, 64, 100] and doubling_distances(16) == [16]
    with pytest.raises(ConfigError, match="in order"):
        doubling_distances(8)


def test_a_distance_without_room_for_a_line_end_is_refused(book):
    class TwoTokens:
        """A tokenizer whose line end has two tokens."""

        def encode(self, text, add_special_tokens=False):
            return [b for c in text.encode() for b in ([c, c] if c == 10 else [c])]

        def decode(self, ids, **_):
            return bytes(ids).decode("utf-8", "replace")

    class Haystack:
        tokenizer = TwoTokens()

        def text(self, rng, n_tokens):
            return "x" * n_tokens

    with pytest.raises(DataError, match="line end"):
        draw_documents(Haystack(), [10, 11], 1)


def test_associative_recall_of_a_copier_is_perfect_and_of_a_blind_one_zero(words, copier):
    perfect = measure_mqar(
        Subject("c", copier(shortest=1), words), document_length=96, count=6, n_pairs=4, seeds=(0, 1)
    )
    assert sum(perfect["n"]) == 12 * 4 and perfect["overall"]["estimate"] == 1.0
    blind = measure_mqar(
        Subject("b", copier(window=1, shortest=1), words),
        document_length=96,
        count=6,
        n_pairs=4,
        seeds=(0, 1),
    )
    assert blind["overall"]["estimate"] == 0.0 and blind["chance"] == 1 / 85
    (difference,) = compare_mqar(["c", "b"], [perfect, blind])
    assert difference["exact_match"]["estimate"] == -1.0


def test_associative_recall_counts_distances_between_pair_and_query(words, copier):
    """A copier that sees 24 tokens back is right exactly for the pairs whose query is nearer than that."""
    result = measure_mqar(
        Subject("c", copier(window=24, shortest=1), words), document_length=256, count=10, n_pairs=4
    )
    columns = zip(result["edges"][:-1], result["accuracy"], result["n"], strict=True)
    right = {low: accuracy["estimate"] for low, accuracy, n in columns if n}
    assert right[0] == right[8] == 1.0 and right[32] == right[64] == 0.0


def test_associative_recall_needs_enough_ids(words, copier):
    model = copier()
    model.config.vocab_size = 100
    with pytest.raises(ConfigError, match="knows 100"):
        measure_mqar(Subject("c", model, words), document_length=64, count=1, vocab_size=256)
    with pytest.raises(ConfigError, match="document_length"):
        MqarTask(256, 8, 8)
