import json
import math

import pytest
import torch

from nestor.errors import ConfigError, DataError, LockedError, NonFiniteError
from nestor.files import FileLock
from nestor.training import train
from nestor.training.checkpoint import list_checkpoints, read_trainer
from nestor.training.loop import Run


def same(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def interrupt_after(monkeypatch, step, signal=2):
    """Make the run receive a signal while it computes step `step`."""
    original = Run.train_step

    def train_step(self):
        original(self)
        if self.step == step:
            import os

            os.kill(os.getpid(), signal)

    monkeypatch.setattr(Run, "train_step", train_step)
    return lambda: monkeypatch.setattr(Run, "train_step", original)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_and_leaves_a_model_that_the_auto_classes_open(tiny):
    from transformers import AutoModelForCausalLM

    from nestor.data import load_tokenizer

    seen = []
    result = train(tiny(run__steps=30), on_step=seen.append, quiet=True)
    assert result.finished and result.exit_code == 0 and result.step == 30
    assert result.tokens == 30 * 4 * 32
    losses = [metrics["loss"] for metrics in seen if "loss" in metrics]
    assert losses[0] > 4.5 and losses[-1] < losses[0] - 1
    assert result.metrics["valid_bits_per_byte"] == pytest.approx(
        result.metrics["valid_loss"] / math.log(2), rel=0.02
    )
    model = AutoModelForCausalLM.from_pretrained(result.final)
    assert load_tokenizer(result.final).encode("a") == [97] and model.config.tokenizer_name == "bytes"
    assert json.loads((result.final / "training.json").read_text())["tokens"] == result.tokens
    assert "```python" in (result.final / "README.md").read_text()


def test_compiled_blocks_learn_the_same(tiny, monkeypatch, weights):
    """Traced and run as it is: what inductor makes of it is not this project's."""
    calls = []
    original = torch.nn.Module.compile

    def traced(module, **arguments):
        calls.append(type(module).__name__)
        original(module, backend="eager", **arguments)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    changes = {"run__steps": 2, "run__eval_every": 0, "model__preset": "transformer"}
    changes["model__overrides__memory"] = None
    plain, compiled = (
        train(tiny(run__out=str(out), run__compile=on, **changes), quiet=True)
        for out, on in ((tiny().folder / "a", False), (tiny().folder / "b", True))
    )
    assert calls == ["Block"] * 2
    one, other = weights(plain.final), weights(compiled.final)
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


def test_the_loss_reported_is_the_mean_over_targets(tiny, weights):
    """The first reported loss equals that of the untrained model on the first batch, computed by hand."""
    from nestor.training.inputs import train_stream
    from nestor.training.loop import seed_everything
    from nestor.training.model import build_model

    config = tiny(run__log_every=1, run__steps=1)
    result = train(config, quiet=True)
    from nestor.data import ByteTokenizer

    seed_everything(config.run.seed)
    model = build_model(config, ByteTokenizer(), None)
    batch = next(train_stream(config.data, ByteTokenizer(), config.run.seed, range(4)))
    logits = model(input_ids=batch["input_ids"], resets=batch["resets"]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    assert lines(result.folder)[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("mode", ["reset", "carry", "pass", "fitted-noise", "random-noise"])
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(tiny, tmp_path, weights, monkeypatch, mode):
    whole = train(tiny(run__out=str(tmp_path / "whole"), run__state_mode=mode), quiet=True)
    broken = tiny(run__state_mode=mode)
    again = interrupt_after(monkeypatch, 3)
    stopped = train(broken, quiet=True)
    again()
    assert not stopped.finished and stopped.exit_code == 130 and stopped.step == 3
    interrupt_after(monkeypatch, 7, signal=15)
    assert train(broken, quiet=True).exit_code == 143
    resumed = train(broken, quiet=True)
    assert resumed.finished and resumed.step == 10
    assert not same(weights(whole.final), weights(resumed.final))
    last = [list_checkpoints(result.folder / "checkpoints")[-1] for result in (whole, resumed)]
    assert (last[0] / "optimizer.safetensors").read_bytes() == (
        last[1] / "optimizer.safetensors"
    ).read_bytes()
    assert (last[0] / "state.safetensors").is_file() is (mode in ("carry", "pass"))
    assert read_trainer(last[0])["data"] == read_trainer(last[1])["data"]
    valid = [
        [m["valid_loss"] for m in lines(result.folder) if "valid_loss" in m] for result in (whole, resumed)
    ]
    assert valid[0] == valid[1]


def test_resume_from_an_older_checkpoint_drops_the_lines_of_the_steps_it_repeats(tiny, weights):
    import shutil

    first = train(tiny(), quiet=True)
    expected = weights(first.final)
    shutil.rmtree(first.final)
    shutil.rmtree(first.folder / "checkpoints" / "step-000010")
    assert not same(expected, weights(train(tiny(), quiet=True).final))
    steps = [m["step"] for m in lines(first.folder) if "loss" in m]
    assert steps == sorted(set(steps)) and steps[-1] == 10


def test_state_modes_differ_and_the_first_step_is_the_same(tiny, tmp_path):
    losses = {}
    for mode in ("reset", "carry", "pass"):
        config = tiny(run__out=str(tmp_path / mode), run__state_mode=mode, run__log_every=1, run__steps=3)
        losses[mode] = [m["loss"] for m in lines(train(config, quiet=True).folder) if "loss" in m]
    assert losses["reset"][0] == losses["carry"][0] == losses["pass"][0]
    assert len({tuple(values) for values in losses.values()}) == 3


def test_accumulation_gives_the_weights_of_one_large_batch(tiny, tmp_path, weights):
    runs = [
        train(
            tiny(
                run__out=str(tmp_path / str(n)),
                run__accumulation=n,
                run__precision="fp64",
                run__eval_every=0,
                run__steps=5,
            ),
            quiet=True,
        )
        for n in (1, 4)
    ]
    one = weights(runs[0].final)
    for name, tensor in weights(runs[1].final).items():
        assert torch.allclose(one[name], tensor, rtol=0, atol=1e-9), name


def test_activation_checkpointing_changes_nothing(tiny, tmp_path, weights):
    settings = {"run__precision": "fp64", "run__steps": 4, "run__eval_every": 0}
    plain = train(tiny(**settings), quiet=True)
    config = tiny(**settings, run__activation_checkpointing=True, run__out=str(tmp_path / "checkpointed"))
    for name, tensor in weights(train(config, quiet=True).final).items():
        assert torch.allclose(weights(plain.final)[name], tensor, rtol=0, atol=1e-10), name


@pytest.mark.parametrize("changes", [{"run__precision": "bf16"}, {"optimizer__name": "muon"}])
def test_other_numerics_train_too(tiny, changes):
    config = tiny(run__steps=20, run__eval_every=0, **changes)
    losses = [m["loss"] for m in lines(train(config, quiet=True).folder)]
    assert losses[-1] < losses[0] - 0.5


def test_a_non_finite_loss_stops_before_it_reaches_the_weights(tiny, monkeypatch):
    original = Run.forward

    def forward(self, *arguments):
        loss, state = original(self, *arguments)
        return (loss * float("nan") if self.step == 6 else loss), state

    monkeypatch.setattr(Run, "forward", forward)
    with pytest.raises(
        NonFiniteError, match=r"loss is not finite at step 7 .*checkpoints/step-000005\. Lower"
    ):
        train(tiny(run__eval_every=0), quiet=True)
    monkeypatch.setattr(Run, "forward", original)
    result = train(tiny(run__eval_every=0, optimizer__lr=1e-3), resume="force", quiet=True)
    assert result.finished and math.isfinite(result.metrics["loss"])


def test_a_non_finite_gradient_is_named_as_one(tiny, monkeypatch):
    original = Run.forward

    def forward(self, *arguments):
        loss, state = original(self, *arguments)
        if self.step == 1:
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss, state

    monkeypatch.setattr(Run, "forward", forward)
    with pytest.raises(
        NonFiniteError, match="the gradient is not finite at step 2 .*There is no checkpoint yet"
    ):
        train(tiny(), quiet=True)


def test_a_run_folder_of_another_configuration_is_refused_unless_told(tiny):
    train(tiny(run__steps=3), quiet=True)
    with pytest.raises(ConfigError, match=r"optimizer\.lr was 0\.01 and is 0\.5; run\.steps was 3 and is 4"):
        train(tiny(run__steps=4, optimizer__lr=0.5), quiet=True)
    longer = train(tiny(run__steps=4), resume="force", quiet=True)
    assert longer.finished and longer.step == 4
    anew = train(tiny(run__steps=2, optimizer__lr=0.5), resume="never", quiet=True)
    assert anew.step == 2 and [m["step"] for m in lines(anew.folder) if "loss" in m] == [2]


def test_a_complete_run_is_not_trained_again(tiny, capsys):
    first = train(tiny(run__steps=3), quiet=True)
    written = (first.final / "model.safetensors").stat().st_mtime_ns
    second = train(tiny(run__steps=3))
    assert "is complete at step 3" in capsys.readouterr().out
    assert (second.final / "model.safetensors").stat().st_mtime_ns == written
    assert second.metrics == first.metrics


def test_a_foreign_folder_and_a_second_process_are_refused(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("irreplaceable")
    for resume in ("auto", "force", "never"):
        with pytest.raises(ConfigError, match="is not empty and holds no run"):
            train(tiny(), resume=resume, quiet=True)
    with FileLock(tmp_path / "other"), pytest.raises(LockedError, match="in use by process"):
        train(tiny(run__out=str(tmp_path / "other")), quiet=True)


def test_only_the_last_and_the_best_checkpoints_are_kept(tiny):
    result = train(tiny(run__steps=12, run__save_every=2, run__keep_last=2, run__eval_every=0), quiet=True)
    kept = [folder.name for folder in list_checkpoints(result.folder / "checkpoints")]
    assert kept == ["step-000010", "step-000012"]


def test_the_best_checkpoint_survives(tiny, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.6, 2.7])
    monkeypatch.setattr("nestor.training.loop.validate", lambda *_, **__: {"valid_loss": next(losses)})
    config = tiny(run__steps=10, run__eval_every=2, run__save_every=2, run__keep_last=1)
    kept = [folder.name for folder in list_checkpoints(train(config, quiet=True).folder / "checkpoints")]
    assert kept == ["step-000004", "step-000010"]


def test_text_shorter_than_a_segment_is_refused(tiny, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Too short.\n")
    with pytest.raises(DataError, match=r"fewer than one segment of 32"):
        train(tiny(data__sources=str(short), run__eval_every=0), quiet=True)
    with pytest.raises(DataError, match=r"held-out text has \d+ tokens.*valid_fraction"):
        train(tiny(data__sequence_length=1000, run__out=str(tmp_path / "b")), quiet=True)


def test_a_model_with_too_few_embeddings_is_refused(tiny):
    with pytest.raises(DataError, match="tokenizer has 260 entries and the model's vocab_size is 100"):
        train(tiny(model__overrides__vocab_size=100), quiet=True)


def test_an_unknown_preset_or_setting_is_refused_with_the_nearest(tiny, tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'titans-mag'"):
        train(tiny(model__preset="titan-mag"), quiet=True)
    with pytest.raises(ConfigError, match="Did you mean 'hidden_size'"):
        train(tiny(model__overrides__hiden_size=3, run__out=str(tmp_path / "b")), quiet=True)
    with pytest.raises(ConfigError, match="model.path is"):
        train(tiny(model__path=str(tmp_path / "nowhere"), run__out=str(tmp_path / "c")), quiet=True)


def test_training_goes_on_from_a_saved_model(tiny, tmp_path, weights):
    first = train(tiny(run__steps=2), quiet=True)
    config = tiny(
        model__path=str(first.final), run__out=str(tmp_path / "second"), run__steps=1, optimizer__lr=1e-12
    )
    second = train(config, quiet=True)
    for name, tensor in weights(second.final).items():
        assert torch.allclose(weights(first.final)[name], tensor, atol=1e-9), name


def test_sources_are_mixed_and_the_recall_task_has_its_facts(tiny, text_file):
    from nestor.data import ByteTokenizer
    from nestor.training.inputs import train_stream

    sources = [
        {"text": [str(text_file)], "weight": 1},
        {"task": "recall", "weight": 3, "options": {"n_facts": 1, "n_questions": 1, "document_length": 256}},
    ]
    config = tiny(data__sources=sources, data__sequence_length=256)
    batch = next(train_stream(config.data, ByteTokenizer(), 0, range(4)))
    texts = [ByteTokenizer().decode(row) for row in batch["input_ids"]]
    assert ["The key of" in text for text in texts].count(True) == 3
    with pytest.raises(ConfigError, match=r"no option 'n_fact'.*'n_facts'"):
        bad = tiny(data__sources=[sources[0], {"task": "recall", "options": {"n_fact": 1}}])
        train_stream(bad.data, ByteTokenizer(), 0, range(4))


def test_a_missing_tracker_is_a_notice(tiny, monkeypatch, capsys):
    monkeypatch.setattr("nestor.training.loop.tracker_of", lambda _: None)
    monkeypatch.setattr("nestor.training.logging.tracker_of", lambda _: None)
    monkeypatch.setattr("nestor.training.distributed.tracker_of", lambda _: None)
    assert train(tiny(run__tracker="wandb", run__steps=1)).finished
    assert "wandb is not installed; metrics go to" in capsys.readouterr().out


def test_tensorboard_gets_the_metrics(tiny):
    pytest.importorskip("tensorboard")
    result = train(tiny(run__tracker="tensorboard", run__steps=3), quiet=True)
    assert list((result.folder / "logs").rglob("events.out.tfevents.*"))
