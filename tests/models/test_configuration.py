"""NestorConfig: defaults, and errors that say the value seen and the value wanted."""

import pytest

from nestor import NestorConfig
from nestor.errors import ConfigError


def test_defaults_are_filled_in():
    config = NestorConfig(hidden_size=96, num_hidden_layers=2, num_attention_heads=6)
    assert config.layer_types == ["full_attention"] * 2
    assert config.feed_forward_types == ["swiglu"] * 2
    assert config.num_key_value_heads == 6
    assert config.intermediate_size == 256
    assert config.head_dim == 16


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"hiden_size": 64}, "unknown setting 'hiden_size'.*Did you mean 'hidden_size'"),
        ({"hidden_size": 100, "num_attention_heads": 3}, "100 does not divide into 3 .* such as 2"),
        ({"hidden_size": 12, "num_attention_heads": 4}, "even width"),
        ({"num_key_value_heads": 3}, "4 does not divide into 3 key-value heads"),
        ({"sliding_window": 0}, "sliding_window is 0; .* at least 1"),
        ({"attention_conv_kernel": 1}, "attention_conv_kernel is 1; .* at least 2"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"vocab_size": 1.5}, "vocab_size is 1.5"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"layer_types": ["full_attention"]}, "names 1 layers, num_hidden_layers is 4"),
        ({"layer_types": ["memory_as_gait"] * 4}, "Did you mean 'memory_as_gate'"),
        ({"feed_forward_types": ["swigloo"] * 4}, "Did you mean 'swiglu'"),
        ({"layer_types": ["sliding_attention"] * 4}, "needs sliding_window"),
        ({"layer_types": ["memory_as_context"] * 4}, "needs segment_size"),
    ],
)
def test_impossible_values_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        NestorConfig(**settings)


def test_a_configuration_broken_later_is_not_saved(tmp_path):
    config = NestorConfig()
    config.sliding_window = -4
    with pytest.raises(ConfigError, match="sliding_window is -4"):
        config.save_pretrained(tmp_path)


def test_saving_and_loading_keeps_every_setting(tmp_path):
    config = NestorConfig(
        layer_types=["full_attention", "sliding_attention"] * 2,
        sliding_window=7,
        memory={"depth": 3},
        qk_norm=True,
    )
    config.save_pretrained(tmp_path)
    assert NestorConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
