"""The embedded retriever: small, and it finds what texts mean across languages and scripts.

Bounds are well below what `lfm2-mm eval retrieval` measured (docs/LOG.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lfm2_mm
from lfm2_evals.retrieval import Directions, Found, evaluate
from lfm2_mm.locate import locate
from lfm2_retrieval.corpus.sources import HELD_OUT_PACKAGES, SOURCES
from lfm2_retrieval.reranking import rerank

TAUGHT = {
    "ja": "猫の餌",
    "de": "Das Fahrrad reparieren",
    "ar": "درجة الحرارة في الليل",
    "es": "el billete de tren",
}
ASKED = {"cat food": "ja", "repair a bicycle": "de", "temperature at night": "ar"}


@pytest.fixture(scope="module")
def encoder() -> Any:
    return lfm2_mm.load("nano-colbert", device="cpu")


@pytest.fixture(scope="module")
def found(encoder: Any) -> dict[str, Found]:
    task = Directions(count=300)
    chosen = [("en", "ja"), ("ar", "en"), ("zh", "ko"), ("de", "en"), ("fr", "es")]
    task.names = lambda: chosen  # type: ignore[method-assign]  # the others take minutes
    run = evaluate(task, encoder)
    return {f"{one.direction.source}-{one.direction.target}": one for one in run.found}


@pytest.mark.parametrize("direction", ["en-ja", "ar-en", "zh-ko"])
def test_it_finds_across_scripts_what_trigrams_cannot(
    found: dict[str, Found], direction: str
) -> None:
    one = found[direction]
    assert one.n >= 200
    assert one.late.mean() > 0.5
    assert one.late.mean() > 3 * one.trigrams.mean()


@pytest.mark.parametrize("direction", ["de-en", "fr-es"])
def test_it_finds_within_a_script_more_than_trigrams(
    found: dict[str, Found], direction: str
) -> None:
    one = found[direction]
    assert one.late.mean() > 0.6
    assert one.hybrid.mean() > one.trigrams.mean()


@pytest.mark.parametrize(("query", "language"), ASKED.items())
def test_it_knows_everyday_words(encoder: Any, query: str, language: str) -> None:
    best, _ = rerank(query, list(TAUGHT.values()), encoder=encoder)[0]
    assert list(TAUGHT)[best] == language


def test_it_is_small_and_says_what_it_learnt_from() -> None:
    folder = Path(locate("nano-colbert").folder)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 7_000_000
    card = (folder / "README.md").read_text(encoding="utf-8")
    for source in SOURCES:
        assert (f"| {source.package} |" in card) is (source.package not in HELD_OUT_PACKAGES)
