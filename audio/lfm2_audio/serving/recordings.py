"""Room for recordings while they are written down: whoever finds none waits outside the memory.

An hour of sound is 220 MiB once it is decoded, however small its file. Knows sizes; nothing of what
is heard.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from lfm2_audio.waveform import Audio
from lfm2_mm.server.problems import ApiError

if TYPE_CHECKING:
    from lfm2_mm.server.context import Context

__all__ = ["Recordings"]

_MOST = 1 << 30  # bytes of samples at once
_READING = 4  # recordings decoded at once


class Recordings:
    """Those of one server.

    Args:
        waiting: How many callers may wait.
    """

    def __init__(self, waiting: int) -> None:
        self._most_waiting, self._waiting, self._held = waiting, 0, 0
        self._reading = asyncio.Semaphore(_READING)
        self._freed = asyncio.Event()

    @classmethod
    def of(cls, context: Context) -> Recordings:
        """Those of this server."""
        made = context.extras.get("audio.recordings")
        if made is None:
            made = context.extras["audio.recordings"] = cls(context.options.limits.waiting)
        assert isinstance(made, cls)
        return made

    async def take(self, read: Callable[[], Awaitable[Audio]]) -> Audio:
        """Read a recording once there is room; `give` it back in any case.

        Raises:
            ApiError: 429 if too many wait.
        """
        if self._waiting >= self._most_waiting:
            raise ApiError(
                429,
                f"{self._waiting} recordings are already waiting; try again in a moment",
                code="queue_full",
                retry_after=5,
            )
        self._waiting += 1
        try:
            async with self._reading:
                audio = await read()
                while self._held and self._held + _size(audio) > _MOST:
                    self._freed.clear()
                    await self._freed.wait()
                self._held += _size(audio)
                return audio
        finally:
            self._waiting -= 1

    def give(self, audio: Audio) -> None:
        """It is written down, or nobody wants it any more."""
        self._held -= _size(audio)
        self._freed.set()


def _size(audio: Audio) -> int:
    return audio.samples.nbytes
