"""Branches of one prefix in one row: each as if it stood alone, forwards and backwards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lfm2_mm.backbone import Backbone
from lfm2_mm.mixing import Mixing, Whole
from lfm2_mm.train.attention import PlainWhole, plain_attention
from lfm2_mm.train.packing import Branched
from tests import oracle

Rows = list[tuple[int, list[int]]]
ROWS: Rows = [(7, [3, 1, 5]), (1, [2, 2]), (12, []), (4, [9])]


def trainable(name: str) -> Backbone:
    source = oracle.shared(name).backbone
    net = Backbone(source.config)
    net.load_state_dict(source.state_dict())
    return net


def mixing_of(rows: Rows, taps: int = 3) -> Branched:
    branches = [(i, length) for i, (_, lengths) in enumerate(rows) for length in lengths]
    return Branched([prefix for prefix, _ in rows], branches, taps=taps)


def packed(rows: Rows) -> Tensor:
    return oracle.ids(sum(prefix + sum(lengths) for prefix, lengths in rows), seed=5)


def pieces(rows: Rows, ids: Tensor) -> list[tuple[int, int, Tensor]]:
    """Start and length of each run, and the sequence it ends when alone."""
    out, prefixes, start = [], [], 0
    for prefix, _ in rows:
        prefixes.append(ids[start : start + prefix])
        out.append((start, prefix, prefixes[-1]))
        start += prefix
    for (_, lengths), prefix_ids in zip(rows, prefixes, strict=True):
        for length in lengths:
            out.append((start, length, torch.cat([prefix_ids, ids[start : start + length]])))
            start += length
    return out


@pytest.mark.parametrize("name", ["dense", "odd", "moe"])
@torch.no_grad()
def test_each_branch_equals_the_sequence_alone(name: str) -> None:
    net, head = oracle.shared(name).backbone, oracle.shared(name).head
    ids = packed(ROWS)
    mixing: Mixing = mixing_of(ROWS, net.config.conv_taps)
    scores = head.logits(net(net.embed(ids), mixing))
    assert scores.isfinite().all()
    for start, length, alone in pieces(ROWS, ids):
        wanted = head.logits(net(net.embed(alone[None]), Whole(1, len(alone))))[0, -length:]
        torch.testing.assert_close(scores[start : start + length], wanted, atol=1e-5, rtol=1e-5)


@settings(max_examples=12)
@given(
    rows=st.lists(
        st.tuples(st.integers(1, 6), st.lists(st.integers(1, 5), max_size=3)),
        min_size=1,
        max_size=3,
    ),
    name=st.sampled_from(["dense", "odd"]),
)
@torch.no_grad()
def test_any_layout(rows: Rows, name: str) -> None:
    net = oracle.shared(name).backbone
    ids = packed(rows)
    hidden = net(net.embed(ids), mixing_of(rows, net.config.conv_taps))
    for start, length, alone in pieces(rows, ids):
        wanted = net(net.embed(alone[None]), Whole(1, len(alone)))[0, -length:]
        torch.testing.assert_close(hidden[start : start + length], wanted, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_more_branches_than_are_attended_to_at_once() -> None:
    net = oracle.shared("dense").backbone
    rows: Rows = [(3, [1 + i % 4 for i in range(50)]), (5, [2] * 40)]
    ids = packed(rows)
    hidden = net(net.embed(ids), mixing_of(rows))
    for start, length, alone in pieces(rows, ids):
        wanted = net(net.embed(alone[None]), Whole(1, len(alone)))[0, -length:]
        torch.testing.assert_close(hidden[start : start + length], wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["dense", "odd", "moe"])
def test_gradients_equal_those_of_the_sequences_alone(name: str) -> None:
    net = trainable(name)
    ids = packed(ROWS)
    weights = torch.randn(net.config.hidden_size, generator=torch.Generator().manual_seed(0))
    runs = [run for run in pieces(ROWS, ids) if run[1]]

    hidden = net(net.embed(ids), mixing_of(ROWS, net.config.conv_taps))
    loss = torch.stack([(hidden[a : a + n] @ weights).sin().sum() for a, n, _ in runs]).sum()
    torch.autograd.backward(loss)
    found = {key: p.grad.clone() for key, p in net.named_parameters() if p.grad is not None}

    net.zero_grad()
    for _, n, alone in runs:
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
    ids = packed(rows)
    before = net(net.embed(ids), mixing_of(rows))
    changed = ids.clone()
    changed[4:7] = oracle.ids(3, seed=77)
    after = net(net.embed(changed), mixing_of(rows))
    assert torch.equal(before[:4], after[:4])
    assert torch.equal(before[7:], after[7:])
    assert (before[4:7] - after[4:7]).abs().max() > 0.1


def test_it_moves_between_devices() -> None:
    mixing = mixing_of(ROWS)
    assert mixing.to("cpu") is mixing
    assert mixing.positions[:8].tolist() == [*range(7), 0]
    assert mixing.positions[24:33].tolist() == [7, 8, 9, 7, 7, 8, 9, 10, 11]
    assert mixing.branch_starts == [24, 27, 28, 33, 35, 37]


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


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_a_padded_rectangle_equals_the_fused_one(causal: bool) -> None:
    net = oracle.shared("dense").backbone
    ids = oracle.ids(3 * 9, seed=1).view(3, 9)
    mask = torch.arange(9) < torch.tensor([[9], [4], [1]])
    found = net(net.embed(ids), PlainWhole(3, 9, mask=mask, causal=causal))
    wanted = net(net.embed(ids), Whole(3, 9, mask=mask, causal=causal))
    torch.testing.assert_close(found[mask], wanted[mask], atol=1e-5, rtol=1e-5)
    if causal:  # padding behind the ends needs no mask
        found = net(net.embed(ids), PlainWhole(3, 9))
        torch.testing.assert_close(found[mask], wanted[mask], atol=1e-5, rtol=1e-5)
