"""Token pooling: how many rows are left, that near ones meet, that means are means."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lfm2_mm.errors import SettingError
from lfm2_retrieval.pooling import pool_tokens


def test_near_rows_become_their_mean() -> None:
    corners = torch.eye(4)[:3]
    noise = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    rows = F.normalize(corners.repeat(4, 1) + 0.05 * noise, dim=1)
    first = F.normalize(torch.ones(1, 4), dim=1)
    pooled = pool_tokens(torch.cat([first, rows]), 4)
    assert pooled.shape == (4, 4)
    torch.testing.assert_close(pooled[:1], first)
    means = {tuple(rows[i::3].mean(0).tolist()) for i in range(3)}
    found = {tuple(row.tolist()) for row in pooled[1:]}
    for mean in means:
        assert min(max(abs(a - b) for a, b in zip(mean, row, strict=True)) for row in found) < 1e-6
    assert (pooled[1:].norm(dim=1) < 1).all()  # means of unit vectors, not normalised again


@pytest.mark.parametrize(("rows", "factor", "left"), [(1, 2, 1), (2, 5, 2), (9, 2, 5), (9, 1, 9)])
def test_how_many_are_left(rows: int, factor: int, left: int) -> None:
    vectors = F.normalize(torch.randn(rows, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    assert len(pool_tokens(vectors, factor)) == left


def test_equal_rows_and_a_bad_factor() -> None:
    same = torch.eye(4)[:1].repeat(6, 1)
    torch.testing.assert_close(pool_tokens(same, 2), same[:1].repeat(len(pool_tokens(same, 2)), 1))
    with pytest.raises(SettingError, match="the pool factor is 0; use 1"):
        pool_tokens(same, 0)
