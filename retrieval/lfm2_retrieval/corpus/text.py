"""Cleaning of catalog messages, and what counts as a literal in them.

Messages are written for programs: they hold placeholders, tags and accelerators that no document
has. Knows no file format, no language and no model.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

__all__ = ["clean", "key", "literals", "strip_literals"]

_RULES = (
    ("[\\u200b\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069\\ufeff]", ""),  # marks of direction
    (r"!?\[([^\]]*)\]\([^)]*\)", r"\1"),  # Markdown links keep their text
    (r"https?://\S+", " "),
    (r"</?[A-Za-z][^<>]*/?>", " "),
    (r"\(\s*[&_]\w\s*\)", " "),  # the accelerators of Japanese, Chinese and Korean menus
    (r"%\(\w+\)[-#0-9. +]*[a-zA-Z]", " "),
    (r"%\d*\$?[-#0-9.l]*[sdifrxu](?![A-Za-z])", " "),
    (r"[$%]?\{\{?[^{}]*\}?\}", " "),
    (r"\[\[[^\]]*\]\]|\[[A-Z][A-Z_]+\]", " "),
    (r":(?:ref|doc|class|func|meth|mod):`([^`]*)`", r"\1"),
    (r"[`*]{1,3}", " "),
    (r"&(?=\w)", ""),
    (r"\\[nt]", " "),
    (r"\s+([.,;:!?)、。，：])", r"\1"),
    (r"\s+", " "),
)
_COMPILED = tuple((re.compile(pattern), into) for pattern, into in _RULES)
_REFUSED = re.compile(r"\bplural,|\bselect,|\[%key:|&[A-Z]\w+;")
_LITERAL = re.compile(
    r"(?=\S*\d)\S+"  # anything with a digit
    r"|\S*[_/\\@#=<>~|]\S*"  # paths, options, identifiers
    r"|\w+(?:\.\w+)+\S*"  # dotted names
    r"|--?[a-z]\S*"
    r"|\b[A-Z]{2,}s?\b"  # acronyms
    r"|\b\w*[a-z][A-Z]\w*\b"  # camel case
)
_LATIN = re.compile(r"[A-Za-z]{2,}")


def clean(text: str) -> str:
    """The message without placeholders, tags and accelerators; "" if it is no plain text."""
    if _REFUSED.search(text):
        return ""
    text = html.unescape(text)
    for pattern, into in _COMPILED:
        text = pattern.sub(into, text)
    return text.strip(" \t:;,-–—…=()[]\"'·•|>")


def key(text: str) -> str:
    """What two texts share that say the same: letters and digits only, without case."""
    return "".join(c for c in text.casefold() if c.isalnum())


def literals(texts: Iterable[str]) -> frozenset[str]:
    """Latin words, without case, that stand unchanged in texts of other scripts: product names."""
    return frozenset(word.casefold() for text in texts for word in _LATIN.findall(text))


def strip_literals(text: str, names: frozenset[str] = frozenset()) -> str:
    """The text without numbers, paths, options, acronyms, identifiers and the given words."""
    text = _LITERAL.sub(" ", text)
    text = re.sub(r"\w+", lambda m: " " if m[0].casefold() in names else m[0], text)
    return re.sub(r"\s+", " ", text).strip(" .,:;-–—()[]\"'!?")
