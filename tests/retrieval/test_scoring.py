"""Scores equal a plain loop, in blocks too; the alignment names the best rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lfm2_retrieval import scoring as module
from lfm2_retrieval.scoring import alignment, maxsim


def made(*sizes: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(len(sizes))
    return [torch.randn(n, 8, generator=draw) for n in sizes]


@pytest.mark.parametrize("elements", [2**22, 64, 1])
def test_scores_equal_a_loop(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ELEMENTS", elements)
    query, *documents = made(5, 3, 0, 9, 1, 20, 0)
    wanted = [
        (query @ document.T).max(dim=1).values.sum() if len(document) else torch.tensor(-torch.inf)
        for document in documents
    ]
    torch.testing.assert_close(maxsim(query, documents), torch.stack(wanted))
    assert maxsim(query, []).shape == (0,)


def test_sums_are_fp32() -> None:
    query, document = (x.bfloat16() for x in made(32, 50))
    scores = maxsim(query, [document])
    assert scores.dtype == torch.float32
    wanted = (query.double() @ document.double().T).max(1).values.sum()
    torch.testing.assert_close(scores[0].double(), wanted, atol=1e-4, rtol=0)


def test_alignment() -> None:
    query, document = made(4, 7)
    rows, similarity = alignment(query, document)
    torch.testing.assert_close(similarity, (query * document[rows]).sum(1))
    torch.testing.assert_close(similarity.sum(), maxsim(query, [document])[0])
    rows, similarity = alignment(query, document[:0])
    assert rows.tolist() == [-1] * 4 and similarity.tolist() == [-torch.inf] * 4
