"""Packed modules: same state before and after use, native equals twin, rows are rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lfm2_mm import fused
from lfm2_mm.kernels.linear import Scheme, dequantize, matmul_twin, prepare, quantize
from lfm2_mm.quantize.layers import Packed, PackedEmbedding, PackedLinear, restore

SCHEMES: tuple[Scheme, ...] = ("int8", "int8-g32", "int4-g32", "int4-g128")


def matrix(rows: int = 50, cols: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rows", [1, 16, 50])
def test_the_portable_layout_comes_back_bit_for_bit(scheme: Scheme, rows: int) -> None:
    packed = quantize(matrix(rows), scheme)
    ready = prepare(packed)
    for name, buffer in restore(ready).buffers.items():
        assert torch.equal(buffer, packed.buffers[name])
    ids = torch.tensor([rows - 1, 0, rows // 2])
    some = restore(ready, ids)
    assert torch.equal(dequantize(some), dequantize(packed)[ids])


def test_minimums_come_back_too() -> None:
    packed = quantize(matrix(), "int4-g32", minimum=True)
    found = restore(prepare(packed)).buffers
    assert set(found) == {"codes", "scales", "minimums"}
    assert all(torch.equal(found[name], packed.buffers[name]) for name in found)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_computes_what_its_twin_does(scheme: Scheme) -> None:
    weight, bias, x = matrix(), matrix(1, 50)[0], matrix(3, 256, seed=1)
    packed = quantize(weight, scheme)
    layer = PackedLinear(Packed(packed), bias)
    wanted = matmul_twin(x, packed) + bias
    assert torch.allclose(layer(x), wanted, atol=1e-3, rtol=1e-3)
    assert torch.equal(fused.linear(x, layer), layer(x))
    assert torch.allclose(layer(x[None]), layer(x)[None])
    half = layer(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_state_is_the_same_before_and_after_use() -> None:
    layer = PackedLinear(Packed(quantize(matrix(), "int4-g32")), torch.ones(50))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    assert set(before) == {"weight.codes", "weight.scales", "bias"}
    layer(matrix(2))
    after = layer.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_embedding_gives_rows_of_the_dense_table() -> None:
    packed = quantize(matrix(), "int8-g32")
    table = PackedEmbedding(Packed(packed))
    dense, ids = dequantize(packed), torch.tensor([[3, 49], [0, 3]])
    for _ in range(2):  # before and behind the layout for this processor
        assert torch.equal(table(ids), dense[ids])
        assert torch.equal(table.weight[7], dense[7])
        table.weight(matrix(1))
    assert (table.num_embeddings, table.embedding_dim, table.weight.shape) == (50, 256, (50, 256))
    assert torch.equal(table.weight.dense(), dense)


def test_no_ids_are_no_rows_and_rows_that_do_not_exist_are_refused() -> None:
    table = PackedEmbedding(Packed(quantize(matrix(), "int8-g32"), None, torch.bfloat16))
    for _ in range(2):  # before and behind the layout, which is filled up to 64 rows
        none = table(torch.zeros(2, 0, dtype=torch.long))
        assert none.shape == (2, 0, 256) and none.dtype == torch.bfloat16
        for beyond in (50, 55, 64, -1):
            says = f"a table of 50 rows was asked for row {beyond}; use ids that belong to the mod"
            with pytest.raises(IndexError, match=says):
                table(torch.tensor([3, beyond]))
        table.weight(matrix(1))


def test_rows_come_in_the_number_format_of_the_model() -> None:
    table = PackedEmbedding(Packed(quantize(matrix(), "int8-g32"), None, torch.bfloat16))
    assert table(torch.tensor([1])).dtype == torch.bfloat16 == table.weight.dtype


def test_swiglu_and_gelu_take_packed_layers() -> None:
    gate, up = (PackedLinear(Packed(quantize(matrix(seed=i), "int8"))) for i in (1, 2))
    x = matrix(4, 256, seed=3)
    assert torch.allclose(fused.swiglu(x, gate, up), nn.functional.silu(gate(x)) * up(x))
    wanted = nn.functional.gelu(gate(x), approximate="tanh")
    assert torch.allclose(fused.gelu_linear(x, gate), wanted)
    assert fused.pack([gate, up]) == 0
