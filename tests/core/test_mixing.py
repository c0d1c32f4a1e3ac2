"""How positions see each other: pieces equal the whole, padding is nothing, both directions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lfm2_mm.backbone import Backbone
from lfm2_mm.cache import KVCacheDtype, SequenceCache
from lfm2_mm.config import BackboneConfig
from lfm2_mm.mixing import Mixing, Packed, Ragged, Whole, short_convolution
from tests import oracle

CLOSE: dict[str, Any] = {"atol": oracle.CLOSE, "rtol": 0}
NEAR: dict[str, Any] = {"atol": 2e-2, "rtol": 0}  # numbers may fall to the other code of int8


def backbone(name: str) -> Backbone:
    return oracle.shared(name).backbone


@torch.no_grad()
def whole(net: Backbone, ids: Tensor) -> Tensor:
    hidden: Tensor = net(net.embed(ids[None]), Whole(1, len(ids)))
    return hidden[0]


@torch.no_grad()
def pieces(net: Backbone, cache: SequenceCache, ids: Tensor, cuts: list[int]) -> Tensor:
    out = []
    for part in torch.split(ids, cuts):
        mixing = Ragged([(cache, len(part))])
        out.append(net(net.embed(part), mixing))
        mixing.commit()
    return torch.cat(out)


def in_bytes(net: Backbone, ids: Tensor) -> Tensor:
    """A whole prompt over keys and values in int8."""
    return pieces(net, SequenceCache(net.config, kv_cache_dtype="int8"), ids, [len(ids)])


@torch.no_grad()
def test_a_mark_before_the_only_new_row_of_each_sequence() -> None:
    net, ids = backbone("dense"), oracle.ids(9, seed=5)
    cache = SequenceCache(net.config)
    pieces(net, cache, ids[:6], [6])
    mixing = Ragged([(cache, 1)], [(0,)])
    net(net.embed(ids[6:7]), mixing)
    mixing.commit()
    (boundary,) = mixing.boundaries(0)
    cache.restore(boundary)
    assert cache.length == 6
    torch.testing.assert_close(pieces(net, cache, ids[6:], [1, 2]), whole(net, ids)[6:], **CLOSE)


@pytest.mark.parametrize("name", ["dense", "odd", "moe"])
@pytest.mark.parametrize("cuts", [[1] * 21, [7, 1, 13], [20, 1]])
def test_a_sequence_in_pieces_equals_the_whole_in_bytes(name: str, cuts: list[int]) -> None:
    net, ids = backbone(name), oracle.ids(21, seed=2)
    cache = SequenceCache(net.config, kv_cache_dtype="int8")
    found, wanted = pieces(net, cache, ids, cuts), in_bytes(net, ids)
    torch.testing.assert_close(found, wanted, **NEAR)
    exact = whole(net, ids)
    assert 0 < (wanted - exact).norm() / exact.norm() < 2e-2


@pytest.mark.parametrize("name", oracle.TEXT_VARIANTS)
@pytest.mark.parametrize("cuts", [[1] * 21, [7, 1, 13], [2, 2, 17], [20, 1]])
def test_a_sequence_in_pieces_equals_the_whole(name: str, cuts: list[int]) -> None:
    net, ids = backbone(name), oracle.ids(21, seed=2)
    cache = SequenceCache(net.config)
    torch.testing.assert_close(pieces(net, cache, ids, cuts), whole(net, ids), **CLOSE)
    assert cache.length == 21


@pytest.mark.parametrize("kv", ["auto", "int8"])
@settings(max_examples=15)
@given(data=st.data())
def test_any_cuts_of_several_sequences_at_once(kv: KVCacheDtype, data: st.DataObject) -> None:
    net = backbone(data.draw(st.sampled_from(["dense", "odd", "moe"])))
    texts = [oracle.ids(n, seed=n) for n in data.draw(st.lists(st.integers(1, 30), min_size=2))[:4]]
    caches = [SequenceCache(net.config, kv_cache_dtype=kv) for _ in texts]
    out: list[list[Tensor]] = [[] for _ in texts]
    while unfinished := [i for i, text in enumerate(texts) if caches[i].length < len(text)]:
        some = data.draw(st.lists(st.sampled_from(unfinished), min_size=1, unique=True))
        runs = [(i, data.draw(st.integers(1, len(texts[i]) - caches[i].length))) for i in some]
        x = torch.cat([texts[i][caches[i].length :][:n] for i, n in runs])
        mixing = Ragged([(caches[i], n) for i, n in runs])
        with torch.no_grad():
            hidden = net(net.embed(x), mixing)
        mixing.commit()
        for (i, _), rows in zip(runs, torch.split(hidden, [n for _, n in runs]), strict=True):
            out[i].append(rows)
    for text, found in zip(texts, out, strict=True):
        if kv == "int8":
            torch.testing.assert_close(torch.cat(found), in_bytes(net, text), **NEAR)
        else:
            torch.testing.assert_close(torch.cat(found), whole(net, text), **CLOSE)


@pytest.mark.parametrize("name", ["dense", "odd", "moe"])
@pytest.mark.parametrize("left", [True, False])
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(name: str, left: bool) -> None:
    net = backbone(name)
    texts = [oracle.ids(n, seed=n) for n in (5, 17, 1, 9)]
    rows, mask = padded(texts, left)
    hidden = net(net.embed(rows), Whole(*rows.shape, mask=mask))
    assert hidden.isfinite().all()
    for text, row, real in zip(texts, hidden, mask, strict=True):
        torch.testing.assert_close(row[real], whole(net, text), **CLOSE)
    if left:  # and the mask is needed
        unmasked = net(net.embed(rows), Whole(*rows.shape))
        assert (unmasked[0][mask[0]] - whole(net, texts[0])).abs().max() > 0.1


def padded(texts: list[Tensor], left: bool) -> tuple[Tensor, Tensor]:
    time = max(len(text) for text in texts) + 2
    rows = torch.full((len(texts), time), 3)
    mask = torch.zeros(len(texts), time, dtype=torch.bool)
    for i, text in enumerate(texts):
        where = slice(time - len(text), time) if left else slice(0, len(text))
        rows[i, where], mask[i, where] = text, True
    return rows, mask


# --- both directions


def bidirectional() -> Backbone:
    config = BackboneConfig.from_dict(
        {
            **oracle.theirs("odd").config.to_dict(),
            "is_causal": False,
        }
    )
    net = Backbone(config)
    net.load_state_dict(backbone("odd").state_dict())
    return net.eval()


class Naive:
    """Every position by itself: symmetric taps, full attention, a loop over real positions."""

    def __init__(self, n: int) -> None:
        self.positions = torch.arange(n)[None]

    def convolve(self, layer: int, u: Tensor, taps: Tensor) -> Tensor:
        n, k = u.shape[1], taps.shape[1]
        out = torch.zeros_like(u)
        for t in range(n):
            for j in range(k):
                source = t + j - k // 2  # k // 2 positions before, the rest behind
                if 0 <= source < n:
                    out[0, t] += taps[:, j] * u[0, source]
        return out

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.zeros_like(q)
        repeats = q.shape[2] // k.shape[2]
        for h in range(q.shape[2]):
            scores = q[0, :, h] @ k[0, :, h // repeats].T / math.sqrt(q.shape[3])
            out[0, :, h] = scores.softmax(-1) @ v[0, :, h // repeats]
        return out


@torch.no_grad()
def test_both_directions_equal_a_plain_loop() -> None:
    net, ids = bidirectional(), oracle.ids(13, seed=5)
    naive: Mixing = Naive(13)
    x = net.embed(ids[None])
    mine = net(x, Whole(1, 13, causal=False))
    torch.testing.assert_close(mine, net(x, naive), **CLOSE)
    assert (mine - net(x, Whole(1, 13))).abs().max() > 0.1


@pytest.mark.parametrize("left", [True, False])
@torch.no_grad()
def test_both_directions_padded_equals_alone(left: bool) -> None:
    net = bidirectional()
    texts = [oracle.ids(n, seed=n) for n in (4, 15, 8)]
    rows, mask = padded(texts, left)
    hidden = net(net.embed(rows), Whole(*rows.shape, mask=mask, causal=False))
    for text, row, real in zip(texts, hidden, mask, strict=True):
        alone = net(net.embed(text[None]), Whole(1, len(text), causal=False))[0]
        torch.testing.assert_close(row[real], alone, **CLOSE)


@torch.no_grad()
def test_masked_positions_may_stay_visible_to_convolutions() -> None:
    u = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(3))
    taps = torch.randn(4, 3, generator=torch.Generator().manual_seed(4))
    mask = torch.tensor([[True, True, True, True, False, False]])
    kept = Whole(1, 6, mask=mask, causal=False, mask_convs=False).convolve(0, u, taps)
    assert torch.equal(kept, Whole(1, 6, causal=False).convolve(0, u, taps))
    hidden = Whole(1, 6, mask=mask, causal=False).convolve(0, u, taps)
    cut = Whole(1, 4, causal=False).convolve(0, u[:, :4], taps)
    torch.testing.assert_close(hidden[:, :4], cut)
    assert not torch.allclose(kept[:, 3], hidden[:, 3])


# --- complete sequences behind each other


@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    name=st.sampled_from(["dense", "odd", "moe"]),
    causal=st.booleans(),
)
def test_packed_sequences_equal_each_alone(lengths: list[int], name: str, causal: bool) -> None:
    net = backbone(name)
    texts = [oracle.ids(n, seed=i) for i, n in enumerate(lengths)]
    with torch.no_grad():
        packed = net(net.embed(torch.cat(texts)), Packed(lengths, causal=causal))
        for text, rows in zip(texts, torch.split(packed, lengths), strict=True):
            alone = net(net.embed(text[None]), Whole(1, len(text), causal=causal))[0]
            torch.testing.assert_close(rows, alone, **CLOSE)


@pytest.mark.parametrize("causal", [True, False])
def test_no_row_attends_to_a_hidden_one(causal: bool) -> None:
    draw = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(11, 2, 8, generator=draw) for _ in range(3))
    hidden = torch.tensor([False] * 3 + [True] * 2 + [False] * 5 + [True])
    found = Packed([5, 6], causal=causal, hidden=hidden).attend(0, q, k, v)
    for start, end in ((0, 5), (5, 11)):
        for t in range(start, end):
            seen = [s for s in range(start, t + 1 if causal else end) if not hidden[s]]
            weights = torch.einsum("he,she->hs", q[t], k[seen]).div(math.sqrt(8)).softmax(-1)
            wanted = torch.einsum("hs,she->he", weights, v[seen])
            torch.testing.assert_close(found[t], wanted)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("k", [1, 3, 4])
def test_hidden_rows_may_stay_visible_to_convolutions(causal: bool, k: int) -> None:
    draw = torch.Generator().manual_seed(2)
    u, taps = torch.randn(7, 4, generator=draw), torch.randn(4, k, generator=draw)
    hidden = torch.tensor([False, False, True, False, False, False, True])
    pieces = [Whole(1, n, causal=causal).convolve(0, x[None], taps)[0] for n, x in parts(u)]
    plain = Packed([3, 4], causal=causal, hidden=hidden).convolve(0, u, taps)
    torch.testing.assert_close(plain, torch.cat(pieces))
    masked = Packed([3, 4], causal=causal, hidden=hidden, mask_convs=True).convolve(0, u, taps)
    shown = u.masked_fill(hidden[:, None], 0)
    pieces = [Whole(1, n, causal=causal).convolve(0, x[None], taps)[0] for n, x in parts(shown)]
    torch.testing.assert_close(masked, torch.cat(pieces).masked_fill(hidden[:, None], 0))


def parts(u: Tensor) -> list[tuple[int, Tensor]]:
    return [(3, u[:3]), (4, u[3:])]


@pytest.mark.parametrize("taps", [1, 2, 3, 4, 7])
def test_shifted_sums_are_a_convolution(taps: int) -> None:
    draw = torch.Generator().manual_seed(taps)
    window, kernel = torch.randn(2, 11, 5, generator=draw), torch.randn(5, taps, generator=draw)
    wanted = F.conv1d(window.transpose(1, 2), kernel[:, None], groups=5).transpose(1, 2)
    torch.testing.assert_close(short_convolution(window, kernel), wanted)
    torch.testing.assert_close(short_convolution(window[0], kernel), wanted[0])
