from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lfm2_retrieval.highlight import Snippet, align, background, pieces, snippet, spans
from tests.retrieval.word_encoder import WordEncoder

PASSAGE = "The wheel is loose, and the brake of the bicycle squeals. Oil it."


def marked(query: str, text: str) -> list[str]:
    found = spans(align(WordEncoder(), query, [text])[0])
    assert all(0 <= a < b <= len(text) and 0 < w <= 1 for a, b, w in found)
    assert all(one[1] <= other[0] for one, other in zip(found, found[1:], strict=False))
    return [text[a:b] for a, b, _ in found]


def test_words_that_mean_the_same_light_up_in_any_language() -> None:
    assert marked("Bremse, Rad", PASSAGE) == ["wheel", "brake"]
    assert marked("brake", "自転車のブレーキを見る") == ["ブレーキ"]


def test_everyday_words_and_punctuation_stay_dark() -> None:
    assert marked("The brake of it, and is it the one?", PASSAGE) == ["brake"]
    assert marked("and the , .", PASSAGE) == []


def test_every_occurrence_lights_up() -> None:
    assert marked("brake", "brake, Bremse; brake") == ["brake", "Bremse", "brake"]


def test_a_part_of_a_word_lights_the_whole_word() -> None:
    assert marked("brake", "a new brakepad!") == ["brakepad"]


def test_nothing_lights_up_without_words() -> None:
    encoder = WordEncoder()
    assert align(encoder, "brake", []) == []
    assert marked("", PASSAGE) == [] and marked("brake", "") == []
    assert marked("brake", "… —") == []


def test_vectors_that_are_known_are_not_made_again_unless_merged() -> None:
    encoder = WordEncoder()
    whole = encoder.encode_documents([PASSAGE])[0]
    other = align(encoder, "brake", [PASSAGE], [torch.roll(whole, 1, 0)])[0]
    same, merged = align(encoder, "brake", [PASSAGE] * 2, [whole, whole[::2]])
    assert spans(same) == spans(merged) != spans(other)


def test_the_score_is_maxsim() -> None:
    encoder = WordEncoder()
    query, document = encoder.encode_queries(["brake it"])[0], encoder.encode_documents(["it"])[0]
    found = align(encoder, "brake it", ["it"])[0]
    assert abs(found.score - float((query @ document.T).max(1).values.sum())) < 1e-5
    assert found.heat.shape == (2,) and float(found.heat[0]) == 0


def test_the_background_is_encoded_once() -> None:
    encoder = WordEncoder()
    assert background(encoder) is background(encoder)
    assert background(encoder) is not background(WordEncoder())


def test_a_short_text_is_its_own_snippet() -> None:
    assert snippet("one two", [(0, 3, 1.0)]) == Snippet(
        "one two", ((0, 3, 1.0),), 0, (False, False)
    )


def test_a_snippet_holds_the_best_words_and_begins_at_a_sentence() -> None:
    text = "Nothing here. " * 40 + "Here brake and wheel. " + "Nothing more. " * 40
    at = text.index("brake")
    weak = (text.index("Nothing"), 7, 0.1)
    found = snippet(text, [weak, (at, at + 5, 0.9), (at + 10, at + 15, 0.8)], width=100)
    assert [found.text[a:b] for a, b, _ in found.spans] == ["brake", "wheel"]
    assert found.text.startswith(("Nothing", "Here")) and found.cut == (True, True)
    assert text[found.start :].startswith(found.text) and len(found.text) <= 100


def test_without_matches_a_snippet_is_the_beginning() -> None:
    found = snippet("word " * 100, [], width=50)
    assert found.start == 0 and found.cut == (False, True) and len(found.text) <= 50


@given(st.text(max_size=300), st.data())
def test_pieces_make_up_the_text(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    found = [(a, b, 0.5) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
    assert "".join(piece for piece, _ in pieces(text, found)) == text
    stretch = snippet(text, found, width=60)
    assert "".join(piece for piece, _ in stretch.pieces()) == stretch.text
    assert text[stretch.start : stretch.start + len(stretch.text)] == stretch.text
    assert len(stretch.text) <= 60 or len(text) <= 60
