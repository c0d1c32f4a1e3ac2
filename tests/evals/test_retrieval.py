"""The task `retrieval`: directions, the trigram baseline, fusion, floors, the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from lfm2_evals.retrieval import (
    TIERS,
    Direction,
    Directions,
    Found,
    Item,
    Run,
    evaluate,
    fused,
    right,
)
from lfm2_evals.retrieval_report import RetrievalReport
from lfm2_evals.trigrams import trigram_scores, trigrams
from lfm2_mm.errors import SettingError

NUMBERS = ("one", "two", "three", "four", "five", "six")


def items(kind: str = "packages") -> list[Item]:
    """Six things said in all languages: the language's name, then the thing."""
    made = []
    for number in NUMBERS:
        texts = {lang: f"{lang} word {number}" for lang in _LANGUAGES}
        made.append(Item(kind, texts, {lang: f"{lang} bare {number}" for lang in _LANGUAGES}))
    return made


_LANGUAGES = ("en", "de", "fr", "es", "it", "pt", "ru", "ja", "ko", "zh", "ar")


class Knowing:
    """An encoder that knows the thing whatever the language."""

    name = "knowing"

    def encode_queries(self, texts: Sequence[str]) -> list[NDArray[np.float32]]:
        return self.encode_documents(texts)

    def encode_documents(self, texts: Sequence[str]) -> list[NDArray[np.float32]]:
        rows = np.eye(len(NUMBERS), dtype=np.float32)
        return [rows[[NUMBERS.index(text.split()[-1])]] for text in texts]


class Blind(Knowing):
    """An encoder to which all texts are one."""

    def encode_documents(self, texts: Sequence[str]) -> list[NDArray[np.float32]]:
        return [np.ones((2, 3), dtype=np.float32) for _ in texts]


def test_trigrams_prefer_what_shares_rare_ones() -> None:
    assert trigrams("Ab") == {" ab": 1, "ab ": 1}
    scores = trigram_scores(["der Computer"], ["the computer", "the table", "猫"])
    assert scores[0, 0] > scores[0, 1] >= 0
    assert scores[0, 2] == 0
    np.testing.assert_allclose(trigram_scores(["abc", "xyz"], ["abc", "xyz"]), np.eye(2), atol=1e-6)


def test_right_means_strictly_the_best() -> None:
    scores = np.array([[2, 1, 0], [1, 1, 0], [0, 3, 2]], dtype=np.float32)
    assert right(scores).tolist() == [True, False, False]


def test_fusion_is_by_rank_and_ignores_what_shares_nothing() -> None:
    late = np.array([[3.0, 2.0, 1.0]], dtype=np.float32)
    lexical = np.array([[0.0, 0.9, 0.1]], dtype=np.float32)
    table = fused(late, lexical)
    np.testing.assert_allclose(table, [[1 / 61, 1 / 62 + 1 / 61, 1 / 63 + 1 / 62]], rtol=1e-6)


def test_only_one_script_is_stripped_of_literals() -> None:
    task = Directions(count=6, items=items())
    assert task.direction("en", "de").queries[0] == "en bare one"
    assert task.direction("en", "ja").queries[0] == "en word one"
    assert task.direction("en", "de").same_script
    assert not task.direction("ja", "zh").same_script


def test_answers_stand_in_the_rows_of_their_questions() -> None:
    given = [*items(), *items("frames"), Item("packages", {"en": "two words", "ja": "x"}, {})]
    one = Directions(count=6, items=given).direction("en", "ja")
    assert [q.split()[-1] for q in one.queries] == [c.split()[-1] for c in one.candidates]
    assert len(one.candidates) == 6
    more = Directions(count=50, items=given).direction("en", "ja")
    assert (len(more.queries), len(more.candidates)) == (6, 7)


def test_a_knowing_encoder_finds_everything_and_a_blind_one_nothing() -> None:
    task = Directions(count=6, items=items())
    seen: list[tuple[int, int]] = []
    run = evaluate(task, Knowing(), progress=lambda done, total: seen.append((done, total)))
    assert run.complete
    assert seen[-1] == (62, 62)
    assert all(one.late.all() and one.n == 6 for one in run.found)
    assert not any(one.late.any() for one in evaluate(task, Blind()).found)


def _found(late: int, trigram: int, hybrid: int, n: int, target: str = "ja") -> Found:
    one = Direction("en", target, ("q",) * n, ("c",) * n)
    return Found(one, *(np.arange(n) < share for share in (late, trigram, hybrid)))


def test_floors() -> None:
    assert _found(150, 149, 0, 300).reached
    assert not _found(149, 10, 200, 300).reached
    assert not _found(200, 200, 300, 300).reached
    assert _found(10, 100, 101, 300, "de").reached
    assert not _found(300, 100, 100, 300, "de").reached
    assert not _found(200, 0, 0, 299).has_floor


def test_report_says_what_is_reached(tmp_path: Path) -> None:
    run = Run("packages", 3, [_found(200, 30, 210, 300), _found(1, 0, 1, 10)])
    report = RetrievalReport(facts={"model": "m"}, runs=[run])
    text = report.markdown()
    assert "| en → ja | 300 | 66.7 | 61.2 to 71.8 | 10.0 |" in text
    assert "reached |" in text
    assert "Stopped early" in text
    assert "1 of 1 directions with at least 300 questions reach their floor" in text
    paths = report.write(tmp_path, "retrieval")
    assert [path.name for path in paths] == ["retrieval.md", "retrieval.json", "retrieval.svg"]
    told = json.loads(paths[1].read_text())
    assert told["floors"] == {"reached": 1, "of": 1}
    assert told["tiers"]["packages"]["directions"][1]["floor"] is None


@pytest.mark.parametrize(
    ("tier", "count", "said"),
    [
        ("cores", 5, "the tier is 'cores'; choose from packages, frames"),
        ("frames", 1, "the number of candidates is 1; ask for at least 2"),
    ],
)
def test_bad_settings(tier: str, count: int, said: str) -> None:
    with pytest.raises(SettingError) as caught:
        Directions(tier, count=count)
    assert str(caught.value) == said


def test_held_out_directions_are_large_enough_for_floors() -> None:
    task = Directions()
    for source, target in (("en", "ja"), ("ar", "ko"), ("zh", "ar"), ("de", "fr"), ("en", "ru")):
        one = task.direction(source, target)
        assert len(one.queries) >= 300, (source, target)
        assert len(one.candidates) == 1000
    assert set(TIERS) == {"packages", "frames"}
