"""What the user of a realtime conversation says, in writing, beside the answers.

Waits with it until an answer has begun to sound, so that nobody waits longer for an answer. Knows
the worker and the events' names; no socket and no loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lfm2_audio.serving.listening import heard_text
from lfm2_audio.waveform import Audio
from lfm2_mm.server.problems import ApiError, body_of, from_exception

if TYPE_CHECKING:
    from lfm2_mm.server.context import Context
    from lfm2_mm.server.registry import Served

__all__ = ["Minutes"]

_PATIENCE = 1.0  # seconds in which an answer may be asked for before a turn is written down
_LONGEST = 10.0  # seconds in which an answer that is on its way may begin
_MOST = 32 << 20  # bytes of sound that wait or are being written down
_KIND = "conversation.item.input_audio_transcription"


class Minutes:
    """Of one conversation.

    Args:
        context: The server's.
        served: The model.
        tell: Sends an event: its type, and its fields.

    Attributes:
        tasks: What is being written down.
    """

    def __init__(self, context: Context, served: Served, tell: Callable[..., None]) -> None:
        self._context, self._served, self._tell = context, served, tell
        self._waiting: list[tuple[str, Audio, str | None]] = []
        self._held, self._closed = 0, False
        self.tasks: set[asyncio.Task[None]] = set()

    def take(self, item_id: str, audio: Audio, *, answered: bool, language: str | None) -> None:
        """A turn of the user's.

        Args:
            item_id: Its item.
            audio: What was said.
            answered: Whether an answer to it is on its way.
            language: What it was said in.
        """
        if self._closed:
            return
        if self._held + _size(audio) > _MOST:
            problem = ApiError(
                429,
                f"more than {_MOST >> 20} MiB of sound wait to be written down; put in less at a "
                "time",
                code="too_much_audio",
            )
            self._fail(item_id, problem)
            return
        self._held += _size(audio)
        self._waiting.append((item_id, audio, language))
        asyncio.get_running_loop().call_later(_LONGEST if answered else _PATIENCE, self.begin)

    def begin(self) -> None:
        """Write down what waits."""
        for item_id, audio, language in self._waiting:
            task = asyncio.create_task(self._write(item_id, audio, language))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        self._waiting.clear()

    def close(self) -> None:
        """Nobody wants to know any more."""
        self._closed = True
        self._waiting.clear()
        for task in self.tasks:
            task.cancel()

    async def _write(self, item_id: str, audio: Audio, language: str | None) -> None:
        place: dict[str, Any] = {"item_id": item_id, "content_index": 0}

        def tell(text: str) -> None:
            self._tell(f"{_KIND}.delta", delta=text, **place)

        try:
            text, _, _ = await heard_text(
                self._context, self._served, audio, on_text=tell, language=language
            )
        except Exception as problem:
            self._fail(item_id, problem)
            return
        finally:
            self._held -= _size(audio)
        usage = {"type": "duration", "seconds": round(audio.duration, 3)}
        self._tell(f"{_KIND}.completed", transcript=text.strip(), usage=usage, **place)

    def _fail(self, item_id: str, problem: Exception) -> None:
        error = body_of(from_exception(problem))["error"]
        self._tell(f"{_KIND}.failed", error=error, item_id=item_id, content_index=0)


def _size(audio: Audio) -> int:
    return audio.samples.numel() * audio.samples.element_size()
