"""The chunked form against the token loop: outputs, states and every outer gradient."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nestor.ops.self_modifying import Gate

ALL = ("k", "v", "q", "eta", "alpha", "mem")
USUAL = ("k", "v", "eta", "alpha", "mem")

CASES = {
    "usual": {},
    "anchor": {"read_mode": "anchor"},
    "dot_product": {"inner_loss": "dot_product"},
    "plain_descent": {"dgd": False},
    "momentum": {"momentum": True},
    "momentum_anchor": {"momentum": True, "read_mode": "anchor", "dgd": False},
    "adaptive_queries": {"memories": ALL},
    "static": {"memories": ("mem",)},
    "some": {"memories": ("v", "alpha", "mem"), "momentum": True},
    "shared_targets": {"memories": ("k", "v", "mem"), "targets": "value"},
    "shared_targets_momentum": {"memories": ("k", "mem"), "targets": "value", "momentum": True},
    "shared_targets_dot": {"memories": ("mem",), "targets": "value", "inner_loss": "dot_product"},
    "gate_rows": {"gate_rows": True},
    "bounded": {"targets": "bounded", "memories": ALL},
    "bounded_dot": {"targets": "bounded", "inner_loss": "dot_product", "momentum": True},
    "deep_bounded": {"depth": 2, "targets": "bounded"},
    "uncapped": {"step_cap": "none"},
    "soft": {"step_cap": "soft"},
    "soft_momentum": {"step_cap": "soft", "momentum": True, "memories": ALL},
    "deep": {"depth": 2},
    "deep_anchor": {"depth": 2, "read_mode": "anchor", "activation": "gelu"},
    "deep_dot": {"depth": 2, "inner_loss": "dot_product"},
    "deep_momentum": {"depth": 2, "momentum": True, "memories": ALL},
    "deep_gated_by_retention": {"depth": 2, "dgd_hidden": False},
    "deep_plain_descent": {"depth": 2, "dgd": False, "memories": ("k", "mem")},
    "deep_shared_targets": {"depth": 2, "targets": "value", "memories": ("k", "mem")},
    "deep_soft": {"depth": 2, "step_cap": "soft"},
    "to_initial": {"decay": "initial", "targets": "bounded", "memories": ALL},
    "to_initial_momentum": {"decay": "initial", "momentum": True},
    "to_initial_plain": {"decay": "initial", "dgd": False, "read_mode": "anchor"},
    "deep_to_initial": {"decay": "initial", "depth": 2, "momentum": True},
    "deep_to_initial_plain": {"decay": "initial", "depth": 2, "dgd_hidden": False},
}

# Those in which a gradient takes another way.
OUTER = [
    "usual", "adaptive_queries", "momentum", "plain_descent", "anchor", "shared_targets_momentum", "some",
    "bounded", "gate_rows", "soft_momentum", "deep_momentum", "deep_bounded", "deep_soft",
    "to_initial", "deep_to_initial",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_chunked_form_is_the_token_loop(draw_problem, same, case) -> None:
    """Invariant 18: generators and gradients pinned to the chunk's start, for both periods."""
    chunk, projections = ((4, 2), (2, 6), (3, 3))[list(CASES).index(case) % 3]
    p = draw_problem(chunk_size=chunk, projection_chunk_size=projections, length=7, **CASES[case])
    with torch.no_grad():
        same(p.run(), p.run("reference"))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_documents_and_padding_are_those_of_the_token_loop(draw_problem, same, case) -> None:
    p = draw_problem(3, batch=3, masked=True, documents=True, length=8, **CASES[case])
    p = p.replace(mask=p.mask & (torch.arange(3) != 1)[:, None])  # a row without a token
    same(p.run(), p.run("reference"))


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("read_mode", ["running", "anchor"])
def test_chunks_of_one_token_are_the_recurrence(draw_problem, same, depth, read_mode) -> None:
    """Invariant 18: with C_o = C_m = 1 everything is taken from the state before the token."""
    choices = {"chunk_size": 1, "projection_chunk_size": 1, "read_mode": read_mode}
    p = draw_problem(depth=depth, memories=ALL, length=7, **choices)
    same(p.run(), p.run("reference"))
    # Both read modes see M_{t-1}.
    other = {"running": "anchor", "anchor": "running"}[read_mode]
    same(p.run(read_mode=other), p.run())


@st.composite
def streams(draw):
    small, factor = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    periods = [small, small * factor]
    if draw(st.booleans()):
        periods.reverse()
    depth = draw(st.integers(1, 2))
    choices = {
        "chunk_size": periods[0],
        "projection_chunk_size": periods[1],
        "depth": depth,
        "length": draw(st.integers(1, 12)),
        "batch": draw(st.integers(1, 3)),
        "momentum": draw(st.booleans()),
        "masked": draw(st.booleans()),
        "documents": draw(st.booleans()),
        "memories": draw(st.sampled_from([ALL, USUAL, ("k", "mem"), ("mem",), ("v", "eta", "mem")])),
        "read_mode": draw(st.sampled_from(["running", "anchor"])),
        "inner_loss": draw(st.sampled_from(["l2", "dot_product"])),
        "dgd": draw(st.booleans()),
        "step_cap": draw(st.sampled_from(["none", "spectral", "soft"])),
    }
    cut = draw(st.integers(0, choices["length"]))
    return draw(st.integers(0, 99)), choices, cut


@given(case=streams())
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@torch.no_grad()
def test_any_stream_cut_anywhere_is_the_token_loop(draw_problem, same, case) -> None:
    """Invariants 8 and 18: ragged lengths, documents, padding, one period dividing the other."""
    seed, choices, cut = case
    p = draw_problem(seed, **choices)
    wanted = p.run("reference")
    if cut in (0, choices["length"]):
        same(p.run(), wanted)
        return
    first, state, strength = p.part(slice(cut)).run()
    rest, state, more = p.part(slice(cut, None), state).run()
    same((torch.cat([first, rest], 1), state, torch.cat([strength, more], 1)), wanted)


@pytest.mark.parametrize("case", OUTER)
def test_outer_gradients_are_those_of_the_token_loop(draw_problem, case) -> None:
    """Of every input, initial weight and gate, through targets, generators and a State handed on."""
    # Recomputing is one for all cases; every other has it.
    recompute = OUTER.index(case) % 2 == 1
    p = draw_problem(5, length=6, documents=True, recompute=recompute, **CASES[case])

    def gradients(backend):
        leaves = {name: x.clone().requires_grad_() for name, x in p.leaves().items()}
        tokens = {name: x for name, x in leaves.items() if " " not in name}
        initial = {
            n: tuple(leaves[f"initial {n} {i}"] for i in range(len(ws))) for n, ws in p.initial.items()
        }
        gates = {n: Gate(leaves[f"gate {n} 0"], leaves.get(f"gate {n} 1")) for n in p.gates}
        whole = p.replace(**tokens, initial=initial, gates=gates)
        y, state, _ = whole.part(slice(4)).run(backend)
        more, state, _ = whole.part(slice(4, None), state).run(backend)
        total = sum((x * torch.sin(torch.arange(x.numel()).view_as(x) + 1.0)).sum() for x in (y, more))
        kept = [w for part in state[:3] for ws in part.values() for w in ws]
        total = total + sum((w * torch.cos(torch.arange(w.numel()).view_as(w))).sum() for w in kept)
        return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))

    found, wanted = gradients("chunked"), gradients("reference")
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 1e-6, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-8, msg=lambda m: f"{name}: {m}")


@torch.no_grad()
def test_float32_is_near_float64_over_many_chunks(draw_problem, flatten) -> None:
    p = draw_problem(length=96, width=8, chunk_size=16, projection_chunk_size=8, horizon=50.0)
    # Targets are products of memories: of large ones they grow without bound.
    p = p.replace(initial={n: tuple(w / 8 for w in ws) for n, ws in p.initial.items()})
    single = {name: x.float() for name, x in p.leaves().items() if " " not in name}
    exact = p.run()
    rounded = p.replace(
        **single, initial={n: tuple(w.float() for w in ws) for n, ws in p.initial.items()}
    ).run()
    assert rounded[0].dtype == torch.float32
    for name, tensor in flatten(exact).items():
        torch.testing.assert_close(flatten(rounded)[name].double(), tensor.double(), rtol=1e-4, atol=1e-4)
