"""The frames between the parent and the process that parses: length-prefixed JSON, checked.

What a parser sends is data from an untrusted process: every field is checked before it is used.
This module knows nothing of pipes or formats.
"""

from __future__ import annotations

import json
import re
import struct
from typing import Any, BinaryIO, get_args

from lfm2_mm.errors import DocumentError
from lfm2_retrieval.documents.model import Block, Extract, Kind, Limits, Scalar

__all__ = ["HEADER", "METADATA_KEY", "decode", "encode", "extract_from", "message_of", "read"]

HEADER = struct.Struct(">I")
METADATA_KEY = re.compile(r"[A-Za-z_][\w.-]*")

_KINDS = frozenset(get_args(Kind))
_LANGUAGE = re.compile(r"[a-z]{2,3}")
_MAX_TITLE, _MAX_VALUE, _MAX_KEYS = 1000, 10_000, 1000


def encode(message: dict[str, Any]) -> bytes:
    """A message as a frame: its length in four bytes, then the message as UTF-8 JSON."""
    body = json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode()
    return HEADER.pack(len(body)) + body


def decode(body: bytes) -> dict[str, Any]:
    """The message of a frame's body.

    Raises:
        DocumentError: if it is no JSON object.
    """
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise _nonsense("a frame that is no JSON object")
    return message


def read(stream: BinaryIO) -> dict[str, Any] | None:
    """The next message of a stream; None at its end."""
    head = stream.read(HEADER.size)
    if len(head) < HEADER.size:
        return None
    return decode(stream.read(HEADER.unpack(head)[0]))


def message_of(extract: Extract) -> dict[str, Any]:
    """An extract as a message; `extract_from` reads it back."""
    return {
        "text": extract.text,
        "blocks": extract.blocks,
        "title": extract.title,
        "language": extract.language,
        "language_hint": extract.language_hint,
        "metadata": dict(extract.metadata),
        "row": extract.row,
    }


def extract_from(message: dict[str, Any], limits: Limits) -> Extract:
    """The extract of a message.

    Raises:
        DocumentError: if a field is missing, of another type or out of range.
    """
    text = message.get("text")
    if not isinstance(text, str) or len(text) > limits.characters:
        raise _nonsense("no text, or a longer one than it may")
    row = message.get("row")
    if row is not None and not _whole(row):
        raise _nonsense(f"the row number {row!r}")
    return Extract(
        text=text,
        blocks=_blocks(message.get("blocks"), len(text)),
        title=_title(message.get("title")),
        language=_language(message.get("language")),
        language_hint=_language(message.get("language_hint")),
        metadata=_metadata(message.get("metadata")),
        row=row,
    )


def _nonsense(what: str) -> DocumentError:
    return DocumentError(f"the process that parses files answered with {what}: the file is refused")


def _whole(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**53


def _blocks(found: Any, length: int) -> tuple[Block, ...]:
    if not isinstance(found, list):
        raise _nonsense("no list of blocks")
    blocks, at = [], 0
    for entry in found:
        if not isinstance(entry, list) or len(entry) != 6:
            raise _nonsense("a block that has not six fields")
        start, end, kind, page, line, level = entry
        numbers = all(type(n) is int for n in (start, end, level))
        places = all(n is None or _whole(n) for n in (page, line))
        if not numbers or not places or kind not in _KINDS or not at <= start <= end <= length:
            raise _nonsense("blocks that are no blocks of its text")
        blocks.append(Block(start, end, kind, page, line, level))
        at = end
    return tuple(blocks)


def _title(found: Any) -> str | None:
    if found is None:
        return None
    if not isinstance(found, str):
        raise _nonsense("a title that is no text")
    return " ".join(found.split())[:_MAX_TITLE] or None


def _language(found: Any) -> str | None:
    """The language of a code such as `de` or `de-AT`; None for anything else."""
    match = _LANGUAGE.match(found.lower()) if isinstance(found, str) else None
    return match[0] if match and found[match.end() :][:1] in ("", "-", "_") else None


def _metadata(found: Any) -> dict[str, Scalar]:
    if not isinstance(found, dict) or len(found) > _MAX_KEYS:
        raise _nonsense("no metadata, or too much")
    for key, value in found.items():
        if not METADATA_KEY.fullmatch(key) or not isinstance(value, str | int | float):
            raise _nonsense("metadata that is no scalar, or has an unusable name")
        if isinstance(value, str) and len(value) > _MAX_VALUE:
            raise _nonsense("metadata that is too long")
    return found
