"""The engine of the evidence and the table of language models: runs, the choice of rates, what is kept."""

import json
from dataclasses import replace
from itertools import count, islice

import pytest
import torch

from nestor import NestorForCausalLM
from nestor.errors import ConfigError, DataError, JobError, NonFiniteError
from nestor.models.presets import count_parameters

RATES = (1e-7, 1e-2)


@pytest.fixture
def args(evidence, some_novels, tmp_path):
    return evidence.language.Args(
        models=("transformer", "titans-lmm"), seeds=(0, 1), size="quick", data=some_novels, tokens=1024,
        context=64, batch_size=4, long=256, long_documents=2, learning_rates=RATES, tuning_share=0.25,
        out=tmp_path / "out", results=tmp_path / "results",
    )  # fmt: skip


@pytest.fixture
def run(evidence, some_novels):
    model = evidence.runs.Model("transformer", "quick", {"hidden_size": 32, "num_hidden_layers": 1})
    return evidence.runs.Run(model, evidence.novels.novels(some_novels), 1e-2, 30, 4, 64, 0)


def test_a_run_learns_and_is_the_same_again(evidence, run) -> None:
    trained = evidence.runs.train(run)
    assert [step for step, _ in trained.curve] == [25, 30] and trained.finite
    assert trained.curve[1][1] < trained.curve[0][1] < 5.6 and trained.loss == trained.curve[1][1]
    assert trained.tokens_per_second > 0 and trained.peak_memory is None
    assert evidence.runs.train(run).curve == trained.curve
    assert evidence.runs.train(replace(run, seed=1)).curve != trained.curve
    # A model that is given is trained on, from where it is.
    on = evidence.runs.train(replace(run, steps=5, learning_rate=1e-4), model=trained.model)
    assert on.model is trained.model and on.loss < trained.curve[0][1]


def test_speed_is_that_of_the_tokens_read_after_the_first_steps(evidence, run, monkeypatch) -> None:
    class Growing:
        """Rows of 64 tokens in the first ten batches, then of 32."""

        def batches(self, *settings):
            for step, batch in enumerate(run.reading.batches(*settings)):
                length = 64 if step < 10 else 32
                yield {name: part[:, :length] for name, part in batch.items()}

    clock = count()
    monkeypatch.setattr(evidence.runs, "now", lambda device: next(clock))
    trained = evidence.runs.train(replace(run, reading=Growing(), steps=20))
    assert evidence.runs.WARM == 5 and trained.tokens_per_second == 4 * (5 * 64 + 10 * 32)


def test_what_is_read_is_a_function_of_seed_and_step(evidence, run, some_novels) -> None:
    def read(seed):
        return list(islice(run.reading.batches(seed, 4, 64), 3))

    first, again, other = read(0), read(0), read(1)
    for one, same in zip(first, again, strict=True):
        assert all(torch.equal(one[name], same[name]) for name in one) and not one["resets"].any()
    assert not torch.equal(first[2]["input_ids"], other[2]["input_ids"])
    settings = run.settings()
    assert str(some_novels) not in json.dumps(settings) and "lr" not in settings["optimizer"]
    with pytest.raises(DataError, match=r"has no novels-train-a.*--data"):
        evidence.novels.novels(some_novels / "nowhere")


def test_a_run_that_diverges_is_not_chosen(evidence, run, tmp_path, monkeypatch) -> None:
    def validate(model, device):
        return {"valid": 1.0}

    def not_finite(model, device):
        raise NonFiniteError("a score is not finite")

    maker = evidence.study.Maker(tmp_path, validate, validate)
    with monkeypatch.context() as patch:
        loss = evidence.gradients.Gradients.__call__
        patch.setattr(evidence.gradients.Gradients, "__call__", lambda *given: loss(*given) * float("nan"))
        lost = maker(run, "lost-0", "cpu")
    assert lost["loss"] is None and evidence.study.by_validation(lost) == float("inf")
    assert not (tmp_path / "lost-0").exists() and lost["curve"] == [[25, None]]
    lost = evidence.study.Maker(tmp_path, not_finite, validate)(replace(run, steps=2), "lost-1", "cpu")
    assert "valid" not in lost and "no number" in evidence.study.line(lost)
    assert evidence.study.by_validation(maker(replace(run, steps=2), "found-0", "cpu")) == 1.0


def test_settings_of_a_trained_model_change_without_its_weights(evidence) -> None:
    model = evidence.runs.Model("titans-lmm", "quick", {"hidden_size": 32}).build(0).eval()
    other = evidence.runs.with_settings(model, memory={"chunk_size": 16})
    assert model.layers[0].mixer.spec.chunk_size == 64 and other.layers[0].mixer.spec.chunk_size == 16
    ids = torch.arange(40)[None]
    assert not torch.allclose(model(ids).logits, other(ids).logits, atol=1e-6)
    same = evidence.runs.with_settings(other, memory={"chunk_size": 64})
    torch.testing.assert_close(same(ids).logits, model(ids).logits)


def test_the_table_is_made_of_runs_that_are_kept(evidence, args, monkeypatch) -> None:
    monkeypatch.setattr(evidence.language, "TIMED", 1)
    results = evidence.language.main(args, say=lambda _: None)
    found = {row["model"]: row for row in results["rows"]}
    assert list(found) == ["transformer", "titans-lmm"] and not results["left_out"]
    for row in found.values():
        # A rate at which nothing is learned cannot win.
        assert row["learning_rate"] == 1e-2 and row["tuning"]["1e-07"] > row["tuning"]["0.01"]
        assert len(row["bits_per_byte"]["by_seed"]) == 2 and row["tokens_per_second"] > 0
        assert row["long"]["edges"] == [0, 16, 32, 64, 128, 256] and list(row["long"]["stretches"]) == [
            "0 to 256"
        ]
        assert 1 < row["long"]["stretches"]["0 to 256"]["estimate"] < 8
    minus = found["titans-lmm"]["minus_transformer"]
    ours, base = (found[name]["bits_per_byte"]["by_seed"] for name in ("titans-lmm", "transformer"))
    assert minus["by_seed"] == [a - b for a, b in zip(ours, base, strict=True)]
    assert minus["low"] < minus["estimate"] < minus["high"] and minus["method"] == "t"

    table = (args.results / "language-quick.md").read_text()
    assert "| transformer | " in table and (args.results / "language-quick-speed.png").is_file()
    evidence.language.main(replace(args, table_only=True, data=args.out), say=lambda _: None)
    assert (args.results / "language-quick.md").read_text() == table

    # Trained weights give the number that is kept with them.
    _, report = evidence.novels.valid(args.data, args.context)
    model = evidence.runs.load_weights(args.out / "weights" / "titans-lmm-1", "cpu")
    assert report(model, "cpu")["bits_per_byte"] == pytest.approx(ours[1], abs=1e-6)

    ran = []
    original = evidence.study.train
    monkeypatch.setattr(evidence.study, "train", lambda run, device: ran.append(run) or original(run, device))
    for name in ("titans-lmm-1", "tuning/transformer-0.01"):
        (args.out / f"{name}.json").unlink()
    again = evidence.language.main(args, say=lambda _: None)
    assert [(run.model.preset, run.seed) for run in ran] == [
        ("transformer", evidence.study.TUNING_SEED), ("titans-lmm", 1)
    ]  # fmt: skip
    for row in [*results["rows"], *again["rows"]]:
        del row["seconds"]
    assert again["rows"] == results["rows"]

    for changes, which in (({"tokens": 2048}, "'steps': 1"), ({"long": 128}, "'measure.each.1.length'")):
        with pytest.raises(ConfigError, match=f"transformer-1e-07.json is of a run with .*{which}"):
            evidence.language.main(replace(args, **changes), say=lambda _: None)


def test_jobs_wait_for_the_trials_of_their_rate(evidence, args) -> None:
    sweep = args.sweep(args.title, print)
    rows = [args.row(name, evidence.models.MODELS[name].model(args.size)) for name in args.models]
    jobs = sweep.jobs(rows)
    assert [job.name for job in jobs[:2]] == ["tuning/transformer-1e-07", "tuning/transformer-0.01"]
    runs = {job.name: job.after for job in jobs if job.after}
    assert runs["titans-lmm-1"] == ("tuning/titans-lmm-1e-07", "tuning/titans-lmm-0.01")
    assert len(jobs) == 8 and list(runs) == [
        "transformer-0", "transformer-1", "titans-lmm-0", "titans-lmm-1"
    ]  # fmt: skip
    trial, other = rows[0].tuning, rows[0].runs[1]
    assert trial.seed == evidence.study.TUNING_SEED and other.seed == 1 and other.steps == 4 * trial.steps


@pytest.mark.parametrize("size", ["5m", "60m"])
def test_all_models_have_the_same_parameters(evidence, size) -> None:
    counts = {}
    for name, entry in evidence.models.MODELS.items():
        with torch.device("meta"):
            model = NestorForCausalLM(entry.model(size).config())
        counts[name] = count_parameters(model)["non_embedding"]
        assert model.config.vocab_size == 260
    assert max(counts.values()) < 1.01 * min(counts.values())


def test_the_rows_are_what_they_are_called(evidence) -> None:
    models = {name: entry.model("5m").config() for name, entry in evidence.models.MODELS.items()}
    assert models["transformer"].layer_types == ["full_attention"] * 4
    assert models["sliding-window"].layer_types == ["sliding_attention"] * 4
    assert models["sliding-window"].sliding_window == models["titans-mag"].sliding_window == 256
    assert [models[name].memory["kind"] for name in ("moneta", "yaad", "memora", "atlas")] == [
        "moneta", "yaad", "memora", "atlas"
    ]  # fmt: skip
    chunks = {
        models[name].memory["chunk_size"] for name in ("titans-lmm", "moneta", "yaad", "memora", "atlas")
    }
    assert chunks == {64} and models["moneta"].memory["recompute"] is True


def test_what_a_machine_cannot_run_is_left_out_and_said(evidence, args) -> None:
    said = []
    args = replace(args, models=("kda",))
    results = evidence.language.main(args, say=said.append)
    assert said[0] == "kda is left out: it needs a GPU, and the device is cpu" and results["rows"] == []
    assert "- kda: left out, it needs a GPU" in said[-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ("hop",)}, "Did you mean 'hope'"),
        ({"size": "6m"}, "--size is '6m'"),
        ({"seeds": (1, 1)}, r"--seeds are \[1, 1\]; give some, each once"),
        ({"tokens": 1000}, "--tokens is 1000 and --tuning-share 0.25; a step reads 256"),
        ({"tuning_share": 1.5}, "--tuning-share is 1.5"),
        ({"learning_rates": (0.0, 1.0)}, "must be above 0"),
    ],
)
def test_refusals(evidence, args, changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        evidence.language.main(replace(args, **changes), say=lambda _: None)
    assert not args.out.exists()


def test_a_run_that_fails_leaves_the_others_their_rows(evidence, tmp_path, monkeypatch) -> None:
    sweep = evidence.study.Sweep(tmp_path, (1.0,), None, None, None)
    seeds = {0: None, 1: None}
    rows = {name: (sweep, evidence.study.Row(name, None, seeds)) for name in ("small", "large")}
    said = []

    def fail(*_given):
        raise JobError("large-1: no memory")

    monkeypatch.setattr(evidence.study, "run_jobs", fail)
    with pytest.raises(JobError):
        evidence.study.run_rows(rows, None, "", said.append)
    for name in ("small-0", "small-1", "large-0"):
        sweep.path(name).touch()
    assert evidence.study.run_rows(rows, None, "", said.append) == {"large": "a run failed"}
    assert said == ["large-1: no memory"]


def test_gradients_are_of_this_batch_alone(evidence, run) -> None:
    model = run.model.build(0)
    gradients = evidence.gradients.Gradients(model, torch.device("cpu"))
    first, second = islice(run.reading.batches(0, 4, 64), 2)
    second["weights"][:, ::2] = 0.0
    for batch in (first, second):
        loss = gradients(batch)
        output = model(batch["input_ids"]).logits.flatten(0, 1).log_softmax(-1)
        labels = batch["labels"].flatten()
        each = -output.gather(1, labels.clamp(min=0)[:, None])[:, 0]
        weights = batch["weights"].flatten() * (labels >= 0)
        expected = (each * weights).sum() / weights.sum()
        used = [parameter for parameter in model.parameters() if parameter.grad is not None]
        wanted = torch.autograd.grad(expected, used)
        torch.testing.assert_close(loss, expected.detach())
        for parameter, gradient in zip(used, wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    assert gradients.replays == 0
