"""A tiny saved model, and a way to run a command with something on standard input."""

import io
import sys
from pathlib import Path

import pytest
import torch
import transformers.models.auto  # noqa: F401

import nestor
from nestor.cli.main import main


def tiny_config(**overrides):
    """A transformer whose window is shorter than the texts of these tests."""
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "layer_types": ["sliding_attention"] * 2,
        "sliding_window": 16,
        "initializer_range": 0.2,
        "tokenizer_name": "bytes",
    }
    return nestor.NestorConfig(**(settings | overrides))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(5)
    nestor.NestorForCausalLM(tiny_config()).save_pretrained(folder)
    return folder


@pytest.fixture
def nestor_command(monkeypatch, capsys):
    """Run `nestor ...` in this process: (status, standard output, standard error)."""

    def run(*arguments: object, stdin: str | bytes = ""):
        data = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        capsys.readouterr()
        status = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run
