"""Attention: every way of running it equals one masked softmax, and nothing sees what it must not."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from nestor.errors import ConfigError, ShapeError
from nestor.layers import attention as module
from nestor.layers import flex
from nestor.layers.attention import Attention, attend, keep_recent
from nestor.layers.span import Span

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def naive(query, keys, values, first_visible=None, window=None, prefix=None):
    """One softmax per query over the keys that the rule of `attend` shows it."""
    batch, length, heads, width = query.shape
    stored = keys[0].shape[1]
    out = torch.empty_like(query)
    for b in range(batch):
        for i in range(length):
            seen = [
                j + stored - length
                for j in range(length - stored, i + 1)
                if (window is None or i - j < window) and (first_visible is None or j >= first_visible[b, i])
            ]
            k = torch.cat([x[b, seen] for x in keys] + ([prefix[0]] if prefix else []))
            v = torch.cat([x[b, seen] for x in values] + ([prefix[1]] if prefix else []))
            for h in range(heads):
                group = h // (heads // k.shape[1])
                weight = (k[:, group] @ query[b, i, h] / width**0.5).softmax(0)
                out[b, i, h] = weight @ v[:, group]
    return out


def make(heads=4, kv_heads=2, window=None, persistent=0, qk_norm=False, conv=0):
    layer = Attention(
        16, heads, kv_heads, window=window, persistent_tokens=persistent, qk_norm=qk_norm, conv_kernel=conv
    ).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


@given(
    length=st.integers(1, 13),
    cached=st.integers(0, 6),
    window=st.none() | st.integers(1, 8),
    first=st.booleans(),
    sets=st.integers(1, 2),
    prefix=st.integers(0, 3),
    budget=st.sampled_from([1, 40, 1 << 24]),
)
@settings(max_examples=60)
def test_every_path_equals_a_softmax_per_query(length, cached, window, first, sets, prefix, budget):
    torch.manual_seed(length + 7 * cached)
    query = normal(2, length, 4, 4)
    keys = [normal(2, cached + length, 2, 4) for _ in range(sets)]
    values = [normal(2, cached + length, 2, 4) for _ in range(sets)]
    extra = (normal(prefix, 2, 4), normal(prefix, 2, 4)) if prefix else None
    visible = None
    if first:
        index = torch.arange(length)
        visible = torch.stack([index - torch.randint(0, length + cached, (length,)) for _ in range(2)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MASK_BUDGET", budget)
        out = attend(
            query,
            keys if sets > 1 else keys[0],
            values if sets > 1 else values[0],
            first_visible=visible,
            window=window,
            prefix_key=extra and extra[0],
            prefix_value=extra and extra[1],
        )
    torch.testing.assert_close(out, naive(query, keys, values, visible, window, extra), **EXACT)


def test_a_long_window_call_takes_the_blocked_path(monkeypatch):
    def refuse(*_):
        raise AssertionError("a mask of the whole call is quadratic")

    monkeypatch.setattr(module, "_masked", refuse)
    x = normal(1, 64, 2, 4)
    attend(x, x, x, window=4)
    attend(x, x, x, window=4, first_visible=torch.zeros(1, 64, dtype=torch.int64))


@pytest.mark.parametrize("window", [None, 3, 16])
@pytest.mark.parametrize("persistent", [0, 2])
@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize("conv", [0, 4])
def test_changing_a_token_leaves_earlier_outputs_bitwise_equal(window, persistent, with_resets, conv):
    layer = make(window=window, persistent=persistent, qk_norm=True, conv=conv).float()
    x = torch.randn(2, 12, 16)
    resets = torch.zeros(2, 12, dtype=torch.bool)
    resets[1, 5] = True
    span = Span.build(None, 2, 12, "cpu", resets=resets if with_resets else None)
    before, _ = layer(x, span=span)
    for t in (0, 4, 11):
        changed = x.clone()
        changed[:, t] += 1.0
        after, _ = layer(changed, span=span)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t], before[:, t])


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("conv", [0, 3])
def test_a_query_sees_itself_and_the_window_before_it_only(window, conv):
    """And, with a convolution, the tokens before these that their keys and values have in them."""
    layer = make(window=window, conv=conv)
    x = normal(1, 10, 16).requires_grad_()
    y, _ = layer(x)
    (gradient,) = torch.autograd.grad(y[0, 7].sum(), x)
    reached = gradient[0].abs().sum(-1).nonzero()[:, 0].tolist()
    assert reached == list(range(7 - window + 1 - max(0, conv - 1), 8))


def test_convolutions_are_of_what_is_projected():
    layer, plain = make(conv=3, persistent=2), make(persistent=2)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "convolutions" not in k})
    x = normal(2, 9, 16)
    streams = []
    for name in "qkv":
        z = F.pad(getattr(layer, f"{name}_proj")(x), (0, 0, 2, 0))
        weight = layer.convolutions[name].weight
        streams.append(sum(z[:, i : i + 9] * weight[:, i] for i in range(3)))
    expected, _ = plain.mix(*streams)
    torch.testing.assert_close(layer(x)[0], plain.o_proj(expected), **EXACT)
    assert not torch.allclose(layer(x)[0], plain(x)[0])
    assert set(layer(x)[1]) - set(plain(x)[1]) == {"tail.q", "tail.k", "tail.v"}


@pytest.mark.parametrize("persistent", [0, 3])
def test_persistent_pairs_are_seen_from_every_position(persistent):
    layer = make(window=2, persistent=persistent)
    if not persistent:
        assert layer.prefix_key is None
        return
    y, _ = layer(normal(1, 9, 16))
    for t in range(9):
        (gradient,) = torch.autograd.grad(y[0, t].sum(), layer.prefix_value, retain_graph=True)
        assert (gradient.abs().sum((1, 2)) > 0).all()


@pytest.mark.parametrize("window", [20, 25])
def test_a_window_as_long_as_the_call_equals_full_attention(window):
    full = make()
    windowed = make(window=window)
    windowed.load_state_dict(full.state_dict())
    x = normal(2, 20, 16)
    torch.testing.assert_close(windowed(x)[0], full(x)[0], **EXACT)


def test_with_convolutions_a_query_starts_by_finding_what_followed_the_same_tokens():
    """Of a text in which two tokens come again, a query sees most what followed them the first time."""
    torch.manual_seed(0)
    layer = Attention(256, 1, conv_kernel=3, rope_theta=1e12).double()
    x = normal(1, 12, 256)
    x[:, 10:] = x[:, 3:5]
    q, k = (
        layer.convolutions[name](getattr(layer, f"{name}_proj")(x), None, Span.build(None, 1, 12, "cpu"))[0]
        for name in "qk"
    )
    # The key of token 5 has tokens 3 and 4 in it, as the query of token 11 has 10 and 11.
    assert int((k[0] @ q[0, 11]).argmax()) == 5
    assert torch.equal(layer.q_proj.weight, layer.k_proj.weight)
    # Groups of queries with one key cannot all be equal to it.
    grouped = Attention(256, 4, 2, conv_kernel=3)
    assert grouped.q_proj.weight.shape != grouped.k_proj.weight.shape


@given(st.data(), st.sampled_from([None, 1, 3, 30]), st.integers(0, 2), st.sampled_from([0, 2, 4]))
@settings(max_examples=40)
def test_cutting_a_stream_anywhere_changes_neither_outputs_nor_state(data, window, persistent, conv):
    torch.manual_seed(0)
    layer = make(window=window, persistent=persistent, conv=conv)
    x = normal(2, 14, 16)
    resets = torch.zeros(2, 14, dtype=torch.bool)
    for row in range(2):
        for place in data.draw(st.lists(st.integers(0, 13), max_size=2)):
            resets[row, place] = True
    cuts = sorted(data.draw(st.sets(st.integers(1, 13), max_size=3)))
    whole, final = layer(x, span=Span.build(None, 2, 14, "cpu", resets=resets))
    state, parts = None, []
    for start, stop in zip([0, *cuts], [*cuts, 14], strict=True):
        clock = None if state is None else state["clock"]
        span = Span.build(clock, 2, stop - start, "cpu", resets=resets[:, start:stop])
        out, state = layer(x[:, start:stop], state, span)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, **EXACT)
    for name in final:
        torch.testing.assert_close(state[name], final[name], **EXACT)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("conv", [0, 3])
def test_padding_is_never_stored_and_gives_no_nan(window, conv):
    layer = make(window=window, conv=conv)
    x = normal(3, 8, 16)
    x[0, 5:] = 1e30
    lengths = torch.tensor([5, 8, 0])
    y, state = layer(x, span=Span.build(None, 3, 8, "cpu", lengths=lengths))
    assert y.isfinite().all()
    assert state["clock"].tolist() == [5, 8, 0]
    alone, own = layer(x[:1, :5])
    torch.testing.assert_close(y[:1, :5], alone, **EXACT)
    kept = own["cache.key"].shape[1]
    torch.testing.assert_close(state["cache.key"][:1, -kept:], own["cache.key"], **EXACT)
    assert not state["cache.key"][2].any()
    more, _ = layer(x[:, :1], state)
    alone, _ = layer(x[:1, :1], own)
    torch.testing.assert_close(more[:1], alone, **EXACT)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("conv", [0, 3])
def test_after_a_reset_the_row_goes_on_as_a_fresh_one(window, conv):
    layer = make(window=window, conv=conv)
    _, state = layer(normal(1, 7, 16))
    x = normal(1, 3, 16)
    resets = torch.tensor([[True, False, False]])
    y, after = layer(x, state, Span.build(state["clock"], 1, 3, "cpu", resets=resets))
    fresh, own = layer(x)
    torch.testing.assert_close(y, fresh, **EXACT)
    kept = own["cache.key"].shape[1]
    assert not after["cache.key"][:, :-kept].any()
    torch.testing.assert_close(layer(x, after)[0], layer(x, own)[0], **EXACT)


def test_the_state_given_is_left_as_it_was():
    layer = make(window=4)
    _, state = layer(normal(2, 5, 16))
    copy = {name: tensor.clone() for name, tensor in state.items()}
    layer(normal(2, 5, 16), state)
    assert all(torch.equal(state[name], copy[name]) for name in copy)


def test_a_windowed_cache_does_not_hold_on_to_the_whole_call():
    layer = make(window=3)
    _, state = layer(normal(1, 100, 16))
    assert state["cache.key"].untyped_storage().nbytes() == state["cache.key"].nbytes
    assert state["cache.key"].shape[1] == 2


@pytest.mark.parametrize("conv", [0, 3])
def test_gradients_reach_tokens_through_the_cache(conv):
    layer = make(conv=conv)
    x = normal(1, 6, 16).requires_grad_()
    y, _ = layer(x)
    (whole,) = torch.autograd.grad(y.square().sum(), x)
    first, state = layer(x[:, :4])
    second, _ = layer(x[:, 4:], state)
    (cut,) = torch.autograd.grad(first.square().sum() + second.square().sum(), x)
    torch.testing.assert_close(cut, whole, **EXACT)


def test_keep_recent_drops_what_no_row_can_reach():
    joined = torch.arange(1.0, 9.0).reshape(1, 8, 1).expand(2, 8, 1)
    resets = torch.zeros(2, 4, dtype=torch.bool)
    resets[0, 2], resets[1, 3] = True, True
    kept = keep_recent(joined, Span.build(torch.tensor([4, 4]), 2, 4, "cpu", resets=resets))
    assert kept[..., 0].tolist() == [[7.0, 8.0], [0.0, 8.0]]


def test_impossible_shapes_are_refused():
    with pytest.raises(ShapeError, match="at least as many keys"):
        attend(normal(1, 3, 4, 4), normal(1, 2, 4, 4), normal(1, 2, 4, 4))
    with pytest.raises(ConfigError, match="3 heads"):
        Attention(16, 3)
    with pytest.raises(ConfigError, match="'sdpa' or 'flex_attention'"):
        Attention(16, 4, implementation="eager")


def random_first(batch, length, stored):
    """A `first_visible` that lets every query see itself."""
    return torch.arange(length) - torch.randint(0, stored, (batch, length))


def seen_pairs(length, cached, window, prefix, sets, first=None):
    """Which of the columns `[prefix | keys ...]` each query sees, pair by pair: `[1 or B, T, columns]`."""
    row, index = torch.arange(length)[:, None], torch.arange(-cached, length)
    seen = (index <= row)[None]
    if window is not None:
        seen = seen & (index > row - window)
    if first is not None:
        seen = seen & (index >= first[..., None])
    return torch.cat((seen.new_ones(*seen.shape[:2], prefix), *[seen] * sets), dim=2)


def in_blocks(pairs):
    """`[B, T, columns]` as `[B, blocks of T, blocks of columns, 128 * 128]`, False where there is no pair."""
    pairs = F.pad(pairs, (0, -pairs.shape[2] % 128, 0, -pairs.shape[1] % 128))
    return pairs.unflatten(2, (-1, 128)).unflatten(1, (-1, 128)).transpose(2, 3).flatten(3)


def marked(number, order):
    """The blocks `[blocks of T, blocks of columns]` that a block mask lists."""
    listed = torch.arange(order.shape[-1]) < number[..., None]
    return torch.zeros_like(listed).scatter(-1, order.long(), listed)[0, 0]


# The last five put the edge of what a block sees on the edge of another block.
@pytest.mark.parametrize(
    "length, cached, window",
    [
        *product([128, 300, 1000], [0, 77], [None, 64, 200]),
        (300, 0, 129),
        (300, 0, 255),
        (300, 0, 256),
        (300, 1, None),
        (300, 127, None),
    ],
)
@pytest.mark.parametrize("prefix", [0, 16, 150])
@pytest.mark.parametrize("sets", [1, 2])
def test_flex_blocks_agree_with_the_rule_of_every_pair(length, cached, window, prefix, sets):
    torch.manual_seed(0)
    stored = length + cached
    total = prefix + sets * stored
    owner = torch.arange(sets + 1).repeat_interleave(torch.tensor([prefix, *[stored] * sets]))
    owner = F.pad(owner, (0, -total % 128), value=-1).unflatten(0, (-1, 128))
    undivided = owner.amin(1) == owner.amax(1)
    reached = in_blocks(seen_pairs(length, cached, window, prefix, sets)).any(-1)[0]
    for first in (None, random_first(2, length, stored)):
        mask = flex.block_mask(length, stored, sets, prefix, first, window, "cpu")
        partial = marked(mask.kv_num_blocks, mask.kv_indices)
        full = marked(mask.full_kv_num_blocks, mask.full_kv_indices)
        pairs = seen_pairs(length, cached, window, prefix, sets, first)
        batch = torch.arange(len(pairs))[:, None, None]
        asked = mask.mask_mod(batch, batch, torch.arange(length)[:, None], torch.arange(total))
        assert torch.equal(asked.expand_as(pairs), pairs)
        assert not (partial & full).any()
        assert torch.equal(partial | full, reached)
        may_be_full = undivided if first is None else undivided & (owner[:, 0] == 0)
        assert torch.equal(full, in_blocks(pairs).all(-1).all(0) & may_be_full)


def test_flex_blocks_of_a_long_stream_need_no_pairs_and_no_reading_back():
    mask = flex.block_mask(65_536, 65_536, 1, 0, None, 4096, "cpu")
    assert mask.shape == (1, 1, 65_536, 65_536)
    assert mask.full_kv_num_blocks[0, 0, [0, 31, 511]].tolist() == [0, 31, 31]
    assert mask.kv_num_blocks[0, 0, [0, 31, 511]].tolist() == [1, 1, 2]
    first = torch.zeros(2, 300, dtype=torch.int64, device="meta")
    flex.block_mask(300, 377, 2, 16, first, 64, "meta")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "cached, window, prefix, sets, first",
    [
        (0, None, 0, 2, False),
        (77, None, 16, 1, False),
        (77, 64, 16, 2, False),
        (77, 64, 0, 1, True),
        (0, None, 16, 2, True),
    ],
)
def test_flex_attention_equals_sdpa(monkeypatch, cached, window, prefix, sets, first):
    # Not compiled it asks the rule of every pair, and it has no gradient on a CPU.
    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention)
    torch.manual_seed(0)
    query = normal(2, 150, 4, 8)
    keys = [normal(2, cached + 150, 2, 8) for _ in range(sets)]
    values = [normal(2, cached + 150, 2, 8) for _ in range(sets)]
    pair = (normal(prefix, 2, 8), normal(prefix, 2, 8)) if prefix else None
    visible = random_first(2, 150, cached + 150) if first else None
    plain = attend(
        query,
        keys,
        values,
        first_visible=visible,
        window=window,
        prefix_key=pair and pair[0],
        prefix_value=pair and pair[1],
    )
    torch.testing.assert_close(flex.attend_flex(query, keys, values, visible, window, pair), plain, **EXACT)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
def test_flex_attention_equals_sdpa_on_a_gpu(window):
    torch.manual_seed(0)
    query = torch.randn(2, 512, 4, 64, device="cuda")
    keys = [torch.randn(2, 612, 2, 64, device="cuda") for _ in range(2)]
    values = [torch.randn(2, 612, 2, 64, device="cuda") for _ in range(2)]
    prefix = torch.randn(2, 3, 2, 64, device="cuda").unbind(0)
    first = torch.arange(512, device="cuda") - torch.randint(0, 400, (2, 512), device="cuda")
    rule = {"first_visible": first, "window": window, "prefix_key": prefix[0], "prefix_value": prefix[1]}
    plain = attend(query, keys, values, **rule)
    flex = attend(query, keys, values, **rule, implementation="flex_attention")
    torch.testing.assert_close(flex, plain, rtol=2e-3, atol=2e-3)
