"""Effective remembrance: its bounds, its zeros, and that it is what plain forward calls give.

Invariant 6 of length generalisation: EffRem(0) = 0; it lies in [0, 1]; a model with receptive field R has 0
for t <= T - R; a model that ignores its context has 0 everywhere.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nestor.cli.main import main
from nestor.errors import ConfigError, NonFiniteError
from nestor.evaluation import Settings, Subject, cut_passages, evaluate, measure_remembrance, write_results
from nestor.evaluation.remembrance import dropped_counts, total_variation

LENGTH = 96


class Counting(torch.nn.Module):
    """Predicts from exactly the last `reach` bytes it read: which of them were vowels, each by its place.

    Sums of whole numbers are exact, so equal windows give equal logits however they were read.
    """

    def __init__(self, reach):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=260, model_type="counting", layer_types=["full_attention"])
        self.device = torch.device("cpu")
        self.reach = reach

    def forward(self, input_ids, past_key_values=None, use_cache=True):
        seen = input_ids if past_key_values is None else torch.cat([past_key_values, input_ids], 1)
        last = seen[:, max(0, seen.shape[1] - self.reach) :]
        logits = torch.zeros(len(seen), input_ids.shape[1], 260)
        for row, ids in enumerate(last.tolist()):
            for place, token in enumerate(reversed(ids)):
                logits[row, -1, (7 * place + token) % 260] += 3.0
        return SimpleNamespace(logits=logits, past_key_values=seen)


@pytest.fixture(scope="module")
def passages(words):
    rng = np.random.default_rng(3)
    letters = np.frombuffer(b"abcdefghij klmnop\n", dtype=np.uint8)
    return cut_passages([bytes(rng.choice(letters, 1500)).decode() for _ in range(6)], [words], LENGTH, 6)


def estimates(result):
    return [one["estimate"] for one in result["remembrance"]]


def test_invariant_6_nothing_dropped_is_0_and_nothing_exceeds_1(models, foreign, passages):
    everything = range(LENGTH)
    for subject in [*models, foreign]:
        result = measure_remembrance(subject, passages, LENGTH, dropped=everything, piece=40)
        found = np.array(result["sums"]["distances"])
        assert result["dropped"][0] == 0 and (found[:, 0] == 0).all()
        assert (found >= 0).all() and (found <= 1).all() and (found[:, 1:] > 0).any()


def test_invariant_6_two_distributions_without_overlap_are_1_apart_and_no_more():
    first, second = torch.full((2, 300), -1e4), torch.full((2, 300), -1e4)
    first[:, :150], second[:, 150:] = torch.randn(2, 150), torch.randn(2, 150)
    found = total_variation(first, second)
    assert found.tolist() == pytest.approx([1.0, 1.0], abs=1e-12) and bool((found <= 1).all())
    logits = torch.tensor([[0.6, 0.4, 0.0]]).log(), torch.tensor([[0.1, 0.4, 0.5]]).log()
    assert float(total_variation(*logits)) == pytest.approx(0.5)


@pytest.mark.parametrize("reach", [1, 7, 50])
def test_invariant_6_what_lies_beyond_the_receptive_field_counts_exactly_0(words, passages, reach):
    subject = Subject("counting", Counting(reach), words)
    result = measure_remembrance(subject, passages, LENGTH, dropped=range(LENGTH), piece=13)
    for count, estimate in zip(result["dropped"], estimates(result), strict=True):
        assert (estimate == 0) is (count <= LENGTH - reach), count


def test_invariant_6_holds_for_sliding_windows(make_tiny, words, passages):
    """Two layers of window 8 see 15 tokens; positions are relative, so only rounding is left beyond."""
    subject = Subject("windows", make_tiny(sliding_window=8), words)
    assert subject.reach.tokens == 15
    result = measure_remembrance(subject, passages, LENGTH, dropped=range(1, LENGTH), piece=32)
    found = dict(zip(result["dropped"], estimates(result), strict=True))
    assert max(found[count] for count in found if count <= LENGTH - 15) < 1e-6
    assert min(found[count] for count in found if count > LENGTH - 15) > 1e-6


def test_invariant_6_a_model_that_ignores_its_context_has_0_everywhere(words, passages, make_tiny):
    constant = Subject("constant", Counting(0), words)
    result = measure_remembrance(constant, passages, LENGTH, dropped=range(LENGTH), piece=13)
    assert estimates(result) == [0.0] * LENGTH
    # One that looks at the last token alone has so too, but for the rounding of products of other shapes.
    model = make_tiny()
    for layer in model.layers:
        torch.nn.init.zeros_(layer.mixer.o_proj.weight)
    result = measure_remembrance(Subject("bigram", model, words), passages, LENGTH, dropped=range(LENGTH))
    assert max(estimates(result)) < 1e-6


@pytest.mark.parametrize("which", ["full", "titans", "llama"])
def test_it_is_the_distance_of_plain_forward_calls(models, foreign, passages, words, which):
    subject = {one.name: one for one in [*models, foreign]}[which]
    result = measure_remembrance(subject, passages, LENGTH, dropped=[3, 60, 95], piece=17, batch_size=4)
    wanted = np.zeros((len(passages), 3))
    for row, passage in enumerate(passages):
        ids = words.encode(passage.text)[:LENGTH]

        def predicted(ids):
            ids = torch.tensor([[*subject.prefix, *ids]])
            with torch.no_grad():
                return subject.model(input_ids=ids).logits[0, -1].double().softmax(-1)

        for column, count in enumerate((3, 60, 95)):
            wanted[row, column] = 0.5 * (predicted(ids) - predicted(ids[count:])).abs().sum()
    np.testing.assert_allclose(estimates(result), wanted.mean(axis=0), rtol=0, atol=1e-5)
    assert all(one["low"] < one["estimate"] < one["high"] for one in result["remembrance"])
    assert result["resampled"] == "document" and result["notes"] == []


def test_the_prefix_stands_before_the_whole_text_and_before_what_is_left_of_it(copier, words, passages):
    class Beginning(type(words)):
        bos_token_id = 9

    model, read = copier(), []
    subject = Subject("copier", model, Beginning())
    forward = model.forward
    model.forward = lambda input_ids, **more: read.append(input_ids.tolist()) or forward(input_ids, **more)
    measure_remembrance(subject, passages[:1], LENGTH, dropped=[0, 90], piece=200)
    assert [len(ids[0]) for ids in read] == [LENGTH + 1, 7] and all(ids[0][0] == 9 for ids in read)
    assert read[0][0][-6:] == read[1][0][1:]


def test_dropped_counts_look_closely_at_both_ends():
    assert dropped_counts(32) == [1, 2, 4, 8, 16, 24, 28, 30, 31]
    assert dropped_counts(100) == [1, 2, 4, 8, 16, 32, 50, 68, 84, 92, 96, 98, 99]
    assert dropped_counts(2) == [1] and dropped_counts(3) == [1, 2]
    with pytest.raises(ConfigError, match="length is 1"):
        dropped_counts(1)


def test_a_model_with_a_context_limit_reads_as_much_as_it_can_and_says_so(foreign, models, words, tmp_path):
    settings = Settings(suites=("remembrance",), lengths=(300,), repeats=3, piece=64)
    part = evaluate([models[1], foreign], settings)["results"]["remembrance"]
    titans, llama = part["models"]["titans"], part["models"]["llama"]
    assert (titans["length"], llama["length"]) == (300, 256 - len(foreign.prefix))
    assert part["differences"] == [] and "reads at most 256 tokens" in llama["notes"][0]


def test_impossible_requests_and_numbers_are_refused(models, passages):
    for dropped in ([], [-1, 3], [LENGTH]):
        with pytest.raises(ConfigError, match=f"numbers from 0 to {LENGTH - 1}"):
            measure_remembrance(models[0], passages, LENGTH, dropped=dropped)


def test_a_score_that_is_no_number_is_refused(make_tiny, words, passages):
    model = make_tiny()
    model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="not finite"):
        measure_remembrance(Subject("nan", model, words), passages, LENGTH)


def test_the_suite_compares_models_and_writes_plots_and_a_report(models, tmp_path):
    settings = Settings(suites=("remembrance",), lengths=(128,), repeats=4, seeds=(0, 1))
    tokens = []

    class Bar:
        def __enter__(self):
            return tokens.append

        def __exit__(self, *_):
            return None

    result = evaluate(models, settings, bar=lambda title: Bar())
    part = result["results"]["remembrance"]
    assert sum(tokens) == sum(model["read_tokens"] for model in part["models"].values())
    assert part["models"]["full"]["passages"] == 8
    (difference,) = part["differences"]
    full, titans = (estimates(part["models"][name]) for name in ("full", "titans"))
    for one, other, found in zip(titans, full, difference["remembrance"], strict=True):
        assert found["estimate"] == pytest.approx(one - other, abs=1e-9)
    page = write_results(result, tmp_path).read_text(encoding="utf-8")
    assert "Effective remembrance" in page and "titans minus full" in page and "first 64 dropped" in page
    for name in ("remembrance-by-dropped", "remembrance-by-kept"):
        assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_runs_it_when_asked_and_not_as_one_of_all(tmp_path, make_tiny, words):
    from nestor.cli.eval import Args, _settings

    assert "remembrance" not in _settings(Args(models=("x",))).suites
    both = _settings(Args(models=("x",), suite=("all", "remembrance"))).suites
    assert both == ("perplexity", "recall", "needle", "remembrance")
    make_tiny().save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    arguments = [
        "eval",
        str(tmp_path / "model"),
        "--suite",
        "remembrance",
        "--lengths",
        "64",
        "--repeats",
        "2",
    ]
    assert main([*arguments, "--out", str(out), "--device", "cpu", "--quiet"]) == 0
    found = json.loads((out / "results.json").read_text())["results"]["remembrance"]["models"]["model"]
    assert found["dropped"] == [1, 2, 4, 8, 16, 32, 48, 56, 60, 62, 63] and found["length"] == 64
