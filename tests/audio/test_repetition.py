from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm2_audio.repetition import LoopWatch, cut_loops, find_loop

SENTENCE = "the meeting was moved to Thursday because the room is taken"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no no no no, I said",
        "very, very, very, very, very good",
        "one two three one two three one two three",
        f"{SENTENCE}. {SENTENCE}.",
        "10 000 000 000 000",
        "はははははは、そうですね。そうですね。",
        "ha ha ha ha ha ha ha",
    ],
)
def test_what_people_say_is_left_alone(text: str) -> None:
    assert cut_loops(text) == (text, False)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("thank you " * 20, "thank you"),
        ("Thank you. Thank you, thank you! " * 4, "Thank you."),
        (f"so {SENTENCE} " + f"{SENTENCE} " * 2, f"so {SENTENCE}"),
        ("and then " + "no " * 15 + "it ended", "and then no it ended"),
        ("ですね" * 13, "ですね"),
        ("ja" + "la" * 30 + " gut", "jala gut"),
        ("go on " * 9 + "go", "go on"),
        ("a b c d " * 5 + SENTENCE, f"a b c d {SENTENCE}"),
    ],
)
def test_one_copy_is_left_of_a_loop(text: str, left: str) -> None:
    assert cut_loops(text) == (left, True)


@given(
    st.lists(
        st.sampled_from(["so", "red", "Haus", "ni", "42"]), min_size=1, max_size=9, unique=True
    ),
    st.integers(12, 30),
)
def test_any_phrase_said_often_is_found_and_cut_once_for_all(words: list[str], times: int) -> None:
    phrase = " ".join(words)
    text = f"begin {phrase} " + f"{phrase} " * times + "end"
    left, looped = cut_loops(text)
    assert looped and left == f"begin {phrase} end"
    assert cut_loops(left) == (left, False)


@given(st.text(alphabet="ab ", max_size=200))
def test_cutting_ends_and_never_makes_text(text: str) -> None:
    left, looped = cut_loops(text)
    assert find_loop(left) is None
    assert len(left) < len(text) if looped else left == text
    assert set(left) <= set(text)


def test_the_place_of_a_loop_is_said() -> None:
    loop = find_loop("well " + "you know " * 8)
    assert loop is not None
    assert (loop.start, loop.once, loop.end, loop.times) == (5, 13, 5 + 8 * 9 - 1, 8)


def test_a_watch_stops_soon_after_a_loop_began_and_not_before() -> None:
    watch = LoopWatch()
    assert not any(watch.feed(word + " ") for word in (SENTENCE + " ").split() * 2)
    said = 0
    while not watch.feed("thank you "):
        said += 1
        assert said < 12
    assert said >= 5


def test_a_loop_that_ended_does_not_stop_what_follows() -> None:
    watch = LoopWatch(every=1)
    watch.feed("thank you " * 10)
    assert not watch.feed(SENTENCE)
