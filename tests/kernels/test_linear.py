"""Quantised products: every path of the library against the twin, and the twin against fp32."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lfm2_mm.errors import InputError
from lfm2_mm.kernels import native
from lfm2_mm.kernels.linear import (
    SCHEMES,
    PackedWeight,
    Ready,
    Scheme,
    dequantize,
    matmul,
    matmul_twin,
    prepare,
    quantize,
    quantize_rows,
)
from lfm2_mm.kernels.packed import pack_codes, unpack_codes

PATHS = native.status().features or ("torch",)  # without a library the twin meets itself
FORMS: list[tuple[Scheme, bool]] = [
    ("int8", False),
    ("int8-g32", False),
    ("int4-g32", False),
    ("int4-g32", True),
    ("int4-g128", False),
    ("int4-g128", True),
]
forms = pytest.mark.parametrize(("scheme", "minimum"), FORMS)


@pytest.fixture(autouse=True)
def best_path() -> Iterator[None]:
    yield
    native.choose(None)


def weight(rows: int, cols: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=generator) * 0.1


def activations(n: int, cols: int, seed: int = 1) -> Tensor:
    x = torch.randn(n, cols, generator=torch.Generator().manual_seed(seed))
    x[:, ::17] *= 20  # as real ones have
    return x


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def on(path: str, x: Tensor, ready: Ready) -> Tensor:
    assert native.choose(path) == path  # type: ignore[arg-type]
    return matmul(x, ready)


# ---- products ----


@forms
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("rows", "cols"), [(48, 256), (37, 128), (1, 128), (16, 640)])
def test_few_rows_give_what_the_twin_gives(
    scheme: Scheme, minimum: bool, path: str, rows: int, cols: int
) -> None:
    packed = quantize(weight(rows, cols), scheme, minimum=minimum)
    ready = prepare(packed)
    for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 23):
        x = activations(n, cols, seed=n)
        assert distance(on(path, x, ready), matmul_twin(x, packed)) < 2e-6


@forms
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("n", [24, 31, 33, 70])
def test_many_rows_are_as_near_to_fp32_as_the_twin(
    scheme: Scheme, minimum: bool, path: str, n: int
) -> None:
    packed = quantize(weight(45, 256), scheme, minimum=minimum)
    x = activations(n, 256)
    exact = x @ dequantize(packed).T
    found = on(path, x, prepare(packed))
    assert distance(found, exact) < 1.2 * distance(matmul_twin(x, packed), exact)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("cols", [1, 3, 65, 70, 127])
def test_eight_bits_a_row_take_any_number_of_columns(path: str, cols: int) -> None:
    packed = quantize(weight(19, cols), "int8")
    ready = prepare(packed)
    for n in (1, 5):
        x = activations(n, cols)
        assert distance(on(path, x, ready), matmul_twin(x, packed)) < 2e-6
    x = activations(40, cols)
    assert distance(on(path, x, ready), x @ dequantize(packed).T) < 0.02


@forms
def test_the_integers_are_the_same_on_every_path(scheme: Scheme, minimum: bool) -> None:
    codes = torch.randint(0, 256, (32, 256 * SCHEMES[scheme].bits // 8), dtype=torch.uint8)
    if scheme.startswith("int8"):
        codes.clamp_(min=1)  # -127, the least that `quantize` writes
    scales = torch.ones(32, SCHEMES[scheme].groups(256), dtype=torch.half)
    more = {"minimums": torch.zeros_like(scales)} if minimum else {}
    ready = prepare(PackedWeight(scheme, 32, 256, {"codes": codes, "scales": scales, **more}))
    x = torch.randint(-127, 128, (5, 256)).float()
    x[:, :: SCHEMES[scheme].activation_group] = 127.0  # the scale of each group is then one
    found = [on(path, x, ready) for path in PATHS]
    wide = unpack_codes(codes) if scheme.startswith("int4") else codes
    wanted = x @ (wide.float() - (0 if minimum else SCHEMES[scheme].zero)).T
    assert all(torch.equal(one, wanted) for one in found)


@forms
def test_extreme_codes_do_not_overflow(scheme: Scheme, minimum: bool) -> None:
    for code in (0, 255):
        bits = SCHEMES[scheme].bits
        codes = torch.full((16, 128 * bits // 8), code, dtype=torch.uint8)
        scales = torch.ones(16, SCHEMES[scheme].groups(128), dtype=torch.half)
        more = {"minimums": torch.zeros_like(scales)} if minimum else {}
        packed = PackedWeight(scheme, 16, 128, {"codes": codes, "scales": scales, **more})
        ready, exact = prepare(packed), dequantize(packed)
        for x in (torch.full((2, 128), 127.0), torch.full((2, 128), -127.0)):
            for path in PATHS:
                assert torch.equal(on(path, x, ready), x @ exact.T)


@pytest.mark.parametrize("path", PATHS)
def test_a_product_of_one_row_does_not_depend_on_the_others(path: str) -> None:
    ready = prepare(quantize(weight(40, 256), "int4-g32"))
    x = activations(9, 256)
    together = on(path, x, ready)
    for i in range(9):
        assert torch.equal(matmul(x[i : i + 1], ready), together[i : i + 1])


@pytest.mark.parametrize("path", PATHS)
def test_threads_change_nothing(path: str) -> None:
    ready = prepare(quantize(weight(100, 256), "int8-g32"))
    for n in (1, 3, 40):
        x = activations(n, 256)
        alone = on(path, x, ready)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(matmul(x, ready), alone)
        torch.set_num_threads(1)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_results_have_the_dtype_of_the_activations(path: str, dtype: torch.dtype) -> None:
    packed = quantize(weight(40, 128), "int8-g32")
    for n in (2, 50):
        x = activations(n, 128).to(dtype)
        found = on(path, x, prepare(packed))
        assert found.dtype == dtype
        assert distance(found.float(), x.float() @ dequantize(packed).T) < 0.02


def test_leading_dimensions_stay() -> None:
    ready = prepare(quantize(weight(40, 128), "int4-g32"))
    x = activations(6, 128).view(2, 3, 128)
    assert matmul(x, ready).shape == (2, 3, 40)
    assert matmul(x[:, :0], ready).shape == (2, 0, 40)
    assert torch.equal(matmul(x, ready)[1, 2], matmul(x[1, 2], ready))


def test_no_rows_give_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for scheme in SCHEMES:
        packed = quantize(weight(40, 128), scheme)  # type: ignore[arg-type]
        assert matmul(torch.zeros(0, 128), prepare(packed)).shape == (0, 40)
        assert matmul_twin(torch.zeros(0, 128), packed).shape == (0, 40)
        with monkeypatch.context() as patch:
            patch.setenv("LFM2_MM_NATIVE", "0")
            assert matmul(torch.zeros(2, 0, 128), prepare(packed)).shape == (2, 0, 40)


def test_rows_that_do_not_lie_together_are_multiplied_too() -> None:
    ready = prepare(quantize(weight(40, 128), "int4-g32"))
    wide = activations(4, 256)
    assert torch.equal(matmul(wide[:, 64:192], ready), matmul(wide[:, 64:192].clone(), ready))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so_and_stays_in_its_row(path: str, bad: float) -> None:
    packed = quantize(weight(40, 128), "int8-g32")
    ready = prepare(packed)
    for n in (3, 50):
        x = activations(n, 128)
        x[1, 70] = bad
        found = on(path, x, ready)
        assert not found[1].isfinite().any()
        assert found[0].isfinite().all() and found[2:].isfinite().all()
    assert not matmul_twin(x, packed)[1].isfinite().any()


@pytest.mark.parametrize("path", PATHS)
def test_zeros_and_almost_zeros_give_zero(path: str) -> None:
    ready = prepare(quantize(weight(40, 128), "int4-g32"))
    for small in (0.0, 1e-38, 1e-42):
        assert torch.equal(on(path, torch.full((2, 128), small), ready), torch.zeros(2, 40))


# ---- activations ----


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_activations_are_rounded_alike_everywhere(path: str, group: int) -> None:
    call = native.function(
        "lfm2_linear_quantize",
        [ctypes.c_void_p, *[ctypes.c_int64] * 3, *[ctypes.c_void_p] * 3],
    )
    assert native.choose(path) == path  # type: ignore[arg-type]
    for given in (384, 1, 33, 130):
        x = activations(1, given)
        x[0, ::5] = (x[0, ::5] * 127).round() / 127  # ties
        wanted, scales = quantize_rows(x, group)
        cols = wanted.numel()
        codes = torch.zeros(cols, dtype=torch.int8)
        found, sums = torch.zeros(cols // group), torch.zeros(cols // group, dtype=torch.int32)
        if call is None:
            continue
        places = [tensor.data_ptr() for tensor in (codes, found, sums)]
        call(x.data_ptr(), given, cols, group, *places)
        assert torch.equal(codes.float(), wanted.flatten())
        assert torch.equal(found, scales.flatten())
        assert torch.equal(sums, wanted.sum(-1).flatten().int())


def test_rounded_activations_are_near() -> None:
    x = activations(3, 130)
    codes, scales = quantize_rows(x, 32)
    assert codes.abs().max() == 127
    assert ((codes * scales).flatten(1)[:, :130] - x).abs().max() <= scales.max() / 2 * 1.001


# ---- bad input ----


def test_activations_of_another_width_are_refused() -> None:
    ready = prepare(quantize(weight(40, 128), "int4-g32"))
    with pytest.raises(InputError, match=r"wants rows of 128 numbers on the cpu, not \[2, 64\]"):
        matmul(torch.zeros(2, 64), ready)


def test_columns_that_the_group_does_not_divide_are_refused() -> None:
    with pytest.raises(InputError, match="a weight of 8 x 96 cannot be int4-g128: .* of 128"):
        quantize(weight(8, 96), "int4-g128")
    with pytest.raises(InputError, match="multiple of 32; choose another scheme"):
        PackedWeight("int8-g32", 8, 40, {})


def test_unknown_schemes_are_refused() -> None:
    with pytest.raises(InputError, match="no quantisation scheme 'int3'; use one of int8, int8-g"):
        quantize(weight(8, 32), "int3")  # type: ignore[arg-type]


def test_buffers_that_do_not_fit_are_refused() -> None:
    packed = quantize(weight(8, 64), "int4-g32")
    buffers = dict(packed.buffers)
    with pytest.raises(InputError, match=r"codes of a packed int4-g32 weight of 8 x 64 is .*uint8"):
        PackedWeight("int4-g32", 8, 64, buffers | {"codes": buffers["codes"].int()})
    with pytest.raises(InputError, match=r"it must be torch.float16 \[8, 2\]"):
        PackedWeight("int4-g32", 8, 64, buffers | {"scales": buffers["scales"].float()})
    with pytest.raises(InputError, match="holds codes; int4-g32 needs codes, scales"):
        PackedWeight("int4-g32", 8, 64, {"codes": buffers["codes"]})
    eight = quantize(weight(8, 64), "int8-g32")
    with pytest.raises(InputError, match="minimums, which only schemes of 4 bits have"):
        PackedWeight("int8-g32", 8, 64, {**eight.buffers, "minimums": eight.buffers["scales"]})


def test_a_weight_made_ready_before_the_library_was_switched_off_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ready = prepare(quantize(weight(40, 128), "int4-g32"))
    monkeypatch.setenv("LFM2_MM_NATIVE", "0")
    if ready.native:
        with pytest.raises(InputError, match="which are switched off now; load the model again"):
            matmul(activations(1, 128), ready)
    assert not prepare(quantize(weight(40, 128), "int4-g32")).native


def test_torch_alone_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = quantize(weight(40, 128), "int4-g32")
    x = activations(3, 128)
    found = matmul(x, prepare(packed))
    monkeypatch.setenv("LFM2_MM_NATIVE", "0")
    assert distance(matmul(x, prepare(packed)), found) < 2e-6


# ---- storage ----


def test_codes_of_four_bits_come_back() -> None:
    codes = torch.randint(0, 16, (5, 64), dtype=torch.uint8)
    assert torch.equal(unpack_codes(pack_codes(codes)), codes)
    row = torch.arange(8, dtype=torch.uint8)[None]
    assert pack_codes(row).tolist() == [[0x40, 0x51, 0x62, 0x73]]


def test_the_bytes_of_a_product_are_known() -> None:
    ready = prepare(quantize(weight(64, 256), "int4-g32"))
    assert ready.nbytes == 64 * 256 // 2 + 64 * 8 * 2
