"""Training steps that are replayed as CUDA graphs against the same, one operation after another."""

from dataclasses import replace
from itertools import islice

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU"),
]

CUDA = torch.device("cuda")
CAPTURED = (
    "transformer", "sliding-window", "hope-attention", "lact", "titans-lmm", "titans-mag", "titans-mal",
    "tnt", "moneta", "yaad", "memora", "atlas", "ttt-linear", "ttt-mlp", "hope",
)  # fmt: skip


@pytest.fixture
def run(evidence, some_novels):
    model = evidence.models.MODELS["titans-lmm"].model("quick")
    return evidence.runs.Run(model, evidence.novels.novels(some_novels), 3e-3, 12, 4, 256, 0)


def compare(evidence, run):
    """Loss and gradients of the batch after the captured one, replayed and one operation after another."""
    model = run.model.build(0).to(CUDA)
    batches = list(
        islice(run.reading.batches(0, run.batch_size, run.context), evidence.gradients.Gradients.eager + 2)
    )
    found = []
    with evidence.runs.own_queue(CUDA):
        for captures in (False, True):
            gradients = evidence.gradients.Gradients(model, CUDA)
            for batch in batches if captures else batches[-1:]:
                loss = gradients(batch)
            assert gradients.replays == (2 if captures else 0)
            kept = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            found.append((float(loss), kept))
    (loss, one_by_one), (replayed_loss, replayed) = found
    assert replayed_loss == pytest.approx(loss, rel=1e-3)
    assert one_by_one.keys() == replayed.keys()
    largest = max(float(gradient.norm()) for gradient in one_by_one.values())
    for name, gradient in one_by_one.items():
        # Products of bfloat16 and sums in any order; where a gradient is small it is mostly that.
        assert (replayed[name] - gradient).norm() <= 0.03 * gradient.norm() + 1e-3 * largest, name


@pytest.mark.parametrize("name", CAPTURED)
def test_a_graph_has_the_gradients_of_its_operations(evidence, run, name) -> None:
    compare(evidence, replace(run, model=evidence.models.MODELS[name].model("quick")))


def test_weights_of_targets_are_those_of_the_batch(evidence, run) -> None:
    model = evidence.runs.Model("titans-lmm", "quick", {"vocab_size": 96, "tokenizer_name": None})
    reading = evidence.associations.Associations((4, 8, 16), 96)
    compare(evidence, replace(run, model=model, reading=reading, batch_size=8, context=128))


def test_training_by_a_graph_is_training(evidence, run, monkeypatch) -> None:
    graph = evidence.runs.train(run, "cuda")
    monkeypatch.setattr(evidence.gradients.Gradients, "eager", run.steps)
    one_by_one = evidence.runs.train(run, "cuda")
    assert graph.captured and not one_by_one.captured
    # The mean loss of 12 steps of which each depends on the gradients of those before.
    assert graph.loss == pytest.approx(one_by_one.loss, rel=2e-3)


def test_layers_that_ask_the_gpu_are_not_captured(evidence, run) -> None:
    model = evidence.models.MODELS["titans-mac"].model("quick")
    assert not evidence.runs.train(replace(run, model=model, steps=6, batch_size=2), "cuda").captured


def test_batches_of_another_shape_have_a_graph_of_their_own(evidence, run) -> None:
    """First on short rows, as documents of a curriculum are, then on long ones."""
    model = run.model.build(0).to(CUDA)
    gradients = evidence.gradients.Gradients(model, CUDA)
    short, long = (list(islice(run.reading.batches(0, *size), 5)) for size in ((8, 128), (4, 256)))
    with evidence.runs.own_queue(CUDA):
        for batch in (*short, *long):
            loss = gradients(batch)
        assert gradients.replays == 2 * (5 - evidence.gradients.Gradients.eager)
        kept = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        expected = evidence.gradients.Gradients(model, CUDA)(long[-1])
    assert float(loss) == pytest.approx(float(expected), rel=1e-3)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert (kept[name] - parameter.grad).norm() <= 0.03 * parameter.grad.norm() + 1e-4, name
