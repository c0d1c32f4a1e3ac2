"""Raw assistant output becomes text, thinking and tool calls.

Reads the Pythonic calls of LFM2 and LFM2.5 and LFM2's JSON form. Nothing is evaluated; whatever
cannot be read stays text, so that `parse_output` never raises. Knows nothing of templates.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "CALL_END",
    "CALL_START",
    "THINK_END",
    "THINK_START",
    "Parsed",
    "ToolCall",
    "parse_output",
]

CALL_START, CALL_END = "<|tool_call_start|>", "<|tool_call_end|>"
THINK_START, THINK_END = "<think>", "</think>"

_MAX_CHARS = 1 << 17  # of one block
_MAX_DEPTH = 32  # of nested brackets
_MAX_CALLS = 128  # in one output
_MAX_BROKEN = 128  # broken blocks, after which the rest is text
_MAX_ENDS = 4  # end markers tried for one start marker (a string may hold one)

_LITERALS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
_LEXEME = re.compile(
    r"""(?P<space>\s+)
      | (?P<string>[rRuU]?(?:'''(?:\\.|[^\\])*?'''|\"{3}(?:\\.|[^\\])*?\"{3}
                            |'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"))
      | (?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?(?!\w))
      | (?P<name>[^\W\d][\w.\-]*)
      | (?P<open>[(\[{])
      | (?P<close>[)\]}])
      | (?P<mark>[,:=\-])""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(
    r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[4-7][0-7]{2}|.)|\n|\r", re.DOTALL
)


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """One call that the model asks for.

    Attributes:
        name: The function's name, dots and hyphens included.
        arguments: JSON values by argument name.
        id: Deterministic: a digest of the call and of its place in the output.
    """

    name: str
    arguments: Mapping[str, Any]
    id: str

    def to_openai(self) -> dict[str, Any]:
        """The form of the chat-completions interface, arguments as a JSON string."""
        arguments = json.dumps(self.arguments, ensure_ascii=False)
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": arguments},
        }


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """What an assistant said.

    Attributes:
        text: The answer without thinking and without the tool calls that could be read.
        thinking: What stood in the think block, None without one.
        tool_calls: The calls in their order.
    """

    text: str
    thinking: str | None = None
    tool_calls: tuple[ToolCall, ...] = field(default=())


def parse_output(raw: str, *, thinking_open: bool = False) -> Parsed:
    """Split what a model wrote; never raises.

    A think block counts at the beginning of the output only; without its end marker everything is
    thinking. Markers must be in `raw`: decode with special tokens kept.

    Args:
        raw: The decoded output of one assistant turn.
        thinking_open: Whether the prompt already ended in `<think>`.

    Example:
        >>> parse_output('<|tool_call_start|>[add(a=1, b=[2])]<|tool_call_end|>').tool_calls[0].name
        'add'
    """
    thinking, answer = _split_thinking(raw, thinking_open)
    pieces: list[str] = []
    found: list[tuple[str, dict[str, Any]]] = []
    position = broken = 0
    while broken < _MAX_BROKEN and (start := answer.find(CALL_START, position)) >= 0:
        block = _read_block(answer, start + len(CALL_START))
        if block is None or len(found) + len(block[0]) > _MAX_CALLS:
            broken += 1
            end = start + len(CALL_START)
            pieces.append(answer[position:end])
        else:
            calls, end = block
            pieces.append(answer[position:start])
            found += calls
        position = end
    pieces.append(answer[position:])
    text = "".join(pieces)
    return Parsed(
        text=text.strip() if found else text,
        thinking=thinking,
        tool_calls=tuple(
            ToolCall(name=name, arguments=arguments, id=_call_id(index, name, arguments))
            for index, (name, arguments) in enumerate(found)
        ),
    )


def _split_thinking(raw: str, thinking_open: bool) -> tuple[str | None, str]:
    body = raw.lstrip()
    if body.startswith(THINK_START):
        body = body[len(THINK_START) :]
    elif not thinking_open:
        return None, raw
    thinking, _, answer = body.partition(THINK_END)
    return thinking.strip(), answer.lstrip()


def _read_block(text: str, start: int) -> tuple[list[tuple[str, dict[str, Any]]], int] | None:
    """The calls that begin at `start` and where their block ends, or None if it is broken."""
    end = start
    for _ in range(_MAX_ENDS):
        close = text.find(CALL_END, end)
        body_end, end = (close, close + len(CALL_END)) if close >= 0 else (len(text),) * 2
        if body_end - start > _MAX_CHARS:
            return None
        calls = _read_calls(text[start:body_end].strip())
        if calls:
            return calls, end
        if close < 0:
            return None
    return None


def _read_calls(body: str) -> list[tuple[str, dict[str, Any]]]:
    """All calls of a block in either form; empty if any part cannot be read."""
    for read in (_read_json, _read_pythonic):
        try:
            return read(body)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return []


def _read_json(body: str) -> list[tuple[str, dict[str, Any]]]:
    data = json.loads(body, strict=False, parse_constant=_refuse)
    calls = []
    for item in data if isinstance(data, list) else [data]:
        if isinstance(item, dict) and isinstance(item.get("function"), dict):
            item = item["function"]
        if not isinstance(item, dict) or not isinstance(item.get("name"), str) or not item["name"]:
            raise ValueError("not a call")
        arguments = item.get("arguments", {})
        if isinstance(arguments, str):
            arguments = json.loads(arguments or "{}", strict=False, parse_constant=_refuse)
        if not isinstance(arguments, dict):
            raise ValueError("arguments are no mapping")
        _check_json([item["name"], arguments])
        calls.append((item["name"], arguments))
    return calls


def _read_pythonic(body: str) -> list[tuple[str, dict[str, Any]]]:
    source, names = _tame(body)
    node = ast.parse(source, mode="eval").body
    return [_call(item, names) for item in (node.elts if isinstance(node, ast.List) else [node])]


def _tame(body: str) -> tuple[str, list[str]]:
    """Check the lexemes and return source that is harmless to `ast`, and the names taken out.

    Every name becomes `n<index>`, so that keywords, dots and hyphens are allowed in names and no
    operator but a single minus is left; with the depth of brackets bounded and no bracket opened
    right behind a closed one, the parser's recursion is bounded too. Raw newlines and unknown
    escapes in strings, which models write, are made legal.
    """
    out: list[str] = []
    names: list[str] = []
    position = depth = 0
    last = ""
    while position < len(body):
        match = _LEXEME.match(body, position)
        if match is None:
            raise ValueError(f"unexpected {body[position]!r}")
        kind, lexeme, position = str(match.lastgroup), match.group(), match.end()
        if kind == "space":
            continue
        if kind == "open":
            depth += 1
            if depth > _MAX_DEPTH or last == "close":
                raise ValueError("nested too deeply")
        elif kind == "close":
            depth -= 1
        elif kind == "string":
            if last == "name":
                raise ValueError("a string prefix")
            if lexeme[0] not in "rR":
                lexeme = _ESCAPE.sub(_legal_escape, lexeme)
        elif kind == "name":
            names.append(lexeme)
            lexeme = f"n{len(names) - 1}"
        elif lexeme == "-" == last:
            raise ValueError("two signs")
        out.append(lexeme)
        last = lexeme if kind == "mark" else kind
    return " ".join(out), names


def _legal_escape(match: re.Match[str]) -> str:
    """An escape as Python wants it; a backslash that escapes nothing stands for itself."""
    found = match.group()
    if found in "\n\r":
        return "\\n" if found == "\n" else "\\r"
    known = found[1] in "\\'\"abfnrtv01234567\n" if len(found) == 2 else found[1] in "xuU"
    return found if known else "\\" + found


def _call(node: ast.expr, names: list[str]) -> tuple[str, dict[str, Any]]:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        raise ValueError("not a call with named arguments")
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("an argument without a name")
        arguments[_name(keyword.arg, names)] = _value(keyword.value, names)
    return _name(node.func.id, names), arguments


def _name(mangled: str, names: list[str]) -> str:
    return names[int(mangled[1:])]


def _value(node: ast.expr, names: list[str]) -> Any:
    match node:
        case ast.Constant(value=value) if value is None or isinstance(value, str | int | float):
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError("a number that JSON cannot hold")
            if isinstance(value, str):  # joins escaped surrogate pairs; a lone one is a ValueError
                return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
            return value
        case ast.Name(id=mangled) if _name(mangled, names) in _LITERALS:
            return _LITERALS[_name(mangled, names)]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=number)) if isinstance(
            number, int | float
        ) and math.isfinite(number):
            return -number
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item, names) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {_key(k): _value(v, names) for k, v in zip(keys, values, strict=True)}
    raise ValueError("not a literal")


def _key(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int):
        return str(node.value)
    raise ValueError("not a key")


def _check_json(value: Any) -> None:
    """Refuse what the Pythonic form refuses: too deep, infinite, or not encodable."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = list(_below(level))
        if not level:
            return
    raise ValueError("nested too deeply")


def _below(level: list[Any]) -> Iterator[Any]:
    for value in level:
        if isinstance(value, dict):
            yield from value
            yield from value.values()
        elif isinstance(value, list):
            yield from value
        elif isinstance(value, str):
            value.encode()
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError("a number that JSON cannot hold")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _call_id(index: int, name: str, arguments: Mapping[str, Any]) -> str:
    content = json.dumps([index, name, arguments], sort_keys=True, ensure_ascii=True)
    return "call_" + hashlib.sha256(content.encode()).hexdigest()[:24]
