"""Codes and scales: how much is lost, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lfm2_mm.errors import InputError
from lfm2_mm.kernels.packed import SCHEMES, Scheme, dequantize
from lfm2_mm.kernels.rounding import quantize

FORMS: list[tuple[Scheme, bool, float]] = [
    ("int8", False, 0.009),
    ("int8-g32", False, 0.007),
    ("int4-g32", False, 0.085),
    ("int4-g32", True, 0.080),
    ("int4-g128", False, 0.105),
    ("int4-g128", True, 0.100),
]


def weight(rows: int = 64, cols: int = 256) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)) * 0.02


def lost(w: Tensor, scheme: Scheme, minimum: bool = False, **more: Tensor) -> float:
    rounded = dequantize(quantize(w, scheme, minimum=minimum, **more))
    return float((rounded - w).norm() / w.norm())


@pytest.mark.parametrize(("scheme", "minimum", "most"), FORMS)
def test_little_is_lost(scheme: Scheme, minimum: bool, most: float) -> None:
    assert lost(weight(), scheme, minimum) < most


def test_four_bits_lose_less_than_scales_from_the_extremes() -> None:
    w = weight()
    groups = w.view(64, -1, 32)
    scale = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8
    plain = ((groups / scale).round().clamp(-8, 7) * scale).view_as(w)
    extremes = float((plain - w).norm() / w.norm())
    assert lost(w, "int4-g32", importance=torch.ones(256)) < 0.95 * extremes
    assert lost(w, "int4-g32") < 0.98 * extremes  # the error of large weights counts more


def test_large_weights_lose_less_where_no_inputs_are_known() -> None:
    w = weight()
    large = w.abs() > 0.03
    errors = [
        float((dequantize(quantize(w, "int4-g32", given)) - w)[large].norm())
        for given in (None, torch.ones(256))
    ]
    assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize("scheme", ["int4-g32", "int4-g128"])
def test_four_bits_are_no_shorter_than_the_weight_along_it(scheme: Scheme) -> None:
    w = weight()
    groups = w.view(64, -1, SCHEMES[scheme].group or 256)

    def lengths(importance: Tensor | None) -> Tensor:
        rounded = dequantize(quantize(w, scheme, importance)).view_as(groups)
        return (rounded * groups).sum(-1) / groups.square().sum(-1)

    torch.testing.assert_close(lengths(None), torch.ones(groups.shape[:2]), atol=1e-3, rtol=0)
    assert 0.98 < lengths(torch.ones(256)).mean() < 0.997  # least squares, for error feedback


@pytest.mark.parametrize("minimum", [False, True])
def test_important_columns_lose_less(minimum: bool) -> None:
    w, importance = weight(), torch.ones(256)
    importance[::8] = 100.0
    chosen = slice(None, None, 8)
    errors = [
        float((dequantize(quantize(w, "int4-g32", given, minimum=minimum)) - w)[:, chosen].norm())
        for given in (None, importance)
    ]
    assert errors[1] < 0.85 * errors[0]


def test_a_minimum_pays_where_weights_lie_to_one_side() -> None:
    w = weight().abs() + 0.05
    assert lost(w, "int4-g32", True) < 0.5 * lost(w, "int4-g32")


@pytest.mark.parametrize(("scheme", "minimum", "_"), FORMS)
def test_constants_and_zeros_are_kept(scheme: Scheme, minimum: bool, _: float) -> None:
    for value in (0.0, 0.25, -0.25):
        w = torch.full((4, 128), value)
        assert torch.allclose(dequantize(quantize(w, scheme, minimum=minimum)), w, rtol=1e-3)


@pytest.mark.parametrize(("scheme", "minimum", "_"), FORMS)
def test_numbers_too_small_for_the_scales_become_almost_zero(
    scheme: Scheme, minimum: bool, _: float
) -> None:
    w = weight() * 1e-12
    assert dequantize(quantize(w, scheme, minimum=minimum)).abs().max() < 1e-6


def test_half_precision_weights_are_taken() -> None:
    w = weight().bfloat16()
    assert lost(w.float(), "int8-g32") == pytest.approx(
        float((dequantize(quantize(w, "int8-g32")) - w.float()).norm() / w.float().norm())
    )


def test_rounding_what_is_rounded_changes_little() -> None:
    once = dequantize(quantize(weight(), "int8-g32"))
    assert (dequantize(quantize(once, "int8-g32")) - once).abs().max() < 1e-4


def test_many_chunks_give_what_one_gives() -> None:
    w = weight(2100, 256)  # more numbers than are looked at together
    whole = quantize(w, "int4-g32").buffers["codes"]
    assert torch.equal(whole[-3:], quantize(w[-3:], "int4-g32").buffers["codes"])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize(("scheme", "minimum", "_"), FORMS)
def test_weights_that_no_scale_fits_are_refused(
    scheme: Scheme, minimum: bool, _: float, bad: float
) -> None:
    w = weight()
    w[3, 5] = bad
    with pytest.raises(InputError, match=f"the weight cannot be {scheme}: it holds numbers"):
        quantize(w, scheme, minimum=minimum)


@pytest.mark.parametrize("bad", [-1.0, torch.nan])
def test_senseless_importance_is_refused(bad: float) -> None:
    with pytest.raises(InputError, match="hand in mean squares of the inputs"):
        quantize(weight(), "int4-g32", torch.full((256,), bad))


def test_minimums_of_eight_bits_are_refused() -> None:
    with pytest.raises(InputError, match="int8 has no minimums"):
        quantize(weight(), "int8", minimum=True)


def test_schemes_are_what_their_names_say() -> None:
    sizes = {name: quantize(weight(), name).nbytes for name in ("int8", "int8-g32", "int4-g32")}
    assert sizes == {"int8": 64 * 258, "int8-g32": 64 * 272, "int4-g32": 64 * 144}
    assert SCHEMES["int4-g128"].groups(256) == 2
