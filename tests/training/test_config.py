import pytest

from nestor.errors import ConfigError, FileFormatError
from nestor.training.config import TrainConfig, load_config, shipped_configs
from nestor.training.settings import apply_overrides, parse_overrides, parse_value, write_toml


def config(**changes):
    return TrainConfig.from_dict(
        apply_overrides(
            {"run": {"steps": 10}}, [(k.replace("__", "."), v) for k, v in changes.items()], TrainConfig
        )
    )


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_every_shipped_configuration_reads_and_its_toml_reads_back_equal(name, tmp_path):
    loaded = load_config(name)
    assert shipped_configs()[name], "the first line says what the configuration is for"
    (tmp_path / "copy.toml").write_text(loaded.to_toml(), encoding="utf-8")
    assert load_config(tmp_path / "copy.toml") == loaded


def test_every_shipped_configuration_builds_its_model():
    from nestor.models import preset

    for name in shipped_configs():
        model = load_config(name).model
        assert preset(model.preset, model.size, **model.overrides).num_hidden_layers > 0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("3", 3),
        (".5", 0.5),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ('{"a": 1}', {"a": 1}),
        ("wsd", "wsd"),
        ("books/*.txt", "books/*.txt"),
        ("", ""),
    ],
)
def test_override_values_read_as_what_they_look_like(text, value):
    assert parse_value(text) == value and type(parse_value(text)) is type(value)


def test_overrides_take_both_forms_and_bare_flags():
    arguments = ["--optimizer.lr", "1e-3", "--run.compile", "--run.state-mode=pass", "--run.seed", "3"]
    assert parse_overrides(arguments) == [
        ("optimizer.lr", 1e-3),
        ("run.compile", True),
        ("run.state_mode", "pass"),
        ("run.seed", 3),
    ]


def test_overrides_reach_into_lists_and_open_tables():
    base = {"run": {"steps": 1}, "data": {"sources": [{"text": ["a"]}, {"task": "recall"}]}}
    changed = apply_overrides(
        base, [("data.sources.1.weight", 2), ("model.overrides.hidden_size", 64)], TrainConfig
    )
    made = TrainConfig.from_dict(changed)
    assert made.data.sources[1].weight == 2.0 and made.model.overrides == {"hidden_size": 64}
    assert "model" not in base, "the given values are left as they were"


def test_a_string_is_a_text_source():
    assert config(data__sources="book.txt").data.sources[0].text == ("book.txt",)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("optimizer.ler", "optimizer.lr"),
        ("lr", "optimizer.lr"),
        ("rum.steps", "run.steps"),
        ("run.stps", "run.steps"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(key, hint):
    with pytest.raises(ConfigError, match=f"no setting '{key}'.*'{hint}'"):
        apply_overrides({}, [(key, 1)], TrainConfig)


def test_an_unknown_key_in_a_file_is_refused_with_the_nearest(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("[run]\nsteps = 3\nsave_evry = 2\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run\.save_evry.*Did you mean 'run\.save_every'"):
        load_config(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer__lr": "fast"}, r"optimizer\.lr is 'fast'; it must be a number"),
        ({"run__steps": 2.5}, r"run\.steps is 2\.5; it must be a whole number"),
        ({"run__compile": 1}, r"run\.compile is 1; it must be true or false"),
        ({"optimizer__name": "muno"}, r"optimizer\.name is 'muno'.*Did you mean 'muon'"),
        ({"optimizer__name": "adamun"}, r"one of adamw, muon, adamuon, m3\. Did you mean 'adamuon'"),
        ({"optimizer__m3_v_source": "grad"}, r"m3_v_source is 'grad'.*Did you mean 'gradient'"),
        ({"optimizer__m3_slow_period": 0}, r"m3_slow_period is 0; it must be at least 1"),
        ({"optimizer__m3_slow_momentum": 1.0}, r"m3_slow_momentum is 1\.0; it must be in \[0, 1\)"),
        ({"optimizer__betas": [0.9]}, r"optimizer\.betas is \[0\.9\]; it is a pair"),
        ({"optimizer__betas": [0.9, 1.0]}, r"optimizer\.betas\.1 is 1\.0"),
        ({"run__tokens": 100}, r"give exactly one"),
        ({"run__accumulation": 3}, r"batch_size is 16, which run\.accumulation 3 does not divide"),
        ({"run__state_mode": "pass", "data__batch_size": 1}, r"'pass' hands a State to another lane"),
        ({"data__sequence_length": 0}, r"data\.sequence_length is 0; it must be at least 1"),
        ({"data__sources": []}, r"data\.sources is \[\]"),
        ({"data__sources": [{"weight": 1}]}, r"names neither text nor task"),
        ({"data__sources": [{"task": "recal"}]}, r"task 'recal'.*Did you mean 'recall'"),
        ({"data__sources": [{"task": "recall"}]}, r"no source names any"),
        ({"data__sources": [{"text": "a", "weight": 0}]}, r"weight of a source is 0\.0"),
        ({"model": 3}, r"model is 3; it is a table"),
    ],
)
def test_an_impossible_setting_is_refused_by_name_and_value(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="'quick-titan-mag'.*Did you mean 'quick-titans-mag'"):
        load_config("quick-titan-mag")
    broken = tmp_path / "broken.toml"
    broken.write_text("[run\nsteps = 3", encoding="utf-8")
    with pytest.raises(FileFormatError, match=r"broken\.toml is not a TOML file.*line 1"):
        load_config(broken)


def test_tokens_are_rounded_up_to_a_step_and_replace_steps_on_the_command_line():
    assert config(run__steps=0, run__tokens=16 * 256 * 3 + 1).total_steps == 4
    replaced = load_config("quick-transformer", [("run.tokens", 1_000_000)])
    assert replaced.run.steps == 0 and replaced.run.tokens == 1_000_000


def test_differences_leave_out_what_a_continuation_may_change():
    assert config().differences(config(run__log_every=7, run__out="x", name="y")) == {}
    assert config().differences(config(optimizer__lr=0.5)) == {"optimizer.lr": (1e-3, 0.5)}


def test_toml_writes_nested_tables_quotes_and_odd_keys():
    import tomllib

    values = {
        "a": 'say "hi"\n',
        "b": {"c d": [1, 2.5, True]},
        "e": [{"f": {"g": []}}, {"f": {}}],
        "h": 1e-300,
    }
    assert tomllib.loads(write_toml(values)) == {**values, "e": [{"f": {"g": []}}, {}]}
