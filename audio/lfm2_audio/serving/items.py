"""`conversation.item.create`: what a client puts into a realtime conversation.

Knows the JSON form of items; no loop.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from lfm2_audio.serving.schema import refused
from lfm2_audio.serving.sounding import RATE
from lfm2_audio.waveform import Audio

__all__ = ["Item", "item_of", "sound_of"]

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_LONGEST = 20_000  # characters
_PARTS = {"user": ("input_text", "text"), "assistant": ("output_text", "text")}


@dataclass(frozen=True, kw_only=True)
class Item:
    """What was put: text, or from the user sound."""

    id: str | None
    role: Literal["user", "assistant"]
    content: str | Audio


def sound_of(data: bytes) -> Audio:
    """Samples of the API: little-endian, 16 bits, mono, at `RATE`."""
    samples = np.frombuffer(data, dtype="<i2").astype(np.float32) / 32768
    return Audio(torch.from_numpy(samples), RATE)


def item_of(event: dict[str, Any]) -> Item:
    """Read a `conversation.item.create`.

    Raises:
        ApiError: 400 naming what cannot be understood.
    """
    item = event.get("item")
    if not isinstance(item, dict) or item.get("type", "message") != "message":
        raise refused("item", "item is no message; items of a conversation here are messages")
    id, role, parts = item.get("id"), item.get("role"), item.get("content")
    if id is not None and not (isinstance(id, str) and _ID.fullmatch(id)):
        raise refused("item.id", "item.id is no name of up to 64 letters, digits, - and _")
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
