"""recipes/retrofit/documents.py: what it measures, and that a run goes on where it was stopped."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from nestor.errors import ConfigError

ROOT = Path(__file__).parents[2]
STORIES = ROOT / "checkpoints" / "stories260K"
TEXTS = ["The raven keeps the red key under the old clock. ", "Ann took 4,821 boats to the island, café. "]


@pytest.fixture
def documents(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("documents", ROOT / "recipes" / "retrofit" / "documents.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "documents", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    (tmp_path / "held.jsonl").write_text("".join(json.dumps({"text": text * 12}) + "\n" for text in TEXTS))
    (tmp_path / "tune.txt").write_text("Bob sold the green coat at noon. " * 12)
    return module


def test_it_measures_documents_and_goes_on(documents, tmp_path, capsys) -> None:
    def arguments(**choices):
        return documents.Args(
            str(STORIES), tmp_path / "held.jsonl", tmp_path / "tune.txt",
            **{"tokens": 120, "context": 50, "periods": (16, 32), "grid": (0.1, 1.0), "tune_tokens": 60,
               "tune_documents": 1, "bins": 3, "device": "cpu", "limit": 1, **choices},
        )  # fmt: skip

    documents.main(arguments())
    path = tmp_path / "results" / "documents-model.json"
    first = json.loads(path.read_text())
    assert len(first["rows"]) == 1 and set(first["trials"]) == {"0.1", "1.0"}
    documents.main(arguments(limit=None))
    result = json.loads(path.read_text())
    assert result["rows"][0] == first["rows"][0] and result["summary"]["documents"] == 2
    assert (tmp_path / "results" / "documents-model.png").stat().st_size > 1000
    assert "of 2 documents" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="other settings"):
        documents.main(arguments(context=40))

    # The frozen side by hand: windows of 50 that begin with the last token of the one before.
    model, tokenizer = documents.load_model(str(STORIES), "cpu", "auto")
    ids = tokenizer(TEXTS[1] * 12)["input_ids"][:120]
    nats = 0.0
    for begin in range(0, 119, 49):
        window = torch.tensor([ids[begin : begin + 50]])
        with torch.no_grad():
            nats += float(F.cross_entropy(model(window).logits[0, :-1], window[0, 1:], reduction="sum"))
    row = result["rows"][1]
    text = tokenizer.decode(ids[1:], skip_special_tokens=True)
    assert row["tokens"] == 119 and abs(row["bytes"] - len(text.encode())) <= 2
    assert row["frozen"] == pytest.approx(nats / math.log(2) / row["bytes"], rel=1e-5)
    # What repeats itself is learned.
    assert row["learning"] < row["frozen"] and row["updates"] == {"every 16": 7, "every 32": 3}
    gains = [one["frozen"] - one["learning"] for one in result["rows"]]
    assert result["summary"]["gain"]["estimate"] == pytest.approx(sum(gains) / 2)
