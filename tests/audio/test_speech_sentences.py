"""The sentence world: at most 300 words, splits that never meet, the same each time."""

from __future__ import annotations

import re

import pytest

from lfm2_audio.speech.sentences import (
    CAPITALS,
    KINDS,
    is_held_out,
    lexicon,
    number,
    sentence,
    stream,
)
from lfm2_audio.speech.voices import HELD_OUT_VARIANTS, TRAIN_VARIANTS, voice


def test_the_vocabulary_is_small_and_sorted() -> None:
    words = lexicon()
    assert 200 < len(words) <= 300
    assert list(words) == sorted(set(words))
    assert {"zero", "an", "mice", "paris", "wednesday"} <= set(words)
    assert all(word.isalpha() and word.islower() for word in words)


@pytest.mark.parametrize(
    ("n", "text"), [(0, "zero"), (11, "eleven"), (40, "forty"), (99, "ninety nine")]
)
def test_numbers(n: int, text: str) -> None:
    assert number(n) == text


def test_every_sentence_is_of_known_words() -> None:
    known = set(lexicon())
    for i in range(500):
        text, kind = sentence(3, i)
        assert kind in KINDS
        assert set(text.split()) <= known, text
        assert text == " ".join(text.split())


def test_the_grammar_is_not_a_short_list() -> None:
    assert len({sentence(1, i)[0] for i in range(1000)}) > 700


def test_splits_never_share_a_sentence() -> None:
    train = {sentence(1, i)[0] for i in range(600)}
    held_out = {sentence(2, i, "held_out")[0] for i in range(200)}
    assert not train & held_out
    assert not any(is_held_out(text) for text in train)
    assert all(is_held_out(text) for text in held_out)


def test_a_sentence_is_a_pure_function() -> None:
    assert sentence(5, 7) == sentence(5, 7)
    assert sentence(5, 7) == ("what is the capital of japan", "capital")
    assert len({sentence(seed, 7)[0] for seed in range(20)}) > 10


def test_a_kind_can_be_asked_for() -> None:
    for i in range(20):
        text, kind = sentence(0, i, kind="capital")
        assert kind == "capital" and "capital of" in text
        assert any(country in text for country in CAPITALS)


def test_a_before_a_vowel() -> None:
    texts = " . ".join(sentence(8, i, kind="statement")[0] for i in range(300))
    assert " an " in texts
    assert not re.search(r" a [aeio]", texts)


def test_voices_of_the_splits_differ() -> None:
    assert not set(TRAIN_VARIANTS) & set(HELD_OUT_VARIANTS)
    train = {voice(stream(i)).variant for i in range(300)}
    held_out = {voice(stream(i), "held_out").variant for i in range(300)}
    assert train <= set(TRAIN_VARIANTS) and len(train) > 40
    assert held_out == set(HELD_OUT_VARIANTS)


def test_a_voice_has_a_name_for_the_program() -> None:
    one = voice(stream("x"))
    assert one.name == f"{one.accent}+{one.variant}"
    assert 100 < one.speed < 220 and 0 <= one.pitch <= 99
