"""Queries projected onto the keys so far: against a token loop, and as a projector.

Run as a program, with TRITON_INTERPRET=1, this file checks the kernel on a CPU.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from nestor.errors import ConfigError, ShapeError
from nestor.ops.query_projection import MODES, query_projection

EXACT = {"rtol": 1e-10, "atol": 1e-11}


def draw(batch=2, length=9, heads=2, width=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, batch, length, heads, width, generator=generator, dtype=torch.float64)
    return q, F.normalize(k, dim=-1)


def flags(batch, length, share, seed):
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < share


def loop(q, k, state=None, *, mode="unit", mask=None, resets=None):
    """Section 6.2, a token and a sequence at a time."""
    batch, length, heads, width = q.shape
    rows, after = [], []
    for b in range(batch):
        Pi = q.new_zeros(heads, width, width) if state is None else state[b]
        row = []
        for t in range(length):
            if mask is not None and not mask[b, t]:
                row.append(torch.zeros_like(q[b, t]))
                continue
            if resets is not None and resets[b, t]:
                Pi = torch.zeros_like(Pi)
            Pi = Pi + k[b, t].unsqueeze(-1) * k[b, t].unsqueeze(-2)
            y = torch.einsum("hi,hij->hj", q[b, t], Pi)
            if mode == "unit":
                y = y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()
            elif mode == "trace":
                y = y / Pi.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
            row.append(y)
        rows.append(torch.stack(row))
        after.append(Pi)
    return torch.stack(rows), torch.stack(after)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 1000),
    length=st.sampled_from([1, 2, 63, 64, 65, 150]),
    mode=st.sampled_from(MODES),
    carried=st.booleans(),
    masked=st.sampled_from([0.0, 0.3]),
    reset=st.sampled_from([0.0, 0.02, 0.4]),
)
def test_the_block_form_equals_the_token_loop(seed, length, mode, carried, masked, reset) -> None:
    q, k = draw(2, length, seed=seed)
    q, k = q.requires_grad_(), k.requires_grad_()
    state = loop(*draw(2, 5, seed=seed + 1), mode=mode)[1].requires_grad_() if carried else None
    mask = ~flags(2, length, masked, seed) if masked else None
    resets = flags(2, length, reset, seed + 1) if reset else None
    options = {"mode": mode, "mask": mask, "resets": resets}
    actual, expected = query_projection(q, k, state, **options), loop(q, k, state, **options)
    leaves = [x for x in (q, k, state) if x is not None]
    gradients = []
    for y, Pi in (actual, expected):
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)
        total = (y * weight).sum() + Pi.square().sum()
        gradients.append(torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else [])
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    for a, b in zip(*gradients, strict=True):
        a, b = (torch.zeros(()).double() if x is None else x for x in (a, b))
        torch.testing.assert_close(a, b.expand_as(a), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_a_stream_may_be_cut_anywhere(mode) -> None:
    """Invariant 4."""
    q, k = draw(length=70)
    resets = flags(2, 70, 0.05, 0)
    y, after = query_projection(q, k, mode=mode, resets=resets)
    for cut in (1, 30, 64, 69):
        a, state = query_projection(q[:, :cut], k[:, :cut], mode=mode, resets=resets[:, :cut])
        b, state = query_projection(q[:, cut:], k[:, cut:], state, mode=mode, resets=resets[:, cut:])
        torch.testing.assert_close(torch.cat([a, b], 1), y, **EXACT)
        torch.testing.assert_close(state, after, **EXACT)


def test_of_orthonormal_keys_it_is_the_projector_onto_their_span() -> None:
    """Invariant 21: Pi is symmetric and positive semi-definite, and Pi^2 = Pi for orthonormal keys."""
    q, k = draw(1, 3, 1, 5)
    _, Pi = query_projection(q, k)
    torch.testing.assert_close(Pi, Pi.mT)
    assert torch.linalg.eigvalsh(Pi).min() > -1e-12
    k = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0][:3].reshape(1, 3, 1, 5)
    y, Pi = query_projection(q, k, mode="raw")
    torch.testing.assert_close(Pi @ Pi, Pi)
    span = k[0, :, 0]
    torch.testing.assert_close(y[0, -1, 0], q[0, -1, 0] @ span.T @ span)


def test_a_later_token_changes_nothing_before_it_and_a_reset_forgets_bitwise() -> None:
    """Invariants 5 and 16."""
    q, k = draw(length=70)
    y, _ = query_projection(q, k)
    changed = k.clone()
    changed[:, 40] = -changed[:, 41]
    assert torch.equal(query_projection(q, changed)[0][:, :40], y[:, :40])
    resets = torch.zeros(2, 70, dtype=torch.bool)
    resets[:, 50] = True
    assert torch.equal(
        query_projection(q, changed, resets=resets)[0][:, 50:],
        query_projection(q, k, resets=resets)[0][:, 50:],
    )


def test_no_keys_project_to_nothing_in_every_mode() -> None:
    q, k = draw()
    for mode in MODES:
        y, Pi = query_projection(q, torch.zeros_like(k), mode=mode)
        assert not y.any() and not Pi.any()


def test_wrong_arguments_are_refused() -> None:
    q, k = draw()
    with pytest.raises(ConfigError, match="mode is 'units'.*Did you mean 'unit'"):
        query_projection(q, k, mode="units")
    with pytest.raises(ShapeError, match=r"k has shape \(2, 8, 2, 3\)"):
        query_projection(q, k[:, 1:])
    with pytest.raises(ShapeError, match=r"state has shape .* must be \(2, 2, 3, 3\)"):
        query_projection(q, k, q.new_zeros(1, 2, 3, 3))


# --- the kernel ---------------------------------------------------------------------------------------------

# Sequences, tokens, heads, width, whether there is a state, whether of unit length.
CASES = [
    (2, 64, 1, 16, False, True), (1, 150, 2, 16, True, True), (1, 5, 2, 32, True, False),
    (2, 130, 1, 64, False, True),
]  # fmt: skip


def check(device, dtype, batch, length, heads, width, carried, unit, tolerance):
    """The kernel's outputs and gradients against the block form in float64."""
    from nestor.ops.kernels.query_projection import query_projection as kernel

    mode = "unit" if unit else "raw"
    exact = [x.to(dtype).double() for x in draw(batch, length, heads, width)]
    state = None
    if carried:
        root = torch.randn(batch, heads, width, width, generator=torch.Generator().manual_seed(1))
        state = root.double() @ root.double().mT
    generator = torch.Generator().manual_seed(2)
    upstream = [torch.randn(s, generator=generator, dtype=torch.float64) for s in (exact[0].shape,)]
    upstream.append(torch.randn(batch, heads, width, width, generator=generator, dtype=torch.float64))

    def run(function, tensors, places):
        pairs = zip(tensors, places, strict=False)
        leaves = [x.detach().to(device=where, dtype=kind).requires_grad_() for x, (where, kind) in pairs]
        outputs = function(*leaves)
        grads = [g.to(y) for g, y in zip(upstream, outputs, strict=True)]
        return [x.double().cpu() for x in (*outputs, *torch.autograd.grad(outputs, leaves, grads))]

    inputs = [*exact, *([] if state is None else [state])]
    wide = [("cpu", torch.float64)] * 3
    expected = run(lambda q, k, s=None: query_projection(q, k, s, mode=mode), inputs, wide)
    places = [(device, dtype), (device, dtype), (device, torch.float32)]
    found = run(lambda q, k, s=None: kernel(q, k, s, unit, 1e-6), inputs, places)
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        error = float((a - b).norm() / b.norm())
        assert error < tolerance, (
            f"result {index} of {(batch, length, heads, width, carried, unit)}: {error:.1e}"
        )


def test_the_kernel_computes_the_block_form_under_the_interpreter(run_interpreted) -> None:
    run_interpreted(__file__)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, (3, 2048, 4, 64, False, True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernel_computes_the_block_form(dtype, case) -> None:
    pytest.importorskip("triton")
    check("cuda", dtype, *case, tolerance=1e-2 if dtype == torch.bfloat16 else 1e-4)


if __name__ == "__main__":
    for one in CASES:
        check("cpu", torch.float32, *one, tolerance=1e-4)
