from __future__ import annotations

from typing import Any

import pytest

import lfm2_mm
from lfm2_mm.errors import InputError, ModelNotFound
from lfm2_retrieval.reranking import rerank
from lfm2_retrieval.scoring import maxsim
from tests.retrieval.colbert_checkpoints import folder
from tests.retrieval.word_encoder import WordEncoder

PASSAGES = ["open the file", "die Bremse am Rad", "a wheel", "a wheel"]


def test_the_best_passage_comes_first_and_equal_ones_keep_their_order() -> None:
    found = rerank("brake and wheel", PASSAGES, encoder=WordEncoder())
    assert [place for place, _ in found][0] == 1
    order = [place for place, _ in found]
    assert order.index(2) < order.index(3) and sorted(order) == [0, 1, 2, 3]
    assert [score for _, score in found] == sorted((s for _, s in found), reverse=True)
    assert (
        rerank("brake", PASSAGES, encoder=WordEncoder(), k=2)
        == (rerank("brake", PASSAGES, encoder=WordEncoder())[:2])
    )


def test_a_checkpoint_by_name_scores_by_maxsim() -> None:
    name = str(folder("causal"))
    encoder = lfm2_mm.load(name)
    wanted = maxsim(encoder.encode_queries(["the capital"])[0], encoder.encode_documents(PASSAGES))
    found = dict(rerank("the capital", PASSAGES, encoder=name))
    assert [found[i] for i in range(4)] == pytest.approx(wanted.tolist(), abs=1e-4)


def test_no_passages_no_ranks() -> None:
    assert rerank("brake", [], encoder=WordEncoder()) == []


@pytest.mark.parametrize(
    ("query", "passages", "k", "says"),
    [
        (" ", PASSAGES, None, "the query is ' '; write what to look for"),
        ("brake", "one", None, "one text was given where a list of passages is expected"),
        ("brake", PASSAGES, 0, "k is 0; ask for at least 1 passage"),
    ],
)
def test_what_cannot_be_ranked_is_refused(query: str, passages: Any, k: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        rerank(query, passages, encoder=WordEncoder(), k=k)


def test_a_model_that_makes_no_vectors_is_refused() -> None:
    with pytest.raises(ModelNotFound, match="'nano-vl' is a Model and makes no vectors"):
        rerank("brake", PASSAGES, encoder="nano-vl")
