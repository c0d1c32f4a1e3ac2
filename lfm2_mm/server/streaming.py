"""Server-sent events whose end is noticed, however it comes; knows nothing of what they say."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

__all__ = ["EventStream", "event_line", "json_bytes"]


class EventStream(StreamingResponse):
    """Events of an answer in the making.

    Args:
        content: The events; may never be iterated, where the caller has gone before the first.
        end: Called at the end in any case; must not wait.
    """

    def __init__(self, content: AsyncIterator[bytes], end: Callable[[], None]) -> None:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(content, media_type="text/event-stream", headers=headers)
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


def event_line(value: dict[str, Any], name: str | None = None) -> bytes:
    """One event, of a `name` where its kind needs one."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + json_bytes(value) + b"\n\n"


def json_bytes(value: dict[str, Any]) -> bytes:
    """JSON in UTF-8; half characters of a caller, which UTF-8 has not, are written as escapes."""
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(value).encode()
