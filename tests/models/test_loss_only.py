"""`loss_only`: the loss and its gradients without logits, by whichever form computes it."""

import pytest
import torch

import nestor
from nestor.errors import ShapeError
from nestor.models import loss as losses


@pytest.fixture
def model():
    return nestor.NestorForCausalLM(nestor.preset("titans-mag", "quick", num_hidden_layers=1)).double()


@pytest.fixture
def fused(monkeypatch):
    """The linear cross-entropy is computed apart from the logits, here by PyTorch; calls are counted."""
    calls = []

    def counted(x, weight, targets):
        calls.append(x.shape)
        return operation(x, weight, targets, "torch")

    operation = losses.linear_cross_entropy
    monkeypatch.setattr(losses, "linear_cross_entropy", counted)
    monkeypatch.setattr(losses, "choose_backend", lambda *_: ("liger", ""))
    return calls


def both(model, **inputs):
    """Loss and gradients with logits and without."""
    out = []
    for loss_only in (False, True):
        model.zero_grad()
        output = model(**inputs, loss_only=loss_only)
        assert (output.logits is None) == loss_only
        output.loss.backward()
        out.append([output.loss.detach(), *(p.grad.clone() for p in model.parameters())])
    return out


@pytest.mark.parametrize("items", [None, 7, torch.tensor(7)])
def test_the_loss_without_logits_is_the_same(model, fused, items):
    ids = torch.randint(0, 256, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    want, got = both(model, input_ids=ids, attention_mask=mask, labels=ids, num_items_in_batch=items)
    assert len(fused) == 1
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


def test_weighted_losses_and_other_heads_go_through_logits(model, fused):
    ids = torch.randint(0, 256, (2, 12))
    both(model, input_ids=ids, shift_labels=ids, loss_weights=torch.rand(2, 12))
    model.lm_head = torch.nn.Sequential(model.lm_head)
    both(model, input_ids=ids, labels=ids)
    assert not fused


def test_there_must_be_something_to_predict(model):
    with pytest.raises(ShapeError, match="loss_only"):
        model(torch.zeros(1, 4, dtype=torch.int64), loss_only=True)
