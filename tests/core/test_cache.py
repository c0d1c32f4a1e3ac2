"""The state of a sequence: exact at every boundary, whoever shares it, whatever went wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lfm2_mm.backbone import Backbone
from lfm2_mm.cache import KVCacheDtype, SequenceCache, Snapshot
from lfm2_mm.mixing import Ragged, Whole
from tests import oracle

# a number that falls between two codes of int8 may be rounded either way
CLOSE: dict[KVCacheDtype, dict[str, Any]] = {
    "auto": {"atol": oracle.CLOSE, "rtol": 0},
    "int8": {"atol": 2e-2, "rtol": 0},
}
both = pytest.mark.parametrize("kv", ["auto", "int8"])


def backbone(name: str = "dense") -> Backbone:
    return oracle.shared(name).backbone


@torch.no_grad()
def append(net: Backbone, *runs: tuple[SequenceCache, Tensor]) -> list[Tensor]:
    """One step; hidden states of each run."""
    mixing = Ragged([(cache, len(ids)) for cache, ids in runs])
    hidden = net(net.embed(torch.cat([ids for _, ids in runs])), mixing)
    mixing.commit()
    return list(torch.split(hidden, [len(ids) for _, ids in runs]))


@torch.no_grad()
def last(net: Backbone, text: list[int], kv: KVCacheDtype = "auto") -> Tensor:
    """The hidden state behind a text, from scratch, all of it at once."""
    ids = torch.tensor(text)
    if kv == "int8":
        return append(net, (SequenceCache(net.config, kv_cache_dtype=kv), ids))[0][-1]
    hidden: Tensor = net(net.embed(ids[None]), Whole(1, len(text)))
    return hidden[0, -1]


def bytes_of(cache: SequenceCache) -> list[Tensor]:
    """All that counts of keys and values."""
    return [part[:, :, : cache.length].clone() for part in cache.buffers]


@dataclass
class Story:
    """A cache and what it should hold."""

    cache: SequenceCache
    text: list[int] = field(default_factory=list)


@both
@settings(max_examples=40)
@given(data=st.data())
def test_any_history_equals_computation_from_scratch(kv: KVCacheDtype, data: st.DataObject) -> None:
    """Two sequences and their forks append, alone or in one step; all go back and forth."""
    net = backbone(data.draw(st.sampled_from(["dense", "odd", "moe"])))
    stories = [Story(SequenceCache(net.config, capacity=1, kv_cache_dtype=kv)) for _ in range(2)]
    kept: list[tuple[Snapshot, list[int]]] = []
    token = st.integers(30, 270)
    for _ in range(data.draw(st.integers(2, 9))):
        story = data.draw(st.sampled_from(stories))
        match data.draw(st.sampled_from(["append", "together", "snapshot", "restore", "fork"])):
            case "append" | "together" as what:
                some = [story] if what == "append" else stories
                runs = [data.draw(st.lists(token, min_size=1, max_size=5)) for _ in some]
                hidden = append(
                    net, *((s.cache, torch.tensor(r)) for s, r in zip(some, runs, strict=True))
                )
                for s, r, rows in zip(some, runs, hidden, strict=True):
                    s.text = s.text + r
                    assert s.cache.length == len(s.text)
                    torch.testing.assert_close(rows[-1], last(net, s.text, kv), **CLOSE[kv])
            case "snapshot":
                kept.append((story.cache.snapshot(), story.text))
            case "restore" if kept:
                snapshot, story.text = data.draw(st.sampled_from(kept))
                story.cache.restore(snapshot)
            case "fork" if len(stories) < 5:
                stories.append(Story(story.cache.fork(), story.text))
    for story in stories:  # nobody's later rows changed anybody's earlier ones
        end = append(net, (story.cache, torch.tensor([99])))[0][-1]
        torch.testing.assert_close(end, last(net, [*story.text, 99], kv), **CLOSE[kv])
    for snapshot, text in kept:
        story.cache.restore(snapshot)
        end = append(net, (story.cache, torch.tensor([98])))[0][-1]
        torch.testing.assert_close(end, last(net, [*text, 98], kv), **CLOSE[kv])


@both
def test_every_boundary_comes_back_exactly(kv: KVCacheDtype) -> None:
    net, ids = backbone("odd"), oracle.ids(25, seed=3)
    cache = SequenceCache(net.config, kv_cache_dtype=kv)
    kept, held = [cache.snapshot()], [bytes_of(cache)]
    for token in ids:
        append(net, (cache, token[None]))
        kept.append(cache.snapshot())
        held.append(bytes_of(cache))
    rest = oracle.ids(3, seed=4)
    for n, snapshot in reversed(list(enumerate(kept))):
        cache.restore(snapshot)
        assert cache.length == snapshot.length == n
        twin = cache.fork()
        assert (twin.dtype, twin.kv_cache_dtype) == (torch.float32, kv)
        end = append(net, (cache, rest))[0][-1]
        text = [*ids[:n].tolist(), *rest.tolist()]
        torch.testing.assert_close(end, last(net, text, kv), **CLOSE[kv])
        assert all(map(torch.equal, bytes_of(twin), held[n]))
        assert torch.equal(append(net, (twin, rest))[0][-1], end)
        assert all(map(torch.equal, bytes_of(twin), bytes_of(cache)))


@both
def test_twins_in_one_step_do_not_share_new_rows(kv: KVCacheDtype) -> None:
    net, prefix = backbone(), oracle.ids(6)
    first = SequenceCache(net.config, kv_cache_dtype=kv)
    append(net, (first, prefix))
    second = first.fork()
    a, b = oracle.ids(2, seed=1), oracle.ids(2, seed=2)
    append(net, (first, a), (second, b))
    ends = append(net, (first, a[:1]), (second, a[:1]))
    for end, own in zip(ends, (a, b), strict=True):
        text = [*prefix.tolist(), *own.tolist(), int(a[0])]
        torch.testing.assert_close(end[-1], last(net, text, kv), **CLOSE[kv])


@both
def test_it_grows_by_doubling_and_keeps_what_it_holds(kv: KVCacheDtype) -> None:
    net, ids = backbone(), oracle.ids(600, seed=6)
    cache = SequenceCache(net.config, capacity=10, kv_cache_dtype=kv)
    assert cache.capacity == 256
    seen = []
    for part in torch.split(ids, 100):
        end = append(net, (cache, part))[0][-1]
        seen.append(cache.capacity)
    assert seen == [256, 256, 512, 512, 512, 1024]
    torch.testing.assert_close(end, last(net, ids.tolist(), kv), **CLOSE[kv])


def test_appending_in_place_copies_nothing() -> None:
    net = backbone()
    cache = SequenceCache(net.config, capacity=100)
    append(net, (cache, oracle.ids(5)))
    first = cache.snapshot()
    append(net, (cache, oracle.ids(5)))
    assert cache.snapshot().buffer_id == first.buffer_id  # a snapshot costs no rows
    cache.restore(first)
    append(net, (cache, oracle.ids(5)))
    assert cache.snapshot().buffer_id != first.buffer_id  # somebody else's rows stood there


def test_a_failing_step_leaves_everything_as_it_was() -> None:
    net, ids = backbone(), oracle.ids(9, seed=7)
    cache = SequenceCache(net.config)
    append(net, (cache, ids))
    before = [state.clone() for state in cache.snapshot()._conv]

    def fail(*args: object) -> None:
        raise RuntimeError("broken layer")

    hook = net.layers[4].register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="broken layer"):
            append(net, (cache, oracle.ids(4, seed=8)))
    finally:
        hook.remove()
    assert cache.length == 9
    assert all(map(torch.equal, before, cache.snapshot()._conv))
    end = append(net, (cache, oracle.ids(2, seed=9)))[0][-1]
    text = [*ids.tolist(), *oracle.ids(2, seed=9).tolist()]
    torch.testing.assert_close(end, last(net, text), **CLOSE["auto"])


def test_nothing_counts_before_the_step_is_committed() -> None:
    net, ids = backbone(), oracle.ids(4)
    cache = SequenceCache(net.config)
    with torch.no_grad():
        net(net.embed(ids), Ragged([(cache, 4)]))  # never committed
    assert cache.length == 0
    end = append(net, (cache, ids))[0][-1]
    torch.testing.assert_close(end, last(net, ids.tolist()), **CLOSE["auto"])


def test_what_a_snapshot_weighs() -> None:
    net = backbone()
    config = net.config
    caches = [SequenceCache(config) for _ in range(8)]
    append(net, *((cache, oracle.ids(1)) for cache in caches))  # one window for all eight
    snapshot = caches[0].snapshot()
    assert snapshot.nbytes == 4 * (config.conv_taps - 1) * config.hidden_size * 4
    assert all(state.untyped_storage().nbytes() == state.nbytes for state in snapshot._conv)
    heads = config.n_kv_heads * config.head_dim
    assert snapshot.buffer_nbytes == 2 * 2 * heads * caches[0].capacity * 4
    small = SequenceCache(config, kv_cache_dtype="int8").snapshot()
    assert small.buffer_nbytes == 2 * 2 * (heads + 4 * config.n_kv_heads) * caches[0].capacity
    assert small.nbytes == snapshot.nbytes  # states of convolutions stay as they are


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_kept_in_bytes_is_within_half_a_step(dtype: torch.dtype) -> None:
    config = backbone("odd").config
    shape = (config.n_kv_heads, 70, config.head_dim)
    draw = torch.Generator().manual_seed(1)
    sizes = torch.logspace(-6, 4, 70)[:, None]
    keys, values = ((torch.randn(shape, generator=draw) * sizes).to(dtype) for _ in range(2))
    keys[:, 3], values[0, 5] = 0.0, 1e-38
    cache = SequenceCache(config, dtype=dtype, kv_cache_dtype="int8")
    assert cache.dtype == cache.conv_state(config.conv_layers[0]).dtype == dtype
    cache.reserve(70)
    for wanted, found in zip(
        (keys, values), cache.write(config.attention_layers[0], keys, values), strict=True
    ):
        assert found.dtype == dtype
        step = wanted.float().abs().amax(-1, keepdim=True) / 127
        kind = torch.finfo(dtype)
        rounding = kind.eps * (127 * step + kind.tiny) + 1e-30  # what is smaller counts as zero
        assert ((found.float() - wanted.float()).abs() <= step / 2 + rounding).all()
    codes, scales = cache.buffers[0][0, :, :70], cache.buffers[2][0, :, :70]
    largest = codes.abs().amax(-1)
    assert ((largest == 127) == (scales[..., 0] > 0)).all()
    assert (codes[:, 3] == 0).all() and (scales[:, 3] == 0).all()


@pytest.mark.parametrize("odd", [torch.inf, -torch.inf, torch.nan])
def test_a_row_that_is_not_finite_stays_so_in_bytes(odd: float) -> None:
    config = backbone().config
    rows = torch.randn(config.n_kv_heads, 3, config.head_dim)
    rows[1, 1, 2] = odd
    cache = SequenceCache(config, kv_cache_dtype="int8")
    cache.reserve(3)
    found, _ = cache.write(config.attention_layers[0], rows, rows)
    assert found[1, 1].isnan().all() and found.isnan().sum() == config.head_dim
