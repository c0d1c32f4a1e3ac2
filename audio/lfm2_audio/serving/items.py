"""`conversation.item.create`: what a client puts into a realtime conversation.

Knows the JSON form of items; no loop.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from lfm2_audio.serving.calling import Call
from lfm2_audio.serving.schema import refused
from lfm2_audio.serving.sounding import RATE
from lfm2_audio.waveform import Audio

__all__ = ["Item", "item_of", "sound_of"]

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_LONGEST = 20_000  # characters
_KINDS = ("message", "function_call", "function_call_output")
_PARTS = {"user": ("input_text", "text"), "assistant": ("output_text", "text")}


@dataclass(frozen=True, kw_only=True)
class Item:
    """What was put.

    Attributes:
        id: The client's own name for it.
        role: Who said it.
        content: Text, from the user also sound, from the assistant also a call.
        shown: The item as clients see it, without its id, where it is no message.
        after: The item behind which it stands, or `root`; None is behind all others.
    """

    id: str | None
    role: Literal["user", "assistant"]
    content: str | Audio | Call
    shown: dict[str, Any] | None = None
    after: str | None = None


def sound_of(data: bytes) -> Audio:
    """Samples of the API: little-endian, 16 bits, mono, at `RATE`."""
    samples = np.frombuffer(data, dtype="<i2").astype(np.float32) / 32768
    return Audio(torch.from_numpy(samples), RATE)


def item_of(event: dict[str, Any], called: Callable[[str], str | None]) -> Item:
    """Read a `conversation.item.create`.

    Args:
        event: The event.
        called: Gives the name of the function of a call by the call's id.

    Raises:
        ApiError: 400 naming what cannot be understood.
    """
    before = event.get("previous_item_id")
    if before is not None and not isinstance(before, str):
        raise refused("previous_item_id", "previous_item_id is no text; name an item, or root")
    return replace(_item_of(event.get("item"), called), after=before)


def _item_of(item: Any, called: Callable[[str], str | None]) -> Item:
    kind = item.get("type", "message") if isinstance(item, dict) else None
    if not isinstance(item, dict) or kind not in _KINDS:
        raise refused("item", f"item is no message; its type must be one of {', '.join(_KINDS)}")
    id, role, parts = item.get("id"), item.get("role"), item.get("content")
    if id is not None and not (isinstance(id, str) and _ID.fullmatch(id)):
        raise refused("item.id", "item.id is no name of up to 64 letters, digits, - and _")
    if kind == "function_call":
        return _call(id, item)
    if kind == "function_call_output":
        return _output(id, item, called)
    if role not in ("user", "assistant"):
        raise refused(
            "item.role",
            f"item.role is {str(role)[:40]!r}; it is user or assistant; what a system says goes "
            "into session.instructions",
        )
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise refused("item.content", "item.content is no list of parts; give one")
    if role == "user" and len(parts) == 1 and parts[0].get("type") == "input_audio":
        content: str | Audio = sound_of(_samples(parts[0].get("audio")))
    else:
        content = _text(role, parts)
    return Item(id=id, role="user" if role == "user" else "assistant", content=content)


def _call(id: str | None, item: dict[str, Any]) -> Item:
    name, call_id, arguments = item.get("name"), item.get("call_id"), item.get("arguments")
    written = arguments if isinstance(arguments, str) and len(arguments) <= _LONGEST else ""
    try:
        given = json.loads(written)
    except (ValueError, RecursionError):
        given = None
    if not isinstance(name, str) or not _ID.fullmatch(name) or not isinstance(given, dict):
        raise refused(
            "item.arguments",
            "item is no call; give the name of a function and arguments as JSON in a string",
        )
    if not isinstance(call_id, str) or not 1 <= len(call_id) <= 64:
        raise refused("item.call_id", "item.call_id is no text of up to 64 characters; give one")
    call = Call(name=name, arguments=given, call_id=call_id)
    shown = {"type": "function_call", "name": name, "call_id": call_id, "arguments": written}
    return Item(id=id, role="assistant", content=call, shown=shown)


def _output(id: str | None, item: dict[str, Any], called: Callable[[str], str | None]) -> Item:
    call_id, output = item.get("call_id"), item.get("output")
    name = called(call_id) if isinstance(call_id, str) else None
    if name is None:
        raise refused(
            "item.call_id",
            f"item.call_id is {str(call_id)[:64]!r}, and no function was called under that id; "
            "take it from the call's item",
        )
    if not isinstance(output, str) or len(output) > _LONGEST:
        raise refused(
            "item.output", f"item.output is no text of up to {_LONGEST:,} characters; give one"
        )
    shown = {"type": "function_call_output", "call_id": call_id, "output": output}
    return Item(id=id, role="user", content=f"{name} returned: {output}", shown=shown)


def _text(role: str, parts: list[dict[str, Any]]) -> str:
    texts = []
    for place, part in enumerate(parts):
        text = part.get("text")
        if part.get("type") not in _PARTS[role] or not isinstance(text, str):
            raise refused(
                f"item.content[{place}]",
                f"item.content[{place}] is no {_PARTS[role][0]} part; an item holds texts, or one "
                "recording of the user's",
            )
        texts.append(text)
    whole = "\n".join(texts)
    if not whole.strip() or len(whole) > _LONGEST:
        raise refused(
            "item.content",
            f"item.content holds {len(whole)} characters; give between 1 and {_LONGEST:,}",
        )
    return whole


def _samples(given: Any) -> bytes:
    try:
        data = base64.b64decode(given if isinstance(given, str) else "?", validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if len(data) < 4800 or len(data) % 2:
        raise refused(
            "item.content[0].audio",
            "item.content[0].audio is no sound of at least 100 ms in base64 (16 bits, 24,000 Hz)",
        )
    return data
