"""Training steps that are replayed as CUDA graphs against the same, one operation after another."""

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU"),
]


MODELS = ("transformer", "titans-mag", "tnt", "yaad", "memora", "atlas", "lact", "hope")


@pytest.mark.parametrize("name", MODELS)
def test_a_graph_trains_as_its_operations_do(evidence, some_novels, monkeypatch, name) -> None:
    model = evidence.models.MODELS[name].model("quick")
    run = evidence.runs.Run(model, evidence.novels.novels(some_novels), 3e-3, 12, 4, 256, 0)
    graph = evidence.runs.train(run, "cuda")
    monkeypatch.setattr(evidence.runs, "CAPTURE", run.steps)
    one_by_one = evidence.runs.train(run, "cuda")
    assert graph.captured and not one_by_one.captured
    # The mean loss of 12 steps of which each depends on the gradients of those before.
    assert graph.loss == pytest.approx(one_by_one.loss, rel=2e-3)


def test_weights_of_targets_are_those_of_the_batch(evidence, some_novels, monkeypatch) -> None:
    reading = evidence.associations.Associations((4, 8, 16), 96)
    overrides = {"vocab_size": 96, "tokenizer_name": None}
    run = evidence.runs.Run(
        evidence.runs.Model("titans-lmm", "quick", overrides), reading, 3e-3, 12, 8, 128, 0
    )
    graph = evidence.runs.train(run, "cuda")
    monkeypatch.setattr(evidence.runs, "CAPTURE", run.steps)
    assert graph.captured
    assert graph.loss == pytest.approx(evidence.runs.train(run, "cuda").loss, rel=2e-3)


def test_layers_that_ask_the_gpu_are_not_captured(evidence, some_novels) -> None:
    model = evidence.models.MODELS["titans-mac"].model("quick")
    run = evidence.runs.Run(model, evidence.novels.novels(some_novels), 3e-3, 6, 2, 256, 0)
    assert not evidence.runs.train(run, "cuda").captured
