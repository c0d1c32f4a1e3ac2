"""Branches of one prefix in one row: each as if it stood alone, forwards and backwards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lfm2_mm.backbone import Backbone
from lfm2_mm.mixing import Mixing, Whole
from lfm2_mm.train.attention import plain_attention
from lfm2_mm.train.packing import Branched
from tests import oracle

Rows = list[tuple[int, list[int]]]
ROWS: Rows = [(7, [3, 1, 5]), (1, [2, 2]), (12, []), (4, [9])]


def trainable(name: str) -> Backbone:
    source = oracle.shared(name).backbone
    net = Backbone(source.config)
    net.load_state_dict(source.state_dict())
    return net


def packed(rows: Rows, time: int) -> Tensor:
    ids = torch.full((len(rows), time), 3)
    for i, (prefix, branches) in enumerate(rows):
        n = prefix + sum(branches)
        ids[i, :n] = oracle.ids(n, seed=i)
    return ids


def pieces(rows: Rows, ids: Tensor) -> list[tuple[int, int, int, Tensor]]:
    """Row, start and length of each run, and the sequence it ends when alone."""
    out = []
    for i, (prefix, branches) in enumerate(rows):
        out.append((i, 0, prefix, ids[i, :prefix]))
        start = prefix
        for length in branches:
            alone = torch.cat([ids[i, :prefix], ids[i, start : start + length]])
            out.append((i, start, length, alone))
            start += length
    return out


@pytest.mark.parametrize("name", ["dense", "odd", "moe"])
@torch.no_grad()
def test_each_branch_equals_the_sequence_alone(name: str) -> None:
    net, time = oracle.shared(name).backbone, 25
    head = oracle.shared(name).head
    ids = packed(ROWS, time)
    mixing: Mixing = Branched(ROWS, time, taps=net.config.conv_taps)
    scores = head.logits(net(net.embed(ids), mixing))
    assert scores.isfinite().all()
    for i, start, length, alone in pieces(ROWS, ids):
        wanted = head.logits(net(net.embed(alone[None]), Whole(1, len(alone))))[0, -length:]
        torch.testing.assert_close(scores[i, start : start + length], wanted, atol=1e-5, rtol=1e-5)


@settings(max_examples=12)
@given(
    rows=st.lists(
        st.tuples(st.integers(1, 6), st.lists(st.integers(1, 5), max_size=3)),
        min_size=1,
        max_size=3,
    ),
    spare=st.integers(0, 3),
    name=st.sampled_from(["dense", "odd"]),
)
@torch.no_grad()
def test_any_layout(rows: Rows, spare: int, name: str) -> None:
    net = oracle.shared(name).backbone
    time = max(prefix + sum(branches) for prefix, branches in rows) + spare
    ids = packed(rows, time)
    hidden = net(net.embed(ids), Branched(rows, time, taps=net.config.conv_taps))
    for i, start, length, alone in pieces(rows, ids):
        wanted = net(net.embed(alone[None]), Whole(1, len(alone)))[0, -length:]
        torch.testing.assert_close(hidden[i, start : start + length], wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["dense", "odd", "moe"])
def test_gradients_equal_those_of_the_sequences_alone(name: str) -> None:
    net, time = trainable(name), 25
    ids = packed(ROWS, time)
    weights = torch.randn(net.config.hidden_size, generator=torch.Generator().manual_seed(0))
    runs = [run for run in pieces(ROWS, ids) if run[1]]

    hidden = net(net.embed(ids), Branched(ROWS, time, taps=net.config.conv_taps))
    loss = torch.stack([(hidden[i, a : a + n] @ weights).sin().sum() for i, a, n, _ in runs]).sum()
    torch.autograd.backward(loss)
    found = {key: p.grad.clone() for key, p in net.named_parameters() if p.grad is not None}

    net.zero_grad()
    for _, _, n, alone in runs:
        one = net(net.embed(alone[None]), Whole(1, len(alone)))[0, -n:]
        torch.autograd.backward((one @ weights).sin().sum())
    assert len(found) > 20
    for key, p in net.named_parameters():
        if p.grad is None:
            assert not found.get(key, torch.zeros(1)).any()  # an expert nobody chose
            continue
        scale = float(p.grad.abs().max()) + 1e-6
        torch.testing.assert_close(found[key] / scale, p.grad / scale, atol=1e-4, rtol=0)


@torch.no_grad()
def test_branches_do_not_see_each_other() -> None:
    net = oracle.shared("dense").backbone
    rows: Rows = [(4, [3, 3])]
    ids = packed(rows, 10)
    before = net(net.embed(ids), Branched(rows, 10))
    changed = ids.clone()
    changed[0, 4:7] = oracle.ids(3, seed=77)
    after = net(net.embed(changed), Branched(rows, 10))
    assert torch.equal(before[0, :4], after[0, :4])
    assert torch.equal(before[0, 7:], after[0, 7:])
    assert (before[0, 4:7] - after[0, 4:7]).abs().max() > 0.1


def test_it_moves_between_devices() -> None:
    mixing = Branched(ROWS, 25)
    assert mixing.to("cpu") is mixing
    assert mixing.positions[0, :16].tolist() == [*range(7), 7, 8, 9, 7, 7, 8, 9, 10, 11]


def test_plain_attention_equals_the_fused_one() -> None:
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 5, 6, generator=draw)
    k, v = (torch.randn(2, 2, 7, 6, generator=draw) for _ in range(2))
    bias = torch.randn(2, 1, 5, 7, generator=draw)
    for added in (None, bias):
        wanted = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=added, enable_gqa=True
        )
        torch.testing.assert_close(plain_attention(q, k, v, bias=added), wanted)
