"""Inner losses: against their formulas, their derivatives against autograd, and in a memory."""

import pytest
import torch

from nestor.errors import ConfigError, ShapeError
from nestor.ops.neural_memory import MemorySpec
from nestor.ops.neural_memory.losses import INNER_LOSSES, LossSettings, make_loss

CASES = {
    "l2": {},
    "dot_product": {},
    "lp": {},
    "lp of 1": {"exponent": 1.0},
    "lp of 1.5": {"exponent": 1.5},
    "lp of 2": {"exponent": 2.0},
    "lp smooth": {"smooth": True, "sharpness": 3.0, "eps": 1e-2},
    "lp of 1.5 smooth": {"exponent": 1.5, "smooth": True, "sharpness": 3.0, "eps": 1e-2},
    "l1": {},
    "l1 smooth": {"smooth": True, "sharpness": 2.0},
    "huber": {"threshold": 0.8},
    "huber_norm": {"threshold": 2.0},
    "yaad": {"threshold": 2.0},
    "yaad smooth": {"threshold": 2.0, "smooth": True, "sharpness": 2.0},
    "worst_case_shift": {"shift": 0.7},
}
SMOOTH = {"lp", "lp smooth", "lp of 1.5 smooth", "l1 smooth", "worst_case_shift", "huber_norm"}


def error_formula(name, settings, f, v, d):
    """Table 4.2 for c = 1, written so that autograd can differentiate it."""
    r, p, nu = f - v, settings.exponent, settings.sharpness
    norm = (r * r).sum(-1, keepdim=True).sqrt()
    sign = torch.tanh(nu * r) if settings.smooth else torch.sign(r.detach())
    if name == "l2":
        return r
    if name == "dot_product":
        return -v
    if name == "lp":
        size = (r * r + settings.eps).sqrt() if settings.smooth else r.abs()
        return p * sign * size ** (p - 1)
    if name == "l1":
        return sign
    if name == "huber":
        return torch.maximum(torch.minimum(r, d * torch.ones_like(r)), -d * torch.ones_like(r))
    if name == "huber_norm":
        return r * (d / norm).clamp(max=1.0)
    if name == "yaad":
        return torch.where((norm <= d).expand_as(r), r, d * sign)
    assert name == "worst_case_shift"
    return r + settings.shift * r / norm


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def case(label, scale=1.0):
    name, settings = label.split()[0], LossSettings(**CASES[label])
    return name, settings, make_loss(name, scale, settings)


def memory_choices(label):
    return {"inner_loss": label.split()[0], **{f"loss_{name}": x for name, x in CASES[label].items()}}


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("label", CASES)
def test_error_and_its_derivatives_are_those_of_the_formula(label, scale) -> None:
    """Table 4.2 and invariant 3: e is the gradient of the value, its products those of autograd."""
    name, settings, loss = case(label, scale)
    f, v, g = draw(2, 9, 4), draw(2, 9, 4, seed=1), draw(2, 9, 4, seed=2).detach()
    e = scale * error_formula(name, settings, f, v, settings.threshold)
    torch.testing.assert_close(loss.error(f, v), e, rtol=1e-12, atol=1e-12)
    value = loss.value(f, v)
    assert value.shape == f.shape[:-1]
    (own,) = torch.autograd.grad(value.sum(), f, create_graph=True)
    torch.testing.assert_close(own, e, rtol=1e-10, atol=1e-12)

    grad_f, grad_v = loss.error_vjp(g, f.detach(), v.detach())
    for of in (e, own):
        wanted = (None, None)
        if of.requires_grad:
            wanted = torch.autograd.grad(of, [f, v], g, allow_unused=True, retain_graph=True)
        for actual, expected in zip((grad_f, grad_v), wanted, strict=True):
            actual = torch.zeros_like(f) if actual is None else actual
            expected = torch.zeros_like(f) if expected is None else expected
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("label", sorted(SMOOTH))
def test_products_pass_finite_differences_where_the_error_is_smooth(label) -> None:
    """Invariant 3."""
    *_, loss = case(label)
    f, v, g = (draw(1, 5, 4, seed=s).detach() for s in range(3))
    h = 1e-6
    for coordinate in range(4):
        step = torch.zeros(4, dtype=torch.float64)
        step[coordinate] = h
        difference = (loss.error(f + step, v) - loss.error(f - step, v)) / (2 * h)
        grad_f, _ = loss.error_vjp(g, f, v)
        torch.testing.assert_close(grad_f[..., coordinate], (difference * g).sum(-1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("label", ["huber", "huber_norm", "yaad", "yaad smooth"])
def test_a_threshold_of_each_token_has_a_gradient(label, width) -> None:
    """Section 4.4: delta_t comes from the token, for all channels or one each."""
    name, settings, loss = case(label, scale=1.5)
    f, v, g = draw(2, 9, 4), draw(2, 9, 4, seed=1), draw(2, 9, 4, seed=2).detach()
    d = (draw(2, 9, width, seed=3).detach().abs() + 0.5).requires_grad_()
    if name == "huber_norm" and width > 1:
        with pytest.raises(ShapeError, match="its last axis must be 1"):
            loss.error(f, v, d)
        return
    e = 1.5 * error_formula(name, settings, f, v, d)
    torch.testing.assert_close(loss.error(f, v, d), e, rtol=1e-12, atol=1e-12)
    (own,) = torch.autograd.grad(loss.value(f, v, d).sum(), f, create_graph=True)
    torch.testing.assert_close(own, e, rtol=1e-10, atol=1e-12)
    wanted = torch.autograd.grad(e, [f, v, d], g)
    with torch.no_grad():
        actual = (*loss.error_vjp(g, f, v, d), loss.threshold_vjp(g, f, v, d))
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("label", CASES)
def test_every_loss_is_finite_at_no_residual_and_far_out(label) -> None:
    *_, loss = case(label)
    for size in (0.0, 1e3):
        f, v = torch.full((1, 2, 3), size), torch.zeros(1, 2, 3)
        f.requires_grad_()
        (own,) = torch.autograd.grad(loss.value(f, v).sum(), f)
        for x in (
            own,
            loss.error(f, v),
            *(t for t in loss.error_vjp(torch.ones_like(f), f, v) if t is not None),
        ):
            assert torch.isfinite(x).all()
        if size == 0:
            assert not loss.error(f, v).any()


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("label", CASES)
def test_a_memory_in_chunks_equals_the_token_loop_with_every_loss(
    draw_problem, assert_close, flat, gradients, label, depth
) -> None:
    """Invariants 1, 2, 3 and 23."""
    p = draw_problem(
        3, length=10, depth=depth, chunk_size=3, with_state=True, reset=0.2, masked=0.2,
        norm="residual_layernorm" if depth == 2 else "none", **memory_choices(label),
    )  # fmt: skip
    assert_close(flat(p.run()), flat(p.run("reference")))
    found, wanted = gradients(p, lambda p: p.run()), gradients(p, lambda p: p.run("reference"))
    for name in wanted:
        assert_close(found[name], wanted[name], 1e-10, name)


# --- invariant 17: what the losses reduce to ----------------------------------------------------------------


def test_the_second_power_is_the_squared_error_of_the_paper(draw_problem, assert_close, flat) -> None:
    """Invariant 17: Moneta's loss at p = 2 is Titans' with c = 2."""
    p = draw_problem(length=11, momentum=False)
    squared = p.run(loss_scale=2.0)
    assert_close(flat(p.run(inner_loss="lp", loss_exponent=2.0)), flat(squared))


@pytest.mark.parametrize("name", ["huber", "huber_norm", "yaad"])
def test_a_threshold_out_of_reach_leaves_the_squared_error(draw_problem, assert_close, flat, name) -> None:
    """Invariant 17: delta -> inf."""
    p = draw_problem(length=11, momentum=False)
    assert_close(flat(p.run(inner_loss=name, loss_threshold=1e6)), flat(p.run()))


@pytest.mark.parametrize("name", ["huber", "huber_norm", "yaad"])
def test_a_threshold_of_nothing_freezes_the_memory(draw_problem, assert_close, name) -> None:
    """Invariant 17: delta -> 0."""
    p = draw_problem(length=11, momentum=False, forget=False)
    _, after = p.run(inner_loss=name, loss_threshold=1e-13)
    for w, m in zip(after.weights, p.initial, strict=True):
        assert_close(w, m.expand_as(w))


def test_the_norm_of_huber_bounds_the_step_by_the_key(draw_problem) -> None:
    """Invariant 17: in a linear memory ||g|| <= delta ||k||, with equality beyond delta."""
    p = draw_problem(
        length=1, depth=1, norm="none", momentum=False, forget=False, inner_loss="huber_norm",
        loss_threshold=0.7,
    )  # fmt: skip
    _, after = p.run()
    moved = (after.weights[0] - p.initial[0]) / p.theta[:, 0, :, None, None]
    norm, bound = moved.norm(dim=(-2, -1)), 0.7 * p.k[:, 0].norm(dim=-1)
    error = (torch.einsum("bhi,hio->bho", p.k[:, 0], p.initial[0]) - p.v[:, 0]).norm(dim=-1)
    assert (norm <= bound * (1 + 1e-12)).all() and (error > 0.7).any()
    torch.testing.assert_close(norm[error > 0.7], bound[error > 0.7], rtol=1e-10, atol=0)


def test_huber_per_coordinate_is_the_clipped_error() -> None:
    """Invariant 17."""
    f, v = draw(2, 9, 4).detach(), draw(2, 9, 4, seed=1).detach()
    loss = make_loss("huber", 1.0, LossSettings(threshold=0.4))
    assert torch.equal(loss.error(f, v), (f - v).clip(-0.4, 0.4))


def test_the_printed_mixture_jumps_and_the_norm_of_huber_does_not() -> None:
    """Section 4.2: at ||r|| = delta the mixture goes from length delta to delta sqrt(p)."""
    r = torch.full((1, 1, 4), 0.5, dtype=torch.float64)  # ||r|| = 1
    lengths = {}
    for name in ("yaad", "huber_norm"):
        loss = make_loss(name, 1.0, LossSettings(threshold=1.0))
        lengths[name] = [
            float(loss.error(r * (1 + shift), torch.zeros_like(r)).norm()) for shift in (-1e-9, 1e-9)
        ]
    assert lengths["yaad"] == pytest.approx([1.0, 2.0])
    assert lengths["huber_norm"] == pytest.approx([1.0, 1.0])


def test_the_shifted_loss_is_the_worst_over_a_ball_of_values() -> None:
    """Section 4.2: no value within Delta of v has a larger squared error."""
    f, v = draw(1, 6, 4).detach(), draw(1, 6, 4, seed=1).detach()
    worst = make_loss("worst_case_shift", 1.0, LossSettings(shift=0.3)).value(f, v)
    squared = make_loss("l2", 1.0)
    away = torch.nn.functional.normalize(v - f, dim=-1) * 0.3
    torch.testing.assert_close(worst, squared.value(f, v + away))
    for seed in range(20):
        other = torch.nn.functional.normalize(draw(1, 6, 4, seed=seed + 5).detach(), dim=-1) * 0.3
        assert (squared.value(f, v + other) <= worst + 1e-12).all()


def test_no_two_losses_make_the_same_memory(draw_problem) -> None:
    p = draw_problem(length=11)
    with torch.no_grad():
        found = {label: p.run(**memory_choices(label))[0] for label in CASES}
    same = [{"lp of 1", "l1"}]
    for a, first in found.items():
        for b, second in found.items():
            if a != b and {a, b} not in same:
                assert (first - second).abs().max() > 1e-4, (a, b)
    assert set(INNER_LOSSES) == {label.split()[0] for label in CASES}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_exponent": 0.5}, "loss_exponent is 0.5; it must be at least 1"),
        ({"loss_threshold": 0.0}, "loss_threshold is 0.0; it must be positive"),
        ({"loss_sharpness": -1.0}, "loss_sharpness is -1.0"),
        ({"loss_eps": 0.0}, "loss_eps is 0.0"),
        ({"loss_shift": -0.1}, "loss_shift is -0.1; it must not be negative"),
    ],
)
def test_impossible_settings_are_refused(settings, message) -> None:
    with pytest.raises(ConfigError, match=message):
        MemorySpec(**settings)
