"""Rotary embedding against its equation, and what makes it relative."""

import torch

from nestor.layers.rotary import rotary_table, rotate


def turned(x, position, theta=10_000.0):
    return rotate(x, rotary_table(position, x.shape[-1], theta, x.dtype))


def test_each_pair_turns_by_position_over_its_wavelength():
    x = torch.randn(1, 3, 1, 4, dtype=torch.float64)
    position = torch.tensor([[0, 5, 11]])
    y = turned(x, position, theta=100.0)
    for t, place in enumerate([0, 5, 11]):
        for pair, speed in enumerate([1.0, 0.1]):
            before = torch.complex(x[0, t, 0, pair], x[0, t, 0, pair + 2])
            after = torch.complex(y[0, t, 0, pair], y[0, t, 0, pair + 2])
            torch.testing.assert_close(
                after,
                before * torch.polar(*torch.tensor([[1.0], [place * speed]], dtype=torch.float64))[0],
                rtol=1e-12,
                atol=0,
            )


def test_scores_depend_on_the_distance_only_even_a_million_tokens_in():
    q, k = torch.randn(2, 1, 1, 1, 64).unbind(0)
    near = turned(q, torch.tensor([[7]])) * turned(k, torch.tensor([[2]]))
    far = turned(q, torch.tensor([[1_000_007]])) * turned(k, torch.tensor([[1_000_002]]))
    torch.testing.assert_close(near.sum(), far.sum(), rtol=0, atol=1e-4)


def test_a_shared_row_of_positions_gives_the_table_once():
    shared = torch.arange(5).expand(3, 5)
    cos, _ = rotary_table(shared, 8, 10_000.0, torch.float32)
    assert cos.shape == (1, 5, 1, 4)
    each, _ = rotary_table(shared.contiguous(), 8, 10_000.0, torch.float32)
    assert torch.equal(each, cos.expand(3, 5, 1, 4))


def test_what_torch_compile_takes_is_the_same_table():
    position = torch.arange(9).expand(2, 9)
    compiled = torch.compile(rotary_table, backend="aot_eager", fullgraph=True)
    for dtype in (torch.float32, torch.bfloat16):
        for one, other in zip(
            compiled(position, 6, 1e4, dtype), rotary_table(position, 6, 1e4, dtype), strict=True
        ):
            assert one.dtype == dtype and torch.equal(one, other)


def test_torch_compile_takes_the_table_as_an_operator_and_export_does_not():
    """Traced through, each element that is turned would form its angle anew, in float64."""
    position = torch.arange(9).expand(2, 9)
    compiled: list[str] = []

    def backend(graph, _):
        compiled.append(graph.code)
        return graph

    torch.compile(rotary_table, backend=backend, fullgraph=True)(position, 6, 1e4, torch.float32)
    assert len(compiled) == 1 and "nestor.rotary_table" in compiled[0]

    class Table(torch.nn.Module):
        def forward(self, position):
            return rotary_table(position, 6, 1e4, torch.float32)

    exported = torch.export.export(Table(), (position,))
    assert "nestor" not in exported.graph_module.code
