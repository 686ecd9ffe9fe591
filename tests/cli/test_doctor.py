"""`nestor doctor` tells what is here, checks every operation, and fails when one is wrong."""

import json

import pytest
import torch

from nestor.cli import checks
from nestor.cli.main import main
from nestor.ops import neural_memory as operation


def test_every_operation_is_checked_and_right(capsys):
    assert main(["doctor", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    assert "neural_memory" in out and "ok" in out
    assert operation.choose_backend(operation.MemorySpec(), torch.device("cpu"))[0] in out
    assert "FAILED" not in out
    assert "cores" in out


def test_json_holds_versions_devices_and_checks(capsys):
    assert main(["doctor", "--device", "cpu", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert torch.__version__.startswith(findings["versions"]["torch"])
    assert findings["devices"][0]["name"] == "cpu"
    for check in findings["checks"]:
        assert check["ok"] and check["error"] <= check["tolerance"] and check["reason"]


def test_a_wrong_operation_is_named_and_the_status_is_1(capsys, monkeypatch):
    """The fast form is broken, not the report: the check itself has to notice."""
    for name in ("native_walk", "walk_chunks"):
        right = getattr(operation, name)

        def no_momentum(plan, tokens, *rest, right=right):
            return right(plan, tokens._replace(eta=tokens.eta * 0), *rest)

        monkeypatch.setattr(operation, name, no_momentum)
    assert main(["doctor", "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert "FAILED" in captured.out
    assert "neural_memory" in captured.err


@pytest.mark.parametrize("name", ["attend", "short_convolution", "linear_cross_entropy"])
def test_a_wrong_layer_operation_is_noticed_too(capsys, monkeypatch, name):
    right = getattr(checks, name)

    def one_token_late(x, *rest, **options):
        return right(x.roll(1, dims=1), *rest, **options)

    monkeypatch.setattr(checks, name, one_token_late)
    assert main(["doctor", "--device", "cpu"]) == 1
    assert capsys.readouterr().out.count("FAILED") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_here_is_one_line(capsys):
    assert main(["doctor", "--device", "cuda"]) == 2
    err = capsys.readouterr().err
    assert "device 'cuda' cannot be used" in err and "There is cpu." in err
    assert main(["doctor", "--device", "gpux"]) == 2
