"""Streamed pieces join to what the parser makes of the whole text, however it is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm2_mm.server.deltas import Delta, Splitter
from lfm2_mm.toolcalls import parse_output

CALL = '<|tool_call_start|>[paint(colour="red"), stop()]<|tool_call_end|>'
TEXTS = [
    "",
    "plain text, a < b and <thin> things",
    "  blanks at both ends \n ",
    "<think>so so</think>\n\nThe answer.",
    "\n<think>never ends",
    "<think></think>short",
    CALL,
    f"I shall paint. \n{CALL}",
    f"{CALL} Done.",
    f"<think>hm</think> {CALL}",
    "broken <|tool_call_start|>[paint(",
    "almost <|tool_call_star and on",
    "text with <think> in the middle</think>",
]


def joined(text: str, cuts: list[int], thinking_open: bool) -> tuple[str, str, int]:
    splitter = Splitter(thinking_open=thinking_open)
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    deltas = [splitter.push(text[a:b]) for a, b in zip(places, places[1:], strict=False)]
    deltas.append(splitter.end())
    return (
        "".join(delta.content for delta in deltas),
        "".join(delta.reasoning for delta in deltas),
        sum(len(delta.tool_calls) for delta in deltas),
    )


@pytest.mark.parametrize("thinking_open", [False, True])
@pytest.mark.parametrize("text", TEXTS)
@given(cuts=st.lists(st.integers(0, 90), max_size=20))
def test_however_it_is_cut(text: str, thinking_open: bool, cuts: list[int]) -> None:
    content, reasoning, calls = joined(text, cuts, thinking_open)
    parsed = parse_output(text, thinking_open=thinking_open)
    assert calls == len(parsed.tool_calls)
    assert reasoning.strip() == (parsed.thinking or "")
    if calls:
        assert "".join(content.split()) == "".join(parsed.text.split())
    else:
        assert content == parsed.text


def test_text_is_not_held_back_for_long() -> None:
    splitter = Splitter()
    assert splitter.push("Hello") == Delta("Hello")
    assert splitter.push(" ") == Delta()
    assert splitter.push("there <") == Delta(" there")
    assert splitter.push("b") == Delta(" <b")
