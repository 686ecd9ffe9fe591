"""Lanes made by several processes: the same batches, exact resume, errors and ends that come through."""

import os
import time
from functools import partial

import pytest
import torch

from nestor.data import ByteTokenizer, LaneStream, Prefetcher, WorkerStream
from nestor.errors import ConfigError, DataError
from nestor.training.config import DataConfig, SourceConfig
from nestor.training.inputs import train_stream


@pytest.fixture(scope="module")
def make():
    data = DataConfig(
        sequence_length=32,
        batch_size=5,
        sources=(SourceConfig(text=("classics",), weight=2.0), SourceConfig(task="mqar", weight=1.0)),
    )
    return partial(train_stream, data, ByteTokenizer(), 7)


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


class _Breaking(LaneStream):
    """Lanes that raise, or end their process, at the third batch."""

    def __init__(self, how, lanes):
        super().__init__(4, 8, lanes)
        self.how = how

    def identity(self):
        return {"kind": "breaking"}

    def _read(self, lane, start, length):
        from nestor.data.streams import empty_piece

        if start == 16:
            if self.how == "exit":
                os._exit(3)
            raise ConfigError("the third batch is missing")
        return empty_piece(length)


def test_processes_make_the_same_batches_and_go_on_from_any(make) -> None:
    expected = make(range(5))
    wanted = [next(expected) for _ in range(7)]
    inner = WorkerStream(make(range(5)), make, 3)
    stream = Prefetcher(inner, 2)
    try:
        for batch in wanted[:4]:
            assert equal(next(stream), batch)
        state = stream.state_dict()
        assert equal(next(stream), wanted[4])
        stream.load_state_dict(state)
        for batch in wanted[4:]:
            assert equal(next(stream), batch)
        processes = [process for process, _ in inner._running]
        assert len(processes) == 3
    finally:
        stream.close()
    for process in processes:
        assert not process.is_alive()


@pytest.mark.parametrize(("how", "error", "message"), [
    ("raise", ConfigError, "the third batch is missing"), ("exit", DataError, "exit code 3"),
])  # fmt: skip
def test_what_goes_wrong_in_a_process_is_raised(how, error, message) -> None:
    stream = WorkerStream(_Breaking(how, range(4)), partial(_Breaking, how), 2)
    try:
        begin = time.monotonic()
        # A process that ends may take batches with it that it has made.
        with pytest.raises(error, match=message):
            for _ in range(3):
                next(stream)
        assert time.monotonic() - begin < 30
    finally:
        stream.close()


@pytest.mark.slow
def test_a_run_with_processes_is_the_run_without(tmp_path) -> None:
    from nestor.training import train
    from nestor.training.config import ModelConfig, RunConfig, TrainConfig

    def run(workers):
        config = TrainConfig(
            model=ModelConfig(preset="transformer", size="quick"),
            data=DataConfig(sequence_length=32, batch_size=4, sources=(SourceConfig(text=("classics",)),)),
            run=RunConfig(
                out=str(tmp_path / str(workers)), steps=2, eval_every=0, tracker="none", data_workers=workers
            ),
        )
        return train(config, quiet=True)

    run(0), run(2)
    from safetensors.torch import load_file

    one, other = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("0", "2"))
    assert all(torch.equal(one[name], other[name]) for name in one)
