"""Memory branches of a trained decoder: the same to the bit at first, a file of their own, for one model."""

import json
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM, Qwen2Config, Qwen2ForCausalLM

from nestor.cli.loading import load_model
from nestor.errors import ConfigError, FileFormatError, StateMismatchError
from nestor.files import read_tensors, write_tensors
from nestor.learning import Branches, WindowedDecoder, load_branches

STORIES = str(Path(__file__).parents[2] / "checkpoints" / "stories260K")
SMALL = Branches(layers=(1, 3), memory={"chunk_size": 8})
SIZES = {
    "vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 64,
}  # fmt: skip


def stories(dtype="float32"):
    return load_model(STORIES, "cpu", dtype)[0].requires_grad_(False)


def tokens(length, rows=2, seed=0):
    return torch.randint(3, 500, (rows, length), generator=torch.Generator().manual_seed(seed))


def open_up(attached, std=0.3):
    """Last projections that are no longer zero."""
    for index, module in attached.modules.items():
        torch.manual_seed(index)
        torch.nn.init.normal_(module.memory.o_proj.weight, std=std)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_the_models_own_to_the_bit_until_branches_are_trained(dtype) -> None:
    model, ids = stories(dtype), tokens(90)
    own = model(ids).logits
    attached = SMALL.attach(model)
    assert torch.equal(model(ids).logits, own)
    assert torch.equal(WindowedDecoder(model)(ids).logits, own)
    open_up(attached)
    assert not torch.equal(model(ids).logits, own)


@pytest.mark.parametrize(
    "make",
    [
        lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
        lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=1)),
    ],
)
def test_other_decoders_take_branches_too(make) -> None:
    torch.manual_seed(0)
    model, ids = make().eval(), tokens(20) % 31
    own = model(ids).logits
    attached = Branches(count=1, memory={"chunk_size": 4}).attach(model)
    assert list(attached.modules) == [1] and torch.equal(model(ids).logits, own)
    open_up(attached, 1.0)
    decoder = WindowedDecoder(model, 16)
    state = decoder(ids[:, :16]).past_key_values
    # Keys are gone, and what is left of the first window are memories.
    other = decoder(ids[:, 16:], past_key_values=state).logits
    assert not torch.allclose(other, decoder(ids[:, 16:]).logits, atol=1e-4)


def test_what_a_branch_remembers_is_added_to_what_attention_gives() -> None:
    model = stories()
    attached = SMALL.attach(model)
    open_up(attached)
    beside, seen = model.model.layers[1].self_attn, {}
    for name in ("attention", "branch"):
        module = getattr(beside, name)
        module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out[0]}))
    beside.register_forward_hook(lambda _, __, out: seen.update(sum=out[0]))
    model(tokens(20))
    assert seen["branch"].norm() > 0.01 * seen["attention"].norm()
    assert torch.equal(seen["sum"], seen["attention"] + seen["branch"])


def test_gradients_reach_the_branches_and_nothing_else() -> None:
    model, ids = stories(), tokens(41)
    attached = SMALL.attach(model)
    open_up(attached)
    decoder = WindowedDecoder(model, 20)
    decoder(ids[:, :-1], shift_labels=ids[:, 1:]).loss.backward()
    own = {id(parameter) for parameter in attached.parameters().values()}
    assert all(p.grad is not None and p.grad.any() for p in attached.parameters().values())
    assert all(p.grad is None for p in model.parameters() if id(p) not in own)


def test_a_file_gives_the_same_branches_back_to_the_same_model_alone(tmp_path) -> None:
    model, ids = stories(), tokens(50)
    attached = SMALL.attach(model)
    open_up(attached)
    path = tmp_path / "branches.safetensors"
    attached.save(path)
    assert set(read_tensors(path)[0]) == set(attached.parameters())
    again = stories()
    assert load_branches(path, again).settings == SMALL
    assert torch.equal(again(ids).logits, model(ids).logits)

    other = stories()
    with torch.no_grad():
        other.model.norm.weight[0] += 1
    with pytest.raises(StateMismatchError, match="its weights, or their dtype, are others"):
        load_branches(path, other)
    with pytest.raises(StateMismatchError, match="its weights, or their dtype"):
        load_branches(path, stories("bfloat16"))
    torch.manual_seed(0)
    with pytest.raises(StateMismatchError, match="vocab_size is 512 in the file and 31 in the model"):
        load_branches(path, Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=1)))
    with pytest.raises(ConfigError, match="load it anew"):
        load_branches(path, model)


def test_files_that_are_none_are_refused(tmp_path) -> None:
    path = tmp_path / "other.safetensors"
    write_tensors(path, {"x": torch.zeros(1)})
    with pytest.raises(FileFormatError, match="no file of memory branches"):
        load_branches(path, stories())
    model = stories()
    SMALL.attach(model).save(path)
    tensors, metadata = read_tensors(path)
    for change, message in (
        ({"version": 9}, "has format 9"),
        ({"settings": {"layers": [1], "count": 4, "memory": {"chunk_size": 8}, "seed": 0}}, "other tensors"),
    ):
        header = json.loads(metadata["nestor-branches"]) | change
        write_tensors(path, tensors, {"nestor-branches": json.dumps(header)})
        with pytest.raises(FileFormatError, match=message):
            load_branches(path, stories())


def test_branches_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"beside layers \[1, 9\] of 5"):
        Branches(layers=(1, 9)).attach(stories())
    with pytest.raises(ConfigError, match="depht"):
        Branches(memory={"depht": 2}).attach(stories())
    with pytest.raises(ConfigError, match="no attention called"):
        Branches().attach(torch.nn.Linear(2, 2))


def test_another_cache_is_refused_where_the_memory_would_be_lost() -> None:
    model, ids = stories(), tokens(8)
    SMALL.attach(model)
    cache = DynamicCache()
    model(ids, past_key_values=cache)
    with pytest.raises(ConfigError, match="reads on through nestor.learning.WindowedDecoder"):
        model(ids, past_key_values=cache)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_and_packed_texts_are_refused_where_one_memory_would_read_them(attention) -> None:
    model, ids = stories(), tokens(12)
    model.set_attn_implementation(attention)
    SMALL.attach(model)
    for pad in (slice(0, 3), slice(9, 12)):
        mask = torch.ones_like(ids)
        mask[1, pad] = 0
        with pytest.raises(ConfigError, match="one text in each row, without padding"):
            model(ids, attention_mask=mask)
    restarts = torch.cat((torch.arange(5), torch.arange(7)))[None].expand(2, -1)
    with pytest.raises(ConfigError, match="packed ones row by row"):
        model(ids, position_ids=restarts, use_cache=False)
    same = torch.block_diag(torch.ones(5, 5), torch.ones(7, 7)).tril().bool()[None, None]
    with pytest.raises(ConfigError, match="packed ones row by row"):
        model(ids, attention_mask=same if attention == "sdpa" else torch.where(same, 0.0, -1e9))
    own = model(ids).logits
    assert torch.equal(model(ids, attention_mask=torch.ones_like(ids)).logits, own)
    assert torch.equal(model(ids, position_ids=torch.arange(12)[None], use_cache=False).logits, own)


def test_a_branch_is_where_the_attention_beside_it_is(monkeypatch) -> None:
    model = stories()
    model.model.layers[3].to("meta")
    # Weights of that device have no values to make a digest of.
    monkeypatch.setattr("nestor.learning.branches.fingerprint", lambda model: {})
    found = {
        index: {p.device.type for p in module.parameters()}
        for index, module in SMALL.attach(model).modules.items()
    }
    assert found == {1: {"cpu"}, 3: {"meta"}}
