"""Messages of a remote caller, made safe: attachments become bytes, and nothing names a file here.

What may stand in a message is listed; everything else is left out or refused. Knows the OpenAI
forms; nothing of what encoders make of the bytes.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lfm2_mm.fetch import fetch
from lfm2_mm.server.options import Limits
from lfm2_mm.server.problems import ApiError

__all__ = ["audio_bytes", "names_urls", "safe_messages"]

_KEPT = ("role", "name", "tool_calls", "tool_call_id")
_TEXTS = ("text", "input_text", "output_text", "refusal")
_IMAGES = ("image_url", "input_image")

Fetch = Callable[[str], bytes]


def safe_messages(
    messages: Sequence[Mapping[str, Any]],
    *,
    fetcher: Fetch | None,
    limits: Limits,
    names: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Copies of messages in which attachments are bytes.

    Args:
        messages: As they came.
        fetcher: Reads http(s) URLs; None refuses them.
        limits: Sizes and counts.
        names: What the request calls each message, for errors; None is `messages[…]`.

    Raises:
        ApiError: 400 if a part cannot be understood, 413 if it is too large.
        FetchError: if a picture cannot be fetched.
    """
    images = 0
    safe = []
    for index, message in enumerate(messages):
        copy = {key: message[key] for key in _KEPT if message.get(key) is not None}
        content = message.get("content")
        name = f"messages[{index}]" if names is None else names[index]
        if isinstance(content, list):
            parts: list[Any] = []
            for place, part in enumerate(content):
                where = f"{name}.content[{place}]"
                parts.append(_part(part, where, fetcher, limits))
                images += parts[-1]["type"] == "image"
                if images > limits.images:
                    raise ApiError(
                        400,
                        f"the conversation holds more than {limits.images} images; leave some out",
                        code="too_many_images",
                        param=where,
                    )
            copy["content"] = parts
        elif content is None or isinstance(content, str):
            copy["content"] = content
        else:
            raise ApiError(
                400,
                f"{name}.content is {type(content).__name__}; give text or a list of parts",
                code="invalid_content",
                param=f"{name}.content",
            )
        safe.append(copy)
    return safe


def names_urls(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a message may hold something that has to be fetched."""
    contents = (message.get("content") for message in messages)
    parts = (part for content in contents if isinstance(content, list) for part in content)
    return any(_url(part)[:4].lower() == "http" for part in parts if isinstance(part, Mapping))


def _url(part: Mapping[str, Any]) -> str:
    """What a part names, if it is a picture."""
    given = part.get("image_url")
    url = given.get("url") if isinstance(given, Mapping) else given
    return url if isinstance(url, str) else ""


def _part(part: Any, where: str, fetcher: Fetch | None, limits: Limits) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in _TEXTS:
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise _bad(where, f"{where} is a {kind} part without text; give a string")
        return {"type": "text", "text": text}
    if kind in _IMAGES:
        url = _url(part)
        if not url:
            raise _bad(where, f"{where} has no URL; give image_url.url")
        return {"type": "image", "image": _image(url, where, fetcher, limits)}
    if kind == "input_audio":
        given = part.get("input_audio")
        data = given.get("data") if isinstance(given, Mapping) else None
        if not isinstance(data, str):
            raise _bad(where, f"{where} has no data; give input_audio.data in base64")
        return {"type": "audio", "audio": audio_bytes(data, where, limits)}
    raise _bad(
        where,
        f"{where} has the type {str(kind)[:40]!r}; this server reads text, image_url and "
        "input_audio",
    )


def _image(url: str, where: str, fetcher: Fetch | None, limits: Limits) -> bytes:
    scheme = url[:8].lower()
    if scheme.startswith("data:"):
        return fetch(url, max_bytes=limits.image_bytes)
    if not scheme.startswith(("http://", "https://")):
        raise _bad(
            where, f"{where} is no http, https or data URL; files of this machine are not read"
        )
    if fetcher is None:
        raise _bad(where, f"{where} is a URL, and this server fetches none; send a data URL")
    return fetcher(url)


def audio_bytes(data: str, where: str, limits: Limits) -> bytes:
    """Bytes of a recording in base64.

    Raises:
        ApiError: 413 if it is too large, 400 if it is not base64.
    """
    if len(data) > limits.audio_bytes * 4 // 3 + 4:
        raise ApiError(
            413,
            f"{where} holds more than {limits.audio_bytes:,} bytes; send a shorter recording",
            code="audio_too_large",
            param=where,
        )
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise _bad(where, f"{where} is not valid base64; encode the bytes again") from None


def _bad(param: str, message: str) -> ApiError:
    return ApiError(400, message, code="invalid_content", param=param)
