"""Encoder outputs by content: encoded once, in one batch, within the budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lfm2_mm.errors import PlaceholderMismatch
from lfm2_mm.features import FeatureCache
from lfm2_mm.frontends import Prepared


class Encoder:
    types = frozenset({"thing"})
    placeholder = ""
    token_id = 0

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def accepts(self, source: str) -> bool:
        return False

    def prepare(self, part: Any) -> Prepared:
        return Prepared(text="", n_positions=part, tensors={}, key=f"part {part}")

    def encode(self, batch: Sequence[Prepared]) -> list[Tensor]:
        self.batches.append([part.key for part in batch])
        counts = [part.n_positions for part in batch]
        rows = torch.arange(float(sum(counts)))[:, None].expand(-1, 2).contiguous()
        return list(torch.split(rows, counts))


def test_each_part_is_encoded_once_and_all_in_one_batch() -> None:
    kept, encoder = FeatureCache(), Encoder()
    a, b, c = (encoder.prepare(n) for n in (1, 2, 3))
    first = kept.get(encoder, [a, b, a])
    assert encoder.batches == [["part 1", "part 2"]]
    assert [len(rows) for rows in first] == [1, 2, 1]
    assert torch.equal(first[0], first[2])
    second = kept.get(encoder, [c, b])
    assert encoder.batches[1:] == [["part 3"]]
    assert torch.equal(second[1], first[1])
    assert (kept.encoded, kept.hits) == (3, 2)
    kept.clear()
    kept.get(encoder, [b])
    assert encoder.batches[2:] == [["part 2"]]


def test_the_budget_holds_and_the_least_used_goes_first() -> None:
    encoder = Encoder()
    kept = FeatureCache(max_bytes=4 * 2 * 5)  # five rows
    two, three, one = (encoder.prepare(n) for n in (2, 3, 1))
    kept.get(encoder, [two])
    kept.get(encoder, [three])
    kept.get(encoder, [two])  # used: now the other is older
    kept.get(encoder, [one])
    before = kept.encoded
    kept.get(encoder, [two, one])
    assert kept.encoded == before
    kept.get(encoder, [three])
    assert kept.encoded == before + 1


def test_what_is_too_large_is_served_but_not_kept() -> None:
    kept, encoder = FeatureCache(max_bytes=8), Encoder()
    big = encoder.prepare(9)
    assert len(kept.get(encoder, [big])[0]) == len(kept.get(encoder, [big])[0]) == 9
    assert kept.encoded == 2


def test_what_is_kept_holds_no_batch_alive() -> None:
    kept, encoder = FeatureCache(), Encoder()
    rows = kept.get(encoder, [encoder.prepare(n) for n in (1, 50)])
    assert [part.untyped_storage().nbytes() for part in rows] == [8, 400]


def test_a_failure_counts_for_nothing() -> None:
    kept, encoder = FeatureCache(), Encoder()

    def fail(batch: Sequence[Prepared]) -> list[Tensor]:
        raise ValueError("no")

    encoder.encode = fail  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="no"):
        kept.get(encoder, [encoder.prepare(2)])
    assert kept.encoded == 0


def test_an_encoder_must_keep_its_word() -> None:
    encoder = Encoder()
    part = Prepared(text="", n_positions=4, tensors={}, key="x")
    encoder.encode = lambda batch: [torch.zeros(3, 2)]  # type: ignore[method-assign]
    says = "3 feature rows for a part with 4 positions; the checkpoint's preprocessor files"
    with pytest.raises(PlaceholderMismatch, match=says):
        FeatureCache().get(encoder, [part])
