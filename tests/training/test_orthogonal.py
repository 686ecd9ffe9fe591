"""M3 and AdaMuon against their equations: invariants 22, 23 and 24 of spec nested-learning, section h."""

import math

import pytest
import torch

from nestor.errors import ConfigError, ShapeError
from nestor.ops.multi_scale_muon import M3_SLOTS, m3_step, match_rms
from nestor.ops.neural_memory.muon import CUBIC, QUINTIC, newton_schulz
from nestor.training import M3, AdaMuon

LITERAL = {"match_rms": False, "weight_decay": 0.0}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(count, shape=(6, 4), scale=1.0):
    return [scale * draw(*shape, seed=100 + i) for i in range(count)]


def trajectory(make, given, start=None):
    """The matrix after each step of an optimiser that is given these gradients."""
    w = torch.nn.Parameter(draw(*given[0].shape, seed=7) if start is None else start.clone())
    optimizer = make([w])
    places = []
    for g in given:
        w.grad = g.clone()
        optimizer.step()
        places.append(w.detach().clone())
    return places, optimizer.state[w]


def moves(make, given):
    places, _ = trajectory(make, given, torch.zeros_like(given[0]))
    return [
        after - before for before, after in zip([torch.zeros_like(given[0]), *places], places, strict=False)
    ]


def assert_same(one, other, rtol=1e-10):
    """rtol: of a matrix's largest number."""
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=rtol * float(b.abs().max()))


def by_hand(given, lr, beta1, beta2, beta3, period, alpha, eps=1e-8):
    """The repaired algorithm with sums over all gradients so far in place of running ones."""
    w = draw(*given[0].shape, seed=7)
    places = []
    for t in range(1, len(given) + 1):
        fast = sum(beta1 ** (t - i) * given[i - 1] for i in range(1, t + 1))
        finished = (t - 1) // period
        blocks = [sum(given[k * period : (k + 1) * period]) for k in range(finished)]
        slow = sum((beta3 ** (finished - 1 - k) * b for k, b in enumerate(blocks)), torch.zeros_like(w))
        weights = [beta2 ** (t - i) for i in range(1, t + 1)]
        spread = sum(b * g**2 for b, g in zip(weights, given[:t], strict=True)) / sum(weights)
        step = newton_schulz(fast) + alpha * newton_schulz(slow)
        w = w - lr * step / (spread.sqrt() + eps)
        places.append(w)
    return places


def test_m3_is_its_sums_over_all_gradients() -> None:
    given = gradients(9)
    found, _ = trajectory(
        lambda p: M3(p, 0.1, (0.8, 0.9, 0.7), slow_period=3, slow_weight=0.4, **LITERAL), given
    )
    assert_same(found, by_hand(given, 0.1, 0.8, 0.9, 0.7, 3, 0.4))


def test_the_printed_algorithm_to_the_letter() -> None:
    given, (beta1, beta2, beta3), alpha, f, eta, eps = gradients(9), (0.8, 0.9, 0.7), 0.4, 3, 0.1, 1e-8
    w = draw(6, 4, seed=7)
    m1 = m2 = v = o2 = b = torch.zeros_like(w)
    expected = []
    for t, g in enumerate(given, 1):
        if t > 1 and (t - 1) % f == 0:
            m2, b = m2 + beta3 * b, torch.zeros_like(b)
            o2 = newton_schulz(m2)
        b = b + g
        m1 = m1 + beta1 * g
        v = v + beta2 * g * g
        w = w - eta * (newton_schulz(m1) + alpha * o2) / (v.sqrt() + eps)
        expected.append(w)
    options = {"accumulate": "paper", "slow_period": f, "slow_weight": alpha, "eps": eps}
    found, kept = trajectory(lambda p: M3(p, eta, (beta1, beta2, beta3), **options, **LITERAL), given)
    assert_same(found, expected)
    torch.testing.assert_close(kept["slow_momentum"], m2)


@pytest.mark.parametrize("off", [{"slow_weight": 0.0}, {"slow_period": math.inf}, {"slow_period": 20}])
def test_invariant_22_m3_without_slow_branch_is_muon(off) -> None:
    given = gradients(12)
    found, _ = trajectory(lambda p: M3(p, 0.1, (0.9, 0.99, 0.9), v_source="none", **off, **LITERAL), given)
    w, m = draw(6, 4, seed=7), torch.zeros(6, 4, dtype=torch.float64)
    expected = []
    for g in given:
        m = 0.9 * m + g
        w = w - 0.1 * newton_schulz(m)
        expected.append(w)
    assert_same(found, expected)
    # PyTorch's own orthogonalises in bfloat16.
    theirs, _ = trajectory(
        lambda p: torch.optim.Muon(p, lr=0.1, momentum=0.9, nesterov=False, weight_decay=0.0,
                                   adjust_lr_fn="match_rms_adamw"), given,
    )  # fmt: skip
    size = 0.2 * math.sqrt(6)
    ours, _ = trajectory(
        lambda p: M3(p, 0.1 * size, (0.9, 0.99, 0.9), v_source="none", **off, **LITERAL), given
    )
    torch.testing.assert_close(ours[-1], theirs[-1], rtol=0, atol=0.01)


def test_invariant_22_without_slow_momentum_the_printed_slow_branch_is_nothing() -> None:
    """beta3 = 0 makes ``M2 + beta3 B`` zero, as the print has it, and ``beta3 M2 + B`` the last block."""
    given = gradients(8)
    common = {"v_source": "none", "slow_period": 2, **LITERAL}
    paper = {"accumulate": "paper", **common}
    off, _ = trajectory(lambda p: M3(p, 0.1, (0.9, 0.9, 0.0), slow_weight=0.5, **paper), given)
    none, _ = trajectory(lambda p: M3(p, 0.1, (0.9, 0.9, 0.9), slow_weight=0.0, **paper), given)
    assert_same(off, none)
    _, kept = trajectory(lambda p: M3(p, 0.1, (0.9, 0.9, 0.0), slow_weight=0.5, **common), given[:7])
    torch.testing.assert_close(kept["slow_momentum"], given[4] + given[5])


def test_invariant_22_the_slow_direction_is_one_block_late() -> None:
    period, given = 3, gradients(11)
    slots = {name: torch.zeros(6, 4, dtype=torch.float64) for name in M3_SLOTS}
    for step, g in enumerate(given, 1):
        _, slots = m3_step(
            g, slots, step, betas=(0.9, 0.9, 0.8), slow_period=period, slow_weight=0.5, v_source="none"
        )
        finished = (step - 1) // period
        # Exactly f gradients a block: those of steps 1 to k f, in steps k f + 1 to (k + 1) f.
        blocks = [sum(given[k * period : (k + 1) * period]) for k in range(finished)]
        slow = sum((0.8 ** (finished - 1 - k) * b for k, b in enumerate(blocks)), torch.zeros(6, 4))
        torch.testing.assert_close(slots["slow_momentum"], slow.double())
        torch.testing.assert_close(slots["slow_direction"], newton_schulz(slow.double()))
        assert slots["slow_direction"].any() == (step > period)
        torch.testing.assert_close(slots["slow_gradient"], sum(given[finished * period : step]))


@pytest.mark.parametrize("scale", [1e-3, 40.0])
def test_invariant_23_scale_of_gradients(scale) -> None:
    """NS does not see it; second moments of gradients do, those of what is orthogonal do not."""
    given = gradients(7)
    scaled = [scale * g for g in given]

    def of(v_source, g, **more):
        make = lambda p: M3(p, 1.0, (0.9, 0.9, 0.9), eps=0.0, slow_period=2, v_source=v_source,  # noqa: E731
                            **{**LITERAL, **more})  # fmt: skip
        return moves(make, g)

    near = {"rtol": 1e-3 if scale < 1 else 1e-5}  # Newton-Schulz divides by the norm + 1e-7.
    assert_same(of("none", scaled), of("none", given), **near)
    assert_same(of("orthogonal", scaled), of("orthogonal", given), **near)
    assert_same(of("gradient", scaled), [m / scale for m in of("gradient", given)], **near)
    paper = {"accumulate": "paper"}
    assert_same(of("gradient", scaled, **paper), [m / scale for m in of("gradient", given, **paper)], **near)
    # Scaled to AdamW's size, no step depends on it.
    assert_same(of("gradient", scaled, match_rms=True), of("gradient", given, match_rms=True), **near)


def test_invariant_23_in_the_print_two_betas_have_no_effect() -> None:
    given = gradients(9)

    def of(*betas, accumulate="paper"):
        options = {"slow_period": 3, "slow_weight": 0.5, "accumulate": accumulate}
        return trajectory(lambda p: M3(p, 0.1, betas, **options, **LITERAL), given)[0]

    base = of(0.9, 0.9, 0.9)
    assert_same(of(0.1, 0.9, 0.9), base, rtol=1e-5)
    assert_same(of(0.9, 0.9, 0.1), base, rtol=1e-5)
    assert not torch.allclose(of(0.9, 0.3, 0.9)[-1], base[-1], rtol=1e-3)
    repaired = of(0.9, 0.9, 0.9, accumulate="decay")
    for other in ((0.1, 0.9, 0.9), (0.9, 0.9, 0.1)):
        assert not torch.allclose(of(*other, accumulate="decay")[-1], repaired[-1], rtol=1e-3)


def test_pitfall_printed_steps_are_huge_at_first_and_shrink() -> None:
    given = gradients(64, shape=(16, 16))
    options = {"slow_period": 8, "slow_weight": 0.3}
    betas = (0.9, 0.999, 0.9)
    printed = moves(lambda p: M3(p, 1.0, betas, accumulate="paper", **options, **LITERAL), given)
    sizes = [float(m.norm()) for m in printed]
    assert sizes[0] > 20 * sizes[-1] and sizes[8] > 2 * sizes[-1]
    level = moves(lambda p: M3(p, 1.0, betas, **options, weight_decay=0.0), given)
    torch.testing.assert_close([float(m.norm()) for m in level], [0.2 * 16] * 64)


def test_invariant_24_newton_schulz() -> None:
    g = draw(7, 5)
    g = g / torch.linalg.matrix_norm(g)
    # A step of gradient descent of size 1/4 on 1/2 |O - g|^2 + 1/2 |O^T O - 1|^2, from O = g.
    o = g.clone().requires_grad_()
    loss = ((o - g) ** 2).sum() / 2 + ((o.T @ o - torch.eye(5)) ** 2).sum() / 2
    (slope,) = torch.autograd.grad(loss, [o])
    gram = g.T @ g
    torch.testing.assert_close(slope, 2 * g @ (gram - torch.eye(5)))
    cubic = g - 0.25 * slope
    torch.testing.assert_close(cubic, 1.5 * g - 0.5 * g @ gram)
    torch.testing.assert_close(newton_schulz(g, [CUBIC]), cubic, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(newton_schulz(3.0 * g, [QUINTIC] * 5), newton_schulz(g), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(newton_schulz(g.T), newton_schulz(g).T)
    assert not newton_schulz(torch.zeros(3, 2)).any()
    x = draw(64, 32)
    quintic, short = (torch.linalg.svdvals(newton_schulz(x, [p] * n)) for p, n in ((QUINTIC, 5), (CUBIC, 3)))
    assert quintic.min() > 0.65 and quintic.max() < 1.2
    assert short.min() > 0.1 and short.min() < 0.3 and short.max() > 0.6 and short.max() < 0.9


def test_pitfall_zeros_make_no_step_and_no_nan() -> None:
    for make in (M3, AdaMuon):
        still = moves(lambda p, make=make: make(p, 1.0, weight_decay=0.0), [torch.zeros(4, 3)] * 3)
        assert not any(m.any() for m in still)
    # Of many numbers: a size over the least number there is would be infinite.
    assert torch.equal(match_rms(torch.zeros(64, 172)), torch.zeros(64, 172))


@pytest.mark.parametrize("sign", [True, False])
def test_adamuon_divides_what_is_orthogonal(sign) -> None:
    given = gradients(6)
    found, _ = trajectory(lambda p: AdaMuon(p, 0.1, (0.9, 0.8), sign=sign, weight_decay=0.5), given)
    w, expected, seen = draw(6, 4, seed=7), [], []
    for t in range(1, 7):
        m = sum(0.9 ** (t - i) * given[i - 1] for i in range(1, t + 1))
        seen.append(newton_schulz(m.sign() if sign else m))
        v = sum(0.2 * 0.8 ** (t - 1 - i) * o**2 for i, o in enumerate(seen))
        step = seen[-1] / v.sqrt()
        w = w * (1 - 0.1 * 0.5) - 0.1 * 0.2 * step / step.square().mean().sqrt()
        expected.append(w)
    assert_same(found, expected, rtol=1e-6)
    if sign:
        torch.testing.assert_close(seen[0], newton_schulz(given[0].sign()))
    assert_same(
        moves(lambda p: AdaMuon(p, 0.1, weight_decay=0.0), [1e3 * g for g in given]),
        moves(lambda p: AdaMuon(p, 0.1, weight_decay=0.0), given), rtol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("make", [M3, AdaMuon])
def test_state_stays_wide_and_closures_run(make) -> None:
    narrow = torch.nn.Parameter(draw(4, 3).bfloat16())
    optimizer = make([narrow], 0.01)
    narrow.grad = draw(4, 3, seed=1).bfloat16()
    optimizer.step()
    twin = torch.nn.Parameter(narrow.detach().clone())
    other = make([twin], 0.01)
    other.load_state_dict(optimizer.state_dict())
    for name in make.slots:
        assert other.state[twin][name].dtype is torch.float32
        assert torch.equal(other.state[twin][name], optimizer.state[narrow][name])
    twin.grad = narrow.grad.clone()
    optimizer.step()
    assert other.step(lambda: 3.0) == 3.0 and torch.equal(narrow, twin)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: M3(p, v_source="orthogonl"), "v_source is 'orthogonl'.*Did you mean 'orthogonal'"),
        (lambda p: M3(p, accumulate="papr"), "Did you mean 'paper'"),
        (lambda p: M3(p, slow_period=0), "slow_period is 0"),
        (lambda p: M3(p, slow_period=2.5), "slow_period is 2.5"),
        (lambda p: M3(p, slow_weight=-1.0), "slow_weight is -1"),
        (lambda p: M3(p, betas=(0.9, 1.0, 0.9)), r"betas\[1\] is 1.0"),
        (lambda p: M3(p, newton_schulz_steps=0), "newton_schulz_steps is 0"),
        (lambda p: AdaMuon(p, lr=-1.0), "lr is -1"),
    ],
)
def test_impossible_settings_are_refused(make, message) -> None:
    with pytest.raises(ConfigError, match=message):
        make([torch.nn.Parameter(draw(3, 2))])
    with pytest.raises(ShapeError, match=r"shape \[3\]; it takes matrices"):
        M3([torch.nn.Parameter(draw(3))])
