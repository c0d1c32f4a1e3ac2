"""Prefixes computed earlier: found by content, bounded in bytes, and never wrong."""

from __future__ import annotations

import pytest
import torch

from lfm2_mm.cache import KVCacheDtype, SequenceCache, Snapshot
from lfm2_mm.chat import Prompt
from lfm2_mm.events import Usage
from lfm2_mm.model import Model
from lfm2_mm.prefix import PrefixCache
from lfm2_mm.request import Request
from tests import oracle
from tests.oracle import Recorder, endless, ours


def snapshot(length: int) -> Snapshot:
    cache = SequenceCache(oracle.shared("dense").backbone.config)
    cache.reserve(length)
    cache.advance(length)
    return cache.snapshot()


def test_the_longest_prefix_strictly_inside_wins() -> None:
    kept = PrefixCache()
    ids = torch.arange(10)
    short, long, whole = snapshot(3), snapshot(6), snapshot(10)
    for boundary in (long, whole, short):
        kept.keep(ids, boundary)
    assert len(kept) == 3
    assert kept.find(ids) is long  # ten positions leave nothing to compute
    assert kept.find(ids[:6]) is short
    assert kept.find(torch.cat([ids, ids])) is whole
    assert kept.find(ids[:3]) is None
    other = ids.clone()
    other[2] = 99
    assert kept.find(other) is None
    assert (kept.hits, kept.misses) == (3, 2)


def test_the_budget_holds_and_the_least_used_goes_first() -> None:
    one = snapshot(5)
    size = one.buffer_nbytes + one.nbytes + 16
    kept = PrefixCache(max_bytes=2 * size)
    texts = [torch.arange(6) + 100 * i for i in range(3)]
    kept.keep(texts[0], one)
    kept.keep(texts[1], snapshot(5))
    assert kept.nbytes == 2 * size
    assert kept.find(texts[0]) is one  # used: now the other is older
    kept.keep(texts[2], snapshot(5))
    assert (len(kept), kept.nbytes) == (2, 2 * size)
    assert kept.find(texts[1]) is None
    assert kept.find(texts[0]) is one
    kept.clear()
    assert (len(kept), kept.nbytes) == (0, 0)


def test_shared_rows_are_counted_once() -> None:
    cache = SequenceCache(oracle.shared("dense").backbone.config)
    kept = PrefixCache()
    for length in (2, 4, 6):
        cache.reserve(2)
        cache.advance(2)
        kept.keep(torch.arange(length), cache.snapshot())
    one = cache.snapshot()
    assert kept.nbytes == one.buffer_nbytes + 3 * (one.nbytes + 16)


def test_nothing_is_kept_of_nothing() -> None:
    kept = PrefixCache()
    kept.keep(torch.arange(0), snapshot(0))
    off = PrefixCache(max_bytes=0)
    off.keep(torch.arange(5), snapshot(5))
    assert (len(kept), len(off)) == (0, 0)


def test_the_key_is_a_copy() -> None:
    kept, ids = PrefixCache(), torch.arange(5)
    kept.keep(ids, snapshot(3))
    ids.fill_(7)
    assert kept.find(torch.arange(5)) is not None


# --- in the engine


def usage(model: Model, prompt: Prompt, *, reuse: bool = True) -> Usage:
    handle = model.engine.submit(Request(prompt=prompt, max_tokens=6, reuse=reuse))
    handle.text()
    assert handle.done is not None
    return handle.done.usage


@pytest.mark.parametrize("kv", ["auto", "int8"])
@pytest.mark.parametrize("name", ["dense", "odd", "moe"])
def test_a_conversation_continues_where_it_ended(name: str, kv: KVCacheDtype) -> None:
    model = endless(ours(name))
    model.engine.kv_cache_dtype = kv
    heard = Recorder(model)
    text = oracle.ids(20)
    assert usage(model, Prompt.from_ids(text)).cached_tokens == 0
    text = torch.cat([text, torch.tensor(heard.tokens()), oracle.ids(4, seed=1)])
    warm = usage(model, Prompt.from_ids(text))
    assert (warm.prompt_tokens, warm.cached_tokens) == (30, 25)  # the last token was never fed
    cold = usage(model, Prompt.from_ids(text), reuse=False)
    assert cold.cached_tokens == 0
    assert heard.tokens(1) == heard.tokens(2)
    near = oracle.CLOSE if kv == "auto" else 2e-2
    torch.testing.assert_close(heard.scores(1), heard.scores(2), atol=near, rtol=0)


def test_without_reuse_nothing_is_left_behind() -> None:
    model = endless(ours("dense"))
    usage(model, Prompt.from_ids(oracle.ids(20)), reuse=False)
    assert len(model.engine.prefixes) == 0


def test_a_cancelled_request_leaves_nothing_behind() -> None:
    model = endless(ours("dense"))
    handle = model.engine.submit(Request(prompt=Prompt.from_ids(oracle.ids(20))))
    for _ in handle:
        break
    assert handle.done is not None
    assert len(model.engine.prefixes) == 0


def test_a_budget_for_nothing_costs_time_only() -> None:
    model = endless(ours("dense"))
    model.engine.prefixes.max_bytes = 1000  # less than any boundary
    heard, prompt = Recorder(model), Prompt.from_ids(oracle.ids(20))
    longer = Prompt.from_ids(torch.cat([prompt.ids, oracle.ids(9, seed=1)]))
    usage(model, prompt)
    assert usage(model, longer).cached_tokens == len(model.engine.prefixes) == 0
    usage(model, longer, reuse=False)
    assert heard.tokens(1) == heard.tokens(2)
