"""benchmarks/learner.py at a small size: every subject reads, and the two that learn agree."""

import json


def test_it_times_every_subject(benchmark_modules, tmp_path) -> None:
    import learner

    s = learner.Settings(
        dtype="float32", layers=4, width=16, heads=2, kv_heads=1, inner=20, vocabulary=31, context=24,
        chunks=(4, 8), attention=("sdpa",), repeats=2, output=tmp_path / "result.json",
    )  # fmt: skip
    learner.main(s)
    result = json.loads(s.output.read_text())
    assert result["about"]["settings"]["width"] == 16 and result["about"]["versions"]["torch"]
    assert [one["chunk"] for one in result["results"]] == [4, 8]
    for one in result["results"]:
        assert 0 <= one["difference"] < 1e-4
        assert one["frozen"]["over_frozen"] == 1
        assert all(one[name]["ms"] > 0 for name in ("frozen", "eager", "captured"))
        assert one["eager"]["over_frozen"] > 1 and "ms_a_chunk" in one["captured"]
