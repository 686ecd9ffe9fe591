"""What a model's parameters start as."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from nestor import NestorForCausalLM, preset
from nestor.cli.loading import load_model
from nestor.errors import FileFormatError
from nestor.training.model import open_model

# A preset of each kind of layer that starts its parts itself.
NAMES = (
    "transformer", "titans-mac", "titans-mag", "titans-mal", "tnt", "moneta", "atlas", "lact", "ttt-mlp",
    "hope",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_layers_start_their_parts_after_these_started_themselves(name, monkeypatch) -> None:
    started = []
    original = NestorForCausalLM._init_weights

    def spy(model, module):
        started.append(module)
        original(model, module)

    monkeypatch.setattr(NestorForCausalLM, "_init_weights", spy)
    model = NestorForCausalLM(preset(name, "quick"))
    places = {id(module): place for place, module in enumerate(started)}
    layers = [module for module in model.modules() if hasattr(module, "initialize")]
    assert layers and {id(one) for one in layers} <= set(places)
    assert len(places) == len(started)
    for layer in layers:
        assert all(places.get(id(part), -1) <= places[id(layer)] for part in layer.modules())


def test_projections_and_gates_of_hope_start_as_its_layer_says() -> None:
    model = NestorForCausalLM(
        preset("hope", "quick", memory={"adaptive": ["k", "v"], "step_bias": [1, 2, 3, 4]})
    )
    for layer in model.layers:
        mixer = layer.mixer
        torch.testing.assert_close(mixer.q_proj.weight, mixer.k_proj.weight)
        assert mixer.v_proj.weight.std().item() == pytest.approx(model.config.hidden_size**-0.5, rel=0.05)
        assert mixer.gate_proj.bias[:4].tolist() == [1, 2, 3, 4]


PARTS = {
    "titans-lmm": ("initial.0", "gate_proj.bias", "v_proj.weight"),
    "ttt-mlp": ("initial.0",),
    "lact": ("initial.0", "step_proj.bias"),
    "moneta": ("initial.0",),
    "hope": ("initial.mem.0", "gate_bias.eta", "v_proj.weight"),
}


@pytest.mark.parametrize(("name", "part"), [(name, part) for name, parts in PARTS.items() for part in parts])
def test_what_a_file_holds_stays_and_the_rest_starts(tmp_path, name, part) -> None:
    """A file without one part of a layer: that is as in a new model, and all others are those of the file."""
    torch.manual_seed(0)
    model = NestorForCausalLM(preset(name, "quick"))
    missing = f"layers.0.mixer.{part}"
    usual = dict(model.named_parameters())[missing].detach().clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(10.0)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop(missing)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = dict(NestorForCausalLM.from_pretrained(tmp_path).named_parameters())
    assert set(found) == {*weights, missing}
    for one, value in weights.items():
        torch.testing.assert_close(found[one], value, rtol=0, atol=0)
    # Drawn anew, of the same mean and deviation.
    spread = usual.std(correction=0)
    torch.testing.assert_close(found[missing].mean(), usual.mean(), rtol=0.05, atol=0.1 * float(spread))
    torch.testing.assert_close(found[missing].std(correction=0), spread, rtol=0.1, atol=1e-6)


def test_attention_with_convolutions_starts_as_memories_do() -> None:
    model = NestorForCausalLM(preset("transformer", "quick", attention_conv_kernel=4))
    for layer in model.layers:
        torch.testing.assert_close(layer.mixer.q_proj.weight, layer.mixer.k_proj.weight, rtol=0, atol=0)


def test_a_model_that_lacks_weights_is_refused(tmp_path) -> None:
    model = NestorForCausalLM(preset("titans-lmm", "quick"))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in ("layers.1.mixer.initial.0", "layers.1.mixer.q_proj.weight"):
        weights.pop(name)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for opened in (lambda: open_model(tmp_path, torch.float32), lambda: load_model(str(tmp_path), "cpu")):
        with pytest.raises(FileFormatError, match=r"lack layers\.1\.mixer\.initial\.0 and 1 more"):
            opened()
