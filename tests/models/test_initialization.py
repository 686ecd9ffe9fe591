"""What a model's parameters start as."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from nestor import NestorForCausalLM, preset

# A preset of each kind of layer that starts its parts itself.
NAMES = (
    "transformer",
    "titans-mac",
    "titans-mag",
    "titans-mal",
    "tnt",
    "moneta",
    "atlas",
    "lact",
    "ttt-mlp",
    "hope",
)


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


def test_what_a_file_holds_stays_and_the_rest_starts(tmp_path) -> None:
    """A file without one matrix of a layer whose parameters are all of its parts."""
    model = NestorForCausalLM(preset("hope", "quick"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    missing = "layers.0.mixer.v_proj.weight"
    removed = weights.pop(missing)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = dict(NestorForCausalLM.from_pretrained(tmp_path).named_parameters())
    for name, value in weights.items():
        if name in found:
            torch.testing.assert_close(found[name], value, rtol=0, atol=0)
    assert found[missing].mean().abs() < 0.1 < removed.mean()
