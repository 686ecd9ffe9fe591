"""Deep against linear: bytes are equal, tasks can be solved and give nothing away, words follow numbers."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nestor.errors import ConfigError


@pytest.fixture
def args(evidence, some_novels, tmp_path):
    linear = evidence.linear
    return linear.Args(
        arms=("linear", "deep-momentum"), seeds=(0,), learning_rates=(1e-3,), relations=("xor",),
        shown=(4, 8),
        relation_steps=1, relation_batch=2, capacities=(2, 4), vocabulary=30, capacity_context=24,
        capacity_steps=1, capacity_batch=2, documents=4, text_size="quick", text_linear_width=64,
        text_rates=(1e-3,), text_tokens=4 * 64, text_batch=1, text_context=64, data=some_novels,
        pairs=(4,), function_pairs=(6,), passes=(1,), budget=evidence.operation.Budget(6, 2, 4, 2),
        out=tmp_path / "out", results=tmp_path / "results",
    )  # fmt: skip


@pytest.mark.parametrize(("size", "linear_width", "wanted"), [("quick", 64, 32_768), ("5m", 128, 131_072)])
def test_all_memories_keep_the_same_bytes_and_parameters(evidence, size, linear_width, wanted) -> None:
    sizes = {}
    for arm in evidence.arms.ARMS:
        overrides = {"num_hidden_layers": 2} if size == "5m" else {}
        made = evidence.trained.with_arm(size, arm, linear_width, overrides, {"chunk_size": 16}).build(0)
        assert evidence.arms.memory_bytes(made) == [wanted] * 2
        # What a State has is what was counted: weights and momentum at the end of a chunk.
        state = made(torch.zeros(1, 16, dtype=torch.int64), use_cache=True).past_key_values
        for layer in state.layers.values():
            kept = [part for name, part in layer.items() if name.startswith(("weights.", "momentum."))]
            assert sum(part.nbytes for part in kept) == wanted
        sizes[arm] = evidence.study.count_parameters(made)["non_embedding"]
    assert max(sizes.values()) / min(sizes.values()) < 1.01


def test_the_bare_operation_keeps_the_same_bytes_whatever_the_heads(evidence) -> None:
    operation = evidence.operation
    for name in operation.OPERATION_ARMS:
        arm = evidence.arms.ARMS[name]
        for choice in operation.draw_choices(arm, 12, 0):
            memory = operation.Memory(arm, choice.width, choice.scale, 0, torch.float32)
            pairs = operation.draw_pairs(operation.Cell("random", 3, 1), 1, 0)
            state = memory.write(pairs.keys, pairs.values, [choice], [torch.arange(3)])
            kept = sum(part.nbytes for part in (*state.weights, *state.momentum))
            assert kept == operation.state_bytes(arm, choice.width) == 16_384
            assert (len(state.momentum) > 0) == arm.momentum and len(state.weights) == 1 + arm.deep


def test_one_matrix_holds_as_many_pairs_as_its_rank_and_no_relation_that_is_not_linear(evidence) -> None:
    operation = evidence.operation
    whole = [operation.Choice(64, 1.0, 1.0, 0.0, 0.0)]
    linear = evidence.arms.ARMS["linear"]
    pairs = operation.draw_pairs(operation.Cell("random", 64, 1), 2, 0, torch.float64)
    keys = torch.linalg.qr(pairs.keys)[0]
    memory = operation.Memory(linear, 64, 1.0, 0, torch.float64)
    state = memory.write(keys, pairs.values, whole * 2, [torch.randperm(64)])
    assert torch.allclose(memory.read(keys, state), pairs.values, atol=1e-12)
    assert operation.recalled(memory.read(keys, state), pairs.values).tolist() == [1.0, 1.0]

    def others(relation):
        cell = operation.Cell(relation, 96, 4)
        drawn = operation.draw_pairs(cell, 4, 1, torch.float64)
        return operation.scores(linear, cell, drawn, whole, 0)[1].mean()

    assert others("linear") > 0.999
    assert others("product") < 0 < others("network") < 0.9


def test_shares_of_reads(evidence) -> None:
    operation = evidence.operation
    values = torch.randn(3, 40, 64, generator=torch.Generator().manual_seed(0))
    assert operation.recalled(3 * values, values).tolist() == [1.0] * 3
    assert operation.recalled(values * 0, values).tolist() == [0.0] * 3
    assert operation.recalled(values.roll(1, 1), values).tolist() == [0.0] * 3
    assert operation.recalled(values * float("nan"), values).tolist() == [0.0] * 3
    assert operation.explained(values, values).tolist() == [1.0] * 3
    mean = values.mean(1, keepdim=True).expand_as(values)
    assert operation.explained(mean, values).abs().max() < 1e-6
    assert operation.explained(1e9 * values, values).tolist() == [-1.0] * 3
    assert operation.explained(values * float("nan"), values).tolist() == [-1.0] * 3


@pytest.mark.parametrize("relation", ["linear", "xor", "network", "random"])
def test_shown_keys_and_others_are_asked_and_their_values_are_nowhere_near(evidence, relation) -> None:
    relations = evidence.relations
    kind = relations.Relation(relation, (20, 40), asked=30)
    for seed, count in itertools.product(range(4), (20, 40)):
        document = kind.document(np.random.default_rng(seed), count)
        ids, labels = document.ids, document.labels
        assert len(ids) == len(labels) == kind.length == (140 if relation == "random" else 200)
        pairs = dict(zip(ids[: 2 * count : 2].tolist(), ids[1 : 2 * count : 2].tolist(), strict=True))
        assert len(pairs) == count and all(
            relations.KEYS <= value < relations.BLANK for value in pairs.values()
        )
        places = np.flatnonzero(labels != -100)
        assert sorted(places) == sorted([*document.shown, *document.others])
        assert (len(document.shown), len(document.others)) == (
            min(count, 30), 0 if relation == "random" else 30,
        )  # fmt: skip
        # Whoever reads the pairs has the answers for those that were shown, and no key is asked for twice.
        assert [pairs[key] for key in ids[document.shown].tolist()] == labels[document.shown].tolist()
        assert not set(ids[document.others].tolist()) & set(pairs) and len(set(ids[places])) == len(places)
        # Behind the pairs no value is ever read.
        assert (ids[places + 1] == relations.BLANK).all() and (
            ids[2 * count :] < relations.KEYS
        ).sum() == len(places)
        assert not ((ids[2 * count :] >= relations.KEYS) & (ids[2 * count :] < relations.BLANK)).any()


def test_who_finds_the_relation_knows_the_keys_that_were_not_shown(evidence) -> None:
    relations = evidence.relations
    document = relations.Relation("xor", (60,)).document(np.random.default_rng(0), 60)
    bits = relations._BITS
    keys, values = document.ids[:120:2], document.ids[1:120:2] - relations.KEYS
    known = np.zeros(relations.KEYS, dtype=int)
    for bit in range(relations.VALUE_BITS):
        target = 2 * ((values >> bit) & 1) - 1
        fits = [
            (i, j)
            for i, j in itertools.combinations(range(relations.KEY_BITS), 2)
            if (bits[keys, i] * bits[keys, j] == target).all()
        ]
        assert len(fits) == 1
        known += (bits[:, fits[0][0]] * bits[:, fits[0][1]] > 0) << bit
    places = document.others
    assert (known[document.ids[places]] + relations.KEYS == document.labels[places]).all()
    # One matrix on the bits knows nothing of it, and half of a linear relation's bits at the least.
    for name, least, most in (("xor", 0.35, 0.65), ("network", 0.7, 0.95), ("linear", 0.9, 1.0)):
        right = []
        for seed in range(10):
            value = relations.Relation(name, (60,)).values(np.random.default_rng(seed))
            target = 2.0 * ((value[:, None] >> np.arange(4)) & 1) - 1
            shown, rest = np.split(np.random.default_rng(seed).permutation(256), [192])
            fitted = np.linalg.lstsq(bits[shown], target[shown], rcond=None)[0]
            right.append(((bits[rest] @ fitted > 0) == (target[rest] > 0)).mean())
        assert least < np.mean(right) <= most


class Knower:
    """A model that has read the documents' labels, or one that guesses."""

    def __init__(self, evidence, documents, right):
        self.labels = {one.ids.tobytes(): one.labels for one in documents}
        self.size, self.right = evidence.relations.VOCABULARY, right

    def __call__(self, ids, use_cache):
        logits = torch.randn(*ids.shape, self.size, generator=torch.Generator().manual_seed(0))
        if self.right:
            labels = np.stack([self.labels[row.numpy().tobytes()] for row in ids])
            logits.scatter_(-1, torch.from_numpy(labels).clamp(min=0)[..., None], 90.0)
        return SimpleNamespace(logits=logits)


def test_scores_of_relations(evidence) -> None:
    relations = evidence.relations
    measure = relations.Related(relations.Relation("network", (16, 48)), 20, relations.VALIDATION)
    documents = [
        one
        for pairs in (16, 48)
        for one in relations.drawn(measure.relation, pairs, 20, relations.VALIDATION)
    ]
    known = measure(Knower(evidence, documents, right=True), "cpu")
    assert [(one["pairs"], one["shown"], one["others"]) for one in known["answers"]] == [
        (16, 1.0, 1.0), (48, 1.0, 1.0),
    ]  # fmt: skip
    assert known["valid"] < 1e-6
    guessed = measure(Knower(evidence, documents, right=False), "cpu")
    assert all(one[sort] < 0.03 for one in guessed["answers"] for sort in ("shown", "others"))
    assert guessed["valid"] > np.log2(relations.VOCABULARY)


def test_a_batch_of_relations_has_answers_alone_and_counts_documents_the_same(evidence) -> None:
    relation = evidence.relations.Relation("xor", (4, 16), asked=8)
    batch = next(evidence.relations.Relations(relation).batches(1, 6, relation.length))
    asked = batch["labels"] != -100
    assert sorted(set(asked.sum(1).tolist())) == [12, 16]
    assert torch.allclose((batch["weights"] * asked).sum(1), torch.ones(6))
    assert (batch["input_ids"][asked] < evidence.relations.KEYS).all()
    with pytest.raises(ConfigError, match="rows have 10 tokens"):
        next(evidence.relations.Relations(relation).batches(1, 6, 10))


def test_words_follow_from_numbers(evidence) -> None:
    verdicts = evidence.verdicts
    ends = {"deep": (0.1, 0.3), "linear": (-0.3, -0.1), "undecided": (-0.1, 0.2)}
    gains = {word: {"low": low, "high": high} for word, (low, high) in ends.items()}
    assert {word: verdicts.judged(gain) for word, gain in gains.items()} == {word: word for word in ends}
    assert verdicts.judged({"low": None, "high": None}) == "undecided"
    assert verdicts.judged({"low": 0.0, "high": 0.0}) == "undecided"

    def said(*words):
        return verdicts.verdict("Text", [{"ahead": word} for word in words])

    assert said("deep", "undecided") == (
        "Text: of 2 comparisons the deep memory is ahead in 1 and the linear one in 0, with 1 undecided; the "
        "deep memory does what a linear one of its bytes does not do as well."
    )
    assert "does nothing clear of chance that a linear one" in said("linear", "linear", "undecided")
    # Of eight intervals of 95 % one is above 0 by chance in a fifth of all cases.
    assert "no difference is clear of chance" in said("deep", *["undecided"] * 7)
    assert "the deep memory does what" in said("deep", "deep", *["undecided"] * 6)
    assert [verdicts.wanted(n) for n in (1, 2, 3, 14, 38)] == [1, 1, 2, 2, 4]
    assert "no difference is clear of chance" in said("undecided")
    assert "each does something" in said("linear", "deep")
    assert said() == "Text: nothing was compared."


def test_the_best_of_each_family_is_chosen_by_tuning_and_bits_count_the_other_way(evidence) -> None:
    def row(arm, family, tuning, values, asked="shown"):
        score = {"pairs": 4, "asked": asked, "by_seed": values}
        return {"arm": arm, "family": family, "group": "g", "tuning": tuning, "scores": [score]}

    rows = [
        row("one", "deep", 1.0, [0.9, 0.92, 0.91]), row("two", "deep", 0.5, [1.0, 1.0, 1.0]),
        row("three", "linear", 0.0, [0.4, 0.42, 0.43]), row("four", "linear", None, [1.0, 1.0, 1.0]),
    ]  # fmt: skip
    (found,) = evidence.trained_table.comparisons(rows)
    assert (found["deep"], found["linear"], found["ahead"]) == ("one", "three", "deep")
    assert found["gain"]["estimate"] == pytest.approx(0.4933, abs=1e-3)
    for one in rows:
        one["scores"][0]["asked"] = "text"
    (found,) = evidence.trained_table.comparisons(rows)
    assert found["ahead"] == "linear" and found["gain"]["estimate"] < 0
    assert evidence.trained_table.comparisons(rows[:2]) == []


def test_all_parts_make_tables_and_are_kept(evidence, args) -> None:
    said = []
    results = evidence.linear.main(args, said.append)
    assert list(results) == ["operation", "relations", "capacity", "text"]
    assert {len(row["bytes"]) for row in results["text"]["rows"]} == {2}
    for part in ("relations", "capacity", "text"):
        assert {size for row in results[part]["rows"] for size in row["bytes"]} == {32_768}
        assert all(one["ahead"] == "undecided" for one in results[part]["comparisons"])
    asked = [(one["pairs"], one["asked"]) for one in results["relations"]["comparisons"]]
    assert asked == [(4, "shown"), (4, "others"), (8, "shown"), (8, "others")]
    written = {path.name for path in args.results.iterdir()}
    parts = {f"linear-{part}.{end}" for part in results for end in ("json", "md")}
    assert (
        parts | {"linear.md", "linear-operation-capacity-1.png", "linear-relations-xor-others.png"} <= written
    )
    text = (args.results / "linear.md").read_text()
    assert text.count("comparisons the deep memory") == 4 + 2 + 1 + 1
    made = sum(text.endswith(" s") for text in said)
    assert made == 5 * 4 + 2 * 3
    # The same again makes nothing, and tables follow from the JSON alone.
    said.clear()
    args.parts = ("operation", "relations")
    evidence.linear.main(args, said.append)
    (args.results / "linear.md").unlink()
    args.table_only = True
    evidence.linear.main(args, said.append)
    assert not any(text.endswith(" s") for text in said)
    assert (args.results / "linear.md").read_text() == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": ("operations",)}, "--parts has operations"),
        ({"arms": ("deeper",)}, "there is no memory 'deeper'"),
        ({"pairs": (0,)}, "must be above 0"),
        ({"relations": ("and",), "parts": ("relations",)}, "there is no relation 'and'"),
        ({"linear_width": 48, "parts": ("relations",)}, "the first must be a multiple"),
    ],
)
def test_settings_are_refused(evidence, args, change, message) -> None:
    for name, value in change.items():
        setattr(args, name, value)
    with pytest.raises(ConfigError, match=message):
        evidence.linear.main(args)
