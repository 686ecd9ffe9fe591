"""State as a value: rows, copies, and files that only the right model reads."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from nestor import NestorForCausalLM, State
from nestor.errors import DataError, FileFormatError, ShapeError, StateMismatchError
from nestor.files import read_tensors, write_tensors
from nestor.models import state as module


def equal(left, right):
    return torch.equal(left.clock, right.clock) and all(
        torch.equal(left.layers[i][name], tensor)
        for i, layer in right.layers.items()
        for name, tensor in layer.items()
    )


def test_select_orders_and_repeats_rows(model, tokens):
    ids = tokens(3, 7)
    state = model(ids).past_key_values
    new = tokens(3, 2)
    out = model(new[[2, 0, 2]], past_key_values=state.select([2, 0, -1])).logits
    expected = model(new, past_key_values=state).logits[[2, 0, 2]]
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    with pytest.raises(ShapeError, match="row 3 of a State with 3 rows"):
        state.select([3])
    with pytest.raises(ShapeError, match="not a mask"):
        state.select(torch.tensor([True, False, True]))


def test_stack_undoes_select(model, tokens):
    state = model(tokens(3, 9)).past_key_values
    assert equal(State.stack([state.select([row]) for row in range(3)]), state)


def test_stack_refuses_states_that_do_not_belong_together(tiny, tokens):
    small = tiny("transformer")(tokens(1, 3)).past_key_values
    deep = tiny("transformer", num_hidden_layers=3)(tokens(1, 3)).past_key_values
    wide = tiny("transformer", hidden_size=32)(tokens(1, 3)).past_key_values
    with pytest.raises(StateMismatchError, match="different layers"):
        State.stack([small, deep])
    with pytest.raises(StateMismatchError, match=r"differ in cache\.key"):
        State.stack([small, wide])
    with pytest.raises(StateMismatchError, match="initial_state"):
        State.stack([small, State.empty(1)])
    with pytest.raises(ShapeError):
        State.stack([])


def test_an_initial_state_reads_like_none(model, tokens):
    ids = tokens(2, 9)
    expected = model(ids).logits
    for state in (State.empty(2), model.initial_state(2)):
        assert state.batch_size == 2
        torch.testing.assert_close(model(ids, past_key_values=state).logits, expected, rtol=1e-10, atol=1e-10)


def test_copies_share_nothing_and_bytes_are_counted(model, tokens):
    state = model(tokens(1, 6)).past_key_values
    copy = state.clone()
    for layer in copy.layers.values():
        for tensor in layer.values():
            tensor.data.zero_()
    copy.clock.zero_()
    assert state.clock.tolist() == [6]
    assert not equal(copy, state)
    tensors = [tensor for layer in state.layers.values() for tensor in layer.values()]
    assert state.nbytes == 8 + sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_detach_stops_gradients_at_the_state(model, tokens):
    ids = tokens(1, 6)
    state = model(ids).past_key_values
    tensors = [t for layer in state.layers.values() for t in layer.values() if t.is_floating_point()]
    assert any(tensor.requires_grad for tensor in tensors)
    detached = state.detach()
    assert not any(t.requires_grad for layer in detached.layers.values() for t in layer.values())
    assert equal(detached, state)


def test_saved_states_go_on_in_a_new_process(variants, tiny, tokens, tmp_path):
    new = tokens(2, 7)
    expected = {}
    for variant in variants:
        folder = tmp_path / variant
        tiny(variant).save_pretrained(folder)
        # Another process reads the weights from the file, so this one does as well.
        model = NestorForCausalLM.from_pretrained(folder, dtype=torch.float64)
        with torch.no_grad():
            # 10 is inside a chunk of memory and inside a segment.
            state = model(tokens(2, 10)).past_key_values
            state.save(folder / "user.state", model)
            expected[variant] = model(new, past_key_values=state).logits
    write_tensors(tmp_path / "new.safetensors", {"new": new})
    program = """
import sys, torch, nestor
from transformers import AutoModelForCausalLM
from nestor.files import read_tensors, write_tensors
folder, threads, *variants = sys.argv[1:]
torch.set_num_threads(int(threads))  # on which the order of sums depends
new = read_tensors(folder + "/new.safetensors")[0]["new"]
logits = {}
for variant in variants:
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/{variant}", dtype=torch.float64)
    state = nestor.State.load(f"{folder}/{variant}/user.state", model)
    with torch.no_grad():
        logits[variant] = model(new, past_key_values=state).logits
write_tensors(folder + "/out.safetensors", logits)
"""
    command = [sys.executable, "-c", program, str(tmp_path), str(torch.get_num_threads()), *variants]
    subprocess.run(command, check=True, capture_output=True)
    logits, _ = read_tensors(tmp_path / "out.safetensors")
    for variant in variants:
        assert torch.equal(logits[variant], expected[variant]), variant


def test_the_header_says_what_was_read_and_by_what(tiny, tokens, tmp_path):
    model = tiny("transformer")
    model(tokens(2, 10)).past_key_values.save(tmp_path / "s", model)
    header = json.loads(read_tensors(tmp_path / "s")[1]["nestor-state"])
    assert header["format_version"] == 1
    assert header["tokens_read"] == [10, 10]
    assert header["fingerprint"]["architecture"]["hidden_size"] == 16
    assert len(header["fingerprint"]["weights"]) == 32


def test_another_model_is_refused_with_what_differs(tiny, tokens, tmp_path):
    model = tiny("transformer")
    model(tokens(1, 5)).past_key_values.save(tmp_path / "s", model)
    with pytest.raises(
        StateMismatchError, match="num_hidden_layers is 2 in the file and 3 in the model"
    ) as caught:
        State.load(tmp_path / "s", tiny("transformer", num_hidden_layers=3))
    assert "hidden_size is" not in str(caught.value)
    other = tiny("transformer")
    with torch.no_grad():
        other.layers[1].mixer.k_proj.weight[0, 0] += 1e-9
    with pytest.raises(StateMismatchError, match="same architecture with other weights"):
        State.load(tmp_path / "s", other)
    with pytest.raises(StateMismatchError, match="dtype"):
        State.load(tmp_path / "s", tiny("transformer").float())


def test_a_setting_that_is_off_is_not_named(tiny, tokens, tmp_path):
    """So that files of versions without it are those of the same model."""
    model = tiny("transformer")
    model(tokens(1, 5)).past_key_values.save(tmp_path / "s", model)
    assert "attention_conv_kernel" not in module.fingerprint(model)["architecture"]
    other = tiny("transformer", attention_conv_kernel=4)
    with pytest.raises(
        StateMismatchError, match="attention_conv_kernel is None in the file and 4 in the model"
    ):
        State.load(tmp_path / "s", other)
    other(tokens(1, 5)).past_key_values.save(tmp_path / "s", other)
    assert State.load(tmp_path / "s", other).clock.tolist() == [5]


def test_damaged_and_foreign_files_are_refused(tiny, tokens, tmp_path, monkeypatch):
    model = tiny("transformer")
    path = tmp_path / "s"
    state = model(tokens(1, 5)).past_key_values
    state.save(path, model)
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:size])
        with pytest.raises(FileFormatError, match="truncated"):
            State.load(tmp_path / "cut", model)
    save_file({"x": torch.zeros(2)}, tmp_path / "foreign")
    with pytest.raises(FileFormatError, match="not a State"):
        State.load(tmp_path / "foreign", model)
    with pytest.raises(DataError, match="missing"):
        State.load(tmp_path / "absent", model)
    monkeypatch.setattr(module, "FORMAT_VERSION", 2)
    with pytest.raises(FileFormatError, match="format 1; this version of Nestor reads 2"):
        State.load(path, model)


def test_a_crash_while_saving_leaves_the_previous_file(tiny, tokens, tmp_path, monkeypatch):
    model = tiny("transformer")
    path = tmp_path / "s"
    model(tokens(1, 5)).past_key_values.save(path, model)
    before = path.read_bytes()

    def crash(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("nestor.files.os.replace", crash)
    with pytest.raises(OSError, match="no space"):
        model(tokens(1, 6)).past_key_values.save(path, model)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]
