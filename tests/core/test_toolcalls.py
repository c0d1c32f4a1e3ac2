from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm2_mm.toolcalls import CALL_END, CALL_START, ToolCall, parse_output


def block(body: str) -> str:
    return f"{CALL_START}{body}{CALL_END}"


def calls(raw: str) -> list[tuple[str, Any]]:
    return [(call.name, call.arguments) for call in parse_output(raw).tool_calls]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('[fn(a="x", b=1)]', [("fn", {"a": "x", "b": 1})]),
        ('[f(a=1), g(c={"k": [1, 2]})]', [("f", {"a": 1}), ("g", {"c": {"k": [1, 2]}})]),
        ("[f()]", [("f", {})]),
        ("f(a=1)", [("f", {"a": 1})]),
        ("[db.users.find(limit=-3)]", [("db.users.find", {"limit": -3})]),
        ("[get-weather(city-name='Köln')]", [("get-weather", {"city-name": "Köln"})]),
        (
            "[f(a=true, b=false, c=null, d=True, e=False, g=None)]",
            [("f", {"a": True, "b": False, "c": None, "d": True, "e": False, "g": None})],
        ),
        ("[f(a=[true, {'b': null}], c=(1, 2))]", [("f", {"a": [True, {"b": None}], "c": [1, 2]})]),
        ("[f(from='a', class=1, null=2, None=3)]",
         [("f", {"from": "a", "class": 1, "null": 2, "None": 3})]),
        ("[import(x=1)]", [("import", {"x": 1})]),
        ("[f(a=-1.5e-3, b=.5, c=-0)]", [("f", {"a": -0.0015, "b": 0.5, "c": 0})]),
        ('[f(a="x]), g(", b="say \\"hi\\"")]', [("f", {"a": "x]), g(", "b": 'say "hi"'})]),
        ('[f(a="two\nlines", b="C:\\dir\\x", c="tab\\t\\u00e9")]',
         [("f", {"a": "two\nlines", "b": "C:\\dir\\x", "c": "tab\té"})]),
        ('[f(a="\\ud83d\\ude42", b="""q"u""", c=r"\\d", d="a" "b")]',
         [("f", {"a": "🙂", "b": 'q"u', "c": "\\d", "d": "ab"})]),
        ('[f(a={1: "x"}, b=[], c={})]', [("f", {"a": {"1": "x"}, "b": [], "c": {}})]),
        (f'[f(a="{CALL_END}")]', [("f", {"a": CALL_END})]),
        ("\n[\n  f(\n a = 1,\n )\n]\n", [("f", {"a": 1})]),
        ('[{"name": "f", "arguments": {"a": [1, null]}}]', [("f", {"a": [1, None]})]),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', [("f", {"a": 1})]),
        ('[{"type": "function", "function": {"name": "f", "arguments": {}}}, {"name": "g"}]',
         [("f", {}), ("g", {})]),
    ],
)  # fmt: skip
def test_calls(body: str, expected: list[tuple[str, Any]]) -> None:
    parsed = parse_output(block(body))
    assert [(call.name, call.arguments) for call in parsed.tool_calls] == expected
    assert parsed.text == ""


@pytest.mark.parametrize(
    "body",
    [
        "",
        "[]",
        "[f(a=1",
        "[f('positional')]",
        "[f(**{'a': 1})]",
        "[f(a=1) for a in b]",
        "[f(a=__import__('os').system('true'))]",
        "[f(a=g(1))]",
        "[f(a=b)]",
        "[f(a=1 if x else 2)]",
        "[f(a=b'x')]",
        "[f(a=f'{1}')]",
        "[f(a=--1)]",
        "[f(a=1j)]",
        "[f(a=1e999)]",
        "[f(a={1, 2})]",
        "[f(a={None: 1})]",
        "[f(a={**x})]",
        "[f(a='\\ud83d')]",
        "[f(a='\0')]",
        "[f(a=1)(b=2)]",
        "[f(a=x[0])]",
        "['f']",
        "f",
        '[{"name": 1}]',
        '[{"name": ""}]',
        '[{"name": "f", "arguments": [1]}]',
        '[{"name": "f", "arguments": "broken"}]',
        '[{"name": "f", "arguments": {"a": NaN}}]',
        '[{"name": "f", "arguments": {"a": 1e999}}]',
        '[{"name": "f", "arguments": {"a": "\\ud83d"}}]',
        '[{"name": "f", "arguments": {"a": ' + "[" * 40 + "]" * 40 + "}}]",
        "[f(a=" + "[" * 40 + "]" * 40 + ")]",
        "[f(a=" + "9" * 5000 + ")]",
    ],
)
def test_what_cannot_be_read_stays_text(body: str) -> None:
    parsed = parse_output(f"before {block(body)} after ")
    assert parsed.text == f"before {block(body)} after "
    assert parsed.tool_calls == ()


def test_several_blocks_and_text_around_them() -> None:
    parsed = parse_output(f"One. {block('[f(a=1)]')} two {block('[broken(')} {block('[g()]')}")
    assert parsed.text == f"One.  two {block('[broken(')}"
    assert [call.name for call in parsed.tool_calls] == ["f", "g"]


def test_truncated_output() -> None:
    assert calls(f'{CALL_START}[f(a="x"') == []
    assert parse_output(f'{CALL_START}[f(a="x"').text == f'{CALL_START}[f(a="x"'
    assert calls(f"{CALL_START}[f(a=1)]") == [("f", {"a": 1})]  # only the marker is missing


def test_plain_text_is_untouched() -> None:
    assert parse_output("  [f(a=1)] is Python \n").text == "  [f(a=1)] is Python \n"
    assert parse_output("").text == ""


@pytest.mark.parametrize(
    ("raw", "opened", "thinking", "text"),
    [
        ("<think>\nhm\n</think>\n\nYes.", False, "hm", "Yes."),
        ("hm</think>Yes.", True, "hm", "Yes."),
        ("<think>hm</think>Yes.", True, "hm", "Yes."),
        ("hm", True, "hm", ""),
        ("<think>hm", False, "hm", ""),
        ("hm</think>Yes.", False, None, "hm</think>Yes."),
        ("The tag <think> opens.", False, None, "The tag <think> opens."),
        ("<think></think>Yes.", False, "", "Yes."),
    ],
)
def test_thinking(raw: str, opened: bool, thinking: str | None, text: str) -> None:
    parsed = parse_output(raw, thinking_open=opened)
    assert (parsed.thinking, parsed.text) == (thinking, text)


def test_calls_in_thoughts_are_thoughts() -> None:
    parsed = parse_output(f"<think>{block('[f()]')}</think>{block('[g()]')}")
    assert parsed.thinking == block("[f()]")
    assert [call.name for call in parsed.tool_calls] == ["g"]


def test_ids_are_deterministic_and_differ_within_an_output() -> None:
    first, second = parse_output(block("[f(a=1, b=2), f(a=1, b=2)]")).tool_calls
    again = parse_output(block("[f(b=2, a=1)]")).tool_calls[0]
    assert first.id == again.id != second.id
    assert first.id.startswith("call_")


def test_the_openai_form() -> None:
    call = ToolCall(name="f", arguments={"a": "é", "b": [True]}, id="call_1")
    assert call.to_openai() == {
        "id": "call_1",
        "type": "function",
        "function": {"name": "f", "arguments": '{"a": "é", "b": [true]}'},
    }


@pytest.mark.parametrize(
    "raw",
    [
        CALL_START * 20_000,
        block("[f(a=" + "-" * 50_000 + "1)]"),
        block("f" + "()" * 50_000),
        block("[f(a=" + "[" * 60_000 + ")]"),
        block("[" * 100_000),
        block('[f(a="' + "\\" * 99_999 + ")]"),
        block("[f(a=" + "'" * 90_003 + ")]"),
        (CALL_START + '[f(a="') * 5_000,
        block("[" + ", ".join(["f()"] * 200) + "]"),
        block('[f(a="' + "x" * 200_000 + '")]'),
    ],
)
def test_hostile_output_is_text_and_soon(raw: str) -> None:
    began = time.perf_counter()
    parsed = parse_output(raw)
    assert time.perf_counter() - began < 2
    assert (parsed.text, parsed.tool_calls) == (raw, ())


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text("ab ", max_size=3), below),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "from", "x_1"]), json_values, max_size=3))
def test_what_templates_render_is_read_back(arguments: dict[str, Any]) -> None:
    written = ", ".join(f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in arguments.items())
    assert calls(block(f"[tool.go({written})]")) == [("tool.go", arguments)]
    python = ", ".join(f"{k}={v!r}" for k, v in arguments.items())
    assert calls(block(f"[tool.go({python})]")) == [("tool.go", arguments)]


@settings(max_examples=150, deadline=None)
@given(st.text("[](){}\"'\\,=:-f1 \n<", max_size=40), st.booleans())
def test_never_raises(body: str, opened: bool) -> None:
    assert parse_output(block(body), thinking_open=opened).text is not None
