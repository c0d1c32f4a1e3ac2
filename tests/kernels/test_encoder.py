"""The layers of an encoder in one call: what the twin computes; NaN stays in its view."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lfm2_mm.kernels import native
from lfm2_mm.kernels.encoder import EncoderLayer, EncoderStack, encode_twin
from lfm2_mm.kernels.linear import PackedWeight, prepare, quantize

EPS = 1e-6


def drawn(width: int, ffn: int, count: int, scheme: str = "int8") -> list[EncoderLayer]:
    chance = torch.Generator().manual_seed(width + ffn)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=chance)

    def weight(rows: int, cols: int) -> PackedWeight:
        return quantize(numbers(rows, cols) * 1.5 * cols**-0.5, scheme)  # type: ignore[arg-type]

    def norm() -> tuple[Tensor, Tensor]:
        return 1 + 0.2 * numbers(width), 0.2 * numbers(width)

    d = width
    return [
        EncoderLayer(
            norm1=norm(),
            query=weight(d, d),
            key=weight(d, d),
            value=weight(d, d),
            out=weight(d, d),
            attention_biases=(numbers(d), numbers(d), numbers(d), numbers(d)),
            norm2=norm(),
            up=weight(ffn, d),
            down=weight(d, ffn),
            biases=(numbers(ffn), numbers(d)),
        )
        for _ in range(count)
    ]


def ready(layer: EncoderLayer) -> EncoderLayer:
    found = {field.name: getattr(layer, field.name) for field in fields(layer)}
    laid_out: Any = {k: prepare(v) for k, v in found.items() if isinstance(v, PackedWeight)}
    return replace(layer, **laid_out)


def has_amx() -> bool:
    return native.status().path == "amx"


@pytest.mark.parametrize(
    ("width", "ffn", "heads", "lengths"),
    [
        (64, 128, 2, [33]),
        (128, 200, 2, [1, 300, 17]),
        (144, 100, 2, [40, 600]),  # heads of 72, as in the tower of 400M
        (96, 64, 3, [0, 31, 32, 64]),
    ],
)
def test_the_call_computes_what_the_twin_computes(
    width: int, ffn: int, heads: int, lengths: list[int]
) -> None:
    layers = drawn(width, ffn, 2)
    native_layers = [ready(layer) for layer in layers]
    assert EncoderStack.can_run(native_layers, heads) is has_amx()
    x = torch.randn(sum(lengths), width, generator=torch.Generator().manual_seed(1))
    wanted = encode_twin(x, lengths, layers, heads, EPS)
    if not has_amx():
        assert wanted.isfinite().all()
        return
    stack = EncoderStack(native_layers, heads, EPS)
    found = stack(x, lengths)
    error = (found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
    assert error < 0.02  # what rounding numbers that differ a little to 8 bits makes of it
    two = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        torch.testing.assert_close(stack(x, lengths), found, atol=0, rtol=0)
    finally:
        torch.set_num_threads(two)
    half = stack(x.bfloat16(), lengths)
    assert half.dtype == torch.bfloat16
    assert torch.cosine_similarity(half.float(), found).min() > 0.99


def test_a_view_knows_nothing_of_the_others() -> None:
    layers = [ready(layer) for layer in drawn(64, 128, 2)]
    if not EncoderStack.can_run(layers, 2):
        assert not has_amx()
        return
    stack = EncoderStack(layers, 2, EPS)
    x = torch.randn(80, 64, generator=torch.Generator().manual_seed(2))
    alone = stack(x[:48].contiguous(), [48])
    x[60] = torch.nan
    both = stack(x, [48, 32])
    assert stack(x[:0], []).shape == stack(x[:0], [0]).shape == (0, 64)
    torch.testing.assert_close(both[:48], alone, atol=0, rtol=0)
    assert both[48:].isnan().all()


def test_other_schemes_and_shapes_are_refused() -> None:
    grouped = [ready(layer) for layer in drawn(64, 128, 1, "int8-g32")]
    assert not EncoderStack.can_run(grouped, 2)
    assert not EncoderStack.can_run([], 2)
    layers = [ready(layer) for layer in drawn(64, 128, 1)]
    assert not EncoderStack.can_run(layers, 3)
    if has_amx():
        stack = EncoderStack(layers, 2, EPS)
        with pytest.raises(ValueError, match=r"cannot take \[5, 64\] in views of \[4\]"):
            stack(torch.zeros(5, 64), [4])
        with pytest.raises(TypeError, match="cannot be pickled"):
            stack.__getstate__()
