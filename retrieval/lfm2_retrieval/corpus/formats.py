"""Readers of message files other than gettext and JSON: properties files and JavaScript modules.

Each gives pairs of a key and its text, a key being its names from outside in, joined by NUL.
Nothing is run: a module is read as tokens. Knows no languages and no packages.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

__all__ = ["module_texts", "properties_texts"]

_TOKEN = re.compile(
    r"""\s+|//[^\n]*|/\*.*?\*/"""
    r"""|(?P<text>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|`(?:[^`\\]|\\.)*`)"""
    r"""|(?P<name>[\w$.-]+)|(?P<mark>.)""",
    re.DOTALL,
)
_ESCAPE = re.compile(
    r"\\(?:u\{([0-9a-fA-F]+)\}|u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|(.))", re.DOTALL
)
_SHORT = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "b": "\b", "v": "\v", "0": "\0", "\n": ""}
_PAIR = re.compile(r"((?:[^\\:=\s]|\\.)+)\s*[:=]?\s*(.*)")


def properties_texts(text: str) -> Iterator[tuple[str, str]]:
    """The entries of a Java properties file, without escapes, a doubled apostrophe as one."""
    joined = re.sub(r"(?<!\\)((?:\\\\)*)\\\r?\n[ \t]*", r"\1", text)
    for line in joined.splitlines():
        found = _PAIR.fullmatch(line.strip())
        if found is not None and line.lstrip()[:1] not in "#!" and found[2]:
            yield _plain(found[1]), _plain(found[2]).replace("''", "'")


def module_texts(text: str) -> Iterator[tuple[str, str]]:
    """The strings of a JavaScript module that stand behind a name and `:` or `=`.

    What stands in braces is keyed under the name before them, but for the outermost, which is the
    language's or AMD's `root`; strings added with `+` are one. Strings in arrays, and those that a
    function returns, are left out.
    """
    outer: list[str] = []
    last, key, value = "", "", None
    for found in _TOKEN.finditer(text):
        kind, token = found.lastgroup, found[0]
        if kind is None:
            continue
        if kind == "text":
            token = _plain(token[1:-1])
            if key:
                value = (value or "") + token
            last = token
            continue
        if kind == "mark" and token == "+" and value is not None:
            continue
        if value is not None and kind == "mark" and token in ",};":
            inner = outer[2:] if outer[1:2] == ["root"] else outer[1:]
            yield "\0".join([*inner, key]), value
        if kind == "name":
            last, key, value = token, "", None
        elif token in ":=":
            last, key, value = "", last if value is None else "", None
        elif token == "{":
            outer.append(key)
            last, key, value = "", "", None
        elif token == "}":
            del outer[-1:]
            last, key, value = "", "", None
        elif token != "]":
            last, key, value = "", "", None


def _plain(text: str) -> str:
    return _ESCAPE.sub(_meant, text)


def _meant(found: re.Match[str]) -> str:
    code = found[1] or found[2] or found[3]
    if code is not None:
        return chr(int(code, 16))
    return _SHORT.get(found[4], found[4])
