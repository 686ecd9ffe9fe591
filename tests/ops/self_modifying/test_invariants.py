"""Self-modifying memories whose answer is known. Numbers are those of spec/nested-learning.md section h.

Expected values are computed here from closed forms, or by the neural memory, which shares no lines.
"""

import pytest
import torch

from nestor.ops.neural_memory import MemorySpec, neural_memory
from nestor.ops.self_modifying import Gate

EXACT = {"rtol": 1e-9, "atol": 1e-10}
# One memory with keys, values and gates that are given, and nothing that rounds or caps them.
PLAIN = {"memories": ("mem",), "targets": "value", "step_cap": "none", "norm_eps": 1e-40}


def constant(p, eta, alpha):
    """The same gates at every token."""
    return p.replace(eta=torch.full_like(p.eta, eta), alpha=torch.full_like(p.alpha, alpha))


def repeated(p, length):
    """The first key and value of each sequence, again and again."""
    size = (p.k.shape[0], length, *p.k.shape[2:])
    tokens = {n: getattr(p, n)[:, :1].expand(size) for n in ("q", "k", "v")}
    gates = {n: getattr(p, n)[:, :1].expand(size[:3]) for n in ("eta", "alpha")}
    return p.replace(**tokens, **gates)


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


# --- 16: what a repeated pair leads to ----------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1.0, 0.9])
@pytest.mark.parametrize("inner_loss", ["l2", "dot_product"])
@torch.no_grad()
def test_16_a_repeated_pair_is_answered_by_the_fixed_point(draw_problem, inner_loss, alpha) -> None:
    p = draw_problem(chunk_size=1, projection_chunk_size=1, inner_loss=inner_loss, **PLAIN)
    p = repeated(constant(p, 0.3, alpha), 80)
    W = p.run()[1].weights["mem"][0]
    k, v = unit(p.k[:, 0]), p.v[:, 0]
    share = 0.3 / (1 - alpha + (0.6 if inner_loss == "l2" else 0.3))
    assert share == pytest.approx(
        {("l2", 1.0): 0.5, ("dot_product", 1.0): 1.0}.get((inner_loss, alpha), share)
    )
    torch.testing.assert_close(torch.einsum("bhi,bhio->bho", k, W), share * v, **EXACT)
    # What is orthogonal to the key is kept but for alpha.
    other = torch.randn_like(k)
    other = other - k * (k * other).sum(-1, keepdim=True)
    before = torch.einsum("bhi,hio->bho", other, p.initial["mem"][0])
    after = torch.einsum("bhi,bhio->bho", other, W)
    torch.testing.assert_close(after, before * alpha**80, **EXACT)


# --- 17: the delta rule -------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, 4, 16])
@torch.no_grad()
def test_17_the_dot_product_loss_is_the_gated_delta_rule_for_any_chunk(draw_problem, chunk) -> None:
    """W <- a (W - b k^T (k W)) + b k^T u with b = eta / alpha and u = alpha v; without forgetting u = v."""
    p = draw_problem(chunk_size=chunk, projection_chunk_size=1, inner_loss="dot_product", length=12, **PLAIN)
    for alpha in (p.alpha, torch.ones_like(p.alpha)):
        y, after, _ = p.run(alpha=alpha)
        for b in range(2):
            for h in range(2):
                W = p.initial["mem"][0][h]
                for t in range(12):
                    k, v, q = unit(p.k[b, t, h]), p.v[b, t, h], unit(p.q[b, t, h])
                    a, eta = alpha[b, t, h], p.eta[b, t, h]
                    torch.testing.assert_close(y[b, t, h], q @ W, **EXACT)
                    W = a * (W - eta / a * torch.outer(k, k @ W)) + eta / a * torch.outer(k, a * v)
                torch.testing.assert_close(after.weights["mem"][0][b, h], W, **EXACT)


@torch.no_grad()
def test_17_orthonormal_keys_recall_every_stored_pair_exactly(draw_problem) -> None:
    """eta = alpha = 1 and the dot product: the last value of each key, whatever was there before."""
    p = draw_problem(
        chunk_size=3, inner_loss="dot_product", length=8, width=8, projection_chunk_size=1, **PLAIN
    )
    keys = torch.linalg.qr(torch.randn(2, 2, 8, 8, dtype=torch.float64)).Q.transpose(1, 2)
    _, after, _ = constant(p.replace(k=keys), 1.0, 1.0).run()
    torch.testing.assert_close(torch.einsum("bthi,bhio->btho", keys, after.weights["mem"][0]), p.v, **EXACT)


# --- 19: the static limit -----------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
@torch.no_grad()
def test_19_without_steps_and_forgetting_nothing_changes(draw_problem, flatten, depth) -> None:
    """eta -> 0, alpha -> 1 by the gates' biases: every memory stays as learned, y = M_mem,0(q)."""
    p = draw_problem(depth=depth)
    closed = {n: Gate(torch.full_like(g.bias, -torch.inf), g.read) for n, g in p.gates.items()}
    y, after, strength = p.replace(gates=closed).run()
    for name, matrices in p.initial.items():
        for part in (after.weights, after.anchor):
            for w, first in zip(part[name], matrices, strict=True):
                assert torch.equal(w, first.expand_as(w))
    q = p.q / (p.q.square().sum(-1, keepdim=True) + p.spec.norm_eps).sqrt()
    z = torch.einsum("bthi,hio->btho", q, p.initial["mem"][0])
    if depth == 2:
        z = q + torch.einsum("bthi,hio->btho", torch.nn.functional.silu(z), p.initial["mem"][1])
    torch.testing.assert_close(y, z, **EXACT)
    assert not strength.any()
    # And the gates do open otherwise.
    assert not torch.equal(p.run()[1].weights["k"][0], after.weights["k"][0])


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(("read", "theirs"), [("running", "exclusive"), ("anchor", "chunk_start")])
@torch.no_grad()
def test_19_a_static_memory_without_dgd_is_that_of_titans(
    draw_problem, depth, read, theirs, momentum
) -> None:
    """Static projections, targets v, no decay along keys: the neural memory with its own gates."""
    choices = {"chunk_size": 4, "projection_chunk_size": 2, "read_mode": read, "dgd": False}
    p = draw_problem(depth=depth, momentum=momentum, **choices, **PLAIN)
    y, after, strength = p.run()
    spec = MemorySpec(
        4, "silu", "none" if depth == 1 else "residual", read_mode=theirs, decay="zero", grad_at="pre_decay"
    )
    wanted, state, norm = neural_memory(
        unit(p.q), unit(p.k), p.v, p.eta, p.mu, 1 - p.alpha, list(p.initial["mem"]), spec=spec,
        backend="chunked", return_surprise=True,
    )  # fmt: skip
    torch.testing.assert_close(y, wanted, **EXACT)
    torch.testing.assert_close(strength, p.eta * norm, **EXACT)
    for ours, other in zip(after[:3], state[:3], strict=True):
        for w, expected in zip(ours.get("mem", ()), other, strict=True):
            torch.testing.assert_close(w, expected, **EXACT)
    # With the decay along keys it is another memory.
    assert (p.run(dgd=True)[0] - wanted).abs().max() > 1e-3


# --- 20: bounds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
@torch.no_grad()
def test_19_what_is_forgotten_leads_to_where_documents_start(draw_problem, depth) -> None:
    """Without steps W_t - W_0 is what it was times all that was kept, from whatever state."""
    p = draw_problem(2, memories=("mem",), depth=depth, length=9, decay="initial")
    p = p.replace(eta=torch.zeros_like(p.eta), alpha=torch.full_like(p.alpha, 0.8))
    other = draw_problem(3, memories=("mem",), depth=depth, length=9, decay="initial").run()[1]
    after = p.replace(state=other).run()[1]
    for first, before, now in zip(p.initial["mem"], other.weights["mem"], after.weights["mem"], strict=True):
        torch.testing.assert_close(now - first, 0.8**9 * (before - first))
    # From the start itself nothing moves at all, where forgetting to zero leaves 0.8^9.
    for first, now in zip(p.initial["mem"], p.run()[1].weights["mem"], strict=True):
        torch.testing.assert_close(now, first.expand_as(now))


@torch.no_grad()
def test_20_a_transition_never_enlarges_a_memory(draw_problem) -> None:
    """||alpha I - eta k k^T|| <= alpha for eta <= alpha, which the spectral cap sees to."""
    p = draw_problem(length=1, width=4, inner_loss="dot_product", **PLAIN)
    p = p.replace(v=torch.zeros_like(p.v), k=p.k * 10)
    eye = torch.eye(4, dtype=torch.float64).expand(2, 4, 4)
    for eta, alpha in ((0.3, 0.9), (0.9, 0.9), (2.5, 0.8)):
        step = constant(p, eta, alpha).replace(initial={"mem": (eye,)}, step_cap="spectral")
        largest = torch.linalg.matrix_norm(step.run()[1].weights["mem"][0], 2)
        torch.testing.assert_close(largest, torch.full_like(largest, alpha), **EXACT)
    uncapped = constant(p, 2.5, 0.8).replace(initial={"mem": (eye,)})
    assert torch.linalg.matrix_norm(uncapped.run()[1].weights["mem"][0], 2).min() > 1.5


@pytest.mark.parametrize("chunk", [3, 16, 1024])
@torch.no_grad()
def test_20_a_frozen_chunk_on_one_key_is_bounded_and_without_decay_diverges(draw_problem, chunk) -> None:
    """L2 with dgd multiplies the answer by 2 (1 - eta)^C - 1 a chunk; plain descent by 1 - eta C."""
    eta = 0.5
    p = draw_problem(chunk_size=chunk, projection_chunk_size=chunk, batch=1, heads=1, **PLAIN)
    p = repeated(constant(p.replace(v=torch.zeros_like(p.v)), eta, 1.0), chunk)
    k = unit(p.k[:, 0])
    before = torch.einsum("bhi,hio->bho", k, p.initial["mem"][0])

    def answers(**choices):
        state = p.run(**choices)[1]
        return torch.einsum("bhi,bhio->bho", k, state.weights["mem"][0])

    torch.testing.assert_close(answers(), before * (2 * (1 - eta) ** chunk - 1), **EXACT)
    torch.testing.assert_close(answers(dgd=False), before * (1 - eta * chunk), rtol=1e-8, atol=1e-10)
    assert answers().norm() <= before.norm() * (1 + 1e-9)
    assert (answers(dgd=False).norm() > before.norm()) == (eta * chunk > 2)


@torch.no_grad()
def test_20_a_memory_that_makes_its_targets_grows_slowly_if_they_are_bounded(draw_problem) -> None:
    """Of v = -k each chunk multiplies the answer by 3 (1 - eta)^C - 2, which is below -1 from 1/3 on."""
    choices = {**PLAIN, "chunk_size": 8, "projection_chunk_size": 1}
    p = draw_problem(batch=1, heads=1, **choices)
    p = repeated(constant(p, 0.4, 1.0), 8 * 20)
    p, k = p.replace(v=-unit(p.k)), unit(p.k[:, 0])
    before = torch.einsum("bhi,hio->bho", k, p.initial["mem"][0])

    def answer(targets):
        return torch.einsum("bhi,bhio->bho", k, p.run(targets=targets)[1].weights["mem"][0])

    torch.testing.assert_close(answer("self"), before * (3 * 0.6**8 - 2) ** 20, rtol=1e-7, atol=0)
    assert answer("self").norm() > 1e3 * before.norm()
    # A bounded target is added once a chunk, to what 1 - 2 x leaves.
    size = before.norm()
    for _ in range(20):
        size = (1 - 2 * 0.6**8) * size + (1 - 0.6**8) * size.clamp_max(1.0)
    torch.testing.assert_close(answer("bounded").norm(), size, **EXACT)
    assert size < before.norm() + 20


@pytest.mark.parametrize("depth", [1, 2])
@torch.no_grad()
def test_20_the_soft_cap_bounds_memories_that_share_a_period(draw_problem, depth) -> None:
    """||M|| <= max(1, ||M_0||) over all matrices of a group, whatever is read."""
    p = draw_problem(depth=depth, length=24, step_cap="soft", horizon=200.0, heads=1)
    p = p.replace(v=p.v * 30)

    def norms(weights):
        own = [w.square().sum((-2, -1)) for n, ws in weights.items() if n != "mem" for w in ws]
        return torch.stack(own).sum(0).sqrt()

    first = norms({n: tuple(w[None] for w in ws) for n, ws in p.initial.items()})
    for length in (2, 7, 24):
        part = p.part(slice(length))
        assert (norms(part.run()[1].weights) <= first.clamp_min(1.0) + 1e-12).all()
    uncapped = norms(p.part(slice(4)).run(step_cap="spectral")[1].weights)
    assert uncapped.isfinite().all() and uncapped.max() > 2 * first.max()


# --- 21: outer gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
def test_21_the_gradient_of_a_later_read_goes_through_the_writes(draw_problem, depth) -> None:
    """d y_T / d M_0 of every memory against finite differences, T several chunks later."""
    memories = ("k", "v", "q", "eta", "alpha", "mem")
    choices = {"length": 7, "batch": 1, "projection_chunk_size": 4, "chunk_size": 2}
    p = draw_problem(7, depth=depth, memories=memories, **choices)
    direction = torch.randn(1, 2, 3, dtype=torch.float64)

    def value(initial):
        return (p.run(initial=initial)[0][:, -1] * direction).sum()

    for name, matrices in p.initial.items():
        ways, step = [torch.randn_like(w) for w in matrices], 1e-6

        def moved(size, name=name, matrices=matrices, ways=ways):
            return {**p.initial, name: tuple(w + size * way for w, way in zip(matrices, ways, strict=True))}

        size = torch.zeros((), dtype=torch.float64, requires_grad=True)
        (found,) = torch.autograd.grad(value(moved(size)), size)
        with torch.no_grad():
            wanted = (value(moved(step)) - value(moved(-step))) / (2 * step)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8, msg=lambda m: f"{name}: {m}")
        assert found.abs() > 1e-6


def test_21_a_detached_state_ends_the_gradient_and_changes_no_value(draw_problem) -> None:
    """Truncation at the border of a segment: what was learned before it is a constant."""
    p = draw_problem(length=8)
    leaf = p.initial["v"][0].clone().requires_grad_()
    whole = p.replace(initial={**p.initial, "v": (leaf,)})
    y, state, _ = whole.part(slice(4)).run()

    def cut(part):
        return {n: tuple(w.detach() for w in ws) for n, ws in part.items()}

    apart = state._replace(weights=cut(state.weights), anchor=cut(state.anchor))
    kept, lost = (whole.part(slice(4, None), s).run()[0] for s in (state, apart))
    assert torch.equal(kept, lost)
    assert torch.autograd.grad(kept.sum(), leaf, retain_graph=True)[0].abs().max() > 1e-6
    assert not lost.requires_grad


# --- 7, 8, 10: streams ----------------------------------------------------------------------------------


@pytest.mark.parametrize("read_mode", ["running", "anchor"])
@torch.no_grad()
def test_7_a_changed_token_leaves_earlier_outputs_bitwise_unchanged(draw_problem, read_mode) -> None:
    p = draw_problem(read_mode=read_mode, length=12)
    before = p.run()[0]
    for t in (0, 3, 4, 7, 11):
        changed = {n: getattr(p, n).clone() for n in ("q", "k", "v", "g")}
        for x in changed.values():
            x[:, t] += 1.0
        after = p.run(**changed)[0]
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[:, t] - before[:, t]).abs().min() > 1e-9
        # Memory sees nothing of the token before the next chunk in mode "anchor", and the next token does in
        # mode "running".
        written = p.run(k=changed["k"])[0]
        next_chunk = (t // 4 + 1) * 4 if read_mode == "anchor" else t + 1
        assert torch.equal(written[:, :next_chunk], before[:, :next_chunk])
        assert next_chunk >= 12 or (written[:, next_chunk] - before[:, next_chunk]).abs().max() > 1e-9


@torch.no_grad()
def test_8_chunks_are_counted_from_the_start_of_the_document_not_of_the_call(draw_problem, same) -> None:
    p = draw_problem(length=11, chunk_size=4, projection_chunk_size=2)
    whole = p.run()
    _, state, _ = p.part(slice(3)).run()
    assert state.phase.tolist() == [3, 3]
    rest = p.part(slice(3, None), state).run()
    torch.testing.assert_close(rest[0], whole[0][:, 3:], **EXACT)
    # A clock that starts anew with the call is another memory: the anchors are elsewhere.
    anew = p.part(slice(3, None), state._replace(phase=torch.zeros_like(state.phase))).run()
    assert (anew[0] - whole[0][:, 3:]).abs().max() > 1e-4


@torch.no_grad()
def test_10_sequences_of_a_batch_have_memories_of_their_own(draw_problem, flatten) -> None:
    p = draw_problem(batch=3, documents=True)
    together = flatten(p.run())
    order = torch.tensor([2, 0, 1])
    tokens = ("q", "k", "v", "g", "resets")
    permuted = flatten(p.replace(**{n: getattr(p, n)[order] for n in tokens}).run())
    for name, tensor in together.items():
        torch.testing.assert_close(permuted[name], tensor[order], **EXACT)
    for b in range(3):
        alone = flatten(p.replace(**{n: getattr(p, n)[b : b + 1] for n in tokens}).run())
        for name, tensor in together.items():
            torch.testing.assert_close(tensor[b : b + 1], alone[name], **EXACT)
    for name, tensor in together.items():
        assert name == "phase" or not torch.equal(tensor[0], tensor[1]), name
