"""lm-evaluation-harness reads the same tokens and gives the same likelihoods as the suites."""

import importlib.util
import json
import math

import pytest

from nestor.errors import ConfigError
from nestor.evaluation import harness
from nestor.evaluation.scoring import Row, score_rows

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs the extra nestor[eval]"
)


def test_without_the_extra_or_a_task_the_error_says_what_to_do(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(harness, "find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"pip install 'nestor\[eval\]'"):
            harness.require(["arc_easy"])
    monkeypatch.setattr(harness, "find_spec", lambda name: True)
    with pytest.raises(ConfigError, match="needs --tasks"):
        harness.require([])


def test_the_byte_tokenizer_has_a_twin_with_the_same_ids(words):
    twin = harness.hugging_face_tokenizer(words)
    for text in ("plain", "naïve 日本 🙂\n\ttabs", " <eos> "):
        assert twin(text, add_special_tokens=False)["input_ids"][:40] == words.encode(text) or "<eos>" in text
        assert twin.decode(words.encode(text)) == text
    assert twin.eos_token_id == words.eos_token_id
    assert harness.hugging_face_tokenizer(twin) is twin


def test_filters_of_one_answer_are_scores_of_one_item():
    def sample(item, name, score):
        return {"doc_id": item, "filter": name, "metrics": ["exact_match"], "exact_match": score}

    strict, lenient = [sample(i, "strict", i % 2) for i in (2, 0, 1)], [sample(i, "any", 1) for i in range(3)]
    assert harness.by_item(strict) == [{"exact_match": score} for score in (0, 1, 0)]
    assert harness.by_item(strict + lenient) == [
        {"exact_match,strict": score, "exact_match,any": 1} for score in (0, 1, 0)
    ]


@needs_harness
def test_a_local_task_is_scored_by_the_likelihood_of_its_choices(models, words, tmp_path):
    items = [
        {"question": f"The key of {name} is", "choices": [" 12", " 77"], "gold": i % 2}
        for i, name in enumerate(["Ada", "Marlow", "Holmes", "Kurtz", "Alice"])
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    (tmp_path / "keys.yaml").write_text(
        f"task: nestor_keys\ndataset_path: json\ndataset_kwargs:\n  data_files: "
        f"{{test: {tmp_path / 'items.jsonl'}}}\ntest_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{gold}}"\n'
        'target_delimiter: ""\nmetric_list:\n  - metric: acc\n'
    )
    for subject in models:
        found = harness.run_harness(subject, ["nestor_keys"], include_path=tmp_path, batch_size=3, items=True)
        right = 0
        for item in items:
            prompt = words.encode(item["question"])
            rows = [
                Row(ids, len(prompt), len(ids)) for ids in (prompt + words.encode(c) for c in item["choices"])
            ]
            bits = [float(b.sum()) for b, _ in score_rows(subject.model, rows, batch_size=2)]
            right += bits.index(min(bits)) == item["gold"]
        assert found["results"]["nestor_keys"]["acc,none"] == pytest.approx(right / len(items))
        each = [one["acc"] for one in found["items"]["nestor_keys"]]
        assert len(each) == len(items) and sum(each) == right
        assert json.loads(json.dumps(found)) == found and found["model"]["name"] == subject.name
        assert not math.isnan(found["results"]["nestor_keys"]["acc_stderr,none"])


@needs_harness
def test_an_unknown_task_is_refused(models, tmp_path):
    with pytest.raises(ConfigError, match="no lm-eval task 'arc_esy'. Did you mean 'arc_"):
        harness.run_harness(models[0], ["arc_esy"])
