"""The table of ablations: every model lacks what its row says and nothing else, and rows add up."""

import math
from dataclasses import replace

import pytest
import torch

from nestor import NestorForCausalLM
from nestor.errors import ConfigError
from nestor.models.presets import count_parameters

IDS = torch.arange(96)[None] % 13


@pytest.fixture(scope="module")
def model(evidence):
    """Builds a variant, small, always with the same seed."""

    def build(name):
        made = evidence.variants.VARIANTS[name].model("quick")
        return replace(made, overrides={**made.overrides, "hidden_size": 32}).build(0).eval()

    return build


@pytest.fixture
def args(evidence, some_novels, tmp_path):
    return evidence.ablations.Args(
        tables=("chunks",), chunks=(16, 64), run_chunks=(16, 64), seeds=(0, 1), size="quick", tokens=1024,
        data=some_novels, context=64, batch_size=4, long=128, long_documents=2, learning_rates=(1e-2,),
        out=tmp_path / "out", results=tmp_path / "results",
    )  # fmt: skip


def mixer(model):
    return model.layers[0].mixer


def state(model):
    """Names of what the first layer carries, and the logits."""
    with torch.no_grad():
        output = model(IDS, use_cache=True)
    return set(output.past_key_values.layers[0]), output.logits


def names(model):
    return {name for name, _ in model.named_parameters()}


def test_titans_without_a_part_lacks_it(model) -> None:
    full = model("titans")
    carried, _ = state(full)
    assert {"momentum.0", "tail.q", "weights.1"} <= carried and mixer(full).gate_proj.out_features == 3 * 4

    without = model("titans-no-momentum")
    assert not any(name.startswith("momentum") for name in state(without)[0])
    # The gates that are left are those of the step and of forgetting.
    assert mixer(without).gate_proj.out_features == 2 * 4 and mixer(without).forget

    without = model("titans-no-decay")
    assert mixer(without).gates(torch.randn(1, 4, 32)).alpha is None and mixer(without).momentum

    without = model("titans-no-convolution")
    assert not any(name.startswith("tail") for name in state(without)[0])
    assert names(full) - names(without) == {
        f"layers.{i}.mixer.convolutions.{stream}.weight" for i in range(2) for stream in "qkv"
    }
    without = model("titans-linear")
    assert len(mixer(without).initial) == 1 and mixer(without).initial[0].shape == (4, 8, 8)
    assert "weights.1" not in state(without)[0]

    without = model("titans-mag-no-persistent")
    assert names(model("titans-mag")) - names(without) == {f"layers.{i}.mixer.persistent" for i in range(2)}


def test_hope_without_a_part_lacks_it(model) -> None:
    full = model("hope")
    assert set(mixer(full).initial) == {"k", "v", "q", "eta", "alpha", "mem"} and mixer(full).spec.dgd
    logits = state(full)[1]
    for part in "kvq":
        without = mixer(model(f"hope-static-{part}"))
        assert set(mixer(full).initial) - set(without.initial) == {part}

    # The same weights give other numbers: what decays is more than the gate says.
    without = model("hope-no-dgd")
    without.load_state_dict(full.state_dict())
    assert not mixer(without).spec.dgd
    assert not torch.allclose(state(without)[1], logits, atol=1e-6)

    without = mixer(model("hope-no-retention"))
    kept = without.gates(torch.randn(1, 50, 32))["alpha"]
    assert (kept == 1).all() and "alpha" not in without.initial
    assert mixer(full).spec.horizon == 4096

    without = model("hope-no-continuum")
    assert (
        without.config.feed_forward_types == ["swiglu"] * 2
        and full.config.feed_forward_types[0] == "continuum"
    )
    assert without.config.intermediate_size == pytest.approx(full.config.intermediate_size, abs=16)
    assert not any(".blocks." in name for name in names(without))

    base, without = model("hope-momentum"), model("hope-64")
    assert any(name.startswith("momentum") for name in state(base)[0])
    assert not any(name.startswith("momentum") for name in state(without)[0])
    periods = {(mixer(one).spec.chunk_size, mixer(one).spec.projection_chunk_size) for one in (base, without)}
    assert periods == {(64, 64)}

    # What fades comes back, and there is more that fades.
    start, zero = model("hope-towards-start"), model("hope")
    assert (mixer(start).spec.decay, mixer(zero).spec.decay) == ("initial", "zero")
    assert mixer(start).spec.horizon == 128 and names(start) == names(zero)
    start.load_state_dict(zero.state_dict())
    assert not torch.allclose(state(start)[1], state(zero)[1], atol=1e-6)


@pytest.mark.parametrize("size", ["5m", "60m"])
def test_variants_have_the_same_parameters(evidence, size) -> None:
    models = {name: one.model(size) for name, one in evidence.variants.VARIANTS.items()}
    models["chunk-16"] = evidence.variants.chunk_model(16, size)
    counts = {}
    for name, one in models.items():
        with torch.device("meta"):
            counts[name] = count_parameters(NestorForCausalLM(one.config()))["non_embedding"]
    assert max(counts.values()) < 1.01 * min(counts.values())


def test_the_papers_figures_are_those_of_their_tables(evidence) -> None:
    """arXiv 2501.00663, table 5; arXiv 2512.24695, table 6; arXiv 2511.07343 for chunk sizes."""
    assert evidence.variants.PAPER_FULL == {"Titans": 27.01, "Hope": 12.24}
    paper = {(one.table, one.part): one.paper for one in evidence.variants.COMPARISONS}
    assert paper == {
        ("Titans", "momentum"): 28.98, ("Titans", "decay"): 29.04, ("Titans", "convolution"): 28.73,
        ("Titans", "depth (linear memory)"): 28.49, ("Titans", "persistent tokens"): 27.63,
        ("Hope", "DGD"): 13.41, ("Hope", "momentum"): 13.58, ("Hope", "retention"): 13.71,
        ("Hope", "continuum"): 13.04, ("Hope", "adaptive k"): 13.77, ("Hope", "adaptive v"): 13.90,
        ("Hope", "adaptive q"): 12.19, ("Hope", "a horizon of 4,096 towards zero"): None,
    }  # fmt: skip
    chunks = evidence.variants.PAPER_CHUNKS
    assert min(chunks, key=chunks.get) == evidence.variants.PAPER_CHUNK and chunks[8] == 36.45
    assert evidence.ablations.log_change(28.98, 27.01) == pytest.approx(0.0214, abs=1e-4)


def test_rows_compare_seed_by_seed(evidence, args, monkeypatch) -> None:
    bits = {"titans": 2.0, "titans-no-momentum": 2.2, "hope": 3.0, "hope-static-q": 2.4}

    def pretend(maker, run, name, device):
        seed = run.seed if run.seed < 10 else 0
        value = bits.get(name.removeprefix("tuning/").rsplit("-", 1)[0], 2.5) * (1 + seed / 10)
        long = {"edges": [0, 64, 128], "bits": [value * 60, value * 64], "bytes": [60, 64]}
        return {
            "parameters": {"non_embedding": 5}, "loss": 1.0, "seconds": 0.0, "place": "here", "valid": value,
            "bits_per_byte": None if name == "hope-no-dgd-1" else value, "long": long,
            "chunks": {"16": value + 1, "64": value},
        }  # fmt: skip

    monkeypatch.setattr(evidence.study.Maker, "__call__", pretend)
    args = replace(args, tables=("Titans", "Hope", "chunks"))
    results = evidence.ablations.main(args, say=lambda _: None)
    rows = {(one["table"], one["part"]): one for one in results["comparisons"]}
    assert len(rows) == 13 and len(results["models"]) == 18
    momentum = rows["Titans", "momentum"]
    assert momentum["change"]["by_seed"] == pytest.approx([0.1, 0.1])
    assert momentum["long_change"]["estimate"] == pytest.approx(0.1)
    assert momentum["paper"]["change"] == math.log(28.98) / math.log(27.01) - 1
    assert rows["Hope", "adaptive q"]["change"]["estimate"] == pytest.approx(-0.2)
    # A seed without a number leaves no mean.
    assert rows["Hope", "DGD"]["change"]["estimate"] is None
    page = (args.results / "ablations-quick.md").read_text()
    assert "| momentum | titans | 2.310 " in page and "28.98 for 27.01 | +2.1 % |" in page
    assert page.count("| DGD | hope | - | - | ") == 1
    # A part that the paper has no figure of.
    assert rows["Hope", "a horizon of 4,096 towards zero"]["paper"] is None
    assert "| a horizon of 4,096 towards zero | hope | 2.625 " in page and "| - | - |" in page
    assert "| 64 | 3.100" in page and "| paper, 64 | +35 % | +0 % |" in page
    pictures = {path.name for path in args.results.glob("*.png")}
    assert pictures == {f"ablations-quick-{name}.png" for name in ("titans", "hope", "chunks")}


def test_the_matrix_has_what_a_memory_gives_at_its_own_chunk(evidence, args) -> None:
    args = replace(args, seeds=(1,))
    results = evidence.ablations.main(args, say=lambda _: None)
    assert list(results["models"]) == ["chunk-16", "titans"] and results["comparisons"] == []
    for row, name in zip(results["chunks"], ("chunk-16", "titans"), strict=True):
        own, other = (row["run"][str(at)]["by_seed"] for at in (row["trained"], 80 - row["trained"]))
        assert own == pytest.approx(results["models"][name]["bits_per_byte"]["by_seed"], abs=1e-6)
        assert other != pytest.approx(own, abs=1e-6)
    (args.out / "titans-1.json").unlink()
    again = evidence.ablations.main(args, say=lambda _: None)
    assert again["chunks"] == results["chunks"]
    with pytest.raises(
        ConfigError, match=r"chunk-16-1.json is of a run with \{'measure.each.2.chunks': \[16, 64\]\}"
    ):
        evidence.ablations.main(replace(args, run_chunks=(16, 32)), say=lambda _: None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tables": ("hope",)}, "no table 'hope'.*Did you mean 'Hope'"),
        ({"chunks": (0,)}, "chunk sizes must be at least 1"),
        ({"run_chunks": (8, 8)}, r"--run-chunks are \[8, 8\]; give some, each once"),
    ],
)
def test_refusals(evidence, args, changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        evidence.ablations.main(replace(args, **changes), say=lambda _: None)
