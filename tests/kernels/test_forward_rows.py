"""Many rows, several sequences and experts in one native call against the layers one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lfm2_mm.backbone import Backbone
from lfm2_mm.cache import KVCacheDtype, SequenceCache, Snapshot
from lfm2_mm.config import BackboneConfig
from lfm2_mm.kernels import native
from lfm2_mm.kernels.linear import SCHEMES, Scheme, quantize
from lfm2_mm.kernels.stepping import decode_step
from lfm2_mm.mixing import Ragged
from lfm2_mm.moe import SparseMoe
from lfm2_mm.quantize.fitting import place
from lfm2_mm.quantize.layers import Packed

PATHS = native.status().features or ("torch",)
CONFIG = BackboneConfig(
    vocab_size=64,
    hidden_size=128,
    ffn_size=320,
    layer_types=("conv", "full_attention", "conv", "full_attention"),
    n_heads=4,
    n_kv_heads=2,
    head_dim=32,
)
SPARSE = replace(CONFIG, n_experts=5, n_experts_per_token=2, expert_size=96, n_dense_layers=1)
NEAR = 1.2e-2  # bf16 products and 8-bit codes that fall to the other side


@pytest.fixture(autouse=True)
def best_path() -> Iterator[None]:
    yield
    native.choose(None)


def take(path: str) -> None:
    assert native.choose(path) == path  # type: ignore[arg-type]


def packed(config: BackboneConfig, *schemes: Scheme) -> Backbone:
    """A random backbone, its linear layers but the routers packed by the schemes in turn."""
    torch.manual_seed(0)
    backbone = Backbone(config).eval().requires_grad_(False)
    for parameter in backbone.parameters():
        if parameter.dim() == 1:
            parameter.data = 1 + 0.1 * torch.randn_like(parameter)
    names = [
        name
        for name, part in backbone.named_modules()
        if isinstance(part, nn.Linear) and not name.endswith(".gate")
    ]
    for i, name in enumerate(names):
        weight = backbone.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        scheme = schemes[i % len(schemes)]
        if weight.shape[1] % (SCHEMES[scheme].group or 1):
            scheme = "int4-g32"
        place(backbone, f"{name}.weight", Packed(quantize(weight.detach(), scheme)))
    for part in backbone.modules():
        if isinstance(part, SparseMoe):
            part.expert_bias.normal_(0.0, 0.2)
    return backbone


def started(
    backbone: Backbone, lengths: Sequence[int], kv: KVCacheDtype = "auto"
) -> list[SequenceCache]:
    caches = [SequenceCache(backbone.config, kv_cache_dtype=kv) for _ in lengths]
    for seed, (cache, n) in enumerate(zip(caches, lengths, strict=True)):
        if n:
            run(backbone, rows(n, seed), [cache], [n])
    return caches


def rows(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 128, generator=torch.Generator().manual_seed(100 + seed))


def run(
    backbone: Backbone,
    x: Tensor,
    caches: Sequence[SequenceCache],
    counts: Sequence[int],
    marks: Sequence[Sequence[int]] | None = None,
    *,
    layers: bool = False,
) -> tuple[Tensor, list[Snapshot]]:
    """Hidden states and snapshots; with gradients asked for, layer by layer."""
    mixing = Ragged(list(zip(caches, counts, strict=True)), marks)
    with torch.set_grad_enabled(layers):
        found = backbone(x, mixing).detach()
    mixing.commit()
    return found, [one for i in range(len(caches)) for one in mixing.boundaries(i)]


def distance(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.float(), wanted.float()
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-9))


def compare(
    backbone: Backbone,
    past: Sequence[int],
    counts: Sequence[int],
    marks: Sequence[Sequence[int]] | None = None,
    kv: KVCacheDtype = "auto",
) -> float:
    """The largest distance of rows, keys, values, states and snapshots."""
    assert decode_step(backbone) is not None or native.library() is None
    first = started(backbone, past, kv)
    second = [cache.fork() for cache in first]
    x = rows(sum(counts))
    wanted, kept = run(backbone, x, first, counts, marks, layers=True)
    found, also = run(backbone, x, second, counts, marks)
    most = distance(found, wanted)
    assert [one.length for one in also] == [one.length for one in kept]
    for mine, theirs in zip(kept, also, strict=True):
        pairs = zip(mine._conv, theirs._conv, strict=True)
        most = max([most, *(distance(two, one) for one, two in pairs)])
    for one, other in zip(first, second, strict=True):
        assert one.length == other.length
        for a, b in zip(one.buffers, other.buffers, strict=True):
            most = max(most, distance(b[:, :, : one.length], a[:, :, : one.length]))
        for layer in backbone.config.conv_layers:
            most = max(most, distance(other.conv_state(layer), one.conv_state(layer)))
    return most


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("schemes", [("int8-g32",), ("int4-g32", "int8", "int4-g128")])
def test_prompts_are_what_the_layers_give(path: str, schemes: tuple[Scheme, ...]) -> None:
    take(path)
    backbone = packed(CONFIG, *schemes)
    assert compare(backbone, [0], [40], [(1, 33)]) < NEAR
    assert compare(backbone, [10, 0, 7], [1, 30, 12], [(), (3,), (0, 11)]) < NEAR


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("past", [0, 1, 31, 130])
def test_long_prompts_at_the_borders_of_blocks(path: str, past: int) -> None:
    take(path)
    assert compare(packed(CONFIG, "int8-g32"), [past], [129]) < NEAR


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "changes", [{"head_dim": 48}, {"conv_taps": 1}, {"conv_bias": True}, {"n_kv_heads": 4}]
)
def test_prompts_of_other_shapes(path: str, changes: dict[str, object]) -> None:
    take(path)
    config = replace(CONFIG, **changes)  # type: ignore[arg-type]
    assert compare(packed(config, "int8-g32"), [3], [37]) < NEAR


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("changes", [{}, {"head_dim": 48}, {"head_dim": 64, "n_kv_heads": 4}])
def test_prompts_over_bytes(path: str, changes: dict[str, Any]) -> None:
    take(path)
    backbone = packed(replace(CONFIG, **changes), "int8-g32")
    for past in (0, 1, 31, 130):
        assert compare(backbone, [past], [129], [(1, 33)], kv="int8") < NEAR
    assert compare(backbone, [10, 0, 7], [1, 30, 12], [(), (3,), (0, 11)], kv="int8") < NEAR


@pytest.mark.parametrize("path", PATHS)
def test_chunks_over_bytes_are_the_whole(path: str) -> None:
    take(path)
    backbone, x = packed(CONFIG, "int8-g32"), rows(200)
    whole, _ = run(backbone, x, started(backbone, [0], "int8"), [200])
    for cuts in ([64, 64, 72], [1, 9, 100, 90]):
        cache = started(backbone, [0], "int8")
        pieces = [run(backbone, part, cache, [len(part)])[0] for part in torch.split(x, cuts)]
        assert distance(torch.cat(pieces), whole) < NEAR


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_a_row_sees_nothing_behind_itself(path: str, kv: KVCacheDtype) -> None:
    take(path)
    backbone = packed(CONFIG, "int8-g32")
    x = rows(60)
    whole, _ = run(backbone, x, started(backbone, [0], kv), [60])
    x[50:] = 9.0
    other, _ = run(backbone, x, started(backbone, [0], kv), [60])
    assert torch.equal(whole[:50], other[:50])


@pytest.mark.parametrize("path", PATHS)
def test_experts_are_what_the_layers_give(path: str) -> None:
    take(path)
    backbone = packed(SPARSE, "int4-g32")
    for counts in ([1], [1, 1, 1], [7], [60]):
        x, past = rows(sum(counts)), [4] * len(counts)
        first = started(backbone, past)
        second = [cache.fork() for cache in first]
        wanted, _ = run(backbone, x, first, counts, layers=True)
        found, _ = run(backbone, x, second, counts)
        # a row between two experts may go through the other one: most rows are near
        apart = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        assert float(apart.median()) < NEAR
        assert float((apart < 5 * NEAR).float().mean()) > 0.8


def test_only_experts_that_are_chosen_are_laid_out() -> None:
    config = replace(SPARSE, n_experts=16)
    backbone = packed(config, "int4-g32")
    cache = SequenceCache(config)
    run(backbone, rows(1), [cache], [1])
    for block in backbone.layers:
        if isinstance(block.feed_forward, SparseMoe):
            experts: Any = block.feed_forward.experts
            laid = sum(expert.w1.weight._ready is not None for expert in experts)
            assert laid == 2
    run(backbone, rows(40), [cache], [40])
    assert cache.length == 41


def test_packing_later_is_noticed() -> None:
    backbone = Backbone(CONFIG).eval().requires_grad_(False)
    before, _ = run(backbone, rows(3), [SequenceCache(CONFIG)], [3])
    for name, part in list(backbone.named_modules()):
        if isinstance(part, nn.Linear):
            place(backbone, f"{name}.weight", Packed(quantize(part.weight.detach(), "int8-g32")))
    assert backbone._native_step() is not None or native.library() is None
    after, _ = run(backbone, rows(3), [SequenceCache(CONFIG)], [3])
    assert 0 < distance(after, before) < 0.05


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("config", [CONFIG, SPARSE], ids=["dense", "sparse"])
def test_who_else_is_computed_changes_no_number(path: str, config: BackboneConfig) -> None:
    take(path)
    backbone = packed(config, *(("int4-g32", "int8") if config is CONFIG else ("int4-g32",)))
    counts = [1, 40, 1, 3, 60, *[1] * 24]
    past = [5, 0, 9, 2, 4, *[3] * 24]
    together, alone = started(backbone, past), started(backbone, past)
    x = rows(sum(counts))
    found, _ = run(backbone, x, together, counts)
    wanted = [
        run(backbone, piece, [cache], [n])[0]
        for piece, cache, n in zip(torch.split(x, counts), alone, counts, strict=True)
    ]
    if config is CONFIG:
        assert torch.equal(found, torch.cat(wanted))
        for one, other in zip(together, alone, strict=True):
            for a, b in zip(one.buffers, other.buffers, strict=True):
                assert torch.equal(a[:, :, : one.length], b[:, :, : one.length])
    else:  # rows of one expert are added up in another order
        apart = (found - torch.cat(wanted)).norm(dim=-1) / found.norm(dim=-1)
        assert float(apart.median()) < 1e-5 and float(apart.max()) < NEAR


def test_caches_in_half_precision_go_layer_by_layer() -> None:
    backbone = packed(CONFIG, "int8").half()
    cache = SequenceCache(CONFIG, dtype=torch.float16)
    found, _ = run(backbone, rows(3).half(), [cache], [3])
    assert cache.length == 3 and found.isfinite().all()


def test_a_sequence_without_rows_is_refused() -> None:
    backbone = packed(CONFIG, "int8")
    step = decode_step(backbone)
    if step is None:
        assert "torch" in PATHS
        return
    caches = started(backbone, [1, 1])
    with pytest.raises(ValueError, match="a native call of 2 rows over 2 caches"):
        step.run(rows(2), caches, [0, 2])
