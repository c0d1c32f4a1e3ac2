from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm2_mm.errors import InputError
from lfm2_mm.text_stream import TextStream
from tests.core.tiny_tokenizer import SPECIALS, sentencepiece_backend, tiny_tokenizer

BYTE_LEVEL = tiny_tokenizer()
PIECES = sentencepiece_backend()
BYTES = {bytes([i]): token for i, token in enumerate(f"<0x{i:02X}>" for i in range(256))}

texts = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from("ab 你好🙂👩‍👩‍👧\n\N{REPLACEMENT CHARACTER}"),
    ),
    max_size=40,
).filter(lambda text: not any(special in text for special in SPECIALS))


def byte_ids(text: str) -> list[int]:
    """One id of the byte-level tokenizer for each byte: every character is split."""
    alphabet = BYTE_LEVEL.hf.backend_tokenizer.pre_tokenizer
    spelled = "".join(piece for piece, _ in alphabet.pre_tokenize_str(text))
    ids = [BYTE_LEVEL.token_id(char) for char in spelled]
    assert None not in ids
    return [id_ for id_ in ids if id_ is not None]


def run(stream: TextStream, ids: list[int]) -> list[str]:
    return [*(stream.push(id_) for id_ in ids), stream.flush()]


@settings(max_examples=150, deadline=None)
@given(texts, st.booleans())
def test_byte_level_pieces_join_to_the_whole(text: str, split: bool) -> None:
    ids = byte_ids(text) if split else BYTE_LEVEL.encode(text)
    pieces = run(TextStream(BYTE_LEVEL.decode), ids)
    assert "".join(pieces) == BYTE_LEVEL.decode(ids) == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, BYTE_LEVEL.vocab_size - 1), max_size=60), st.booleans())
def test_any_ids_join_to_the_whole(ids: list[int], skip_special: bool) -> None:
    decode = partial(BYTE_LEVEL.decode, skip_special=skip_special)
    assert "".join(run(TextStream(decode), ids)) == decode(ids)


spelled = st.lists(
    st.one_of(
        st.sampled_from(["▁", "▁the", "▁cat", "s", "a", "t", "é", "▁你", "好", ".", "<s>"]).map(
            lambda word: [word]
        ),
        st.sampled_from("🙂ñ界z").map(lambda char: [BYTES[bytes([b])] for b in char.encode()]),
    ),
    max_size=30,
)


@settings(max_examples=200, deadline=None)
@given(spelled)
def test_leading_spaces_and_byte_fallback(words: list[list[str]]) -> None:
    ids = [
        id_ for word in words for token in word if (id_ := PIECES.token_to_id(token)) is not None
    ]
    assert len(ids) == sum(map(len, words))
    pieces = run(TextStream(PIECES.decode), ids)
    assert "".join(pieces) == PIECES.decode(ids)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def chars(text: str) -> list[int]:
    return [ord(char) for char in text]


def decode_chars(ids: list[int]) -> str:
    return "".join(map(chr, ids))


@settings(max_examples=300, deadline=None)
@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=5), max_size=3))
def test_stop_strings_cut_where_the_first_is_complete(text: str, stops: list[str]) -> None:
    stream = TextStream(decode_chars, stop=stops)
    got = "".join(run(stream, chars(text)))
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert got == (text[: min(ends)[1]] if ends else text)
    assert stream.stopped == bool(ends)


def test_a_possible_stop_string_is_held_back_and_no_more() -> None:
    stream = TextStream(decode_chars, stop="END")
    assert [stream.push(id_) for id_ in chars("xENEND")] == ["x", "", "", "EN", "", ""]
    assert stream.stopped
    assert stream.push(ord("y")) == "" == stream.flush()


def test_a_stop_string_inside_one_token() -> None:
    stream = TextStream(lambda ids: "".join(["", "one STOP two"][id_] for id_ in ids), stop="STOP")
    assert (stream.push(1), stream.stopped) == ("one ", True)


def test_half_a_character_at_the_end_is_what_decoding_says() -> None:
    stream = TextStream(BYTE_LEVEL.decode)
    ids = byte_ids("a🙂")[:-1]
    assert [stream.push(id_) for id_ in ids] == ["a", "", "", ""]
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"
    assert stream.flush() == ""


def test_skipped_ids_are_not_decoded() -> None:
    image = SPECIALS.index("<image>")
    stream = TextStream(partial(BYTE_LEVEL.decode, skip_special=False), skip={image})
    ids = BYTE_LEVEL.encode("a<image>b")
    assert "".join(run(stream, ids)) == "ab"


@pytest.mark.parametrize(
    "ids",
    [
        byte_ids("ab " * 700),
        byte_ids("\N{REPLACEMENT CHARACTER}" * 700),
        [2] * 2000,
        byte_ids("é")[:1] * 2000,
    ],
    ids=["text", "genuine U+FFFD", "special tokens", "invalid bytes"],
)
def test_the_cost_of_decoding_is_linear(ids: list[int]) -> None:
    decoded = 0

    def decode(some: list[int]) -> str:
        nonlocal decoded
        decoded += len(some)
        return BYTE_LEVEL.decode(some)

    assert "".join(run(TextStream(decode), ids)) == BYTE_LEVEL.decode(ids)
    assert decoded < 20 * len(ids)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InputError, match="a stop string is empty, .*; leave it out"):
        TextStream(decode_chars, stop=["x", ""])
