"""The recipe for formal languages: its baselines are what they are called, its scores and files hold."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nestor.data.tasks.formal_languages import (
    LANGUAGES,
    distinct_strings,
    formal_batch,
    formal_language,
)
from nestor.errors import ConfigError, DataError

FOLDER = Path(__file__).parents[2] / "recipes" / "formal"
NAMES = ("entries", "trial", "run")


@pytest.fixture(scope="module")
def recipe():
    """The modules of the recipe, forgotten after these tests: their names are common ones."""
    sys.path.insert(0, str(FOLDER))
    kept = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    sys.path.remove(str(FOLDER))
    for name in NAMES:
        del sys.modules[name]
    sys.modules.update(kept)


@pytest.fixture
def args(recipe, tmp_path):
    return recipe.run.Args(
        models=("transformer", "linear-attention"), languages=("aa", "parity"), seeds=(0, 1), width=16,
        learning_rates=(1e-3, 1e-2), steps=2, layers=1, batch_size=4, lengths=(2, 8), longer=(9, 14),
        strings=6, out=tmp_path / "out",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["linear-attention", "deltanet"])
def test_the_matrix_memories_are_linear_attention_and_the_delta_rule(recipe, name) -> None:
    model = recipe.entries.build(name, 3, width=16, layers=1, chunk_size=7, seed=0).double()
    mixer = model.layers[0].mixer
    x = torch.randn(2, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    projections = (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    q, k, v = (F.silu(projection(x)).unflatten(-1, (4, 4)) for projection in projections)
    q, k = (s / (s.square().sum(-1, keepdim=True) + 1e-6).sqrt() for s in (q, k))
    theta = torch.sigmoid(mixer.gate_proj(x))
    memory = mixer.initial[0].expand(2, -1, -1, -1)  # [B, H, in, out]: M transposed
    outputs = []
    for t in range(9):
        value = v[:, t]
        if name == "deltanet":
            value = value - torch.einsum("bhio,bhi->bho", memory, k[:, t])
        memory = memory + theta[:, t, :, None, None] * k[:, t, :, :, None] * value[:, :, None, :]
        outputs.append(torch.einsum("bhio,bhi->bho", memory, q[:, t]))
    y = mixer.out_norm(torch.stack(outputs, 1)).flatten(-2) * torch.sigmoid(mixer.output_gate(x))
    torch.testing.assert_close(mixer(x)[0], mixer.o_proj(y), rtol=1e-9, atol=1e-11)


def test_every_model_of_the_table_is_built_or_says_what_is_missing(recipe) -> None:
    sizes = {"width": 64, "layers": 1, "chunk_size": 2, "seed": 0}
    known = recipe.entries.list_presets()
    counts = {}
    for name, entry in recipe.entries.MODELS.items():
        if entry.preset not in known:
            with pytest.raises(
                ConfigError, match=f"the model '{name}' is the preset '{entry.preset}', which"
            ):
                recipe.entries.check_models((name,))
        elif entry.preset != "gated-deltanet":
            counts[name] = sum(p.numel() for p in recipe.entries.build(name, 3, **sizes).parameters())
    assert max(counts.values()) < 1.05 * min(counts.values())
    with pytest.raises(ConfigError, match="no model 'transfomer'.*Did you mean 'transformer'"):
        recipe.entries.check_models(("transfomer",))


def test_the_chunk_size_is_that_of_both_memories_of_hope(recipe) -> None:
    model = recipe.entries.build("hope", 3, width=16, layers=1, chunk_size=1, seed=0)
    spec = model.layers[0].mixer.spec
    assert (spec.chunk_size, spec.projection_chunk_size) == (1, 1) and "hope" in recipe.run.Args().models
    assert model.config.feed_forward_types == ["continuum"]


def missing(recipe, args):
    """Names of the runs that are not in the folder."""
    return [job.name for job in recipe.run.sweep_of(args, print).jobs(recipe.run.rows_of(args))]


def test_workers_make_the_same_runs(recipe, args) -> None:
    args = replace(args, languages=("aa",), seeds=(0,))
    alone = recipe.run.main(args, say=lambda _: None)
    many = replace(args, out=args.out / "many", workers=2)
    said = []
    together = recipe.run.main(many, say=said.append)
    # All runs are in the folder when the table is made, so nothing else is said.
    assert len(said) == 1 and together["rows"] == alone["rows"] and missing(recipe, many) == []
    (many.out / "tuning" / "transformer-aa-0.01.json").unlink()
    (many.out / "transformer-aa-0.json").unlink()
    assert missing(recipe, many) == ["tuning/transformer-aa-0.01", "transformer-aa-0"]
    with pytest.raises(ConfigError, match="is of a run with"):
        recipe.run.main(replace(many, steps=3))


class Automaton(torch.nn.Module):
    """Names what may follow, by a list of states; or the same everywhere."""

    def __init__(self, language, constant=None):
        super().__init__()
        self.language, self.constant, self.device = language, constant, torch.device("cpu")

    def forward(self, ids, use_cache):
        logits = torch.full((*ids.shape, self.language.vocab_size), -1.0)
        for row, line in enumerate(ids.tolist()):
            text = "".join(self.language.symbols[i - 1] for i in line[1:] if i)
            sets = torch.from_numpy(self.language.legal_sets(text))
            logits[row, : len(sets)] = sets * 2.0 - 1.0
        return SimpleNamespace(logits=logits if self.constant is None else logits * 0 + self.constant)


@pytest.mark.parametrize("name", LANGUAGES)
def test_an_automaton_scores_all_and_a_constant_next_to_nothing(recipe, name) -> None:
    language = formal_language(name)
    strings = distinct_strings(language, np.random.default_rng(0), (2, 30), 80)
    assert recipe.trial.score(Automaton(language), language, strings) == {
        "right": len(strings),
        "places": 1.0,
    }
    for constant in (-1.0, 0.0):
        scored = recipe.trial.score(Automaton(language, constant), language, strings)
        assert scored["right"] < 0.05 * len(strings) and scored["places"] < 0.75


def test_training_learns_what_can_be_learned_at_once(recipe, args) -> None:
    trial = replace(args.trial("transformer", "anbn", 0, 1e-2), steps=80, batch_size=8)
    language = formal_language("anbn")
    model = recipe.entries.build("transformer", 3, width=16, layers=1, chunk_size=1, seed=0)
    strings = distinct_strings(language, np.random.default_rng(0), (2, 8), 10)
    before = recipe.trial.score(model, language, strings)["places"]
    loss = recipe.trial.train(model, language, trial)
    after = recipe.trial.score(model, language, strings)["places"]
    # What may follow a symbol is nearly always the same; only where the string ends must be counted.
    assert loss < 0.3 and after > 0.8 > before
    again = recipe.entries.build("transformer", 3, width=16, layers=1, chunk_size=1, seed=0)
    assert recipe.trial.train(again, language, trial) == loss


def test_runs_are_kept_and_not_run_again(recipe, args, monkeypatch) -> None:
    results = recipe.run.main(args, say=lambda _: None)
    files = sorted(path.relative_to(args.out).as_posix() for path in args.out.rglob("*.json"))
    assert len(files) == 1 + 2 * 2 * (2 + 2) and "tuning/transformer-aa-0.01.json" in files
    assert [(row["language"], row["model"]) for row in results["rows"]] == [
        ("aa", "transformer"), ("aa", "linear-attention"), ("parity", "transformer"),
        ("parity", "linear-attention"),
    ]  # fmt: skip
    for row in results["rows"]:
        assert len(row["tuning"]) == 2 and row["learning_rate"] in args.learning_rates
        assert [one["n"] for one in row["bins"]] == ([4, 3] if row["language"] == "aa" else [6, 6])
        assert all(len(one["by_seed"]) == 2 for one in row["bins"])
    for path in args.out.glob("*-1.json"):
        path.unlink()
    ran = []
    original = recipe.run.run_trial
    monkeypatch.setattr(
        recipe.run, "run_trial", lambda trial, device: ran.append(trial) or original(trial, device)
    )
    again = recipe.run.main(args, say=lambda _: None)
    assert len(ran) == 4 and {trial.seed for trial in ran} == {1}
    assert again["rows"] == results["rows"]
    page = (args.out / "table.md").read_text()
    assert page.count("\n| (aa)* | ") == 2 and "linear attention, as a memory" in page
    assert (args.out / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"aa-0.001.json is of a run with \{'steps': 2\}.*--out"):
        recipe.run.main(replace(args, steps=3), say=lambda _: None)
    path = args.out / "transformer-aa-0.json"
    older = json.loads(path.read_text())
    del older["result"]["place"]
    for other in ({}, older):
        path.write_text(json.dumps(other))
        with pytest.raises(DataError, match="transformer-aa-0.json is not a result of this program"):
            recipe.run.main(args, say=lambda _: None)


def test_the_learning_rate_is_chosen_without_a_look_at_longer_strings_or_test_seeds(
    recipe, args, monkeypatch
) -> None:
    tried = []

    def pretend(trial, device):
        tried.append(trial)
        right = {1e-3: 2, 1e-2: 3, 1e-1: 3}[trial.learning_rate]
        loss = {1e-3: 0.1, 1e-2: 0.4, 1e-1: 0.3}[trial.learning_rate]
        bins = [{"lengths": list(b), "n": 6, "right": right, "places": 0.5} for b in trial.bins]
        return {"parameters": 1, "loss": loss, "bins": bins, "seconds": 0.0}

    monkeypatch.setattr(recipe.run, "run_trial", pretend)
    args = replace(args, learning_rates=(1e-3, 1e-2, 1e-1), models=("transformer",), languages=("aa",))
    rows = recipe.run.main(args, say=lambda _: None)["rows"]
    # Most strings right, and of equals the lower loss.
    assert rows[0]["learning_rate"] == 1e-1
    assert [trial.seed for trial in tried[:3]] == [recipe.trial.TUNING_SEED] * 3
    assert all(trial.bins == ((2, 8),) for trial in tried[:3])
    assert [(trial.seed, trial.learning_rate) for trial in tried[3:]] == [(0, 1e-1), (1, 1e-1)]
    assert all(len(trial.bins) == 2 for trial in tried[3:])


def test_the_loss_is_of_the_places_of_strings_alone(recipe) -> None:
    language = formal_language("anbn")
    model = recipe.entries.build("transformer", 3, width=16, layers=1, chunk_size=1, seed=0)
    strings = ["ab", "aaabbb"]
    losses = []
    for width in (None, 20):
        batch = formal_batch(language, strings, width)
        losses.append(recipe.trial.SetLoss(model, torch.device("cpu"))(batch))
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
    logits = model(torch.from_numpy(batch.ids)).logits.sigmoid()
    right = torch.where(torch.from_numpy(batch.legal), logits, 1 - logits)
    # Of the first string the places are those of its two symbols and of the end symbol before them.
    wanted = -torch.cat((right[0, :3], right[1, :7])).log().mean()
    torch.testing.assert_close(losses[0], wanted.detach())
    torch.testing.assert_close(losses[1], wanted.detach())
    for parameter, name in zip(torch.autograd.grad(wanted, list(model.parameters())), found, strict=True):
        torch.testing.assert_close(found[name], parameter, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="steps are captured on a GPU alone")
@pytest.mark.parametrize(
    "name", ["transformer", "linear-attention", "deltanet", "ttt-linear", "titans-lmm", "hope"]
)
def test_training_on_a_gpu_is_that_on_a_cpu(recipe, args, name) -> None:
    trial = replace(args.trial(name, "anbn", 0, 1e-2), steps=20, batch_size=8, width=64)
    language = formal_language("anbn")
    losses = []
    for device in ("cpu", "cuda"):
        model = recipe.entries.build(name, 3, width=64, layers=1, chunk_size=1, seed=0).to(device)
        losses.append(recipe.trial.train(model, language, trial))
    # The mean of two losses, after steps each of which depends on those before.
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


def test_a_loss_that_is_no_number_scores_nothing(recipe, args, monkeypatch) -> None:
    monkeypatch.setattr(
        recipe.trial.SetLoss, "loss", lambda loss, inputs: torch.tensor(float("nan"), requires_grad=True)
    )
    result = recipe.trial.run_trial(args.trial("transformer", "aa", 0, 1e-3))
    assert result["loss"] is None and [one["right"] for one in result["bins"]] == [0, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ("hop",)}, "Did you mean 'hope'"),
        ({"languages": ("ab",)}, "no formal language 'ab'"),
        ({"seeds": (1, 1)}, r"--seeds are \[1, 1\]; give some, each once"),
        ({"longer": (8, 20)}, "--longer begins at 8 and --lengths ends at 8"),
        ({"steps": 0}, "must be above 0"),
    ],
)
def test_refusals(recipe, args, changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe.run.main(replace(args, **changes))
    assert not args.out.exists()
