"""The native decode step against the same backbone computed layer by layer."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lfm2_mm.backbone import Backbone
from lfm2_mm.cache import KVCacheDtype, SequenceCache
from lfm2_mm.config import BackboneConfig
from lfm2_mm.kernels import native
from lfm2_mm.kernels.linear import Ready, Scheme, matmul, prepare, quantize
from lfm2_mm.kernels.stepping import decode_step
from lfm2_mm.mixing import Ragged

PATHS = native.status().features or ("torch",)  # without a library the layers meet themselves
CONFIG = BackboneConfig(
    vocab_size=64,
    hidden_size=128,
    ffn_size=320,
    layer_types=("conv", "full_attention", "conv", "full_attention", "conv"),
    n_heads=6,
    n_kv_heads=2,
    head_dim=32,
)


@pytest.fixture(autouse=True)
def best_path() -> Iterator[None]:
    yield
    native.choose(None)


def take(path: str) -> None:
    assert native.choose(path) == path  # type: ignore[arg-type]


class Weight(nn.Module):
    """A quantised weight as a layer holds it."""

    def __init__(self, weight: Tensor, scheme: Scheme) -> None:
        super().__init__()
        self.ready: Ready = prepare(quantize(weight.detach(), scheme))


class Layer(nn.Module):
    """A linear layer with a quantised weight."""

    def __init__(self, layer: nn.Linear, scheme: Scheme) -> None:
        super().__init__()
        self.weight, self.bias = Weight(layer.weight, scheme), layer.bias

    def forward(self, x: Tensor) -> Tensor:
        out = matmul(x, self.weight.ready)
        return out if self.bias is None else out + self.bias


def quantised(config: BackboneConfig, *schemes: Scheme) -> Backbone:
    """A random backbone whose layers have the schemes in turn, those that fit."""
    torch.manual_seed(0)
    backbone = Backbone(config).eval().requires_grad_(False)
    count = 0
    for parameter in backbone.parameters():
        if parameter.dim() == 1:
            parameter.data = 1 + 0.1 * torch.randn_like(parameter)
    for module in list(backbone.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                scheme = schemes[count % len(schemes)]
                wide = child.in_features % 128 and scheme == "int4-g128"
                setattr(module, name, Layer(child, "int4-g32" if wide else scheme))
                count += 1
    return backbone


def started(
    backbone: Backbone,
    lengths: list[int],
    dtype: torch.dtype = torch.float32,
    kv: KVCacheDtype = "auto",
) -> list[SequenceCache]:
    caches = [SequenceCache(backbone.config, dtype=dtype, kv_cache_dtype=kv) for _ in lengths]
    for seed, (cache, n) in enumerate(zip(caches, lengths, strict=True)):
        if n:
            x = torch.randn(n, 128, generator=torch.Generator().manual_seed(seed))
            mixing = Ragged([(cache, n)])
            with torch.inference_mode():
                backbone(x, mixing)
            mixing.commit()
    return caches


def by_layers(backbone: Backbone, x: Tensor, caches: list[SequenceCache]) -> Tensor:
    mixing = Ragged([(cache, 1) for cache in caches])
    found: Tensor = backbone(x, mixing)  # with gradients there is no native step
    mixing.commit()
    return found.detach()


def natively(backbone: Backbone, x: Tensor, caches: list[SequenceCache]) -> Tensor:
    step = decode_step(backbone)
    if step is None:
        assert native.library() is None
        return by_layers(backbone, x, caches)
    for cache in caches:
        cache.reserve(1)
    found = step(x, caches)
    for cache in caches:
        cache.advance(1)
    return found


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def compare(
    backbone: Backbone,
    lengths: list[int],
    steps: int = 3,
    dtype: torch.dtype = torch.float32,
    kv: KVCacheDtype = "auto",
) -> float:
    """The largest distance of any step and of the caches afterwards."""
    first = started(backbone, lengths, dtype, kv)
    second = [cache.fork() for cache in first]
    most = 0.0
    for seed in range(steps):
        x = torch.randn(len(lengths), 128, generator=torch.Generator().manual_seed(seed))
        most = max(most, distance(natively(backbone, x, second), by_layers(backbone, x, first)))
    for one, other in zip(first, second, strict=True):
        assert one.length == other.length
        for a, b in zip(one.buffers, other.buffers, strict=True):
            rows = slice(0, one.length)
            most = max(most, distance(b[:, :, rows], a[:, :, rows]))
        for layer in backbone.config.conv_layers:
            most = max(most, distance(other.conv_state(layer), one.conv_state(layer)))
    return most


# a number that falls between two codes may be rounded either way: far apart by that, near otherwise
NEAR = 8e-3


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "schemes",
    [("int8",), ("int8-g32",), ("int4-g32",), ("int4-g128",), ("int4-g32", "int8", "int4-g128")],
)
def test_a_step_is_what_the_layers_give(path: str, schemes: tuple[Scheme, ...]) -> None:
    take(path)
    assert compare(quantised(CONFIG, *schemes), [3, 0, 20]) < NEAR


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"head_dim": 48}, {"head_dim": 64}, {"head_dim": 128, "n_kv_heads": 6}, {"n_heads": 18}],
)
def test_keys_and_values_in_bytes(path: str, changes: dict[str, Any]) -> None:
    take(path)
    backbone = quantised(replace(CONFIG, **changes), "int8-g32")
    assert compare(backbone, [0, 3, 15, 16, 62, 130, 255], steps=2, kv="int8") < NEAR


@pytest.mark.parametrize("path", PATHS)
def test_bytes_are_what_torch_keeps(path: str) -> None:
    take(path)
    backbone = quantised(replace(CONFIG, layer_types=("full_attention",)), "int8-g32")
    first = started(backbone, [5], kv="int8")
    second, x = [first[0].fork()], torch.randn(1, 128)
    x[0, :64] *= 1e-3
    natively(backbone, x, second)
    by_layers(backbone, x, first)
    for kind, (a, b) in enumerate(zip(first[0].buffers, second[0].buffers, strict=True)):
        one, other = a[:, :, :6].float(), b[:, :, :6].float()
        assert torch.equal(one[:, :, :5], other[:, :, :5])
        if kind < 2:  # a number between two codes may fall to either
            assert (one - other).abs().max() <= 1 and (one != other).float().mean() < 0.02
        else:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_change_nothing(path: str, threads: int) -> None:
    take(path)
    backbone = quantised(CONFIG, "int4-g32")
    caches = started(backbone, [5, 1])
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(9))
    alone = natively(backbone, x, [cache.fork() for cache in caches])
    torch.set_num_threads(threads)
    for _ in range(5):
        again = natively(backbone, x, [cache.fork() for cache in caches])
        assert torch.equal(again, alone)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kv", ["auto", "int8", None])
def test_together_is_what_each_gives_alone(path: str, kv: KVCacheDtype | None) -> None:
    take(path)
    backbone = quantised(CONFIG, "int4-g32")
    lengths = [1, 9, 2, 30, 4, 7, 8, 3, 5]
    if kv is None:  # sequences of both kinds share a call
        caches = started(backbone, lengths[:4], kv="int8") + started(backbone, lengths[4:])
    else:
        caches = started(backbone, lengths, kv=kv)
    x = torch.randn(9, 128, generator=torch.Generator().manual_seed(9))
    together = natively(backbone, x, [cache.fork() for cache in caches])
    for i, cache in enumerate(caches):
        assert torch.equal(natively(backbone, x[i : i + 1], [cache])[0], together[i])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "changes",
    [
        {"conv_bias": True},
        {"conv_taps": 1},
        {"conv_taps": 2},
        {"conv_taps": 5},
        {"n_kv_heads": 6},
        {"n_kv_heads": 1},
        {"head_dim": 48},
        {"ffn_size": 352},
        {"layer_types": ("conv", "conv")},
        {"layer_types": ("full_attention",)},
    ],
)
def test_other_shapes(path: str, changes: dict[str, object]) -> None:
    take(path)
    config = replace(CONFIG, **changes)  # type: ignore[arg-type]
    assert compare(quantised(config, "int8-g32"), [3, 6], steps=2) < NEAR


@pytest.mark.parametrize("path", PATHS)
def test_long_sequences_attend_to_all_that_is_behind_them(path: str) -> None:
    take(path)
    backbone = quantised(CONFIG, "int8-g32")
    for length in (62, 63, 64, 65, 255, 256, 300):  # at borders of blocks and of buffers
        assert compare(backbone, [length], steps=2) < NEAR


@pytest.mark.parametrize("path", PATHS)
def test_caches_in_half_precision(path: str) -> None:
    take(path)
    backbone = quantised(CONFIG, "int8-g32")
    kinds = (torch.float32, torch.bfloat16)
    whole, half = (SequenceCache(CONFIG, dtype=dtype) for dtype in kinds)
    for seed in range(9):
        x = torch.randn(1, 128, generator=torch.Generator().manual_seed(seed))
        backbone.float()
        wanted = natively(backbone, x, [whole])
        backbone.bfloat16()
        found = natively(backbone, x.bfloat16(), [half])
        assert found.dtype == torch.bfloat16
        assert 0 < distance(found, wanted) < 0.04
    assert distance(half.buffers[0][:, :, :9], whole.buffers[0][:, :, :9]) < 0.04


@pytest.mark.parametrize("path", PATHS)
def test_a_step_that_is_not_accepted_leaves_the_sequence(path: str) -> None:
    take(path)
    backbone = quantised(CONFIG, "int4-g32")
    cache = started(backbone, [6])[0]
    before, x = cache.snapshot(), torch.randn(1, 128)
    step = decode_step(backbone)
    wanted = natively(backbone, x, [cache.fork()])
    if step is not None:
        cache.reserve(1)
        assert torch.equal(step(x, [cache]), wanted)
        assert cache.length == 6
        cache.restore(before)
    assert torch.equal(natively(backbone, x, [cache]), wanted)


def test_the_backbone_takes_the_step_when_it_generates() -> None:
    backbone = quantised(CONFIG, "int4-g32")
    caches = started(backbone, [3, 4])
    forks = [cache.fork() for cache in caches]
    x = torch.randn(2, 128)
    wanted = natively(backbone, x, forks)
    mixing = Ragged([(cache, 1) for cache in caches])
    with torch.inference_mode():
        found = backbone(x, mixing)
    mixing.commit()
    assert torch.equal(found, wanted)
    assert caches[0].length == 4


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_what_is_not_finite_comes_out_as_such(path: str, kv: KVCacheDtype) -> None:
    take(path)
    backbone = quantised(CONFIG, "int4-g32")
    caches = started(backbone, [3, 4], kv=kv)
    x = torch.randn(2, 128)
    x[0, 3] = torch.nan
    found = natively(backbone, x, caches)
    assert not found[0].isfinite().any() and found[1].isfinite().all()


def test_backbones_that_are_not_quantised_have_no_step() -> None:
    assert decode_step(Backbone(CONFIG)) is None
    half = quantised(CONFIG, "int8")
    half.layers[3].feed_forward.w2 = nn.Linear(320, 128, bias=False)  # type: ignore[union-attr]
    assert decode_step(half) is None
    bidirectional = quantised(replace(CONFIG, causal=False), "int8")
    assert decode_step(bidirectional) is None


def test_without_the_library_there_is_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LFM2_MM_NATIVE", "0")
    backbone = quantised(CONFIG, "int8")
    assert decode_step(backbone) is None
    x = torch.randn(1, 128)
    assert by_layers(backbone, x, started(backbone, [3])).isfinite().all()


def test_caches_that_do_not_fit_are_refused() -> None:
    step = decode_step(quantised(CONFIG, "int8"))
    if step is None:
        return
    cache = SequenceCache(CONFIG, dtype=torch.float16)
    with pytest.raises(ValueError, match="1 rows over 1 caches in torch.float16 is not possible"):
        step(torch.randn(1, 128), [cache])
    with pytest.raises(ValueError, match="2 rows over 1 caches"):
        step(torch.randn(2, 128), [SequenceCache(CONFIG)])
    mixed = [SequenceCache(CONFIG), SequenceCache(CONFIG, dtype=torch.bfloat16)]
    with pytest.raises(ValueError, match="all in one number format and with places reserved"):
        step(torch.randn(2, 128), mixed)
    full = SequenceCache(CONFIG)
    full.length = full.capacity  # no place is left, and none was reserved
    with pytest.raises(ValueError, match="1 rows over 1 caches .* with places reserved"):
        step(torch.randn(1, 128), [full])
    with pytest.raises(ValueError, match="1 rows over 1 caches"):
        step(torch.randn(1, 64), [SequenceCache(CONFIG)])
    assert step(torch.randn(0, 128), []).shape == (0, 128)


def test_copies_share_what_pointers_show_to() -> None:
    step = decode_step(quantised(CONFIG, "int8"))
    if step is None:
        return
    assert copy.deepcopy(step) is step
    with pytest.raises(TypeError, match="cannot be pickled; save the packed weights"):
        pickle.dumps(step)
    ready = prepare(quantize(torch.randn(16, 64), "int8"))
    assert copy.deepcopy(ready) is ready
    with pytest.raises(TypeError, match="cannot be pickled; save the packed one"):
        pickle.dumps(ready)
