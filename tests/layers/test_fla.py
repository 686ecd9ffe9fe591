"""Kimi Delta Attention and Gated DeltaNet: with a token loop for a kernel, and with the kernels."""

import sys

import pytest
import torch

import nestor.layers.fla as fla
from nestor import NestorForCausalLM, preset
from nestor.errors import ConfigError
from nestor.layers.fla import KERNELS, DeltaAttention, Kernels
from nestor.layers.registry import build_mixer
from nestor.layers.span import Span

EXACT = {"rtol": 1e-9, "atol": 1e-10}
KINDS = tuple(KERNELS)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def token_loop(
    q, k, v, g, beta, initial_state=None, cu_seqlens=None, output_final_state=False,
    use_qk_l2norm_in_kernel=False,
):  # fmt: skip
    """What the kernels compute: `S <- d S; S <- S + beta k^T (v - k S)`, a sequence at a time."""
    assert output_final_state and use_qk_l2norm_in_kernel
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    if cu_seqlens is None:
        spans = [(b, slice(0, q.shape[1])) for b in range(len(q))]
    else:
        assert len(q) == 1
        spans = [(0, slice(*pair)) for pair in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:], strict=True)]
    outputs, finals = [], []
    for n, (b, at) in enumerate(spans):
        S = q.new_zeros(q.shape[2], q.shape[3], v.shape[3]) if initial_state is None else initial_state[n]
        rows = []
        for t in range(*at.indices(q.shape[1])):
            decay = g[b, t].exp()
            S = (decay.unsqueeze(-1) if decay.dim() == 2 else decay[:, None, None]) * S
            error = v[b, t] - torch.einsum("hi,hio->ho", k[b, t], S)
            S = S + beta[b, t, :, None, None] * k[b, t].unsqueeze(-1) * error.unsqueeze(-2)
            rows.append(torch.einsum("hi,hio->ho", q[b, t], S) * q.shape[3] ** -0.5)
        outputs.append(torch.stack(rows))
        finals.append(S)
    y = torch.stack(outputs) if cu_seqlens is None else torch.cat(outputs)[None]
    return y, torch.stack(finals)


@pytest.fixture
def by_loop(monkeypatch):
    """Let the layers take the token loop for their kernels, so that a CPU can run them."""
    monkeypatch.setattr(fla, "load_kernels", lambda kind: Kernels(token_loop, token_loop))


def draw(kind, dim=8, heads=2, **settings):
    torch.manual_seed(3)
    layer = DeltaAttention(dim, heads, kind, **settings)
    for module in layer.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=dim**-0.5)
    return layer


@pytest.mark.parametrize("expand_v", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_streams_may_be_cut_padded_and_packed(
    by_loop, kind, expand_v, read_pieces, same_state, select_rows
) -> None:
    """Invariants 4, 5, 6, 7 and 16."""
    layer, x = draw(kind, expand_v=expand_v).double(), normal(2, 11, 8)
    resets = torch.zeros(2, 11, dtype=torch.bool)
    resets[0, 4] = resets[0, 9] = resets[1, 0] = True
    with torch.no_grad():
        for marks in (None, resets):
            whole, state, clock = read_pieces(layer, x, resets=marks)
            assert state["recurrent"].shape == (2, 2, 4, 4 * expand_v)
            for cuts in ([3], [4, 9], range(1, 11)):
                pieces, after, _ = read_pieces(layer, x, cuts=cuts, resets=marks)
                torch.testing.assert_close(pieces, whole, **EXACT)
                same_state(after, state, clock)
        alone, own, end = read_pieces(layer, x[:1, 4:9])
        torch.testing.assert_close(whole[:1, 4:9], alone, **EXACT)
        lengths = torch.tensor([11, 5])
        ragged, state, _ = read_pieces(layer, x, lengths=lengths)
        alone, own, end = read_pieces(layer, x[1:, :5])
        torch.testing.assert_close(ragged[1, :5], alone[0], **EXACT)
        same_state(select_rows(state, [1]), own, end)
        changed = x.clone()
        changed[:, 6] += 1.0
        assert torch.equal(read_pieces(layer, changed)[0][:, :6], read_pieces(layer, x)[0][:, :6])


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_a_gradient(by_loop, kind) -> None:
    layer, x = draw(kind).double(), normal(2, 7, 8)
    y, _ = layer(x)
    gradients = torch.autograd.grad((y * normal(2, 7, 8, seed=1)).sum(), list(layer.parameters()))
    assert all(g.abs().max() > 1e-9 for g in gradients)


@pytest.mark.parametrize("name", ["kda", "gated-deltanet"])
def test_a_model_generates_as_it_reads(by_loop, name) -> None:
    torch.manual_seed(0)
    model = NestorForCausalLM(preset(name, "quick")).double()
    tokens = torch.randint(0, 250, (2, 9))
    with torch.no_grad():
        whole = model(tokens).logits
        output = model(tokens[:, :4])
        for t in range(4, 9):
            output = model(tokens[:, t : t + 1], past_key_values=output.past_key_values)
            torch.testing.assert_close(output.logits[:, 0], whole[:, t], rtol=1e-7, atol=1e-8)
    assert model.initial_state(2).layers[0]["recurrent"].abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_gpu_or_the_package_the_error_says_what_to_install(monkeypatch, kind) -> None:
    fla.load_kernels.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"needs a CUDA GPU.*pip install nestor\[gpu\]"):
        DeltaAttention(8, 2, kind)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, KERNELS[kind][0], None)
    with pytest.raises(ConfigError, match=r"needs flash-linear-attention.*pip install nestor\[gpu\]"):
        DeltaAttention(8, 2, kind)
    fla.load_kernels.cache_clear()


def test_impossible_settings_are_refused(by_loop) -> None:
    with pytest.raises(ConfigError, match="width 8 in 3 heads"):
        DeltaAttention(8, 3)
    with pytest.raises(ConfigError, match="kind is 'kdb'"):
        DeltaAttention(8, 2, "kdb")
    config = preset("kda", "quick", memory={"expand_w": 2}, intermediate_size=64)
    with pytest.raises(ConfigError, match="unknown memory setting 'expand_w'. Did you mean 'expand_v'"):
        build_mixer("kda", config, 0)


# --- the kernels themselves ---------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.slow  # the kernels are tuned on first use, for minutes
@pytest.mark.parametrize("width", [32, 48, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_compute_the_token_loop(monkeypatch, kind, dtype, width) -> None:
    pytest.importorskip("fla")
    layer = draw(kind, dim=2 * width).cuda().to(dtype)
    x = normal(2, 150, 2 * width).to("cuda", dtype)
    resets = torch.zeros(2, 150, dtype=torch.bool, device="cuda")
    resets[0, 70] = resets[1, 10] = True
    tolerance = 2e-2 if dtype == torch.bfloat16 else 5e-3
    for marks in (None, resets):
        span = Span.build(None, 2, 150, "cuda", None, marks)
        with torch.no_grad():
            y, state = layer(x, None, span)
            twin = draw(kind, dim=2 * width).cuda().double()
            twin.load_state_dict(layer.state_dict())
            with monkeypatch.context() as patch:
                patch.setattr(fla, "load_kernels", lambda kind: Kernels(token_loop, token_loop))
                wanted, wanted_state = twin(x.double(), None, span)
        assert float((y - wanted).norm() / wanted.norm()) < tolerance
        drift = state["recurrent"] - wanted_state["recurrent"]
        assert float(drift.norm() / wanted_state["recurrent"].norm()) < tolerance


@pytest.mark.gpu
@pytest.mark.slow  # the kernels are tuned on first use, for minutes
@pytest.mark.parametrize("kind", KINDS)
def test_prefill_and_decoding_equal_one_prefill(kind) -> None:
    pytest.importorskip("fla")
    layer = draw(kind, dim=64).cuda()
    x = normal(2, 140, 64).float().cuda()
    with torch.no_grad():
        whole, end = layer(x)
        y, state = layer(x[:, :130])
        copy = {name: tensor.clone() for name, tensor in state.items()}
        pieces = [y]
        for t in range(130, 140):
            y, after = layer(x[:, t : t + 1], state)
            assert all(torch.equal(state[name], copy[name]) for name in state)
            state, copy = after, {name: tensor.clone() for name, tensor in after.items()}
            pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(state["recurrent"], end["recurrent"], rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.slow  # the kernels are tuned on first use, for minutes
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_kernels_are_those_of_the_token_loop(monkeypatch, kind) -> None:
    pytest.importorskip("fla")
    layer = draw(kind, dim=64).cuda()
    x = normal(2, 100, 64).float().cuda()
    y, _ = layer(x)
    weight = normal(2, 100, 64, seed=1).cuda()
    try:
        actual = torch.autograd.grad((y * weight.float()).sum(), list(layer.parameters()))
    except RuntimeError as error:
        if kind == "gated_deltanet" and "Triton" in str(error):
            pytest.skip(f"flash-linear-attention refuses this backward: {error}")
        raise
    monkeypatch.setattr(fla, "load_kernels", lambda kind: Kernels(token_loop, token_loop))
    twin = draw(kind, dim=64).cuda().double()
    twin.load_state_dict(layer.state_dict())
    expected = torch.autograd.grad((twin(x.double())[0] * weight).sum(), list(twin.parameters()))
    for (name, _), a, b in zip(layer.named_parameters(), actual, expected, strict=True):
        assert float((a - b).norm() / b.norm()) < 2e-2, name
